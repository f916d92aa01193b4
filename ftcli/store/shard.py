"""Safetensors files written piece by piece: nothing is held but the piece in hand, whatever a model's size.

    tensors ─▶ shards of up to 5 GB ─▶ model-00001-of-00003.safetensors …  model.safetensors.index.json

Within a file wider elements come first, as the official library orders them, so that each tensor lies aligned.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftcli.store.file import write_json
from ftcli.store.safetensors_header import DTYPE_BITS

MOST_SHARD_BYTES = 5_000_000_000
MOST_HELD_BYTES = 2_000_000_000  # of tensors that are written together
_ALIGNMENT = 8
_HEADER_ALLOWANCE_BYTES = 1 << 20  # headers and index, for the forecast of the disk

Pieces = Iterable[Any]  # objects with the buffer protocol


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor that is going to be written: ``dtype`` is safetensors' name for it, ``shape`` as in torch."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        n_bits = DTYPE_BITS[self.dtype]
        for length in self.shape:
            n_bits *= length
        return n_bits // 8


def plan_shards(
    tensors: Sequence[PlannedTensor], most_bytes: int = MOST_SHARD_BYTES
) -> dict[str, tuple[PlannedTensor, ...]]:
    """File name → its tensors, in their order on disk; a tensor larger than ``most_bytes`` has a file of its own."""
    groups: list[list[PlannedTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.size_bytes > most_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.size_bytes
    ordered = [tuple(sorted(group, key=lambda tensor: -DTYPE_BITS[tensor.dtype])) for group in groups]
    return dict(zip(_name_shards(len(ordered)), ordered, strict=True))


def measure_shards(tensors: Sequence[PlannedTensor]) -> int:
    """Bytes that `write_shards` needs on the disk, at most."""
    return sum(tensor.size_bytes for tensor in tensors) + _HEADER_ALLOWANCE_BYTES


def write_shards(
    folder: Path, shards: dict[str, tuple[PlannedTensor, ...]], make_pieces: Callable[[PlannedTensor], Pieces]
) -> None:
    """Nothing; the files of ``shards`` lie in ``folder``, and their index where there are several.

    Args:
        folder: it is there.
        shards: as `plan_shards` gives them.
        make_pieces: a tensor → its bytes in order, in pieces that are written and let go one by one.

    Raises:
        OSError: of the disk.
        ValueError: a tensor's pieces are not as long together as it is.
    """
    for name, tensors in shards.items():
        with (folder / name).open("wb") as stream:
            stream.write(_build_header(tensors))
            for tensor in tensors:
                n_written = 0
                for piece in make_pieces(tensor):
                    n_written += stream.write(piece)
                if n_written != tensor.size_bytes:
                    raise ValueError(f"{tensor.name}: {n_written} bytes came, and it takes {tensor.size_bytes}")
    _write_index(folder, shards)


def save_tensors(
    folder: Path, tensors: Iterable[tuple[PlannedTensor, Any]], most_bytes: int = MOST_HELD_BYTES
) -> tuple[PlannedTensor, ...]:
    """The tensors that came, each with its bytes, and lie in files of ``folder`` now, with their index.

    For those whose sizes are known only when they are made: up to ``most_bytes`` of them are held.

    Raises:
        OSError: of the disk.
        ValueError: a tensor's bytes are not as many as it takes.
    """
    groups: list[tuple[PlannedTensor, ...]] = []
    held: dict[PlannedTensor, Any] = {}

    def flush() -> None:
        groups.append(tuple(sorted(held, key=lambda tensor: -DTYPE_BITS[tensor.dtype])))
        write_shards(folder, {f"{len(groups)}.part": groups[-1]}, lambda tensor: [held.pop(tensor)])

    for tensor, data in tensors:
        if held and sum(known.size_bytes for known in held) + tensor.size_bytes > most_bytes:
            flush()
        held[tensor] = data
    flush()
    names = _name_shards(len(groups))
    for number, name in enumerate(names, 1):
        (folder / f"{number}.part").rename(folder / name)
    _write_index(folder, dict(zip(names, groups, strict=True)))
    return tuple(tensor for group in groups for tensor in group)


def _name_shards(n: int) -> list[str]:
    return ["model.safetensors"] if n == 1 else [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]


def _write_index(folder: Path, shards: dict[str, tuple[PlannedTensor, ...]]) -> None:
    if len(shards) > 1:
        total = sum(tensor.size_bytes for tensors in shards.values() for tensor in tensors)
        weight_map = {tensor.name: name for name, tensors in shards.items() for tensor in tensors}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / "model.safetensors.index.json", index)


def _build_header(tensors: Sequence[PlannedTensor]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.size_bytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text
