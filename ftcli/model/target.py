"""Which modules LoRA is put on: presets, names and patterns, each checked against the model.

    attn           q, k, v, o (or the fused qkv)      attn+gate_up   … and the FFN's way up
    all-linear     every linear layer of every block  names, regex   as PEFT reads them

A module's kind follows from where it stands: below a module named attention it is attention, elsewhere in a
block it belongs to the FFN. So fused projections (Phi-3) and other families need no list of their own.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftcli.errors import UsageError
from ftcli.recipe import PeftSection

if TYPE_CHECKING:
    from torch import nn

PRESETS = ("attn", "attn+gate_up", "all-linear")
_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
# the FFN's linear layers that widen, by the names of the families (gated, fused, GPT-2, Phi-2, Falcon)
_WIDENING = {"gate_proj", "up_proj", "gate_up_proj", "w1", "w3", "c_fc", "fc1", "fc_in", "dense_h_to_4h", "up"}


@dataclass(frozen=True)
class Targets:
    """What LoRA is put on: full names of the modules, and the same as PEFT's config writes it."""

    modules: tuple[str, ...]
    target_modules: str | list[str]
    layers_to_transform: list[int] | None


@dataclass(frozen=True)
class ModuleTable:
    """A model's modules by full name → ``Linear``, ``Embedding`` or another class, containers with them."""

    kinds: Mapping[str, str]
    is_tied: bool

    @property
    def linear(self) -> list[str]:
        return [name for name, kind in self.kinds.items() if kind == "Linear"]


