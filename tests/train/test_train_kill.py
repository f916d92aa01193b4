"""SIGKILL before any change to the disk, signals in every phase, a disk that fills up, bytes that flip."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ftcli.errors import ContentError, DiskError, FtcliError, Interrupted, UsageError
from ftcli.events import EvalDone, Event, Notice, Progress, Sampled, Saved, Stage, StepDone
from ftcli.store import run as store_run
from ftcli.store.file import free_bytes
from ftcli.store.run import RunFolder, append_line, read_lines, read_manifest
from ftcli.train.checkpoint import read_checkpoint
from ftcli.train.run import train
from ftcli.train.summary import summarize_run

CRASH = Path(__file__).parents[1] / "crash.py"
EVAL = {
    "datasets": [{"path": "held_out.jsonl"}],
    "eval_steps": 2,
    "score": "exact_match",
    "max_new_tokens": 4,
    "sample_prompts": ["question 3"],
}


def crash(recipe: Path, case: str, numbers: list[int]) -> list[Any]:
    command = [sys.executable, "-W", "ignore", str(CRASH), str(recipe), str(recipe.parent / "out"), case]
    done = subprocess.run([*command, *map(str, numbers)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def hard_recipe(write_recipe: Any) -> Path:
    """Every step saves, every second is measured, and rotation leaves one checkpoint beside the best."""
    checkpoint = {"save_steps": 1, "save_total_limit": 1}
    path: Path = write_recipe(eval=EVAL, checkpoint=checkpoint, peft={"r": 4, "lora_alpha": 8, "lora_dropout": 0.2})
    return path


@pytest.mark.parametrize(
    ("case", "n"),
    [pytest.param(case, n, marks=pytest.mark.slow) for case, n in (("begin", 4), ("overwrite", 2), ("resume", 2))],
)
def test_a_run_killed_anywhere_ends_as_if_it_had_not_been(hard_recipe: Path, case: str, n: int) -> None:
    """A sample that is seeded, and spread over all of the changes that a run makes to the disk."""
    chances = random.Random(case)
    numbers = [int((i + chances.random()) * 130 / n) for i in range(n)]
    for found in crash(hard_recipe, case, numbers):
        assert found["killed"] == signal.SIGKILL
        assert (found["error"], found["differs"]) == ("", []), found["number"]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["begin", "overwrite", "resume"])
def test_a_run_killed_before_each_of_its_changes_ends_as_if_it_had_not_been(hard_recipe: Path, case: str) -> None:
    (answer,) = crash(hard_recipe, case, [])
    n_changes = len(answer["value"])
    assert n_changes > 100
    for found in crash(hard_recipe, case, list(range(0, n_changes, 4))):
        assert (found["killed"], found["error"], found["differs"]) == (signal.SIGKILL, "", []), found["number"]


def test_a_rotation_that_a_kill_prevented_is_made_up_for(write_recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_recipe(checkpoint={"save_steps": 1, "save_total_limit": 1})

    def fail(run: RunFolder, limit: int, best_step: int | None = None) -> None:
        if (run.checkpoints / "step-000006").exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr("ftcli.train.ledger.rotate_checkpoints", fail)
        train(path)
    run = train(path, resume=True)
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-000006"]


PHASES = {
    "model": lambda event: isinstance(event, Stage) and event.name == "model",
    "data": lambda event: isinstance(event, Progress) and event.stage == "data",
    "load": lambda event: isinstance(event, Stage) and event.name == "load",
    "try": lambda event: isinstance(event, Stage) and event.name == "try",
    "first eval": lambda event: isinstance(event, Stage) and event.name == "eval",
    "answers": lambda event: isinstance(event, Progress) and event.stage == "eval",
    "step": lambda event: isinstance(event, StepDone) and event.step == 3,
    "save": lambda event: isinstance(event, Saved) and event.path.endswith("step-000004"),
    "eval": lambda event: isinstance(event, EvalDone) and event.step == 4,
    "sample": lambda event: isinstance(event, Sampled) and event.step == 4,
    "last step": lambda event: isinstance(event, StepDone) and event.step == 6,
}


@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_in_any_phase_costs_at_most_a_step(
    write_recipe: Any, tmp_path: Path, phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_recipe(eval=EVAL, checkpoint={"save_steps": 4})
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))  # rows are rendered, not read from the cache
    steps: list[int] = []
    pending = [signal.SIGTERM]

    def on_event(event: Event) -> None:
        if isinstance(event, StepDone):
            steps.append(event.step)
        if pending and PHASES[phase](event):
            os.kill(os.getpid(), pending.pop())

    with pytest.raises(Interrupted) as caught:
        train(path, on_event=on_event)
    assert caught.value.exit_code == 143
    run, made = RunFolder(tmp_path / "run"), steps[-1] if steps else 0
    if phase in ("model", "data"):
        assert not run.path.exists()
        return
    assert read_manifest(run)["state"] == "interrupted"
    assert made == {"step": 3, "save": 4, "eval": 4, "sample": 4, "last step": 6}.get(phase, 0)
    if made:
        assert (run.checkpoints / f"step-{made:06d}").is_dir()
    train(path, resume=True, on_event=on_event)
    assert steps == [1, 2, 3, 4, 5, 6]
    assert {entry["step"] for entry in read_lines(run.eval)} == {0, 2, 4, 6}


def test_sigterm_while_libraries_load_is_told_and_143(write_recipe: Any) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "ftcli", "train", str(write_recipe())], stderr=subprocess.PIPE, text=True
    )
    time.sleep(1.0)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert "stopped by SIGTERM" in err
    assert "Traceback" not in err


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of three megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("only root can make a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize(
    "room_bytes",
    [2_000, 150_000, *(pytest.param(room, marks=pytest.mark.slow) for room in (0, 60_000, 300_000))],
)
def test_a_disk_that_fills_up_leaves_what_was_saved(write_recipe: Any, small_disk: Path, room_bytes: int) -> None:
    """After step 3 only so much is left, which is too little for a line, for a checkpoint, or for two."""
    path = write_recipe(checkpoint={"save_steps": 1, "save_total_limit": 9}, peft={"r": 16, "lora_alpha": 8})
    run = RunFolder(small_disk / "run")
    filler = small_disk / "filler"

    def on_event(event: Event) -> None:
        if isinstance(event, Saved) and event.path.endswith("step-000003"):
            with filler.open("wb", buffering=0) as stream:
                while (excess := free_bytes(small_disk) - room_bytes) > 4096:
                    stream.write(bytes(excess // 4096 * 4096))

    with pytest.raises(DiskError) as caught:
        train(path, overrides=(f"output_dir={run.path}",), on_event=on_event)
    text = str(caught.value)
    assert caught.value.exit_code == 6
    assert str(run.path) in text
    assert "bytes are needed" in text
    assert "bytes are free" in text
    for folder in run.checkpoints.glob("step-*"):
        read_checkpoint(folder)
    assert (run.checkpoints / "step-000003").is_dir()
    assert not [p for p in run.path.rglob(".*") if p.name != ".lock"]
    assert not run.adapter.exists()
    for file in (run.metrics, run.timing):
        assert all(json.loads(line)["step"] for line in file.read_text().splitlines())
    filler.unlink()
    train(path, overrides=(f"output_dir={run.path}",), resume=True)
    assert [entry["step"] for entry in read_lines(run.metrics)] == [1, 2, 3, 4, 5, 6]


def test_no_room_for_a_checkpoint_is_told_before_the_first_step(write_recipe: Any, small_disk: Path) -> None:
    path = write_recipe(peft={"r": 256, "lora_alpha": 8})
    steps: list[Event] = []
    with pytest.raises(DiskError, match=r"[\d,]+ bytes are needed, [\d,]+ bytes are free"):
        train(
            path,
            overrides=(f"output_dir={small_disk / 'run'}",),
            on_event=lambda event: steps.append(event) if isinstance(event, StepDone) else None,
        )
    assert not steps


def test_a_line_that_is_not_written_whole_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    append_line(path, {"step": 1})

    class Narrow(io.FileIO):
        def write(self, data: Any) -> int:
            if len(data) < 5:
                raise OSError(28, "No space left on device")
            return int(super().write(data[:5]) or 0)

    monkeypatch.setattr(Path, "open", lambda self, *_, **__: Narrow(self, "ab"))
    with pytest.raises(DiskError):
        append_line(path, {"step": 2})
    monkeypatch.undo()
    assert path.read_text() == '{"step": 1}\n'
    assert store_run.read_lines(path) == [{"step": 1}]


def test_any_flipped_byte_of_a_checkpoint_is_found(write_recipe: Any, tmp_path: Path) -> None:
    """One bit in each of many places of every file; only a manifest that says the same may pass."""
    run = train(write_recipe(), overrides=("train.max_steps=1",))
    sound, copy = run.checkpoints / "step-000001", tmp_path / "copy"
    chances = random.Random(5)
    n_found = 0
    for file in sorted(sound.iterdir()):
        data = file.read_bytes()
        for place in {*range(0, len(data), max(1, len(data) // 150)), len(data) - 1}:
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(sound, copy)
            changed = bytearray(data)
            changed[place] ^= 1 << chances.randrange(8)
            (copy / file.name).write_bytes(changed)
            try:
                read_checkpoint(copy)
            except ContentError as error:
                n_found += 1
                assert str(copy) in str(error)
            else:
                manifests = [json.loads((folder / "manifest.json").read_text()) for folder in (sound, copy)]
                hashes = [{name: e["sha256"] for name, e in m["files"].items()} for m in manifests]
                assert file.name == "manifest.json"
                assert hashes[0] == hashes[1]
    assert n_found > 400


@pytest.mark.parametrize("harm", ["cut", "zeros", "gone", "empty folder", "no manifest"])
def test_resume_goes_back_to_the_checkpoint_before_a_damaged_one(write_recipe: Any, harm: str) -> None:
    path = write_recipe(checkpoint={"save_steps": 2, "save_total_limit": 3})

    def on_event(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        train(path, on_event=on_event)
    run = RunFolder(path.parent / "run")
    folder = run.checkpoints / "step-000005"
    file = folder / "optimizer.safetensors"
    data = file.read_bytes()
    if harm == "cut":
        file.write_bytes(data[: len(data) // 2])
    elif harm == "zeros":
        file.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    elif harm == "gone":
        file.unlink()
    elif harm == "no manifest":
        (folder / "manifest.json").unlink()
    else:
        shutil.rmtree(folder)
        folder.mkdir()
    with pytest.raises(FtcliError) as caught:
        train(path, resume_from=folder)
    assert caught.value.exit_code == 3
    assert str(folder) in str(caught.value)
    notices: list[str] = []
    train(path, resume=True, on_event=lambda e: notices.append(e.text) if isinstance(e, Notice) else None)
    assert any("step-000005" in text and "going on from step-000004" in text for text in notices)
    assert [entry["step"] for entry in read_lines(run.metrics)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("harm", ["a key", "a digit"])
def test_a_damaged_line_of_the_record_is_told_on_resumption(write_recipe: Any, tmp_path: Path, harm: str) -> None:
    path = write_recipe()

    def on_event(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        train(path, on_event=on_event)
    run = RunFolder(tmp_path / "run")
    text = run.metrics.read_text()
    run.metrics.write_text(text.replace('{"step": 2', '{"stop') if harm == "a key" else text.replace("7", "8", 1))
    notices: list[str] = []
    train(path, resume=True, on_event=lambda e: notices.append(e.text) if isinstance(e, Notice) else None)
    assert f"{run.metrics} is damaged: its lines are not those that the run wrote" in notices


@pytest.mark.parametrize("harm", ["gone", "no JSON", "no base", "no start"])
def test_a_damaged_manifest_is_named_and_can_be_replaced(write_recipe: Any, tmp_path: Path, harm: str) -> None:
    path, run = write_recipe(), RunFolder(tmp_path / "run")
    with pytest.raises(Interrupted):
        train(path, overrides=("train.max_steps=2",), on_event=lambda e: os.kill(os.getpid(), signal.SIGTERM))
    assert not run.path.exists()
    train(path, overrides=("train.max_steps=2",))
    manifest = read_manifest(run)
    if harm == "gone":
        run.manifest.unlink()
    elif harm == "no JSON":
        run.manifest.write_text(run.manifest.read_text()[:-20])
    else:
        manifest.pop("base" if harm == "no base" else "started_at")
        run.manifest.write_text(json.dumps(manifest))
    with pytest.raises(ContentError, match=r"manifest\.json is missing or damaged"):
        train(path, resume=True)
    with pytest.raises(UsageError, match="holds a run already"):
        train(path)
    assert read_manifest(train(path, overwrite=True))["state"] == "finished"


HARMS: dict[str, Any] = {
    "bytes that are no text": lambda text: text.encode().replace(b"step", b"st\xffp", 1),
    "another key": lambda text: text.replace('"step": 2', '"stop": 2').encode(),
    "text for a number": lambda text: text.replace('"step": 2', '"step": "2"').encode(),
    "no object": lambda text: b"5\n" + text.encode(),
    "no loss": lambda text: text.replace('"loss"', '"l"').replace('"prompt"', '"p"').encode(),
}


@pytest.mark.parametrize("harm", HARMS)
def test_damaged_records_never_end_in_a_traceback(write_recipe: Any, tmp_path: Path, harm: str) -> None:
    path, run = write_recipe(eval=EVAL), RunFolder(tmp_path / "run")

    def on_event(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        train(path, on_event=on_event)
    for file in (run.metrics, run.timing, run.eval, run.prompts):
        file.write_bytes(HARMS[harm](file.read_text()))
    notices: list[str] = []
    train(path, resume=True, on_event=lambda e: notices.append(e.text) if isinstance(e, Notice) else None)
    assert sum("is damaged: its lines are not those that the run wrote" in text for text in notices) >= (
        0 if harm == "no object" else 3
    )
    summarize_run(run)


def test_a_folder_or_file_in_the_place_of_another_is_named(write_recipe: Any, tmp_path: Path) -> None:
    path, run = (
        write_recipe(eval=EVAL, checkpoint={"save_steps": 1, "save_total_limit": 9}),
        RunFolder(tmp_path / "run"),
    )

    def on_event(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        train(path, on_event=on_event)
    shutil.rmtree(run.checkpoints / "step-000003")
    (run.checkpoints / "step-000003").write_text("a file")
    text = run.timing.read_text()
    run.timing.unlink()
    run.timing.mkdir()
    with pytest.raises(ContentError, match=r"timing\.jsonl: is no file"):
        train(path, resume=True)
    run.timing.rmdir()
    run.timing.write_text(text)
    train(path, resume=True)
    assert sorted(p.name for p in run.checkpoints.iterdir()) == [f"step-{step:06d}" for step in range(1, 7)]
