"""JSONL files to rows: every line's exact value, with the place that it came from.

    train.jsonl                                    list[Row]
    1  {"messages": […]}        ──►  Row("train.jsonl", 1, {"messages": […]})
    2                                (blank: skipped, but counted)
    3  {"messages": […]}        ──►  Row("train.jsonl", 3, {"messages": […]})

A string that looks like a date stays a string and an integer stays an integer. What a row means (its
format, its roles) is not known here; `message` reads that.
"""

from __future__ import annotations

import codecs
import difflib
import hashlib
import json
import math
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ftcli.errors import ContentError, DiskError, Problem, UsageError

PROBLEMS_SHOWN = 10

# What files named .jsonl turn out to be, by their first bytes. UTF-32 stands before UTF-16, whose mark
# is the beginning of its own.
_FOREIGN = (
    (codecs.BOM_UTF32_LE, "utf-32", ""),
    (codecs.BOM_UTF32_BE, "utf-32", ""),
    (codecs.BOM_UTF16_LE, "utf-16", ""),
    (codecs.BOM_UTF16_BE, "utf-16", ""),
    (b"\x1f\x8b", "gzip", "gunzip it first"),
    (b"\x28\xb5\x2f\xfd", "zstandard", "decompress it first with zstd -d"),
    (b"PK\x03\x04", "zip", "unzip it first"),
    (b"PAR1", "parquet", "write it as .jsonl, one object per line"),
    (b"version https://git-lfs", "a git-lfs pointer, not the file itself", "run git lfs pull"),
    (b"<!DOCTYPE html", "an HTML page", "download the file itself, not the page that shows it"),
)


@dataclass(frozen=True, slots=True)
class Row:
    """One object of a JSONL file; ``line`` counts from 1, blank lines included."""

    file: str
    line: int
    value: dict[str, Any]

    @property
    def place(self) -> str:
        """Where the row stands, as errors print it: ``train.jsonl:12``."""
        return f"{self.file}:{self.line}"


class JsonError(ValueError):
    """A text that is not the JSON that ftcli reads; ``column`` is 1-based, 0 where it is not known."""

    def __init__(self, what: str, *, column: int = 0, hint: str = "", ends_early: bool = False) -> None:
        super().__init__(what)
        self.what = what
        self.column = column
        self.hint = hint
        self.ends_early = ends_early


def read_rows(path: Path) -> list[Row]:
    """The rows of a JSONL file in its order; never an empty list.

    Lines end at ``\\n`` (or ``\\r\\n``) alone: U+2028 may stand inside a string.

    Raises:
        UsageError: no such file, a directory, or a name that does not end in ``.jsonl``.
        ContentError: nothing in it, or lines that cannot be read; the first ten are named at once.
        DiskError: the file may not be read.
    """
    raw = _read_bytes(path)
    _check_bytes(path, raw)
    lines = raw.removeprefix(codecs.BOM_UTF8).split(b"\n")
    filled = [number for number, line in enumerate(lines, 1) if line.strip()]
    if not filled:
        why = "the file holds nothing but blank lines" if raw else "the file is empty"
        raise ContentError("no rows", where=str(path), why=why)
    rows: list[Row] = []
    problems: list[Problem] = []
    for number in filled:
        try:
            value = _parse_line(path, lines[number - 1], is_last=number == filled[-1])
        except JsonError as error:
            if number == filled[0]:
                _check_layout(path, b"\n".join(lines), number)
            place = f"{path}:{number}:{error.column}" if error.column else f"{path}:{number}"
            problems.append(Problem(error.what, place, error.hint))
        else:
            rows.append(Row(str(path), number, value))
    check_problems(problems)
    return rows


