"""Runs laid out for people: a line each, or two side by side."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ftcli.cli.outcome import format_bytes
from ftcli.cli.scoreboard import shorten_middle

if TYPE_CHECKING:
    from ftcli.jobs.runs import Comparison, RunRow

_LEAST_COLUMN = 10


def list_runs(rows: tuple[RunRow, ...], width: int) -> Iterator[str]:
    """Yields a table no wider than ``width``: names give way to numbers."""
    fixed = [("state", "steps", "loss", "size", "started")]
    for row in rows:
        loss = "-" if row.best_loss is None else f"{row.best_loss:.4f}" + ("" if row.is_held_out else "*")
        started = row.started_at[:16].replace("T", " ")
        fixed.append((row.state, f"{row.steps:,}", loss, format_bytes(row.size_bytes), started))
    sizes = [max(len(cells[i]) for cells in fixed) for i in range(len(fixed[0]))]
    names = [("run", "model", "data"), *((row.run, row.model, ", ".join(row.data)) for row in rows)]
    room = max(3 * _LEAST_COLUMN, width - sum(sizes) - 2 * (len(sizes) + 2))
    widths = share_room([max(len(cells[i]) for cells in names) for i in range(3)], room)
    for texts, numbers in zip(names, fixed, strict=True):
        left = (f"{shorten_middle(text, size):<{size}}" for text, size in zip(texts, widths, strict=True))
        state = f"{numbers[0]:<{sizes[0]}}"
        right = (f"{cell:>{size}}" for cell, size in zip(numbers[1:], sizes[1:], strict=True))
        yield "  ".join((*left, state, *right)).rstrip()
    if any(row.best_loss is not None and not row.is_held_out for row in rows):
        yield "* of the last step of training: nothing was held out"
    for row in rows:
        if row.problem:
            yield f"{row.run}: {row.problem}"


def share_room(wanted: list[int], room: int) -> list[int]:
    """Columns for each text: what it wants where that is little, else an even part of what is left."""
    widths = list(wanted)
    while sum(widths) > room and max(widths) > 1:
        widths[widths.index(max(widths))] -= 1
    return widths


def list_comparison(found: Comparison, width: int) -> Iterator[str]:
    """Yields what differs in the recipes, then what came of each run."""
    rows: list[tuple[str, ...]] = [("", found.first, found.second)]
    rows += [(key, *map(_spell, values)) for key, values in found.recipe.items()]
    n_recipe = len(rows)
    rows += [(name, *(_format(name, value) for value in values)) for name, values in found.results.items()]
    widths = share_room([max(len(row[i]) for row in rows) for i in range(3)], width - 4)
    for number, row in enumerate(rows):
        if number == n_recipe or (number == 1 and n_recipe > 1):
            yield ""
        cells = [f"{shorten_middle(text, size):<{size}}" for text, size in zip(row, widths, strict=True)]
        yield "  ".join(cells).rstrip()
    if n_recipe == 1:
        yield "the recipes are the same"


def _spell(value: Any) -> str:
    return "-" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _format(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    if name.endswith("bytes"):
        return format_bytes(int(value))
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4f}"
