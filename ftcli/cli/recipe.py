"""``ftcli recipe``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ftcli.cli import console
from ftcli.cli.option import Json, Overrides, Quiet, Verbose

app = typer.Typer(rich_markup_mode=None, no_args_is_help=True, help="Check a recipe, or print its JSON schema.")


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


@app.command()
def schema(json: Json = False, quiet: Quiet = False, verbose: Verbose = False) -> None:
    """Print the JSON schema of recipes, for editors."""
    from ftcli.recipe import recipe_json_schema

    console.print_json(recipe_json_schema())
