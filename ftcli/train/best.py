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
    name, _, key = section.metric.rpartition(".")
    by_step: dict[int, dict[str, Any]] = {}
    for entry in read_evals(run):
        if name in ("", entry["dataset"]):
            by_step.setdefault(entry["step"], {})[entry["dataset"]] = entry[key]
    n_sets = max(map(len, by_step.values()), default=0)  # an evaluation under way has fewer, and does not compete yet
    values = {step: _take_mean(found) for step, found in by_step.items() if step > 0 and len(found) == n_sets}
    recorded = read_manifest(run).get("best") if run.manifest.exists() else None
    if recorded and recorded["metric"] == section.metric:
        values.setdefault(recorded["step"], recorded["value"])
    known = {step: value for step, value in values.items() if value is not None}
    if not known:
        return None
    choose = min if key == "loss" else max
    best = choose(sorted(known), key=lambda step: known[step])
    return Best(best, section.metric, known[best], sum(step > best for step in values))


def _take_mean(by_set: dict[str, Any]) -> float | None:
    found = [value for value in by_set.values() if value is not None]
    return fmean(found) if found and all(map(math.isfinite, found)) else None
