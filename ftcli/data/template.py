"""The chat template: Jinja source → the text of a conversation, exactly as inference writes it.

Compiled once, by transformers' own sandboxed environment, and given the variables that
``tokenizer.apply_chat_template`` gives it. A template that asks for the date (``strftime_now``) gets one that
the run has pinned, so that a resumed run sees the same text.
"""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, time
from functools import cached_property, partial
from importlib.resources import files
from itertools import takewhile
from pathlib import Path
from typing import Any

from ftcli.data.message import REASONING_KEYS
from ftcli.errors import ContentError, UsageError
from ftcli.recipe import BUNDLED_TEMPLATES

_IS_REASONING = frozenset(REASONING_KEYS)
_NO_END = "the chat template writes no end-of-turn token after an answer"
_TOO_LONG, _MOST_SECONDS = "the chat template takes longer than 20 s for one row", 20
_TOO_MUCH, _MOST_CHARACTERS = "the chat template writes too much", 1 << 28
_PROBE = "ftcliprobe"
_NULL_CONTENTS: tuple[dict[str, Any], ...] = ({}, {"content": None}, {"content": ""})
_CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": {"a": _PROBE}}}
# what only ever is a control token: <|eot_id|>, <｜User｜>, <start_of_turn>, [INST]
_PIPED = re.compile(r"<[|｜][^|｜<>\s]{1,40}[|｜]>")
_OTHER = re.compile(r"<(?:start|end)_of_turn>|\[/?[A-Z][A-Z_]{2,30}\]")


