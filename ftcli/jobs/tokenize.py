"""``ftcli tokenize``: what a run would learn, by the code that feeds the training.

recipe | data + model ─▶ rows ─▶ report (numbers, findings) · views (token by token) · words · page
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ftcli.errors import UsageError
from ftcli.events import OnEvent, Saved, ignore_event
from ftcli.jobs.page import build_page
from ftcli.jobs.preview import RowView, view_rows
from ftcli.jobs.report import TokenizeReport, report_rows
from ftcli.jobs.rows import open_target
from ftcli.jobs.words import WordReport, find_words
from ftcli.store.file import write_text

_ROWS_OF_PAGE = 50


@dataclass(frozen=True)
class TokenizeResult:
    """What was asked for; ``words`` and ``page`` None where they were not."""

    report: TokenizeReport
    rows: tuple[RowView, ...]
    words: WordReport | None
    page: str | None


def tokenize(
    target: str,
    model: str | None = None,
    *,
    overrides: tuple[str, ...] = (),
    skip_bad: bool = False,
    first: int = 0,
    worst: int = 0,
    line: int | None = None,
    with_words: bool = False,
    page: Path | None = None,
    tokens_per_second: float | None = None,
    on_event: OnEvent = ignore_event,
) -> TokenizeResult:
    """What the rows of a recipe or data set are to a model: numbers, findings, and rows token by token.

    Args:
        target: a recipe (``.yaml``), or a file, glob, folder or Hub id of rows.
        model: whose tokenizer; needed unless ``target`` is a recipe, and wins over its model.
        overrides: ``key=value`` pairs laid over the recipe.
        skip_bad: leave out rows that cannot be read or rendered, and count them.
        first: how many of the first rows to view.
        worst: how many of the longest, least trained and least known rows to view.
        line: the line of one row to view.
        with_words: whether to look for words that deserve a token of their own.
        page: where to write everything as one HTML page, with the first 50 rows unless others are asked for.
        tokens_per_second: a throughput, to tell the time of a training.
        on_event: told of stages and progress.

    Raises:
        FtcliError: the recipe, the tokenizer or the rows cannot be used, or the page cannot be written.
    """
    if page is not None:
        check_page(page)
    tokenized = open_target(target, model, overrides=overrides, skip_bad=skip_bad, on_event=on_event)
    report = report_rows(tokenized, tokens_per_second=tokens_per_second)
    rows = view_rows(tokenized, first=first, worst=worst, line=line)
    words = find_words(tokenized) if with_words else None
    if page is not None:
        on_page = rows or view_rows(tokenized, first=_ROWS_OF_PAGE)
        write_text(page, build_page(report, on_page, words))
        on_event(Saved(str(page)))
    return TokenizeResult(report, tuple(rows), words, str(page) if page else None)


def check_page(page: Path) -> None:
    """None if a page can be written there; what is written replaces what stands there, so that must be a file.

    Raises:
        UsageError: a folder, a device, or no name of a file.
    """
    try:
        exists, is_folder, is_file = page.exists(), page.is_dir(), page.is_file()
    except OSError as error:
        raise UsageError(f"cannot be the name of a file: {error.strerror}", where=str(page)) from error
    if is_folder:
        raise UsageError("a folder, where a page is to be written", where=str(page), hint=f"--html {page}/rows.html")
    if exists and not is_file:
        raise UsageError("not a regular file, where a page is to be written", where=str(page))
