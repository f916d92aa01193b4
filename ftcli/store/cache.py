"""The folder in which ftcli keeps what it can make again: beside the Hub's own cache, pruned by age.

Nothing here is ever needed. What is missing, damaged or of another version is made again; a disk that is full or
read-only costs time, not the run.
"""

from __future__ import annotations

import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

_KEPT_SECONDS = 30 * 24 * 3600
_KEPT_BYTES = 20_000_000_000


def find_cache(kind: str) -> Path:
    """The folder of one kind of entries, which need not exist: ``$HF_HOME/ftcli/KIND``."""
    return Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser() / "ftcli" / kind


def prune_cache(folder: Path) -> None:
    """Nothing; entries unused for 30 days are gone, and the least recently used ones beyond 20 GB."""
    entries = []
    with suppress(OSError):
        for entry in folder.iterdir():
            size_bytes = sum(path.stat().st_size for path in entry.rglob("*") if path.is_file())
            entries.append((entry.stat().st_mtime, size_bytes, entry))
    total_bytes = 0
    for used_at, size_bytes, entry in sorted(entries, reverse=True):
        total_bytes += size_bytes
        if total_bytes > _KEPT_BYTES or used_at < time.time() - _KEPT_SECONDS:
            shutil.rmtree(entry, ignore_errors=True)
