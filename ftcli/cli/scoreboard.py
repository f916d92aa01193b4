"""Several models side by side, laid out for people: a row for each, a column for what was measured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ftcli.cli.outcome import format_bytes

if TYPE_CHECKING:
    from ftcli.jobs.evaluate import Scoreboard

_LEAST_NAME = 12


def list_scoreboard(scoreboard: Scoreboard, width: int) -> Iterator[str]:
    """Yields the lines, no more than ``width`` columns wide."""
    columns = dict(_list_columns(scoreboard))
    widths = [max(map(len, (head, *cells))) for head, cells in columns.items()]
    longest = max(len(standing.target) for standing in scoreboard.standings)
    room = max(_LEAST_NAME, width - sum(widths) - 2 * len(widths))
    name_width = max(len("target"), min(longest, room))
    names = ["target", *(shorten_middle(standing.target, name_width) for standing in scoreboard.standings)]
    rows = [list(columns), *zip(*columns.values(), strict=True)]
    for name, cells in zip(names, rows, strict=True):
        aligned = (f"{cell:>{size}}" for cell, size in zip(cells, widths, strict=True))
        yield "  ".join((f"{name:<{name_width}}", *aligned))
    yield ""
    yield from _list_facts(scoreboard, width)


def _list_columns(scoreboard: Scoreboard) -> Iterator[tuple[str, list[str]]]:
    """Yields the head and the cells of each column that has something to say."""
    rows = scoreboard.standings
    yield "size", [format_bytes(row.size_bytes) for row in rows]
    yield "bits/w", [f"{row.bits_per_weight:.2f}" for row in rows]
    if any(row.bits_per_byte is not None for row in rows):
        yield "bits/byte", ["-" if row.bits_per_byte is None else f"{row.bits_per_byte:.4f}" for row in rows]
    else:
        yield "loss", [f"{row.loss:.4f}" for row in rows]
    yield "ppl", [_format_perplexity(row.perplexity) for row in rows]
    if any(row.kl is not None for row in rows):
        yield "KL", ["-" if row.kl is None else _format_divergence(row.kl) for row in rows]
        yield "top-1", ["-" if row.top1 is None else f"{row.top1:.1%}" for row in rows]
    if any(row.score for row in rows):
        yield "score", [f"{row.score.value:.1%}" if row.score else "-" for row in rows]


def _list_facts(scoreboard: Scoreboard, width: int) -> Iterator[str]:
    first = scoreboard.standings[0]
    counts = f"{_count(scoreboard.n_rows, 'row')}, {_count(scoreboard.n_tokens, 'trained token')}: "
    yield counts + shorten_middle(scoreboard.data, max(_LEAST_NAME, width - len(counts)))
    if any(row.kl is not None for row in scoreboard.standings):
        text = "KL in nats per token and top-1 agreement: against "
        yield text + shorten_middle(first.target, max(_LEAST_NAME, width - len(text)))
    if first.score:
        yield f"score: {first.score.metric}, {_count(first.score.n, 'answer')}"


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def _format_perplexity(value: float) -> str:
    if value < 1000:
        return f"{value:.3f}"
    return f"{value:,.0f}" if value < 1e6 else f"{value:.1e}"


def _format_divergence(kl: float) -> str:
    """Four digits, or the magnitude of what would be none; rounding leaves up to 1e-8 of a model to itself."""
    if abs(kl) < 1e-6:
        return "<1e-6"
    return f"{kl:.4f}" if kl >= 1e-3 else f"{kl:.1e}"


def shorten_middle(text: str, width: int) -> str:
    """``text`` in at most ``width`` columns, of which the end, being the name of a file, has the most."""
    if len(text) <= width:
        return text
    tail = (width - 1) * 2 // 3
    return f"{text[: width - 1 - tail]}…{text[len(text) - tail :]}"
