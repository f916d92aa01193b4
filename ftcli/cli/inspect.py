"""``ftcli inspect``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ftcli.cli import anatomy, console
from ftcli.cli.option import Json, Overrides, Quiet, Verbose
from ftcli.errors import UsageError

if TYPE_CHECKING:
    from ftcli.events import OnEvent


class Method(StrEnum):
    """How a model would be trained."""

    QLORA = "qlora"
    LORA = "lora"
    FULL = "full"


def inspect(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="TARGET|RECIPE",
            help="Hub id, folder, .safetensors, .bin, .gguf, adapter, run, package://, or a recipe.",
        ),
    ] = None,
    layers: Annotated[bool, typer.Option("--layers", help="One line for each layer.")] = False,
    tensors: Annotated[bool, typer.Option("--tensors", help="One line for each tensor.")] = False,
    r: Annotated[int, typer.Option("--r", metavar="N", min=1, max=1 << 16, help="Rank for the cost of LoRA.")] = 16,
    target_modules: Annotated[
        str | None,
        typer.Option("--target-modules", metavar="X", help="Also the cost of these: names with commas, or a regex."),
    ] = None,
    layers_to_transform: Annotated[
        str | None, typer.Option("--layers-to-transform", metavar="X", help='LoRA in these layers only: "last:8", 4-9.')
    ] = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", metavar="SIZE", help="Forecast training on a GPU of this size, as 24GB.")
    ] = None,
    fit: Annotated[
        str | None, typer.Option("--fit", metavar="SIZE", help="The same, with what to change until it fits.")
    ] = None,
    sequence: Annotated[
        int, typer.Option("--seq", metavar="N", min=1, help="Tokens of a row, for the forecast.")
    ] = 2048,
    batch: Annotated[int, typer.Option("--batch", metavar="N", min=1, help="Rows of a micro-batch.")] = 1,
    method: Annotated[Method, typer.Option("--method", help="How the forecast's run trains.")] = Method.QLORA,
    overrides: Overrides = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """See what a model is made of, what training it takes, and whether that fits."""
    budget = _read_budget(gpu, fit)
    with console.reporting(quiet=quiet or json, verbose=verbose) as on_event:
        if target is not None and Path(target).suffix.lower() in (".yaml", ".yml"):
            changes, should_fit = tuple(overrides or ()), fit is not None
            show_recipe_plan(Path(target), changes, budget, as_json=json, should_fit=should_fit, on_event=on_event)
            return
        if overrides:
            raise UsageError("--set changes a recipe, and this is none", where=target or "")
        from ftcli.jobs.inspect import inspect_target, inspection_to_json
        from ftcli.jobs.plan import plan_model, plan_to_json

        peft = _build_peft(r, target_modules, layers_to_transform)
        result = inspect_target(target, peft=peft, on_event=on_event)
        plan = None
        if budget is not None and result.anatomy:
            plan = plan_model(
                result.anatomy,
                result.source.target,
                method=method.value,
                sequence=sequence,
                batch=batch,
                peft=peft,
                budget_bytes=budget,
                should_fit=fit is not None,
            )
    if json:
        console.show_document("inspect", inspection_to_json(result) | (plan_to_json(plan) if plan else {}))
        return
    width = min(console.measure_width(), 100)
    lines = list(anatomy.list_inspection(result, width, with_layers=layers, with_tensors=tensors))
    if plan:
        lines += ["", *anatomy.list_plan(plan, width)]
    console.show_lines(console.make_printable(line) for line in lines)


def show_recipe_plan(
    recipe: Path,
    overrides: tuple[str, ...],
    budget_bytes: int | None,
    *,
    as_json: bool,
    should_fit: bool = False,
    on_event: OnEvent,
    command: str = "inspect",
    n_processes: int = 1,
) -> None:
    """Nothing; the forecast of the run that ``recipe`` describes is on stdout."""
    from ftcli.jobs.plan import plan_recipe, plan_to_json

    plan = plan_recipe(
        recipe,
        overrides=overrides,
        budget_bytes=budget_bytes,
        should_fit=should_fit,
        device=None if budget_bytes is None else "cuda",
        n_processes=n_processes,
        on_event=on_event,
    )
    if as_json:
        console.show_document(command, plan_to_json(plan))
    else:
        lines = [f"model      {plan.model}", *anatomy.list_plan(plan, min(console.measure_width(), 100))]
        console.show_lines(console.make_printable(line) for line in lines)


def _read_budget(gpu: str | None, fit: str | None) -> int | None:
    if gpu is None and fit is None:
        return None
    from ftcli.model.forecast import parse_memory

    sizes = {parse_memory(text) for text in (gpu, fit) if text is not None}
    if len(sizes) > 1:
        raise UsageError("--gpu and --fit name two sizes", hint="give one of them")
    return sizes.pop()


def _build_peft(r: int, target_modules: str | None, layers_to_transform: str | None) -> Any:
    from pydantic import ValidationError

    from ftcli.recipe import PeftSection

    values: dict[str, Any] = {"r": r}
    if target_modules is not None:
        names = tuple(name.strip() for name in target_modules.split(",") if name.strip())
        values["target_modules"] = names if "," in target_modules or target_modules.isidentifier() else target_modules
    if target_modules in ("attn", "attn+gate_up", "all-linear"):
        values["target_modules"] = target_modules
    if layers_to_transform is not None:
        values["layers_to_transform"] = layers_to_transform
    try:
        return PeftSection(**values)
    except ValidationError as error:
        where = "--" + str(error.errors()[0]["loc"][0]).replace("_", "-")
        raise UsageError(str(error.errors()[0]["msg"]), where=where) from error
