"""A source of rows → its examples: columns and roles renamed as the recipe says, the format told, each row read.

What a row of each format means is known in `message`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ftcli.data.message import (
    FORMATS,
    KEYS_NEEDED,
    ROLES,
    Example,
    build_row_error,
    check_preference,
    detect_format,
    read_example,
    suggest_name,
)
from ftcli.data.source import Row, Source, check_problems, read_rows
from ftcli.errors import ContentError, Problem, UsageError


def read_examples(
    source: Source | Path,
    format: str = "auto",  # noqa: A002
    *,
    columns: Mapping[str, str] | None = None,
    roles: Mapping[str, str] | None = None,
    skipped: list[Problem] | None = None,
    require_assistant: bool = True,
) -> list[Example]:
    """The examples of a source in its order; ``auto`` takes the format of its first row for all.

    Args:
        source: a file, or a split of a Hub data set.
        format: one of FORMATS, or ``auto``.
        columns: the format's key → the file's name for it.
        roles: the file's word for a role → one of ROLES.
        skipped: takes what is wrong with single rows, which are then left out, instead of an error.
        require_assistant: whether a conversation without an answer is an error.

    Raises:
        UsageError: an unknown format, column or role, or what `read_rows` says about the path.
        ContentError: rows that cannot be read; the first ten are named at once.
    """
    if format not in (*FORMATS, "auto"):
        what = f"unknown format {format}; the formats are auto, {', '.join(FORMATS)}"
        raise UsageError(what, hint=suggest_name(format, FORMATS))
    check_mappings(columns or {}, roles or {})
    rows = read_rows(source, skipped)
    if columns:
        rows = [_rename_columns(row, columns) for row in rows]
    if roles:
        rows = [_rename_roles(row, roles) for row in rows]
    examples: list[Example] = []
    problems: list[Problem] = []
    detected = "" if format == "auto" else format
    for row in rows:
        try:
            if format == "auto":
                check_preference(row)
            detected = detected or detect_format(row)
            examples.append(read_example(row, detected, require_assistant=require_assistant))
        except ContentError as error:
            if not detected and skipped is None:
                raise
            problems.append(Problem(error.what, error.where, error.hint))
    if skipped is None:
        check_problems(problems)
    else:
        skipped += problems
    return examples


def check_mappings(columns: Mapping[str, str], roles: Mapping[str, str]) -> None:
    """None if ``columns`` names keys of a format and ``roles`` roles that are known.

    Raises:
        UsageError: naming the first that is not.
    """
    known = sorted({key for keys in KEYS_NEEDED.values() for key in keys} | {"input", "system", "history", "tools"})
    for key in columns:
        if key not in known:
            hint = suggest_name(key, known) or "on the left stands the format's key, on the right the file's column"
            raise UsageError(f"no format has the key {key}; known are {', '.join(known)}", where="columns", hint=hint)
    for role in roles.values():
        if role not in ROLES:
            what = f"{role} is no role; the roles are {', '.join(ROLES)}"
            raise UsageError(what, where="roles", hint=suggest_name(role, ROLES))


def _rename_columns(row: Row, columns: Mapping[str, str]) -> Row:
    value = {key: item for key, item in row.value.items() if key not in columns.values() and key not in columns}
    for key, column in columns.items():
        if column not in row.value:
            hint = suggest_name(column, tuple(row.value))
            raise build_row_error(row, f"no column {column} (its columns: {', '.join(row.value) or 'none'})", hint)
        value[key] = row.value[column]
    return Row(row.file, row.line, value)


def _rename_roles(row: Row, roles: Mapping[str, str]) -> Row:
    """The row with its own words for roles replaced, in lists of turns of either kind."""

    def rename(turn: Any) -> Any:
        if not isinstance(turn, dict):
            return turn
        named = {
            key: roles[word] for key in ("role", "from") if isinstance(word := turn.get(key), str) and word in roles
        }
        return {**turn, **named}

    lists = {key: [rename(turn) for turn in item] for key, item in row.value.items() if isinstance(item, list)}
    return Row(row.file, row.line, {**row.value, **lists})
