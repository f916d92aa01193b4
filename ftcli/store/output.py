"""Where a result goes: the name that was asked for, as a folder's, and whether it may be written there."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ftcli.errors import UsageError
from ftcli.store.file import read_json
from ftcli.store.target import path_exists

MANIFEST = "manifest.json"
OTHER_OUTPUT = "choose another --output"


def read_output(output: Path) -> Path:
    """The folder that is asked for: ``output``, or what that is a link to.

    Raises:
        UsageError: it can be no folder's name.
    """
    final = Path(os.path.expanduser(output))
    if final.name in ("", ".."):
        raise UsageError("is no name that a new folder can have", where=str(output), hint=OTHER_OUTPUT)
    try:
        str(final).encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError("cannot be the name of a file: it is no UTF-8", where=ascii(str(output))) from error
    is_link = path_exists(final, str(output)) and final.is_symlink()
    return final.resolve() if is_link else final


def check_outside(final: Path, sources: Iterable[Path], done: str) -> None:
    """None if none of ``sources`` lies in the folder that is written; ``done`` says what is done to them.

    Raises:
        UsageError: naming it.
    """
    for path in sources:
        if path.resolve().is_relative_to(os.path.realpath(final)):
            raise UsageError(f"what is {done} lies in it: {path}", where=str(final), hint=OTHER_OUTPUT)


def check_replaceable(
    final: Path, *, overwrite: bool, is_own: Callable[[Mapping[str, Any]], bool], otherwise: str
) -> None:
    """None if a whole folder may be written as ``final``: nothing is there, or what may be replaced.

    Args:
        final: the folder.
        overwrite: whether an earlier result may be replaced.
        is_own: whether the manifest that lies there is that of such a result.
        otherwise: what is said of what lies there if it is not.

    Raises:
        UsageError: it stays.
    """
    if not final.exists() and not final.is_symlink():
        return
    if final.is_dir() and not any(final.iterdir()):
        return
    if not overwrite:
        raise UsageError("exists already", where=str(final), hint=f"replace it: --overwrite; or {OTHER_OUTPUT}")
    if not is_own((read_json(final / MANIFEST) if final.is_dir() else None) or {}):
        raise UsageError(f"{otherwise}, so it is not replaced", where=str(final), hint=OTHER_OUTPUT)
