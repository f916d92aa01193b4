"""Whether a runtime reads texts as the tokenizer does that the model was trained with: the same ids, text by text.

renderer ─▶ probes: chats as the template writes them, plain texts where there is none ─┐
documents ─▶ their texts ────────────────────────────────────────────────────────────────┴─▶ ids here = ids there?
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ftcli.data.chat import ChatRenderer, Rendered
from ftcli.errors import ContentError

# what vocabularies split in different ways: digits, blanks, contractions, capitals, and what lies outside ASCII
_PROBES = (
    "Hello, world! It's 12345 o'clock, isn't it?",
    "two  spaces\n\n\tand\ttabs\n  def f(x):\n    return x**2  # 3.14159",
    "déjà vu, naïve café 😀 中文 字符 ANTIDISESTABLISHMENT",
)


class TextReader(Protocol):
    """A vocabulary as a runtime has it."""

    def tokenize(self, text: str, *, is_chat: bool = False) -> list[int]:
        """The ids of ``text`` and of nothing around it; in a chat control tokens are read as such."""


@dataclass(frozen=True)
class Misread:
    """A text of which a runtime makes other ids than the tokenizer: from ``text`` on, where both part."""

    text: str
    expected: str
    found: str

    def describe(self) -> str:
        """In a line: what is read how."""
        return f"{self.text[:40]!r} is read as {self.found!r} and was trained as {self.expected!r}"


def list_probes(renderer: ChatRenderer) -> list[str]:
    """Texts that vocabularies split in different ways, as the model sees them: in a chat, where it has a template."""
    try:
        return [renderer.template.render([{"role": "user", "content": text}], None, prompt=True) for text in _PROBES]
    except ContentError:
        return list(_PROBES)


def spell_documents(tokenizer: Any, documents: Iterable[Rendered]) -> list[str]:
    """The texts of documents, control tokens in them."""
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    return [tokenizer.decode(document.ids, **options) for document in documents]


def find_misread(reader: TextReader, tokenizer: Any, texts: Sequence[str]) -> list[Misread]:
    """The texts of which ``reader`` makes other ids than ``tokenizer``."""
    misread = []
    for text in texts:
        expected, found = tokenizer(text, add_special_tokens=False).input_ids, reader.tokenize(text, is_chat=True)
        if found != expected:
            pairs = enumerate(zip(expected, found, strict=False))
            at = next((i for i, (a, b) in pairs if a != b), min(len(expected), len(found)))
            ours, theirs = (_spell(tokenizer, ids[at : at + 4]) for ids in (expected, found))
            misread.append(Misread(tokenizer.decode(expected[at : at + 12]), ours, theirs))
    return misread


def _spell(tokenizer: Any, ids: Sequence[int]) -> str:
    """Tokens as the vocabulary has them, the borders between them shown."""
    return "|".join(str(token) for token in tokenizer.convert_ids_to_tokens(list(ids)))
