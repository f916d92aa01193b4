"""What goes wrong at the edges of a run, and what must be left then."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_model, save_model
from safetensors.torch import load_file

import ftcli.train.execution as execution
from ftcli.errors import ContentError, DiskError, FtcliError, Interrupted, NumericError, UsageError
from ftcli.events import EvalDone, StepDone
from ftcli.store.run import RunFolder, read_lines, read_manifest, update_manifest
from ftcli.train.run import train
from ftcli.train.summary import summarize_run


def stop_after(kind: Any, **wanted: Any) -> Any:
    def on_event(event: Any) -> None:
        if isinstance(event, kind) and all(getattr(event, key) == value for key, value in wanted.items()):
            os.kill(os.getpid(), signal.SIGTERM)

    return on_event


def test_a_failure_at_the_end_leaves_the_last_step(write_recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise DiskError("the disk is full")

    path = write_recipe()
    with monkeypatch.context() as patch:
        patch.setattr(execution, "save_artifact", refuse)
        with pytest.raises(DiskError):
            train(path)
    run = RunFolder(path.parent / "run")
    assert read_manifest(run)["state"] == "failed"
    assert [p.name for p in run.checkpoints.iterdir()] == ["step-000006"]
    assert read_manifest(train(path, resume=True))["state"] == "finished"


def test_overwrite_keeps_the_old_run_until_the_new_one_has_its_model(
    write_recipe: Any, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    run = train(write_recipe())
    before = {p.relative_to(run.path): p.read_bytes() for p in run.path.rglob("*") if p.is_file()}
    folder = save_model(tmp_path / "broken", build_model(), tiny_tokenizer)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    path = write_recipe(model={"name_or_path": str(folder), "dtype": "float32"})
    with pytest.raises(ContentError):
        train(path, overwrite=True)
    assert {p.relative_to(run.path): p.read_bytes() for p in run.path.rglob("*") if p.is_file()} == before
    with pytest.raises(FtcliError):
        train(write_recipe(peft={"adapter": str(run.path)}), overwrite=True)
    assert (run.adapter / "adapter_model.safetensors").exists()


def test_overwrite_touches_no_folder_of_another_program(write_recipe: Any, tmp_path: Path) -> None:
    foreign = tmp_path / "run"
    foreign.mkdir()
    (foreign / "manifest.json").write_text('{"name": "my extension"}')
    with pytest.raises(UsageError, match="no run of ftcli"):
        train(write_recipe(), overwrite=True)
    assert (foreign / "manifest.json").exists()


def test_leftovers_of_killed_processes_are_swept(write_recipe: Any, tmp_path: Path) -> None:
    path = write_recipe()
    with pytest.raises(Interrupted):
        train(path, on_event=stop_after(StepDone, step=3))
    run = RunFolder(tmp_path / "run")
    (run.checkpoints / ".step-000005.tmp-99").mkdir()
    (run.path / ".manifest.json.tmp-99").write_text("half")
    run.checkpoints.joinpath("step-000003").rename(run.checkpoints / ".step-000003.old-99")
    steps: list[int] = []
    train(path, resume=True, on_event=lambda event: steps.append(event.step) if isinstance(event, StepDone) else None)
    assert steps == [4, 5, 6]
    assert not [p for p in run.path.rglob(".*") if p.name != ".lock"]


def test_a_run_without_a_checkpoint_begins_again_unless_they_were_taken_away(write_recipe: Any, tmp_path: Path) -> None:
    path, run = write_recipe(checkpoint={"save_steps": 2}), RunFolder(tmp_path / "run")
    whole = train(path, overrides=(f"output_dir={tmp_path / 'whole'}",))
    with pytest.raises(Interrupted):
        train(path, on_event=stop_after(StepDone, step=1))
    shutil.rmtree(run.checkpoints)
    notices: list[str] = []
    train(path, resume=True, on_event=lambda event: notices.append(getattr(event, "text", "")))
    assert "the run was stopped before its first checkpoint: it begins at step 1" in notices
    assert run.metrics.read_bytes() == whole.metrics.read_bytes()
    update_manifest(run, state="interrupted")
    shutil.rmtree(run.checkpoints)
    with pytest.raises(UsageError, match="6 steps were made, and the run has no checkpoint"):
        train(path, resume=True)


def test_checkpoints_of_another_run_are_refused(write_recipe: Any, tmp_path: Path) -> None:
    path = write_recipe()
    other = train(path, overrides=("train.seed=7", f"output_dir={tmp_path / 'other'}"))
    with pytest.raises(Interrupted):
        train(path, on_event=stop_after(StepDone, step=2))
    with pytest.raises(ContentError, match="the checkpoint is of another run"):
        train(path, resume_from=other.checkpoints / "step-000006")


def test_resuming_from_an_older_checkpoint_leaves_no_newer_one(write_recipe: Any, tmp_path: Path) -> None:
    path = write_recipe(checkpoint={"save_steps": 2, "save_total_limit": 9})
    with pytest.raises(Interrupted):
        train(path, on_event=stop_after(StepDone, step=5))
    run = RunFolder(tmp_path / "run")
    train(path, resume_from=run.checkpoints / "step-000002")
    assert [entry["step"] for entry in read_lines(run.metrics)] == [1, 2, 3, 4, 5, 6]
    assert sorted(p.name for p in run.checkpoints.iterdir()) == ["step-000002", "step-000004", "step-000006"]


def test_an_interrupted_evaluation_is_taken_up_again(write_recipe: Any, write_rows: Any, tmp_path: Path) -> None:
    write_rows("other.jsonl", 3)
    sets = {"datasets": [{"path": "held_out.jsonl"}, {"path": "other.jsonl"}], "eval_steps": 2}
    path = write_recipe(eval=sets)
    for step in (2, 6):
        with pytest.raises(Interrupted):
            train(path, resume=step == 6, on_event=stop_after(EvalDone, step=step, dataset="held_out"))
    run = train(path, resume=True)
    found = [(entry["step"], entry["dataset"]) for entry in read_lines(run.eval)]
    assert found == [(step, name) for step in (0, 2, 4, 6) for name in ("held_out", "other")]
    assert all(entry.loss_after != entry.loss_before for entry in summarize_run(run).evals)


def test_held_out_files_of_one_name_stay_two_sets(write_recipe: Any, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    path = write_recipe(eval={"datasets": [{"path": "held_out.jsonl"}, {"path": "x/held_out.jsonl"}]})
    (tmp_path / "x" / "held_out.jsonl").write_text((tmp_path / "train.jsonl").read_text())
    run = train(path, overrides=("train.max_steps=1",))
    assert [entry["dataset"] for entry in read_lines(run.eval)] == ["held_out", "held_out-2"] * 2


def test_only_the_named_norm_is_trained_and_its_small_updates_stay(write_recipe: Any, tiny_model: Path) -> None:
    path = write_recipe(
        model={"name_or_path": str(tiny_model), "dtype": "bfloat16"},
        peft={"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    )
    run = train(path, overrides=("train.learning_rate=2e-4", "train.max_steps=5"))
    saved = load_file(run.adapter / "adapter_model.safetensors")
    norms = [name for name in saved if "norm" in name]
    assert norms == ["base_model.model.model.norm.weight"]
    weight = saved[norms[0]]
    assert weight.dtype is torch.float32
    assert (weight != 1.0).float().mean() > 0.9


def test_an_adapter_goes_on_only_on_its_own_base(write_recipe: Any, tmp_path: Path, tiny_tokenizer: Any) -> None:
    first = train(write_recipe())
    folder = save_model(tmp_path / "other", build_model(seed=5), tiny_tokenizer)
    path = write_recipe(
        model={"name_or_path": str(folder), "dtype": "float32"},
        peft={"adapter": str(first.path)},
        output_dir=str(tmp_path / "second"),
    )
    with pytest.raises(ContentError, match="trained on another base model"):
        train(path)
    with pytest.raises(UsageError, match=r"tokenizer\.add_tokens: excludes peft\.adapter"):
        train(
            write_recipe(
                peft={"adapter": str(first.path)},
                tokenizer={"add_tokens": ["<zz>"]},
                output_dir=str(tmp_path / "third"),
            )
        )


def test_float16_is_refused_without_a_device(write_recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="float16 needs a CUDA device"):
        train(write_recipe(), overrides=("model.dtype=float16",))


def test_a_tokenizer_of_another_model_is_refused(write_recipe: Any, tmp_path: Path, tiny_tokenizer: Any) -> None:
    folder = save_model(tmp_path / "small", build_model(vocab_size=100), tiny_tokenizer)
    with pytest.raises(ContentError, match=r"its embedding has 100 rows"):
        train(write_recipe(model={"name_or_path": str(folder), "dtype": "float32"}))
    assert not (tmp_path / "run").exists()


def test_text_rows_have_a_loss_and_no_score(write_recipe: Any, tmp_path: Path) -> None:
    path = write_recipe(eval={"datasets": [{"path": "texts.jsonl"}], "score": "exact_match"})
    (tmp_path / "texts.jsonl").write_text('{"text": "the quick brown fox"}\n')
    run = train(path, overrides=("train.max_steps=1",))
    assert [entry["score"] for entry in read_lines(run.eval)] == [None, None]


def test_line_separators_in_answers_do_not_split_lines(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text(json.dumps({"text": "a\u2028b\u0085c"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_lines(path) == [{"text": "a\u2028b\u0085c"}]


@pytest.mark.slow
def test_a_closed_log_does_not_end_the_run(write_recipe: Any, tmp_path: Path) -> None:
    command = f"{sys.executable} -m ftcli train {write_recipe()} --set train.max_steps=40 2>&1 >/dev/null | head -3"
    subprocess.run(["bash", "-c", command], capture_output=True, timeout=120, check=True)
    assert read_manifest(RunFolder(tmp_path / "run"))["state"] == "finished"


def test_a_run_that_made_no_step_is_replaced_without_being_asked(
    write_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ContentError("no such weights")

    with monkeypatch.context() as patch:
        patch.setattr(execution, "build_engine", fail)
        with pytest.raises(ContentError):
            train(write_recipe())
    assert read_manifest(RunFolder(tmp_path / "run"))["state"] == "failed"
    assert read_manifest(train(write_recipe()))["state"] == "finished"


@pytest.mark.parametrize("where", ["glob", "recipe", "file"])
def test_inputs_in_the_folder_that_would_be_emptied_are_refused(write_recipe: Any, tmp_path: Path, where: str) -> None:
    run = train(write_recipe())
    inside = run.path / "data"
    inside.mkdir()
    shutil.copy(tmp_path / "train.jsonl", inside)
    places = {"glob": f"{inside}/*.jsonl", "file": str(inside / "train.jsonl")}
    path = write_recipe(datasets=[{"path": places.get(where, "train.jsonl")}])
    if where == "recipe":
        path = shutil.move(path, inside / "recipe.yaml")
        shutil.copy(tmp_path / "held_out.jsonl", inside)
        path = Path(path)
        path.write_text(path.read_text().replace("path: train.jsonl", f"path: {tmp_path / 'train.jsonl'}"))
    with pytest.raises(UsageError, match="lies in output_dir"):
        train(path, overwrite=True)
    assert (inside / "train.jsonl").exists()


@pytest.mark.parametrize(
    ("harm", "words"),
    [("gone", "is missing; it is made again"), ("changed", "differs from what the run wrote; it is made again")],
)
def test_a_lost_adapter_is_made_again_from_the_last_checkpoint(write_recipe: Any, harm: str, words: str) -> None:
    run = train(write_recipe())
    file = run.adapter / "adapter_model.safetensors"
    before = file.read_bytes()
    if harm == "gone":
        shutil.rmtree(run.adapter)
    else:
        file.write_bytes(before[:-4] + bytes(4))
    notices: list[str] = []
    train(write_recipe(), resume=True, on_event=lambda event: notices.append(getattr(event, "text", "")))
    assert any(text.endswith(words) for text in notices)
    assert file.read_bytes() == before


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "link"])
def test_names_that_no_folder_can_have_are_refused(write_recipe: Any, tmp_path: Path, name: str) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises((UsageError, DiskError)):
        train(write_recipe(output_dir=str(tmp_path / name)))


@pytest.mark.parametrize("rows", [1, 2])
def test_a_base_model_of_nan_is_told_before_it_is_trained(
    write_recipe: Any, tmp_path: Path, tiny_tokenizer: Any, rows: int
) -> None:
    model = build_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    folder = save_model(tmp_path / "nan", model, tiny_tokenizer)
    path = write_recipe(model={"name_or_path": str(folder), "dtype": "float32"})
    with pytest.raises(NumericError) as caught:
        train(path, overrides=(f"train.per_device_train_batch_size={rows}",))
    assert "weights" in caught.value.hint
    assert "learning_rate" not in caught.value.hint
