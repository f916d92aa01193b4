"""What a run is given to learn: several data sets with weights, a date that does not move, errors before the model."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from conftest import CHATML, build_model, build_tokenizer, save_model

from ftcli.errors import ContentError, Interrupted
from ftcli.store.run import RunFolder, read_manifest
from ftcli.train.run import train
from ftcli.train.stop import StopRequest


def read_metrics(run: RunFolder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]


def interrupt_at(monkeypatch: Any, step: int) -> Any:
    """An event handler that stops the run after ``step``, as a signal would."""
    stops: list[StopRequest] = []
    enter = StopRequest.__enter__
    monkeypatch.setattr(StopRequest, "__enter__", lambda self: stops.append(self) or enter(self))

    def on_event(event: Any) -> None:
        if getattr(event, "step", 0) == step and hasattr(event, "lr"):
            stops[-1].signal_number = 15

    return on_event


@pytest.mark.parametrize("packing", [False, True])
def test_weighted_data_sets_are_seen_as_often_as_they_say_and_resume_exactly(
    write_recipe: Any, write_rows: Any, tmp_path: Path, monkeypatch: Any, packing: bool
) -> None:
    write_rows("other.jsonl", 8)
    sections: dict[str, Any] = {
        "datasets": [{"path": "train.jsonl", "weight": 0.5}, {"path": "other.jsonl", "weight": 2}],
        "data": {"max_length": 64, "packing": packing},
    }
    overrides = ("train.max_steps=null", "train.num_train_epochs=2", "train.gradient_accumulation_steps=1")
    whole = train(write_recipe(**sections), overrides=(*overrides, f"output_dir={tmp_path / 'whole'}"))
    assert sum(entry["rows"] for entry in read_metrics(whole)) == 2 * (12 // 2 + 8 * 2)
    assert read_metrics(whole)[-1]["epoch"] == 2.0
    path = write_recipe(**sections)
    with pytest.raises(Interrupted):
        train(path, overrides=overrides, on_event=interrupt_at(monkeypatch, 4))
    run = train(path, overrides=overrides, resume=True)
    assert run.metrics.read_bytes() == whole.metrics.read_bytes()


def test_the_date_of_a_template_is_that_of_the_first_start(write_recipe: Any, tmp_path: Path, monkeypatch: Any) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }} " + CHATML
    folder = save_model(tmp_path / "base", build_model(), tokenizer)
    path = write_recipe(model={"name_or_path": str(folder), "dtype": "float32"})
    with pytest.raises(Interrupted):
        train(path, on_event=interrupt_at(monkeypatch, 2))
    run = RunFolder(tmp_path / "run")
    today = datetime.fromisoformat(read_manifest(run)["template_date"])
    assert today.date() == datetime.now().date()

    class Tomorrow(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return cls(2031, 1, 2)

    monkeypatch.setattr("ftcli.data.template.datetime", Tomorrow)
    train(path, resume=True)
    assert datetime.fromisoformat(read_manifest(run)["template_date"]) == today
    fresh = train(path, overrides=(f"output_dir={tmp_path / 'fresh'}",))
    assert read_manifest(fresh)["template_date"].startswith("2031-01-02")


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"tokenizer": {"chat_template": "llama3"}}, "lacks 3 of the tokens"),
        ({"data": {"max_length": 16, "packing": False}}, "rows are longer than data.max_length 16"),
        ({"datasets": [{"path": "train.jsonl", "train_on": ["tool"]}]}, "no row of train has a token to train on"),
    ],
)
def test_errors_come_before_the_model_and_the_run_folder(
    write_recipe: Any, tmp_path: Path, monkeypatch: Any, sections: dict[str, Any], words: str
) -> None:
    def load(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr("ftcli.train.engine.build_model", load)
    with pytest.raises(ContentError, match=words):
        train(write_recipe(**sections))
    assert not (tmp_path / "run").exists()


def test_warnings_are_told_and_do_not_stop(write_recipe: Any, tmp_path: Path) -> None:
    path = write_recipe(eval={"datasets": [{"path": "train.jsonl"}]})
    rows = (tmp_path / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join([*rows, rows[0]]))
    notices: list[str] = []
    train(path, overrides=("train.max_steps=1",), on_event=lambda event: notices.append(getattr(event, "text", "")))
    assert any("train: 1 of 13 rows stand in the data before" in notice for notice in notices)
    assert any("of 13 rows are trained on too" in notice for notice in notices)
