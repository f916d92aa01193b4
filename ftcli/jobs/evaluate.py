"""``ftcli eval``: loss, perplexity, distance and score of several models on the same rows.

targets ─▶ contenders (found, sized) ─▶ entries (the rows as each reads them) ─▶ one model at a time ─▶ Scoreboard

What can be wrong with targets and rows is found before the first model is loaded.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ftcli.errors import ContentError, DiskError, NumericError
from ftcli.evaluate.compare import Recording, compare, measure, record
from ftcli.evaluate.generate import Sampling, answer_prompts, judge_answers
from ftcli.evaluate.loss import DocumentLosses, compute_perplexity
from ftcli.evaluate.score import score_bleu, score_rouge
from ftcli.evaluate.subject import Backend, Subject, TorchBackend, open_plain, open_target
from ftcli.events import Event, Notice, OnEvent, Progress, Stage, ignore_event
from ftcli.fused.check import check_documents_apart
from ftcli.jobs.contender import Contender, describe_base, find_contender
from ftcli.jobs.entry import Entry, Measure, list_entries
from ftcli.store.run import find_newest_run
from ftcli.train.memory import release_models

_SCORES: dict[str, Callable[[Sequence[str], Sequence[str]], float]] = {"rouge": score_rouge, "bleu": score_bleu}


@dataclass(frozen=True)
class Score:
    """The mean over ``n`` answers, from 0 to 1."""

    metric: str
    value: float
    n: int


@dataclass(frozen=True)
class Standing:
    """One model on the rows.

    ``loss`` is in nats per trained token, of which there are ``n_tokens``. ``kl`` and ``top1`` are against the first
    model: None for itself, and where tokens are not the same. ``bits_per_byte`` of trained text is told where some are
    not.
    """

    target: str
    size_bytes: int
    bits_per_weight: float
    loss: float
    n_tokens: int
    kl: float | None
    top1: float | None
    bits_per_byte: float | None
    score: Score | None

    @property
    def perplexity(self) -> float:
        return compute_perplexity(self.loss)

    def to_json(self) -> dict[str, Any]:
        return {
            "target": self.target,
            "bytes": self.size_bytes,
            "bits_per_weight": self.bits_per_weight,
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "kl": self.kl,
            "top1": self.top1,
            "score": asdict(self.score) if self.score else None,
        }


@dataclass(frozen=True)
class Scoreboard:
    """Several models side by side on the rows that ``data`` names, as the first one reads them."""

    data: str
    n_rows: int
    standings: tuple[Standing, ...]
    notices: tuple[str, ...]

    @property
    def n_tokens(self) -> int:
        """The trained tokens that were measured."""
        return self.standings[0].n_tokens

    def to_json(self) -> dict[str, Any]:
        """The document that ``ftcli eval --json`` prints, but for its schema and command."""
        return {
            "data": self.data,
            "n_rows": self.n_rows,
            "n_tokens": self.n_tokens,
            "targets": [standing.to_json() for standing in self.standings],
            "notices": list(self.notices),
        }


def evaluate_targets(
    targets: Sequence[str] = (),
    wanted: Measure | None = None,
    *,
    compare_base: bool = False,
    on_event: OnEvent = ignore_event,
) -> Scoreboard:
    """Each of ``targets`` on the same rows; the first is the one that the others are held against.

    Args:
        targets: runs, adapters, model folders, GGUF files, Hub ids; none is the newest finished run.
        wanted: which rows, and what is measured on them.
        compare_base: whether the model from which the first target was made comes second.
        on_event: told of stages, progress and notices.

    Raises:
        FtcliError: a target, or the rows, cannot be used.
    """
    wanted = wanted or Measure()
    wanted.check()
    told = _Told(on_event)
    if not targets:
        newest = find_newest_run()
        told.notice(f"no target was named: {newest.path} is the newest finished run")
        targets = [str(newest.path)]
    contenders: list[Contender] = []
    for target in targets:
        contenders.append(find_contender(target, contenders[0].renderer if contenders else None))
    if compare_base:
        contenders.insert(1, describe_base(contenders[0]))
    on_event(Stage("data", wanted.data or f"what {contenders[0].name} held out"))
    entries = list_entries(contenders, wanted, told.notice)
    has_rivals = any(entry.is_same for entry in entries[1:])
    with _temporary_folder() if has_rivals else nullcontext() as folder:
        standings = list(_Judge(wanted, folder, told).measure_all(entries))
    return Scoreboard(entries[0].rows.label, entries[0].rows.n_rows, tuple(standings), tuple(told.notices))


@dataclass
class _Told:
    """Passes events on, and keeps the notices."""

    on_event: OnEvent
    notices: list[str] = field(default_factory=list)

    def notice(self, text: str) -> None:
        if text not in self.notices:
            self.notices.append(text)
            self.on_event(Notice(text))

    def pass_on(self, event: Event) -> None:
        if isinstance(event, Notice):
            self.notice(event.text)
        else:
            self.on_event(event)

    def progress(self, done: int, total: int) -> None:
        self.on_event(Progress("eval", done, total))


@dataclass
class _Judge:
    """Measures one model after the other; the first is recorded in ``folder`` if there is one, for all others."""

    wanted: Measure
    folder: Path | None
    told: _Told
    recording: Recording | None = None

    def measure_all(self, entries: Sequence[Entry]) -> Iterator[Standing]:
        """Yields the standing of each entry; no two models are in memory at a time."""
        subject: Subject | None = None
        for entry in entries:
            contender = entry.contender
            self.told.on_event(Stage("model", contender.name))
            if contender.is_base and subject and subject.base:
                subject = subject.base  # the same weights, with the adapter off
            else:
                subject = None
                release_models()
                if contender.is_base:
                    subject = open_plain(contender.target, contender.renderer)
                else:
                    offered = entries[0].contender.renderer
                    subject = open_target(contender.target, renderer=offered, on_event=self.told.pass_on)
            yield self._measure(entry, subject)

    def _measure(self, entry: Entry, subject: Subject) -> Standing:
        name = entry.contender.name
        batch_tokens = self._choose_batch(name, subject.backend, entry)
        losses, kl, top1 = self._hold_against_first(entry, subject.backend, batch_tokens)
        loss = losses.compute_mean()
        if math.isnan(loss):
            hint = "its weights are damaged, or overflow in this dtype"
            raise NumericError("the loss is not a number", where=name, hint=hint)
        bits = None if entry.n_bytes is None else sum(losses.sums) / math.log(2) / max(1, entry.n_bytes)
        return Standing(
            target=name,
            size_bytes=entry.contender.size_bytes,
            bits_per_weight=entry.contender.bits_per_weight,
            loss=loss,
            n_tokens=sum(losses.n_targets),
            kl=kl,
            top1=top1,
            bits_per_byte=bits,
            score=self._score(entry, subject.backend) if self.wanted.metric else None,
        )

    def _choose_batch(self, name: str, backend: Backend, entry: Entry) -> int:
        """The tokens of one forward: 1, and so one document, where a model does not keep several apart."""
        if isinstance(backend, TorchBackend):
            try:
                check_documents_apart(backend.model)
            except NumericError as error:
                hint = "its weights are damaged, or overflow in this dtype"
                raise NumericError("the model's logits are not finite", where=name, hint=hint) from error
            except ContentError:
                return 1
        return entry.batch_tokens

    def _hold_against_first(
        self, entry: Entry, backend: Backend, batch_tokens: int
    ) -> tuple[DocumentLosses, float | None, float | None]:
        """The losses, and KL and top-1 against the first model where there are such."""
        documents = entry.documents
        if self.folder is None or not entry.is_same:
            losses = measure(backend, documents, batch_tokens=batch_tokens, on_progress=self.told.progress)
            return losses, None, None
        if self.recording is None:
            try:
                self.recording = record(
                    backend, documents, self.folder, batch_tokens=batch_tokens, on_progress=self.told.progress
                )
            except DiskError as error:
                hint = "set TMPDIR to a folder with more room, or measure fewer rows: --limit N"
                raise DiskError(error.what, where=error.where, hint=hint) from error
            return self.recording.losses, None, None
        found = compare(self.recording, backend, documents, batch_tokens=batch_tokens, on_progress=self.told.progress)
        return found.losses_result, found.kl, found.top1

    def _score(self, entry: Entry, backend: Backend) -> Score:
        wanted = self.wanted
        self.told.on_event(Stage("answers", f"{len(entry.prompts)} rows"))
        sampling = Sampling(max_new_tokens=wanted.max_new_tokens)
        texts = answer_prompts(
            lambda prompts: backend.generate(prompts, sampling),
            entry.prompts,
            batch_rows=wanted.batch_rows,
            on_progress=self.told.progress,
        )
        metric = wanted.metric or ""
        if metric in _SCORES:
            references = [example.messages[-1].content or "" for example in entry.asked]
            return Score(metric, _SCORES[metric](texts, references), len(texts))
        report = judge_answers(entry.asked, texts, metric, wanted.pattern)
        if report.n_timed_out:
            n = report.n_timed_out
            self.told.notice(f"{n} answers count as wrong: the expression took more than a second on each")
        return Score(metric, report.score or 0.0, len(texts))


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    """A folder that is gone after the block, however that ends."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="ftcli-eval-")
    except OSError as error:
        what = f"no temporary folder can be made: {(error.strerror or str(error)).lower()}"
        raise DiskError(what, hint="set TMPDIR to a folder you may write to") from error
    with folder as path:
        yield Path(path)
