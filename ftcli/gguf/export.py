"""``ftcli export``: a run, an adapter or a model as GGUF files, each held against its source.

    target ─▶ folder, or merge as it is made ─▶ a file of each kind (in a scratch folder) ─▶ verified ─▶ final name

A merge is not written in between, and the file is the one that its folder would give.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftcli.data.chat import ChatRenderer, Rendered
from ftcli.errors import ContentError, FtcliError, is_memory_error
from ftcli.evaluate.loss import count_targets
from ftcli.evaluate.sample import load_known_rows
from ftcli.evaluate.subject import Subject, open_adapter, open_plain
from ftcli.evaluate.target import MANIFEST, Target, find_target
from ftcli.evaluate.verdict import MOST_KL
from ftcli.events import Notice, OnEvent, Saved, Stage, ignore_event
from ftcli.gguf.convert import Converted, convert, plan_file
from ftcli.gguf.kind import find_kinds, suggest_larger
from ftcli.gguf.metadata import read_model_config
from ftcli.gguf.output import Output, find_output
from ftcli.gguf.source import OpenSource, open_folder, open_merge
from ftcli.gguf.verify import Reference, Verification, record_source, verify_file
from ftcli.gguf.write import OutputTensor
from ftcli.merge.card import build_front
from ftcli.merge.run import Merging
from ftcli.merge.source import Source, build_source
from ftcli.merge.verify import MOST_TOKENS
from ftcli.model.base import choose_device, choose_dtype
from ftcli.store.file import check_free, disk_errors, read_json, scratch_folder, write_text
from ftcli.store.run import locked
from ftcli.train.memory import explain_lack, release_models

_HEAD_BYTES = 32 << 20  # of metadata and vocabulary, in each file

Plans = Mapping[str, Sequence[OutputTensor]]


@dataclass(frozen=True)
class ExportedFile:
    """A GGUF file of ``source``; ``verification`` is None where none was wanted.

    ``from_4bit`` says that the source held its base in 4 bits, which the file does not.
    """

    source: str
    kind: str
    path: Path
    size_bytes: int
    bits_per_weight: float
    verification: Verification | None
    from_4bit: bool = False

    @property
    def larger(self) -> str:
        """The kind to take where this one lost too much; empty for the largest."""
        return suggest_larger(self.kind)

    def to_json(self) -> dict[str, Any]:
        """An entry of ``files`` in the document of ``--json``."""
        return {
            "type": self.kind,
            "path": str(self.path),
            "bytes": self.size_bytes,
            "bits_per_weight": self.bits_per_weight,
            "verify": self.verification.to_json() if self.verification else None,
        }


def export(
    target: str | None = None,
    *,
    kinds: Sequence[str],
    output: Path | None = None,
    data: str | None = None,
    verifies: bool = True,
    overwrite: bool = False,
    on_event: OnEvent = ignore_event,
) -> tuple[ExportedFile, ...]:
    """The files that llama.cpp runs, one of each kind, in the order of ``kinds``.

    Args:
        target: a run, an adapter, or a model (folder or Hub id); None is the newest finished run.
        kinds: such as ``q4_k_m``; see `ftcli.gguf.convert.KINDS`.
        output: the folder; by default ``gguf/`` of the run, or ``./NAME-gguf``.
        data: rows to compare on, instead of those of the run.
        verifies: whether each file is held against its source.
        overwrite: replace files that are there.
        on_event: told of stages and progress.

    Raises:
        FtcliError: with the exit code of what happened. A file that failed its verification is there: its
            ``verification`` says so.
    """
    wanted = find_kinds(kinds)
    found = _find_source(target)
    place = find_output(found, output)

    def check() -> None:
        place.check(found, wanted, overwrite=overwrite)

    check()
    on_event(Stage("check", f"{found.name} and {found.files.reference}" if found.adapter else found.name))
    # a run that is only read may be another's, and its folder not ours to write
    run = found.run if found.run and place.folder.resolve().is_relative_to(found.run.path.resolve()) else None
    with locked(run) if run else nullcontext(), scratch_folder(place.folder) as scratch:
        return _Exporting(found, place, scratch, on_event).carry_out(wanted, data, verifies, check)


def _find_source(reference: str | None) -> Target:
    """The run, adapter or model that is exported.

    Raises:
        FtcliError: as `find_target`; or it is a GGUF file, or packed.
    """
    target = find_target(reference)
    if path := target.files.gguf_path if target.adapter is None else None:
        made = read_json(path.parent / MANIFEST) or {}
        known = made.get("source") if made.get("command") == "export" else None
        raise ContentError(
            "is a GGUF file already",
            where=target.name,
            why="what it was rounded from gives better files",
            hint=f"export {known}, from which it was made" if known else "name the folder of the model it is made from",
        )
    return build_source(target) if target.adapter else target


class _Exporting:
    """An export under way; all that is not finished lies in ``scratch``."""

    def __init__(self, target: Target, place: Output, scratch: Path, on_event: OnEvent) -> None:
        self.target, self.place, self.scratch, self.on_event = target, place, scratch, on_event

    def carry_out(
        self, kinds: Sequence[str], data: str | None, verifies: bool, check: Callable[[], None]
    ) -> tuple[ExportedFile, ...]:
        documents = self._load_rows(data) if verifies else []
        source = self._open_source()
        plans = {kind: plan_file(source, kind) for kind in kinds}
        self._check_disk(source, plans, documents)
        files: dict[str, Converted] = {}
        for kind in kinds:
            self.on_event(Stage("gguf", self.place.name_file(kind)))
            path = self.scratch / self.place.name_file(kind)
            made = files[kind] = convert(source, path, kind=kind, on_event=self.on_event)
            if made.n_fallbacks:
                n = f"{made.n_fallbacks} of {made.n_tensors} tensors"
                self.on_event(
                    Notice(f"{n} have rows that {kind} does not fit: they are of another, mostly larger type")
                )
        reference = self._record(plans, documents) if documents else None
        release_models()
        check()
        return tuple(self._finish(kind, files[kind], plans[kind], reference, verifies) for kind in kinds)

    def _open_source(self) -> OpenSource:
        """The model under its own name, from which the files' metadata follow."""
        folder = self.scratch / "model" / self.place.name
        with disk_errors(folder):
            folder.parent.mkdir()
            if not isinstance(self.target, Source):
                folder.symlink_to(self.target.files.folder.resolve())
                return open_folder(folder)
            folder.mkdir()
        merging = Merging(self.target, self.place.folder, None, "original", self.on_event)
        merging.write_texts(folder)
        base = self.target.manifest.get("base", {}).get("id", self.target.files.reference)
        write_text(folder / "README.md", "\n".join(build_front(base)))
        return open_merge(folder, merging.plan, merging.weights)

    def _load_rows(self, data: str | None) -> list[Rendered]:
        """The rows to compare on: those held out, else those trained on; without any that is told."""
        instead = "only the files' structure is checked"
        sets = load_known_rows(self.target, data, MOST_TOKENS, self.on_event, instead=instead)
        return next((sets[name] for name in ("data", "held_out", "train") if name in sets), [])

    def _check_disk(self, source: OpenSource, plans: Plans, documents: Sequence[Rendered]) -> None:
        needed = sum(_HEAD_BYTES + sum(t.size_bytes for t in tensors) for tensors in plans.values())
        needed += 2 * sum(count_targets(documents)) * int(read_model_config(source.folder)["vocab_size"])
        check_free(self.place.folder, needed)

    def _record(self, plans: Plans, documents: Sequence[Rendered]) -> Reference | None:
        """What the source says; None, which is told, where it does not fit in memory."""
        tensors = next(iter(plans.values()))
        dtype = choose_dtype(self.target.section.dtype, choose_device())
        if lack := explain_lack(sum(math.prod(tensor.shape) for tensor in tensors), dtype):
            self.on_event(Notice(f"the source is not run, so nothing is compared: {lack}"))
            return None
        try:
            return record_source(self._load_source, documents, self.scratch / "rows", self.on_event)
        except Exception as error:
            if not is_memory_error(error):
                raise
            self.on_event(Notice("the source does not fit in memory: nothing is compared"))
        return None

    def _load_source(self) -> Subject:
        is_adapted = self.target.adapter is not None
        return (open_adapter if is_adapted else open_plain)(self.target, self.target.renderer)

    def _find_renderer(self) -> ChatRenderer | None:
        try:
            return self.target.renderer
        except FtcliError:  # without a template
            return None

    def _finish(
        self,
        kind: str,
        made: Converted,
        tensors: Sequence[OutputTensor],
        reference: Reference | None,
        verifies: bool,
    ) -> ExportedFile:
        """The file of a kind under its final name, verified."""
        is_4bit, found = self.target.quantization is not None, None
        if verifies:
            # a run in 4 bits is written onto its original weights, as far away as a merge may be
            allowance = MOST_KL if is_4bit else 0.0
            renderer = self._find_renderer()
            found = verify_file(made.path, kind, tensors, renderer, reference, self.on_event, allowance=allowance)
        entry = {"bits_per_weight": made.bits_per_weight, "verify": found.to_json() if found else None}
        final = self.place.publish(made.path, self.target, kind, entry)
        self.on_event(Saved(str(final)))
        return ExportedFile(self.target.name, kind, final, made.size_bytes, made.bits_per_weight, found, is_4bit)
