"""``ftcli merge``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ftcli.cli import console
from ftcli.cli.option import Base, Data, Json, NoVerify, Quiet, Verbose


class Dtype(StrEnum):
    """What the merged weights are stored in."""

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


class Onto(StrEnum):
    """Which base the update is added to."""

    ORIGINAL = "original"
    DEQUANTIZED = "dequantized"


def merge(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN|ADAPTER", help="A run or an adapter; none: the newest finished run.", show_default=False
        ),
    ] = None,
    base: Base = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="DIR", help="Default: merged/ of the run, or ./NAME-merged."),
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option("--dtype", help="Default: as the base (of a GGUF file: bfloat16).")
    ] = None,
    onto: Annotated[
        Onto, typer.Option("--onto", help="The original weights, or what a run in 4 bits saw of them.")
    ] = Onto.ORIGINAL,
    data: Data = None,
    no_verify: NoVerify = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier merge.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Merge an adapter into its base, and prove that the result is the same model."""
    with console.reporting(quiet=quiet or json, verbose=verbose) as on_event:
        from ftcli.merge.run import merge as run_merge

        merged = run_merge(
            target,
            base=base,
            output=output,
            dtype=dtype,
            onto=onto,
            data=data,
            verifies=not no_verify,
            overwrite=overwrite,
            on_event=on_event,
        )
    console.show_merged(merged, as_json=json)
