"""Single tokens as a person reads them: the bytes that an id stands for, and a text that shows them.

byte-level      Ġthe  →  b" the"          <0xF0>  →  b"\\xf0"  (byte fallback)
SentencePiece   ▁the  →  b" the"          <|im_end|>  →  its own text (added)
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ftcli.data.byte_level import describe_part, list_byte_characters

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "▁"
_SHOWN = {"\n": "⏎", "\t": "⇥", "\r": "␍"}


@dataclass(frozen=True, slots=True)
class Piece:
    """One token: ``text`` is empty where its bytes are no whole characters."""

    id: int
    token: str
    data: bytes
    is_special: bool

    @property
    def shown(self) -> str:
        """The piece on one line: newlines as ⏎, bytes that are no character as hexadecimal."""
        try:
            text = self.data.decode("utf-8")
        except UnicodeDecodeError:
            return "".join(f"\\x{byte:02x}" for byte in self.data)
        return "".join(_SHOWN.get(char, char if char.isprintable() else ascii(char)[1:-1]) for char in text)


class PieceReader:
    """The pieces of one tokenizer's ids."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._added = dict(tokenizer.added_tokens_decoder)
        parts = [describe_part(tokenizer.backend_tokenizer, name) for name in ("decoder", "pre_tokenizer")]
        self._is_byte_level = '"ByteLevel"' in json.dumps(parts)
        self.unknown_id = tokenizer.unk_token_id
        self.read = lru_cache(maxsize=None)(self._read)

    def _read(self, id: int) -> Piece:  # noqa: A002
        if id in self._added:
            return Piece(id, self._added[id].content, self._added[id].content.encode(), True)
        token = self.tokenizer.convert_ids_to_tokens(id)
        if token is None:
            return Piece(id, "", b"", False)
        return Piece(id, token, self._spell(token), id == self.unknown_id)

    def _spell(self, token: str) -> bytes:
        if self._is_byte_level:
            spelled = {char: byte for byte, char in list_byte_characters().items()}
            return b"".join(bytes([spelled[char]]) if char in spelled else char.encode() for char in token)
        if match := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(match.group(1), 16)])
        return token.replace(_SPACE, " ").encode()