def list_modules(model: nn.Module) -> ModuleTable:
    """The modules of a model in memory; weights are not touched, so one on the meta device serves."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    config: Any = model.config
    kinds = {}
    for name, module in model.named_modules():
        is_linear = isinstance(module, nn.Linear | Conv1D)
        kind = "Embedding" if isinstance(module, nn.Embedding) else type(module).__name__
        kinds[name] = "Linear" if is_linear else kind
    return ModuleTable(kinds, bool(config.tie_word_embeddings))


def plan_targets(model: ModuleTable, peft: PeftSection) -> Targets:
    """The modules of ``model`` that ``peft`` means.

    Raises:
        UsageError: a name, pattern or layer that matches nothing, or LoRA on a tied head or embedding.
    """
    linear = model.linear
    layers = plan_layers(peft.layers_to_transform, count_layers(linear))
    asked = peft.target_modules
    if isinstance(asked, str) and asked in PRESETS:
        chosen = [name for name in linear if _LAYER.search(name) and _kind(name) in _PRESET_KINDS[asked]]
        target_modules: str | list[str] = shorten_names(chosen, list(model.kinds))
    elif isinstance(asked, str):
        chosen, target_modules = _match_pattern(asked, linear), asked
    else:
        chosen = [name for entry in asked for name in _match_name(entry, model)]
        _check_adaptable(model, chosen)
        target_modules = list(asked)
    if layers is not None:
        chosen = [name for name in chosen if (found := _LAYER.search(name)) and int(found.group(1)) in layers]
        if isinstance(target_modules, str):  # PEFT applies layers to lists of names only
            target_modules, layers = chosen, None
    if not chosen:
        raise UsageError("matches no linear layer of this model", where="peft.target_modules")
    _check_tied(model, chosen)
    _check_patterns(chosen, "rank_pattern", peft.rank_pattern)
    _check_patterns(chosen, "alpha_pattern", peft.alpha_pattern)
    for entry in peft.modules_to_save or ():
        _match_name(entry, model, where="peft.modules_to_save")
    return Targets(tuple(dict.fromkeys(chosen)), target_modules, layers)


_PRESET_KINDS = {
    "attn": {"attention"},
    "attn+gate_up": {"attention", "widening"},
    "all-linear": {"attention", "widening", "narrowing"},
}


def plan_layers(layers: Sequence[int] | str | None, n_layers: int) -> list[int] | None:
    """``layers_to_transform`` as indices from 0: a list, ``last:8``, ``8-23`` (both ends in), or None for all.

    Raises:
        UsageError: a layer that the model has not.
    """
    if layers is None:
        return None
    if isinstance(layers, str):
        first, _, last = layers.partition("-")
        if layers.startswith("last:"):
            wanted = list(range(n_layers - int(layers.removeprefix("last:")), n_layers))
        else:
            wanted = list(range(int(first), int(last) + 1))
    else:
        wanted = list(layers)
    if not wanted or min(wanted) < 0 or max(wanted) >= n_layers:
        raise UsageError(
            f"{layers!r} does not fit: the model has {n_layers} layers, 0 to {n_layers - 1}",
            where="peft.layers_to_transform",
        )
    return wanted


def count_layers(names: Iterable[str]) -> int:
    """The number of blocks that the module names speak of."""
    return 1 + max((int(found.group(1)) for name in names if (found := _LAYER.search(name))), default=-1)


def shorten_names(chosen: Sequence[str], everything: Sequence[str]) -> list[str]:
    """The shortest name endings that mean ``chosen`` and nothing else of ``everything``, sorted."""
    meanings = Counter(ending for name in everything for ending in _list_endings(name))
    wanted = Counter(ending for name in chosen for ending in _list_endings(name))
    return sorted({next(e for e in _list_endings(name) if wanted[e] >= meanings[e]) for name in chosen})


def _list_endings(name: str) -> list[str]:
    """``a.b.c`` → ``c``, ``b.c``, ``a.b.c``."""
    parts = name.split(".")
    return [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]


def _kind(name: str) -> str:
    *parents, leaf = name.split(".")
    if any("attn" in parent or "attention" in parent for parent in parents):
        return "attention"
    return "widening" if leaf in _WIDENING else "narrowing"


def _check_adaptable(model: ModuleTable, chosen: Sequence[str]) -> None:
    for name in chosen:
        if (kind := model.kinds[name]) not in ("Linear", "Embedding"):
            raise UsageError(
                f"{name} is a {kind}, which LoRA cannot be put on",
                where="peft.target_modules",
                hint="name linear layers; to train other modules whole, use peft.modules_to_save",
            )


def _match_pattern(pattern: str, linear: Sequence[str]) -> list[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UsageError(f"{pattern!r} is no valid regex: {error}", where="peft.target_modules") from error
    if chosen := [name for name in linear if compiled.fullmatch(name)]:
        return chosen
    known = [*PRESETS, *_leaf_names(linear)]
    raise UsageError(
        f"{pattern!r} is no preset, and as a regex it matches the full name of no linear layer",
        where="peft.target_modules",
        hint=_suggest(pattern, known) + f"; presets: {', '.join(PRESETS)}; a module's full name: {linear[0]}",
    )


def _match_name(entry: str, model: ModuleTable, *, where: str = "peft.target_modules") -> list[str]:
    """Full names of the modules that end in ``entry``, as PEFT matches them."""
    if chosen := [name for name in model.kinds if name == entry or name.endswith("." + entry)]:
        return chosen
    parents = {name.rpartition(".")[0] for name in model.kinds}
    leaves = _leaf_names(name for name in model.kinds if name not in parents)
    raise UsageError(
        f"{entry!r} is no module of this model",
        where=where,
        hint=_suggest(entry, leaves),
    )


def _leaf_names(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))


def _suggest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"the model has {', '.join(known)}"


def _check_tied(model: ModuleTable, chosen: Sequence[str]) -> None:
    """LoRA on one of two tied matrices cannot be merged: peft 0.21 moves the other one too, or twice."""
    leaves = {name.rsplit(".", 1)[-1] for name in chosen}
    if model.is_tied and leaves & {"embed_tokens", "lm_head", "wte"}:
        raise UsageError(
            "the head and the embedding of this model are one matrix, and LoRA on it cannot be merged",
            where="peft.target_modules",
            hint="train new tokens with tokenizer.add_tokens (PEFT's trainable_token_indices), "
            "or the whole matrix with peft.modules_to_save: [embed_tokens]",
        )


def matches_pattern(pattern: str, name: str) -> bool:
    """Whether a key of a rank or alpha pattern means the module ``name``, as peft.utils.other.get_pattern_key does."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def _check_patterns(chosen: Sequence[str], key: str, patterns: dict[str, Any]) -> None:
    """Every key of a rank or alpha pattern must mean a target; PEFT ignores the others silently."""
    for pattern in patterns:
        try:
            found = any(matches_pattern(pattern, name) for name in chosen)
        except re.error as error:
            raise UsageError(f"{pattern!r} is no valid regex: {error}", where=f"peft.{key}") from error
        if not found:
            raise UsageError(
                f"{pattern!r} matches none of the modules that LoRA is put on",
                where=f"peft.{key}",
                hint=_suggest(pattern, _leaf_names(chosen)),
            )
