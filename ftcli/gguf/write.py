"""A GGUF file written in one pass: header, keys and tensor table first, then the data, a block of rows at a time.

    magic "GGUF" │ version u32 │ tensors u64 │ keys u64 │ key-value pairs │ tensor infos │ padding │ data

Nothing is held but the blocks in hand. Source: ggml/docs/gguf.md in ggml-org/ggml.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ftcli.errors import ContentError
from ftcli.gguf.ahead import run_ahead
from ftcli.gguf.encode import encode_block
from ftcli.store.file import check_free, replaced_file
from ftcli.store.gguf_header import GGML_TYPES

_VERSION, _ALIGNMENT = 3, 32
_TYPE_IDS = {name: number for number, (name, _, _) in GGML_TYPES.items()}
_U32, _I32, _F32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9


class Int32(int):
    """A number that llama.cpp reads as a signed one."""


@dataclass(frozen=True)
class Raw:
    """A value as another file holds it: its type, and what follows that."""

    data: bytes


Value = bool | int | float | str | bytes | Raw | Sequence[int] | Sequence[float] | Sequence[str]


@dataclass(frozen=True)
class OutputTensor:
    """A tensor of the file: ``shape`` outermost first, ``dtype`` by GGUF's name.

    ``make_blocks`` gives its rows in order, in any floating type.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    make_blocks: Callable[[], Iterator[torch.Tensor]]

    @property
    def size_bytes(self) -> int:
        _, block, block_bytes = GGML_TYPES[_TYPE_IDS[self.dtype]]
        return math.prod(self.shape) // block * block_bytes


def write_gguf(
    path: Path,
    keys: Mapping[str, Value],
    tensors: Sequence[OutputTensor],
    *,
    n_threads: int = 1,
    on_bytes: Callable[[int], None] = lambda n: None,
) -> int:
    """The size in bytes of the GGUF file that now lies at ``path``, which held what it held until it was complete.

    Args:
        path: its name in the end.
        keys: the metadata in order.
        tensors: what it holds, in order.
        n_threads: how many blocks are encoded at a time; the file is the same.
        on_bytes: told of the data written.

    Raises:
        ContentError: the weights hold NaN or infinity, or are not as many as their shape says.
        NumericError: a weight is too large for its type.
        DiskError: the disk is full or may not be written.
    """
    head = _build_head(keys, tensors)
    size = len(head) + sum(_pad(tensor.size_bytes) for tensor in tensors)
    check_free(path, size)
    with replaced_file(path, size) as stream:
        stream.write(head)
        _write_data(stream, tensors, n_threads, on_bytes)
    return size


def _write_data(
    stream: BinaryIO, tensors: Sequence[OutputTensor], n_threads: int, on_bytes: Callable[[int], None]
) -> None:
    with closing(run_ahead(_list_tasks(tensors), n_threads)) as pieces:
        for tensor in tensors:
            n_written = 0
            for piece in takewhile(len, pieces):
                data: Any = piece.numpy()
                n_written += stream.write(data)
                on_bytes(data.nbytes)
            if n_written != tensor.size_bytes:
                raise ContentError(f"{tensor.name}: {n_written} bytes came, and it takes {tensor.size_bytes}")
            stream.write(bytes(_pad(n_written) - n_written))


def _list_tasks(tensors: Sequence[OutputTensor]) -> Iterator[Callable[[], torch.Tensor]]:
    """What encodes each block, and behind the blocks of each tensor one that gives no bytes."""
    for tensor in tensors:
        for block in tensor.make_blocks():
            yield partial(encode_block, block, tensor.dtype, tensor.name)
        yield lambda: torch.empty(0, dtype=torch.uint8)


def _build_head(keys: Mapping[str, Value], tensors: Sequence[OutputTensor]) -> bytes:
    parts = [struct.pack("<4sIQQ", b"GGUF", _VERSION, len(tensors), len(keys))]
    for key, value in keys.items():
        try:
            parts += [_pack_text(key), *_pack_value(value)]
        except (struct.error, OverflowError) as error:
            raise ContentError(f"{key} cannot be {str(value)[:40]} in a GGUF file", why=str(error)) from error
    offset = 0
    for tensor in tensors:
        shape = tensor.shape[::-1]  # innermost first
        parts.append(_pack_text(tensor.name))
        parts.append(struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, _TYPE_IDS[tensor.dtype], offset))
        offset += _pad(tensor.size_bytes)
    head = b"".join(parts)
    return head + bytes(_pad(len(head)) - len(head))


def _pack_value(value: Value) -> list[bytes]:
    """Type and bytes of a value; Python's own types say which one it is."""
    if isinstance(value, Raw):
        return [value.data]
    if isinstance(value, str | bytes):
        return [struct.pack("<I", _STRING), _pack_text(value)]
    if isinstance(value, Sequence):
        return [struct.pack("<I", _ARRAY), *_pack_list(value)]
    if isinstance(value, bool):
        return [struct.pack("<I?", _BOOL, value)]
    if isinstance(value, float):
        return [struct.pack("<If", _F32, value)]
    return [struct.pack("<Ii", _I32, value) if isinstance(value, Int32) else struct.pack("<II", _U32, value)]


def _pack_list(values: Sequence[Any]) -> list[bytes]:
    if isinstance(values[0], str | bytes):
        return [struct.pack("<IQ", _STRING, len(values)), *map(_pack_text, values)]
    code, type_id = ("f", _F32) if isinstance(values[0], float) else ("i", _I32)
    return [struct.pack(f"<IQ{len(values)}{code}", type_id, len(values), *values)]


def _pack_text(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def _pad(n_bytes: int) -> int:
    return -(-n_bytes // _ALIGNMENT) * _ALIGNMENT
