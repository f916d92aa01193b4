"""A conversation → token ids and the loss mask, made together from one rendering of the chat template.

    template:  <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello<|im_end|>\\n
    mask:      ...........................................................#####^^^^^^^^^^..
                                                    generation prompt ends ┘        └ end of turn, trained

The tokenizer's own template is the only source of truth. Where a trained turn begins is found by rendering
the messages before it with the generation prompt, as inference does; where it ends is the end-of-turn token
that the template writes. Nothing is found by searching for role markers, and text in a message that looks
like a special token stays text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

from ftcli.data.message import Example, Message
from ftcli.errors import ContentError

TrainOn = str | Sequence[str]
Span = tuple[int, int]

# One private-use character (Unicode planes 15 and 16) stands for each special token that a message spells out.
_MARKERS = (*range(0xF0000, 0xFFFFE), *range(0x100000, 0x10FFFE))
_PROBE = "ftcliprobe"
_MELTED = "the first characters of a turn cannot be separated from the generation prompt"


@dataclass(frozen=True, slots=True)
class Rendered:
    """Token ids of one document and, of the same length, which of them are trained on."""

    ids: list[int]
    mask: list[bool]
    file: str
    line: int


class ChatRenderer:
    """Renders conversations with one tokenizer and its chat template.

    Args:
        tokenizer: a fast transformers tokenizer.
        template_kwargs: further variables of the template, such as ``enable_thinking``.
    """

    def __init__(self, tokenizer: Any, template_kwargs: Mapping[str, Any] | None = None) -> None:
        self.tokenizer = tokenizer
        self.template_kwargs = dict(template_kwargs or {})
        added = list(tokenizer.added_tokens_decoder.values())
        self._added = _match_any(token.content for token in added)
        self._special = _match_any(token.content for token in added if token.special)
        self._special_texts = sorted(token.content for token in added if token.special)
        self._literal: Any = None
        self._prompt_tails: dict[str, list[int]] = {}
        self._turn_ends: tuple[str, ...] = ()

    @property
    def end_of_turn_ids(self) -> list[int]:
        """Ids of the tokens that end an assistant's turn, the one of a last turn first.

        Raises:
            ContentError: the template writes no single token after an answer, so a model could never stop.
        """
        return [self.tokenizer.convert_tokens_to_ids(text) for text in self._probe_turn_ends()]

    def render(self, example: Example, train_on: TrainOn = "assistant") -> list[Rendered]:
        """The documents of one example: one, or one for each trained turn where the template rewrites history.

        Raises:
            ContentError: the template refuses the messages, or a trained turn does not begin where the
                inference prompt ends, or has no end-of-turn token.
        """
        if example.text is not None:
            return [self._render_raw(example)]
        trained = select_turns(example.messages, train_on)
        try:
            messages, tools, is_protected = self._protect(example)
            texts = self._find_spans(messages, tools, trained, whole=train_on == "all" and all(trained))
            documents = [self._encode(text, spans, is_protected) for text, spans in texts]
        except ContentError as error:
            raise ContentError(error.what, where=example.place, why=error.why, hint=error.hint) from error
        return [Rendered(ids, mask, example.file, example.line) for ids, mask in documents]

    def render_prompt(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> list[int]:
        """The ids that a model is given to answer ``messages``: everything up to the generation prompt's end."""
        example = Example(tuple(messages), None, tuple(tools) if tools else None, "prompt", 1)
        protected, protected_tools, is_protected = self._protect(example)
        text = self._apply_template(protected, protected_tools, prompt=True)
        return self._encode(text, [], is_protected)[0]

    def _render_raw(self, example: Example) -> Rendered:
        """The whole text and one end-of-sequence token, all of it trained."""
        text = example.text or ""
        tokenizer = self.tokenizer.backend_tokenizer
        if self._special.search(text):
            self._check_no_marker(text)
            tokenizer = self._literal_tokenizer()
        ids = list(tokenizer.encode(text, add_special_tokens=True).ids)
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise ContentError("the tokenizer has no end-of-sequence token", where=example.place)
        ids = ids if ids and ids[-1] == eos else [*ids, eos]
        return Rendered(ids, [True] * len(ids), example.file, example.line)

    # --- from messages to text and spans

    def _find_spans(
        self, messages: list[dict[str, Any]], tools: Any, trained: Sequence[bool], *, whole: bool
    ) -> list[tuple[str, list[Span]]]:
        """Texts with the character spans that are trained, in order of the turns."""
        text = self._apply_template(messages, tools)
        if whole:
            return [(text, [(0, len(text))])]
        turns = [i for i, is_trained in enumerate(trained) if is_trained]
        last = len(messages) - 1
        parts = [text if i == last else self._apply_template(messages[: i + 1], tools) for i in turns]
        spans = [self._find_span(part, messages, tools, i) for part, i in zip(parts, turns, strict=True)]
        if all(text.startswith(part[:end]) for part, (_, end) in zip(parts, spans, strict=True)):
            return [(text, spans)]
        # The template rewrites history: each turn is learned as, and in the context that, inference shows it.
        return [(part, [span]) for part, span in zip(parts, spans, strict=True)]

    def _find_span(self, text: str, messages: list[dict[str, Any]], tools: Any, index: int) -> Span:
        """Where turn ``index``, the last of ``text``, is trained: from its prompt's end through its end token."""
        start = self._find_start(text, messages, tools, index)
        tokens = list(self._added.finditer(text, start))
        turn_ends = self._probe_turn_ends()
        if end := next((token for token in tokens if token.group() in turn_ends), None):
            return start, end.end()
        # Another token ends this turn (after a tool call, say): the first of those that close the text.
        border, first = len(text), None
        for token in reversed(tokens):
            if text[token.end() : border].strip():
                break
            border, first = token.start(), token
        if first is not None:
            return start, first.end()
        raise ContentError(
            f"the chat template writes no end-of-turn token after messages[{index}]",
            why="a model trained on it would never stop",
            hint="use a chat_template that ends each turn with one special token",
        )

    def _find_start(self, text: str, messages: list[dict[str, Any]], tools: Any, index: int) -> int:
        """Where turn ``index`` begins in ``text``: for an assistant's turn the end of the inference prompt."""
        if messages[index]["role"] == "assistant":
            prompt = self._apply_template(messages[:index], tools, prompt=True)
            if text.startswith(prompt):
                return len(prompt)
            raise ContentError(
                f"the chat template does not continue its own generation prompt at messages[{index}]",
                why="the model would be trained in a context that inference never shows",
                hint="set tokenizer.chat_template_kwargs as at inference, or use another chat_template",
            )
        if index == 0:
            return 0
        common = _common_length(text, self._apply_template(messages[:index], tools))
        inside = (m.start() for m in self._added.finditer(text) if m.start() < common < m.end())
        return next(inside, common)

    def _probe_turn_ends(self) -> tuple[str, ...]:
        """The tokens that the template writes after an answer: in a last turn, and before another turn."""
        if not self._turn_ends:
            ask, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": _PROBE}
            found = []
            for messages in ([ask, answer], [ask, answer, ask]):
                rest = self._apply_template(messages, None).partition(_PROBE)[2]
                match = self._added.match(rest.lstrip())
                if match is None:
                    raise ContentError(
                        "the chat template writes no end-of-turn token after an answer",
                        why="a model trained on it would never stop",
                        hint="use a chat_template that ends each turn with one special token",
                    )
                found.append(match.group())
            self._turn_ends = tuple(dict.fromkeys(found))
        return self._turn_ends

    def _apply_template(self, messages: list[dict[str, Any]], tools: Any, *, prompt: bool = False) -> str:
        import jinja2

        if not self.tokenizer.chat_template:
            raise ContentError(
                "the tokenizer has no chat template",
                why="base models come without one, and ftcli never guesses",
                hint="set tokenizer.chat_template to a Jinja file, or train on text rows",
            )
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages,
                    tools=tools,
                    tokenize=False,
                    add_generation_prompt=prompt,
                    **self.template_kwargs,
                )
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
            raise ContentError(f"the chat template refuses the messages: {error}") from error

    # --- from text to ids and mask

    def _encode(self, text: str, spans: Sequence[Span], is_protected: bool) -> tuple[list[int], list[bool]]:
        """Ids of ``text`` and the mask of ``spans``; no token reaches over the start of a span."""
        tokenizer, tokens = self.tokenizer.backend_tokenizer, self._added
        if is_protected:
            text, spans = self._swap_markers(text, spans)
            tokenizer, tokens = self._literal_tokenizer(), self._marker_class
        starts = [start for start, _ in spans]
        encoding = tokenizer.encode(text, add_special_tokens=False)
        ids, offsets = list(encoding.ids), list(encoding.offsets)
        prompt_starts = [(_last_start(tokens, text, start), start) for start in starts]
        if not self._starts_are_clean(text, prompt_starts, ids, offsets, tokenizer):
            ids, offsets = _encode_pieces(tokenizer, text, starts)
        mask = [False] * len(ids)
        for start, end in spans:
            trained = [i for i, (first, last) in enumerate(offsets) if start <= first < end and first < last]
            if not trained or offsets[trained[-1]][1] < end:
                raise ContentError("the end of a trained turn has no token of its own")
            for position in trained:
                mask[position] = True
        return ids, mask

    def _starts_are_clean(
        self, text: str, prompts: Sequence[Span], ids: list[int], offsets: list[Span], tokenizer: Any
    ) -> bool:
        """Whether the ids before each start are those that the inference prompt has there."""
        for token_start, start in prompts:
            tail = text[token_start:start]
            if tail not in self._prompt_tails:
                self._prompt_tails[tail] = tokenizer.encode(tail, add_special_tokens=False).ids
            expected = self._prompt_tails[tail]
            n_before = sum(last <= start for _, last in offsets)
            straddles = n_before < len(offsets) and offsets[n_before][0] < start
            if straddles or ids[max(0, n_before - len(expected)) : n_before] != expected:
                return False
        return True

    # --- text that looks like a special token

    @cached_property
    def _markers(self) -> dict[str, str]:
        """Special token → the character that stands for it: none that the vocabulary knows (Gemma's has some)."""
        vocabulary = self.tokenizer.get_vocab()
        free = (chr(code) for code in _MARKERS if chr(code) not in vocabulary)
        return dict(zip(self._special_texts, free, strict=False))

    @cached_property
    def _marker_class(self) -> re.Pattern[str]:
        return re.compile(f"[{''.join(self._markers.values())}]")

    def _protect(self, example: Example) -> tuple[list[dict[str, Any]], Any, bool]:
        """The messages and tools for the template, with a marker for each special token that they spell out.

        The last value says whether there was one, which is rare.
        """
        messages = [message.to_template() for message in example.messages]
        tools = list(example.tools) if example.tools else None
        everything = json.dumps([messages, tools], ensure_ascii=False, default=str)
        if not self._special.search(everything):
            return messages, tools, False
        self._check_no_marker(everything)

        def replace(value: Any) -> Any:
            if isinstance(value, str):
                return self._special.sub(lambda match: self._markers[match.group()], value)
            if isinstance(value, Mapping):
                return {key: replace(item) for key, item in value.items()}
            return [replace(item) for item in value] if isinstance(value, list | tuple) else value

        return replace(messages), replace(tools), True

    def _check_no_marker(self, text: str) -> None:
        if self._marker_class.search(text):
            raise ContentError("holds a special token as text beside private-use characters")

    def _swap_markers(self, text: str, spans: Sequence[Span]) -> tuple[str, list[Span]]:
        """``text`` with typed special tokens spelled out and the template's own as markers, and its spans."""

        other = {**self._markers, **{marker: text for text, marker in self._markers.items()}}
        both = re.compile(f"{self._special.pattern}|{self._marker_class.pattern}")

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


def select_turns(messages: Sequence[Message], train_on: TrainOn) -> list[bool]:
    """For each message whether it is trained on; a message's own ``train`` wins over ``train_on``."""
    roles = {message.role for message in messages} if train_on == "all" else {"assistant"}
    if not isinstance(train_on, str):
        roles = set(train_on)
    chosen = [message.role in roles for message in messages]
    if train_on == "last_assistant":
        last = max((i for i, is_chosen in enumerate(chosen) if is_chosen), default=-1)
        chosen = [i == last for i in range(len(messages))]
    return [c if m.train is None else m.train for c, m in zip(chosen, messages, strict=True)]


def _match_any(texts: Any) -> re.Pattern[str]:
    """A pattern that matches the longest of ``texts``, or nothing at all when there are none."""
    ordered = sorted((re.escape(text) for text in texts if text), key=len, reverse=True)
    return re.compile("|".join(ordered) if ordered else r"(?!)")


def _common_length(first: str, second: str) -> int:
    """How many characters both texts begin with."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


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
