"""``ftcli generate``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ftcli.cli import console
from ftcli.cli.option import Json, Quiet, Verbose


def generate(
    data: Annotated[str, typer.Argument(help="Rows to answer: file, glob, folder or Hub id.", show_default=False)],
    target: Annotated[
        str | None,
        typer.Argument(
            help="Run, adapter, model folder, GGUF file or Hub id; none: the newest run.", show_default=False
        ),
    ] = None,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The answers, as JSONL.")] = Path(
        "answers.jsonl"
    ),
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers generated at a time.")] = 8,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the most probable token.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="The most probable tokens up to this share.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="So many of the most probable tokens; 0: all.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice, where there is one.")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many rows.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin the output anew.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Answer every row of a file, a line each; what is answered already is kept."""
    with console.reporting(quiet=quiet or json, verbose=verbose) as on_event:
        from ftcli.evaluate.generate import Sampling
        from ftcli.jobs.predict import generate_answers

        sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, max_new_tokens=max_new_tokens)
        found = generate_answers(
            data, target, output=output, sampling=sampling, batch_rows=batch_size, limit=limit, overwrite=overwrite,
            on_event=on_event,
        )  # fmt: skip
    if json:
        console.show_document("generate", asdict(found))
    else:
        console.print_text(f"{found.output}: {found.n_answers:,} answers of {found.target}")
