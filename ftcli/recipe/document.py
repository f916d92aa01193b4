"""YAML text to plain values that still know where they stand.

PyYAML scans, parses and composes; what a plain scalar means is decided here, because YAML 1.1 reads ``2e-4``
as text, ``010`` as 8, ``12:30:45`` as 45045, ``no`` as false, and keeps the last of two equal keys:

    true false null   as in YAML 1.2           2e-4 1e5 1.5 12   numbers
    yes no on off y n   text, marked as a word    everything else   text: 010, 1_000, 0x10, 12:30:45, dates

Which keys a recipe has is no matter of this module.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from ftcli.errors import Problem

KeyPath = tuple[str | int, ...]

# What YAML 1.1 would read as a bool and YAML 1.2 as text: nobody can tell what was meant.
WORDS = {**dict.fromkeys(("y", "yes", "on"), "true"), **dict.fromkeys(("n", "no", "off"), "false")}

_CONSTANTS = {"": None, "~": None} | {
    spelling: value
    for name, value in (("null", None), ("true", True), ("false", False))
    for spelling in (name, name.capitalize(), name.upper())
}
# Bounded, because int() refuses more than 4300 digits and no field needs more than a few.
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,99})")
_FLOAT = re.compile(r"[-+]?((0|[1-9][0-9]{0,99})(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]{1,4})?")
_MAX_DEPTH = 40  # far below where PyYAML's recursion ends, far above any recipe
_MAX_VALUES = 10_000  # an alias of aliases of aliases expands to billions


@dataclass(frozen=True, order=True)
class Place:
    """Where something stands: line and column from 1 in a file, or the ``--set`` of that rank."""

    rank: int
    line: int
    column: int
    name: str

    def __str__(self) -> str:
        return self.name if self.rank else f"{self.name}:{self.line}:{self.column}"


@dataclass(frozen=True)
class Finding:
    """Something wrong with the value of a key; without a place, the key says where."""

    path: KeyPath
    what: str
    place: Place | None = None

    @property
    def key(self) -> str:
        return ".".join(map(str, self.path))

    def describe(self) -> str:
        """The key and what is wrong with it."""
        return f"{self.key}: {self.what}" if self.path else self.what

    def to_problem(self) -> Problem:
        """The same as the reader of a recipe meets it."""
        return Problem(self.describe(), str(self.place)) if self.place else Problem(self.what, self.key)


@dataclass
class Entry:
    """A scalar, ``dict[str, Entry]`` or ``list[Entry]``; ``text`` is a scalar as it was written.

    ``place`` and ``key`` (of the key before it) are None for values that come from Python.
    """

    value: Any
    place: Place | None = None
    key: Place | None = None
    text: str = ""
    is_plain: bool = False

    def find(self, path: KeyPath) -> Entry | None:
        """The entry at ``path`` below this one."""
        entry: Entry | None = self
        for part in path:
            entry = entry._child(part) if entry else None
        return entry

    def find_nearest(self, path: KeyPath) -> Entry:
        """The entry at ``path`` or, if there is none, at the longest part of it that there is."""
        entry = self
        for part in path:
            child = entry._child(part)
            if child is None:
                break
            entry = child
        return entry

    def to_python(self) -> Any:
        """The plain value without places."""
        if isinstance(self.value, dict):
            return {key: entry.to_python() for key, entry in self.value.items()}
        if isinstance(self.value, list):
            return [entry.to_python() for entry in self.value]
        return self.value

    def _child(self, part: str | int) -> Entry | None:
        if isinstance(self.value, dict):
            child = self.value.get(part)
            return child if isinstance(child, Entry) else None
        if isinstance(self.value, list) and isinstance(part, int) and 0 <= part < len(self.value):
            item = self.value[part]
            return item if isinstance(item, Entry) else None
        return None


def read_document(text: str, name: str) -> tuple[Entry | None, list[Finding]]:
    """The one document in ``text``, and what is wrong with it; ``name`` is put before line and column.

    The entry is None if the text is broken or empty.
    """
    if bad := yaml.reader.Reader.NON_PRINTABLE.search(text):
        start = text.rfind("\n", 0, bad.start()) + 1
        place = Place(0, text.count("\n", 0, start) + 1, bad.start() - start + 1, name)
        return None, [Finding((), f"the character U+{ord(bad[0]):04X} is not allowed in YAML", place)]
    reader = _Reader(name, rank=0)
    try:
        entry = reader.compose(text)
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # "\UFFFFFFFF" is a bare ValueError
        place, what = _describe_error(error, name)
        return None, [*reader.findings, Finding((), what, place)]
    return entry, reader.findings


def read_argument(text: str, place: Place) -> Entry:
    """The value of a ``--set``: a flow list or mapping, a quoted text, or a scalar.

    Raises:
        ValueError: brackets or quotes that do not close; the message says what is wrong.
    """
    text = text.strip()
    if text[:1] not in ("[", "{", '"', "'"):
        return Entry(read_scalar(text), place, place, text, is_plain=True)
    reader = _Reader(place.name, place.rank)
    try:
        entry = reader.compose(text)
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise ValueError(_describe_error(error, "")[1]) from None
    if reader.findings:
        raise ValueError(reader.findings[0].describe())
    assert entry is not None
    return entry


def build_entry(value: Any, depth: int = 0) -> Entry:
    """The same from Python values, without places.

    Raises:
        ValueError: nested too deeply, as a mapping that holds itself is.
    """
    if depth > _MAX_DEPTH:
        raise ValueError(f"nested more than {_MAX_DEPTH} deep")
    if isinstance(value, Mapping):
        return Entry({str(key): build_entry(item, depth + 1) for key, item in value.items()})
    if isinstance(value, list | tuple):
        return Entry([build_entry(item, depth + 1) for item in value])
    return Entry(os.fspath(value) if isinstance(value, os.PathLike) else value)


def read_scalar(text: str) -> str | int | float | bool | None:
    """What a scalar without quotes means."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text) and math.isfinite(number := float(text)):
        return number
    return text


