"""A recipe as text and as differences: the resolved YAML, the JSON schema, what two recipes disagree about."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from pydantic_core import PydanticUndefined

from ftcli.recipe.document import WORDS, KeyPath, read_scalar
from ftcli.recipe.field import list_fields
from ftcli.recipe.schema import EXCLUSIVE, Recipe
from ftcli.recipe.section import Section

_PLAIN = re.compile(r"[A-Za-z/][A-Za-z0-9_./+-]*")
# not printable in YAML, or a line break to it
_UNSAFE = re.compile(f"{yaml.reader.Reader.NON_PRINTABLE.pattern}|[\x7f\x85\u2028\u2029\ufeff]")
_MAX_KEY = 500  # YAML finds a key without ? only within 1024 characters


def dump_recipe(recipe: Recipe, sources: Mapping[str, str] | None = None) -> str:
    """YAML that reads back to an equal recipe; values that have a source carry it as a comment."""
    return "\n".join(_render_section(recipe, (), sources or {})) + "\n"


def recipe_json_schema() -> dict[str, Any]:
    """The JSON schema of recipes, for editors that check and complete YAML."""
    schema = Recipe.model_json_schema(by_alias=True)
    schema["properties"]["output_dir"].pop("default", None)  # follows from the file's name
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def compare_recipes(old: Recipe, new: Recipe) -> list[tuple[str, Any, Any]]:
    """Dotted key, old value and new value of each difference, in the schema's order."""
    return list(_compare(old.model_dump(by_alias=True), new.model_dump(by_alias=True), ()))


def list_changed(recipe: Recipe) -> list[KeyPath]:
    """The paths of the values that are no defaults."""
    return list(_walk_changed(recipe, ()))


def _walk_changed(section: Section, path: KeyPath) -> Iterator[KeyPath]:
    for name, field in list_fields(type(section)).items():
        value, default, here = _get(section, name), field.default, (*path, name)
        if isinstance(value, Section):
            if default is None:
                yield here
            yield from _walk_changed(value, here)
        elif _is_sections(value):
            for index, item in enumerate(value):
                yield from _walk_changed(item, (*here, index))
        elif default is PydanticUndefined or value != default or type(value) is not type(default):
            yield here


def _compare(old: Any, new: Any, path: KeyPath) -> Iterator[tuple[str, Any, Any]]:
    is_section = isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys()
    is_list = isinstance(old, tuple) and isinstance(new, tuple) and len(old) == len(new)
    if is_section and old:
        for key in old:
            yield from _compare(old[key], new[key], (*path, key))
    elif is_list and all(isinstance(item, dict) for item in (*old, *new)):
        for index, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from _compare(one, other, (*path, index))
    elif old != new:
        yield ".".join(map(str, path)), old, new


def _render_section(section: Section, path: KeyPath, sources: Mapping[str, str]) -> list[str]:
    lines = []
    for name in _list_written(section, path):
        value, here = _get(section, name), (*path, name)
        dotted = ".".join(map(str, here))
        comment = f"  # {' '.join(sources[dotted].split())}" if dotted in sources else ""
        if isinstance(value, Section):
            lines += [f"{name}:{comment}", *_indent(_render_section(value, here, sources), "  ")]
        elif _is_sections(value):
            lines.append(f"{name}:{comment}")
            for index, item in enumerate(value):
                first, *rest = _render_section(item, (*here, index), sources)
                lines += [f"  - {first}", *_indent(rest, "    ")]
        else:
            lines.append(f"{name}: {_render_value(value)}{comment}")
    return lines


def _list_written(section: Section, path: KeyPath) -> list[str]:
    """The keys to write: all but those that another one excludes."""
    names = list(list_fields(type(section)))
    if getattr(section, "adapter", None) is not None:
        return ["adapter"]
    prefix = ".".join(map(str, path))
    excluded = {
        other.rpartition(".")[2]
        for one, other in EXCLUSIVE.items()
        if one.rpartition(".")[0] == prefix and _get(section, one.rpartition(".")[2]) is not None
    }
    return [name for name in names if name not in excluded]


def _get(section: Section, name: str) -> Any:
    return getattr(section, "schema_version" if name == "schema" else name)


def _is_sections(value: Any) -> bool:
    return isinstance(value, tuple) and bool(value) and isinstance(value[0], Section)


def _indent(lines: list[str], blanks: str) -> list[str]:
    return [blanks + line for line in lines]


def _render_value(value: Any) -> str:
    """A value on one line, in YAML that PyYAML's own reader takes the same way."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_render_key(key)}: {_render_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_render_value(item) for item in value) + "]"
    if isinstance(value, float):
        text = repr(value)
        return text if "." in text or "e" not in text else text.replace("e", ".0e")  # 1e-08 is text in YAML 1.1
    return _render_text(value) if isinstance(value, str) else json.dumps(value)


def _render_key(key: str) -> str:
    text = _render_text(key)
    return f"? {text}" if len(text) > _MAX_KEY else text


def _render_text(text: str) -> str:
    if _PLAIN.fullmatch(text) and text.lower() not in WORDS and read_scalar(text.lower()) == text.lower():
        return text
    quoted = json.dumps(text, ensure_ascii=False)
    return "".join(f"\\U{ord(character):08X}" if _UNSAFE.match(character) else character for character in quoted)
