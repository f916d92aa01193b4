"""SentencePiece's ``tokenizer.model``: the pieces with their scores, without the library.

A protocol buffer: field 1, once for each piece, is a message of its text (1), score (2) and kind (3). Source:
sentencepiece_model.proto in google/sentencepiece. What else the file holds, tokenizer.json says as well.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

from ftcli.errors import ContentError
from ftcli.store.tensor import COPY_AGAIN

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MOST_BYTES = 1 << 26
Piece = tuple[str, float, int]


def read_pieces(path: Path) -> list[Piece]:
    """Text, score and kind of each piece by its id; kinds are numbered as llama.cpp numbers them.

    Raises:
        ContentError: the file is damaged.
    """
    try:
        data = path.read_bytes()
        if len(data) > _MOST_BYTES:
            raise ValueError("it is too large")
        pieces = [
            _read_piece(value) for field, value in _iterate_fields(data) if field == 1 and isinstance(value, bytes)
        ]
        if not pieces:
            raise ValueError("it holds no pieces")
    except (OSError, ValueError, IndexError, struct.error) as error:
        raise ContentError(
            "the tokenizer.model is damaged", where=str(path), why=str(error), hint=COPY_AGAIN
        ) from error
    return pieces


def _read_piece(data: bytes) -> Piece:
    text, score, kind = "", 0.0, 1
    for field, value in _iterate_fields(data):
        if field == 1 and isinstance(value, bytes):
            text = value.decode()
        elif field == 2 and isinstance(value, bytes):
            (score,) = struct.unpack("<f", value)
        elif field == 3 and isinstance(value, int):
            kind = value
    return text, score, kind


def _iterate_fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    at = 0
    while at < len(data):
        tag, at = _read_varint(data, at)
        field, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            number, at = _read_varint(data, at)
            yield field, number
            continue
        if wire == _BYTES:
            size, at = _read_varint(data, at)
        elif wire in (_FIXED32, _FIXED64):
            size = 4 if wire == _FIXED32 else 8
        else:
            raise ValueError(f"a field of type {wire} cannot be")
        if at + size > len(data):
            raise ValueError("it ends within a field")
        yield field, data[at : at + size]
        at += size


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = data[at]
        number |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return number, at
        if shift > 63:
            raise ValueError("a number is too long")