class _Composer(yaml.SafeLoader):
    """Composes nodes whose tag says how a scalar was written, and no more than that."""

    depth = 0

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        if kind is yaml.ScalarNode:
            return "plain" if implicit[0] else "tag:yaml.org,2002:str"
        return "tag:yaml.org,2002:map" if kind is yaml.MappingNode else "tag:yaml.org,2002:seq"

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem=f"nested more than {_MAX_DEPTH} deep", problem_mark=mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Reader:
    """Nodes to entries; equal keys are collected, what cannot be read at all is raised."""

    def __init__(self, name: str, rank: int) -> None:
        self.name, self.rank = name, rank
        self.findings: list[Finding] = []
        self.n_values = 0
        self.open_nodes: set[int] = set()

    def compose(self, text: str) -> Entry | None:
        loader = _Composer(text)
        try:
            node = loader.get_single_node()
        finally:
            loader.dispose()
        return None if node is None else self.read(node, ())

    def read(self, node: Any, path: KeyPath) -> Entry:
        self.n_values += 1
        if self.n_values > _MAX_VALUES:
            raise _mark_error(f"aliases expand to more than {_MAX_VALUES} values", node)
        if id(node) in self.open_nodes:
            raise _mark_error("an alias inside of what it stands for", node)
        self.open_nodes.add(id(node))
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        place = self._place(node)
        if isinstance(node, yaml.MappingNode) and kind == "map":
            entry = Entry(self._read_mapping(node, path), place)
        elif isinstance(node, yaml.SequenceNode) and kind == "seq":
            entry = Entry([self.read(item, (*path, i)) for i, item in enumerate(node.value)], place)
        elif isinstance(node, yaml.ScalarNode) and kind in ("plain", "str"):
            _check_text(node)
            value = read_scalar(node.value) if kind == "plain" else node.value
            entry = Entry(value, place, None, node.value, is_plain=kind == "plain")
        else:
            raise _mark_error(f"the tag !!{kind.lstrip('!')} has no place in a recipe", node)
        self.open_nodes.discard(id(node))
        return entry

    def _read_mapping(self, node: Any, path: KeyPath) -> dict[str, Entry]:
        entries: dict[str, Entry] = {}
        merged: list[dict[str, Entry]] = []
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise _mark_error("a key must be text", key_node)
            _check_text(key_node)
            key, place = str(key_node.value), self._place(key_node)
            if key == "<<" and key_node.tag == "plain":
                merged += self._read_merge(value_node, path)
                continue
            entry = self.read(value_node, (*path, key))
            entry.key = place
            if first := entries.get(key):
                where = f", first on line {first.key.line}" if first.key and not self.rank else ""
                self.findings.append(Finding((*path, key), f"given twice{where}", place))
            else:
                entries[key] = entry
        for more in merged:  # what stands in the mapping itself wins, then the first that is merged
            for key, entry in more.items():
                entries.setdefault(key, entry)
        return entries

    def _read_merge(self, node: Any, path: KeyPath) -> list[dict[str, Entry]]:
        entry = self.read(node, path)
        parts = entry.value if isinstance(entry.value, list) else [entry]
        if not all(isinstance(part.value, dict) for part in parts):
            raise _mark_error("<< merges mappings only", node)
        return [part.value for part in parts]

    def _place(self, node: Any) -> Place:
        if self.rank:
            return Place(self.rank, 0, 0, self.name)
        return Place(0, node.start_mark.line + 1, node.start_mark.column + 1, self.name)


def _check_text(node: Any) -> None:
    """Half a surrogate pair ("\\ud800") cannot be written to any file."""
    if any("\ud800" <= character <= "\udfff" for character in node.value):
        raise _mark_error("half a surrogate pair is no text", node)


def _mark_error(problem: str, node: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def _describe_error(error: Exception, name: str) -> tuple[Place, str]:
    """Where PyYAML stopped, and why, in the words of somebody who writes YAML by hand."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return Place(0, 1, 1, name), f"broken YAML: {error}"
    mark = error.problem_mark or error.context_mark
    place = Place(0, mark.line + 1, mark.column + 1, name) if mark else Place(0, 1, 1, name)
    what = error.problem or error.context or "cannot be read"
    if error.context == "expected a single document in the stream":
        return place, "a second document starts here; a recipe is one document"
    if type(error) is yaml.MarkedYAMLError:
        return place, what
    if "'\\t'" in what:
        return place, "broken YAML: a tab; YAML is indented with spaces"
    if "cannot start any token" in what:
        character = what.split("'")[1]
        return place, f"broken YAML: text cannot start with {character}; put it in quotes"
    if what == "mapping values are not allowed here":
        return place, f"broken YAML: a second colon; put text that holds {json.dumps(': ')} in quotes"
    context = f" {error.context}" if error.context else ""
    if error.context_mark and mark and error.context_mark.line != mark.line:
        context += f" that starts on line {error.context_mark.line + 1}"
    return place, f"broken YAML{context}: {what}".replace("'<stream end>'", "the end")
