"""Where rows come from: a reference → files (or a data set on the Hub) → rows with the place that each came from.

    train.jsonl · data/*.jsonl · folder/ · org/name          list[Row]
    1  {"messages": […]}                              ──►  Row("train.jsonl", 1, {"messages": […]})
    2                                                      (blank: skipped, but counted)
    3  {"messages": […]}                              ──►  Row("train.jsonl", 3, {"messages": […]})

A string that looks like a date stays a string and an integer stays an integer. What a row means (its
format, its roles) is not known here; `message` reads that. Files other than JSONL are read in `table`.
"""

from __future__ import annotations

import codecs
import contextlib
import difflib
import errno
import glob
import hashlib
import json
import os
import shlex
import stat
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ftcli.data.json_text import JsonError, name_type, parse_json
from ftcli.errors import ContentError, DiskError, Problem, UsageError
from ftcli.store.target import looks_like_path

SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv")
PROBLEMS_SHOWN = 10

# What rows come in otherwise, and the way from there.
_CONVERTED = {
    ".gz": "gunzip it first",
    ".zst": "decompress it first with zstd -d",
    ".zip": "unzip it first",
    ".txt": 'write each text as one line {"text": "…"} of a .jsonl file',
    ".xlsx": "save the sheet as .csv",
    ".arrow": "write the data set with its method to_parquet",
}
_NO_ROWS = {"dataset_info.json", "dataset_infos.json", "state.json"}
_BLOCK_BYTES = 1 << 22

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
    (b"PAR1", "parquet", "name it .parquet"),
    (b"version https://git-lfs", "a git-lfs pointer, not the file itself", "run git lfs pull"),
    (b"<!DOCTYPE html", "an HTML page", "download the file itself, not the page that shows it"),
)


@dataclass(frozen=True, slots=True)
class Row:
    """One object of a file; ``line`` counts from 1, blank lines included (rows, where a file has no lines)."""

    file: str
    line: int
    value: dict[str, Any]

    @property
    def place(self) -> str:
        """Where the row stands, as errors print it: ``train.jsonl:12``."""
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Source:
    """One file of rows, or one split of a data set on the Hub (then ``path`` is None)."""

    name: str
    path: Path | None
    config: str | None = None
    split: str = "train"


def find_sources(reference: str, *, config: str | None = None, split: str = "train") -> list[Source]:
    """The files that ``reference`` means, sorted by path: a file, a glob, all files of a folder; else a Hub id.

    Raises:
        UsageError: no such file, a pattern or folder without files, or a file that is not read.
        DiskError: a folder or file may not be looked at.
    """
    path = Path(reference).expanduser()
    try:
        if path.is_dir():
            return [Source(str(found), found) for found in _list_folder(path)]
        if path.exists() or path.is_symlink():
            _check_file(path, reference)
            return [Source(reference, path)]
        if glob.has_magic(reference):
            return [Source(str(found), found) for found in _match_files(path, reference)]
    except (OSError, ValueError) as error:
        raise _explain_path(error, reference) from error
    is_path = path.suffix.lower() in (*SUFFIXES, *_CONVERTED) or looks_like_path(reference)
    if is_path or "/" not in reference:  # to datasets, a bare json means the files of the working folder
        what = "no such file" if is_path else "neither a file here nor org/name of a data set on the Hub"
        raise UsageError(what, where=reference, hint=_suggest_file(path.parent, path.name))
    return [Source(reference, None, config, split)]


def read_rows(source: Source | Path, skipped: list[Problem] | None = None) -> list[Row]:
    """The rows of a source in its order; an empty list only where all of them were skipped.

    Lines of JSONL end at ``\\n`` (or ``\\r\\n``) alone: U+2028 may stand inside a string.

    Args:
        source: one of `find_sources`, or a path.
        skipped: takes what is wrong with single rows, which are then left out, instead of an error.

    Raises:
        UsageError: no such file, a directory, or a file that is not read.
        ContentError: nothing in it, or rows that cannot be read; the first ten are named at once.
        DiskError: the file may not be read.
        HubError: the Hub refused, or could not be reached.
    """
    from ftcli.data import table

    source = Source(str(source), source) if isinstance(source, Path) else source
    problems: list[Problem] = []
    if source.path is None:
        rows, why = table.read_hub_rows(source), "the split is empty"
    else:
        readers: dict[str, Callable[[Source, bytes, list[Problem]], list[Row]]] = {
            ".json": table.read_json_rows,
            ".csv": partial(table.read_csv_rows, delimiter=","),
            ".tsv": partial(table.read_csv_rows, delimiter="\t"),
            ".parquet": table.read_parquet_rows,
        }
        raw = _read_bytes(source.path, source.name)
        rows = readers.get(source.path.suffix.lower(), read_lines)(source, raw, problems) if raw else []
        why = "the file is sound, and holds none" if raw.strip() else "the file holds nothing but blank lines"
        why = why if raw else "the file is empty"
    if not rows and not problems:
        raise ContentError("no rows", where=source.name, why=why)
    if skipped is None:
        check_problems(problems)
    else:
        skipped += problems
    return rows


