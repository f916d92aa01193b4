"""What is written about a run: its manifest from the first moment to the last, and a line for each step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any

from ftcli.errors import ContentError, DiskError, Interrupted
from ftcli.model.base import name_dtype
from ftcli.recipe import dump_recipe
from ftcli.store.file import hash_file, write_text
from ftcli.store.run import RunFolder, append_line, now_text, read_manifest, update_manifest
from ftcli.store.version import list_versions
from ftcli.train.change import Change
from ftcli.train.forecast import RunForecast
from ftcli.train.loop import StepResult
from ftcli.train.memory import measure_memory
from ftcli.train.prepare import Prepared


def write_start(run: RunFolder, prepared: Prepared, forecast: RunForecast | None) -> None:
    """Nothing; the manifest says that the run is under way, and from what."""
    recipe = prepared.recipe
    update_manifest(
        run,
        state="running",
        started_at=now_text(),
        finished_at=None,
        versions=list_versions(),
        dtype=name_dtype(recipe.model),
        processes=prepared.plan.n_processes,
        **prepared.inputs,
        parent=recipe.peft.adapter if recipe.peft else None,
        data={part.name: asdict(part.report) for part in (prepared.split.train, *prepared.split.held_out)},
        forecast=forecast.to_json() if forecast else None,
        measured=None,
        best=None,
        verify=None,
        files={},
    )
    _write_recipe(run, prepared)


def write_restart(run: RunFolder, prepared: Prepared, changes: Sequence[Change], *, step: int) -> None:
    """Nothing; the manifest says that the run is under way again, and what differs after ``step``."""
    entries = [{"step": step, "key": change.key, "old": change.old, "new": change.new} for change in changes]
    before = read_manifest(run).get("changes", [])
    processes = prepared.plan.n_processes
    update_manifest(run, state="running", finished_at=None, processes=processes, changes=[*before, *entries])
    _write_recipe(run, prepared)


def _write_recipe(run: RunFolder, prepared: Prepared) -> None:
    write_text(run.recipe, dump_recipe(prepared.recipe, prepared.loaded.sources))
    update_manifest(run, recipe_sha256=hash_file(run.recipe))


def check_inputs(run: RunFolder, identity: dict[str, Any]) -> None:
    """None if ``run`` was started from the same things.

    Raises:
        ContentError: naming what has changed.
    """
    before = read_manifest(run)
    before["base"] = before["base"] | {"revision": identity["base"]["revision"]}  # the fingerprint decides
    names = {"base": "the base model", "tokenizer_sha256": "the tokenizer", "template_sha256": "the chat template"}
    names["data_sha256"] = "the data"
    if changed := [name for key, name in names.items() if before.get(key) != identity[key]]:
        raise ContentError(
            f"{' and '.join(changed)} changed since the run was started",
            where=str(run.path),
            why="the steps to come would not belong to the steps that were made",
            hint="restore it, or start a run of its own with another output_dir",
        )


@contextmanager
def recorded(run: RunFolder) -> Iterator[None]:
    """A block whose end, however it comes, is written into the manifest's ``state``."""
    try:
        yield
    except BaseException as error:
        is_interrupted = isinstance(error, Interrupted | KeyboardInterrupt)
        with suppress(DiskError):  # the disk that is full is what is being reported
            update_manifest(run, state="interrupted" if is_interrupted else "failed", finished_at=now_text())
        raise


def record_step(run: RunFolder, result: StepResult) -> None:
    """Nothing; ``metrics.jsonl`` and ``timing.jsonl`` end with this step."""
    append_line(
        run.metrics,
        {
            "step": result.step,
            "epoch": round(result.epoch, 6),
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": result.lr,
            "n_target_tokens": result.n_target_tokens,
            "n_tokens": result.n_tokens,
            "rows": result.n_rows,
        },
    )
    seconds = max(result.seconds, 1e-9)
    append_line(
        run.timing,
        {
            "step": result.step,
            "seconds": round(seconds, 4),
            "tokens_per_second": round(result.n_tokens / seconds, 1),
            "memory_bytes": measure_memory(),
        },
    )
