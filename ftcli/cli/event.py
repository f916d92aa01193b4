"""What long work reports, a line of plain text for each event."""

from __future__ import annotations

from ftcli.cli.outcome import format_bytes, format_seconds
from ftcli.events import EvalDone, Event, Notice, Progress, Sampled, Saved, Stage


def describe_progress(event: Progress) -> str:
    """``12/40``, or for bytes ``1.20 of 16.06 GB, 0:42 left``."""
    left = "" if event.seconds_left is None else f", {format_seconds(event.seconds_left)} left"
    if event.unit != "bytes":
        return f"{event.done}/{event.total}{left}" if event.total else ""
    return f"{format_bytes(event.done)} of {format_bytes(event.total)}{left}"


def describe_event(event: Event, width: int) -> str:
    """One line of plain text; a sample takes two, of at most ``width`` columns."""
    if isinstance(event, Stage):
        return f"{event.name:<10} {event.detail}"
    if isinstance(event, Notice):
        return f"notice: {event.text}"
    if isinstance(event, EvalDone):
        score = "" if event.score is None else f"  score {event.score:.1%} of {event.n_rows}"
        return f"eval       {event.dataset} after step {event.step}: loss {event.loss:.4f}{score}"
    if isinstance(event, Sampled):
        prompt, text = (_shorten(value, width - 12) for value in (event.prompt, event.text))
        return f"sample     {prompt}\n           → {text}"
    if isinstance(event, Saved):
        return f"saved      {event.path}"
    return str(event)


def _shorten(text: str, width: int) -> str:
    """``text`` on one line of at most ``width`` columns."""
    line = " ".join(text.split()) or "(nothing)"
    return line if len(line) <= width else f"{line[: width - 2]} …"
