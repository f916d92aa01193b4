"""What was typed in earlier conversations: a file of one JSON string a line, for its owner's eyes only.

It is a convenience: what cannot be read is left out, and where nothing can be written nothing is kept.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

KEPT_LINES = 1000


def read_history(path: Path) -> list[str]:
    """The texts that the file holds, oldest first."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return []
    texts = []
    for line in lines:
        with suppress(ValueError, RecursionError):
            texts.append(json.loads(line))
    return [text for text in texts if isinstance(text, str)][-KEPT_LINES:]


def add_history(path: Path, text: str) -> None:
    """Nothing; ``text`` is the newest of the file's, unless it is so already or the file cannot be written.

    The file is read again before it is replaced, so conversations side by side keep each other's lines.
    """
    texts = read_history(path)
    if texts[-1:] == [text]:
        return
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as stream:
                stream.writelines(json.dumps(kept) + "\n" for kept in [*texts, text][-KEPT_LINES:])
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
