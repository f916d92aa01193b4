"""Where the result goes: a folder's name that is free, or an earlier merge's that may be replaced."""

from __future__ import annotations

import os
from pathlib import Path

from ftcli.errors import UsageError
from ftcli.evaluate.target import MANIFEST, Target
from ftcli.merge.source import Source
from ftcli.store.file import read_json
from ftcli.store.output import read_output as read_output


def name_output(source: Source) -> Path:
    """The folder that the result becomes where none is asked for: ``merged/`` of the run, or beside."""
    return source.run.path / "merged" if source.run else Path(f"{source.title}-merged")


def check_outside(final: Path, target: Target, done: str) -> None:
    """None if nothing of ``target`` lies in the folder that is written; ``done`` says what is done to it.

    Raises:
        UsageError: naming it.
    """
    for path in filter(None, (target.adapter, target.files.folder)):
        if path.resolve().is_relative_to(os.path.realpath(final)):
            raise UsageError(f"what is {done} lies in it: {path}", where=str(final), hint="choose another --output")


def check_output(final: Path, source: Source, *, overwrite: bool) -> None:
    """None if the result may be written to ``final``.

    Raises:
        UsageError: something is there, or what is read lies in it.
    """
    check_outside(final, source, "merged")
    if not final.exists() and not final.is_symlink():
        return
    if final.is_dir() and not any(final.iterdir()):
        return
    if not overwrite:
        raise UsageError("exists already", where=str(final), hint="replace it: --overwrite; or choose another --output")
    manifest = read_json(final / MANIFEST) if final.is_dir() else None
    if not manifest or manifest.get("command") != "merge":
        raise UsageError("is no merged model of ftcli, so it is not replaced", where=str(final), hint="choose --output")
