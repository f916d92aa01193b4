"""The header of a GGUF file: its metadata and tensor table, without reading a weight.

    magic "GGUF" │ version u32 │ tensors u64 │ keys u64 │ key-value pairs │ tensor infos │ padding │ data

Arrays of over ``keep`` entries (the vocabulary) are skipped and given as their length, which is what makes
this fast. Source: ggml/docs/gguf.md in ggml-org/ggml.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from ftcli.errors import ContentError
from ftcli.store.tensor import COPY_AGAIN, explain_foreign, open_weights

# type id → struct format of one value; 8 is a string, 9 an array
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# No real file comes near any of these; damaged counts would otherwise loop for hours or fill the memory.
_MOST_KEYS, _MOST_TENSORS, _MOST_STRINGS = 1 << 16, 1 << 20, 1 << 22
_MOST_KEPT_BYTES, _MOST_LEVELS = 1 << 26, 4
_BLOCK_BYTES = 1 << 18
_MOST_DIMENSIONS = 4  # GGML_MAX_DIMS in ggml.h
_ALIGNMENT = 32  # GGUF_DEFAULT_ALIGNMENT in gguf.h
_U64 = struct.Struct("<Q")
# type id → name, elements per block, bytes per block: enum ggml_type in ggml.h, block_* in ggml-common.h
GGML_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}
# Types that ggml knew once and has removed: such files must be made anew.
_REMOVED_TYPES = {4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8"} | {
    36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One row of the tensor table: ``shape`` is outermost first, as in torch.

    ``offset`` counts from where the file's data begin.
    """

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int = 0

    @property
    def dtype(self) -> str:
        """GGUF's name of the type, for example ``Q4_K``."""
        known = GGML_TYPES.get(self.type_id)
        return known[0] if known else _REMOVED_TYPES.get(self.type_id, f"type {self.type_id}")

    @property
    def size_bytes(self) -> int:
        """The bytes of its data; 0 for a type that is not known."""
        _, block, block_bytes = GGML_TYPES.get(self.type_id, ("", 1, 0))
        return math.prod(self.shape) // block * block_bytes


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says of itself; a skipped array stands as its length.

    ``data_offset`` is the position at which the data of the tensors begin; ``spans`` are those between which the type
    and value of each key lie.
    """

    metadata: dict[str, Any]
    tensors: tuple[TensorInfo, ...]
    data_offset: int = 0
    alignment: int = _ALIGNMENT
    spans: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))


class _Damaged(ValueError):
    pass


def read_gguf_header(path: Path, *, keep: int = 64, skip: tuple[str, ...] = ()) -> GgufHeader:
    """The metadata and tensor table of the GGUF file at ``path``.

    A list of over ``keep`` values, or one that is named in ``skip``, stands there as its length.

    Whether the data that the table promises are there is `check_gguf_data`'s to say.

    Raises:
        ContentError: the file is no GGUF file, is cut off in its header, or holds counts that cannot be.
        DiskError: it cannot be read.
    """
    with open_weights(path) as (stream, size_bytes):
        reader = _Reader(stream, size_bytes)
        try:
            _check_version(reader, str(path))
            n_tensors, n_keys = reader.count(_MOST_TENSORS), reader.count(_MOST_KEYS)
            metadata, spans = _read_metadata(reader, n_keys, keep, skip)
            tensors = _read_tensors(reader, n_tensors)
            alignment = metadata.get("general.alignment", _ALIGNMENT)
            if type(alignment) is not int or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
                raise _Damaged(f"an alignment of {str(alignment)[:40]} cannot be")
        except (_Damaged, UnicodeDecodeError) as error:
            raise ContentError(
                "the GGUF header is damaged or cut off",
                where=str(path),
                why=f"{error}, before byte {reader.position}",
                hint=COPY_AGAIN,
            ) from error
        return GgufHeader(metadata, tensors, -(-reader.position // alignment) * alignment, alignment, spans)


def check_gguf_data(header: GgufHeader, size_bytes: int, where: str) -> None:
    """Nothing; the data of every tensor of ``header`` lie within a file of ``size_bytes``, none in another's.

    Raises:
        ContentError: an unknown type, an impossible shape or offset, or a file that is cut off.
    """
    end_bytes = header.data_offset
    problem = ""
    for tensor in sorted(header.tensors, key=lambda tensor: tensor.offset):
        begin = header.data_offset + tensor.offset
        if tensor.type_id in _REMOVED_TYPES:
            raise ContentError(
                f"the type {tensor.dtype} is no longer part of GGUF", where=where, hint="quantize the original anew"
            )
        if tensor.type_id not in GGML_TYPES:
            problem = f"its {tensor.dtype} is not known"
        elif (tensor.shape[-1] if tensor.shape else 1) % GGML_TYPES[tensor.type_id][1]:
            problem = f"its rows of {tensor.shape[-1] if tensor.shape else 1} are no whole blocks of {tensor.dtype}"
        elif tensor.offset % header.alignment:
            problem = f"its offset {tensor.offset} is no multiple of {header.alignment}"
        elif begin < end_bytes:
            problem = "its data overlap another's"
        if problem:
            raise ContentError(f"the tensor {tensor.name[:80]!a} is damaged", where=where, why=problem, hint=COPY_AGAIN)
        end_bytes = max(end_bytes, begin + tensor.size_bytes)
    if end_bytes > size_bytes:
        raise ContentError(
            f"cut off: {end_bytes - size_bytes} of {end_bytes} bytes are missing",
            where=where,
            why="the header is whole, but the file ends before the last tensor does",
            hint=COPY_AGAIN,
        )


def _check_version(reader: _Reader, where: str) -> None:
    head = reader.take(min(32, reader.size_bytes))
    if head[:4] != b"GGUF":
        foreign = explain_foreign(head, where, "a GGUF file")
        raise foreign or ContentError("not a GGUF file: it does not begin with GGUF", where=where)
    reader.at = 4
    version = reader.scalar("I")
    if version & 0xFFFF == 0 and version:  # 3 with its bytes turned round
        raise ContentError(
            "a big-endian GGUF file is not supported", where=where, hint="convert the original model again here"
        )
    if version not in (2, 3):
        raise ContentError(
            f"GGUF version {version} is not supported (2 and 3 are)",
            where=where,
            hint="convert the original model again" if version == 1 else "",
        )


def _read_metadata(
    reader: _Reader, n_keys: int, keep: int, skip: tuple[str, ...]
) -> tuple[dict[str, Any], dict[str, tuple[int, int]]]:
    metadata: dict[str, Any] = {}
    spans: dict[str, tuple[int, int]] = {}
    for _ in range(n_keys):
        key = reader.string()
        if key in metadata:
            raise _Damaged(f"the key {key[:80]!a} stands twice")
        begin = reader.position
        metadata[key] = reader.value(reader.scalar("I"), -1 if key in skip else keep)
        spans[key] = begin, reader.position
    return metadata, spans


def _read_tensors(reader: _Reader, n_tensors: int) -> tuple[TensorInfo, ...]:
    tensors: dict[str, TensorInfo] = {}
    for _ in range(n_tensors):
        name = reader.string()
        if name in tensors:
            raise _Damaged(f"the tensor {name[:80]!a} stands twice")
        n_dimensions = reader.scalar("I")
        if n_dimensions > _MOST_DIMENSIONS:
            raise _Damaged(f"a tensor of {n_dimensions} dimensions cannot be")
        *shape, type_id, offset = reader.scalars(f"{n_dimensions}QIQ")
        if math.prod(shape) >= 1 << 63 or offset >= 1 << 63:
            raise _Damaged(f"the tensor {name[:80]!a} is larger than any file")
        tensors[name] = TensorInfo(name, tuple(reversed(shape)), type_id, offset)
    return tuple(tensors.values())


class _Reader:
    """Little-endian values from a stream, none of which may reach past its end.

    ``block`` is what was read last, beginning at position ``start`` of the file; ``at`` is the place within it.
    """

    def __init__(self, stream: BinaryIO, size_bytes: int) -> None:
        self.stream = stream
        self.size_bytes = size_bytes
        self.block = b""
        self.start = self.at = 0
        self.kept_bytes = self.n_strings = 0

    @property
    def position(self) -> int:
        return self.start + self.at

    def load(self, n_bytes: int) -> None:
        """Nothing; the next ``n_bytes`` stand in ``block`` from ``at`` on."""
        position = self.position
        if n_bytes > self.size_bytes - position:
            raise _Damaged("the file ends within a value")
        self.stream.seek(position)
        self.block = self.stream.read(max(n_bytes, _BLOCK_BYTES))
        self.start, self.at = position, 0
        if len(self.block) < n_bytes:
            raise _Damaged("the file grew shorter while it was read")

    def take(self, n_bytes: int) -> bytes:
        if n_bytes > _BLOCK_BYTES:
            self.spend(n_bytes)
        end = self.at + n_bytes
        if end > len(self.block):
            self.load(n_bytes)
            end = n_bytes
        taken = self.block[self.at : end]
        self.at = end
        return taken

    def skip(self, n_bytes: int) -> None:
        if n_bytes > self.size_bytes - self.position:
            raise _Damaged("the file ends within a value")
        self.at += n_bytes

    def spend(self, n_bytes: int) -> None:
        self.kept_bytes += n_bytes
        if self.kept_bytes > _MOST_KEPT_BYTES:
            raise _Damaged(f"its texts and lists are longer than {_MOST_KEPT_BYTES >> 20} MiB")

    def scalars(self, code: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))

    def scalar(self, code: str) -> Any:
        return self.scalars(code)[0]

    def count(self, most: int) -> int:
        value = int(self.scalar("Q"))
        if value > most:
            raise _Damaged(f"a count of {value} cannot be")
        return value

    def string(self) -> str:
        n_bytes = self.scalar("Q")
        self.spend(n_bytes)
        return self.take(n_bytes).decode("utf-8")

    def value(self, type_id: int, keep: int, level: int = 0) -> Any:
        if type_id == _STRING:
            return self.string()
        if type_id == _ARRAY:
            return self.array(keep, level + 1)
        if type_id not in _SCALARS:
            raise _Damaged(f"a value of type {type_id} cannot be")
        return self.scalar(_SCALARS[type_id])

    def array(self, keep: int, level: int) -> Any:
        type_id, length = self.scalar("I"), self.count(self.size_bytes)
        if level > _MOST_LEVELS:
            raise _Damaged(f"lists in lists deeper than {_MOST_LEVELS}")
        if length <= keep:
            self.spend(32 * length)  # about what a Python number takes
        if type_id in (_STRING, _ARRAY):
            self.n_strings += length
            if self.n_strings > _MOST_STRINGS:
                raise _Damaged(f"over {_MOST_STRINGS} texts in lists")
            if length <= keep and type_id == _STRING:
                return self.strings(length)
            if length <= keep:
                return [self.array(keep, level + 1) for _ in range(length)]
            if type_id == _STRING:
                self.skip_strings(length)
            else:
                for _ in range(length):
                    self.array(0, level + 1)
            return length
        if type_id not in _SCALARS:
            raise _Damaged(f"a list of type {type_id} cannot be")
        if length > keep:
            self.skip(length * struct.calcsize(f"<{_SCALARS[type_id]}"))
            return length
        return list(self.scalars(f"{length}{_SCALARS[type_id]}"))

    def strings(self, length: int) -> list[str]:
        """As many calls of ``string``, without the calls: vocabularies hold hundreds of thousands."""
        texts, unpack, block, at = [], _U64.unpack_from, self.block, self.at
        for _ in range(length):
            if at + 8 > len(block):
                self.at = at
                self.load(8)
                block, at = self.block, 0
            n_bytes, begin = unpack(block, at)[0], at + 8
            self.spend(n_bytes)
            if begin + n_bytes > len(block):
                self.at = begin
                self.load(n_bytes)
                block, begin = self.block, 0
            at = begin + n_bytes
            texts.append(block[begin:at].decode("utf-8"))
        self.at = at
        return texts

    def skip_strings(self, length: int) -> None:
        unpack, block, at = _U64.unpack_from, self.block, self.at
        limit = len(block) - 8
        for _ in range(length):
            if at > limit:
                self.at = at
                self.load(8)
                block, at = self.block, 0
                limit = len(block) - 8
            at += 8 + unpack(block, at)[0]
        self.at = at
        self.skip(0)  # the last one may reach past the end
