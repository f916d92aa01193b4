"""How a chat template lays out a conversation: a few shapes with slots, measured, for runtimes without Jinja.

    <s>[INST] Rules.\\n\\nQ[/INST] A</s>      system   with the last question
       ╰ask_open          ╰answer_open       ask_open "[INST] ", ask_close "[/INST]", answer_open " ", …

Nothing is known of any family: conversations of marked texts are rendered by the template, and a slot is what it
writes between two of them. A shape counts only once it writes what the template writes, whatever the length of the
conversation, with and without a system text, and where an answer is to be continued.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from ftcli.data.template import ChatTemplate
from ftcli.errors import ContentError

_MOST_QUESTIONS = 4
_RULES, _REASON, _ASKS, _ANSWERS = "ftclirules", "ftclireason", ("ftcliasko", "ftcliaskt"), ("ftclianswer",)
# what a template might escape, cut or take for something of its own
_AWKWARD = "{}: \"q\" <b> & 'c' \\ {{{{ d }}}} {{% e %}}\n\n- é 你好"


@dataclass(frozen=True)
class Shape:
    """The slots of a chat template; ``write`` puts them together as a Go template does.

    ``system`` says where the system text stands: a turn ``anywhere`` or in ``front``; before the ``first`` question,
    before the ``last``, or before the last if it is the ``final`` message; empty where the template takes none.
    ``head`` begins every text, and ``default`` follows without a system text. ``final_open`` stands before an answer
    that is continued, and ``reasoning`` before (after ``answer_open``) and behind the reasoning of such an answer, or
    of each if it is kept.
    """

    bos: str
    default: str
    ask_open: str
    ask_close: str
    answer_open: str
    answer_close: str
    final_open: str
    prompt: str
    head: str = ""
    system: str = ""
    system_open: str = ""
    system_close: str = ""
    reasoning: tuple[str, str] | None = None
    keeps_reasoning: bool = False

    def write(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The text of ``messages`` up to where an answer begins, or goes on."""
        rules = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
        rules = rules if self.system else ""
        asks = [i for i, message in enumerate(messages) if message["role"] == "user"]
        place = {"first": asks[:1], "last": asks[-1:], "final": [len(messages) - 1]}.get(self.system, [])
        parts = [self.bos, self.head, self._begin(messages, rules)]
        for i, message in enumerate(messages):
            content, is_final = message["content"], i == len(messages) - 1
            if message["role"] == "user":
                opened = self.system_open + rules + self.system_close if rules and i in place else self.ask_open
                parts += [opened, content, self.ask_close]
            elif message["role"] == "assistant":
                opened = self._open_answer(message.get("reasoning_content") or "", is_final)
                parts += [opened, content, "" if is_final else self.answer_close]
            elif self.system == "anywhere":
                parts += [self.system_open, content, self.system_close]
        return "".join(parts) + (self.prompt if messages[-1]["role"] != "assistant" else "")

    def _begin(self, messages: Sequence[Mapping[str, Any]], rules: str) -> str:
        if self.system == "anywhere":
            return "" if messages[0]["role"] == "system" else self.default
        if self.system == "front" and rules:
            return self.system_open + rules + self.system_close
        return "" if self.system == "first" and rules else self.default

    def _open_answer(self, reason: str, is_final: bool) -> str:
        if reason and self.reasoning and (is_final or self.keeps_reasoning):
            return self.answer_open + self.reasoning[0] + reason + self.reasoning[1]
        return self.final_open if is_final else self.answer_open


def measure_shape(template: ChatTemplate, added: re.Pattern[str], *, adds_bos: bool = False) -> Shape:
    """The shape that writes what ``template`` writes; ``added`` matches the tokens that no slot may cut through.

    With ``adds_bos`` a BOS that the text begins with has a slot of its own, even if turns begin with it as well.

    Raises:
        ContentError: there is none, or the template refuses a plain conversation.
    """
    probe = _Probe(template, added, adds_bos)
    shape = probe.measure_turns()
    shape = probe.measure_system(shape)
    for conversation in list_conversations(has_system=bool(shape.system)):
        _check(shape, template, conversation)
    thinking = probe.measure_reasoning(shape)
    if thinking.reasoning:
        try:
            for conversation in list_conversations(has_system=bool(shape.system), has_reasoning=True):
                _check(thinking, template, conversation)
        except ContentError:
            return shape  # an answer's reasoning stays in its content
    return thinking


