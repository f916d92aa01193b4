"""The proof of a GGUF file: its tensors as planned, its end of a turn as trained, and its answers against its source's.

source ─▶ log-probabilities on disk ─▶ (freed) ─▶ each file in llama.cpp ─▶ KL, top-1, loss
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftcli.data.chat import ChatRenderer, Rendered
from ftcli.errors import ContentError, FtcliError, UsageError
from ftcli.evaluate.compare import Recording, compare, record
from ftcli.evaluate.llama_library import load_library
from ftcli.evaluate.subject import Subject, open_subject
from ftcli.evaluate.verdict import Verdict
from ftcli.events import Notice, OnEvent, Progress, Stage
from ftcli.gguf.kind import find_limit
from ftcli.gguf.vocabulary import KNOWN_ENDS
from ftcli.gguf.write import OutputTensor
from ftcli.merge.verify import BATCH_TOKENS
from ftcli.store.file import make_folder
from ftcli.store.gguf_header import check_gguf_data
from ftcli.store.vocabulary import read_gguf_vocabulary


@dataclass(frozen=True)
class Verification:
    """What came of it: ``problem`` is what is wrong with the file itself, empty for a sound one.

    ``verdict`` is None where there were no rows, or nothing that runs the file.
    """

    verdict: Verdict | None = None
    problem: str = ""

    @property
    def has_passed(self) -> bool:
        """Whether the file may be used for its source, as far as that was measured."""
        return not self.problem and (self.verdict is None or self.verdict.has_passed)

    def to_json(self) -> dict[str, Any]:
        """The figures by the names of ``--json``, null where models were not compared."""
        figures: dict[str, Any] = dict.fromkeys(("kl", "most_kl", "top1", "ppl_source", "ppl_result", "n_tokens"))
        if self.verdict:
            found = self.verdict.to_json()
            figures = {key: found[key] for key in figures}
        return {**figures, "passed": self.has_passed, "problem": self.problem or None}


@dataclass(frozen=True)
class Reference:
    """What the source says of some documents, and how those were read."""

    recording: Recording
    documents: Sequence[Rendered]
    renderer: ChatRenderer


def record_source(
    open_source: Callable[[], Subject], documents: Sequence[Rendered], folder: Path, on_event: OnEvent
) -> Reference:
    """What the model says that ``open_source`` loads, in files of ``folder``; it is in memory only meanwhile.

    Raises:
        MemoryExhausted: it does not fit.
    """
    on_event(Stage("verify", "the source"))
    make_folder(folder)
    source = open_source()
    recording = record(source.backend, documents, folder, **_measure(on_event))
    return Reference(recording, documents, source.renderer)


def verify_file(
    path: Path,
    kind: str,
    tensors: Sequence[OutputTensor],
    renderer: ChatRenderer | None,
    reference: Reference | None,
    on_event: OnEvent,
    *,
    allowance: float = 0.0,
) -> Verification:
    """What the file at ``path`` is worth.

    Args:
        path: the file.
        kind: of file, which says what it may lose.
        tensors: what it should hold.
        renderer: as the model was trained; None where it has no template.
        reference: of its source; None compares nothing.
        on_event: told of stages and progress, and why nothing was compared.
        allowance: what it may be away besides, in nats, because its base is not the one that was trained on.
    """
    on_event(Stage("verify", path.name))
    if problem := find_problem(path, tensors, renderer):
        return Verification(problem=problem)
    if reference is None:
        return Verification()
    try:
        result = open_subject(str(path), renderer=reference.renderer, on_event=on_event)
        found = compare(reference.recording, result.backend, reference.documents, **_measure(on_event))
    except (ContentError, UsageError) as error:
        told = f"{error.what}: {error.why}" if error.why else error.what
        if _has_library():
            return Verification(problem=told)
        on_event(Notice(f"{path.name} is not compared with its source: {told}"))
        return Verification()
    return Verification(Verdict(found, limit=find_limit(kind) + allowance))


def find_problem(path: Path, tensors: Sequence[OutputTensor], renderer: ChatRenderer | None) -> str:
    """What is not in the file at ``path`` as it should be; empty for nothing."""
    try:
        header = read_gguf_vocabulary(path)
        check_gguf_data(header, path.stat().st_size, path.name)
    except ContentError as error:
        return f"{error.what}: {error.why}" if error.why else error.what
    found = {tensor.name: (tensor.shape, tensor.dtype) for tensor in header.tensors}
    wanted = {tensor.name: (tensor.shape, tensor.dtype) for tensor in tensors}
    if wrong := sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name)):
        return f"the tensor {wrong[0]} is not as it was to be written"
    stops = {header.metadata.get(f"tokenizer.ggml.{role}_token_id") for role in ("eos", "eot")}
    texts = header.metadata["tokenizer.ggml.tokens"]
    known = KNOWN_ENDS | {texts[stop] for stop in stops if stop is not None}
    if (ends := _list_ends(renderer)) and not known.intersection(ends):
        return f"llama.cpp would not end an answer at {ends[0]}"
    return ""


def _list_ends(renderer: ChatRenderer | None) -> tuple[str, ...]:
    """The tokens that end a turn; none where there is no template, or one without an end."""
    try:
        return renderer.find_turn_ends() if renderer else ()
    except FtcliError:
        return ()


def _has_library() -> bool:
    try:
        load_library()
    except UsageError:
        return False
    return True


def _measure(on_event: OnEvent) -> dict[str, Any]:
    return {
        "batch_tokens": BATCH_TOKENS,
        "on_progress": lambda done, total: on_event(Progress("verify", done, total)),
    }
