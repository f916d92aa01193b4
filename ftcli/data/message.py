"""Rows to conversations: five ways to write one down, read into the same messages.

    messages           {"messages": [{"role": "user", "content": "…"}, …], "tools"?: […], "system"?: "…"}
    sharegpt           {"conversations": [{"from": "human", "value": "…"}, …], "tools"?: …, "system"?: …}
    alpaca             {"instruction": "…", "input"?: "…", "output": "…", "system"?, "history"?: [[q, a], …]}
    prompt_completion  {"prompt": "…", "completion": "…"}, or two lists of messages
    text               {"text": "…"}

Every text is kept to the last blank. A key whose value is null counts as missing, because exports of
tables fill with null what a row does not have. Nothing here knows a template or a token (`chat` does).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ftcli.data.json_text import JsonError, name_type, parse_json
from ftcli.data.source import Row
from ftcli.errors import ContentError

FORMATS = ("messages", "sharegpt", "alpaca", "prompt_completion", "text")
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")

# In the order of detection: a row with messages and a text is a conversation with its rendering beside it.
KEYS_NEEDED = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
_SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model", "function_call"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "observation"), "tool"),
    **{role: role for role in ("developer", "function", "ipython")},
}
_NOTHING: dict[str, Any] = {}
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_PREFERENCE_KEYS = frozenset(("chosen", "rejected", "kto_tag", "label"))
_OWN_KEYS = ("role", "content", "train", "weight")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn; ``extra`` holds what the row says besides: tool_calls, name, reasoning_content, …"""

    role: str
    content: str | None
    train: bool | None = None  # the row's own word on whether the turn is learned; None: as train_on says
    extra: Mapping[str, Any] = field(default_factory=lambda: _NOTHING)

    def to_template(self) -> dict[str, Any]:
        """The message as a chat template sees it; ``content`` is there even if it is None."""
        return {"role": self.role, "content": self.content, **self.extra}


@dataclass(frozen=True, slots=True)
class Example:
    """What one row teaches: a conversation, or (then ``messages`` is empty) a raw text."""

    messages: tuple[Message, ...]
    text: str | None
    tools: tuple[Any, ...] | None
    file: str
    line: int
    format: str = "messages"

    @property
    def place(self) -> str:
        """Where the row stands, as errors print it: ``train.jsonl:12``."""
        return f"{self.file}:{self.line}"


def detect_format(row: Row) -> str:
    """The format, one of FORMATS, that the row's keys fit.

    Raises:
        ContentError: no format fits, or the row compares answers (a preference set).
    """
    check_preference(row)
    keys = [key for key, value in row.value.items() if value is not None]
    if fitting := _list_fitting(row):
        return fitting[0]
    needs = "\n  ".join(f"{name} needs {' and '.join(needed)}" for name, needed in KEYS_NEEDED.items())
    what = f"no known format has the keys {', '.join(keys) or '(none)'}"
    hint = "say which column is which, such as columns: {prompt: question, completion: answer}"
    raise ContentError(what, where=row.place, why=needs, hint=hint)


def check_preference(row: Row) -> None:
    """None if the row shows what to learn, not which of two answers is better or whether one is good.

    Raises:
        ContentError: it does the latter; learning it all would teach what was marked as bad.
    """
    if _PREFERENCE_KEYS.isdisjoint(row.value):
        return
    value = row.value
    compared = [key for key in ("chosen", "rejected", "kto_tag") if value.get(key) is not None]
    label = value.get("label")
    if value.get("completion") is not None and (isinstance(label, bool) or str(label).lower() in ("true", "false")):
        compared.append("label")
    if compared:
        fitting = _list_fitting(row)
        raise ContentError(
            f"a row of preferences (its keys: {', '.join(key for key in value if value[key] is not None)})",
            where=row.place,
            why=f"ftcli trains on demonstrations; preferences ({', '.join(compared)}) are not supported",
            hint=f"to train on its {fitting[0]} alone, set type: {fitting[0]}" if fitting else "",
        )


def read_example(row: Row, format: str, *, require_assistant: bool = True) -> Example:  # noqa: A002
    """The example that a row of this format (one of FORMATS) holds.

    A ``system`` text of the row becomes the first message; a blank one is none. An empty list of tools is
    None, since templates announce tools as soon as they get a list.

    Raises:
        ContentError: the row does not fit; its place, the field and what belongs there.
    """
    missing = [key for key in KEYS_NEEDED[format] if row.value.get(key) is None]
    if missing:
        what = f"{' and '.join(missing)}: missing in a row read as {format}"
        hint = "".join(f"the row looks like {other}; a file holds one format" for other in _list_fitting(row)[:1])
        raise build_row_error(row, f"{what} (its keys: {', '.join(row.value) or 'none'})", hint)
    if format == "text":
        text = _get_text(row, row.value, "text", "text")
        if not text.strip():
            raise build_row_error(row, "text: blank")
        return Example((), text, None, row.file, row.line, format)
    system, messages = _read_system(row), _READERS[format](row)
    roles = [message.role for message in messages]
    if system and "system" in roles:
        raise build_row_error(row, "system: given twice, for the row and in its messages")
    if require_assistant and "assistant" not in roles:
        raise build_row_error(row, "no assistant turn: nothing to learn")
    tools = _read_tools(row, is_sharegpt=format == "sharegpt")
    return Example((*system, *messages), None, tools, row.file, row.line, format)


