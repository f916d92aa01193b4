"""Files of rows → documents of ids, the plan of an epoch, and the flat batches that a model sees.

    documents   [AAAA] [BB] [CCCCCC]                      one row of data each (or one trained turn)
    batch       A A A A B B C C C C C C                   flat (1, T), side by side, no padding
    positions   0 1 2 3 0 1 0 1 2 3 4 5                   restart with each document
    labels      . . A A . B . . . C C C                   -100 where nothing is learned, not shifted

A batch of rows and a pack are the same thing; attention is block-diagonal over the documents.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ftcli.data.chat import ChatRenderer, Rendered, TrainOn
from ftcli.data.message import Example, read_examples
from ftcli.data.packing import pack_lengths
from ftcli.errors import ContentError
from ftcli.recipe import DataSection, DatasetSection

IGNORE_LABEL = -100
TrainRow = tuple[Example, TrainOn]
_PLACES_SHOWN = 5


@dataclass(frozen=True)
class DataReport:
    """What came of the rows of one data set; every row that is not trained on whole is counted here."""

    n_rows: int = 0
    n_documents: int = 0
    n_tokens: int = 0
    n_target_tokens: int = 0
    n_without_target: int = 0
    n_dropped: int = 0
    n_truncated: int = 0
    n_split: int = 0
    longest: int = 0

    def describe_losses(self) -> list[str]:
        """A sentence for each thing that was not trained on as it was written."""
        counts = (
            (self.n_without_target, "have no token to train on and are left out"),
            (self.n_dropped, "are longer than data.max_length and are dropped"),
            (self.n_truncated, "are longer than data.max_length and are cut"),
            (self.n_split, "are longer than data.max_length and are split"),
        )
        return [f"{n} of {self.n_rows} rows {what}" for n, what in counts if n]


@dataclass(frozen=True)
class DocumentSet:
    """Documents in the order of their rows, and the conversations that went into them whole."""

    name: str
    documents: tuple[Rendered, ...]
    examples: tuple[Example, ...]
    report: DataReport


@dataclass(frozen=True)
class DataSplit:
    """The documents of a run: what is trained on, and what is held out."""

    train: DocumentSet
    held_out: tuple[DocumentSet, ...]
    files: tuple[Path, ...]


@dataclass(frozen=True)
class Batch:
    """One forward's worth of documents, side by side and flat.

    Shapes: ``input_ids``, ``labels``, ``position_ids`` (1, T) int64; ``cu_seqlens`` (documents + 1,) int32.
    ``labels`` are -100 where nothing is learned and at the first token of each document, and not shifted;
    ``n_targets`` counts the others.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    n_targets: int
    places: tuple[str, ...]

    @property
    def n_tokens(self) -> int:
        return self.input_ids.shape[1]

    def to(self, device: torch.device) -> Batch:
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            position_ids=self.position_ids.to(device, non_blocking=True),
        )


def load_split(
    datasets: Sequence[DatasetSection],
    data: DataSection,
    held_out: Sequence[DatasetSection],
    renderer: ChatRenderer,
    *,
    seed: int,
) -> DataSplit:
    """All documents of a run, rendered, with the overflow policy applied.

    Raises:
        ContentError: a file or row cannot be used, or nothing is left to train on.
    """
    files = [Path(section.path) for section in (*datasets, *held_out)]
    rows: list[TrainRow] = [row for section in datasets for row in _read_section(section)]
    groups: dict[str, list[TrainRow]] = {}
    for section in held_out:
        name = stem = Path(section.path).stem
        while name in groups:
            name = f"{stem}-{len(groups) + 1}"
        groups[name] = _read_section(section)
    if data.val_set_size is not None:
        rows, groups["val"] = split_rows(rows, data.val_set_size, seed=seed)
    return DataSplit(
        build_documents("train", rows, renderer, data),
        tuple(build_documents(name, group, renderer, data) for name, group in groups.items()),
        tuple(files),
    )


