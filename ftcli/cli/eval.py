"""``ftcli eval``."""

from __future__ import annotations

from typing import Annotated

import typer

from ftcli.cli import console
from ftcli.cli.option import Json, Quiet, Verbose
from ftcli.cli.scoreboard import list_scoreboard


def evaluate(
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TARGET",
            help="Runs, adapters, model folders, GGUF files or Hub ids; none: the newest finished run.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data", metavar="DATA", help="A file, glob, folder or Hub id of rows; none: what the run held out."
        ),
    ] = None,
    compare_base: Annotated[
        bool, typer.Option("--compare-base", help="Also the model from which the first target was made.")
    ] = False,
    score: Annotated[
        str | None,
        typer.Option(
            "--score", metavar="METRIC", help="Also score answers: exact_match, json, regex, rouge (ROUGE-L) or bleu."
        ),
    ] = None,
    regex: Annotated[
        str | None,
        typer.Option("--regex", metavar="REGEX", help="What --score regex looks for in an answer and its reference."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers generated at a time.")] = 8,
    max_length: Annotated[
        int | None,
        typer.Option(
            min=2, help="Longer documents are read in windows of so many tokens; none: the recipe's, or 2048."
        ),
    ] = None,
    stride: Annotated[
        int | None, typer.Option(min=1, help="How far windows advance; none: half of their length.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many rows of each data set.")] = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure models side by side: loss, perplexity, KL to the first one, score."""
    with console.reporting(quiet=quiet or json, verbose=verbose) as on_event:
        from ftcli.jobs.entry import Measure
        from ftcli.jobs.evaluate import evaluate_targets

        wanted = Measure(
            data=data,
            limit=limit,
            max_length=max_length,
            stride=stride,
            metric=score,
            pattern=regex,
            max_new_tokens=max_new_tokens,
            batch_rows=batch_size,
        )
        scoreboard = evaluate_targets(targets or (), wanted, compare_base=compare_base, on_event=on_event)
    if json:
        console.show_document("eval", scoreboard.to_json())
    else:
        console.show_lines(list_scoreboard(scoreboard, console.measure_width()))
