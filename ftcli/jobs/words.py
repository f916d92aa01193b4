"""Domain words that a tokenizer splits badly, as candidates for ``tokenizer.add_tokens``, and what they would save.

An added token is cut out of the text before anything else, so the blank before it stands alone: what a word
saves is measured by encoding with it, not by counting its pieces.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tokenizers import AddedToken, Tokenizer

from ftcli.data.loader import find_section, read_section
from ftcli.data.piece import PieceReader
from ftcli.jobs.rows import Tokenized

_WORD = re.compile(r"[^\W_](?:[\w'’-]*[^\W_])?")
_FEWEST_PIECES, _FEWEST_TIMES = 3, 2
_BATCH = 4096


@dataclass(frozen=True)
class Word:
    """One candidate: how often it stands in the rows, its pieces, and the tokens that adding it would save."""

    word: str
    count: int
    pieces: tuple[str, ...]
    tokens_saved: int


@dataclass(frozen=True)
class WordReport:
    """The candidates, worst first; ``tokens_saved`` is what all of them together save of ``n_tokens`` of text."""

    words: tuple[Word, ...]
    n_tokens: int
    tokens_saved: int


def find_words(tokenized: Tokenized, *, most: int = 20) -> WordReport:
    """The words of the training rows that cost the most tokens, at most ``most`` of them."""
    texts = list(_list_texts(tokenized))
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(_WORD.findall(text))
    backend = tokenized.tokenizer.backend_tokenizer
    frequent = [word for word, count in counts.items() if count >= _FEWEST_TIMES and not word[0].isdecimal()]
    pieces = dict(zip(frequent, _encode(backend, [f" {word}" for word in frequent]), strict=True))
    split = [word for word in frequent if len(pieces[word]) >= _FEWEST_PIECES]
    larger = Tokenizer.from_str(backend.to_str())
    larger.add_tokens([AddedToken(word, normalized=False) for word in split])
    after = dict(zip(split, _encode(larger, [f" {word}" for word in split]), strict=True))
    saved = {word: counts[word] * (len(pieces[word]) - len(after[word])) for word in split}
    best = sorted((word for word in split if saved[word] > 0), key=lambda word: (-saved[word], word))[:most]
    reader = PieceReader(tokenized.tokenizer)
    spelled = {word: tuple(reader.read(token).shown.lstrip() for token in pieces[word]) for word in best}
    words = tuple(
        Word(word, counts[word], tuple(piece for piece in spelled[word] if piece), saved[word]) for word in best
    )
    chosen = Tokenizer.from_str(backend.to_str())
    chosen.add_tokens([AddedToken(word, normalized=False) for word in best])
    n_before = sum(len(ids) for ids in _encode(backend, texts))
    n_after = sum(len(ids) for ids in _encode(chosen, texts)) if best else n_before
    return WordReport(words, n_before, n_before - n_after)


def _list_texts(tokenized: Tokenized) -> Iterator[str]:
    """The contents of the training set's rows, as they are written."""
    skipped = None if tokenized.reading.skipped is None else tokenized.reading.skipped[:0]
    for section in tokenized.recipe.datasets:
        for example in read_section(section, find_section(section), skipped):
            if example.text is not None:
                yield example.text
            yield from (message.content for message in example.messages if message.content)


def _encode(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[list[int]]:
    for first in range(0, len(texts), _BATCH):
        batch = tokenizer.encode_batch_fast(texts[first : first + _BATCH], add_special_tokens=False)
        yield from (encoding.ids for encoding in batch)
