"""``ftcli quantize``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ftcli.cli import console
from ftcli.cli.option import Base, Data, Json, NoVerify, Quiet, Verbose
from ftcli.errors import UsageError


def quantize(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN|ADAPTER|MODEL", help="What to quantise; none: the newest finished run.", show_default=False
        ),
    ] = None,
    method: Annotated[str | None, typer.Option("--method", metavar="METHOD", help="gptq, awq, nf4 or int8.")] = None,
    bits: Annotated[
        int | None, typer.Option("--bits", help="gptq: 2, 4 or 8; awq and nf4: 4; int8: 8. Default: 4, of int8 8.")
    ] = None,
    group_size: Annotated[
        str,
        typer.Option(
            "--group-size", metavar="auto|N", help="gptq, awq: weights that share a scale; auto: the largest that fits."
        ),
    ] = "auto",
    calibration: Annotated[
        str | None,
        typer.Option(
            "--calibration",
            metavar="FILE|RECIPE",
            help="gptq, awq: the rows that rounding is fitted to; none: what the run was trained on.",
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="gptq, awq: windows of these rows. Default: 128.", show_default=False)
    ] = None,
    seq_len: Annotated[
        int | None, typer.Option(min=2, help="gptq, awq: tokens of a window. Default: 2048.", show_default=False)
    ] = None,
    tune: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="gptq, awq: steps in which each block learns its rounding. Default: 50, of awq 0.",
            show_default=False,
        ),
    ] = None,
    base: Base = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="DIR", help="Default: quantized-METHOD/ of the run, or ./NAME-quantized-METHOD."
        ),
    ] = None,
    data: Data = None,
    no_verify: NoVerify = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what was quantised there before.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write weights in fewer bits for vLLM and transformers, and measure what that lost."""
    if method is None:
        raise UsageError("which method?", hint="--method gptq or awq for vLLM; nf4 or int8 for transformers")
    with console.reporting(quiet=quiet or json, verbose=verbose) as on_event:
        from ftcli.quantize.method import build_spec
        from ftcli.quantize.run import quantize as run_quantize

        spec = build_spec(method, bits=bits, group_size=group_size, tune=tune, samples=samples, seq_len=seq_len)
        made = run_quantize(
            target,
            spec,
            base=base,
            calibration=calibration,
            output=output,
            data=data,
            verifies=not no_verify,
            overwrite=overwrite,
            on_event=on_event,
        )
    console.show_quantized(made, as_json=json)
