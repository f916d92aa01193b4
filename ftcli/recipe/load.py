"""A recipe from a file, with ``--set``, or from Python values; everything that is wrong is raised at once."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ftcli.errors import Problem, RecipeError, UsageError
from ftcli.recipe.document import Entry, Finding, KeyPath, Place, build_entry, read_document
from ftcli.recipe.override import apply_override, drop_excluded
from ftcli.recipe.problem import check_values
from ftcli.recipe.schema import Recipe
from ftcli.recipe.section import BUNDLED_TEMPLATES, STRATEGIES
from ftcli.recipe.text import list_changed

# what names a data set on the Hub and is neither a file name nor a glob
_HUB_ID = re.compile(
    r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(?<!\.jsonl)(?<!\.json)(?<!\.ndjson)(?<!\.parquet)(?<!\.csv)(?<!\.tsv)"
)
_MAX_BYTES = 1_000_000  # a file of data, given by mistake, is not read to its end


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe, the file it came from, and where each value that is no default was given.

    ``sources`` maps dotted keys to ``recipe.yaml:12`` or ``--set``.
    """

    recipe: Recipe
    path: Path
    sources: Mapping[str, str]


def load_recipe(path: Path, *, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """The recipe in ``path`` with ``overrides`` (``a.b=c``), checked; paths of data and template are absolute.

    Raises:
        UsageError: no such file, or none that can be read.
        RecipeError: everything that is wrong in it, by line and column.
    """
    name = str(path)
    tree, findings = read_document(_read_text(path), name)
    is_empty = tree is None or (tree.value is None and not tree.text)
    if is_empty and not findings:
        raise RecipeError([Problem("the file is empty; a recipe needs at least model and datasets", name)])
    if tree is None:
        _raise_findings(findings)
    if not isinstance(tree.value, dict):
        _raise_findings([Finding((), "expected a mapping of keys at the top", tree.place)])
    for rank, argument in enumerate(overrides, 1):
        if finding := apply_override(tree, argument, rank):
            findings.append(finding)
    drop_excluded(tree)
    recipe = _check(tree, findings, folder=path.absolute().parent, name=path.stem)
    return LoadedRecipe(recipe, path, _list_sources(recipe, tree))


def build_recipe(mapping: Mapping[str, Any], *, folder: Path, name: str) -> Recipe:
    """The same from Python values; ``folder`` and ``name`` stand for those of the recipe's file.

    Raises:
        RecipeError: everything that is wrong, by dotted key.
    """
    try:
        tree = build_entry(mapping)
    except ValueError as error:
        raise RecipeError([Problem(str(error), name)]) from None
    return _check(tree, [], folder=folder.absolute(), name=name)


def _check(tree: Entry, findings: list[Finding], *, folder: Path, name: str) -> Recipe:
    values = tree.to_python()
    for path in _list_paths(values):
        entry = tree.find(path)
        is_from_command_line = entry is not None and entry.place is not None and entry.place.rank > 0
        _make_absolute(values, path, Path.cwd() if is_from_command_line else folder)
    if values.get("output_dir") is None:
        values["output_dir"] = f"runs/{name}"
    recipe, more = check_values(tree, values)
    if recipe is None or findings or more:
        _raise_findings([*findings, *more])
    return recipe


def _raise_findings(findings: Sequence[Finding]) -> NoReturn:
    """Raise them in the order of the file, then of the command line; the rest keeps its order."""
    ordered = sorted(findings, key=lambda f: (f.place.rank, f.place.line, f.place.column) if f.place else (0, 0, 0))
    raise RecipeError([finding.to_problem() for finding in ordered])


def _list_paths(values: Mapping[str, Any]) -> Iterator[KeyPath]:
    section = values.get("eval")
    held_out = section.get("datasets") if isinstance(section, dict) else None
    for prefix, entries in ((("datasets",), values.get("datasets")), (("eval", "datasets"), held_out)):
        for index, entry in enumerate(entries if isinstance(entries, list) else ()):
            if isinstance(entry, dict):
                yield (*prefix, index, "path")
    tokenizer = values.get("tokenizer")
    if isinstance(tokenizer, dict) and tokenizer.get("chat_template") not in ("auto", *BUNDLED_TEMPLATES):
        yield ("tokenizer", "chat_template")
    distributed = values.get("distributed")
    if isinstance(distributed, dict) and distributed.get("strategy") not in (None, *STRATEGIES):
        yield ("distributed", "strategy")


def _make_absolute(values: Any, path: KeyPath, folder: Path) -> None:
    """``..`` stays, because a folder before it may be a link; what can only be a Hub id stays as it is."""
    for part in path[:-1]:
        values = values[part]
    text = values.get(path[-1])
    if isinstance(text, str) and text:
        absolute = folder / os.path.expanduser(text)
        if path[-1] != "path" or not _HUB_ID.fullmatch(text) or _exists(absolute):
            values[path[-1]] = str(absolute)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _list_sources(recipe: Recipe, tree: Entry) -> dict[str, str]:
    sources = {}
    for path in list_changed(recipe):
        entry = tree.find_nearest(path)
        place = entry.key or entry.place
        if entry is not tree and place:
            sources[".".join(map(str, path))] = "--set" if place.rank else f"{Path(place.name).name}:{place.line}"
    return sources


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        raise UsageError("no such file", where=str(path), hint=_suggest_files(path)) from None
    except IsADirectoryError:
        raise UsageError("a folder, not a recipe", where=str(path), hint=_suggest_files(path / "x")) from None
    except (OSError, ValueError) as error:  # a NUL in the name is a ValueError
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UsageError(f"cannot be read: {why.lower()}", where=str(path)) from None
    if len(data) > _MAX_BYTES:
        raise RecipeError([Problem(f"larger than {_MAX_BYTES} bytes; this is no recipe", str(path))])
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start]
        column = len(before[before.rfind(b"\n") + 1 :].decode("utf-8-sig", errors="replace")) + 1
        place = Place(0, before.count(b"\n") + 1, column, str(path))
        raise RecipeError([Problem("not UTF-8; save the file as UTF-8", str(place))]) from None


def _suggest_files(path: Path) -> str:
    """The recipes beside ``path``, the most similar name first."""
    try:
        names = sorted(p.name for p in path.parent.iterdir() if p.suffix in (".yaml", ".yml"))
    except (OSError, ValueError):
        return ""
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    if near:
        return f"did you mean {path.parent / near[0]}?"
    return f"{path.parent} holds {', '.join(names[:5])}" if names else ""
