"""A GGUF file's vocabulary read as llama.cpp reads it, where llama.cpp itself is not at hand to be asked.

    text ─▶ parted at control and added tokens ─▶ byte pairs, by their merges  ("gpt2")
                                              └▶ pieces, by their scores       ("llama", SentencePiece)

Written from llama.cpp's src/llama-vocab.cpp, and not from what writes such files here. Limits: the vocabularies that
ftcli writes; of a control token nothing but a name of Phi-3's kind takes blanks away.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ftcli.errors import ContentError
from ftcli.store.gguf_header import read_gguf_header

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # enum llama_token_type in llama.h
_PLAIN_PRE, _DIGIT_PRE = ("gpt-2", "default"), ("smollm",)
_WHOLE_WORD_PRE = ("llama-bpe", "tekken")
_ENGLISH = "'s|'t|'re|'ve|'m|'ll|'d"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_LARGE, _SMALL = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?[{_LARGE}]*[{_SMALL}]+%s|[^\r\n\p{{L}}\p{{N}}]?[{_LARGE}]+[{_SMALL}]*%s"
_CASED_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CUTS = {
    "llama-bpe": rf"(?i:{_ENGLISH})|{_WORD}|\p{{N}}{{1,3}}|{_REST}",
    "dbrx": rf"(?i:{_ENGLISH})|{_WORD}|\p{{N}}{{1,3}}|{_REST}",
    "qwen2": rf"(?i:{_ENGLISH})|{_WORD}|\p{{N}}|{_REST}",
    "tekken": f"{_CASED % ('', '')}|\\p{{N}}|{_CASED_REST}",
    "gpt-4o": f"{_CASED % ((f'(?i:{_ENGLISH})?',) * 2)}|\\p{{N}}{{1,3}}|{_CASED_REST}",
}
_PHI3, _PHI3_KEPT = re.compile("phi-?3", re.IGNORECASE), ("<unk>", "<s>", "<|endoftext|>")


class VocabularyReader:
    """Ids of texts by the vocabulary of the GGUF file at ``path``.

    Raises:
        ContentError: the file is damaged, or its vocabulary of a kind that is not read here.
    """

    def __init__(self, path: Path) -> None:
        metadata = read_gguf_header(path, keep=1 << 22).metadata
        kind = metadata.get("tokenizer.ggml.model")
        needed = {"tokenizer.ggml.tokens", "tokenizer.ggml.token_type"}
        if kind not in ("gpt2", "llama") or not needed <= metadata.keys():
            raise ContentError(f"a vocabulary of the kind {kind} is not read", where=str(path))
        self.tokens: list[str] = metadata["tokenizer.ggml.tokens"]
        self._ids = {text: i for i, text in enumerate(self.tokens)}
        kinds = metadata["tokenizer.ggml.token_type"]
        marked = [i for i, kind in enumerate(kinds) if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)]
        typed = [i for i in marked if kinds[i] == _USER_DEFINED]
        self._marked, self._typed = self._match_any(marked), self._match_any(typed)
        takes_blanks = _PHI3.search(str(metadata.get("general.name", ""))) is not None
        self._takers = {i for i in marked if takes_blanks and self.tokens[i] not in _PHI3_KEPT}
        self._encode = self._build_pairs(metadata) if kind == "gpt2" else self._build_pieces(metadata)

    def tokenize(self, text: str, *, is_chat: bool = False) -> list[int]:
        """The ids of ``text`` without what llama.cpp would put around it; ``is_chat`` says whether it may hold control
        tokens.
        """
        ids: list[int] = []
        is_first = True
        for part in self._part(text, is_chat=is_chat):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += self._encode(part, is_first)
            is_first = isinstance(part, int)
        return ids

    def _part(self, text: str, *, is_chat: bool) -> Iterator[str | int]:
        """Yields the ids of tokens that are matched whole, and the text between them."""
        pattern, at, takes = self._marked if is_chat else self._typed, 0, False
        for found in pattern.finditer(text) if pattern else ():
            between = text[at : found.start()]
            if between := between.lstrip() if takes else between:
                yield between
            token = self._ids[found.group()]
            yield token
            at, takes = found.end(), token in self._takers
        if rest := text[at:].lstrip() if takes else text[at:]:
            yield rest

    def _match_any(self, tokens: list[int]) -> re.Pattern[str] | None:
        texts = sorted((self.tokens[i] for i in tokens if self.tokens[i]), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, texts))) if texts else None

    def _build_pairs(self, metadata: dict[str, Any]) -> Any:
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers

        pre = str(metadata.get("tokenizer.ggml.pre", "default"))
        words: Any = pre_tokenizers.ByteLevel(add_prefix_space=False)
        if pre in _DIGIT_PRE:
            words = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
        elif pre in _CUTS:
            cut = pre_tokenizers.Split(Regex(_CUTS[pre]), "isolated")
            words = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        elif pre not in _PLAIN_PRE:
            raise ContentError(f"the pre-tokenizer {pre} is not read")
        pairs = (merge.partition(" ") for merge in metadata.get("tokenizer.ggml.merges", []))
        known = self._ids.keys()
        merges = [(first, second) for first, _, second in pairs if {first, second, first + second} <= known]
        model = Tokenizer(models.BPE(self._ids, merges, ignore_merges=pre in _WHOLE_WORD_PRE))
        model.pre_tokenizer = words
        return lambda text, is_first: model.encode(text, add_special_tokens=False).ids

    def _build_pieces(self, metadata: dict[str, Any]) -> Any:
        scores, prepends = metadata["tokenizer.ggml.scores"], metadata.get("tokenizer.ggml.add_space_prefix", True)

        def encode(text: str, is_first: bool) -> list[int]:
            text = f" {text}" if prepends and is_first else text
            pieces = _join_pieces(list(text.replace(" ", "▁")), self._ids, scores)
            return [i for piece in pieces for i in self._spell_out(piece)]

        return encode

    def _spell_out(self, piece: str) -> list[int]:
        if piece in self._ids:
            return [self._ids[piece]]
        return [self._ids.get(f"<0x{byte:02X}>", 0) for byte in piece.encode()]


def _join_pieces(pieces: list[str], ids: dict[str, int], scores: list[float]) -> list[str]:
    """``pieces`` with neighbours joined, those of the highest score first, of equals the leftmost."""
    after, before = [*range(1, len(pieces)), -1], list(range(-1, len(pieces) - 1))
    queue: list[tuple[float, int, int, str]] = []

    def offer(left: int) -> None:
        right = after[left]
        if left >= 0 and right >= 0 and (token := ids.get(pieces[left] + pieces[right])) is not None:
            heapq.heappush(queue, (-scores[token], left, right, pieces[left] + pieces[right]))

    for i in range(len(pieces) - 1):
        offer(i)
    while queue:
        _, left, right, joined = heapq.heappop(queue)
        if not pieces[left] or not pieces[right] or after[left] != right or pieces[left] + pieces[right] != joined:
            continue
        pieces[left], pieces[right], after[left] = joined, "", after[right]
        if after[left] >= 0:
            before[after[left]] = left
            offer(left)
        if before[left] >= 0:
            offer(before[left])
    return [piece for piece in pieces if piece]
