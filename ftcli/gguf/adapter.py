"""``ftcli export --adapter``: a run's adapter as a GGUF file that llama.cpp adds to its base, held against both.

adapter ─▶ LoraDraft ─▶ file (in a scratch folder) ─▶ verified ─▶ final name, with a card beside
                          │
base ─▶ GGUF (scratch) ───┴─▶ llama.cpp ─▶ KL to the adapter on its base, as it was trained
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ftcli.data.chat import Rendered
from ftcli.data.tokenizer import load_tokenizer
from ftcli.errors import ContentError, DiskError, FtcliError, MemoryExhausted, UsageError, explain, is_memory_error
from ftcli.evaluate.compare import compare
from ftcli.evaluate.llama_library import load_library
from ftcli.evaluate.llamacpp import LlamaCppBackend, open_llama
from ftcli.evaluate.loss import count_targets
from ftcli.evaluate.sample import load_best_rows
from ftcli.evaluate.target import find_target
from ftcli.evaluate.verdict import Verdict
from ftcli.events import Notice, OnEvent, Saved, Stage, ignore_event
from ftcli.gguf.card import write_card
from ftcli.gguf.convert import convert
from ftcli.gguf.draft import Draft, draft_model
from ftcli.gguf.family import find_family
from ftcli.gguf.kind import find_limit
from ftcli.gguf.lora import LoraDraft, check_expressible, draft_lora, find_lora_problem
from ftcli.gguf.output import LORA, Output, find_output
from ftcli.gguf.verify import Verification, record_source
from ftcli.gguf.write import write_gguf
from ftcli.merge.run import Merging
from ftcli.merge.source import Source, build_source
from ftcli.merge.stream import open_merge
from ftcli.merge.verify import MOST_TOKENS, measure_options
from ftcli.model.stored import is_tied
from ftcli.store.card import build_front
from ftcli.store.file import check_free, disk_errors, read_json, write_text
from ftcli.train.memory import explain_lack, release_models

_KINDS = {torch.bfloat16: "bf16", torch.float16: "f16"}  # of file that hold every value of such a base


@dataclass(frozen=True)
class ExportedAdapter:
    """The adapter of ``source`` as a GGUF file for ``base``; ``verification`` is None where none was wanted.

    ``from_4bit`` says that it was trained on a base in 4 bits.
    """

    source: str
    base: str
    path: Path
    size_bytes: int
    n_modules: int
    ranks: tuple[int, ...]
    verification: Verification | None
    from_4bit: bool = False

    @property
    def kind(self) -> str:
        """What the manifest calls it, beside the types of whole models."""
        return LORA

    @property
    def larger(self) -> str:
        """The kind to take where this one lost too much; there is none."""
        return ""

    def to_json(self) -> dict[str, Any]:
        """An entry of ``files`` in the document of ``--json``."""
        return {
            "type": self.kind,
            "path": str(self.path),
            "bytes": self.size_bytes,
            "base": self.base,
            "modules": self.n_modules,
            "ranks": list(self.ranks),
            "verify": self.verification.to_json() if self.verification else None,
        }


def export_adapter(
    target: str | None = None,
    *,
    base: str | None = None,
    output: Path | None = None,
    data: str | None = None,
    verifies: bool = True,
    overwrite: bool = False,
    on_event: OnEvent = ignore_event,
) -> ExportedAdapter:
    """The adapter of a run in the format that llama.cpp loads beside its base.

    Args:
        target: a run or an adapter; None is the newest finished run.
        base: the base model, where it lies elsewhere than the adapter says.
        output: the folder; by default ``gguf/`` of the run, or ``./NAME-gguf``.
        data: rows to compare on, instead of those of the run.
        verifies: whether the file is held against the adapter on its base.
        overwrite: replace a file that is there.
        on_event: told of stages and progress.

    Raises:
        FtcliError: with the exit code of what happened; a ContentError where only a merge can hold what was trained. A
            file that failed its verification is there: its ``verification`` says so.
    """
    source = _find_source(target, base)
    place = find_output(source, output, overwrites=overwrite)
    place.check([LORA])
    on_event(Stage("check", f"{source.name} and {source.files.reference}"))
    with place.open_scratch() as scratch:
        return _AdapterExport(source, place, scratch, on_event).carry_out(data, verifies)


def _find_source(reference: str | None, base: str | None) -> Source:
    """The adapter on its base.

    Raises:
        UsageError: there is none.
    """
    target = find_target(reference, base=base)
    if target.adapter is None:
        raise UsageError(
            "the run trained all weights: it has no adapter" if target.run else "is no adapter, and no run",
            where=target.name,
            hint="export the model: --gguf q8_0",
        )
    return build_source(target)


class _AdapterExport:
    """An export under way; all that is not finished lies in ``scratch``."""

    def __init__(self, source: Source, place: Output, scratch: Path, on_event: OnEvent) -> None:
        self.source, self.place, self.scratch, self.on_event = source, place, scratch, on_event
        # the base of a GGUF file has no type of its own in memory: it is compared as it was trained
        dtype = source.dtype if source.files.gguf_file else None
        self.merging = Merging(source, place.folder, dtype, "original", on_event)
        self.draft = self._draft()

    def carry_out(self, data: str | None, verifies: bool) -> ExportedAdapter:
        instead = "the file is checked, and not run"
        documents: Sequence[Rendered] = ()
        if verifies:
            documents = load_best_rows(self.source, data, MOST_TOKENS, self.on_event, instead=instead)
        path = self.scratch / self.place.name_file(LORA)
        self.on_event(Stage("gguf", path.name))
        size = write_gguf(path, self.draft.keys, self.draft.tensors)
        self._tell_template()
        found = self._verify(path, documents) if verifies else None
        release_models()
        ranks = tuple(sorted({module.lora.b.shape[1] for module in self.draft.modules}))
        entry = {"modules": len(self.draft.modules), "ranks": ranks, "verify": found.to_json() if found else None}
        final = self.place.publish(path, LORA, entry)
        write_card(self.place.folder, self.source.recipe)
        self.on_event(Saved(str(final)))
        return ExportedAdapter(
            self.source.name,
            self.source.files.reference,
            final,
            size,
            len(self.draft.modules),
            ranks,
            found,
            self.source.quantization is not None,
        )

    def _draft(self) -> LoraDraft:
        source, plan, skeleton = self.source, self.merging.plan, self.merging.skeleton
        config = skeleton.config.to_dict()
        family = find_family(str(config.get("model_type", "")), source.files.reference)
        one_table = is_tied(skeleton) or family.must_tie
        check_expressible(plan, is_tied=one_table, name=source.name, where=str(source.adapter))
        return draft_lora(self._link_texts(), plan, family, config)

    def _link_texts(self) -> Path:
        """A folder with the adapter's own name, from which the file's metadata follow."""
        folder, adapter = self.scratch / "adapter" / self.place.name, self.source.adapter
        named = (read_json(adapter / "adapter_config.json") or {}).get("base_model_name_or_path")
        base = self.source.manifest.get("base", {}).get("id", named or self.source.files.reference)
        front = "\n".join(build_front(base, library="peft", tags=("ftcli", "lora")))
        with disk_errors(folder):
            folder.mkdir(parents=True)
            if (adapter / "generation_config.json").is_file():
                shutil.copyfile(adapter / "generation_config.json", folder / "generation_config.json")
            # PEFT's card names the base by its path where it came from a disk
            if (adapter / "README.md").is_file() and "base_model:" in front:
                shutil.copyfile(adapter / "README.md", folder / "README.md")
            else:
                write_text(folder / "README.md", front)
        return folder

    def _tell_template(self) -> None:
        """Nothing; it is told if a base's own file would render chats otherwise than they were trained."""
        if not (self.source.adapter / "tokenizer.json").exists():
            return
        try:
            own = load_tokenizer(self.source.files).chat_template
        except FtcliError:
            return
        if own != self.source.tokenizer.chat_template:
            told = "was trained with another chat template than its base has, and a GGUF adapter brings none"
            self.on_event(Notice(f"the adapter {told}: give llama.cpp the one in {self.source.adapter}"))

    def _verify(self, path: Path, documents: Sequence[Rendered]) -> Verification:
        self.on_event(Stage("verify", path.name))
        if problem := find_lora_problem(path, self.draft):
            return Verification(problem=problem)
        if not documents:
            return Verification()
        try:
            load_library()
            return self._compare(path, documents)
        except (MemoryExhausted, UsageError, DiskError) as error:
            hint = f" ({error.hint})" if isinstance(error, UsageError) and error.hint else ""
            self.on_event(Notice(f"nothing is compared: {error.what}{hint}"))
        except Exception as error:
            if not is_memory_error(error):
                raise
            self.on_event(Notice("nothing is compared: the model does not fit in memory"))
        return Verification()

    def _compare(self, path: Path, documents: Sequence[Rendered]) -> Verification:
        """The adapter's file on its base, both run by llama.cpp, against the adapter on its base as trained."""
        try:
            draft, kind = self._draft_base()
        except ContentError as error:
            self.on_event(Notice(f"nothing is compared, as the base does not become a GGUF file: {error.what}"))
            return Verification()
        if lack := explain_lack(draft.n_parameters, self.source.dtype):
            raise MemoryExhausted(lack)
        n_values = sum(count_targets(documents)) * draft.n_vocabulary
        check_free(self.scratch, draft.measure_bytes(kind) + 2 * n_values)
        recording, kl_base = record_source(
            self.source.open, documents, self.scratch / "rows", self.on_event, measures_base=True
        )
        release_models()
        self.on_event(Stage("verify", f"the base in {kind}"))
        base = convert(draft, self.scratch / "base.gguf", kind=kind, on_event=self.on_event).path
        self.on_event(Stage("verify", f"{path.name} on its base"))
        try:
            model = open_llama(base, base.name, adapter=path)
        except ContentError as error:
            return Verification(problem=explain(error))
        found = compare(
            recording,
            LlamaCppBackend(model, self.source.renderer),
            documents,
            **measure_options(self.on_event),
        )
        limit = find_limit(kind, kl_base, is_4bit=self.source.quantization is not None)
        return Verification(Verdict(found, kl_base, limit))

    def _draft_base(self) -> tuple[Draft, str]:
        """The base alone as a GGUF file, and the kind that holds all its values."""
        folder, plan = self.scratch / "base", self.merging.plan
        with disk_errors(folder):
            folder.mkdir()
            self.merging.write_texts(folder)
        bare = replace(plan, parts=tuple(replace(part, lora=None) for part in plan.parts))
        draft = draft_model(open_merge(folder, bare, self.merging.weights))
        return draft, _KINDS.get(getattr(torch, plan.dtype), "f32")