def _read_messages(row: Row, key: str = "messages") -> list[Message]:
    messages = []
    for i, turn in enumerate(_get_list(row, row.value[key], key)):
        if type(turn) is dict and len(turn) == 2:  # nearly every turn of nearly every set
            role, content = turn.get("role"), turn.get("content")
            if role in ROLES and type(content) is str:
                messages.append(Message(role, content))
                continue
        messages.append(_read_message(row, turn, f"{key}[{i}]"))
    return messages


def _read_message(row: Row, turn: Any, place: str, content_key: str = "content") -> Message:
    if not isinstance(turn, dict):
        raise build_row_error(row, f"{place}: {name_type(turn)} where a message belongs")
    if "role" not in turn and "from" in turn:
        what = f"{place}: from and value where role and content belong"
        raise build_row_error(row, what, "the row looks like ShareGPT: set columns: {conversations: messages}")
    role = _get_text(row, turn, "role", f"{place}.role")
    if role not in ROLES:
        what = f"{place}.role: unknown role {role!r}; the roles are {', '.join(ROLES)}"
        raise build_row_error(row, what, _suggest_role(role))
    # templates ask whether tool_calls is there at all, so null and an empty list must not be
    extra = {key: value for key, value in turn.items() if key not in _OWN_KEYS and value is not None}
    if extra.get("tool_calls") == []:
        del extra["tool_calls"]
    calls = extra.get("tool_calls", [])
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise build_row_error(row, f"{place}.tool_calls: not a list of objects")
    for i, call in enumerate(calls):
        _check_call(row, call, f"{place}.tool_calls[{i}]")
    content = _read_content(row, turn.get("content"), f"{place}.{content_key}")
    says_nothing = not calls and not (role == "assistant" and any(key in extra for key in REASONING_KEYS))
    if content is None and says_nothing:
        raise build_row_error(row, f"{place}.{content_key}: null or missing where a text belongs")
    return Message(role, content, _read_train(row, turn, place), extra)


def _check_call(row: Row, call: dict[str, Any], place: str) -> None:
    """None if a call names its function, and has arguments that are an object or the JSON text of one."""
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise build_row_error(row, f"{place}: no function with a name")
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments.strip():
        arguments = _parse_field(row, arguments, f"{place}: arguments")
    if arguments is not None and not isinstance(arguments, dict | str):
        raise build_row_error(row, f"{place}: arguments: {name_type(arguments)} where an object belongs")


def _read_content(row: Row, content: Any, place: str) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise build_row_error(row, f"{place}: {name_type(content)} where a text belongs")
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else name_type(part)
        if kind != "text":
            raise build_row_error(row, f"{place}[{i}]: a part of type {kind!r}; only text is trained on")
        texts.append(_get_text(row, part, "text", f"{place}[{i}].text"))
    return "".join(texts)


def _read_train(row: Row, turn: dict[str, Any], place: str) -> bool | None:
    train, weight = turn.get("train"), turn.get("weight")
    if train is not None and not isinstance(train, bool):
        raise build_row_error(row, f"{place}.train: {name_type(train)} where true or false belongs")
    if weight is None:
        return train
    if isinstance(weight, bool) or weight not in (0, 1):
        raise build_row_error(row, f"{place}.weight: {weight!r}; only 0 and 1 are known")
    if train is not None and train != weight:
        raise build_row_error(row, f"{place}: train and weight contradict each other")
    return bool(weight)


def _read_sharegpt(row: Row) -> list[Message]:
    messages = []
    for i, turn in enumerate(_get_list(row, row.value["conversations"], "conversations")):
        place = f"conversations[{i}]"
        if not isinstance(turn, dict):
            raise build_row_error(row, f"{place}: {name_type(turn)} where a turn belongs")
        if "from" not in turn and "role" in turn:
            what = f"{place}: role and content where from and value belong"
            raise build_row_error(row, what, "set columns: {messages: conversations}")
        speaker = _get_text(row, turn, "from", f"{place}.from")
        if speaker not in _SPEAKERS:
            what = f"{place}.from: unknown speaker {speaker!r}; the speakers are {', '.join(_SPEAKERS)}"
            raise build_row_error(row, what, _suggest_role(speaker))
        value = _get_text(row, turn, "value", f"{place}.value")
        as_message = {key: turn[key] for key in turn if key not in ("from", "value")}
        as_message |= {"role": _SPEAKERS[speaker], "content": value}
        if speaker == "function_call":
            as_message |= {"content": None, "tool_calls": _read_calls(row, value, f"{place}.value")}
        messages.append(_read_message(row, as_message, place, "value"))
    return messages


