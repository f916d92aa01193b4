"""The optimizer, and the learning rate as a function of the step alone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from ftcli.recipe import TrainSection


def build_optimizer(model: torch.nn.Module, train: TrainSection) -> torch.optim.AdamW:
    """AdamW over the parameters that are trained; vectors (norms, biases, DoRA magnitudes) are not decayed."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": train.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=train.learning_rate,
        betas=(train.adam_beta1, train.adam_beta2),
        eps=train.adam_epsilon,
        fused=train.optim == "adamw_torch_fused",
    )


def plan_warmup(train: TrainSection, total_steps: int) -> int:
    """Steps of warm-up: ``warmup_steps``, or the share ``warmup_ratio`` of all steps, rounded up."""
    if train.warmup_steps is not None:
        return train.warmup_steps
    return math.ceil(round(train.warmup_ratio * total_steps, 6))


def compute_lr(train: TrainSection, step: int, total_steps: int) -> float:
    """The learning rate applied in optimizer step ``step`` (from 1) of ``total_steps``.

    The same curves as ``transformers.get_scheduler``, where warm-up rises linearly from 0 in the first step;
    ``constant`` with a warm-up is its ``constant_with_warmup``.
    """
    warmup_steps = plan_warmup(train, total_steps)
    done = step - 1
    if done < warmup_steps:
        return train.learning_rate * done / max(1, warmup_steps)
    progress = (done - warmup_steps) / max(1, total_steps - warmup_steps)
    if train.lr_scheduler_type == "linear":
        return train.learning_rate * max(0.0, 1.0 - progress)
    if train.lr_scheduler_type == "cosine":
        return train.learning_rate * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
    return train.learning_rate


def set_lr(optimizer: Any, lr: float) -> None:
    """Nothing; ``optimizer`` uses ``lr`` in its next step."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def list_trained(model: torch.nn.Module) -> Iterable[tuple[str, torch.nn.Parameter]]:
    """Name and parameter of everything that is trained, in the model's order."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
