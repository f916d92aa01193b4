"""``ftcli export``: a run, an adapter or a model as GGUF files, each held against its source.

    target ─▶ folder, merge as it is made, GGUF file ─▶ Draft ─▶ a file of each kind (in a scratch folder)
           ─▶ verified ─▶ final name, with a card and a Modelfile beside

A merge is not written in between, and the file is the one that its folder would give.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ftcli.data.chat import ChatRenderer, Rendered
from ftcli.errors import ContentError, FtcliError, is_lack_of_memory
from ftcli.evaluate.loss import count_targets
from ftcli.evaluate.sample import find_common_system, load_best_rows
from ftcli.evaluate.subject import open_target
from ftcli.evaluate.target import find_target
from ftcli.events import Notice, OnEvent, Saved, Stage, ignore_event
from ftcli.gguf.card import write_card
from ftcli.gguf.convert import Converted, convert
from ftcli.gguf.draft import KINDS, Draft, draft_model
from ftcli.gguf.kind import can_tell_loss, find_kinds, suggest_larger
from ftcli.gguf.modelfile import build_modelfile
from ftcli.gguf.original import draft_gguf
from ftcli.gguf.output import Output, find_output
from ftcli.gguf.verify import Expected, Verification, record_source, verify_file
from ftcli.gguf.vocabulary import adds_bos, find_training
from ftcli.merge.source import build_source
from ftcli.merge.stream import open_model
from ftcli.merge.verify import MOST_TOKENS
from ftcli.model.base import choose_device, choose_dtype
from ftcli.store.file import check_free, disk_errors, read_json, write_text
from ftcli.store.gguf_header import read_gguf_header
from ftcli.store.output import MANIFEST
from ftcli.train.memory import explain_lack, release_models

_LEAST_CONTEXT = 4096  # of a Modelfile, where the model has as much
_PACKED_RATIO = 3  # by which 4 bits, with what stays in 16, are less
_MOST_FALLBACK = 0.5  # of the parameters; beyond, a file is not what its kind says


@dataclass(frozen=True)
class ExportedFile:
    """A GGUF file of ``source``; ``verification`` is None where none was wanted.

    ``types`` are the shares of the parameters that have each of GGUF's types, the largest first; ``from_4bit`` says
    that the source held its base in 4 bits, which the file does not.
    """

    source: str
    kind: str
    path: Path
    size_bytes: int
    bits_per_weight: float
    verification: Verification | None
    types: Mapping[str, float] = field(default_factory=dict)
    from_4bit: bool = False

    @property
    def is_usable(self) -> bool:
        """Whether nothing is known against it."""
        return self.verification is None or self.verification.has_passed

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
            "types": dict(self.types),
            "verify": self.verification.to_json() if self.verification else None,
        }


@dataclass(frozen=True)
class Exported:
    """What came of an export: the files in the order in which they were asked for.

    ``name`` is what Ollama may call the model; ``modelfile`` is None where none was written.
    """

    source: str
    name: str
    files: tuple[ExportedFile, ...]
    modelfile: Path | None = None


def export(
    target: str | None = None,
    *,
    kinds: Sequence[str],
    base: str | None = None,
    output: Path | None = None,
    data: str | None = None,
    verifies: bool = True,
    overwrite: bool = False,
    on_event: OnEvent = ignore_event,
) -> Exported:
    """The files that llama.cpp runs, one of each kind.

    Args:
        target: a run, an adapter, or a model (folder, Hub id, GGUF file in 16 or 32 bits); None is the newest finished
            run.
        kinds: such as ``q4_k_m``; see `ftcli.gguf.draft.KINDS`.
        base: the base model of a run or adapter, where it lies elsewhere than that says.
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
    found = find_target(target, base=base)
    path = found.files.gguf_path if found.adapter is None else None
    original = _draft_gguf(path) if path else None  # which says first what is wrong with it
    found = build_source(found) if found.adapter else found
    place = find_output(found, output, overwrites=overwrite)
    place.check(wanted)
    on_event(Stage("check", f"{found.name} and {found.files.reference}" if found.adapter else found.name))
    with place.open_scratch() as scratch:
        return _ModelExport(place, original, scratch, on_event).carry_out(wanted, data, verifies)


def _draft_gguf(path: Path) -> Draft:
    """The file that is made of another; what was rounded already is refused, with the name of what to take instead."""
    try:
        return draft_gguf(path)
    except ContentError as error:
        made = read_json(path.parent / MANIFEST) or {}
        if made.get("command") == "export" and path.name in made.get("files", {}):
            error.hint = f"export {made.get('source')}, from which it was made"
        raise


