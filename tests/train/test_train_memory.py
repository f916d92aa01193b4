"""Free heap that goes back while a model trains, and the forecast that a run makes of itself."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import build_model, save_model

from ftcli.store.run import read_manifest
from ftcli.train import memory
from ftcli.train.run import train

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "forecast.py"


def compute_gradients(model: Any, *, is_checkpointed: bool) -> dict[str, torch.Tensor]:
    model.zero_grad()
    if is_checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.arange(40).unsqueeze(0)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # the old name works in every version
@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_heap_goes_back_before_head_and_blocks_in_training_alone(
    monkeypatch: pytest.MonkeyPatch, is_checkpointed: bool
) -> None:
    model = build_model().train()
    expected = compute_gradients(model, is_checkpointed=is_checkpointed)
    calls: list[int] = []
    held = itertools.count(1)  # a heap that only grows is trimmed before every other block
    monkeypatch.setattr(memory, "release_free_memory", lambda: calls.append(1))
    monkeypatch.setattr(memory, "measure_rss", lambda: next(held))
    memory.release_between_blocks(model)
    found = compute_gradients(model, is_checkpointed=is_checkpointed)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert len(calls) >= model.config.num_hidden_layers + 1
    calls.clear()
    monkeypatch.setattr(memory, "measure_rss", lambda: 1)  # one that does not grow, before the head alone
    compute_gradients(model, is_checkpointed=is_checkpointed)
    assert len(calls) == 1
    calls.clear()
    with torch.no_grad():
        model.eval()(input_ids=torch.arange(8).unsqueeze(0))
    assert not calls


def test_unread_rows_of_an_untied_embedding_are_not_in_the_forecast(
    write_recipe: Any, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    rows, width = 60_000, 64
    model = build_model(vocab_size=rows, tie_word_embeddings=False)
    folder = save_model(tmp_path / "wide", model, tiny_tokenizer)
    changes: dict[str, Any] = {"model": {"name_or_path": str(folder), "dtype": "float32"}, "train": {"max_steps": 1}}
    forecast = read_manifest(train(write_recipe(**changes)))["forecast"]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    unread = 4 * parameters - forecast["weights_bytes"]
    ids_below = 400  # the tokenizer has no more entries, and they stand first
    assert 4 * width * (rows - ids_below) - (2 << 16) <= unread < 4 * width * rows
    whole = read_manifest(
        train(write_recipe(**changes, tokenizer={"add_tokens": ["zyzzyva"]}, output_dir=str(tmp_path / "second")))
    )["forecast"]
    assert whole["weights_bytes"] == 4 * parameters
    assert np.isfinite(whole["total_bytes"])


@pytest.mark.slow
@pytest.mark.parametrize("point", [0, 2, 4, 7])
def test_forecast_is_what_a_run_takes(tmp_path: Path, point: int) -> None:
    output = tmp_path / "result.json"
    subprocess.run([sys.executable, BENCHMARK, "--only", str(point), "--output", output], check=True, timeout=500)
    (row,) = json.loads(output.read_text())["points"]
    assert abs(row["error"]) < 0.10, row
