"""Byte-level BPE word by word: the same ids as the tokenizer's, at a quarter of the cost.

    text    Hello, world!  Hello
    words   Hello|,| world|!| | Hello        split by the pre-tokenizer's own regex, by Python's engine
    ids     9707 11 1879 0 220 21927         a word that was seen before is looked up, a new one is asked for

A byte-level tokenizer encodes each word for itself, so its ids are those of its words, whatever stands beside them.
What may differ is where two regex engines cut; that is tried out on samples when the encoder is built, and for each
character beyond ASCII when it is first seen.
"""

from __future__ import annotations

import json
import re
import unicodedata
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

# The pre-tokenizers that are known. GPT-2's pattern stands in tokenizers' own code (pre_tokenizers/byte_level.rs),
# the others in tokenizer.json.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Digits(individual) before GPT-2's pattern: a run of blanks before a digit ends there, whole
_DIGITS_GPT2 = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
_BLANKS = "\\t-\\r \\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000"  # Unicode's White_Space
_PATTERN_PART = re.compile(r"\\p\{\w+\}|\\.|.", re.DOTALL)
_NOT_ASCII = re.compile("[^\x00-\x7f]")
_MOST_WORDS = 1 << 18
_N_BYTES = 256
_PROBE = "a{c}b 1{c}2 .{c}. {c} {c}{c}\n{c}!{c}\t {c} '{c} {c}'s"
_TRIED_ASCII = (
    "I'm 12345 you'll  see\n\n  it's   done...  \t x\r\n y!?\n", "a1b2 c3\n4  5   6\t7", "'S 'LL don't DON'T",
    " \n \n x", "{\n  \"k\": [1, 22, 333],\n\t}", "==--__**  ", "a\x1cb\x1f \x00\x0b", "", " ", "\n",
)  # fmt: skip


class _Words(dict[str, bytes]):
    """Word → its ids as native int32, asked for when it is first seen."""

    def __init__(self, encode: Callable[[str], list[int]]) -> None:
        self.encode = encode

    def __missing__(self, word: str) -> bytes:
        if len(self) >= _MOST_WORDS:
            self.clear()
        self[word] = ids = array("i", self.encode(word)).tobytes()
        return ids


@dataclass
class ByteLevelEncoder:
    """Encodes text; made by `build`."""

    backend: Any
    added: re.Pattern[str]
    split: Callable[[str], list[str]]
    normalizes: bool
    _words: _Words = field(init=False)
    _known: set[str] = field(default_factory=set)
    _odd: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        from tokenizers import Tokenizer
        from tokenizers.pre_tokenizers import ByteLevel

        words = Tokenizer(self.backend.model)
        words.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
        added = {token.content: number for number, token in self.backend.get_added_tokens_decoder().items()}

        def encode(word: str) -> list[int]:
            return [added[word]] if word in added else words.encode(word, add_special_tokens=False).ids

        self._words = _Words(encode)

    @staticmethod
    def build(tokenizer: Any, added: re.Pattern[str]) -> ByteLevelEncoder | None:
        """The encoder of a fast transformers tokenizer, or None if it does not split as expected.

        Args:
            tokenizer: the tokenizer.
            added: matches its added tokens, the longest first.
        """
        backend = tokenizer.backend_tokenizer
        model, normalizer = backend.model, describe_part(backend, "normalizer").get("type")
        pattern = _find_pattern(describe_part(backend, "pre_tokenizer"))
        odd = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
        if pattern is None or type(model).__name__ != "BPE" or any(getattr(model, key) for key in odd):
            return None
        tokens = backend.get_added_tokens_decoder().values()
        if any(token.lstrip or token.rstrip or token.single_word or token.normalized for token in tokens):
            return None
        if normalizer not in (None, "NFC"):
            return None
        split = _compile_split(pattern)
        if split is None:
            return None
        encoder = ByteLevelEncoder(backend, added, split, normalizer is not None)
        return encoder if all(encoder._agrees(text) for text in _TRIED_ASCII) else None

    def knows(self, text: str) -> bool:
        """Whether every character of ``text`` is cut alike by both engines; new ones are tried out."""
        if text.isascii():
            return True
        characters = set(_NOT_ASCII.findall(text))
        for character in characters - self._known:
            self._known.add(character)
            if not self._agrees(_PROBE.replace("{c}", character)):
                self._odd.add(character)
        if self._odd and not self._odd.isdisjoint(characters):
            return False
        return not self.normalizes or unicodedata.is_normalized("NFC", text)

    def encode(self, text: str) -> bytes:
        """The ids of ``text``, as native int32; added tokens are cut out first, as the tokenizer does."""
        parts: list[str] = []
        last = 0
        for match in self.added.finditer(text):
            parts += self.split(text[last : match.start()])
            parts.append(match.group())
            last = match.end()
        parts += self.split(text[last:])
        return b"".join(map(self._words.__getitem__, parts))

    def _agrees(self, text: str) -> bool:
        expected = self.backend.encode(text, add_special_tokens=False).ids
        return self.encode(text) == array("i", expected).tobytes()