class _ModelExport:
    """An export under way, of the GGUF file ``original`` if that is one; what is not finished lies in ``scratch``."""

    def __init__(self, place: Output, original: Draft | None, scratch: Path, on_event: OnEvent) -> None:
        self.target, self.place, self.original, self.scratch = place.target, place, original, scratch
        self.on_event = on_event
        self.renderer = self._find_renderer()

    def carry_out(self, kinds: Sequence[str], data: str | None, verifies: bool) -> Exported:
        draft = self.original or self._draft_model()
        instead = "only structure and vocabulary are checked"
        documents: Sequence[Rendered] = ()
        if verifies:
            documents = load_best_rows(self.target, data, MOST_TOKENS, self.on_event, instead=instead)
        self._check_disk(draft, kinds, documents)
        for text in draft.notices:
            self.on_event(Notice(text))
        files: dict[str, Converted] = {}
        for kind in kinds:
            self.on_event(Stage("gguf", self.place.name_file(kind)))
            path = self.scratch / self.place.name_file(kind)
            made = files[kind] = convert(draft, path, kind=kind, on_event=self.on_event)
            if made.fallback > _MOST_FALLBACK:
                share = f"{made.fallback:.0%} of the weights"
                self.on_event(Notice(f"{share} have rows that {kind} does not fit: they have another, larger type"))
        expected = self._expect(draft, kinds, documents) if verifies else None
        release_models()
        finished = tuple(self._finish(kind, files[kind], draft, expected) for kind in kinds)
        return Exported(self.target.name, self.place.name, finished, self._write_texts(finished))

    def _draft_model(self) -> Draft:
        """The model under its own name, from which the files' metadata follow."""
        target = self.target
        folder = self.scratch / "model" / self.place.name
        try:
            stream = open_model(target, folder, self.place.folder, self.on_event)
            return draft_model(stream, training=find_training(target))
        except FtcliError as error:
            if str(self.scratch) in error.where:  # under which name the model is only for a while
                error.where = target.name
            raise

    def _check_disk(self, draft: Draft, kinds: Sequence[str], documents: Sequence[Rendered]) -> None:
        needed = sum(map(draft.measure_bytes, kinds))
        needed += 2 * sum(count_targets(documents)) * draft.n_vocabulary
        check_free(self.place.folder, needed)

    def _expect(self, draft: Draft, kinds: Sequence[str], documents: Sequence[Rendered]) -> Expected:
        """What the files are held against; the source is run if there are rows and it fits in memory."""
        expected = Expected(
            tokenizer=None if self.original else self.target.tokenizer,
            renderer=self.renderer,
            is_trained=self.target.is_trained,
            documents=documents,
            is_4bit=self.target.quantization is not None,
        )
        if not documents:
            return expected
        dtype = choose_dtype(self.target.section.dtype, choose_device())
        n_parameters = draft.n_parameters // (_PACKED_RATIO if expected.is_4bit else 1)
        if not self.original and (lack := explain_lack(n_parameters, dtype)):
            self.on_event(Notice(f"the source is not run, so nothing is compared: {lack}"))
            return expected
        try:
            recording, kl_base = record_source(
                lambda: open_target(self.target, renderer=self.renderer, on_event=self.on_event),
                documents,
                self.scratch / "rows",
                self.on_event,
                measures_base=expected.is_4bit or any(map(can_tell_loss, kinds)),
            )
        except Exception as error:
            if not is_lack_of_memory(error):
                raise
            self.on_event(Notice("the source does not fit in memory: nothing is compared"))
            return expected
        return replace(expected, recording=recording, kl_base=kl_base)

    def _find_renderer(self) -> ChatRenderer | None:
        try:
            return self.target.renderer
        except FtcliError:  # the tokenizer of a GGUF file cannot always be rebuilt
            return None

    def _write_texts(self, files: Sequence[ExportedFile]) -> Path | None:
        """The Modelfile, which is of the first sound file; it lies beside the files, and the card too."""
        sound = next((file.path for file in files if file.is_usable), None)
        path = self.place.folder / "Modelfile"
        with disk_errors(path):
            if sound:
                write_text(path, self._build_modelfile(sound, self._list_others(sound)))
            elif path.is_file() or path.is_symlink():
                path.unlink()  # of a file that may have been replaced by one that failed
        write_card(self.place.folder, self.target.recipe, first=(sound or files[0].path).name)
        return path if sound else None

    def _list_others(self, file: Path) -> list[str]:
        """The sound files beside ``file``."""
        exports = (read_json(self.place.folder / MANIFEST) or {})["exports"]
        known = [exports[kind] for kind in KINDS if kind in exports]
        sound = [entry["file"] for entry in known if (entry["verify"] or {}).get("passed", True)]
        return [name for name in sound if name != file.name]

    def _build_modelfile(self, file: Path, others: Sequence[str]) -> str:
        metadata = read_gguf_header(file).metadata
        context = int(metadata.get(f"{metadata['general.architecture']}.context_length", _LEAST_CONTEXT))
        recipe = self.target.recipe
        built = build_modelfile(
            file.name,
            self.renderer if metadata.get("tokenizer.chat_template") else None,
            n_context=min(context, max(_LEAST_CONTEXT, recipe.data.max_length if recipe else 0)),
            adds_bos=adds_bos(metadata),
            system=find_common_system(recipe) if recipe else "",
            others=others,
        )
        if built.problem:
            self.on_event(Notice(f"Modelfile: {built.problem}"))
        return built.text

    def _finish(self, kind: str, made: Converted, draft: Draft, expected: Expected | None) -> ExportedFile:
        """The file of a kind under its final name, verified."""
        found = verify_file(made.path, kind, draft.plan(kind), expected, self.on_event) if expected else None
        types = {name: n / made.n_parameters for name, n in Counter(made.types).most_common()}
        entry = {
            "bits_per_weight": made.bits_per_weight,
            "types": types,
            "verify": found.to_json() if found else None,
        }
        final = self.place.publish(made.path, kind, entry)
        self.on_event(Saved(str(final)))
        is_4bit = self.target.quantization is not None
        return ExportedFile(self.target.name, kind, final, made.size_bytes, made.bits_per_weight, found, types, is_4bit)
