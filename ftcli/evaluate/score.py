"""Right or wrong: an answer held against its reference."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any


def score_exact_match(answer: str, reference: str) -> bool:
    """Whether both texts are the same, blanks around them apart."""
    return answer.strip() == reference.strip()


def score_json(answer: str, reference: str) -> bool:
    """Whether both texts are JSON of equal value: order of keys and blanks do not count, 1 equals 1.0."""
    try:
        return _are_equal(json.loads(answer), json.loads(reference))
    except (ValueError, RecursionError):
        return False


def _are_equal(first: Any, second: Any) -> bool:
    """Equality of JSON values; ``true`` is not 1."""
    if isinstance(first, bool) or isinstance(second, bool):
        return first is second
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_are_equal(first[key], second[key]) for key in first)
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(_are_equal, first, second))
    return bool(first == second)


SCORES: dict[str, Callable[[str, str], bool]] = {"exact_match": score_exact_match, "json": score_json}
