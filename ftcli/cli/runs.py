"""``ftcli runs``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ftcli.cli import console, listing
from ftcli.cli.option import Json, Quiet, Verbose

app = typer.Typer(rich_markup_mode=None, invoke_without_command=True, help="List the runs in a folder, or compare two.")


@app.callback()
def runs(
    context: typer.Context,
    folder: Annotated[Path, typer.Option("--dir", metavar="PATH", help="The folder that holds runs.")] = Path("runs"),
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """List the runs in a folder: model, data, steps, best loss, state, size."""
    if context.invoked_subcommand:
        return
    from ftcli.jobs.runs import list_runs, to_json

    found = list_runs(folder)
    if json:
        console.show_document("runs", {"runs": [to_json(row) for row in found]})
    elif not found:
        console.print_talk(f"no runs under {folder}/")
    else:
        console.show_lines(listing.list_runs(found, console.measure_width()))


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="A run folder.", show_default=False)],
    second: Annotated[Path, typer.Argument(help="Another one.", show_default=False)],
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Hold two runs side by side: what their recipes say differently, and what came of them."""
    from ftcli.jobs.runs import compare_runs, to_json

    found = compare_runs(first, second)
    if json:
        console.show_document("runs compare", to_json(found))
    else:
        console.show_lines(listing.list_comparison(found, console.measure_width()))
