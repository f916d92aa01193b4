"""The proof of a quantised folder: its tensors as planned, then its answers against its source's, and block by block.

source ─▶ log-probabilities and hidden states ─▶ (freed) ─▶ the folder, dequantised ─▶ KL, top-1, loss, worst blocks
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, isfinite
from pathlib import Path
from typing import Any

from ftcli.data.chat import ChatRenderer, Rendered
from ftcli.errors import ContentError, explain, is_lack_of_memory
from ftcli.evaluate.block import BlockError, BlockRecording, compare_blocks, record_blocks
from ftcli.evaluate.compare import Recording, compare
from ftcli.evaluate.subject import Subject, TorchBackend
from ftcli.evaluate.verdict import Verdict
from ftcli.events import Notice, OnEvent, Stage
from ftcli.merge.verify import measure_options, record_subject
from ftcli.quantize.method import find_block_limit, find_limit
from ftcli.quantize.plan import STATE, Plan
from ftcli.store.file import make_folder
from ftcli.store.weight import read_weight_table
from ftcli.train.memory import release_models

_WORST = 5  # blocks that are told of


@dataclass(frozen=True)
class Verification:
    """What came of it: ``problem`` is what is wrong with the folder itself, empty for a sound one.

    ``verdict`` is None where nothing was compared, ``skipped`` says why; ``worst`` are the blocks that lost most, the
    worst first, of which none may lose more than ``most_error``.
    """

    verdict: Verdict | None = None
    problem: str = ""
    worst: tuple[BlockError, ...] = ()
    most_error: float = inf
    skipped: str = ""

    @property
    def has_passed(self) -> bool:
        """Whether the folder may be used for its source, as far as that was measured."""
        return not self.problem and not self.broken and (self.verdict is None or self.verdict.has_passed)

    @property
    def broken(self) -> tuple[BlockError, ...]:
        """The blocks that lost more than any may, of those that are told of."""
        return tuple(block for block in self.worst if not block.error <= self.most_error)

    def to_json(self) -> dict[str, Any]:
        """The figures by the names of ``--json``, null where models were not compared."""
        names = ("kl", "most_kl", "kl_base", "top1", "ppl_source", "ppl_result", "n_tokens")
        found = self.verdict.to_json() if self.verdict else {}
        worst = [{"name": block.name, "error": block.error} for block in self.worst if isfinite(block.error)]
        figures = {name: found.get(name) for name in names}
        reasons = {"problem": self.problem or None, "skipped": self.skipped or None}
        return {**figures, "worst": worst, "passed": self.has_passed, **reasons}


@dataclass(frozen=True)
class Expected:
    """What a result is held against: what the source says of ``documents``.

    ``kl_base`` is how far its fine-tuning moved it there, None if that is not known; ``is_4bit`` says that its base was
    held in 4 bits, and the original weights are quantised.
    """

    renderer: ChatRenderer
    documents: Sequence[Rendered]
    recording: Recording
    blocks: BlockRecording | None
    kl_base: float | None = None
    is_4bit: bool = False


def record_source(
    open_source: Callable[[], Subject], documents: Sequence[Rendered], folder: Path, on_event: OnEvent, *, is_4bit: bool
) -> Expected:
    """What the model that ``open_source`` loads says of ``documents``; it is in memory only meanwhile.

    Raises:
        MemoryExhausted: it does not fit.
    """
    on_event(Stage("verify", "the source"))
    make_folder(folder)
    source = open_source()
    recording, kl_base = record_subject(source, documents, folder, on_event)
    blocks = record_blocks(source.backend, documents) if isinstance(source.backend, TorchBackend) else None
    return Expected(source.renderer, documents, recording, blocks, kl_base, is_4bit)


def verify_folder(
    folder: Path, plan: Plan, expected: Expected | str, open_result: Callable[[], Any], on_event: OnEvent
) -> Verification:
    """What the folder is worth.

    Args:
        folder: the quantised model.
        plan: what it should hold.
        expected: of its source; or why nothing is compared with it.
        open_result: loads it.
        on_event: told of stages and progress, and why nothing was compared.
    """
    on_event(Stage("verify", plan.spec.title))
    if problem := find_problem(folder, plan):
        return Verification(problem=problem)
    if isinstance(expected, str):
        return Verification(skipped=expected)
    try:
        backend = TorchBackend(open_result(), expected.renderer)
        found = compare(expected.recording, backend, expected.documents, **measure_options(on_event))
        worst = compare_blocks(expected.blocks, backend)[:_WORST] if expected.blocks else ()
        del backend
        release_models()
    except ContentError as error:
        return Verification(problem=explain(error))
    except Exception as error:
        if not is_lack_of_memory(error):
            raise
        skipped = "the result does not fit in memory"
        on_event(Notice(f"{skipped}: it is not compared with its source"))
        return Verification(skipped=skipped)
    limit = find_limit(plan.spec, found.loss_source, expected.kl_base, is_4bit=expected.is_4bit)
    return Verification(Verdict(found, expected.kl_base, limit), "", worst, find_block_limit(plan.spec))


def find_problem(folder: Path, plan: Plan) -> str:
    """What is not in the files as it was planned; empty for nothing."""
    table = read_weight_table(folder)
    if table.faults:
        return table.faults[0]
    found = {tensor.name: (tensor.dtype, tensor.shape) for tensor in table.tensors}
    wanted = {tensor.name: (tensor.dtype, tensor.shape) for tensor in plan.tensors}
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name) and not (name.endswith(STATE) and name in found):
            return f"the tensor {name} is not as it was to be written"
    return ""
