"""Numbers that are none, and memory that does not suffice: both have a name, an exit code, and a way out."""

from __future__ import annotations

import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_model, save_model
from safetensors.torch import load_file

from ftcli.errors import MemoryExhausted, NumericError, is_memory_error
from ftcli.events import Notice, StepDone, ignore_event
from ftcli.model.forecast import forecast_memory
from ftcli.recipe import load_recipe
from ftcli.store.run import RunFolder, read_lines, read_manifest
from ftcli.train import execution, memory, rehearsal
from ftcli.train.forecast import forecast_run
from ftcli.train.loop import plan_run
from ftcli.train.prepare import prepare_run
from ftcli.train.run import train

BIG = ("train.per_device_train_batch_size=12", "train.gradient_accumulation_steps=1")


@pytest.fixture
def poisoned(write_recipe: Any, tmp_path: Path, tiny_tokenizer: Any) -> Path:
    """A recipe whose row 7 holds the one token whose embedding is NaN."""
    model = build_model(tied=False)
    with torch.no_grad():
        model.model.embed_tokens.weight[tiny_tokenizer.encode("z")[0]] = math.nan
    folder = save_model(tmp_path / "model", model, tiny_tokenizer)
    path: Path = write_recipe(model={"name_or_path": str(folder), "dtype": "float32"})
    rows = path.parent / "train.jsonl"
    rows.write_text(rows.read_text().replace("question 6", "z"))
    return path


def test_nan_names_step_rows_and_the_last_good_checkpoint(poisoned: Path) -> None:
    steps: list[int] = []
    with pytest.raises(NumericError) as caught:
        train(poisoned, on_event=lambda e: steps.append(e.step) if isinstance(e, StepDone) else None)
    step, run = len(steps) + 1, RunFolder(poisoned.parent / "run")
    assert step in (1, 2, 3)
    assert caught.value.exit_code == 5
    assert f"in step {step}" in caught.value.what
    assert f"{poisoned.parent / 'train.jsonl'}:7" in caught.value.why
    last = read_lines(run.metrics)[-1]
    assert last["step"] == step
    assert math.isnan(last["loss"])
    assert read_manifest(run)["state"] == "failed"
    if step == 1:
        assert "no step is saved" in caught.value.hint
        return
    folder = run.checkpoints / f"step-{step - 1:06d}"
    assert f"the last good checkpoint is {folder}" in caught.value.hint
    for file in folder.glob("*.safetensors"):
        assert all(torch.isfinite(value).all() for value in load_file(file).values())


def test_a_run_goes_on_after_nan_when_the_course_is_changed(write_recipe: Any) -> None:
    """A learning rate that overflows float32; an older checkpoint is not rotated away by the last good one."""
    path = write_recipe(checkpoint={"save_steps": 1, "save_total_limit": 1})
    with pytest.raises(NumericError) as caught:
        train(path, overrides=("train.learning_rate=1e39", "train.warmup_steps=2"))
    run = RunFolder(path.parent / "run")
    assert "is not finite after step 2" in caught.value.what
    assert [folder.name for folder in run.checkpoints.iterdir()] == ["step-000001"]
    notices: list[str] = []
    train(
        path,
        overrides=("train.learning_rate=0.01", "train.warmup_steps=2"),
        resume=True,
        on_event=lambda e: notices.append(e.text) if isinstance(e, Notice) else None,
    )
    assert any("train.learning_rate was 1e+39, now 0.01" in text for text in notices)
    assert [entry["step"] for entry in read_lines(run.metrics)] == [1, 2, 3, 4, 5, 6]


def apply_hint(hint: str) -> list[str]:
    """The settings that an error's hint offers."""
    words = shlex.split(hint.partition(": ")[2].partition(" (forecast")[0])
    return [word for word in words if word != "--set"]


