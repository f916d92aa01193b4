"""``ftcli export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ftcli.cli import console
from ftcli.cli.option import Data, Json, NoVerify, Quiet, Verbose


def export(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN|ADAPTER|MODEL", help="What to export; none: the newest finished run.", show_default=False
        ),
    ] = None,
    gguf: Annotated[
        list[str] | None,
        typer.Option("--gguf", metavar="TYPE", help="A GGUF file of this type, such as q4_k_m. May be repeated."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="DIR", help="Default: gguf/ of the run, or ./NAME-gguf."),
    ] = None,
    data: Data = None,
    no_verify: NoVerify = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write GGUF files for llama.cpp, and measure what each of them lost."""
    with console.reporting(quiet=quiet or json, verbose=verbose) as on_event:
        from ftcli.gguf.export import export as run_export

        made = run_export(
            target,
            kinds=gguf or [],
            output=output,
            data=data,
            verifies=not no_verify,
            overwrite=overwrite,
            on_event=on_event,
        )
    console.show_exported(made, as_json=json)