def read_lines(source: Source, raw: bytes, problems: list[Problem]) -> list[Row]:
    """The rows of JSONL bytes; what is wrong with a line is appended to ``problems``."""
    check_encoding(source.name, raw)
    lines = raw.removeprefix(codecs.BOM_UTF8).split(b"\n")
    filled = [number for number, line in enumerate(lines, 1) if line and not line.isspace()]
    rows: list[Row] = []
    for number in filled:
        try:
            value = _parse_line(source.name, lines[number - 1], is_last=number == filled[-1])
        except JsonError as error:
            if number == filled[0]:
                _check_layout(source.name, b"\n".join(lines), number)
            column = f":{error.column}" if error.column else ""
            problems.append(Problem(error.what, f"{source.name}:{number}{column}", error.hint))
        else:
            rows.append(Row(source.name, number, value))
    return rows


def hash_sources(sources: Sequence[Source]) -> str:
    """The sha256 of all files' bytes in the order given, in hex; of a Hub data set what identifies its version."""
    from ftcli.data import table

    digest = hashlib.sha256()
    for source in sources:
        if source.path is None:
            digest.update(table.identify_hub_set(source).encode())
            continue
        try:
            with source.path.open("rb") as stream:
                while block := stream.read(_BLOCK_BYTES):
                    digest.update(block)
        except OSError as error:
            raise DiskError(f"cannot be read: {error.strerror or error}", where=source.name) from error
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


def check_encoding(name: str, raw: bytes) -> None:
    """None, or raises ContentError if the first bytes are those of another encoding or kind of file."""
    found = next(((kind, hint) for magic, kind, hint in _FOREIGN if raw.startswith(magic)), None)
    if found is None and raw[:4].count(0) == 2 and (raw[:1] == b"\0") != (raw[1:2] == b"\0"):
        found = ("utf-16be" if raw[:1] == b"\0" else "utf-16le", "")  # without a byte order mark
    if found is None:
        return
    kind, hint = found
    if kind.startswith("utf"):
        hint = f"iconv -f {kind} -t utf-8 {shlex.quote(name)} > utf8{Path(name).suffix or '.jsonl'}"
        kind = f"{kind.upper()} text"
    raise ContentError(f"not UTF-8 text: the file is {kind}", where=name, hint=hint)


def explain_bytes(name: str, line: bytes, error: UnicodeDecodeError) -> JsonError:
    """What is wrong with bytes that are not UTF-8, and the command that converts the file."""
    # Windows-1252 has letters where Latin-1 has unused control codes
    windows = any(0x80 <= byte <= 0x9F for byte in line)
    title, charset = ("Windows-1252", "windows-1252") if windows else ("Latin-1", "latin1")
    return JsonError(
        f"the byte 0x{line[error.start]:02x} is not UTF-8; the file may be {title}",
        column=error.start + 1,
        hint=f"iconv -f {charset} -t utf-8 {shlex.quote(name)} > utf8{Path(name).suffix or '.jsonl'}",
    )


def _parse_line(name: str, line: bytes, *, is_last: bool) -> dict[str, Any]:
    if b"\0" in line:
        raise JsonError("a NUL byte: the file is damaged", column=line.index(b"\0") + 1)
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        if is_last and error.reason == "unexpected end of data":
            raise JsonError("broken JSON: the last line looks cut off") from None
        raise explain_bytes(name, line, error) from None
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


