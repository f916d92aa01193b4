"""The text of one JSON value, read strictly: what would be changed or lost without a word is an error."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, NoReturn

# Chat templates and the checks walk a value by recursion: what Python can just parse, they cannot.
_DEEPEST = 200
_SURROGATE = re.compile(r"\\u[dD]")
_BETWEEN = re.compile(r"[ \t\r\n,:]*")


class JsonError(ValueError):
    """A text that is not the JSON that ftcli reads; ``column`` counts from 1 and is 0 where it is not known."""

    def __init__(self, what: str, *, line: int = 1, column: int = 0, hint: str = "", ends_early: bool = False) -> None:
        super().__init__(what)
        self.what = what
        self.line = line
        self.column = column
        self.hint = hint
        self.ends_early = ends_early


def parse_json(text: str) -> Any:
    """The value of a JSON text, read strictly.

    Refused besides broken syntax, because each would change or lose something without a word: an object
    that has a key twice, NaN and infinity (also ``1e999``), and half of a surrogate pair.

    Raises:
        JsonError: whatever is wrong with the text; no other exception escapes.
    """
    try:
        value = _STRICT.decode(text)
        if _SURROGATE.search(text):  # UTF-8 has no bytes for a surrogate: only an escape brings one
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        if text.count("[") + text.count("{") > _DEEPEST:
            _check_depth(value)
    except json.JSONDecodeError as error:
        raise _explain_syntax(text, error) from None
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise JsonError(f"{half} is half of a surrogate pair, which no tokenizer can read") from None
    except RecursionError:
        raise JsonError("nested too deeply to be read") from None
    except JsonError:
        raise
    except ValueError:  # Python's limit on the digits of an integer
        raise JsonError("an integer has too many digits to be read") from None
    return value


def skim_json(text: str, position: int) -> tuple[Any, int]:
    """The value that begins at ``position``, and where it ends: its syntax is checked, its numbers stay texts.

    Raises:
        JsonError: broken syntax, with its line and column.
    """
    try:
        return _LENIENT.raw_decode(text, position)
    except json.JSONDecodeError as error:
        raise _explain_syntax(text, error) from None
    except RecursionError:
        raise JsonError("nested too deeply to be read") from None


def split_array(text: str, position: int) -> Iterator[tuple[int, str]]:
    """The place and text of each element of the sound array that begins at ``position``."""
    position = _skip(text, position + 1)
    while text[position] != "]":
        _, end = skim_json(text, position)
        yield position, text[position:end]
        position = _skip(text, end)


def split_object(text: str, position: int) -> Iterator[tuple[str, int]]:
    """Each key of the sound object that begins at ``position``, and where its value begins; a key may come twice."""
    position = _skip(text, position + 1)
    while text[position] != "}":
        key, end = skim_json(text, position)
        position = _skip(text, end)
        yield key, position
        position = _skip(text, skim_json(text, position)[1])


def name_type(value: Any) -> str:
    """The JSON name of a value's type with its article, for errors: ``an array``, ``null``."""
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value)) or ("a number" if isinstance(value, int | float) else repr(value))


def _skip(text: str, position: int) -> int:
    match = _BETWEEN.match(text, position)
    return match.end() if match else position


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level := [
        item
        for holder in level
        if isinstance(holder, dict | list)
        for item in (holder.values() if isinstance(holder, dict) else holder)
    ]:
        depth += 1
        if depth > _DEEPEST:
            raise JsonError(f"nested more than {_DEEPEST} levels deep")


def _build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise JsonError(f"the key {json.dumps(twice)} stands twice in one object")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise JsonError(f"{name} is not JSON")


def _parse_float(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise JsonError(f"{text} is too large for a number")
    return number


def _explain_syntax(text: str, error: json.JSONDecodeError) -> JsonError:
    in_string = error.msg.startswith(("Unterminated string", "Invalid \\"))
    ends_early = error.pos >= len(text) or (in_string and not text.endswith("}"))
    what, hint = error.msg[0].lower() + error.msg[1:], ""
    if text[error.pos : error.pos + 1] == "\ufeff":
        what = "a byte order mark inside the file (two files put together?)"
    elif error.msg == "Extra data":
        what, hint = "more than one JSON value on the line", "write one JSON object per line"
    elif error.msg.startswith("Unterminated string"):
        what, hint = "a string has no end", "a newline inside a string is written \\n"
    elif error.msg.startswith("Invalid control character"):
        what, hint = "a control character inside a string", "a newline is written \\n, a tab \\t"
    elif text.startswith("{'"):
        hint = "JSON has double quotes; these rows look like printed Python objects"
    what = f"broken JSON: {what}"
    return JsonError(what, line=error.lineno, column=error.colno, hint=hint, ends_early=ends_early)


# Built once: json.loads builds a decoder for each call that has hooks, at half the price of parsing a row.
_STRICT = json.JSONDecoder(object_pairs_hook=_build_object, parse_constant=_refuse_constant, parse_float=_parse_float)
_LENIENT = json.JSONDecoder(parse_int=str, parse_float=str)
