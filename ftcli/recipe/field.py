"""What may stand at a dotted key, asked of the schema: for messages, for ``--set`` and for the reference page."""

from __future__ import annotations

import types
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Lt
from pydantic.fields import FieldInfo

from ftcli.recipe.schema import Recipe
from ftcli.recipe.section import Expected, Section


@dataclass(frozen=True)
class Kind:
    """A type with its limits."""

    annotation: Any
    limits: tuple[Any, ...] = ()


ROOT = Kind(Recipe)


def find_kind(path: Sequence[str | int]) -> Kind | None:
    """The kind of value at ``path``; None where the schema knows no such key."""
    kind = ROOT
    for part in path:
        found = _find_child(kind, part)
        if found is None:
            return None
        kind = found
    return kind


def list_fields(section: type[Section]) -> dict[str, FieldInfo]:
    """The keys of a section as a recipe writes them, in their order."""
    return {field.alias or name: field for name, field in section.model_fields.items()}


@cache
def list_keys() -> tuple[str, ...]:
    """Every dotted key of a recipe in the schema's order; a list of sections is written ``datasets[]``."""
    return tuple(_walk_keys(Recipe, ""))


def list_forms(kind: Kind) -> frozenset[str]:
    """Which of text, number, integer, bool, null, list, mapping and section a value may be."""
    annotation, _ = _unwrap(kind)
    if _is_union(annotation):
        return frozenset().union(*(list_forms(Kind(member)) for member in get_args(annotation)))
    if get_origin(annotation) is Literal:
        return frozenset().union(*(list_forms(Kind(type(choice))) for choice in get_args(annotation)))
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return frozenset({"section"})
    names = {str: "text", float: "number", int: "integer", bool: "bool", type(None): "null"}
    names |= {tuple: "list", dict: "mapping"}
    # what is left is JSON, which may be anything
    return frozenset({names[o]}) if (o := get_origin(annotation) or annotation) in names else frozenset(names.values())


def list_choices(kind: Kind) -> list[str]:
    """The names that a value may be chosen from."""
    annotation, _ = _unwrap(kind)
    if get_origin(annotation) is Literal:
        return [choice for choice in get_args(annotation) if isinstance(choice, str)]
    if _is_union(annotation):
        return [choice for member in get_args(annotation) for choice in list_choices(Kind(member))]
    return []


def find_section(kind: Kind) -> type[Section] | None:
    """The section that a value of this kind, or an item of its list, is; None for any other value."""
    annotation, _ = _unwrap(kind)
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    if _is_union(annotation) or get_origin(annotation) is tuple:
        found = (find_section(Kind(member)) for member in get_args(annotation) if member is not Ellipsis)
        return next((section for section in found if section), None)
    return None


def describe_kind(kind: Kind) -> str:
    """The words after ``expected``."""
    annotation, limits = _unwrap(kind)
    if words := next((limit.words for limit in limits if isinstance(limit, Expected)), None):
        return str(words)
    if _is_union(annotation):
        return " or ".join(describe_kind(Kind(member)) for member in get_args(annotation))
    if get_origin(annotation) is Literal:
        choices = [str(choice) for choice in get_args(annotation)]
        return f"one of {', '.join(choices)}" if len(choices) > 1 else choices[0]
    if get_origin(annotation) is tuple:
        is_section = find_section(Kind(annotation)) is not None
        return "a list of sections" if is_section else "a list of distinct names"
    if find_section(kind):
        return "a section"
    if annotation in (int, float):
        return _describe_number("an integer" if annotation is int else "a number", limits)
    return {str: "text", bool: "true or false", type(None): "null"}.get(annotation, "a value")


def _describe_number(noun: str, limits: Sequence[Any]) -> str:
    words = []
    for limit in limits:
        if isinstance(limit, Ge):
            words.append(f"of at least {limit.ge}")
        elif isinstance(limit, Gt):
            words.append(f"greater than {limit.gt}")
        elif isinstance(limit, Lt):
            words.append(f"below {limit.lt}")
    return f"{noun} {' and '.join(words)}".rstrip()


def _walk_keys(section: type[Section], prefix: str) -> list[str]:
    keys = []
    for name, field in list_fields(section).items():
        keys.append(prefix + name)
        kind = Kind(field.annotation, tuple(field.metadata))
        if inner := find_section(kind):
            keys += _walk_keys(inner, f"{prefix}{name}{'[]' if 'list' in list_forms(kind) else ''}.")
    return keys


def _find_child(kind: Kind, part: str | int) -> Kind | None:
    annotation, _ = _unwrap(kind)
    if isinstance(annotation, type) and issubclass(annotation, Section):
        field = list_fields(annotation).get(str(part))
        return Kind(field.annotation, tuple(field.metadata)) if field else None
    if _is_union(annotation):
        found = (_find_child(Kind(member), part) for member in get_args(annotation))
        return next((child for child in found if child), None)
    if get_origin(annotation) is tuple:
        return Kind(get_args(annotation)[0]) if isinstance(part, int) else None
    if get_origin(annotation) is dict:
        return Kind(get_args(annotation)[1]) if isinstance(part, str) else None
    return None


def _unwrap(kind: Kind) -> tuple[Any, tuple[Any, ...]]:
    annotation, limits = kind.annotation, list(kind.limits)
    while get_origin(annotation) is Annotated:
        annotation, *more = get_args(annotation)
        limits += more
    flat = []
    for limit in limits:
        flat += limit.metadata if isinstance(limit, FieldInfo) else [limit]
    return annotation, tuple(flat)


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)
