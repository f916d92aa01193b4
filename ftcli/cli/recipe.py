"""``ftcli recipe``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ftcli.cli import console
from ftcli.cli.option import Json, Overrides, Quiet, Verbose
from ftcli.cli.outcome import format_bytes

app = typer.Typer(rich_markup_mode=None, no_args_is_help=True, help="Start, check or translate a recipe.")


@app.command()
def init(
    model: Annotated[str | None, typer.Argument(help="Hub id, folder or .gguf file.", show_default=False)] = None,
    data: Annotated[str | None, typer.Argument(help="Rows: file, glob, folder or Hub id.", show_default=False)] = None,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="Where to write it.")] = Path(
        "recipe.yaml"
    ),
    gpu: Annotated[
        str | None, typer.Option("--gpu", metavar="24GB", help="Plan for a card of this size, not for this machine.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write a first recipe for a model and rows that fits this machine, with a reason beside each choice."""
    model = console.ask("which model (Hub id, folder, .gguf file)", model)
    data = console.ask("which rows (file, Hub id)", data)
    with console.reporting(quiet=quiet or json, verbose=verbose) as on_event:
        from ftcli.jobs.start import init_recipe
        from ftcli.model.forecast import parse_memory

        budget = parse_memory(gpu) if gpu else None
        draft = init_recipe(model, data, output, budget_bytes=budget, overwrite=overwrite, on_event=on_event)
    if json:
        choice = asdict(draft.choice)
        forecast = choice.pop("forecast")["total_bytes"]
        entries = {"output": draft.path, "forecast_bytes": forecast, "budget_bytes": draft.budget_bytes, **choice}
        console.show_document("recipe init", entries)
        return
    console.print_text(draft.text.rstrip())
    console.print_talk(f"{draft.path}: written; train it: ftcli train {draft.path}")
    if not draft.choice.fits:
        size, room = format_bytes(draft.choice.forecast.total_bytes), format_bytes(draft.budget_bytes)
        console.print_talk(f"notice: it needs {size}, and {room} are there: take a smaller model")


@app.command()
def check(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.", show_default=False)],
    overrides: Overrides = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Check a recipe and print it as it would be run, with where each value comes from."""
    from ftcli.recipe import dump_recipe, load_recipe

    loaded = load_recipe(recipe, overrides=tuple(overrides or ()))
    console.show_recipe(loaded, dump_recipe(loaded.recipe, loaded.sources), as_json=json, quiet=quiet)


@app.command("import")
def translate(
    file: Annotated[Path, typer.Argument(help="A config of axolotl, LLaMA-Factory or TRL.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Where to write it; else to stdout.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Translate another tool's config into a recipe, and tell what differs."""
    from ftcli.recipe.translate import translate_file
    from ftcli.store.file import write_new

    found = translate_file(file, folder=output.parent if output else None)
    if output:
        write_new(output, found.text, overwrite=overwrite)
    notes = [asdict(note) for note in found.notes]
    if json:
        entries = {"tool": found.tool, "output": str(output) if output else None, "recipe": found.text, "notes": notes}
        console.show_document("recipe import", entries)
        return
    if not output:
        console.print_text(found.text.rstrip())
    for note in found.notes if not quiet else ():
        console.print_talk(console.make_printable(f"{note.kind:<8} {note.key}: {note.text}"))
    if output and not quiet:
        console.print_talk(f"{output}: written; look at it: ftcli recipe check {output}")


@app.command()
def schema(json: Json = False, quiet: Quiet = False, verbose: Verbose = False) -> None:
    """Print the JSON schema of recipes, for editors."""
    from ftcli.recipe import recipe_json_schema

    console.print_json(recipe_json_schema())
