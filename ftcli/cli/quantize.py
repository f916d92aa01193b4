"""``ftcli quantize``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ftcli.cli import console
from ftcli.cli.option import Base, Data, Json, NoVerify, Quiet, Verbose
from ftcli.errors import UsageError

Method = Annotated[str | None, typer.Option("--method", metavar="METHOD", help="gptq, awq, nf4 or int8.")]
Bits = Annotated[
    int | None, typer.Option("--bits", help="gptq: 2, 4 or 8; awq and nf4: 4; int8: 8. Default: 4, of int8 8.")
]
GroupSize = Annotated[
    str,
    typer.Option(
        "--group-size", metavar="auto|N", help="gptq, awq: weights that share a scale; auto: the largest that fits."
    ),
]
CalibrationRows = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        metavar="FILE|RECIPE",
        help="gptq, awq: the rows that rounding is fitted to; none: what the run was trained on.",
    ),
]
Samples = Annotated[
    int | None, typer.Option(min=1, help="gptq, awq: windows of these rows. Default: 128.", show_default=False)
]
SeqLen = Annotated[
    int | None, typer.Option(min=2, help="gptq, awq: tokens of a window. Default: 2048.", show_default=False)
]
Tune = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="gptq, awq: steps in which each block learns its rounding. Default: 50.",
        show_default=False,
    ),
]
Compare = Annotated[
    str | None,
    typer.Option(
        "--compare",
        metavar="LIST",
        help="Make all of these, such as nf4,gptq,awq,q4_k_m, and show them side by side; --method keeps one.",
    ),
]
MaxSize = Annotated[
    str | None,
    typer.Option("--max-size", metavar="SIZE", help="With --compare: keep the best one of at most this size."),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "-o", "--output", metavar="DIR", help="Default: quantized-METHOD/ of the run, or ./NAME-quantized-METHOD."
    ),
]


def quantize(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN|ADAPTER|MODEL", help="What to quantise; none: the newest finished run.", show_default=False
        ),
    ] = None,
    method: Method = None,
    bits: Bits = None,
    group_size: GroupSize = "auto",
    calibration: CalibrationRows = None,
    samples: Samples = None,
    seq_len: SeqLen = None,
    tune: Tune = None,
    compare: Compare = None,
    max_size: MaxSize = None,
    base: Base = None,
    output: Output = None,
    data: Data = None,
    no_verify: NoVerify = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what was quantised there before.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write weights in fewer bits for vLLM and transformers, and measure what that lost."""
    options: dict[str, Any] = {"group_size": group_size, "tune": tune, "samples": samples, "seq_len": seq_len}
    places: dict[str, Any] = {"calibration": calibration, "output": output, "data": data, "overwrite": overwrite}
    made: Any
    show: Any
    with console.reporting(quiet=quiet or json, verbose=verbose) as on_event:
        if compare is not None:
            _check_alone({"--bits": bits is not None, "--base": base is not None, "--no-verify": no_verify})
            from ftcli.jobs.compression import compare_forms, find_forms, read_size

            forms = find_forms(compare.split(","), options)
            most_bytes = read_size(max_size) if max_size else None
            chosen = method.strip().lower() if method else None
            made = compare_forms(target, forms, chosen=chosen, most_bytes=most_bytes, **places, on_event=on_event)
            show = console.show_compared
        else:
            if method is None or max_size:
                hint = "--method gptq or awq for vLLM; nf4 or int8 for transformers; --compare nf4,gptq shows several"
                raise UsageError("--max-size is for --compare" if max_size else "which method?", hint=hint)
            from ftcli.quantize.method import build_spec
            from ftcli.quantize.run import quantize as run_quantize

            spec = build_spec(method, bits=bits, **options)
            made = run_quantize(target, spec, base=base, verifies=not no_verify, **places, on_event=on_event)
            show = console.show_quantized
    show(made, as_json=json)


def _check_alone(given: dict[str, bool]) -> None:
    """None if nothing is given that does not go with ``--compare``."""
    for option in (option for option, is_given in given.items() if is_given):
        raise UsageError("does not go with --compare", where=option, hint=f"leave {option} out")
