"""Where a result goes: the name that was asked for, as a folder's."""

from __future__ import annotations

import os
from pathlib import Path

from ftcli.errors import UsageError
from ftcli.store.target import path_exists

MANIFEST = "manifest.json"


def read_output(output: Path) -> Path:
    """The folder that is asked for: ``output``, or what that is a link to.

    Raises:
        UsageError: it can be no folder's name.
    """
    final = Path(os.path.expanduser(output))
    if final.name in ("", ".."):
        raise UsageError("is no name that a new folder can have", where=str(output), hint="choose another --output")
    try:
        str(final).encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError("cannot be the name of a file: it is no UTF-8", where=ascii(str(output))) from error
    is_link = path_exists(final, str(output)) and final.is_symlink()
    return final.resolve() if is_link else final
