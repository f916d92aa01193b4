"""How tokens are chosen, as a person types it: ``temperature=0.7 top_p=0.9``; ranges, and what has no effect."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any

from ftcli.errors import UsageError
from ftcli.evaluate.generate import Sampling

_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "top_k": (0, 2**31 - 1),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
    "seed": (0, 2**32 - 1),
    "max_new_tokens": (1, 2**31 - 1),
}
_LEAST_TEMPERATURE = 0.001  # logits divided by less are beyond float32
_OF_SAMPLING = ("top_p", "top_k", "min_p", "seed")


def describe_params(sampling: Sampling) -> str:
    """The parameters as ``/params`` takes them, and which of those that were set have no effect."""
    text = " ".join(f"{name}={value}" for name, value in asdict(sampling).items())
    return "\n".join(filter(None, (text, describe_idle(sampling))))


def describe_idle(sampling: Sampling) -> str:
    """Which parameters were set but have no effect, and why; nothing where all have one."""
    idle = [name for name in _OF_SAMPLING if getattr(sampling, name) != getattr(Sampling(), name)]
    if not idle or sampling.temperature > 0:
        return ""
    return f"with temperature=0 the most probable token is taken: {', '.join(idle)} without effect"


def read_params(text: str, sampling: Sampling) -> Sampling:
    """``sampling`` with what ``text`` sets: ``temperature=0.7 top_p=0.9``.

    Raises:
        UsageError: an unknown name, or a value of another type or out of its range.
    """
    changes: dict[str, Any] = {}
    for word in re.sub(r"\s*=\s*", "=", text).split():
        given, equals, value = word.partition("=")
        name = given.lower().replace("-", "_")
        if name not in _RANGES:
            hint = suggest(name, _RANGES) or f"there are {', '.join(_RANGES)}"
            raise UsageError(f"unknown parameter {given}", hint=hint)
        if not equals:
            raise UsageError(f"{name} without a value", hint=f"write {name}=VALUE")
        kind = type(getattr(sampling, name))
        try:
            changes[name] = kind(value)
        except ValueError:
            wanted = "a whole number" if kind is int else "a number"
            raise UsageError(f"{name} takes {wanted}, not {value!r}") from None
    changed = replace(sampling, **changes)
    check_sampling(changed)
    return changed


def check_sampling(sampling: Sampling) -> None:
    """None if every parameter is in its range.

    Raises:
        UsageError: the first that is not.
    """
    for name, (low, high) in _RANGES.items():
        value = getattr(sampling, name)
        if not low <= value <= high:  # true of NaN as well
            raise UsageError(f"{name}={value} is not between {low} and {high}")
    if 0 < sampling.temperature < _LEAST_TEMPERATURE:
        what = f"temperature={sampling.temperature} is neither 0 nor at least {_LEAST_TEMPERATURE}"
        raise UsageError(what, hint="0 takes the most probable token")


def suggest(word: str, known: Iterable[str]) -> str:
    """A guess at which of ``known`` is meant; nothing where none is near."""
    names = list(known)
    near = [name for name in names if len(word) > 2 and name.startswith(word)]
    near = near or difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else ""
