"""Which step was the best so far, and whether it is time to stop, read from ``eval.jsonl`` alone.

What is measured before the first step has no checkpoint and does not compete.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from ftcli.errors import UsageError
from ftcli.recipe import EvalSection
from ftcli.store.run import RunFolder, read_lines, read_manifest


@dataclass(frozen=True)
class Best:
    """The step whose ``metric`` was best, and how many evaluations came after it without a better one."""

    step: int
    metric: str
    value: float
    n_since: int


def check_metric(section: EvalSection, names: Sequence[str]) -> None:
    """None if ``eval.metric`` is of one of the held-out sets, called ``names``.

    Raises:
        UsageError: it names another.
    """
    name = section.metric.rpartition(".")[0]
    if name and name not in names:
        raise UsageError(
            f"{section.metric} is of no held-out data set",
            where="eval.metric",
            hint=f"the names are {', '.join(names)}",
        )


def read_evals(run: RunFolder) -> list[dict[str, Any]]:
    """The lines of ``eval.jsonl`` that are what a run writes there."""
    entries = read_lines(run.eval, "step", "dataset", "loss", "score")
    return [e for e in entries if isinstance(e["loss"], float) and isinstance(e["score"], float | None)]


def find_best(run: RunFolder, section: EvalSection | None) -> Best | None:
    """The best of the steps that were measured; the earlier one of two that are equal.

    A best step whose line in ``eval.jsonl`` was lost is the one that the manifest names.
    """
    if section is None:
        return None
    by_step: dict[int, list[dict[str, Any]]] = {}
    for entry in read_evals(run):
        if entry["step"] > 0:
            by_step.setdefault(entry["step"], []).append(entry)
    name, _, key = section.metric.rpartition(".")
    values = {step: _take_mean(entries, name, key) for step, entries in sorted(by_step.items())}
    recorded = read_manifest(run).get("best") if run.manifest.exists() else None
    if recorded and recorded["metric"] == section.metric:
        values.setdefault(recorded["step"], recorded["value"])
    known = {step: value for step, value in values.items() if value is not None}
    if not known:
        return None
    choose = min if key == "loss" else max
    best = choose(sorted(known), key=lambda step: known[step])
    return Best(best, section.metric, known[best], sum(step > best for step in values))


def _take_mean(entries: Sequence[dict[str, Any]], name: str, key: str) -> float | None:
    found = [entry[key] for entry in entries if name in ("", entry["dataset"]) and entry[key] is not None]
    return fmean(found) if found and all(map(math.isfinite, found)) else None
