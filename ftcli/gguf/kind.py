"""Which kinds of file are asked for, by the names that llama.cpp gives them; what each may lose."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from ftcli.errors import UsageError
from ftcli.evaluate.verdict import bound_kl
from ftcli.gguf.draft import KINDS

# nats per trained token; the smaller a model, the more it loses, and these are for small ones
_LIMITS = {
    "f32": 0.02,
    "f16": 0.02,
    "bf16": 0.02,
    "q8_0": 0.03,
    "q6_k": 0.05,
    "q5": 0.1,
    "q4": 0.3,
    "q3": 0.8,
    "q2": 3.0,
}
# kinds that hardly round: what a runtime's own arithmetic does to a model
_FLOORS = {"f32": 0.005, "f16": 0.005, "bf16": 0.005, "q8_0": 0.01}
_LARGER = {
    "q2": "q4_k_m",
    "q3": "q4_k_m",
    "q4": "q6_k",
    "q5": "q8_0",
    "q6": "q8_0",
    "q8": "f16",
    "f1": "f32",
    "bf": "f32",
}
_INSTEAD = {
    "iq4": "q4_k_m",
    "iq3": "q3_k_m",
    "iq2": "q2_k",
    "iq1": "q2_k",
    "tq1": "q2_k",
    "tq2": "q2_k",
    "q2_k_s": "q2_k",
}


def find_kinds(names: Sequence[str]) -> tuple[str, ...]:
    """The kinds of file that ``names`` mean, whatever their case, each once.

    Raises:
        UsageError: none is named, or one that ftcli does not write.
    """
    if not names:
        raise UsageError("no type of GGUF file is named", hint="name one: --gguf q4_k_m")
    return tuple(dict.fromkeys(_find_kind(name) for name in names))


def find_limit(kind: str, kl_base: float | None = None, *, is_4bit: bool = False) -> float:
    """The most nats per trained token that a file of this kind may be away from its source.

    Args:
        kind: of file; those that hardly round may not be away by more than a share of what the fine-tuning did.
        kl_base: how far that moved the model, None if it is not known.
        is_4bit: whether it was trained on a base in 4 bits, and the file holds the original weights: it may then be
            away besides by as much as a merge may.
    """
    limit = _LIMITS.get(kind) or _LIMITS[kind[:2]]
    if floor := _FLOORS.get(kind):
        limit = bound_kl(kl_base, floor=floor, ceiling=limit)
    return limit + (bound_kl(kl_base) if is_4bit else 0.0)


def can_tell_loss(kind: str) -> bool:
    """Whether a file of this kind rounds so little that a fine-tune which it lost would show."""
    return kind in _FLOORS


def suggest_larger(kind: str) -> str:
    """The kind to take where this one lost too much; empty for the largest."""
    larger = _LARGER.get(kind[:2], "")
    return larger if larger in KINDS else ""


def _find_kind(name: str) -> str:
    kind = name.strip().lower()
    if "," in kind or not kind:
        several = " ".join(f"--gguf {part.strip()}" for part in kind.split(",") if part.strip())
        hint = f"repeat the option: {several}" if several else "name one: --gguf q4_k_m"
        raise UsageError("is not one type", where=f"--gguf {name!r}", hint=hint)
    if kind in KINDS:
        return kind
    if instead := next((value for start, value in _INSTEAD.items() if kind.startswith(start)), ""):
        raise UsageError(
            "this type is not written by ftcli",
            where=f"--gguf {name}",
            why="it is made for an importance matrix, which ftcli does not compute",
            hint=f"take {instead}, which needs none",
        )
    near = difflib.get_close_matches(kind, KINDS, n=1, cutoff=0.5)
    meant = f"did you mean {near[0]}? " if near else ""
    raise UsageError("there is no such type", where=f"--gguf {name}", hint=f"{meant}There are: {', '.join(KINDS)}")
