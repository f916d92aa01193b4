"""Values against the schema: a recipe, or everything that is wrong with it in plain words.

pydantic leaves out the checks between keys as soon as one value is wrong. So wrong values are told, taken out,
and the rest is looked at again until nothing new comes up; what would follow from a value that was taken out
is not told.
"""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import ValidationError

from ftcli.recipe.alias import suggest_key
from ftcli.recipe.document import WORDS, Entry, Finding, KeyPath, Place, read_scalar
from ftcli.recipe.field import Kind, describe_kind, find_kind, find_section, list_choices, list_forms
from ftcli.recipe.schema import SCHEMA_VERSION, Recipe
from ftcli.recipe.section import RowsSection

_MAX_SHOWN = 60
# The same place may break several rules, when its type is a union: the most telling one is told.
_TELLING = ("recipe", "missing", "extra_forbidden", "string_too_short", "too_short")


def check_values(tree: Entry, values: dict[str, Any]) -> tuple[Recipe | None, list[Finding]]:
    """The recipe that ``values`` make, or what is wrong with them.

    Args:
        tree: the same values with their places and as they were written, which is how messages show them.
        values: what is validated.
    """
    if finding := _check_version(tree):
        return None, [finding]  # by which schema the rest would have to be judged is not known
    traps = list(_find_traps(tree, ()))
    empty = [trap for trap in traps if tree.find_nearest(trap.path).value is None]
    recipe, findings = _collect(tree, copy.deepcopy(values), empty)
    told = [finding.path for finding in findings]
    findings += [trap for trap in traps if not _touches(trap.path, told)]
    return (None if findings else recipe), findings


def _check_version(tree: Entry) -> Finding | None:
    entry = tree.find(("schema",))
    if entry is None or type(entry.value) is not int or entry.value == SCHEMA_VERSION:
        return None
    what = f"{entry.value} is not read by this ftcli, which reads recipes of schema {SCHEMA_VERSION}"
    return Finding(("schema",), what, entry.place)


def _collect(tree: Entry, values: dict[str, Any], known: Sequence[Finding]) -> tuple[Recipe | None, list[Finding]]:
    findings = list(known)
    blamed = [finding.path for finding in known]
    for path in blamed:
        _take_out(values, path)
    while True:
        try:
            return Recipe.model_validate(values), findings
        except ValidationError as error:
            errors = _list_errors(error, values)
        for path, detail in errors:
            keys = _list_involved(path, detail)
            present = next((key for key in keys if _find_value(values, key) is not _ABSENT), path)
            if not any(_touches(key, blamed) for key in keys):
                findings.append(_describe(tree, keys[0], present, detail))
            blamed.append(present)
            _take_out(values, _find_removable(present))


def _list_errors(error: ValidationError, values: Any) -> list[tuple[KeyPath, Any]]:
    """One error for each place, with the place's path; the members of unions leave no trace in it."""
    best: dict[KeyPath, Any] = {}
    for detail in error.errors(include_url=False):
        path = _find_path(detail["loc"], values, is_missing=detail["type"] == "missing")
        if path not in best or _rank(detail) < _rank(best[path]):
            best[path] = detail
    return [
        (path, detail)
        for path, detail in best.items()
        if detail["type"] == "recipe" or not any(path == other[: len(path)] for other in best if other != path)
    ]


def _rank(detail: Any) -> int:
    return _TELLING.index(detail["type"]) if detail["type"] in _TELLING else len(_TELLING)


def _find_path(loc: Sequence[str | int], values: Any, *, is_missing: bool) -> KeyPath:
    path: KeyPath = ()
    for part in loc:
        child = _find_value(values, (part,))
        if child is not _ABSENT:
            path, values = (*path, part), child
    return (*path, loc[-1]) if is_missing else path


def _list_involved(path: KeyPath, detail: Any) -> list[KeyPath]:
    """The keys that a check between keys speaks of, the blamed one first; otherwise the place itself."""
    keys = detail.get("ctx", {}).get("keys", ()) if detail["type"] == "recipe" else ()
    return [(*path, *key.split(".")) for key in keys] or [path]


_ABSENT = object()


def _find_value(values: Any, path: KeyPath) -> Any:
    for part in path:
        is_there = part in values if isinstance(values, dict) else False
        if isinstance(values, list | tuple) and isinstance(part, int):
            is_there = 0 <= part < len(values)
        if not is_there:
            return _ABSENT
        values = values[part]
    return values


def _touches(path: KeyPath, others: Sequence[KeyPath]) -> bool:
    return any(path[: len(other)] == other[: len(path)] for other in others)


