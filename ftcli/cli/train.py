"""``ftcli train``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from ftcli.cli import console
from ftcli.cli.inspect import show_recipe_plan
from ftcli.cli.option import Json, Overrides, Quiet, Verbose
from ftcli.errors import UsageError
from ftcli.train.stop import is_launched


def train(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.", show_default=False)],
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest sound checkpoint.")] = False,
    resume_from: Annotated[
        Path | None, typer.Option("--resume-from", metavar="PATH", help="Go on from exactly this checkpoint.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in output_dir.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Print what the run will take, and stop.")] = False,
    nproc: Annotated[int, typer.Option("--nproc", metavar="N", min=1, help="Processes, one a GPU.")] = 1,
    print_launch: Annotated[
        bool, typer.Option("--print-launch", help="Print the command for each of --nodes machines, and stop.")
    ] = False,
    nodes: Annotated[int, typer.Option("--nodes", metavar="N", min=1, help="Machines of --print-launch.")] = 1,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train what a recipe describes, into a run folder."""
    changes = tuple(overrides or ())
    with console.reporting(quiet=quiet or json, verbose=verbose) as on_event:
        if plan:
            show_recipe_plan(recipe, changes, None, as_json=json, on_event=on_event, command="train", n_processes=nproc)
            return
        flags = {"--resume": resume, "--overwrite": overwrite, "--json": json, "--quiet": quiet, "-v": verbose}
        words = ["train", str(recipe), *(f"--set={change}" for change in changes)]
        words += [flag for flag, is_given in flags.items() if is_given]
        words += ["--resume-from", str(resume_from)] if resume_from else []
        if not is_launched() and _launch(recipe, changes, words, nproc, nodes if print_launch else 0):
            return
        from ftcli.train.run import train as run_training
        from ftcli.train.summary import summarize_run

        run = run_training(
            recipe,
            overrides=changes,
            resume=resume,
            resume_from=resume_from,
            overwrite=overwrite,
            should_report=True,
            on_event=on_event,
        )
    if console.is_main_process():
        console.show_run(summarize_run(run), as_json=json)


def _launch(recipe: Path, changes: tuple[str, ...], words: list[str], n_processes: int, n_nodes: int) -> bool:
    """Whether other processes have run ``ftcli`` with ``words``, or the commands for ``n_nodes`` were printed."""
    from ftcli.recipe import load_recipe

    config = load_recipe(recipe, overrides=changes).recipe.distributed.config
    if config and "ACCELERATE_MIXED_PRECISION" in os.environ:  # accelerate has started this one process
        return False
    if not (config or n_nodes or n_processes > 1):
        return False
    from ftcli.train.launch import launch, launch_config, list_commands

    if config and (n_nodes or n_processes > 1):
        hint = "drop --nproc and --print-launch, or set distributed.strategy to ddp or fsdp2"
        raise UsageError("accelerate's config says how many processes there are, and where", where=config, hint=hint)
    if config:
        launch_config(words, config)
    if n_nodes:
        console.print_text("\n".join(list_commands(words, n_nodes, n_processes)))
    elif code := launch(words, n_processes):
        raise typer.Exit(code)
    return True
