"""The options that every command has, and the groups of options that several share."""

from __future__ import annotations

from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Data = Annotated[str | None, typer.Option("--data", metavar="FILE", help="Compare on these rows instead of the run's.")]
Base = Annotated[str | None, typer.Option("--base", metavar="MODEL", help="The base, where it lies elsewhere now.")]
NoVerify = Annotated[bool, typer.Option("--no-verify", help="Do not compare the result with its source.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress and no notices.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Lay a value over the recipe.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Also what the libraries log.")]
