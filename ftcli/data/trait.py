"""What is to be said of single rows: a flag for each thing that a template did to one, found while it is rendered.

Flags lie in the table of rows (and so in the cache), so that a warm start reports what a cold one did. What they
mean to a person, `check` says.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from enum import IntFlag
from typing import TYPE_CHECKING, Any

from ftcli.data.message import REASONING_KEYS

if TYPE_CHECKING:
    from ftcli.data.chat import RenderedRow


class Trait(IntFlag):
    """Something about one row."""

    TYPED_SPECIAL = 1  # a message spells out a special token
    SPLIT = 2  # a document of its own for each trained turn
    SYSTEM_LOST = 4  # the system text is not in what is trained
    TOOLS_LOST = 8  # the tools are not
    CALLS_LOST = 16  # nor are the tool calls
    REASONING_LOST = 32  # nor is the reasoning
    CALLS_QUOTED = 64  # arguments, given as text, stand in it as quoted text
    CONTENT_LOST = 128  # a part of a question or an answer is not in it


def find_traits(rendered: RenderedRow, spell_out: Callable[[str], str]) -> Trait:
    """The flags of one rendered row; ``spell_out`` puts typed special tokens in the place of their markers."""
    found = Trait(0)
    example = rendered.example
    if any(text.is_protected for text in rendered.texts):
        found |= Trait.TYPED_SPECIAL
    if len(rendered.texts) > 1:
        found |= Trait.SPLIT
    if not rendered.texts:
        return found
    texts = [spell_out(text.text) if text.is_protected else text.text for text in rendered.texts]
    if _loses_content(example.messages, "".join(texts)):
        found |= Trait.CONTENT_LOST
    if example.messages[0].role == "user" and not example.tools and not _has_extra(example):
        return found
    first, *others = example.messages
    system = [m.content.strip() for m in others if m.role in ("system", "developer") and m.content]
    leading = first.content.strip() if first.role in ("system", "developer") and first.content else ""
    if _is_lost(leading, texts) or any(_is_lost(text, ["".join(texts)]) for text in system):
        found |= Trait.SYSTEM_LOST
    if any(_is_lost(_name_tool(tool), texts) for tool in example.tools or ()):
        found |= Trait.TOOLS_LOST
    reasoning = [m.extra[key].strip() for m in example.messages for key in REASONING_KEYS if _is_text(m.extra.get(key))]
    if any(text not in "".join(texts) for text in reasoning):
        found |= Trait.REASONING_LOST
    return found | _find_call_traits(example.messages, "".join(texts))


def _loses_content(messages: Sequence[Any], text: str) -> bool:
    """Whether a question or an answer does not stand in ``text`` as it is, blanks apart."""
    missing = [m.content for m in messages if m.content and m.content not in text and m.role in ("user", "assistant")]
    if not missing:
        return False
    squeezed = "".join(text.split())
    return any("".join(content.split()) not in squeezed for content in missing)


def _find_call_traits(messages: Sequence[Any], text: str) -> Trait:
    found = Trait(0)
    for call in (call for message in messages for call in message.extra.get("tool_calls", ())):
        function = call.get("function", call)
        given = function.get("arguments")
        if str(function.get("name", "")) not in text:
            found |= Trait.CALLS_LOST
        if isinstance(given, str):
            is_quoted = json.dumps(given, ensure_ascii=False) in text
            found |= Trait.CALLS_QUOTED if is_quoted and given not in text else Trait(0)
        elif isinstance(given, Mapping) and any(not _stands_in(value, text) for value in given.values()):
            found |= Trait.CALLS_LOST
    return found


def _stands_in(value: Any, text: str) -> bool:
    """Whether a value's letters and digits are in ``text``; what a template formats in its own way is not judged."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        return True
    plain = str(value)
    return not plain.isascii() or any(form in text for form in (plain, json.dumps(plain), json.dumps(plain)[1:-1]))


def _is_lost(wanted: str, texts: Sequence[str]) -> bool:
    quoted = json.dumps(wanted, ensure_ascii=False)[1:-1]
    return any(wanted not in text and quoted not in text for text in texts)


def _name_tool(tool: Any) -> str:
    inner = tool.get("function", tool) if isinstance(tool, Mapping) else {}
    return str(inner.get("name", "")) if isinstance(inner, Mapping) else ""


def _has_extra(example: Any) -> bool:
    return any(message.extra or message.role in ("system", "developer") for message in example.messages)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())