def _find_removable(path: KeyPath) -> KeyPath:
    """The part of ``path`` that can be taken out whole: a field of a section, or a section in a list."""
    for length in range(1, len(path)):
        kind = find_kind(path[:length])
        if kind is None or find_section(kind) is None:
            return path[:length]
    return path


def _take_out(values: Any, path: KeyPath) -> None:
    """Leave the default, or a sound value where there is none, so that the rest can be checked."""
    parent, last = _find_value(values, path[:-1]), path[-1]
    if isinstance(parent, list):
        parent[int(last)] = {"path": "x"}
    elif last in parent:
        del parent[last]
    else:
        parent[last] = [{"path": "x"}] if last == "datasets" else "x"


def _describe(tree: Entry, path: KeyPath, present: KeyPath, detail: Any) -> Finding:
    entry = tree.find_nearest(present)
    if detail["type"] == "missing":
        return Finding(path, "missing required key", entry.place)
    if detail["type"] == "extra_forbidden":
        suggestion = suggest_key(path[:-1], str(path[-1]))
        words = f"; did you mean {suggestion}?" if suggestion else ""
        return Finding(path, f"unknown key{words}", entry.key or entry.place)
    if detail["type"] == "recipe":
        is_between_keys = bool(detail["ctx"]["keys"])
        return Finding(path, detail["ctx"]["text"], (entry.key if is_between_keys else None) or entry.place)
    if detail["type"] in ("string_too_short", "too_short"):
        return Finding(path, "must not be empty", entry.place)
    kind = find_kind(path) or Kind(Any)
    what = f"expected {describe_kind(kind)}, got {_show(entry)}{_suggest_value(entry, kind)}"
    return Finding(path, what, entry.place)


def _show(entry: Entry) -> str:
    value = entry.value
    if value is None:
        return "nothing" if entry.is_plain and not entry.text else "null"
    if isinstance(value, dict | list):
        noun = "mapping" if isinstance(value, dict) else "list"
        return f"a {noun}" if value else f"an empty {noun}"
    if isinstance(value, str):
        shown = value if len(value) <= _MAX_SHOWN else value[: _MAX_SHOWN - 1] + "…"
        return json.dumps(shown, ensure_ascii=False)
    if isinstance(value, bool):
        return str(value).lower()
    return entry.text or (repr(value) if isinstance(value, int | float) else f"a {type(value).__name__}")


def _suggest_value(entry: Entry, kind: Kind) -> str:
    """What to write instead, where that can be known: ``; write true``."""
    value, forms = entry.value, list_forms(kind)
    if value is None and forms == {"section"}:
        return "; leave the key out for its defaults"
    if isinstance(value, bool | int | float) and "text" in forms and not list_choices(kind):
        return f'; quote it ("{entry.text}") if text is meant' if entry.text else ""
    if isinstance(value, float) and value.is_integer() and forms & {"integer", "number"} == {"integer"}:
        return f"; write {int(value)}"
    if not isinstance(value, str):
        return ""
    if forms == {"section"} and issubclass(find_section(kind) or Recipe, RowsSection):
        return f"; write path: {value}"
    if "bool" in forms and (word := WORDS.get(value.lower(), value.lower())) in ("true", "false"):
        return f"; write {word}"
    number = read_scalar(value.replace("_", "").lstrip("0") or value)
    if forms & {"integer", "number"} and isinstance(number, int | float) and not isinstance(number, bool):
        return f"; write {number}"
    near = difflib.get_close_matches(value.lower(), list_choices(kind), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _find_traps(entry: Entry, path: KeyPath) -> Iterator[Finding]:
    """Valid values of a file that are likely not what was meant: unquoted ``no``, a section with nothing in it."""
    if isinstance(entry.value, dict):
        for key, child in entry.value.items():
            yield from _find_traps(child, (*path, key))
    elif isinstance(entry.value, list):
        for index, child in enumerate(entry.value):
            yield from _find_traps(child, (*path, index))
    elif entry.is_plain and isinstance(entry.place, Place) and not entry.place.rank:
        kind = find_kind(path) or Kind(Any)
        if isinstance(entry.value, str) and (meant := WORDS.get(entry.value.lower())):
            write = f"write {meant}, or " if "bool" in list_forms(kind) else ""
            what = f'YAML 1.1 reads {entry.text} as {meant}; {write}quote it ("{entry.text}") if text is meant'
            yield Finding(path, what, entry.place)
        elif entry.value is None and not entry.text and find_section(kind) and "null" in list_forms(kind):
            yield Finding(path, "nothing stands here; write null, or leave the key out for its default", entry.place)
