"""Byte-level BPE by tiktoken, where that is proven to give the same ids as the tokenizer, at a third of the cost.

tiktoken joins any two neighbours whose union is in the vocabulary, lowest rank first; a Hugging Face BPE joins
the pairs of its merge list, lowest line first. The two are the same if either

    every pair    the list holds every pair of entries whose union is an entry, in the order of the union's line
    one pair      each entry is the union of one pair only, its parts come earlier in the list, and it encodes to
                  itself: no merge but the list's then ever finds its two parts side by side

because a sequence is an encoding if and only if each two neighbours are the encoding of their union (Berglund &
van der Merwe, Formalizing BPE tokenization, 2023, arXiv:2309.08715). What no list shows, how the two regex
engines class a character, is tried for each character beyond ASCII when it is first seen.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

# The pre-tokenizers that are known, as tiktoken must be told of them. GPT-2's pattern stands in tokenizers'
# own code (pre_tokenizers/byte_level.rs), the others in tokenizer.json.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Digits(individual) before GPT-2's pattern: a run of blanks before a digit ends there, whole
_DIGITS_GPT2 = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
_N_BYTES = 256
_MISSING = -1
_PROBE = "a{c}b 1{c}2 .{c}. {c} {c}{c}\n{c}!{c}\t {c}"
_TRIED_ASCII = (
    "I'm 12345 you'll  see\n\n  it's   done...  \t x\r\n y!?\n", "a1b2 c3\n4  5   6\t7", "'S 'LL don't DON'T",
    " \n \n x", "{\n  \"k\": [1, 22, 333],\n\t}", "==--__**  ", "A\u00e9", "", " ", "\n",
)  # fmt: skip


@dataclass
class ByteLevelEncoder:
    """Encodes text that holds no added token; made by `build`."""

    backend: Any
    encoding: Any
    ids: Sequence[int]  # by tiktoken's rank
    normalizes: bool
    _known: set[str] = field(default_factory=set)
    _odd: set[str] = field(default_factory=set)

    @staticmethod
    def build(tokenizer: Any) -> ByteLevelEncoder | None:
        """The encoder of a fast transformers tokenizer, or None if it is not proven to be the same."""
        definition = json.loads(tokenizer.backend_tokenizer.to_str())
        pattern = _find_pattern(definition.get("pre_tokenizer"))
        model = definition["model"]
        normalizer = (definition.get("normalizer") or {}).get("type")
        odd = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
        added = definition.get("added_tokens", ())
        tricky = any(token[key] for token in added for key in ("lstrip", "rstrip", "single_word"))
        if pattern is None or model["type"] != "BPE" or any(model.get(key) for key in odd) or tricky:
            return None
        if normalizer not in (None, "NFC") or (normalizer and any(token["normalized"] for token in added)):
            return None
        merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in model["merges"]]
        unions = _order_unions(merges)
        spelled = {char: byte for byte, char in list_byte_characters().items()}
        vocabulary = {text: entry for text, entry in model["vocab"].items() if all(char in spelled for char in text)}
        entries = {text for text in vocabulary if len(text) > 1} - {token["content"] for token in added}
        is_same = entries == unions.keys() and (
            _has_every_pair(merges, vocabulary, unions)
            if model.get("ignore_merges")
            else _has_one_pair(merges, unions) and _encode_to_themselves(tokenizer.backend_tokenizer, unions)
        )
        if not is_same:
            return None
        ranks = {bytes([byte]): byte for byte in range(_N_BYTES)}
        ids = [vocabulary.get(char, _MISSING) for _, char in sorted(list_byte_characters().items())]
        for text in unions:
            ranks[bytes(spelled[char] for char in text)] = len(ids)
            ids.append(vocabulary[text])
        import tiktoken

        encoding = tiktoken.Encoding("recipe", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        encoder = ByteLevelEncoder(tokenizer.backend_tokenizer, encoding, ids, normalizer is not None)
        return encoder if all(encoder._agrees(text) for text in _TRIED_ASCII) else None

    def knows(self, text: str) -> bool:
        """Whether every character of ``text`` is classed alike by both; new ones are tried out."""
        if text.isascii():
            return True
        characters = set(text)
        for character in characters - self._known:
            self._known.add(character)
            if not character.isascii() and not self._agrees(_PROBE.replace("{c}", character)):
                self._odd.add(character)
        if self._odd and not self._odd.isdisjoint(characters):
            return False
        return not self.normalizes or unicodedata.is_normalized("NFC", text)

    def encode(self, text: str) -> list[int] | None:
        """The ids of ``text``, or None where it holds a byte that the vocabulary lacks."""
        ids = self.ids
        found = [ids[rank] for rank in self.encoding.encode_ordinary(text)] if text else []
        return None if _MISSING in found else found

    def _agrees(self, text: str) -> bool:
        found = self.encode(text)
        return found is None or found == self.backend.encode(text, add_special_tokens=False).ids


@cache
def list_byte_characters() -> dict[int, str]:
    """Byte → the character that spells it in a byte-level vocabulary; source: encoder.py of GPT-2."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(_N_BYTES) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(_N_BYTES + i) for i, byte in enumerate(others)}


def _find_pattern(pre_tokenizer: Any) -> str | None:
    """The regex that splits as ``pre_tokenizer`` does, if it is one of the known byte-level ones."""
    steps = (pre_tokenizer or {}).get("pretokenizers") or [pre_tokenizer or {}]
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
        # every character must fall into a match: what lies between matches is a piece for the one, lost for the other
        is_whole = isinstance(pattern, str) and pattern.endswith(r"|\s+") and r"[^\s\p{L}\p{N}]+" in pattern
        return pattern if is_whole and step.get("behavior") == "Isolated" else None
    return None


def _order_unions(merges: Sequence[tuple[str, str]]) -> dict[str, int]:
    """What the merges make → the first line that makes it, in the order of the list."""
    unions: dict[str, int] = {}
    for line, (left, right) in enumerate(merges):
        unions.setdefault(left + right, line)
    return unions


def _has_every_pair(merges: Sequence[tuple[str, str]], vocabulary: dict[str, int], unions: dict[str, int]) -> bool:
    lines = [unions[left + right] for left, right in merges]
    pairs = {
        (text[:cut], text[cut:])
        for text in unions
        for cut in range(1, len(text))
        if text[:cut] in vocabulary and text[cut:] in vocabulary
    }
    return lines == sorted(lines) and pairs == set(merges)


def _has_one_pair(merges: Sequence[tuple[str, str]], unions: dict[str, int]) -> bool:
    made = unions.get
    return len(merges) == len(unions) and all(
        (len(part) == 1 or made(part, len(merges)) < line) for line, pair in enumerate(merges) for part in pair
    )


def _encode_to_themselves(backend: Any, unions: dict[str, int]) -> bool:
    from tokenizers import Tokenizer

    encodings = Tokenizer(backend.model).encode_batch_fast(list(unions), add_special_tokens=False)
    return all(len(encoding.ids) == 1 for encoding in encodings)
