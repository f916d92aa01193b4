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

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from ftcli.data.encoder import MarkedText, Span, TextEncoder
from ftcli.data.message import Example, Message
from ftcli.data.template import ChatTemplate
from ftcli.errors import ContentError

TrainOn = str | Sequence[str]


@dataclass(frozen=True, slots=True)
class Rendered:
    """Token ids of one document and, of the same length, which of them are trained on."""

    ids: list[int]
    mask: list[bool]
    file: str
    line: int


@dataclass(frozen=True, slots=True)
class RenderedRow:
    """What came of one example: its documents with the texts that they encode, or why there are none."""

    example: Example
    documents: list[Rendered] = field(default_factory=list)
    texts: list[MarkedText] = field(default_factory=list)
    error: ContentError | None = None


class ChatRenderer:
    """Renders conversations with one tokenizer and its chat template.

    Args:
        tokenizer: a fast transformers tokenizer.
        template_kwargs: further variables of the template, such as ``enable_thinking``.
        date: what a template that asks for the date is told; None is today.
    """

    def __init__(
        self, tokenizer: Any, template_kwargs: Mapping[str, Any] | None = None, *, date: datetime | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens_map, template_kwargs, date)
        self.encoder = TextEncoder(tokenizer)
        self._turn_ends: tuple[str, ...] = ()

    @property
    def end_of_turn_ids(self) -> list[int]:
        """Ids of the tokens that end an assistant's turn, the one of a last turn first.

        Raises:
            ContentError: the template writes no single token after an answer, so a model could never stop.
        """
        return [self.tokenizer.convert_tokens_to_ids(text) for text in self.find_turn_ends()]

    def find_turn_ends(self) -> tuple[str, ...]:
        """The texts of `end_of_turn_ids`; raises as it does."""
        if not self._turn_ends:
            self._turn_ends = self.template.find_turn_ends(self.encoder.added)
        return self._turn_ends

    def render(self, example: Example, train_on: TrainOn = "assistant") -> list[Rendered]:
        """The documents of one example: one, or one for each trained turn where the template rewrites history.

        Raises:
            ContentError: the template refuses the messages, or a trained turn does not begin where the
                inference prompt ends, or has no end-of-turn token.
        """
        (row,) = self.render_rows([example], train_on)
        if row.error:
            raise row.error
        return row.documents

    def render_rows(
        self, examples: Sequence[Example], train_on: TrainOn = "assistant", *, n_expected: int = 0
    ) -> list[RenderedRow]:
        """One row for each example, in their order; rows that cannot be rendered carry their error.

        Args:
            examples: a batch, a few thousand at most.
            train_on: the turns that are learned.
            n_expected: rows still to come with these; many make a faster way to the same ids worth its set-up.
        """
        marked: list[list[MarkedText] | ContentError] = []
        with self.template.timed() as wind:
            for example in examples:
                wind()
                try:
                    marked.append([] if example.text is not None else self.mark(example, train_on))
                except ContentError as error:
                    marked.append(error)
        texts = [text for found in marked if isinstance(found, list) for text in found]
        n_characters = sum(len(text.text) for text in texts)
        self.encoder.expect(n_characters * max(n_expected, len(examples)) // max(1, len(examples)))
        encoded = iter(self.encoder.encode(texts))
        rows = []
        for example, found in zip(examples, marked, strict=True):
            if isinstance(found, ContentError):
                rows.append(RenderedRow(example, error=found))
            elif example.text is not None:
                rows.append(self._render_raw(example))
            else:
                rows.append(_gather_row(example, found, [next(encoded) for _ in found]))
        return rows

    def render_prompt(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> list[int]:
        """The ids that a model is given to answer ``messages``: everything up to the generation prompt's end."""
        turns, wanted, is_protected = self._protect(Example(tuple(messages), None, tuple(tools or ()), "prompt", 1))
        text = self.template.render(turns, wanted, prompt=True)
        return self.encoder.encode_one(MarkedText(text, [], is_protected))[0]

    def mark(self, example: Example, train_on: TrainOn = "assistant") -> list[MarkedText]:
        """The texts of one conversation with the spans of them that are trained.

        Raises:
            ContentError: as `render`.
        """
        trained = select_turns(example.messages, train_on)
        try:
            messages, tools, is_protected = self._protect(example)
            texts = self._find_spans(messages, tools, trained, whole=train_on == "all" and all(trained))
        except ContentError as error:
            raise _place_error(error, example) from error
        return [MarkedText(text, spans, is_protected) for text, spans in texts]

    def _render_raw(self, example: Example) -> RenderedRow:
        """The whole text and one end-of-sequence token, all of it trained."""
        eos = self.tokenizer.eos_token_id
        if eos is None:
            error = ContentError("the tokenizer has no end-of-sequence token", where=example.place)
            return RenderedRow(example, error=error)
        try:
            ids = self.encoder.encode_raw(example.text or "")
        except ContentError as error:
            return RenderedRow(example, error=_place_error(error, example))
        ids = ids if ids and ids[-1] == eos else [*ids, eos]
        return RenderedRow(example, [Rendered(ids, [True] * len(ids), example.file, example.line)])

    def _protect(self, example: Example) -> tuple[list[dict[str, Any]], Any, bool]:
        """The messages and tools for the template, and whether markers stand in them for typed special tokens."""
        messages = [message.to_template() for message in example.messages]
        tools = list(example.tools) if example.tools else None
        search = self.encoder.special.search
        is_plain = tools is None and not any(message.extra for message in example.messages)
        if is_plain and not any(message.content and search(message.content) for message in example.messages):
            return messages, None, False
        (messages, tools), is_protected = self.encoder.protect([messages, tools])
        return messages, tools, is_protected

    def _find_spans(
        self, messages: list[dict[str, Any]], tools: Any, trained: Sequence[bool], *, whole: bool
    ) -> list[tuple[str, list[Span]]]:
        """Texts with the character spans that are trained, in order of the turns."""
        text = self.template.render(messages, tools)
        if whole:
            return [(text, [(0, len(text))])]
        turns = [i for i, is_trained in enumerate(trained) if is_trained]
        last = len(messages) - 1
        parts = [text if i == last else self.template.render(messages[: i + 1], tools) for i in turns]
        spans = [self._find_span(part, messages, tools, i) for part, i in zip(parts, turns, strict=True)]
        if all(text.startswith(part[:end]) for part, (_, end) in zip(parts, spans, strict=True)):
            return [(text, spans)]
        # The template rewrites history: each turn is learned as, and in the context that, inference shows it.
        return [(part, [span]) for part, span in zip(parts, spans, strict=True)]

    def _find_span(self, text: str, messages: list[dict[str, Any]], tools: Any, index: int) -> Span:
        """Where turn ``index``, the last of ``text``, is trained: from its prompt's end through its end token."""
        start = self._find_start(text, messages, tools, index)
        closing = self._list_closing(text, start)
        turn_ends, end_of_text = self.find_turn_ends(), self.tokenizer.eos_token
        for token in closing:
            if token.group() in turn_ends:
                return start, token.end()
        # Another token ends this turn (after a tool call, say): the last one, but for a final end of text.
        special = [token for token in closing if self.encoder.special.fullmatch(token.group())] or closing[:1]
        if len(special) > 1 and special[-1].group() == end_of_text:
            del special[-1]
        if special:
            return start, special[-1].end()
        raise ContentError(
            f"the chat template writes no end-of-turn token after messages[{index}]",
            why="a model trained on it would never stop",
            hint="use a chat_template that ends each turn with one special token",
        )

    def _list_closing(self, text: str, start: int) -> list[re.Match[str]]:
        """The tokens from ``start`` on with nothing but blanks between them and after them: those that close ``text``.

        A turn may hold more of the same further up (gpt-oss writes reasoning and answer as two messages).
        """
        border = len(text)
        closing: list[re.Match[str]] = []
        for token in reversed(list(self.encoder.added.finditer(text, start))):
            if text[token.end() : border].strip():
                break
            border = token.start()
            closing.insert(0, token)
        return closing

    def _find_start(self, text: str, messages: list[dict[str, Any]], tools: Any, index: int) -> int:
        """Where turn ``index`` begins in ``text``: for an assistant's turn the end of the inference prompt."""
        if messages[index]["role"] == "assistant":
            prompt = self.template.render(messages[:index], tools, prompt=True)
            if text.startswith(prompt):
                return len(prompt)
            raise ContentError(
                f"the chat template does not continue its own generation prompt at messages[{index}]",
                why="the model would be trained in a context that inference never shows",
                hint="set tokenizer.chat_template_kwargs as at inference, or use another chat_template",
            )
        if index == 0:
            return 0
        common = _common_length(text, self.template.render(messages[:index], tools))
        inside = (m.start() for m in self.encoder.added.finditer(text) if m.start() < common < m.end())
        return next(inside, common)


def _gather_row(
    example: Example, texts: list[MarkedText], encoded: Sequence[tuple[list[int], list[bool]] | ContentError]
) -> RenderedRow:
    documents = []
    for found in encoded:
        if isinstance(found, ContentError):
            return RenderedRow(example, error=_place_error(found, example))
        documents.append(Rendered(*found, example.file, example.line))
    return RenderedRow(example, documents, texts)


def _place_error(error: ContentError, example: Example) -> ContentError:
    return ContentError(error.what, where=example.place, why=error.why, hint=error.hint)


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


def _common_length(first: str, second: str) -> int:
    """How many characters both texts begin with."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))
