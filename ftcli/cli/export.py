"""``ftcli export``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ftcli.cli import console
from ftcli.cli.option import Base, Data, Json, NoVerify, Quiet, Verbose
from ftcli.errors import UsageError

_WAYS = "a GGUF file: --gguf q4_k_m; the LoRA alone: --adapter; .bin weights as safetensors: --safetensors"


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
    adapter: Annotated[bool, typer.Option("--adapter", help="The LoRA alone, as GGUF beside its base.")] = False,
    safetensors: Annotated[
        bool, typer.Option("--safetensors", help="The .bin weights of a model or adapter as safetensors.")
    ] = False,
    base: Base = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="DIR", help="Default: gguf/ of the run, or ./NAME-gguf, ./NAME-safetensors."
        ),
    ] = None,
    data: Data = None,
    no_verify: NoVerify = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write what llama.cpp, Ollama and others run, and measure what it lost."""
    options: dict[str, Any] = {"output": output, "verifies": not no_verify, "overwrite": overwrite}
    with console.reporting(quiet=quiet or json, verbose=verbose) as on_event:
        _check_way(target, gguf or [], adapter=adapter, safetensors=safetensors, compared=data or base)
        made: Any
        show: Callable[..., None]
        if target and safetensors:
            from ftcli.jobs.safetensors import export_safetensors

            made, show = export_safetensors(target, **options, on_event=on_event), console.show_safe
        elif adapter:
            from ftcli.gguf.adapter import export_adapter

            made = export_adapter(target, base=base, data=data, **options, on_event=on_event)
            show = console.show_adapter
        else:
            from ftcli.gguf.export import export as run_export

            made = run_export(target, kinds=gguf or [], base=base, data=data, **options, on_event=on_event)
            show = console.show_exported
    show(made, as_json=json)


def _check_way(
    target: str | None, gguf: Sequence[str], *, adapter: bool, safetensors: bool, compared: str | None
) -> None:
    """None if it is plain what to write.

    Raises:
        UsageError: nothing is, or several things are.
    """
    asked = {"--gguf": bool(gguf), "--adapter": adapter, "--safetensors": safetensors}
    named = [name for name, is_asked in asked.items() if is_asked]
    if len(named) > 1:
        raise UsageError(f"{' and '.join(named)} cannot be written at once", hint="name one of them, then the other")
    if not named:
        raise UsageError("there is nothing to export to", hint=f"name {_WAYS}")
    if safetensors and not target:
        raise UsageError("needs a model to convert", where="--safetensors", hint="ftcli export MODEL --safetensors")
    if safetensors and compared:
        raise UsageError(
            "every byte is compared with the source, and no rows and no base",
            where="--safetensors",
            hint="leave out --data and --base",
        )
