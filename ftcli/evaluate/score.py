"""Right or wrong: an answer held against its reference."""

from __future__ import annotations

import json
from collections.abc import Callable


def score_exact_match(answer: str, reference: str) -> bool:
    """Whether both texts are the same, blanks around them apart."""
    return answer.strip() == reference.strip()


def score_json(answer: str, reference: str) -> bool:
    """Whether both texts are JSON of equal value: order of keys and blanks do not count, 1 equals 1.0."""
    try:
        return bool(json.loads(answer) == json.loads(reference))
    except ValueError:
        return False


SCORES: dict[str, Callable[[str, str], bool]] = {"exact_match": score_exact_match, "json": score_json}
