"""What came of a run, laid out for people: its facts, some of its answers, and where to go from here."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ftcli.train.summary import RunSummary

_SAMPLES_SHOWN = 3


def list_outcome(summary: RunSummary, *, width: int) -> Iterator[str]:
    """Yields the lines, no more than ``width`` columns wide but for paths."""
    yield ""
    yield f"{summary.run}: {summary.state}"
    for label, text in _list_run_facts(summary):
        yield f"  {label:<12} {text}"
    yield from _list_samples(summary, width)
    if summary.artifact:
        yield from ("", "next:", f"  ftcli chat {summary.run}")
        yield f'  ftcli chat {summary.run} --compare-base --prompt "…"'


def _list_run_facts(summary: RunSummary) -> list[tuple[str, str]]:
    facts = [("base", summary.base)]
    if summary.loss_first is not None and summary.loss_last is not None:
        facts.append(("loss", f"{summary.loss_first:.4f} → {summary.loss_last:.4f} in {summary.steps} steps"))
    for entry in summary.evals:
        losses = [loss for loss in (entry.loss_before, entry.loss_after) if loss is not None]
        facts.append((entry.dataset, "loss " + " → ".join(f"{loss:.4f}" for loss in losses)))
        if entry.score_after is not None:
            was = "" if entry.score_before is None else f"{entry.score_before:.1%} → "
            facts.append(("", f"{entry.metric} {was}{entry.score_after:.1%} of {entry.n_rows} rows"))
    if summary.seconds is not None:
        steps = format_seconds(summary.train_seconds)
        facts.append(("time", f"{format_seconds(summary.seconds)}, of which training {steps}"))
    if summary.peak_rss_bytes is not None:
        facts.append(("memory", f"{format_bytes(summary.peak_rss_bytes)} at most"))
    if summary.forecast_bytes and summary.measured_bytes:
        foretold, measured = format_bytes(summary.forecast_bytes), format_bytes(summary.measured_bytes)
        facts.append(("", f"model and training {measured}, forecast {foretold}"))
    if summary.artifact and summary.artifact_step not in (None, summary.steps):
        facts.append(("best", f"step {summary.artifact_step} in {summary.best_metric}, which is what was saved"))
    elif summary.best_step is not None and summary.best_step != summary.steps:
        where = f"checkpoints/step-{summary.best_step:06d}"
        facts.append(("best", f"step {summary.best_step} in {summary.best_metric}: {where}"))
    if summary.artifact:
        size = "" if summary.trainable_parameters is None else f"  ({summary.trainable_parameters:,} parameters)"
        facts.append(("saved", f"{summary.artifact}{size}"))
    return facts


def _list_samples(summary: RunSummary, width: int) -> Iterator[str]:
    """Yields a few held-out rows side by side: those that were learned first, then those still wrong."""
    ordered = sorted(summary.samples, key=lambda s: (s.is_right == s.was_right, s.is_right))
    wrong = [sample for sample in summary.samples if not sample.is_right][:1]
    shown = [*ordered[: _SAMPLES_SHOWN - len(wrong)], *wrong]
    for sample in dict.fromkeys(shown):
        yield ""
        yield _wrap("asked", sample.question, width)
        yield _wrap("before", sample.before, width)
        yield _wrap("right" if sample.is_right else "wrong", sample.after, width)
        if not sample.is_right:
            yield _wrap("wanted", sample.reference, width)


def _wrap(label: str, text: str, width: int) -> str:
    """``label`` and ``text``, in at most three lines of ``width`` columns."""
    lines = textwrap.wrap(
        " ".join(text.split()) or "(nothing)",
        width=width - 1,
        initial_indent=f"  {label:<8}",
        subsequent_indent=" " * 10,
        max_lines=3,
        placeholder=" …",
        break_on_hyphens=False,
    )
    return "\n".join(lines)


def format_seconds(seconds: float) -> str:
    """``42 s``, ``3:07`` or ``1:02:05``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def format_bytes(size_bytes: int) -> str:
    """``269.1 MB`` or ``1.20 GB``; 1 GB is 10^9 bytes."""
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.1f} MB"
