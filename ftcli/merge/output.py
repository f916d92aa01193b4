"""Where the result goes: a folder's name that is free, or an earlier merge's that may be replaced."""

from __future__ import annotations

from pathlib import Path

from ftcli.merge.source import Source
from ftcli.store.output import check_outside, check_replaceable


def name_output(source: Source) -> Path:
    """The folder that the result becomes where none is asked for: ``merged/`` of the run, or beside."""
    return source.run.path / "merged" if source.run else Path(f"{source.title}-merged")


def check_output(final: Path, source: Source, *, overwrite: bool) -> None:
    """None if the result may be written to ``final``.

    Raises:
        UsageError: something is there, or what is read lies in it.
    """
    check_outside(final, (source.adapter, source.files.folder), "merged")
    check_replaceable(
        final,
        overwrite=overwrite,
        is_own=lambda manifest: manifest.get("command") == "merge",
        otherwise="is no merged model of ftcli",
    )
