"""``ftcli push``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ftcli.cli import console
from ftcli.cli.option import Json, Quiet, Verbose
from ftcli.cli.outcome import format_bytes


def push(
    target: Annotated[Path, typer.Argument(help="A finished run, or a folder with a README.md.", show_default=False)],
    repository: Annotated[str, typer.Argument(metavar="REPO", help="ORG/NAME on the Hub.", show_default=False)],
    public: Annotated[bool, typer.Option("--public", help="Make a repository that all can see.")] = False,
    message: Annotated[str, typer.Option("-m", "--message", help="Of the commit.", show_default=False)] = "",
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Put a run or a model on the Hub: private, its card checked, nothing secret."""
    with console.reporting(quiet=quiet or json, verbose=verbose) as on_event:
        from ftcli.jobs.publish import push as push_folder

        found = push_folder(target, repository, public=public, message=message, on_event=on_event)
    if json:
        console.show_document("push", asdict(found))
        return
    kind = "private" if found.is_private else "public"
    console.print_text(f"{found.url}: {len(found.files)} files, {format_bytes(found.size_bytes)}, {kind}")
