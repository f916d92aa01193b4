"""``ftcli tokenize``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ftcli.cli import console, rows
from ftcli.cli.option import Json, Overrides, Quiet, Verbose
from ftcli.errors import ContentError, UsageError
from ftcli.events import OnEvent


class LabelFormat(StrEnum):
    """How sequences are written."""

    JSONL = "jsonl"


def tokenize(
    target: Annotated[
        str | None,
        typer.Argument(metavar="RECIPE|DATA", help="A recipe, or rows: a file, glob, folder or Hub id (needs -m)."),
    ] = None,
    model: Annotated[
        str | None, typer.Option("-m", "--model", help="Whose tokenizer: Hub id, folder, .gguf or package://.")
    ] = None,
    text: Annotated[str | None, typer.Option("--text", help="Tokenize this text instead of rows.")] = None,
    show: Annotated[int, typer.Option("--show", metavar="N", min=0, help="Show the first N rows by tokens.")] = 0,
    worst: Annotated[
        int, typer.Option("--worst", metavar="N", min=0, help="Show N rows: longest, most masked, most unknown.")
    ] = 0,
    row: Annotated[int | None, typer.Option("--row", metavar="K", min=1, help="Show the row at line K.")] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write the report and rows as one page.")
    ] = None,
    words: Annotated[bool, typer.Option("--words", help="List words that split badly, for add_tokens.")] = False,
    show_labels: Annotated[
        bool, typer.Option("--show-labels", help="Print ids and labels of every sequence, for scripts.")
    ] = False,
    format_: Annotated[LabelFormat, typer.Option("--format", help="How --show-labels prints.")] = LabelFormat.JSONL,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out rows that cannot be used, and count them.")
    ] = False,
    speed: Annotated[
        float | None,
        typer.Option("--tokens-per-second", metavar="N", min=0.001, help="Say how long training takes at this speed."),
    ] = None,
    overrides: Overrides = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """See which tokens are trained on, what max_length costs, and what is wrong with the rows."""
    changes = tuple(overrides or ())
    with console.reporting(quiet=quiet or json, verbose=verbose) as on_event:
        if text is not None:
            _show_text(text, target, model, changes, as_json=json)
            return
        if target is None:
            raise UsageError("a recipe, or data with -m MODEL, is missing", hint="see ftcli tokenize --help")
        if show_labels:
            _show_labels(target, model, changes, skip_bad=skip_bad, as_json=json, on_event=on_event)
            return
        from ftcli.jobs.tokenize import tokenize as run_tokenize

        result = run_tokenize(
            target,
            model,
            overrides=changes,
            skip_bad=skip_bad,
            first=show,
            worst=worst,
            line=row,
            with_words=words,
            page=html,
            tokens_per_second=speed,
            on_event=on_event,
        )
    if json:
        console.show_document("tokenize", rows.tokenized_to_json(result))
    else:
        console.show_lines(rows.list_tokenized(result, console.measure_width(), colour=console.has_colour()))
    raise typer.Exit(ContentError.exit_code if result.report.has_errors else 0)


def _show_text(text: str, recipe: str | None, model: str | None, changes: tuple[str, ...], *, as_json: bool) -> None:
    from ftcli.jobs.text import tokenize_text

    report = tokenize_text(text, model=model, recipe=recipe, overrides=changes)
    if as_json:
        console.show_document("tokenize", rows.report_to_json(report))
    else:
        console.show_lines(rows.list_text(report, console.measure_width()))


def _show_labels(
    target: str, model: str | None, changes: tuple[str, ...], *, skip_bad: bool, as_json: bool, on_event: OnEvent
) -> None:
    from ftcli.jobs.preview import list_sequences
    from ftcli.jobs.rows import open_target

    opened = open_target(target, model, overrides=changes, skip_bad=skip_bad, on_event=on_event)
    sequences = list_sequences(opened, on_event)
    if as_json:
        console.show_document("tokenize", {"sequences": list(sequences)})
    else:
        console.show_sequences(sequences)
