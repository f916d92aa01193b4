"""Rendered text with its trained spans → token ids and the mask, by one tokenizer.

    text    …<|im_start|>assistant\\nHello<|im_end|>\\n        spans [(21, 36)]
    ids     …     1       9690    198  28120     2     198
    mask    …     .         .      .     #       #      .

No token reaches over the start of a span: where the tokenizer would join the two sides, the text is encoded in
pieces, because at inference the prompt ends there. Three ways lead to the same ids, from fast to sure:

    byte-level   word by word (`byte_level`), in segments between the spans
    by ids       one batch without offsets; spans are found again by the added tokens among the ids
    by offsets   one text at a time, with the characters of every token; all else, and what samples are held against
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

from ftcli.data.byte_level import ByteLevelEncoder
from ftcli.errors import ContentError

Span = tuple[int, int]
Encoded = tuple[list[int], list[bool]]

# One private-use character (Unicode planes 15 and 16) stands for each special token that a message spells out.
_MARKERS = (*range(0xF0000, 0xFFFFE), *range(0x100000, 0x10FFFE))
_MELTED = "the first characters of a turn cannot be separated from the generation prompt"
_ALWAYS, _SAMPLED = 16, 256  # the first texts that went a fast way, and then one of so many, are encoded by offsets
_WORTH_IT = 1_000_000  # characters from which on setting up the byte-level way pays
_ID_BYTES = 4


@dataclass(frozen=True, slots=True)
class MarkedText:
    """A text and the characters of it that are trained; ``is_protected`` if markers stand for typed tokens."""

    text: str
    spans: Sequence[Span]
    is_protected: bool = False


@dataclass
class TextEncoder:
    """Encodes marked texts with one fast transformers tokenizer; ``notices`` says what it fell back from."""

    tokenizer: Any
    notices: list[str] = field(default_factory=list)
    _n_fast: int = 0
    _uses_byte_level: bool = True
    _uses_ids: bool = True
    _byte_level: ByteLevelEncoder | None = None
    _literal: Any = None
    _tails: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        tokens = list(self.tokenizer.added_tokens_decoder.items())
        self.added = match_any(token.content for _, token in tokens)
        self.special = match_any(token.content for _, token in tokens if token.special)
        self._special_texts = sorted(token.content for _, token in tokens if token.special)
        self._added_ids = {token.content: number for number, token in tokens}
        self._eats_blanks = any(token.lstrip or token.rstrip for _, token in tokens)
        self._added_id_set = frozenset(self._added_ids.values())

    def expect(self, n_characters: int) -> None:
        """Nothing; the byte-level way is set up if so many characters to come make it pay."""
        if self._byte_level is None and n_characters >= _WORTH_IT and self._uses_byte_level:
            self._byte_level = ByteLevelEncoder.build(self.tokenizer, self.added)

    def encode(self, texts: Sequence[MarkedText]) -> list[Encoded | ContentError]:
        """For each text its ids and mask, or what is wrong with it."""
        results: list[Encoded | None]
        if self._byte_level:
            results = [self._encode_byte_level(text, self._byte_level) for text in texts]
        elif self._uses_ids and len(texts) > 1:
            results = self._encode_by_ids(texts)
        else:
            results = [None] * len(texts)
        found: list[Encoded | ContentError] = []
        for text, result in zip(texts, results, strict=True):
            if result is not None:
                self._n_fast += 1
                if self._n_fast > _ALWAYS and self._n_fast % _SAMPLED:
                    found.append(result)
                    continue
            try:
                sure = self.encode_one(text)
            except ContentError as error:
                found.append(error)
                continue
            if result is not None and result != sure:
                self._give_up_speed()
                return self.encode(texts)
            found.append(sure)
        return found

    def count_tokens(self, texts: Sequence[str]) -> int:
        """How many tokens plain ``texts`` have, without BOS or EOS."""
        if self._byte_level and all(self._byte_level.knows(text) for text in texts):
            return sum(len(self._byte_level.encode(text)) // _ID_BYTES for text in texts)
        backend = self.tokenizer.backend_tokenizer
        return sum(len(encoding.ids) for encoding in backend.encode_batch_fast(texts, add_special_tokens=False))

    def _give_up_speed(self) -> None:
        name = "the byte-level encoder" if self._byte_level else "finding spans by their ids"
        self.notices.append(f"{name} disagrees with the tokenizer on this data; going on without it, more slowly")
        if self._byte_level is None:
            self._uses_ids = False
        self._byte_level, self._uses_byte_level = None, False

    # --- by ids

    def _encode_byte_level(self, marked: MarkedText, encoder: ByteLevelEncoder) -> Encoded | None:
        """Ids by `byte_level`, cut at the spans; None where that is not known to be right."""
        text = marked.text
        if marked.is_protected or not encoder.knows(text):
            return None
        parts, mask, last = [], [], 0
        for start, end in marked.spans:
            before, inside = encoder.encode(text[last:start]), encoder.encode(text[start:end])
            parts += [before, inside]
            mask += [False] * (len(before) // _ID_BYTES)
            mask += [True] * (len(inside) // _ID_BYTES)
            if not inside or (end < len(text) and not self._ends_added(inside)):
                return None
            last = end
        parts.append(encoder.encode(text[last:]))
        ids = memoryview(b"".join(parts)).cast("i").tolist()
        return ids, mask + [False] * (len(ids) - len(mask))

    def _ends_added(self, ids: bytes) -> bool:
        return int.from_bytes(ids[-_ID_BYTES:], sys.byteorder) in self._added_id_set

    def _encode_by_ids(self, texts: Sequence[MarkedText]) -> list[Encoded | None]:
        plain = [text for text in texts if not text.is_protected]
        backend, known = self.tokenizer.backend_tokenizer, self._added_id_set
        encodings = backend.encode_batch_fast([text.text for text in plain], add_special_tokens=False)
        masks = {}
        for text, encoding in zip(plain, encodings, strict=True):
            ids = encoding.ids
            at = [i for i, token in enumerate(ids) if token in known]
            masks[id(text)] = self._find_mask(text, ids, at, list(self.added.finditer(text.text)))
        return [masks.get(id(text)) for text in texts]

    def _find_mask(
        self, marked: MarkedText, ids: list[int], at: Sequence[int], tokens: Sequence[re.Match[str]]
    ) -> Encoded | None:
        """The mask over ``ids``; None unless each span lies between added tokens.

        Args:
            marked: the text.
            ids: its own.
            at: where added tokens stand in ``ids``.
            tokens: where added tokens stand in the text.
        """
        if [ids[i] for i in at] != [self._added_ids[token.group()] for token in tokens]:
            return None
        mask = [False] * len(ids)
        index = 0
        for start, end in marked.spans:
            if self._eats_blanks and marked.text[start].isspace():
                return None  # which only offsets show
            while index < len(tokens) and tokens[index].end() <= start:
                index += 1
            if index == 0:
                return None
            opening = tokens[index - 1]
            expected = self._encode_tail(marked.text[opening.start() : start])
            first = at[index - 1] + len(expected)
            if ids[at[index - 1] : first] != expected:
                return None
            while index < len(tokens) and tokens[index].end() < end:
                index += 1
            if index == len(tokens) or tokens[index].end() != end or at[index] < first:
                return None
            mask[first : at[index] + 1] = [True] * (at[index] + 1 - first)
        return ids, mask

    def _encode_tail(self, tail: str, tokenizer: Any = None) -> list[int]:
        """Ids of the last special token of a prompt and what follows it, of which a template has few."""
        if tail not in self._tails:
            tokenizer = tokenizer or self.tokenizer.backend_tokenizer
            self._tails[tail] = tokenizer.encode(tail, add_special_tokens=False).ids
        return self._tails[tail]

    # --- by offsets

    def encode_one(self, marked: MarkedText) -> Encoded:
        """Ids of one text and the mask of its spans; no token reaches over the start of a span.

        Raises:
            ContentError: a span's end has no token of its own, or its start cannot be separated.
        """
        text, spans = marked.text, marked.spans
        tokenizer, tokens = self.tokenizer.backend_tokenizer, self.added
        if marked.is_protected:
            text, spans = self._swap_markers(text, spans)
            tokenizer, tokens = self._literal_tokenizer(), self._marker_class
        starts = [start for start, _ in spans]
        encoding = tokenizer.encode(text, add_special_tokens=False)
        ids, offsets = list(encoding.ids), list(encoding.offsets)
        prompts = [(_last_start(tokens, text, start), start) for start in starts]
        if not self._starts_are_clean(text, prompts, ids, offsets, tokenizer):
            ids, offsets = _encode_pieces(tokenizer, text, starts)
        mask = [False] * len(ids)
        for start, end in spans:
            trained = [i for i, (first, last) in enumerate(offsets) if start <= first < end and first < last]
            if not trained or offsets[trained[-1]][1] < end:
                raise ContentError("the end of a trained turn has no token of its own")
            for position in trained:
                mask[position] = True
        return ids, mask

    def encode_raw(self, text: str) -> list[int]:
        """Ids of a raw text as the tokenizer writes it, with its own BOS and EOS; typed tokens stay text."""
        tokenizer = self.tokenizer.backend_tokenizer
        if self.special.search(text):
            self._check_no_marker(text)
            tokenizer = self._literal_tokenizer()
        return list(tokenizer.encode(text, add_special_tokens=True).ids)

    def _starts_are_clean(
        self, text: str, prompts: Sequence[Span], ids: list[int], offsets: list[Span], tokenizer: Any
    ) -> bool:
        """Whether the ids before each start are those that the inference prompt has there."""
        for token_start, start in prompts:
            expected = self._encode_tail(text[token_start:start], tokenizer)
            n_before = sum(last <= start for _, last in offsets)
            straddles = n_before < len(offsets) and offsets[n_before][0] < start
            if straddles or ids[max(0, n_before - len(expected)) : n_before] != expected:
                return False
        return True

    # --- text that looks like a special token

    def protect(self, value: Any) -> tuple[Any, bool]:
        """``value`` (messages and tools) with a marker for each special token that its texts spell out.

        The flag says whether there was one, which is rare.

        Raises:
            ContentError: it holds special tokens beside private-use characters, which stand for them here.
        """
        everything = json.dumps(value, ensure_ascii=False, default=str)
        if not self.special.search(everything):
            return value, False
        self._check_no_marker(everything)

        def replace(item: Any) -> Any:
            if isinstance(item, str):
                return self.special.sub(lambda match: self._markers[match.group()], item)
            if isinstance(item, Mapping):
                return {replace(key): replace(part) for key, part in item.items()}
            return [replace(part) for part in item] if isinstance(item, list | tuple) else item

        return replace(value), True

    def spell_out(self, text: str) -> str:
        """``text`` as a person reads it: with the typed special tokens in place of their markers."""
        return self._swap_markers(text, [])[0] if self._marker_class.search(text) else text

    @cached_property
    def _markers(self) -> dict[str, str]:
        """Special token → the character that stands for it: none that the vocabulary knows (Gemma's has some)."""
        vocabulary = self.tokenizer.get_vocab()
        free = (chr(code) for code in _MARKERS if chr(code) not in vocabulary)
        return dict(zip(self._special_texts, free, strict=False))

    @cached_property
    def _marker_class(self) -> re.Pattern[str]:
        return match_any(self._markers.values())

    def _check_no_marker(self, text: str) -> None:
        if self._marker_class.search(text):
            raise ContentError("holds a special token as text beside private-use characters")

    def _swap_markers(self, text: str, spans: Sequence[Span]) -> tuple[str, list[Span]]:
        """``text`` with typed special tokens spelled out and the template's own as markers, and its spans."""
        other = {**self._markers, **{marker: text for text, marker in self._markers.items()}}
        both = re.compile(f"{self.special.pattern}|{self._marker_class.pattern}")

        def swap(piece: str) -> str:
            return both.sub(lambda match: other[match.group()], piece)

        cuts = sorted({0, len(text), *(position for span in spans for position in span)})
        moved, swapped = {0: 0}, ""
        for first, last in pairwise(cuts):
            swapped += swap(text[first:last])
            moved[last] = len(swapped)
        return swapped, [(moved[start], moved[end]) for start, end in spans]

    def _literal_tokenizer(self) -> Any:
        """The same tokenizer, but its special tokens are spelled as markers: their usual spelling is plain text."""
        if self._literal is None:
            from tokenizers import Tokenizer

            backend = self.tokenizer.backend_tokenizer
            definition = json.loads(backend.to_str())
            model = definition["model"]
            for token in definition["added_tokens"]:
                token["content"] = self._markers.get(token["content"], token["content"])
            if isinstance(model.get("vocab"), dict):
                model["vocab"] = {self._markers.get(text, text): i for text, i in model["vocab"].items()}
            model["unk_token"] = self._markers.get(model.get("unk_token"), model.get("unk_token"))
            literal = Tokenizer.from_str(json.dumps(definition))
            if any(literal.token_to_id(mark) != backend.token_to_id(text) for text, mark in self._markers.items()):
                raise ContentError("holds text like a special token, which this tokenizer cannot keep as text")
            self._literal = literal
        return self._literal


def match_any(texts: Any) -> re.Pattern[str]:
    """A pattern that matches the longest of ``texts``, or nothing at all when there are none."""
    ordered = sorted((re.escape(text) for text in texts if text), key=len, reverse=True)
    return re.compile("|".join(ordered) if ordered else r"(?!)")


def _last_start(tokens: re.Pattern[str], text: str, end: int) -> int:
    """Where the last of ``tokens`` that ends by ``end`` begins in ``text``; 0 if there is none."""
    return max((match.start() for match in tokens.finditer(text, 0, end)), default=0)


def _encode_pieces(tokenizer: Any, text: str, cuts: Sequence[int]) -> tuple[list[int], list[Span]]:
    """Ids and offsets of ``text`` encoded in pieces, so that no token reaches over a cut.

    Each piece is encoded behind an anchor character, which keeps a tokenizer from treating it as the beginning
    of a text; the anchor's own ids are dropped.
    """
    ids: list[int] = []
    offsets: list[Span] = []
    borders = sorted({0, *cuts, len(text)})
    for first, last in pairwise(borders):
        for anchor in ("a", ".", "1", "\n") if first else ("",):
            n_anchor = len(tokenizer.encode(anchor, add_special_tokens=False).ids)
            encoding = tokenizer.encode(anchor + text[first:last], add_special_tokens=False)
            if not anchor or encoding.offsets[n_anchor - 1][1] == 1 == encoding.offsets[n_anchor][0]:
                break
        else:
            raise ContentError(_MELTED, hint="remove the blanks at the beginning of the message")
        ids += encoding.ids[n_anchor:]
        offsets += [(a + first - len(anchor), b + first - len(anchor)) for a, b in encoding.offsets[n_anchor:]]
    whole = tokenizer.encode(text, add_special_tokens=False).ids
    decoded, expected = (tokenizer.decode(part, skip_special_tokens=False) for part in (ids, whole))
    # blanks apart: some tokenizers eat those around a special token, and a cut keeps what stands behind it
    if "".join(decoded.split()) != "".join(expected.split()):
        raise ContentError(_MELTED, hint="remove the blanks at the beginning of the message")
    return ids, offsets
