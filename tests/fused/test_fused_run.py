"""Whole runs of the command line by the fast path and by the plain one: one trajectory."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from conftest import build_model, save_model
from fused_models import KINDS
from safetensors.torch import load_file
from typer.testing import CliRunner

from ftcli.cli.app import app
from ftcli.events import Notice
from ftcli.store.run import RunFolder
from ftcli.train.run import train

PACKED = ("data.packing=true", "data.max_length=64", "train.per_device_train_batch_size=1")
CHECKPOINTED = ("train.gradient_checkpointing=true",)


def run_cli(path: Path, folder: Path, *settings: str) -> RunFolder:
    """The run that ``ftcli train`` made in ``folder``."""
    words = ["train", str(path), *(f"--set={text}" for text in (f"output_dir={folder}", *settings)), "--quiet"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    return RunFolder(folder)


def run_both(path: Path, folder: Path, *settings: str) -> list[RunFolder]:
    """The run by the plain path, and the one by the fast path."""
    return [run_cli(path, folder / name, f"train.fused={name}", *settings) for name in ("false", "true")]


def read_metrics(run: RunFolder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]


def check_one_trajectory(plain: RunFolder, fast: RunFolder, *, n_steps: int = 6, rounding: float = 1e-5) -> None:
    """None if losses and gradient norms are one but for rounding, which leans to no side."""
    expected, found = read_metrics(plain), read_metrics(fast)
    assert len(expected) == len(found) == n_steps
    for one, other in zip(expected, found, strict=True):
        for key in ("step", "epoch", "lr", "n_target_tokens", "n_tokens", "rows"):
            assert other[key] == one[key]
        assert other["loss"] == pytest.approx(one["loss"], abs=rounding)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=rounding)
    residuals = [other["loss"] - one["loss"] for one, other in zip(expected, found, strict=True)]
    assert abs(fmean(residuals)) <= rounding / 10
    assert expected[-1]["loss"] < expected[0]["loss"] - 0.01


def check_adapters(plain: RunFolder, fast: RunFolder) -> None:
    """None if both runs saved the same weights but for rounding, under the same names."""
    expected, found = (load_file(run.adapter / "adapter_model.safetensors") for run in (plain, fast))
    assert expected.keys() == found.keys()
    for name, weight in expected.items():
        assert (found[name] - weight).norm() <= 1e-3 * weight.norm(), name


@pytest.mark.parametrize("settings", [CHECKPOINTED, PACKED])
def test_both_paths_are_one_trajectory(write_recipe: Any, tmp_path: Path, settings: tuple[str, ...]) -> None:
    """With dropout, whose masks are those of PEFT in float32."""
    runs = run_both(write_recipe(), tmp_path, "peft.lora_dropout=0.1", *settings)
    check_one_trajectory(*runs)
    check_adapters(*runs)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", [(), CHECKPOINTED, PACKED, (*PACKED, *CHECKPOINTED)])
def test_every_family_is_one_trajectory(
    write_recipe: Any, tmp_path: Path, tiny_tokenizer: Any, kind: str, settings: tuple[str, ...]
) -> None:
    folder = save_model(tmp_path / "model", build_model(kind, **KINDS[kind]), tiny_tokenizer)
    path = write_recipe(model={"name_or_path": str(folder), "dtype": "float32"})
    check_one_trajectory(*run_both(path, tmp_path, *settings))


@pytest.mark.slow
@pytest.mark.parametrize("settings", [(), PACKED])
@pytest.mark.parametrize(
    "peft",
    [
        {"r": 4, "use_rslora": True, "target_modules": "attn"},
        {"r": 4, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 3}},
        {"r": 4, "use_dora": True},
        {"r": 4, "target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
        {"r": 4, "modules_to_save": ["norm"]},
        {"r": 4, "modules_to_save": ["embed_tokens"]},
        {"r": 4, "init_lora_weights": "pissa"},
        None,
    ],
)
def test_every_method_is_one_trajectory(
    write_recipe: Any, tmp_path: Path, peft: dict[str, Any] | None, settings: tuple[str, ...]
) -> None:
    runs = run_both(write_recipe(peft=peft), tmp_path, "train.learning_rate=3e-3", *settings)
    check_one_trajectory(*runs, rounding=3e-5)


@pytest.mark.parametrize("peft", [{"r": 4}, pytest.param({"r": 4, "use_dora": True}, marks=pytest.mark.slow)])
def test_4_bits_are_one_trajectory(write_recipe: Any, tmp_path: Path, peft: dict[str, Any]) -> None:
    path = write_recipe(peft=peft, quantization={"load_in_4bit": True})
    check_one_trajectory(*run_both(path, tmp_path, "train.learning_rate=3e-3", *PACKED))


@pytest.mark.parametrize(
    ("peft", "tied"),
    [
        pytest.param({"r": 4}, True, marks=pytest.mark.slow),
        ({"r": 4, "modules_to_save": ["embed_tokens"]}, False),
        pytest.param({"r": 4, "modules_to_save": ["embed_tokens"]}, True, marks=pytest.mark.slow),
        pytest.param({"r": 4, "modules_to_save": ["lm_head", "norm"]}, False, marks=pytest.mark.slow),
        pytest.param(None, True, marks=pytest.mark.slow),
        pytest.param(None, False, marks=pytest.mark.slow),
    ],
)
def test_runs_in_bfloat16_stay_near(
    write_recipe: Any, tmp_path: Path, tiny_tokenizer: Any, peft: dict[str, Any] | None, tied: bool
) -> None:
    """Weights trained in float32 beside frozen ones in bfloat16 need autocast, on either path."""
    folder = save_model(tmp_path / "model", build_model(tied=tied), tiny_tokenizer)
    path = write_recipe(peft=peft, model={"name_or_path": str(folder), "dtype": "bfloat16"})
    runs = run_both(path, tmp_path, "train.learning_rate=3e-3", *PACKED, *CHECKPOINTED)
    check_one_trajectory(*runs, rounding=0.02)


def test_the_fast_path_is_taken_without_a_word_and_the_plain_one_with_a_notice(
    write_recipe: Any, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    folder = save_model(tmp_path / "model", build_model("gpt2"), tiny_tokenizer)
    notices: dict[str, list[str]] = {}
    for name, changes in (("llama", {}), ("gpt2", {"model": {"name_or_path": str(folder), "dtype": "float32"}})):
        seen = notices.setdefault(name, [])

        def note(event: Any, seen: list[str] = seen) -> None:
            if isinstance(event, Notice):
                seen.append(event.text)

        train(write_recipe(**changes), overrides=(f"output_dir={tmp_path / name}", "train.max_steps=1"), on_event=note)
    assert not [text for text in notices["llama"] if "path" in text]
    expected = "the fast path does not know the family gpt2: training takes the plain path, which is slower"
    assert expected in notices["gpt2"]
