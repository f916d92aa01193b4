"""One loss whatever the split, one run however often it was stopped: whole runs of the command line, held together."""

from __future__ import annotations

import itertools
import json
import os
import signal
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from conftest import build_model, save_model
from typer.testing import CliRunner

from ftcli.cli.app import app
from ftcli.errors import Interrupted
from ftcli.events import StepDone
from ftcli.store.run import RunFolder
from ftcli.train.run import train

SPLITS = ((8, 1), (4, 2), (2, 4), (1, 8))


def run_cli(path: Path, folder: Path, *settings: str, resume: bool = False) -> RunFolder:
    """The run that ``ftcli train`` made in ``folder``."""
    words = ["train", str(path), *(f"--set={text}" for text in (f"output_dir={folder}", *settings)), "--quiet"]
    result = CliRunner().invoke(app, [*words, *(["--resume"] if resume else [])])
    assert result.exit_code == 0, result.output
    return RunFolder(folder)


def read_metrics(run: RunFolder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]


def check_same_class(runs: dict[str, list[dict[str, Any]]]) -> None:
    """None if all trajectories are one but for rounding, which leans to no side."""
    base = next(iter(runs.values()))
    for name, metrics in runs.items():
        for expected, found in zip(base, metrics, strict=True):
            for key in ("step", "epoch", "lr", "n_target_tokens", "n_tokens", "rows"):
                assert found[key] == expected[key], name
            assert found["loss"] == pytest.approx(expected["loss"], abs=1e-5), name
            assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5), name
        residuals = [found["loss"] - expected["loss"] for expected, found in zip(base, metrics, strict=True)]
        assert abs(fmean(residuals)) <= 1e-6, name


def list_equivalents() -> list[tuple[str, tuple[str, ...]]]:
    """Settings that must not change a number: the split of a step, attention, checkpointing."""
    found = []
    for (rows, times), attention, holds in itertools.product(SPLITS, ("sdpa", "eager"), ("false", "true")):
        settings = (
            f"train.per_device_train_batch_size={rows}",
            f"train.gradient_accumulation_steps={times}",
            f"model.attn_implementation={attention}",
            f"train.gradient_checkpointing={holds}",
        )
        found.append((f"{rows}x{times} {attention} {holds}", settings))
    return found


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_splits_attention_and_checkpointing_give_one_trajectory(write_recipe: Any, tmp_path: Path, every: int) -> None:
    """Twelve rows in steps of eight: every second step is a partial window of four."""
    path = write_recipe()
    runs = {name: read_metrics(run_cli(path, tmp_path / name, *s)) for name, s in list_equivalents()[::every]}
    assert [entry["rows"] for entry in next(iter(runs.values()))] == [8, 4] * 3
    check_same_class(runs)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "phi3", "gemma2", "gemma3", "mistral"])
@pytest.mark.parametrize("seed", [1, 2])
def test_other_families_and_seeds_have_one_trajectory_too(
    write_recipe: Any, tmp_path: Path, tiny_tokenizer: Any, kind: str, seed: int
) -> None:
    folder = save_model(tmp_path / "model", build_model(kind, seed=seed), tiny_tokenizer)
    path = write_recipe(model={"name_or_path": str(folder), "dtype": "float32"})
    chosen = [case for case in list_equivalents() if kind != "gemma2" or "eager" in case[0]]  # sdpa has no soft caps
    settings = (f"train.seed={seed}", "train.num_train_epochs=2", "train.max_steps=null")
    check_same_class({name: read_metrics(run_cli(path, tmp_path / name, *s, *settings)) for name, s in chosen})


def test_a_packed_step_is_its_rows_run_apart(write_recipe: Any, tmp_path: Path) -> None:
    """A pack that holds every row is one step; so are the rows, one at a time."""
    path = write_recipe()
    packed = ("data.packing=true", "data.max_length=512", "train.gradient_accumulation_steps=1")
    apart = ("data.packing=false", "train.gradient_accumulation_steps=12")
    settings = ("train.per_device_train_batch_size=1", "train.max_steps=5")
    runs = {
        f"{name} {attention}": read_metrics(
            run_cli(path, tmp_path / f"{name} {attention}", *own, *settings, f"model.attn_implementation={attention}")
        )
        for attention in ("sdpa", "eager")
        for name, own in (("packed", packed), ("apart", apart))
    }
    assert {entry["rows"] for metrics in runs.values() for entry in metrics} == {12}
    check_same_class(runs)


@pytest.mark.parametrize("quantization", ["null", "{load_in_4bit: true}"])
def test_evaluating_and_sampling_change_nothing(write_recipe: Any, tmp_path: Path, quantization: str) -> None:
    path = write_recipe()
    evaluation = f"{{datasets: [{{path: {path.parent / 'held_out.jsonl'}}}], eval_steps: 1, score: exact_match, "
    evaluation += "max_new_tokens: 4, sample_prompts: [question 3], loss_by: [role, source]}"
    settings = (f"quantization={quantization}", "peft.lora_dropout=0.2")
    with_eval = run_cli(path, tmp_path / "with", *settings, f"eval={evaluation}")
    without = run_cli(path, tmp_path / "without", *settings, "eval=null")
    assert with_eval.metrics.read_bytes() == without.metrics.read_bytes()
    assert len(with_eval.eval.read_text().splitlines()) == 7


HARD = (
    "peft.lora_dropout=0.3",
    "train.max_steps=null",
    "train.num_train_epochs=3",
    "train.warmup_ratio=0.25",
    "train.lr_scheduler_type=cosine",
)


@pytest.mark.parametrize(
    ("packing", "step"),
    [
        ("false", 1),
        ("true", 5),
        ("false", "last - 1"),
        *(pytest.param("true", step, marks=pytest.mark.slow) for step in (1, 4, "last - 1")),
        *(pytest.param("false", step, marks=pytest.mark.slow) for step in (4, 5)),
    ],
)
def test_a_run_stopped_at_any_step_ends_as_the_whole_one(
    write_recipe: Any, tmp_path: Path, packing: str, step: int | str
) -> None:
    """Twelve rows in steps of five rows or two packs: epochs end at steps 3, 6, 9."""
    settings = (*HARD, f"data.packing={packing}", "data.max_length=64", "train.gradient_accumulation_steps=5")
    settings = (*settings, "train.per_device_train_batch_size=1")
    path = write_recipe()
    whole = run_cli(path, tmp_path / "whole", *settings)
    wanted = len(read_metrics(whole)) - 1 if isinstance(step, str) else step

    def on_event(event: Any) -> None:
        if isinstance(event, StepDone) and event.step == wanted:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        train(path, overrides=(f"output_dir={tmp_path / 'run'}", *settings), on_event=on_event)
    run = run_cli(path, tmp_path / "run", *settings, resume=True)
    assert run.metrics.read_bytes() == whole.metrics.read_bytes()
    name = "adapter_model.safetensors"
    assert (run.adapter / name).read_bytes() == (whole.adapter / name).read_bytes()
