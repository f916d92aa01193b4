"""The header of a safetensors file: its tensors and metadata, without reading a weight.

    length u64 │ JSON {"name": {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {}} │ data

What the official library refuses is refused here too, and besides: a key that stands twice, more than 64
dimensions, an entry written as an array. Source: safetensors/src/tensor.rs in huggingface/safetensors.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from ftcli.errors import ContentError
from ftcli.store.tensor import COPY_AGAIN, TensorEntry, check_name, explain_foreign, open_weights

MOST_HEADER_BYTES = 100_000_000  # the format's own limit
LENGTH_BYTES = 8
_MOST_DIMENSIONS = 64  # torch's own limit
# dtype → bits of one element
DTYPE_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


def read_safetensors_header(path: Path) -> tuple[list[TensorEntry], dict[str, str]]:
    """The tensors of the safetensors file at ``path`` in the order of their bytes, and its metadata.

    Cost: the header's bytes, whatever the file's size.

    Raises:
        ContentError: the file is damaged, cut off, or something else.
        DiskError: it cannot be read.
    """
    with open_weights(path) as (stream, size_bytes):
        header_bytes = measure_header(stream.read(32), size_bytes, str(path))
        stream.seek(LENGTH_BYTES)
        return parse_header(stream.read(header_bytes), size_bytes, file=path.name, where=str(path))


def measure_header(head: bytes, size_bytes: int, where: str) -> int:
    """The length in bytes of the JSON that follows the first eight bytes of ``head``.

    Raises:
        ContentError: the length cannot be, in a file of ``size_bytes``.
    """
    if foreign := explain_foreign(head, where, "a safetensors file"):
        raise foreign
    if len(head) < LENGTH_BYTES:
        raise ContentError(f"cut off after {len(head)} bytes, before its header", where=where, hint=COPY_AGAIN)
    header_bytes = int(struct.unpack_from("<Q", head)[0])
    if header_bytes > MOST_HEADER_BYTES:
        raise ContentError(
            "not a safetensors file, or damaged",
            where=where,
            why=f"its first 8 bytes give a header of {header_bytes} bytes; the format allows {MOST_HEADER_BYTES}",
            hint=COPY_AGAIN,
        )
    if header_bytes > size_bytes - LENGTH_BYTES:
        raise ContentError(
            f"cut off in its header: {LENGTH_BYTES + header_bytes - size_bytes} bytes of it are missing",
            where=where,
            hint=COPY_AGAIN,
        )
    return header_bytes


def parse_header(header: bytes, size_bytes: int, *, file: str, where: str) -> tuple[list[TensorEntry], dict[str, str]]:
    """The tensors and metadata that the JSON ``header`` of a file of ``size_bytes`` describes.

    Raises:
        ContentError: it is not what the format demands, or the file is too short or too long for it.
    """
    try:
        value = json.loads(
            header.decode("utf-8"), object_pairs_hook=_build_object, parse_int=_parse_int, parse_constant=_refuse
        )
        if type(value) is not dict:
            raise ValueError("it is no JSON object")
        metadata = _read_metadata(value.pop("__metadata__", None))
        data_start = LENGTH_BYTES + len(header)
        tensors = [_read_entry(name, entry, file, data_start) for name, entry in value.items()]
        tensors.sort(key=lambda tensor: (tensor.offset, tensor.size_bytes))
        data_end = _check_cover(tensors, data_start)
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ContentError("the safetensors header is damaged", where=where, why=why, hint=COPY_AGAIN) from error
    if data_end > size_bytes:
        raise ContentError(
            f"cut off: {data_end - size_bytes} of {data_end} bytes are missing",
            where=where,
            why="the header is whole, but the file ends before the last tensor does",
            hint=COPY_AGAIN,
        )
    if data_end < size_bytes:
        raise ContentError(
            f"damaged: {size_bytes - data_end} bytes follow the last tensor", where=where, hint=COPY_AGAIN
        )
    return tensors, metadata


def _build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {_quote(twice)} stands twice")
    return value


def _parse_int(text: str) -> int:
    return -1 if text[0] == "-" else int(text)  # -0 is no size either; int() refuses over 4,300 digits


def _refuse(text: str) -> Any:
    raise ValueError(f"{text} is no JSON")


def _quote(text: str) -> str:
    return ascii(text if len(text) <= 80 else f"{text[:77]}...")


def _read_metadata(value: Any) -> dict[str, str]:
    if value is None:
        return {}
    if type(value) is not dict or any(type(item) is not str for item in value.values()):
        raise ValueError("__metadata__ is no object of strings")
    for key, item in value.items():
        check_name(key)
        check_name(item)
    return value


def _read_entry(name: str, entry: Any, file: str, data_start: int) -> TensorEntry:
    check_name(name)
    if type(entry) is not dict:
        raise ValueError(f"the entry of {_quote(name)} is no object")
    dtype: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    if type(dtype) is not str or dtype not in DTYPE_BITS:
        raise ValueError(f"{_quote(name)} has no known dtype{f': {_quote(dtype)}' if type(dtype) is str else ''}")
    if not _is_sizes(shape) or len(shape) > _MOST_DIMENSIONS:
        raise ValueError(f"the shape of {_quote(name)} is no list of up to {_MOST_DIMENSIONS} sizes")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"the data_offsets of {_quote(name)} are no pair of begin and end")
    n_bits = DTYPE_BITS[dtype]
    n_elements = 1
    for length in shape:
        n_elements *= length
        if n_elements * n_bits >= 1 << 64:  # also before a later 0, as the library counts
            raise ValueError(f"the shape of {_quote(name)} has more elements than any file")
    size_bytes = offsets[1] - offsets[0]
    if n_elements * n_bits != size_bytes * 8:
        raise ValueError(
            f"{_quote(name)} has {n_elements} elements of {n_bits} bits, but its data_offsets span {size_bytes} bytes"
        )
    return TensorEntry(name, dtype, tuple(shape), size_bytes, file, data_start + offsets[0])


def _is_sizes(value: Any) -> bool:
    return type(value) is list and all(type(item) is int and 0 <= item < 1 << 64 for item in value)


def _check_cover(tensors: list[TensorEntry], data_start: int) -> int:
    """The position at which the last tensor ends; ``tensors``, sorted by offset, leave no hole before it."""
    end = data_start
    for tensor in tensors:
        begin = tensor.offset or 0
        if begin != end:
            raise ValueError(f"{_quote(tensor.name)} {'overlaps' if begin < end else 'leaves a hole after'} another")
        end += tensor.size_bytes
    return end