def list_conversations(*, has_system: bool, has_reasoning: bool = False) -> Iterator[list[dict[str, Any]]]:
    """Conversations of every length that a shape is checked on; the last message may be an answer to continue."""
    for n_messages in range(1, 2 * _MOST_QUESTIONS + 1):
        turns: list[dict[str, Any]] = []
        for i in range(n_messages):
            role = "assistant" if i % 2 else "user"
            turns.append({"role": role, "content": _AWKWARD.format(f"{role} {i}")})
            if has_reasoning and i % 2:
                turns[-1]["reasoning_content"] = _AWKWARD.format(f"reason {i}")
        yield turns
        if has_system:
            yield [{"role": "system", "content": _AWKWARD.format("rules")}, *turns]


def _check(shape: Shape, template: ChatTemplate, messages: Sequence[Mapping[str, Any]]) -> None:
    """None where the shape writes what the template writes of ``messages``.

    Raises:
        ContentError: it writes something else.
    """
    is_continued = messages[-1]["role"] == "assistant"
    expected, found = template.render(messages, prompt=not is_continued), shape.write(messages)
    # behind an answer to continue stands its end, which is not written yet
    if expected != found and not (is_continued and expected.startswith(found)):
        n_same = _count_common(expected, found)
        raise ContentError(
            f"the chat template fits no shape: of {_describe(messages)} it writes {expected[n_same : n_same + 24]!r} "
            f"where {found[n_same : n_same + 24]!r} was looked for"
        )


def _describe(messages: Sequence[Mapping[str, Any]]) -> str:
    return "-".join(message["role"] for message in messages)


