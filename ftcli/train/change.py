"""A recipe that changed between a run and its resumption: what each change does, and which ones cannot be made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ftcli.recipe import Recipe, compare_recipes
from ftcli.recipe.schema import EXCLUSIVE

Kind = Literal["same", "rounding", "course", "foreign"]

_LONGEST = 80  # characters of a value that are shown
_BATCH = ("train.per_device_train_batch_size", "train.gradient_accumulation_steps")
_ROWS = "steps would see other rows, some of an epoch twice and others never"
_CURVE = "the learning rate follows the new curve from step {step} on"
_FROM = "holds from step {step} on"
_BASE = "the trained weights belong to the base that they were trained on"
_ROUNDING = "the steps stay the same but for rounding"

# key or section → whether the steps to come stay what they were, and in words
_EFFECTS: dict[str, tuple[Kind, str]] = {
    "schema": ("foreign", "it is another format"),
    "model": ("foreign", _BASE),
    "model.attn_implementation": ("rounding", _ROUNDING),
    "tokenizer": ("foreign", "rows would become other tokens"),
    "quantization": ("foreign", _BASE),
    "peft": ("foreign", "the trained weights would mean something else"),
    "peft.lora_dropout": ("course", _FROM),
    "datasets": ("foreign", _ROWS),
    "data": ("foreign", _ROWS),
    "train.learning_rate": ("course", _CURVE),
    "train.lr_scheduler_type": ("course", _CURVE),
    "train.warmup_ratio": ("course", _CURVE),
    "train.warmup_steps": ("course", _CURVE),
    "train.num_train_epochs": ("course", f"the run has another length, and {_CURVE}"),
    "train.max_steps": ("course", f"the run has another length, and {_CURVE}"),
    "train.optim": ("rounding", _ROUNDING),
    "train.adam_beta1": ("course", _FROM),
    "train.adam_beta2": ("course", _FROM),
    "train.adam_epsilon": ("course", _FROM),
    "train.weight_decay": ("course", _FROM),
    "train.max_grad_norm": ("course", _FROM),
    "train.per_device_train_batch_size": ("foreign", _ROWS),
    "train.gradient_accumulation_steps": ("foreign", _ROWS),
    "train.gradient_checkpointing": ("rounding", _ROUNDING),
    "train.fused": ("rounding", _ROUNDING),
    "train.seed": ("foreign", _ROWS),
    "eval": ("same", "the steps stay the same; measurements from here on are made as it says"),
    "eval.metric": ("course", "another step may be the best one"),
    "eval.early_stopping_patience": ("course", "the run may end at another step"),
    "eval.datasets": ("foreign", "measurements before and after could not be compared"),
    "checkpoint": ("same", "the steps stay the same"),
    "checkpoint.load_best_model_at_end": ("course", "the artifact may be of another step"),
    "logging": ("same", "the steps stay the same"),
    "distributed": ("rounding", _ROUNDING),
    "output_dir": ("same", "the steps stay the same"),
}


# what gives a finished run another artifact without another step
CHOOSES_ARTIFACT = ("eval.metric", "checkpoint.load_best_model_at_end")


@dataclass(frozen=True)
class Change:
    """One key with its values before and now, and what comes of that."""

    key: str
    old: Any
    new: Any
    kind: Kind
    effect: str

    def __str__(self) -> str:
        old, new = (f"{text[:_LONGEST]} …" if len(text := repr(v)) > _LONGEST else text for v in (self.old, self.new))
        return f"{self.key} was {old}, now {new}: {self.effect}"


def list_changes(before: Recipe, now: Recipe, *, next_step: int, processes: tuple[int, int] = (1, 1)) -> list[Change]:
    """What differs, in the schema's order, for a run whose next step is ``next_step``.

    ``processes``: how many there were, and are now.
    """
    keeps_rows = _count_rows(before, processes[0]) == _count_rows(now, processes[1])
    changes = []
    for key, old, new in compare_recipes(before, now):
        kind, effect = find_effect(key)
        if key == "eval" and any(section and section["datasets"] for section in (old, new)):
            kind, effect = find_effect("eval.datasets")
        if any(key == other and _has(before, one) for one, other in EXCLUSIVE.items()):
            old = None  # another key stood in its place
        if key in _BATCH and keeps_rows:
            kind, effect = "rounding", f"steps have the same rows, in portions of another size: {_ROUNDING}"
        changes.append(Change(key, old, new, kind, effect.format(step=next_step)))
    if processes[0] != processes[1]:
        kind, effect = "foreign", _explain_rows(now, *processes)
        if keeps_rows:
            kind, effect = "rounding", f"steps have the same rows, shared otherwise: {_ROUNDING}"
        changes.append(Change("processes", *processes, kind, effect))
    return changes


def _explain_rows(recipe: Recipe, before: int, now: int) -> str:
    """What another number of processes does to the steps, and the setting that keeps them."""
    times = recipe.train.gradient_accumulation_steps * before
    if times % now:
        return f"{_ROWS}; {times} micro-batches a step cannot be shared evenly by {now}"
    return f"{_ROWS}; --set train.gradient_accumulation_steps={times // now} keeps them"


def _has(recipe: Recipe, key: str) -> bool:
    section, _, leaf = key.partition(".")
    return getattr(getattr(recipe, section), leaf) is not None


def find_effect(key: str) -> tuple[Kind, str]:
    """What a change of this dotted key does: by its own entry, or its section's."""
    parts = key.split(".")
    return next(_EFFECTS[name] for n in range(len(parts), 0, -1) if (name := ".".join(parts[:n])) in _EFFECTS)


def list_identity(recipe: Recipe, n_processes: int = 1) -> dict[str, Any]:
    """The values without which a checkpoint of one run could not be one of another.

    Held-out rows are not among them: they are part of the data's hash.
    """
    flat = dict(flatten_section(recipe.model_dump(mode="json", by_alias=True, exclude={"eval"})))
    kept = {key: value for key, value in flat.items() if find_effect(key)[0] == "foreign" and key not in _BATCH}
    return {**kept, "rows per step": _count_rows(recipe, n_processes)}


def _count_rows(recipe: Recipe, n_processes: int) -> int:
    return recipe.train.per_device_train_batch_size * recipe.train.gradient_accumulation_steps * n_processes


def flatten_section(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields dotted keys and values."""
    for key, value in section.items():
        if isinstance(value, Mapping) and value:
            yield from flatten_section(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
