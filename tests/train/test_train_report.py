"""What a run leaves for people: a page of curves, a card that can be published, and trackers that were told."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from ftcli.errors import UsageError
from ftcli.events import Notice
from ftcli.store.run import RunFolder
from ftcli.train.card import build_card
from ftcli.train.plot import Curve, draw_curves
from ftcli.train.report import build_report
from ftcli.train.run import train

VOID = {"meta", "br", "hr", "img", "link", "wbr", "path", "use"}


class Page(HTMLParser):
    """Checks that tags close in order, and gathers text and what would be fetched."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.fetched: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "href", "xlink:href") and value and not value.startswith("#"):
                self.fetched.append(value)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)


@pytest.fixture
def recipe(write_recipe: Any) -> Path:
    held_out = {"datasets": [{"path": "held_out.jsonl"}], "eval_steps": 2, "score": "exact_match", "max_new_tokens": 3}
    path: Path = write_recipe(eval={**held_out, "sample_prompts": ["<b>fox</b> & co"]})
    return path


def test_a_run_leaves_a_page_and_a_card(recipe: Path) -> None:
    """The page needs nothing else; the card holds no path of this machine, and names a base on the Hub."""
    run = train(recipe, should_report=True)
    page = Page(run.report.read_text())
    text = " ".join(page.words)
    assert page.fetched == []
    assert "<script" not in run.report.read_text()
    for title in ("loss", "learning rate", "gradient norm", "throughput", "memory", "score", "forecast"):
        assert title in text
    assert run.report.read_text().count("<svg") == 6
    assert "<b>fox</b> & co" in text  # as text, not as HTML
    manifest = json.loads(run.manifest.read_text())
    assert manifest["base"]["fingerprint"] in text
    assert "lora_alpha: 8" in text
    entries = [json.loads(line) for line in run.eval.read_text().splitlines()]
    assert all(f"{entry['loss']:.4f}" in text for entry in entries)
    card = run.card.read_text()
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "peft", "pipeline_tag": "text-generation", "tags": ["ftcli", "lora"],
    }  # fmt: skip
    assert str(recipe.parent) not in card
    assert "`train.jsonl`" in body
    last = [json.loads(line) for line in run.metrics.read_text().splitlines()][-1]
    assert f"{last['loss']:.4f} (last step)" in body
    for command in ("PeftModel.from_pretrained", "ftcli export . --gguf", "ollama create"):
        assert command in body
    manifest["base"]["id"] = "acme/llama"
    run.manifest.write_text(json.dumps(manifest))
    card = build_card(run)
    assert "base_model: acme/llama" in card
    assert 'path, base = "adapter", "acme/llama"' in card
    for path in (run.metrics, run.timing, run.eval):
        path.write_text("")
    Page(build_report(run))  # of a run that has made no step yet


def test_a_run_that_failed_has_a_page_too(write_recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from ftcli.train import execution

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(execution, "save_artifact", fail)
    path = write_recipe()
    with pytest.raises(RuntimeError, match="boom"):
        train(path, should_report=True)
    run = RunFolder(path.parent / "run")
    assert "failed" in " ".join(Page(run.report.read_text()).words)


def test_what_cannot_be_drawn_is_told_and_no_failure(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ftcli.train import run as module

    def fail(run: RunFolder) -> None:
        raise OSError("no room")

    monkeypatch.setattr(module, "write_report", fail)
    told: list[Any] = []
    run = train(recipe, should_report=True, on_event=told.append)
    assert json.loads(run.manifest.read_text())["state"] == "finished"
    assert any(isinstance(event, Notice) and "no room" in event.text for event in told)


def test_a_long_curve_is_a_mean_with_its_band() -> None:
    steps = list(range(1, 50_001))
    svg = draw_curves("loss", "nats", [Curve("training", steps, [1 / step for step in steps])])
    assert len(svg) < 100_000
    assert 'width="100%"' in svg
    assert svg == draw_curves("loss", "nats", [Curve("training", steps, [1 / step for step in steps])])
    assert not re.search(r"<dc:date>|Created with", svg)


def test_tensorboard_is_told_every_step(write_recipe: Any) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    held_out = {"datasets": [{"path": "held_out.jsonl"}], "eval_steps": 3}
    run = train(write_recipe(eval=held_out, logging={"report_to": ["tensorboard"]}))
    (folder,) = {path.parent for path in (run.path / "trackers").rglob("events.*") if path.parent.name == "ftcli"}
    found = events.EventAccumulator(str(folder)).Reload()
    metrics = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    told = {event.step: event.value for event in found.Scalars("train/loss")}
    assert told == {entry["step"]: pytest.approx(entry["loss"], rel=1e-6) for entry in metrics}
    assert [event.step for event in found.Scalars("eval/held_out/loss")] == [0, 3, 6]


def test_a_tracker_that_fails_is_no_failure(write_recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from accelerate import Accelerator

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("the server is gone")

    monkeypatch.setattr(Accelerator, "log", fail)
    told: list[Any] = []
    run = train(write_recipe(logging={"report_to": ["tensorboard"]}), on_event=told.append)
    assert json.loads(run.manifest.read_text())["state"] == "finished"
    assert sum(isinstance(event, Notice) and "the server is gone" in event.text for event in told) == 1


def test_a_tracker_that_is_not_installed_is_told_first(write_recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from ftcli.train import tracking

    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="wandb is not installed") as caught:
        train(write_recipe(logging={"report_to": ["wandb"]}))
    assert caught.value.hint == "run: pip install wandb"