class _Probe:
    """Conversations of marked texts, and what the template writes around them."""

    def __init__(self, template: ChatTemplate, added: re.Pattern[str], adds_bos: bool) -> None:
        self.template, self.added, self.bos = template, added, ""
        bos = template.special_tokens.get("bos_token")
        text = self._render([_ask(0), _answer(), _ask(1)], prompt=True)
        if bos and text.startswith(bos) and (adds_bos or text.count(bos) == 1):
            self.bos = bos

    def measure_turns(self) -> Shape:
        """The slots of questions and answers."""
        start, inner, after, _ = self._find_gaps([_ask(0), _answer(), _ask(1)], prompt=True)
        _, asked = self._find_gaps([_ask(0)], prompt=True)
        _, bare = self._find_gaps([_ask(0)], prompt=False)
        _, continued, ended = self._find_gaps([_ask(0), _answer()], prompt=False)
        closed = len(self._common_start([after, ended]))
        ask_open = self._common_end(start, after[closed:])
        ask_close = self._common_start([bare, inner, continued, asked])
        n_closed = len(ask_close)
        return Shape(
            bos=self.bos,
            default=start.removesuffix(ask_open),
            ask_open=ask_open,
            ask_close=ask_close,
            answer_open=inner[n_closed:],
            answer_close=after.removesuffix(ask_open),
            final_open=continued[n_closed:],
            prompt=asked[n_closed:],
        )

    def measure_system(self, shape: Shape) -> Shape:
        """``shape`` with the slots of a system text, as it is where the template refuses one or leaves it out."""
        rules = {"role": "system", "content": _RULES}
        try:
            text = self._render([rules, _ask(0)], prompt=True)
        except ContentError:
            return shape
        if _RULES not in text:
            return shape
        turns = [_ask(0), _answer(), _ask(1)]
        longer = self._render([rules, *turns], prompt=True)
        if longer.find(_RULES) > longer.find(_ASKS[0]):
            _, _, opened, closed, _ = _split(longer, [*turns[:2], rules, turns[2]])
            is_last = _RULES in self._render([rules, *turns[:2]], prompt=False)
            opened = opened.removeprefix(shape.answer_close)
            return replace(shape, system="last" if is_last else "final", system_open=opened, system_close=closed)
        opened, closed, _ = _split(text, [rules, _ask(0)])
        if not closed.endswith(shape.ask_open):
            return replace(shape, system="first", system_open=opened, system_close=closed)
        closed = closed.removesuffix(shape.ask_open)
        whole = replace(shape, system="anywhere", system_open=opened, system_close=closed)
        head = self._common_start([opened, shape.default])
        opened, default = opened.removeprefix(head), shape.default.removeprefix(head)
        headed = replace(whole, head=head, system_open=opened, default=default)
        for anywhere in (whole, headed):
            try:
                _check(anywhere, self.template, [*turns[:2], rules, turns[2]])
                _check(anywhere, self.template, [rules, _ask(0)])
            except ContentError:
                continue
            return anywhere
        return replace(headed, system="front")

    def measure_reasoning(self, shape: Shape) -> Shape:
        """``shape`` with the slots of an answer's reasoning, as it is where the template has no place for one.

        Where the generation prompt does not lead to them (it closes an empty reasoning, say), there is none to come.
        """
        reasoned = {**_answer(), "reasoning_content": _REASON}
        reason = {"content": _REASON}
        try:
            _, opened, closed, _ = self._find_gaps([_ask(0), reasoned], [_ask(0), reason, _answer()], prompt=False)
            before = shape.ask_close + shape.answer_open
            asked = shape.ask_close + shape.prompt
            if not (opened.startswith(before) and asked.startswith(before) and opened.startswith(asked)):
                return shape
            is_kept = _REASON in self._render([_ask(0), reasoned, _ask(1)], prompt=True)
        except ContentError:
            return shape
        return replace(shape, reasoning=(opened.removeprefix(before), closed), keeps_reasoning=is_kept)

    def _render(self, messages: Sequence[Mapping[str, Any]], *, prompt: bool) -> str:
        return self.template.render(messages, prompt=prompt).removeprefix(self.bos)

    def _find_gaps(
        self,
        messages: Sequence[Mapping[str, Any]],
        parts: Sequence[Mapping[str, Any]] | None = None,
        *,
        prompt: bool,
    ) -> list[str]:
        return _split(self._render(messages, prompt=prompt), parts or messages)

    def _common_start(self, texts: Sequence[str]) -> str:
        """What all of ``texts`` begin with, up to the border of a token."""
        n_common = _count_common(*texts)
        inside = (m.start() for text in texts for m in self.added.finditer(text) if m.start() < n_common < m.end())
        return texts[0][: min(inside, default=n_common)]

    def _common_end(self, first: str, second: str) -> str:
        """What both texts end with, from the border of a token on."""
        n_common = _count_common(first[::-1], second[::-1])
        for text in (first, second):
            start = len(text) - n_common
            n_common = min(
                (len(text) - m.end() for m in self.added.finditer(text) if m.start() < start < m.end()),
                default=n_common,
            )
        return first[len(first) - n_common :]


def _count_common(*texts: str) -> int:
    """How many characters all of ``texts`` begin with."""
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*texts, strict=False)))


def _ask(number: int) -> dict[str, Any]:
    return {"role": "user", "content": _ASKS[number]}


def _answer() -> dict[str, Any]:
    return {"role": "assistant", "content": _ANSWERS[0]}


def _split(text: str, parts: Sequence[Mapping[str, Any]]) -> list[str]:
    """What stands before, between and behind the contents of ``parts`` in ``text``.

    Raises:
        ContentError: one is missing, there twice, or not in its place.
    """
    gaps = []
    rest = text
    for part in parts:
        gap, found, rest = rest.partition(part["content"])
        if not found or text.count(part["content"]) != 1:
            raise ContentError("the chat template does not write each message once and in its place")
        gaps.append(gap)
    return [*gaps, rest]