@cache
def list_byte_characters() -> dict[int, str]:
    """Byte → the character that spells it in a byte-level vocabulary; source: encoder.py of GPT-2."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(_N_BYTES) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(_N_BYTES + i) for i, byte in enumerate(others)}


def describe_part(backend: Any, name: str) -> dict[str, Any]:
    """A part of a tokenizer as tokenizer.json writes it, without the vocabulary; empty if it is not there."""
    part = getattr(backend, name)
    return {} if part is None else json.loads(part.__getstate__())


def _find_pattern(pre_tokenizer: dict[str, Any]) -> str | None:
    """The regex that splits as ``pre_tokenizer`` does, if it is one of the known byte-level ones."""
    steps = pre_tokenizer.get("pretokenizers") or [pre_tokenizer]
    *first, last = steps
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space") or len(first) > 1:
        return None
    if not first:
        return _GPT2 if last.get("use_regex", True) else None
    step = first[0]
    if step.get("type") == "Digits" and step.get("individual_digits") and last.get("use_regex", True):
        return _DIGITS_GPT2
    if step.get("type") == "Split" and not last.get("use_regex", True) and not step.get("invert"):
        pattern = step.get("pattern", {}).get("Regex")
        # every character must fall into a match: what lies between matches is a word for the one, lost for the other
        is_whole = isinstance(pattern, str) and pattern.endswith(r"|\s+") and r"[^\s\p{L}\p{N}]+" in pattern
        return pattern if is_whole and step.get("behavior") == "Isolated" else None
    return None


def _compile_split(pattern: str) -> Callable[[str], list[str]] | None:
    """A function that splits as ``pattern`` does, whose classes are spelled out for Python's regex engine."""
    written: list[str] = []
    in_class = False
    for part in _PATTERN_PART.findall(pattern):
        if part.startswith("\\p{") or part == "\\s":
            inside = _BLANKS if part == "\\s" else _spell_category(part[3:-1])
            part = inside if in_class else f"[{inside}]"
        elif part == "\\S":
            if in_class:
                return None
            part = f"[^{_BLANKS}]"
        elif part in "[]":
            in_class = part == "["
        written.append(part)
    try:
        compiled = re.compile("".join(written))
    except re.error:
        return None
    return compiled.findall if compiled.groups == 0 else None


@cache
def _spell_category(name: str) -> str:
    """The characters of a Unicode category (``L``, ``Lu``, …) as ranges inside brackets.

    Those beyond the basic plane are left out, because Python's engine looks through their ranges one by one; a text
    with one of them is told apart by `ByteLevelEncoder.knows`.
    """
    ranges: list[list[int]] = []
    for code in range(1 << 16):
        if unicodedata.category(chr(code)).startswith(name):
            if ranges and ranges[-1][1] == code - 1:
                ranges[-1][1] = code
            else:
                ranges.append([code, code])
    return "".join(f"\\u{first:04x}-\\u{last:04x}" for first, last in ranges)
