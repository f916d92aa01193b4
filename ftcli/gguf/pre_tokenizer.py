"""How a byte-level tokenizer cuts a text into words, and what llama.cpp calls that.

It is told by the pattern in tokenizer.json. The converter goes by a hash of some encoded text, which changes with every
token that is added, and then refuses.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ftcli.errors import ContentError
from ftcli.gguf.family import CONVERTER

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_START = r"[^\r\n\p{L}\p{N}]?"
# pattern of the pre-tokenizer → llama.cpp's name of it (llama-vocab.cpp)
_PATTERNS = {
    rf"{_CONTRACTIONS}|{_START}\p{{L}}+|\p{{N}}{{1,3}}{_TAIL}": "llama-bpe",
    rf"{_CONTRACTIONS}|{_START}\p{{L}}+|\p{{N}}{_TAIL}": "qwen2",
    rf"{_START}{_UPPER}*{_LOWER}+|{_START}{_UPPER}+{_LOWER}*|\p{{N}}{_CASED_TAIL}": "tekken",
    rf"{_START}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_START}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}{_CASED_TAIL}": "gpt-4o",
}


def find_pre_tokenizer(document: Mapping[str, Any], where: str) -> str:
    """llama.cpp's name of the way that a byte-level tokenizer (tokenizer.json) cuts a text into words.

    Raises:
        ContentError: it has none for it.
    """
    pre = document.get("pre_tokenizer") or {}
    *first, last = pre.get("pretokenizers") or [pre]
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        uses_regex = last.get("use_regex", True)
        if not first and uses_regex:
            return "gpt-2"
        if len(first) == 1 and first[0].get("type") == "Digits" and first[0].get("individual_digits") and uses_regex:
            return "smollm"
        if len(first) == 1 and first[0].get("type") == "Split" and not uses_regex:
            name = _PATTERNS.get(first[0].get("pattern", {}).get("Regex", ""), "")
            if name == "llama-bpe" and not document["model"].get("ignore_merges"):
                return "dbrx"  # the same pattern, without Llama 3's whole words
            if name:
                return name
    raise refuse_tokenizer("this tokenizer's way of cutting a text into words", Path(where))


def refuse_tokenizer(what: str, folder: Path) -> ContentError:
    """The error of a tokenizer that llama.cpp does not read, or not from here."""
    hint = f"export it as safetensors (ftcli merge) and try {CONVERTER} on that"
    return ContentError(f"ftcli cannot write {what} as GGUF", where=str(folder), hint=hint)