class ChatTemplate:
    """One chat template, ready to render.

    Args:
        source: the Jinja text; None where the tokenizer has none, and then rendering raises.
        special_tokens: ``bos_token`` and the like, as the tokenizer names them.
        variables: further variables of the template, such as ``enable_thinking``.
        date: what ``strftime_now`` says; None is the beginning of today.
    """

    def __init__(
        self,
        source: str | None,
        special_tokens: Mapping[str, Any] | None = None,
        variables: Mapping[str, Any] | None = None,
        date: datetime | None = None,
    ) -> None:
        self.source = source
        self.special_tokens = dict(special_tokens or {})
        self.variables = dict(variables or {})
        self._is_endless = self._is_timed = False
        self.date = date or datetime.combine(datetime.now().date(), time())

    @property
    def is_dated(self) -> bool:
        """Whether the text depends on the date."""
        return "strftime_now" in (self.source or "")

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Any = None, *, prompt: bool = False) -> str:
        """The text of ``messages``; with ``prompt`` up to where an answer begins.

        Raises:
            ContentError: there is no template, or it refuses the messages (with its own words).
        """
        if self._is_endless:
            raise ContentError(_TOO_LONG, why="it did so on a row before")
        compiled, known = self._compiled
        variables = {
            **known,
            "messages": self._fill_content(_name_reasoning(messages)),
            "tools": tools,
            "documents": None,
            "add_generation_prompt": prompt,
        }
        # what Template.render does, but for the copy of all globals that it makes at each call
        context = compiled.environment.context_class(compiled.environment, variables, compiled.name, compiled.blocks)
        is_timed = not self._is_timed and self._start_clock()
        try:
            text = "".join(compiled.root_render_func(context))
        except ContentError:
            raise
        except MemoryError as error:
            raise ContentError(_TOO_MUCH, why="it asks for more memory than there is") from error
        except Exception as error:  # a template is a program, and may fail like one
            raise ContentError(f"the chat template refuses the messages: {error}") from error
        finally:
            if is_timed:
                signal.setitimer(signal.ITIMER_REAL, 0)
        if len(text) > _MOST_CHARACTERS:
            raise ContentError(_TOO_MUCH, why=f"more than {_MOST_CHARACTERS:,} characters for one row")
        return text

    @contextmanager
    def timed(self) -> Iterator[Callable[[], object]]:
        """A block with one clock for all that is rendered in it; the yielded callable winds it up for the next row."""
        self._is_timed = self._start_clock()
        wind = partial(signal.setitimer, signal.ITIMER_REAL, _MOST_SECONDS) if self._is_timed else lambda: None
        try:
            yield wind
        finally:
            if self._is_timed:
                signal.setitimer(signal.ITIMER_REAL, 0)
            self._is_timed = False

    def _start_clock(self) -> bool:
        """Whether a clock runs that ends this rendering; a template from the Hub may loop for ever.

        Python hears signals in its main thread only.
        """
        if threading.current_thread() is not threading.main_thread():
            return False
        signal.signal(signal.SIGALRM, self._stop_rendering)
        signal.setitimer(signal.ITIMER_REAL, _MOST_SECONDS)
        return True

    def _stop_rendering(self, number: int, frame: Any) -> None:
        self._is_endless = True
        raise ContentError(_TOO_LONG, hint="look at its loops, or use another chat_template")

    def _fill_content(self, messages: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        """``messages`` with what this template bears in the place of content that is null."""
        if None not in [message["content"] for message in messages]:
            return messages
        filled = []
        for message in messages:
            if message["content"] is None:
                message = {key: value for key, value in message.items() if key != "content"} | self._null_content
            filled.append(message)
        return filled

    @cached_property
    def _null_content(self) -> dict[str, Any]:
        """What stands for null content: no key, as transformers has it; null or an empty text where that fails.

        A turn of tool calls has no content, and many templates stumble over that, or write ``None``.
        """
        turns = ({"tool_calls": [_CALL]}, {"reasoning_content": _PROBE, "thinking": _PROBE})
        ask, scores = {"role": "user", "content": "a"}, []
        for given in _NULL_CONTENTS:
            self.__dict__["_null_content"] = given  # while this is found out
            texts = [self._try_render([ask, {"role": "assistant", "content": None, **turn}]) for turn in turns]
            scores.append(sum(text is not None and "None" not in text for text in texts))
        return _NULL_CONTENTS[scores.index(max(scores))]

    @cached_property
    def _compiled(self) -> tuple[Any, dict[str, Any]]:
        """The template, and all that it knows besides messages and tools."""
        if not self.source:
            raise ContentError(
                "the tokenizer has no chat template",
                why="base models come without one, and ftcli never guesses",
                hint=f"set tokenizer.chat_template to {', '.join(BUNDLED_TEMPLATES)} or a Jinja file, "
                "or train on text rows",
            )
        import jinja2
        from transformers.utils.chat_template_utils import _compile_jinja_template

        try:
            compiled = _compile_jinja_template(self.source)
        except (jinja2.TemplateError, RecursionError) as error:
            line = getattr(error, "lineno", None)
            place = f" (line {line})" if line else ""
            raise ContentError(f"the chat template is no valid Jinja: {error}{place}") from error
        own = {**self.special_tokens, **self.variables, "strftime_now": self.date.strftime}
        return compiled, {**compiled.globals, **own}

    def render_question(self) -> str | None:
        """The prompt of the shortest chat; None where the template cannot write it."""
        try:
            return self.render([{"role": "user", "content": "a"}], prompt=True)
        except ContentError:
            return None

    def render_sample(self) -> str:
        """A small chat, with a system text where the template takes one; in brackets why it takes none at all."""
        turns = [{"role": "user", "content": "Question?"}, {"role": "assistant", "content": "Answer."}]
        try:
            return self.render([{"role": "system", "content": "Rules."}, *turns])
        except ContentError:
            pass
        try:
            return self.render(turns)
        except ContentError as error:
            return f"({error.what})"

    def find_turn_ends(self, added: re.Pattern[str]) -> tuple[str, ...]:
        """The tokens (of those that ``added`` matches) that end an answer, and a turn of tool calls if another does.

        Raises:
            ContentError: nothing ends an answer, so a model could never stop.
        """
        ask, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": _PROBE}
        rest = self.render([ask, answer]).partition(_PROBE)[2].lstrip()
        if added.match(rest) is None:
            written = _PIPED.match(rest) or _OTHER.match(rest)
            raise ContentError(
                _NO_END,
                why=f"it writes {written.group()}, which is no single token of this vocabulary"
                if written
                else "a model trained on it would never stop",
                hint="use a chat_template that ends each turn with one special token",
            )
        # a turn's end stands there before another question too; an end of text may follow behind the last turn
        last = _list_adjacent(added, rest)
        inner = _list_adjacent(added, _cut_probe(self._try_render([ask, answer, ask])))
        common = [token for token, other in takewhile(lambda pair: pair[0] == pair[1], zip(last, inner, strict=False))]
        end = (common or last[:1])[-1]
        call = {"role": "assistant", "content": None, "tool_calls": [_CALL]}
        called = added.findall(_cut_probe(self._try_render([ask, call])))
        return (end, *(called[-1:] if end not in called else ()))

    def _try_render(self, messages: Sequence[Mapping[str, Any]]) -> str | None:
        """The text of ``messages``, None where the template refuses them."""
        try:
            return self.render(messages)
        except ContentError:
            return None

    def list_control_tokens(self, *, strict: bool) -> list[str]:
        """The control tokens that the source writes; with ``strict`` also those in brackets and words.

        Older templates write ``[INST]`` as ordinary text on purpose, so only a piped one is surely a token.
        """
        source = re.sub(r"\{#.*?#\}", "", self.source or "", flags=re.DOTALL)
        found = _PIPED.findall(source) + (_OTHER.findall(source) if strict else [])
        return [token for token in dict.fromkeys(found) if "'" not in token and '"' not in token]


def _cut_probe(text: str | None) -> str:
    """What stands behind the last probe in ``text``."""
    return (text or "").rpartition(_PROBE)[2].lstrip()


def _list_adjacent(added: re.Pattern[str], text: str) -> list[str]:
    """The tokens with which ``text`` begins, without a blank (some vocabularies have tokens for these) between them."""
    tokens: list[str] = []
    position = 0
    while (match := added.match(text, position)) and match.group().strip():
        tokens.append(match.group())
        position = match.end()
    return tokens


def read_template(name: str) -> str:
    """The Jinja source of a bundled template, or of a file.

    Raises:
        UsageError: the file cannot be read.
    """
    if name in BUNDLED_TEMPLATES:
        return (files("ftcli.data") / "templates" / f"{name}.jinja").read_text(encoding="utf-8").removesuffix("\n")
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UsageError(f"the chat template cannot be read: {reason}", where=name) from error


def _name_reasoning(messages: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """``messages`` with an answer's reasoning under the names that templates read, whichever the row has."""
    if all(_IS_REASONING.isdisjoint(message) for message in messages):
        return messages
    named = []
    for message in messages:
        reasoning = next((message[key] for key in REASONING_KEYS if message.get(key) is not None), None)
        if reasoning is not None:
            message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
        named.append(message)
    return named
