"""``ftcli env``."""

from __future__ import annotations

from ftcli.cli import console
from ftcli.cli.option import Json, Quiet, Verbose


def env(json: Json = False, quiet: Quiet = False, verbose: Verbose = False) -> None:
    """Show versions, devices, and what this machine can do."""
    with console.reporting(quiet=quiet or json, verbose=verbose):
        from ftcli.jobs.environment import read_environment

        environment = read_environment()
    console.show_environment(environment, as_json=json)
