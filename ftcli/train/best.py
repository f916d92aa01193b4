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
from ftcli.store.run import RunFolder, read_lines


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


def find_best(run: RunFolder, section: EvalSection | None) -> Best | None:
    """The best of the steps that were measured; the earlier one of two that are equal."""
    if section is None:
        return None
    by_step: dict[int, list[dict[str, Any]]] = {}
    for entry in read_lines(run.eval):
        if entry["step"] > 0:
            by_step.setdefault(entry["step"], []).append(entry)
    name, _, key = section.metric.rpartition(".")
    sign = 1 if key == "loss" else -1
    best: Best | None = None
    for step, entries in sorted(by_step.items()):
        values = [entry[key] for entry in entries if name in ("", entry["dataset"]) and entry[key] is not None]
        value = fmean(values) if values else math.nan
        if not math.isnan(value) and (best is None or sign * value < sign * best.value):
            best = Best(step, section.metric, value, 0)
        elif best:
            best = Best(best.step, best.metric, best.value, best.n_since + 1)
    return best