def _check_layout(name: str, raw: bytes, number: int) -> None:
    """None, or raises if the file is one JSON document, or several, laid out over many lines."""
    text = raw.decode("utf-8", errors="replace").lstrip()
    start = text.partition("\n")[0].rstrip()
    try:
        value, end = json.JSONDecoder().raw_decode(text)
        is_array = isinstance(value, list) and ("\n" in text[:end] or not text[end:].strip())
        is_spread = isinstance(value, dict) and "\n" in text[:end]
    except (ValueError, RecursionError):
        is_array, is_spread = start == "[" or (start.startswith("[{") and start.endswith(",")), start == "{"
    if is_array:
        raise ContentError(
            "this is a JSON array; write one object per line",
            where=f"{name}:{number}",
            hint=f"name the file .json, or jq -c '.[]' {shlex.quote(name)} > rows.jsonl",
        )
    if is_spread:
        raise ContentError(
            "this is a JSON object laid out over several lines; write one object per line",
            where=f"{name}:{number}",
            hint=f"jq -c . {shlex.quote(name)} > rows.jsonl",
        )


def _read_bytes(path: Path, name: str) -> bytes:
    try:
        _check_file(path, name)
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise _explain_path(error, name) from error


def _check_file(path: Path, name: str) -> None:
    """None if ``path`` is a regular file of a kind that is read; opens nothing, since a pipe would wait for a writer.

    Raises:
        UsageError: it is not.
    """
    if not path.exists():
        if path.is_symlink():
            raise UsageError(f"a link to nothing: {os.readlink(path)}", where=name, hint="name the file itself")
        raise UsageError("no such file", where=name, hint=_suggest_file(path.parent, path.name))
    if path.is_dir():
        raise UsageError("a directory, not a file of rows", where=name, hint=_suggest_file(path))
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        kind = "a pipe" if stat.S_ISFIFO(mode) else "a device or socket"
        raise UsageError(f"no rows: {kind}, not a regular file", where=name, hint="save the rows in a file first")
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        what = f"{path.suffix or 'a name without ending'} is not read; these are: {', '.join(SUFFIXES)}"
        hint = _CONVERTED.get(suffix, "write the rows as .jsonl, one JSON object per line")
        raise UsageError(what, where=name, hint=hint)


def _explain_path(error: OSError | ValueError, name: str) -> UsageError | DiskError:
    """The error for a path that cannot be looked at: no name of a file at all, or one that may not be read."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    if isinstance(error, ValueError) or error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
        return UsageError(f"cannot be the name of a file: {reason}", where=name, hint="check the path")
    return DiskError(f"cannot be read: {reason}", where=name)


def _match_files(pattern: Path, reference: str) -> list[Path]:
    names = sorted(glob.glob(str(pattern), recursive=True), key=len, reverse=True)
    paths = [path for name in names if not (path := Path(name)).is_dir()]
    found = sorted({(path.parent.resolve(), path.name): path for path in paths}.values())  # links to folders may circle
    if not found:
        folder = next(parent for parent in pattern.parents if not glob.has_magic(str(parent)))
        raise UsageError("no file matches this pattern", where=reference, hint=_suggest_file(folder))
    for path in found:
        _check_file(path, str(path))
    return found


def _list_folder(folder: Path) -> list[Path]:
    entries = sorted(path for path in folder.rglob("*") if path.is_file())
    visible = [p for p in entries if not any(part.startswith((".", "_")) for part in p.relative_to(folder).parts)]
    found = [path for path in visible if path.suffix.lower() in SUFFIXES and path.name not in _NO_ROWS]
    if not found:
        what = f"the folder holds no file of rows ({', '.join(SUFFIXES)})"
        raise UsageError(what, where=str(folder), hint=f"it holds {_list_names(path.name for path in entries)}")
    return found


def _suggest_file(folder: Path, name: str = "") -> str:
    if not folder.is_dir():
        return f"there is no folder {folder}"
    names: list[str] = []
    with contextlib.suppress(OSError):  # a hint is no place to fail
        names = sorted(entry.name for entry in folder.iterdir() if entry.suffix.lower() in SUFFIXES)
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f"did you mean {folder / close[0]}?"
    return f"the files of rows in {folder}: {_list_names(names)}"


def _list_names(names: Iterable[str]) -> str:
    known = list(names)
    return ", ".join([*known[:8], *(["…"] if len(known) > 8 else [])]) or "nothing"
