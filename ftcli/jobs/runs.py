"""The runs in a folder, and two of them held side by side."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ftcli.errors import ContentError, FtcliError, UsageError
from ftcli.recipe import compare_recipes, load_recipe
from ftcli.store.run import RunFolder, read_manifest
from ftcli.train.best import read_evals
from ftcli.train.summary import RunSummary, summarize_run


@dataclass(frozen=True)
class RunRow:
    """A run in a line: ``best_loss`` is the least on held-out rows, or the last of training without these."""

    run: str
    state: str
    model: str
    data: tuple[str, ...]
    steps: int
    best_loss: float | None
    is_held_out: bool
    size_bytes: int
    started_at: str
    problem: str = ""


@dataclass(frozen=True)
class Comparison:
    """Two runs: the recipe's keys that differ with both values, and what came of each, by name."""

    first: str
    second: str
    recipe: dict[str, tuple[Any, Any]]
    results: dict[str, tuple[float | None, float | None]]


def list_runs(root: Path) -> tuple[RunRow, ...]:
    """Every run folder below ``root``, the latest last.

    Raises:
        UsageError: there is no such folder.
    """
    if not root.is_dir():
        raise UsageError("no such folder", where=str(root), hint="name the folder that holds runs: --dir PATH")
    rows = [describe_run(run) for path in root.rglob("manifest.json") if (run := RunFolder(path.parent)).holds_run()]
    return tuple(sorted(rows, key=lambda row: (row.started_at, row.run)))


def describe_run(run: RunFolder) -> RunRow:
    """The run in a line; what cannot be read of it is told there."""
    manifest: dict[str, Any] = {}
    try:
        manifest, summary = read_manifest(run), summarize_run(run)
    except (ContentError, KeyError, TypeError) as error:
        problem = error.what if isinstance(error, ContentError) else "its manifest.json is damaged"
        return RunRow(str(run.path), str(manifest.get("state", "damaged")), "", (), 0, None, False, _measure(run.path),
                      str(manifest.get("started_at", "")), problem=problem)  # fmt: skip
    data: tuple[str, ...] = ()
    with suppress(FtcliError):
        data = tuple(Path(section.path).name for section in load_recipe(run.recipe).recipe.datasets)
    held_out = [entry["loss"] for entry in read_evals(run) if entry["step"] > 0 and math.isfinite(entry["loss"])]
    return RunRow(
        run=str(run.path),
        state=summary.state,
        model=summary.base,
        data=data,
        steps=summary.steps,
        best_loss=min(held_out) if held_out else summary.loss_last,
        is_held_out=bool(held_out),
        size_bytes=_measure(run.path),
        started_at=str(manifest.get("started_at") or ""),
    )


def compare_runs(first: Path, second: Path) -> Comparison:
    """What the two runs were asked differently, and what came of each.

    Raises:
        ContentError, UsageError: one of them is no run folder, or its recipe cannot be read.
    """
    runs = [RunFolder(path) for path in (first, second)]
    summaries = [summarize_run(run) for run in runs]
    recipes = [load_recipe(run.recipe).recipe for run in runs]
    different = {key: (old, new) for key, old, new in compare_recipes(*recipes) if key != "output_dir"}
    results = [dict(_list_results(summary, read_manifest(run))) for run, summary in zip(runs, summaries, strict=True)]
    names = dict.fromkeys([*results[0], *results[1]])
    return Comparison(
        str(first), str(second), different, {name: (results[0].get(name), results[1].get(name)) for name in names}
    )


def to_json(value: RunRow | Comparison) -> dict[str, Any]:
    """The same as a document."""
    return asdict(value)


def _list_results(summary: RunSummary, manifest: Mapping[str, Any]) -> Iterator[tuple[str, float | None]]:
    yield "steps", summary.steps
    yield "trained tokens", summary.n_trained_tokens
    yield "loss, first step", summary.loss_first
    yield "loss, last step", summary.loss_last
    for entry in summary.evals:
        yield f"{entry.dataset}, loss", entry.loss_after
        if entry.score_after is not None:
            yield f"{entry.dataset}, {entry.metric}", entry.score_after
    yield "trained parameters", summary.trainable_parameters
    yield "seconds", summary.seconds
    yield "memory, bytes", summary.measured_bytes
    yield "processes", manifest.get("processes", 1)


def _measure(folder: Path) -> int:
    """Bytes of all files in the folder."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            total += 0 if path.is_symlink() or not path.is_file() else path.stat().st_size
    return total
