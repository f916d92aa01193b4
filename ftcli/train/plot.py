"""Curves of a run as SVG pictures, legible on light and dark ground; drawn by matplotlib, without a font or a date."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_MOST_POINTS = 800  # more than a picture has columns
_INK, _GRID = "#808890", "#80889040"
_COLOURS = ("#2f81f7", "#e3873b", "#3fb27f", "#b083f0", "#e5534b")


@dataclass(frozen=True)
class Curve:
    """Numbers over steps; ``style`` is ``line``, ``points`` (few, each of them marked) or ``level`` (one number)."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]
    style: str = "line"


def draw_curves(
    title: str, unit: str, curves: Sequence[Curve], *, limits: tuple[float, float | None] | None = None
) -> str:
    """An ``<svg>`` element of ``curves`` over optimizer steps, as wide as the page lets it be.

    ``limits`` are those of the numbers shown (None: as far as they go). A long curve is drawn as the mean of
    neighbours, with the band from the least to the largest of them.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    settings: dict[str, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": title,
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.edgecolor": _GRID,
        "text.color": _INK,
        "axes.labelcolor": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
    }
    with rc_context(settings):
        figure = Figure(figsize=(5.6, 2.9), layout="constrained")
        axes = figure.subplots()
        for number, curve in enumerate(curves):
            _draw(axes, curve, _COLOURS[number % len(_COLOURS)])
        axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
        axes.set_title(unit, loc="right", fontsize=9)
        axes.set_xlabel("step")
        axes.grid(color=_GRID, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if limits:
            axes.set_ylim(*limits)
        if len(curves) > 1:
            axes.legend(frameon=False, fontsize=8)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    return re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r'\1 width="100%"', svg, count=1).strip()


def _draw(axes: Any, curve: Curve, colour: str) -> None:
    steps, values = np.asarray(curve.steps, dtype=float), np.asarray(curve.values, dtype=float)
    if curve.style == "level":
        axes.axhline(values[0], color=colour, linewidth=1.2, linestyle="--", label=curve.name)
    elif curve.style == "points":
        axes.plot(steps, values, color=colour, linewidth=1, marker="o", markersize=4, label=curve.name)
    elif len(values) <= _MOST_POINTS:
        marker = "o" if len(values) == 1 else None
        axes.plot(steps, values, color=colour, linewidth=1.2, marker=marker, label=curve.name)
    else:
        places = np.array_split(np.arange(len(values)), _MOST_POINTS)
        middle = [steps[part].mean() for part in places]
        axes.plot(middle, [values[part].mean() for part in places], color=colour, linewidth=1.2, label=curve.name)
        low, high = [values[part].min() for part in places], [values[part].max() for part in places]
        axes.fill_between(middle, low, high, color=colour, alpha=0.2, linewidth=0)
