"""JSON that is read with a reason when it cannot be; writes that are either whole or not there.

A write goes to a temporary name in the same folder, then fsync, then rename.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from ftcli.errors import ContentError, DiskError, UsageError

_HASH_BLOCK_BYTES = 1 << 20
_MOST_JSON_BYTES = 1 << 28


def write_text(path: Path, text: str) -> None:
    """Nothing; afterwards ``path`` holds ``text``, or what it held before.

    Raises:
        DiskError: the disk is full or the path may not be written.
    """
    data = text.encode("utf-8")
    with replaced_file(path, len(data)) as stream:
        stream.write(data)


def check_new(path: Path, *, overwrite: bool) -> None:
    """None if a file may be written there.

    Raises:
        UsageError: there is one already, and it may not be replaced.
    """
    if path.exists() and not overwrite:
        raise UsageError("is there already", where=str(path), hint="name another with -o, or replace it: --overwrite")


def write_new(path: Path, text: str, *, overwrite: bool) -> None:
    """As ``write_text``, for a file that is not there yet, unless it may be replaced.

    Raises:
        UsageError: it is there.
        DiskError: it cannot be written.
    """
    check_new(path, overwrite=overwrite)
    write_text(path, text)


@contextmanager
def replaced_file(path: Path, needed_bytes: int = 0) -> Iterator[BinaryIO]:
    """A stream whose bytes are the file at ``path`` when the block ends without an error; until then it is as before.

    Raises:
        DiskError: the disk is full or the path may not be written.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with disk_errors(path, needed_bytes):
        try:
            with temporary.open("wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
            sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Nothing; afterwards ``path`` holds ``value`` as indented JSON, or what it held before."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None if there is no such file.

    Raises:
        ContentError: it cannot be read, is no JSON, or no object.
    """
    try:
        if not path.is_file():
            return None
        if path.stat().st_size > _MOST_JSON_BYTES:
            raise ContentError("is too large to be what its name says", where=str(path))
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ContentError(f"cannot be read as JSON: {str(error)[:200]}", where=str(path)) from error
    if not isinstance(value, dict):
        raise ContentError("is no JSON object", where=str(path))
    return value


@contextmanager
def staged_folder(final: Path, needed_bytes: int = 0) -> Iterator[Path]:
    """A new empty folder that becomes ``final`` when the block ends without an error.

    Every file is flushed to the disk before the rename, so a folder under its final name is complete.
    An existing ``final`` is set aside, and removed only after the new one stands. What killed processes left is swept.

    Args:
        final: its name in the end.
        needed_bytes: what is going to be written, if that is known.

    Raises:
        DiskError: the disk is full or the folder may not be written; nothing is left behind.
    """
    with disk_errors(final, needed_bytes):
        bring_back(final)
    with scratch_folder(final, needed_bytes) as staging:
        yield staging
        sync_tree(staging)
        replace_folder(staging, final)


@contextmanager
def scratch_folder(final: Path, needed_bytes: int = 0) -> Iterator[Path]:
    """A new empty folder beside ``final`` that is gone when the block ends; what killed processes left is swept.

    Raises:
        DiskError: the disk is full or the folder may not be written.
    """
    scratch = final.with_name(name_beside(final, "tmp"))
    with disk_errors(final, needed_bytes):
        for left in list_left(final, "tmp"):
            shutil.rmtree(left, ignore_errors=True)
        check_free(final, needed_bytes)
        scratch.mkdir(parents=True)
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def bring_back(final: Path) -> None:
    """Nothing; ``final`` is there again if a process was killed while it replaced it, and no older one beside it."""
    for left in list_left(final, "old"):
        if final.exists() or final.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.rename(final)


def list_left(final: Path, kind: str) -> list[Path]:
    """The folders of this ``kind`` (tmp, old) that killed processes of this machine left beside ``final``."""
    prefix = name_beside(final, kind).removesuffix(str(os.getpid()))
    found = final.parent.glob(f"{glob.escape(prefix)}*")
    return [path for path in found if not _is_alive(path.name.removeprefix(prefix))]


def name_beside(final: Path, kind: str) -> str:
    """The name of this process's own folder of a ``kind`` beside ``final``."""
    return f".{final.name}.{kind}-{platform.node()}-{os.getpid()}"


def _is_alive(process: str) -> bool:
    """Whether another process of this number is there; with more before the number it is another machine's."""
    if not process.isdecimal():
        return True
    if int(process) == os.getpid():
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def make_folder(folder: Path) -> None:
    """Nothing; ``folder`` is there.

    Raises:
        DiskError: it cannot be made.
    """
    with disk_errors(folder):
        folder.mkdir(exist_ok=True)


def replace_folder(source: Path, final: Path) -> None:
    """Nothing; ``source`` now bears the name ``final``, and what bore it before is gone."""
    old = final.with_name(name_beside(final, "old"))
    if final.exists():
        final.rename(old)
    source.rename(final)
    sync_folder(final.parent)
    if old.is_dir() and not old.is_symlink():
        shutil.rmtree(old)
    else:
        old.unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Nothing; ``folder`` is gone, and at no moment was a part of it left under its name."""
    doomed = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    with disk_errors(folder):
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed)


def sync_tree(folder: Path) -> None:
    """Nothing; every file and folder below ``folder`` is on the disk, readable as umask says.

    safetensors creates its files with mode 0600, whatever the umask is.
    """
    mask = os.umask(0)
    os.umask(mask)
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            path.chmod(0o666 & ~mask)
            sync_file(path)
        sync_folder(Path(parent))


def sync_folder(folder: Path) -> None:
    """Nothing; the names in ``folder`` are on the disk."""
    sync_file(folder)


def sync_file(path: Path) -> None:
    """Nothing; what was written to ``path`` is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_file(path: Path) -> str:
    """The sha256 of the file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Name (relative, with slashes) → ``{"sha256", "bytes"}`` of every file below ``folder``."""
    return {
        path.relative_to(folder).as_posix(): {"sha256": hash_file(path), "bytes": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@contextmanager
def disk_errors(path: Path, needed_bytes: int = 0) -> Iterator[None]:
    """A block in which an operating system's refusal to write becomes a ``DiskError`` naming ``path``."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise
        raise explain_disk_error(error, path, needed_bytes) from error
    except Exception as error:
        # safetensors reports a full disk as its own error type with the OS text inside
        if "No space left on device" in str(error):
            raise explain_disk_error(OSError(errno.ENOSPC, "No space left on device"), path, needed_bytes) from error
        raise


def check_free(path: Path, needed_bytes: int) -> None:
    """None if ``needed_bytes`` can be written on the disk that holds ``path``.

    Raises:
        DiskError: naming both sizes.
    """
    if free_bytes(path) < needed_bytes:
        raise explain_disk_error(OSError(errno.ENOSPC, "No space left on device"), path, needed_bytes)


def explain_disk_error(error: OSError, path: Path, needed_bytes: int = 0) -> DiskError:
    """A ``DiskError`` that says what stopped the write to ``path`` and what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = free_bytes(path)
        needed = f"{needed_bytes:,} bytes are needed, " if needed_bytes else ""
        return DiskError(
            f"the disk is full: {needed}{free:,} bytes are free",
            where=str(path),
            hint="free some space, or write to another disk; what was saved before is intact",
        )
    reason = error.strerror or str(error)
    return DiskError(f"cannot write: {reason.lower()}", where=str(path), hint="choose a folder you may write to")


def free_bytes(path: Path) -> int:
    """Bytes that may be written on the disk that holds ``path`` (which need not exist yet)."""
    for folder in (path, *path.parents):
        with suppress(OSError):
            return shutil.disk_usage(folder).free
    return 0
