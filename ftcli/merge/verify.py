"""The proof: the adapter on its base against the merged folder, on rows that were trained on and rows that were not.

    adapter on base ─▶ log-probabilities on disk ─▶ (freed) ─▶ merged folder ─▶ KL, top-1, loss ─▶ the other base

One model is in memory at a time. Where not even that fits, each tensor of the result is checked instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ftcli.data.chat import Rendered
from ftcli.evaluate.compare import Comparison, Recording, compare, record
from ftcli.evaluate.loss import compute_perplexity
from ftcli.evaluate.subject import Subject, TorchBackend
from ftcli.evaluate.verdict import Verdict
from ftcli.events import OnEvent, Progress, Stage, ignore_event
from ftcli.merge.arithmetic import make_blocks, read_base
from ftcli.merge.folder import iterate_tensors
from ftcli.merge.plan import MergePlan, Part, Weights
from ftcli.model.stored import read_rows
from ftcli.store.file import make_folder
from ftcli.store.weight import read_weight_table
from ftcli.train.memory import release_models

_BATCH_TOKENS = 2048
MOST_TOKENS = 2048  # trained tokens of each set that are compared
_PROBE_SEED, _PROBE_BYTES = 0, 8 << 20  # of a block in float64
_FLOAT32 = 2.0**-22  # what sums in float32 add to the rounding


@dataclass(frozen=True)
class Verification:
    """What came of it: a verdict on each set of rows, or on the tensors alone.

    ``sets`` are named ``train``, ``held_out`` or ``data``; ``other`` are the same figures for the base that was not
    chosen, of a run in 4 bits. ``worst_tensor`` and its error relative to what rounding allows are those of tensors.
    """

    sets: Mapping[str, Verdict] = field(default_factory=dict)
    other: Mapping[str, Verdict] = field(default_factory=dict)
    worst_tensor: str = ""
    worst_error: float = 0.0

    @property
    def has_passed(self) -> bool:
        """Whether nothing exceeds its bound."""
        return all(verdict.has_passed for verdict in self.sets.values()) and self.worst_error <= 1

    def to_json(self) -> dict[str, Any]:
        """The figures over all sets together, and of each."""
        return {
            "method": "models" if self.sets else "tensors",
            **_join(list(self.sets.values())),
            "passed": self.has_passed,
            "sets": {name: verdict.to_json() for name, verdict in self.sets.items()},
            "other": {name: verdict.to_json() for name, verdict in self.other.items()},
            "worst_tensor": self.worst_tensor or None,
            "worst_error": self.worst_error if self.worst_tensor and math.isfinite(self.worst_error) else None,
        }


def measure_options(on_event: OnEvent) -> dict[str, Any]:
    """How two models are compared to prove an artifact, and told of."""
    return {
        "batch_tokens": _BATCH_TOKENS,
        "on_progress": lambda done, total: on_event(Progress("verify", done, total)),
    }


def record_subject(
    source: Subject, documents: Sequence[Rendered], folder: Path, on_event: OnEvent, *, measures_base: bool = True
) -> tuple[Recording, float | None]:
    """What ``source`` says of ``documents``, in files of ``folder``; how far it is from its base, if it has one."""
    recording = record(source.backend, documents, folder, **measure_options(on_event))
    if not (measures_base and source.base):
        return recording, None
    return recording, compare(recording, source.base.backend, documents, **measure_options(on_event)).kl


def verify_models(
    open_source: Callable[[], Subject],
    open_result: Callable[[], Any],
    sets: Mapping[str, Sequence[Rendered]],
    scratch: Path,
    *,
    change_base: Callable[[Any], None] | None = None,
    on_event: OnEvent = ignore_event,
) -> Verification:
    """The result held against its source on every one of ``sets``.

    Args:
        open_source: loads the adapter on its base, which knows its base.
        open_result: loads the merged model.
        sets: name → documents.
        scratch: an empty folder for what the source says.
        change_base: turns the weights of the merged model into those of a merge onto the other base.
        on_event: told of stages and progress.

    Raises:
        MemoryExhausted: one of both models does not fit.
    """
    options = measure_options(on_event)
    on_event(Stage("verify", "the adapter on its base"))
    source = open_source()
    renderer, recorded = source.renderer, {}
    for name, documents in sets.items():
        folder = scratch / name
        make_folder(folder)
        recorded[name] = record_subject(source, documents, folder, on_event)
    del source
    release_models()

    def judge(model: Any) -> dict[str, Verdict]:
        backend = TorchBackend(model, renderer)
        verdicts = {}
        for name, documents in sets.items():
            recording, kl_base = recorded[name]
            verdicts[name] = Verdict(compare(recording, backend, documents, **options), kl_base)
        return verdicts

    on_event(Stage("verify", "the merged model"))
    model = open_result()
    found = judge(model)
    other: dict[str, Verdict] = {}
    if change_base:
        on_event(Stage("verify", "a merge onto the other base"))
        change_base(model)
        other = judge(model)
    return Verification(found, other)


@torch.no_grad()
def fill_weights(model: Any, plan: MergePlan, weights: Weights) -> None:
    """Nothing; ``model`` has the weights of the merge ``plan`` into ``weights``."""
    parameters = dict(model.state_dict(keep_vars=True))
    for part, value in iterate_tensors(plan, weights):
        parameters[part.name].copy_(value)


def verify_tensors(folder: Path, plan: MergePlan, weights: Weights) -> Verification:
    """Every tensor in ``folder`` held against base and adapter, by another way than it was made.

    A copy must equal the base. A merged matrix is applied to a vector of signs x and held against W x + s B (A x) in
    float64: their distance must not exceed what rounding each weight can make of it, u‖W'‖ with u half a unit in
    the last place; 1 stands for that.
    """
    entries = {entry.name: entry for entry in read_weight_table(folder).tensors}
    worst, worst_name = 0.0, "none"
    for part in plan.parts:
        read = partial(read_rows, folder, entries[part.name])
        is_probed = part.lora is not None and not (part.lora.transposed and part.lora.magnitude is not None)
        error = _probe(part, weights, read) if is_probed else _compare_copy(part, weights, read)
        if error > worst or worst_name == "none":
            worst, worst_name = error, part.name
    return Verification(worst_tensor=worst_name, worst_error=worst)


def _compare_copy(part: Part, weights: Weights, read: Callable[[int, int], torch.Tensor]) -> float:
    """0 if the result's tensor holds the values that it should, else infinity."""
    start = 0
    for block in make_blocks(part, weights):
        n_rows = block.shape[0] if block.ndim else 1
        if not torch.equal(block.reshape(-1), read(start, start + n_rows).reshape(-1)):
            return float("inf")
        start += n_rows
    return 0.0