@pytest.mark.parametrize("share", [0.97, 0.85, 0.75])
def test_what_does_not_fit_is_refused_with_the_smallest_change_that_does(
    write_recipe: Any, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    """The settings in the hint are laid over the recipe, and its forecast is then within what there is."""
    path = write_recipe(data={"max_length": 512, "packing": False})
    rows = path.parent / "train.jsonl"
    rows.write_text(rows.read_text().replace("answer", "fox " * 150 + "answer"))
    prepared = prepare_run(load_recipe(path, overrides=BIG))
    found = forecast_run(prepared)
    assert found is not None
    available = int(found.forecast.total_bytes * share / 1.1)
    monkeypatch.setattr(execution, "measure_available", lambda: available)
    with pytest.raises(MemoryExhausted, match="the run does not fit into memory") as caught:
        train(path, overrides=BIG)
    assert caught.value.exit_code == 7
    assert f"forecast {found.forecast.total_bytes / 1e6:.0f} MB" in caught.value.why
    assert f"{available / 1e6:.0f} MB available" in caught.value.why
    settings = apply_hint(caught.value.hint)
    assert settings
    smaller = forecast_run(prepare_run(load_recipe(path, overrides=(*BIG, *settings))))
    assert smaller is not None
    assert smaller.forecast.total_bytes <= available * 1.05
    monkeypatch.undo()
    train(path, overrides=(*BIG, *settings, "train.max_steps=1"), overwrite=True)


def test_the_longest_batch_is_tried_before_the_first_step(write_recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and back, and the held-out rows; what fails then is told with the forecast, and no step was made."""
    seen: list[tuple[str, int]] = []
    real_add, real_mean = rehearsal.add_gradients, rehearsal.compute_mean_loss

    def watch_add(model: Any, batch: Any, *rest: Any) -> Any:
        seen.append(("train", batch.n_tokens))
        return real_add(model, batch, *rest)

    def watch_mean(model: Any, documents: Any, **options: Any) -> Any:
        seen.append(("eval", sum(len(document.ids) for document in documents)))
        return real_mean(model, documents, **options)

    monkeypatch.setattr(rehearsal, "add_gradients", watch_add)
    monkeypatch.setattr(rehearsal, "compute_mean_loss", watch_mean)
    path = write_recipe(eval={"datasets": [{"path": "held_out.jsonl"}]})
    run = train(path, overrides=("train.gradient_accumulation_steps=1", "train.max_steps=18"))
    largest = max(entry["n_tokens"] for entry in read_lines(run.metrics))
    assert ("train", largest) in seen
    assert max(n for kind, n in seen if kind == "train") == largest
    assert any(kind == "eval" for kind, _ in seen)

    def run_out(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(rehearsal, "add_gradients", run_out)
    steps: list[Any] = []
    with pytest.raises(MemoryExhausted, match="out of memory before step 1") as caught:
        train(path, overwrite=True, on_event=lambda e: steps.append(e) if isinstance(e, StepDone) else None)
    assert not steps
    assert caught.value.exit_code == 7
    assert re.search(r"forecast \d+ MB with micro-batches of up to \d+ tokens", caught.value.why)
    assert "Tried to allocate 2.00 GiB" in caught.value.why
    assert caught.value.hint
    assert read_manifest(run)["state"] == "finished"  # the run that was to be replaced is back


def test_the_rehearsal_leaves_no_trace(write_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_recipe()
    tried = train(path, overrides=("peft.lora_dropout=0.2", f"output_dir={tmp_path / 'tried'}"))
    monkeypatch.setattr(execution, "rehearse", lambda *_, **__: None)
    plain = train(path, overrides=("peft.lora_dropout=0.2", f"output_dir={tmp_path / 'plain'}"))
    assert tried.metrics.read_bytes() == plain.metrics.read_bytes()


@pytest.mark.parametrize("packing", [False, True])
def test_the_largest_micro_batch_of_all_epochs_is_found(write_recipe: Any, packing: bool) -> None:
    settings = (f"data.packing={json.dumps(packing)}", "data.max_length=64", "train.max_steps=20")
    prepared = prepare_run(load_recipe(write_recipe(), overrides=settings), ignore_event)
    documents, recipe = prepared.split.train.documents, prepared.recipe
    plan = plan_run(recipe, documents)
    groups = rehearsal.find_largest(recipe, documents, plan)
    sizes = [sum(documents.lengths[i] for i in group) for group in groups]
    from ftcli.train.loop import plan_steps

    n_epochs = 1 if packing else len(plan.epoch_steps)
    steps = [step for epoch in range(n_epochs) for step in plan_steps(recipe, documents, epoch=epoch)][:20]
    assert sizes[0] == max(sum(documents.lengths[i] for i in batch) for step in steps for batch in step)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        RuntimeError("std::bad_alloc"),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_memory_errors_are_known_by_all_their_names(error: Exception) -> None:
    assert is_memory_error(error)
    assert not is_memory_error(MemoryExhausted("out of memory", why=str(error)))


def test_available_memory_is_what_the_narrowest_limit_leaves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("of the device there")
    total = memory.measure_available()
    assert 0 < total < 1 << 50
    monkeypatch.setattr(memory, "_read_cgroup_room", lambda: 12_345)
    assert memory.measure_available() == 12_345


def test_the_forecast_is_no_smaller_than_what_fit_says(write_recipe: Any) -> None:
    """A pack that is too large is halved by a shorter one, not by fewer rows, of which there is one."""
    from ftcli.model.forecast import fit

    path = write_recipe(data={"max_length": 512, "packing": True})
    found = forecast_run(prepare_run(load_recipe(path, overrides=("train.per_device_train_batch_size=1",))))
    assert found is not None
    assert found.training.n_rows == 1
    assert found.training.n_documents > 1
    changes, _ = fit(found.shape, found.training, int(forecast_memory(found.shape, found.training).total_bytes * 0.9))
    assert {change.key for change in changes} <= {"train.gradient_checkpointing", "data.max_length"}
