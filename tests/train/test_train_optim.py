"""The learning rate against transformers' own schedulers, and what weight decay leaves alone."""

from __future__ import annotations

import pytest
import torch
from conftest import build_model
from transformers import get_scheduler

from ftcli.recipe import TrainSection
from ftcli.train.optim import build_optimizer, compute_lr, plan_warmup


@pytest.mark.parametrize("name", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup_steps", [0, 1, 7])
def test_schedules_are_those_of_transformers(name: str, warmup_steps: int) -> None:
    train = TrainSection(learning_rate=3e-4, lr_scheduler_type=name, warmup_steps=warmup_steps)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    theirs = "constant_with_warmup" if name == "constant" else name
    scheduler = get_scheduler(theirs, optimizer, num_warmup_steps=warmup_steps, num_training_steps=30)
    for step in range(1, 31):
        assert compute_lr(train, step, 30) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12, abs=1e-18)
        optimizer.step()
        scheduler.step()


def test_warmup_ratio_is_rounded_up() -> None:
    assert plan_warmup(TrainSection(warmup_ratio=0.1), 31) == 4


def test_vectors_are_not_decayed() -> None:
    optimizer = build_optimizer(build_model(), TrainSection(weight_decay=0.1))
    decayed, kept = optimizer.param_groups
    assert all(p.ndim > 1 for p in decayed["params"])
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert all(p.ndim == 1 for p in kept["params"])
