"""The header of a GGUF file: its metadata and tensor table, without reading a weight.

    magic "GGUF" │ version u32 │ tensors u64 │ keys u64 │ key-value pairs │ tensor infos │ padding │ data

Arrays of over ``keep`` entries (the vocabulary) are skipped and given as their length, which is what makes
this fast. Source: ggml/docs/gguf.md in ggml-org/ggml.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ftcli.errors import ContentError

# type id → struct format of one value; 8 is a string, 9 an array
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_ENTRIES = 1 << 27  # no real file comes near; a damaged count would otherwise loop for hours


@dataclass(frozen=True)
class TensorInfo:
    """One row of the tensor table: ``shape`` is outermost first, as in torch."""

    name: str
    shape: tuple[int, ...]
    type_id: int


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says of itself; a skipped array stands as its length."""

    metadata: dict[str, Any]
    tensors: tuple[TensorInfo, ...]

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))


def read_gguf_header(path: Path, *, keep: int = 64) -> GgufHeader:
    """The metadata and tensor table of the GGUF file at ``path``.

    Raises:
        ContentError: the file is no GGUF file, is cut off, or holds counts that cannot be.
    """
    size_bytes = path.stat().st_size
    with path.open("rb") as stream:
        try:
            if stream.read(4) != b"GGUF":
                raise ContentError("not a GGUF file: it does not begin with GGUF", where=str(path))
            reader = _Reader(stream, size_bytes)
            version = reader.scalar("I")
            if version not in (2, 3):
                raise ContentError(f"GGUF version {version} is not supported (2 and 3 are)", where=str(path))
            n_tensors, n_keys = reader.count(), reader.count()
            metadata = {reader.string(): reader.value(reader.scalar("I"), keep) for _ in range(n_keys)}
            return GgufHeader(metadata, tuple(reader.tensor() for _ in range(n_tensors)))
        except (struct.error, EOFError, UnicodeDecodeError, KeyError, OverflowError) as error:
            raise ContentError(
                "the GGUF header is damaged or cut off",
                where=str(path),
                hint="download or copy the file again",
            ) from error


class _Reader:
    """Little-endian values from a stream, none of which may reach past its end."""

    def __init__(self, stream: BinaryIO, size_bytes: int) -> None:
        self.stream = stream
        self.size_bytes = size_bytes

    def take(self, n_bytes: int) -> bytes:
        if n_bytes > self.size_bytes - self.stream.tell():
            raise EOFError
        return self.stream.read(n_bytes)

    def skip(self, n_bytes: int) -> None:
        if n_bytes > self.size_bytes - self.stream.tell():
            raise EOFError
        self.stream.seek(n_bytes, 1)

    def scalar(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def count(self) -> int:
        value = int(self.scalar("Q"))
        if value > _MOST_ENTRIES:
            raise EOFError
        return value

    def string(self) -> str:
        return self.take(self.scalar("Q")).decode("utf-8")

    def value(self, type_id: int, keep: int) -> Any:
        if type_id == _STRING:
            return self.string()
        if type_id == _ARRAY:
            return self.array(keep)
        return self.scalar(_SCALARS[type_id])

    def array(self, keep: int) -> Any:
        type_id, length = self.scalar("I"), self.count()
        if length <= keep:
            return [self.value(type_id, keep) for _ in range(length)]
        if type_id in (_STRING, _ARRAY):
            for _ in range(length):
                if type_id == _ARRAY:
                    self.array(0)
                else:
                    self.skip(self.scalar("Q"))
        else:
            self.skip(length * struct.calcsize(f"<{_SCALARS[type_id]}"))
        return length

    def tensor(self) -> TensorInfo:
        name = self.string()
        n_dimensions = self.scalar("I")
        if n_dimensions > 8:
            raise EOFError
        shape = tuple(self.scalar("Q") for _ in range(n_dimensions))
        type_id = self.scalar("I")
        self.skip(8)  # the offset of its data
        return TensorInfo(name, shape[::-1], type_id)
