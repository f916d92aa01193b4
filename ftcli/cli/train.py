"""``ftcli train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ftcli.cli import console
from ftcli.cli.inspect import show_recipe_plan
from ftcli.cli.option import Json, Overrides, Quiet, Verbose


def train(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.", show_default=False)],
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest sound checkpoint.")] = False,
    resume_from: Annotated[
        Path | None, typer.Option("--resume-from", metavar="PATH", help="Go on from exactly this checkpoint.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in output_dir.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Print what the run will take, and stop.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train what a recipe describes, into a run folder."""
    with console.reporting(quiet=quiet or json, verbose=verbose) as on_event:
        if plan:
            changes = tuple(overrides or ())
            show_recipe_plan(recipe, changes, None, as_json=json, on_event=on_event, command="train")
            return
        from ftcli.jobs.summary import summarize_run
        from ftcli.train.run import train as run_training

        run = run_training(
            recipe,
            overrides=tuple(overrides or ()),
            resume=resume,
            resume_from=resume_from,
            overwrite=overwrite,
            on_event=on_event,
        )
    console.show_run(summarize_run(run), as_json=json)
