"""Runs side by side, a first recipe, and other tools' configs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ftcli.cli.listing import list_comparison
from ftcli.cli.listing import list_runs as draw_runs
from ftcli.errors import ContentError, UsageError
from ftcli.jobs.runs import compare_runs, list_runs
from ftcli.jobs.start import init_recipe
from ftcli.recipe import load_recipe
from ftcli.train.run import train


def test_runs_are_listed_and_compared(write_recipe: Any, tmp_path: Path) -> None:
    held_out = {"datasets": [{"path": "held_out.jsonl"}]}
    first = train(write_recipe(output_dir=str(tmp_path / "runs/one"), eval=held_out))
    second = train(write_recipe(output_dir=str(tmp_path / "runs/two")), overrides=("train.learning_rate=1e-3",))
    broken = tmp_path / "runs/three"
    broken.mkdir()
    (broken / "manifest.json").write_text('{"schema": 1, "state": "failed"}')
    (tmp_path / "runs/other").mkdir()
    (tmp_path / "runs/other/manifest.json").write_text("{}")  # another program's
    rows = {Path(row.run).name: row for row in list_runs(tmp_path / "runs")}
    assert set(rows) == {"one", "two", "three"}
    losses = [json.loads(line)["loss"] for line in first.eval.read_text().splitlines()]
    assert rows["one"].best_loss == min(losses[1:])
    assert rows["one"].is_held_out
    assert not rows["two"].is_held_out
    assert rows["one"].data == ("train.jsonl",)
    assert rows["one"].steps == 6
    assert rows["one"].size_bytes > 10_000
    assert rows["three"].problem
    lines = list(draw_runs(tuple(rows.values()), 80))
    assert max(map(len, lines)) <= max(80, len(str(broken)) + 80)
    assert any("*" in line for line in lines)
    found = compare_runs(first.path, second.path)
    assert set(found.recipe) == {"train.learning_rate", "eval"}
    assert found.recipe["train.learning_rate"] == (1e-2, 1e-3)
    assert found.results["steps"] == (6, 6)
    assert found.results["held_out, loss"][1] is None
    assert all(len(line) <= 100 for line in list_comparison(found, 100))
    with pytest.raises(ContentError):
        compare_runs(first.path, tmp_path / "runs/nothing")
    with pytest.raises(UsageError):
        list_runs(tmp_path / "gone")


def test_a_first_recipe_trains(tiny_model: Path, write_rows: Any, tmp_path: Path) -> None:
    data = write_rows("rows.jsonl", 130)
    draft = init_recipe(str(tiny_model), str(data), tmp_path / "mine.yaml")
    recipe = load_recipe(tmp_path / "mine.yaml").recipe
    assert draft.choice.fits
    assert recipe.model.name_or_path == str(tiny_model)
    assert recipe.datasets[0].path == str(data)
    assert recipe.data.val_set_size == 0.05
    assert recipe.data.max_length == 128
    run = train(tmp_path / "mine.yaml", overrides=(f"output_dir={tmp_path / 'run'}", "train.num_train_epochs=1"))
    assert json.loads(run.manifest.read_text())["state"] == "finished"
    with pytest.raises(UsageError, match="is there already"):
        init_recipe(str(tiny_model), str(data), tmp_path / "mine.yaml")


def test_a_first_recipe_fits_the_card(write_rows: Any, tiny_model: Path, tmp_path: Path) -> None:
    data = write_rows("rows.jsonl", 20)
    draft = init_recipe(str(tiny_model), str(data), tmp_path / "small.yaml", budget_bytes=10_000)
    assert not draft.choice.fits
    assert draft.choice.method == "qlora"  # the least that there is
    assert load_recipe(tmp_path / "small.yaml").recipe.is_4bit
