"""One tensor as it lies on disk, and a weight file opened for reading.

What is opened here is a regular file: a pipe would wait for ever, a device would never end.
"""

from __future__ import annotations

import errno
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ftcli.errors import ContentError, DiskError

COPY_AGAIN = "download or copy the file again"
# first bytes of what often lies under a weight file's name → what it is, what to do about it
_FOREIGN = {
    b"version https://git-lfs": ("a Git LFS pointer, not the weights themselves", "run: git lfs pull"),
    b"<!DOCTYPE": ("a web page, not weights", COPY_AGAIN),
    b"<html": ("a web page, not weights", COPY_AGAIN),
    b"GGUF": ("a GGUF file", "give it a name that ends in .gguf"),
    b"FUGG": ("a big-endian GGUF file", "convert the model again on a little-endian machine"),
    b"ggml": ("a GGML file, the format before GGUF", "convert the original model to GGUF"),
    b"ggjt": ("a GGJT file, the format before GGUF", "convert the original model to GGUF"),
    b"PK\x03\x04": ("a zip archive, as torch.save writes", "give it a name that ends in .bin"),
    b"\x89HDF": ("an HDF5 file", "only .safetensors, .bin and .gguf are read"),
    b"\x1f\x8b": ("a gzip file", "unpack it first"),
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor as it lies on disk.

    ``shape`` is outermost first, as in torch; ``dtype`` is safetensors' name for it, or GGUF's own (Q4_K);
    ``offset`` is the position of its first byte in ``file``, None where a format does not give it simply.
    ``shares`` names the tensor whose bytes this one is too (tied weights in a .bin): its ``size_bytes`` is then 0,
    so that the sizes add up to what lies on disk.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int
    file: str
    offset: int | None
    shares: str = ""

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)


@contextmanager
def open_weights(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """The file at ``path``, open for reading, and its size in bytes; it is a regular file and not empty.

    Raises:
        ContentError: no such file, not a regular file, or empty.
        DiskError: the operating system refuses to open or to read it.
    """
    with _open_binary(path) as stream:
        try:
            status = os.fstat(stream.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ContentError(f"is {_name_kind(status.st_mode)}, not a file of weights", where=str(path))
            if not status.st_size:
                raise ContentError("the file is empty", where=str(path), hint=COPY_AGAIN)
            yield stream, status.st_size
        except OSError as error:
            raise explain_read_error(error, path) from error


def explain_read_error(error: OSError, path: Path) -> ContentError | DiskError:
    """The error that says why ``path`` could not be read."""
    reason = (error.strerror or str(error)).lower()
    if error.errno == errno.EISDIR:
        return ContentError("is a folder, not a file of weights", where=str(path))
    if error.errno in (errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP, errno.ENXIO):
        return ContentError(f"cannot be read: {reason}", where=str(path))
    return DiskError(f"cannot be read: {reason}", where=str(path), hint="check who may read it, and the disk")


def explain_foreign(head: bytes, where: str, expected: str) -> ContentError | None:
    """The error for a file whose first bytes ``head`` say that it is something well known but not ``expected``."""
    for magic, (what, hint) in _FOREIGN.items():
        if head.startswith(magic):
            return ContentError(f"is {what}; {expected} was expected", where=where, hint=hint)
    return None


def check_name(name: str) -> None:
    """Nothing; ``name`` can be printed and written.

    Raises:
        UnicodeEncodeError: it holds half a surrogate pair.
    """
    if not name.isascii():
        name.encode()


def _open_binary(path: Path) -> BinaryIO:
    # without O_NONBLOCK a pipe of that name would be waited for
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        if path.is_dir():  # open() itself would refuse the descriptor of a folder
            raise IsADirectoryError(errno.EISDIR, "")
        return open(os.open(path, flags), "rb")
    except FileNotFoundError as error:
        raise ContentError("no such file", where=str(path)) from error
    except ValueError as error:  # a NUL in the name
        raise ContentError(f"cannot be the name of a file: {error}", where=str(path)) from error
    except OSError as error:
        raise explain_read_error(error, path) from error


def _name_kind(mode: int) -> str:
    if stat.S_ISFIFO(mode):
        return "a pipe"
    return "a socket" if stat.S_ISSOCK(mode) else "a device"
