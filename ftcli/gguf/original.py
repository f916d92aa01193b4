"""A GGUF file in 16 or 32 bits from which smaller ones are made, as llama-quantize makes them.

header ─▶ keys as they are (type and bytes) ─┐
data ───▶ rows, read by offset ──────────────┴─▶ Draft
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from ftcli.errors import ContentError
from ftcli.gguf.draft import Draft, DraftTensor
from ftcli.gguf.write import Raw
from ftcli.merge.stream import cut_rows
from ftcli.model.precision import Ratios, shares_values
from ftcli.model.stored import read_rows
from ftcli.store.gguf_header import GgufHeader, check_gguf_data
from ftcli.store.tensor import TensorEntry, open_weights
from ftcli.store.vocabulary import read_gguf_vocabulary

_PLAIN_TYPES = ("F32", "F16", "BF16")
_ARCHITECTURES = ("llama", "qwen2", "qwen3", "phi3", "gemma2", "gemma3")  # whose mixtures are known here
_PARTS = "split."  # keys of a file that is one of several


def draft_gguf(path: Path) -> Draft:
    """The file of another kind that is made of the one at ``path``, whose weights have 16 or 32 bits.

    Raises:
        ContentError: it is damaged, one of several parts, of an unknown family, or its weights are rounded already.
    """
    header = read_gguf_vocabulary(path)  # all of it, so that damage is told before anything is written
    check_gguf_data(header, path.stat().st_size, str(path))
    _check(header, str(path))
    keys = {key: value for key, value in _read_keys(path, header).items() if not key.startswith(_PARTS)}
    tensors = []
    for info in header.tensors:
        offset = header.data_offset + info.offset
        entry = TensorEntry(info.name, info.dtype, info.shape, info.size_bytes, path.name, offset)
        stays = len(info.shape) < 2 or "_norm.weight" in info.name or not info.name.endswith("weight")
        tensors.append(
            DraftTensor(info.name, info.shape, partial(_read_blocks, path.parent, entry), info.dtype if stays else "")
        )
    return Draft(header.architecture, keys, tuple(tensors), _read_ratios(header, str(path)), is_requantized=True)


def _check(header: GgufHeader, where: str) -> None:
    """None if smaller files can be made of this one."""
    if header.metadata.get("general.type") == "adapter":
        raise ContentError("is an adapter, and no model", where=where, hint="export the run or adapter it is made from")
    if header.architecture not in _ARCHITECTURES:
        raise ContentError(
            f"ftcli does not know which types llama.cpp gives the family {header.architecture or 'unknown'!a}",
            where=where,
            why=f"known are {', '.join(_ARCHITECTURES)}",
            hint="use llama.cpp's llama-quantize",
        )
    if header.metadata.get(f"{header.architecture}.expert_count"):
        raise ContentError("is a mixture of experts", where=where, hint="use llama.cpp's llama-quantize")
    if header.metadata.get(f"{_PARTS}count", 1) != 1:
        raise ContentError(
            "is one of several parts of a model", where=where, hint="join them first: llama-gguf-split --merge"
        )
    if header.alignment != 32:
        raise ContentError(f"its data are aligned to {header.alignment} bytes, and ftcli writes 32", where=where)
    if packed := [tensor for tensor in header.tensors if tensor.dtype not in _PLAIN_TYPES]:
        raise ContentError(
            f"its weights are rounded already: {packed[0].name[:80]} is {packed[0].dtype}",
            where=where,
            why="what is rounded twice is worse than what it was rounded from, rounded once",
            hint="export the model that it was made from, or its GGUF file in 16 bits",
        )


def _read_keys(path: Path, header: GgufHeader) -> dict[str, Raw]:
    with open_weights(path) as (stream, _):
        keys = {}
        for key, (begin, end) in header.spans.items():
            stream.seek(begin)
            keys[key] = Raw(stream.read(end - begin))
    return keys


def _read_ratios(header: GgufHeader, where: str) -> Ratios:
    def read_number(key: str, default: int | None = None) -> int:
        value = header.metadata.get(f"{header.architecture}.{key}", default)
        if type(value) is not int or value < 1:
            raise ContentError(f"the GGUF header is damaged: {key} is {str(value)[:40]}", where=where)
        return value

    n_layers, n_heads = read_number("block_count"), read_number("attention.head_count")
    queries_per_kv = n_heads // read_number("attention.head_count_kv", n_heads)
    return Ratios(
        n_layers=n_layers,
        queries_per_kv=queries_per_kv,
        n_experts=0,
        is_tied=all(tensor.name != "output.weight" for tensor in header.tensors),
        shares_values=shares_values(header.architecture, n_layers, queries_per_kv),
    )


def _read_blocks(folder: Path, entry: TensorEntry) -> Iterator[torch.Tensor]:
    for start, stop in cut_rows(entry.shape):
        yield read_rows(folder, entry, start, stop)
