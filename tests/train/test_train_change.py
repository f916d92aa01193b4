"""A recipe that is changed before a run goes on: what that does is said, and done, or refused with the reason."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from ftcli.errors import ContentError, Interrupted, UsageError
from ftcli.events import Notice, StepDone
from ftcli.recipe import load_recipe
from ftcli.recipe.field import list_keys
from ftcli.store.run import RunFolder, read_manifest
from ftcli.train.change import _EFFECTS, find_effect
from ftcli.train.run import train


def read_metrics(run: RunFolder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]


@pytest.fixture
def stopped(write_recipe: Any) -> Path:
    """The recipe of a run that was stopped after step 3 of 6."""
    path: Path = write_recipe()

    def on_event(event: Any) -> None:
        if isinstance(event, StepDone) and event.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        train(path, on_event=on_event)
    return path


def go_on(path: Path, *settings: str) -> tuple[RunFolder, list[str]]:
    notices: list[str] = []
    told = train(
        path,
        overrides=settings,
        resume=True,
        on_event=lambda event: notices.append(event.text) if isinstance(event, Notice) else None,
    )
    return told, notices


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("train.gradient_checkpointing=true", "the steps stay the same but for rounding"),
        ("train.per_device_train_batch_size=4", "steps have the same rows, in portions of another size"),
        ("checkpoint.save_steps=1", "the steps stay the same"),
        ("eval={sample_prompts: [hello], max_new_tokens: 4}", "measurements from here on are made as it says"),
    ],
)
def test_what_changes_no_number_is_said_and_goes_on(stopped: Path, tmp_path: Path, setting: str, words: str) -> None:
    whole = train(stopped, overrides=(f"output_dir={tmp_path / 'whole'}",))
    settings = (setting, "train.gradient_accumulation_steps=1") if "batch_size" in setting else (setting,)
    run, notices = go_on(stopped, *settings)
    assert any(words in notice for notice in notices)
    for expected, found in zip(read_metrics(whole), read_metrics(run), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], abs=1e-5)


def test_another_course_holds_from_the_next_step_on(stopped: Path) -> None:
    before = read_metrics(RunFolder(stopped.parent / "run"))
    run, notices = go_on(stopped, "train.learning_rate=0.001", "train.max_steps=8")
    assert "train.learning_rate was 0.01, now 0.001: the learning rate follows the new curve from step 4 on" in notices
    assert any(n.startswith("train.max_steps was 6, now 8: the run has another length") for n in notices)
    after = read_metrics(run)
    assert after[:3] == before
    assert len(after) == 8
    assert 0 < after[3]["lr"] < 0.001
    changes = read_manifest(run)["changes"]
    assert {"step": 3, "key": "train.learning_rate", "old": 0.01, "new": 0.001} in changes
    assert load_recipe(run.recipe).recipe.train.max_steps == 8
    told, notices = go_on(stopped, "train.learning_rate=0.001", "train.max_steps=8")
    assert notices == [f"{told.path} is finished: nothing is left to train"]
    assert len(read_metrics(go_on(stopped, "train.learning_rate=0.001", "train.max_steps=9")[0])) == 9
    with pytest.raises(UsageError, match="9 steps are made, and the recipe asks for 5"):
        go_on(stopped, "train.max_steps=5")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("train.seed=7", "train.seed was 42, now 7: steps would see other rows"),
        ("train.per_device_train_batch_size=1", "steps would see other rows"),
        ("data.packing=true", "steps would see other rows"),
        ("peft.r=8", "peft.r was 4, now 8: the trained weights would mean something else"),
        ("quantization={load_in_4bit: true}", "the trained weights belong to the base"),
        ("tokenizer.chat_template=chatml", "rows would become other tokens"),
        ("eval={datasets: [{path: PLACE/held_out.jsonl}]}", "measurements before and after could not be compared"),
    ],
)
def test_what_the_steps_cannot_go_on_with_is_refused(stopped: Path, setting: str, words: str) -> None:
    run = RunFolder(stopped.parent / "run")
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    with pytest.raises(UsageError) as caught:
        go_on(stopped, setting.replace("PLACE", str(stopped.parent)))
    assert words in str(caught.value)
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before


def test_every_key_has_an_effect() -> None:
    """A new key must be thought about here: none but sections whose keys all do the same may leave it to them."""
    alike = ("model", "tokenizer", "quantization", "peft", "datasets", "data", "eval", "checkpoint")
    alike += ("logging", "distributed")
    for key in list_keys():
        section, _, leaf = key.partition(".")
        assert key in _EFFECTS or section.removesuffix("[]") in alike or not leaf, key
        if key != "train":
            assert find_effect(key.replace("[]", ".0"))[1]


def test_a_checkpoint_of_a_run_like_this_one_is_refused(stopped: Path, tmp_path: Path) -> None:
    other = train(stopped, overrides=(f"output_dir={tmp_path / 'other'}",))
    with pytest.raises(ContentError, match="the checkpoint is of another run"):
        train(stopped, resume_from=other.checkpoints / "step-000006")
