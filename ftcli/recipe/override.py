"""``--set a.b=c``: a value of the recipe from the command line, which wins over the file.

A section merges, null removes (or is the value, where the key takes null: ``peft=null``). Whether the value is a
good one is checked with all the others (`problem`).
"""

from __future__ import annotations

from ftcli.recipe.document import Entry, Finding, KeyPath, Place, read_argument
from ftcli.recipe.field import find_kind, list_forms
from ftcli.recipe.schema import EXCLUSIVE

_SCALARS = {"number", "integer", "bool"}


def apply_override(tree: Entry, argument: str, rank: int) -> Finding | None:
    """Put ``argument`` into ``tree``; ``rank`` counts the arguments from 1.

    Returns:
        What is wrong with the argument itself, if anything is; then the tree is as before.
    """
    key, equals, text = argument.partition("=")
    place = Place(rank, 0, 0, f"--set {argument}")
    parts = [part.strip() for part in key.split(".")]
    if not equals:
        return Finding((), "expected KEY=VALUE; there is no =", place)
    if not all(parts):
        return Finding((), "expected KEY=VALUE; a key is empty", place)
    try:
        entry = read_argument(text, place)
        path = _find_path(tree, parts)
    except ValueError as error:
        return Finding((), str(error), place)
    _put(tree, path, entry)
    return None


def drop_excluded(tree: Entry) -> None:
    """Take out of ``tree`` what the file says about keys that a key of the command line excludes."""
    for one, other in EXCLUSIVE.items():
        first, second = (tree.find(tuple(key.split("."))) for key in (one, other))
        if first is None or second is None or first.value is None:
            continue
        if _rank(first) != _rank(second) and 0 in (_rank(first), _rank(second)):
            loser = other if _rank(first) else one
            section, _, name = loser.rpartition(".")
            parent = tree.find(tuple(section.split(".")))
            assert parent is not None
            del parent.value[name]


def _rank(entry: Entry) -> int:
    return entry.place.rank if entry.place else 0


def _find_path(tree: Entry, parts: list[str]) -> KeyPath:
    """The path that the parts of a dotted key mean: indices are numbers, and a dot in a mapping's key stays."""
    path: KeyPath = ()
    for index, part in enumerate(parts):
        kind, entry = find_kind(path), tree.find(path)
        forms = list_forms(kind) if kind else frozenset({"section"})
        holds_list = isinstance(entry.value, list) if entry and entry.value is not None else "list" in forms
        if holds_list and not (entry is None and "mapping" in forms):
            length = len(entry.value) if entry and entry.value else 0
            if not (part.isascii() and part.isdigit() and int(part) < length):
                raise ValueError(f"{'.'.join(parts[:index])} has no entry {part}; it has {_count(length)}")
            path = (*path, int(part))
        elif "mapping" in forms:
            return (*path, ".".join(parts[index:]))
        elif (kind and "section" not in forms) or _is_scalar(entry, path):
            raise ValueError(f"{'.'.join(parts[:index])} holds no keys")
        else:
            path = (*path, part)
    return path


def _is_scalar(entry: Entry | None, path: KeyPath) -> bool:
    """Whether a value stands there that no key can be put into; a model's name and null make room for one."""
    if entry is None or entry.value is None or isinstance(entry.value, dict):
        return False
    return path != ("model",) or not isinstance(entry.value, str)


def _count(length: int) -> str:
    return f"{length} (counted from 0)" if length else "none"


def _put(tree: Entry, path: KeyPath, entry: Entry) -> None:
    kind = find_kind(path)
    forms = list_forms(kind) if kind else frozenset()
    if path == ("model",) and isinstance(entry.value, str):
        entry = Entry({"name_or_path": entry}, entry.place, entry.key)
    if "section" in forms and isinstance(entry.value, dict):
        _open(tree, path, entry)
        for key, child in entry.value.items():
            _put(tree, (*path, key), child)
        return
    if entry.is_plain and entry.text and "text" in forms and not forms & _SCALARS and entry.value is not None:
        entry.value = entry.text  # a commit such as 1234567, typed without quotes
    parent = _open(tree, path[:-1], entry)
    last = path[-1]
    if entry.value is None and kind is not None and ("null" not in forms or isinstance(last, int)):
        if isinstance(parent.value, list):
            del parent.value[int(last)]
        else:
            parent.value.pop(last, None)
    else:
        parent.value[last] = entry


def _open(tree: Entry, path: KeyPath, origin: Entry) -> Entry:
    """The mapping or list at ``path``, made where there is none yet."""
    entry = tree
    for length, part in enumerate(path, 1):
        child = entry.find((part,))
        if child is None or not isinstance(child.value, dict | list):
            is_name = path[:length] == ("model",) and child is not None and isinstance(child.value, str)
            child = Entry({"name_or_path": child} if is_name else {}, origin.place, origin.key)
            entry.value[part] = child
        entry = child
    return entry