def _read_section(section: DatasetSection) -> list[TrainRow]:
    return [(example, section.train_on) for example in read_examples(Path(section.path), section.type)]


def split_rows(rows: Sequence[TrainRow], size: float | int, *, seed: int) -> tuple[list[TrainRow], list[TrainRow]]:
    """``rows`` as (training rows, held-out rows), by a hash of seed and content; equal rows stay on one side.

    Args:
        rows: what to split.
        size: the held-out share (float) or number of different rows (int).
        seed: another seed holds out other rows.

    Raises:
        ContentError: one side would be empty.
    """
    keys = [_hash_example(example, seed) for example, _ in rows]
    distinct = sorted(set(keys))
    n_held_out = size if isinstance(size, int) else round(size * len(distinct))
    if not 0 < n_held_out < len(distinct):
        raise ContentError(
            f"data.val_set_size {size} leaves one side empty: there are {len(distinct)} different rows",
            hint="choose a share or number between",
        )
    chosen = set(distinct[:n_held_out])
    train = [row for row, key in zip(rows, keys, strict=True) if key not in chosen]
    return train, [row for row, key in zip(rows, keys, strict=True) if key in chosen]


def _hash_example(example: Example, seed: int) -> str:
    content = [example.text, [message.to_template() for message in example.messages], example.tools]
    return hashlib.sha256(f"{seed}:{json.dumps(content, sort_keys=True, default=str)}".encode()).hexdigest()


def build_documents(name: str, rows: Sequence[TrainRow], renderer: ChatRenderer, data: DataSection) -> DocumentSet:
    """The documents of ``rows``; rows that cannot be rendered are reported together.

    Raises:
        ContentError: rows that the template refuses, that are too long (``overflow: error``), or none left.
    """
    documents: list[Rendered] = []
    examples: list[Example] = []
    counts = {"n_without_target": 0, "n_dropped": 0, "n_truncated": 0, "n_split": 0}
    failures: list[ContentError] = []
    too_long: list[Rendered] = []
    for example, train_on in rows:
        try:
            rendered = renderer.render(example, train_on)
        except ContentError as error:
            failures.append(error)
            continue
        too_long += [document for document in rendered if len(document.ids) > data.max_length]
        fitted = _fit_documents(rendered, data, counts)
        useful = [document for document in fitted if any(document.mask[1:])]
        counts["n_without_target"] += bool(fitted) and not useful
        documents += useful
        if useful and fitted == rendered:
            examples.append(example)
    if failures:
        raise _join_failures(failures)
    if too_long and data.overflow == "error":
        raise _explain_overflow(too_long, data.max_length)
    if not documents:
        raise ContentError(
            f"no row of {name} has a token to train on",
            hint="check datasets[].train_on and the rows' roles",
        )
    report = DataReport(
        n_rows=len(rows),
        n_documents=len(documents),
        n_tokens=sum(len(d.ids) for d in documents),
        n_target_tokens=sum(sum(d.mask[1:]) for d in documents),
        longest=max(len(d.ids) for d in documents),
        **counts,
    )
    return DocumentSet(name, tuple(documents), tuple(examples), report)


def _fit_documents(rendered: list[Rendered], data: DataSection, counts: dict[str, int]) -> list[Rendered]:
    """The documents of one row, none longer than ``max_length``, and what that cost added to ``counts``."""
    limit = data.max_length
    if all(len(document.ids) <= limit for document in rendered):
        return rendered
    if data.overflow == "truncate":
        counts["n_truncated"] += 1
        return [Rendered(d.ids[:limit], d.mask[:limit], d.file, d.line) for d in rendered]
    if data.overflow == "split":
        counts["n_split"] += 1
        return [
            Rendered(d.ids[i : i + limit], d.mask[i : i + limit], d.file, d.line)
            for d in rendered
            for i in range(0, len(d.ids), limit)
        ]
    counts["n_dropped"] += 1
    return [document for document in rendered if len(document.ids) <= limit]