def _probe(part: Part, weights: Weights, read: Callable[[int, int], torch.Tensor]) -> float:
    """How far the merged matrix is from base and update, where 1 is what rounding may do to it."""
    lora, (n_rows, n_columns) = part.lora, part.tensor.shape
    assert lora is not None
    generator = torch.Generator().manual_seed(_PROBE_SEED)
    x = torch.randint(0, 2, (n_columns,), generator=generator).double() * 2 - 1
    a, b = (lora.b.T, lora.a.T) if lora.transposed else (lora.a, lora.b)
    low = a.double() @ x * lora.scale
    unit = torch.finfo(part.dtype).eps / 2
    off = size = 0.0
    step = max(1, _PROBE_BYTES // (8 * n_columns))
    for start in range(0, n_rows, step):
        stop = min(n_rows, start + step)
        base = read_base(part, weights, start, stop).double()
        wanted = base @ x + b[start:stop].double() @ low
        if lora.magnitude is not None:
            summed = base + b[start:stop].double() @ a.double() * lora.scale
            wanted *= lora.magnitude[start:stop].double() / torch.linalg.norm(summed, dim=1)
        merged = read(start, stop).double()
        off += (merged @ x - wanted).square().sum().item()
        size += merged.square().sum().item()
    return float("inf") if math.isnan(off) else (off / max(size, 1e-300)) ** 0.5 / (unit + _FLOAT32)


def _join(verdicts: Sequence[Verdict]) -> dict[str, float | None]:
    """KL, top-1 and perplexities over the tokens of all sets."""
    n_tokens = sum(verdict.comparison.n_tokens for verdict in verdicts)
    if not n_tokens:
        return dict.fromkeys(("kl", "top1", "ppl_source", "ppl_result"))

    def average(choose: Callable[[Comparison], float]) -> float:
        return sum(choose(v.comparison) * v.comparison.n_tokens for v in verdicts) / n_tokens

    joined = {
        "kl": average(lambda found: found.kl),
        "top1": average(lambda found: found.top1),
        "ppl_source": compute_perplexity(average(lambda found: found.loss_source)),
        "ppl_result": compute_perplexity(average(lambda found: found.loss_result)),
    }
    return {key: value if math.isfinite(value) else None for key, value in joined.items()}