def hash_files(paths: Sequence[Path]) -> str:
    """The sha256 of the files' bytes in the order given, as hex: what ``cat PATHS | sha256sum`` prints."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(_read_bytes(path))
    return digest.hexdigest()


def check_problems(problems: Sequence[Problem]) -> None:
    """None if there are no problems; else raises one ContentError that names the first ten."""
    if not problems:
        return
    first, *others = problems[:PROBLEMS_SHOWN]
    lines = [str(problem) for problem in others]
    if len(problems) > PROBLEMS_SHOWN:
        lines.append(f"and {len(problems) - PROBLEMS_SHOWN} more")
    hints = dict.fromkeys(problem.hint for problem in problems[:PROBLEMS_SHOWN] if problem.hint)
    raise ContentError(first.what, where=first.where, why="\n  ".join(lines), hint="; ".join(hints))


def parse_json(text: str) -> Any:
    """The value of a JSON text, read strictly.

    Refused besides broken syntax, because each would change or lose something without a word: an object
    that has a key twice, NaN and infinity (also ``1e999``), and half of a surrogate pair.

    Raises:
        JsonError: whatever is wrong with the text; no other exception escapes.
    """
    try:
        value = json.loads(
            text, object_pairs_hook=_build_object, parse_constant=_refuse_constant, parse_float=_parse_float
        )
        if "\\ud" in text or "\\uD" in text:  # UTF-8 has no bytes for a surrogate: only an escape brings one
            json.dumps(value, ensure_ascii=False).encode("utf-8")
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


def _parse_line(path: Path, line: bytes, *, is_last: bool) -> dict[str, Any]:
    if b"\0" in line:
        raise JsonError("a NUL byte: the file is damaged", column=line.index(b"\0") + 1)
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        if is_last and error.reason == "unexpected end of data":
            raise JsonError("broken JSON: the last line looks cut off") from None
        raise _explain_bytes(path, line, error) from None
    try:
        value = parse_json(text)
    except JsonError as error:
        if is_last and error.ends_early:
            what = f"broken JSON: the last line looks cut off ({error.what.removeprefix('broken JSON: ')})"
            raise JsonError(what, column=error.column) from None
        raise
    if not isinstance(value, dict):
        raise JsonError(f"{name_type(value)} where an object belongs", hint="write one JSON object per line")
    return value


def name_type(value: Any) -> str:
    """The JSON name of a value's type with its article, for errors: ``an array``, ``null``."""
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


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
    if error.msg == "Extra data":
        what, hint = "more than one JSON value on the line", "write one JSON object per line"
    elif error.msg.startswith("Unterminated string"):
        what, hint = "a string has no end", "a newline inside a string is written \\n"
    elif error.msg.startswith("Unexpected UTF-8 BOM"):
        what = "a byte order mark inside the file (two files put together?)"
    elif text.startswith("{'"):
        hint = "JSON has double quotes; these rows look like printed Python objects"
    return JsonError(f"broken JSON: {what}", column=error.colno, hint=hint, ends_early=ends_early)


def _explain_bytes(path: Path, line: bytes, error: UnicodeDecodeError) -> JsonError:
    # Windows-1252 has letters where Latin-1 has unused control codes
    windows = any(0x80 <= byte <= 0x9F for byte in line)
    name, charset = ("Windows-1252", "windows-1252") if windows else ("Latin-1", "latin1")
    return JsonError(
        f"the byte 0x{line[error.start]:02x} is not UTF-8; the file may be {name}",
        column=error.start + 1,
        hint=f"iconv -f {charset} -t utf-8 {shlex.quote(str(path))} > utf8.jsonl",
    )


def _check_layout(path: Path, raw: bytes, number: int) -> None:
    """None, or raises if the file is one JSON document, or several, laid out over many lines."""
    text = raw.decode("utf-8", errors="replace").lstrip()
    start = text.partition("\n")[0].rstrip()
    name = shlex.quote(str(path))
    try:
        value, end = json.JSONDecoder().raw_decode(text)
        is_array = isinstance(value, list) and ("\n" in text[:end] or not text[end:].strip())
        is_spread = isinstance(value, dict) and "\n" in text[:end]
    except (ValueError, RecursionError):
        is_array, is_spread = start == "[" or (start.startswith("[{") and start.endswith(",")), start == "{"
    if is_array:
        raise ContentError(
            "this is a JSON array; write one object per line",
            where=f"{path}:{number}",
            hint=f"jq -c '.[]' {name} > rows.jsonl",
        )
    if is_spread:
        raise ContentError(
            "this is a JSON object laid out over several lines; write one object per line",
            where=f"{path}:{number}",
            hint=f"jq -c . {name} > rows.jsonl",
        )


def _check_bytes(path: Path, raw: bytes) -> None:
    """None, or raises ContentError if the file's first bytes are those of another kind of file."""
    found = next(((name, hint) for magic, name, hint in _FOREIGN if raw.startswith(magic)), None)
    if found is None and raw[:4].count(0) == 2 and (raw[:1] == b"\0") != (raw[1:2] == b"\0"):
        found = ("utf-16be" if raw[:1] == b"\0" else "utf-16le", "")  # without a byte order mark
    if found is None:
        return
    name, hint = found
    if name.startswith("utf"):
        hint = f"iconv -f {name} -t utf-8 {shlex.quote(str(path))} > utf8.jsonl"
        name = f"{name.upper()} text"
    raise ContentError(f"not UTF-8 text: the file is {name}", where=str(path), hint=hint)


def _read_bytes(path: Path) -> bytes:
    try:
        if not path.exists():
            raise UsageError("no such file", where=str(path), hint=_suggest_file(path.parent, path.name))
        if path.is_dir():
            raise UsageError("a directory, not a .jsonl file", where=str(path), hint=_suggest_file(path))
        if path.suffix.lower() != ".jsonl":
            raise UsageError(
                f"only .jsonl is read for now, not {path.suffix or 'a name without ending'}",
                where=str(path),
                hint="write the rows as .jsonl, one JSON object per line",
            )
        return path.read_bytes()
    except OSError as error:
        raise DiskError(f"cannot be read: {error.strerror or error}", where=str(path)) from error


def _suggest_file(folder: Path, name: str = "") -> str:
    if not folder.is_dir():
        return f"there is no folder {folder}"
    names = sorted(entry.name for entry in folder.iterdir() if entry.suffix.lower() == ".jsonl")
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f"did you mean {folder / close[0]}?"
    return f"the .jsonl files of {folder}: {', '.join(names[:8])}" if names else ""