def _join_failures(failures: list[ContentError]) -> ContentError:
    """One error that shows each different failure once, with the first row that has it."""
    first = failures[0]
    if len(failures) == 1:
        return first
    others = list({error.what: error for error in reversed(failures[1:]) if error.what != first.what}.values())
    shown = [f"{error.where}: {error.what}" for error in others[::-1][: _PLACES_SHOWN - 1]]
    rest = len(failures) - 1 - len(shown)
    lines = [first.what, *shown, *([f"and {rest} more rows"] if rest else [])]
    return ContentError("\n".join(lines), where=first.where, why=first.why, hint=first.hint)


def _explain_overflow(too_long: list[Rendered], limit: int) -> ContentError:
    longest = max(too_long, key=lambda document: len(document.ids))
    places = ", ".join(f"{d.file}:{d.line} ({len(d.ids)})" for d in too_long[:_PLACES_SHOWN])
    more = f" and {len(too_long) - _PLACES_SHOWN} more" if len(too_long) > _PLACES_SHOWN else ""
    return ContentError(
        f"{len(too_long)} rows are longer than data.max_length {limit}: {places}{more}",
        hint=f"raise data.max_length to {len(longest.ids)}, or set data.overflow to drop, truncate or split",
    )


Step = tuple[tuple[int, ...], ...]


def plan_epoch(
    lengths: Sequence[int],
    *,
    seed: int,
    epoch: int,
    rows_per_batch: int,
    batches_per_step: int,
    pack_tokens: int | None,
) -> list[Step]:
    """The optimizer steps of one epoch: each a tuple of micro-batches, each a tuple of document indices.

    Every document appears once. The order depends on ``seed`` and ``epoch`` alone, never on random state, so a
    resumed run sees the same data; the number of steps is the same in every epoch.

    Args:
        lengths: tokens of each document.
        seed: the run's seed.
        epoch: counted from 0.
        rows_per_batch: documents (or packs) side by side in one micro-batch.
        batches_per_step: micro-batches of one optimizer step, over all processes.
        pack_tokens: capacity of a pack, or None for one document a row.
    """
    order = list(range(len(lengths)))
    shuffler = random.Random(f"{seed}:{epoch}")
    shuffler.shuffle(order)
    rows = [[index] for index in order]
    if pack_tokens is not None:
        packs = pack_lengths([lengths[index] for index in order], pack_tokens)
        rows = [[order[position] for position in pack] for pack in packs]
        shuffler.shuffle(rows)
    batches = [
        tuple(index for row in rows[i : i + rows_per_batch] for index in row)
        for i in range(0, len(rows), rows_per_batch)
    ]
    n_steps = math.ceil(len(batches) / batches_per_step)
    return [tuple(batches[i * batches_per_step : (i + 1) * batches_per_step]) for i in range(n_steps)]


def build_batch(documents: Sequence[Rendered]) -> Batch:
    """The flat batch of ``documents``, side by side in their order."""
    ids = [token for document in documents for token in document.ids]
    labels: list[int] = []
    for document in documents:
        trained = zip(document.ids[1:], document.mask[1:], strict=True)
        labels += [IGNORE_LABEL, *(token if is_trained else IGNORE_LABEL for token, is_trained in trained)]
    borders = [0]
    for document in documents:
        borders.append(borders[-1] + len(document.ids))
    return Batch(
        input_ids=torch.tensor([ids]),
        labels=torch.tensor([labels]),
        position_ids=torch.cat([torch.arange(len(d.ids)) for d in documents])[None],
        cu_seqlens=torch.tensor(borders, dtype=torch.int32),
        n_targets=sum(label != IGNORE_LABEL for label in labels),
        places=tuple(f"{d.file}:{d.line}" for d in documents),
    )