def _read_calls(row: Row, text: str, place: str) -> list[dict[str, Any]]:
    """The calls of a function_call turn in the shape that templates know: one object, or a list of them."""
    calls = _parse_field(row, text, place)
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise build_row_error(row, f"{place}: not a call with name and arguments, nor a list of calls")
    result = []
    for call in calls:
        arguments = call.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _parse_field(row, arguments, f"{place}: arguments")
        if not isinstance(arguments, dict):
            raise build_row_error(row, f"{place}: arguments: {name_type(arguments)} where an object belongs")
        others = {key: call[key] for key in call if key not in ("name", "arguments")}
        others |= {"type": "function", "function": {"name": call["name"], "arguments": arguments}}
        result.append(others)
    return result


def _read_alpaca(row: Row) -> list[Message]:
    """The user's text is the instruction and, where the input is not blank, an empty line and the input."""
    asked = _get_text(row, row.value, "instruction", "instruction")
    given = "" if row.value.get("input") is None else _get_text(row, row.value, "input", "input")
    question = "\n\n".join(part for part in (asked, given) if part.strip())
    if not question:
        raise build_row_error(row, "instruction: blank")
    messages, history = [], row.value.get("history") or []
    if not isinstance(history, list):
        raise build_row_error(row, f"history: {name_type(history)} where a list of pairs belongs")
    for i, pair in enumerate(history):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise build_row_error(row, f"history[{i}]: not a pair of texts")
        messages += [Message("user", pair[0]), Message("assistant", pair[1])]
    messages.append(Message("user", question))
    return [*messages, Message("assistant", _get_text(row, row.value, "output", "output"))]


def _read_prompt_completion(row: Row) -> list[Message]:
    """Two texts are a question and its answer; of two lists of messages only the second is learned."""
    prompt, completion = row.value["prompt"], row.value["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return [Message("user", prompt), Message("assistant", completion)]
    if not (isinstance(prompt, list) and isinstance(completion, list)):
        found = f"{name_type(prompt)} and {name_type(completion)}"
        raise build_row_error(row, f"prompt and completion: {found}; both must be texts, or both lists of messages")
    given = _read_messages(row, "prompt")
    # the answers of a prompt are what the completion follows, not what the row teaches
    shown = [replace(m, train=False) if m.role == "assistant" and m.train is None else m for m in given]
    return shown + _read_messages(row, "completion")


def _read_system(row: Row) -> list[Message]:
    if row.value.get("system") is None:
        return []
    text = _get_text(row, row.value, "system", "system")
    return [Message("system", text)] if text.strip() else []


def _read_tools(row: Row, *, is_sharegpt: bool) -> tuple[Any, ...] | None:
    """The row's tools, from a list or the JSON text of one.

    ShareGPT's bare ``{name, description, parameters}`` gets the frame that servers send at inference.
    """
    tools = row.value.get("tools")
    if isinstance(tools, str):
        tools = _parse_field(row, tools, "tools") if tools.strip() else None
    if tools is None:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise build_row_error(row, "tools: not a list of objects, nor the JSON text of one")
    if is_sharegpt:
        tools = [{"type": "function", "function": t} if "name" in t and "type" not in t else t for t in tools]
    return tuple(tools) or None


def _parse_field(row: Row, text: str, place: str) -> Any:
    try:
        return parse_json(text)
    except JsonError as error:
        raise build_row_error(row, f"{place}: {error.what}", error.hint) from None


def _get_text(row: Row, holder: dict[str, Any], key: str, place: str) -> str:
    value = holder.get(key)
    if not isinstance(value, str):
        found = "null or missing" if value is None else name_type(value)
        raise build_row_error(row, f"{place}: {found} where a text belongs")
    return value


def _get_list(row: Row, value: Any, place: str) -> list[Any]:
    """A list of turns; tables hold it as the JSON text of one."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _parse_field(row, value, place)
    if not isinstance(value, list):
        raise build_row_error(row, f"{place}: {name_type(value)} where a list of messages belongs")
    if not value:
        raise build_row_error(row, f"{place}: no messages")
    return value


def _list_fitting(row: Row) -> list[str]:
    """The formats whose keys the row has, in the order of detection."""
    keys = {key for key, value in row.value.items() if value is not None}
    return [name for name, needed in KEYS_NEEDED.items() if keys.issuperset(needed)]


def build_row_error(row: Row, what: str, hint: str = "") -> ContentError:
    return ContentError(what, where=row.place, hint=hint)


def suggest_name(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word.lower(), known, n=1)
    return f"did you mean {close[0]}?" if close else ""


def _suggest_role(word: str) -> str:
    """How the recipe says which of our roles a file's word means; a guess where there is one."""
    names = {**_SPEAKERS, "bot": "assistant", "ai": "assistant", "agent": "assistant", "prompter": "user"}
    close = difflib.get_close_matches(word.lower(), names, n=1)
    if not close:
        return f"set roles: {{{word}: ROLE}}"
    return f"did you mean {names[close[0]]}? set roles: {{{word}: {names[close[0]]}}}"


_READERS: dict[str, Callable[[Row], list[Message]]] = {
    "messages": _read_messages,
    "sharegpt": _read_sharegpt,
    "alpaca": _read_alpaca,
    "prompt_completion": _read_prompt_completion,
}
