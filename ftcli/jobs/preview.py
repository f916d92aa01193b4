"""Rows as they will be learned, token by token: for a person (terminal, page) and for scripts (`list_sequences`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ftcli.data.batch import list_labels
from ftcli.data.documents import Documents
from ftcli.data.loader import Part, build_set
from ftcli.data.piece import Piece, PieceReader
from ftcli.data.plan import plan_epoch
from ftcli.errors import UsageError
from ftcli.events import Notice, OnEvent, ignore_event
from ftcli.jobs.rows import Tokenized

State = Literal["trained", "context", "truncated"]
MARKS: dict[State, str] = {"trained": "#", "context": ".", "truncated": "x"}


@dataclass(frozen=True)
class TokenView:
    """One token and what becomes of it; special tokens are ``piece.is_special``."""

    piece: Piece
    state: State


@dataclass(frozen=True)
class DocumentView:
    """One document of a row, token by token."""

    tokens: tuple[TokenView, ...]

    def count(self, state: State) -> int:
        return sum(token.state == state for token in self.tokens)

    def list_lines(self) -> Iterator[list[TokenView]]:
        """Tokens of one state, up to the one that ends a line of text."""
        line: list[TokenView] = []
        for token in self.tokens:
            if line and (token.state != line[0].state or b"\n" in line[-1].piece.data):
                yield line
                line = []
            line.append(token)
        if line:
            yield line


def spell_tokens(tokens: Sequence[TokenView]) -> str:
    """The text that ``tokens`` spell together."""
    return b"".join(token.piece.data for token in tokens).decode("utf-8", errors="replace")


@dataclass(frozen=True)
class RowView:
    """One row with its documents; ``why`` says why it is shown."""

    part: str
    place: str
    documents: tuple[DocumentView, ...]
    n_unknown: int
    why: str = ""

    @property
    def n_tokens(self) -> int:
        return sum(len(document.tokens) for document in self.documents)

    @property
    def n_trained(self) -> int:
        return sum(document.count("trained") for document in self.documents)


def view_rows(tokenized: Tokenized, *, first: int = 0, worst: int = 0, line: int | None = None) -> list[RowView]:
    """The rows to look at: one by its line, the first ones, and the worst ones, each once.

    Raises:
        UsageError: no row begins at ``line``.
    """
    chosen: dict[tuple[int, int], str] = {}
    if line is not None:
        chosen |= dict.fromkeys(_find_line(tokenized, line), "")
    part = tokenized.parts[0]
    rows = np.flatnonzero(part.rows)
    chosen |= {(0, int(row)): "" for row in rows[:first]}
    reader = PieceReader(tokenized.tokenizer)
    for row, why in _rank_worst(part, reader, worst):
        chosen.setdefault((0, row), why)
    limit = tokenized.max_length if tokenized.data.overflow != "split" else None
    return [_view_row(tokenized.parts[index], row, reader, limit, why) for (index, row), why in chosen.items()]


def list_sequences(tokenized: Tokenized, on_event: OnEvent = ignore_event) -> Iterator[dict[str, Any]]:
    """What the model is given, one object for each document (or pack, where the recipe packs) of the first epoch.

    Keys: ``input_ids``, ``labels`` (-100 where nothing is learned, not shifted), ``position_ids``,
    ``document_ids`` (from 0 within the sequence), ``sources`` (file and line of each document).

    Raises:
        ContentError: rows are longer than the recipe's ``max_length`` and it says ``overflow: error``.
    """
    data = tokenized.data
    part = build_set(tokenized.parts[0], data)
    for sentence in part.report.describe_losses():
        on_event(Notice(f"{part.name}: {sentence}"))
    groups: Sequence[Sequence[int]] = [[index] for index in range(len(part.documents))]
    if data.packing:
        steps = plan_epoch(
            part.documents.lengths,
            seed=tokenized.recipe.train.seed,
            epoch=0,
            rows_per_batch=1,
            batches_per_step=1,
            pack_tokens=data.max_length,
            weights=part.documents.weight.tolist(),
        )
        groups = [group for step in steps for group in step]
    for group in groups:
        yield _join_documents(part.documents, group)


def _join_documents(documents: Documents, group: Sequence[int]) -> dict[str, Any]:
    sequence: dict[str, Any] = {key: [] for key in ("input_ids", "labels", "position_ids", "document_ids", "sources")}
    for number, index in enumerate(group):
        document = documents[index]
        sequence["input_ids"] += document.ids
        sequence["labels"] += list_labels(document)
        sequence["position_ids"] += range(len(document.ids))
        sequence["document_ids"] += [number] * len(document.ids)
        sequence["sources"].append({"file": document.file, "line": document.line})
    return sequence


def _find_line(tokenized: Tokenized, line: int) -> list[tuple[int, int]]:
    found = [
        (index, int(row))
        for index, part in enumerate(tokenized.parts)
        for row in np.flatnonzero((part.table.line == line) & part.rows)
    ]
    if not found:
        table = tokenized.parts[0].table
        raise UsageError(
            f"no row begins at line {line}",
            where=", ".join(file.name for file in table.files[:3]),
            hint=f"rows stand at lines {int(table.line.min())} to {int(table.line.max())}",
        )
    return found


def _rank_worst(part: Part, reader: PieceReader, n_worst: int) -> list[tuple[int, str]]:
    """Rows with the most unknown tokens, the longest, and the least trained ones, in turns."""
    if not n_worst:
        return []
    table, documents = part.table, part.select()
    lengths = np.bincount(documents.row, documents.end - documents.begin, table.n_rows)
    targets = np.bincount(documents.row, documents.count_targets(), table.n_rows)
    unknown = np.zeros(table.n_rows)
    if reader.unknown_id is not None:
        of_document = np.searchsorted(table.first_token, np.flatnonzero(table.ids == reader.unknown_id), "right") - 1
        of_row = np.searchsorted(table.first_document, of_document, "right") - 1
        unknown = np.bincount(of_row, minlength=table.n_rows).astype(float)
    share = 1 - targets / np.maximum(lengths, 1)
    rows = np.flatnonzero(part.rows)
    by_unknown = [row for row in rows[np.argsort(-unknown[rows], kind="stable")] if unknown[row]]
    rankings = (
        [(int(row), f"{int(unknown[row])} unknown tokens") for row in by_unknown],
        [(int(row), f"{int(lengths[row])} tokens long") for row in rows[np.argsort(-lengths[rows], kind="stable")]],
        [(int(row), f"{share[row]:.1%} not trained") for row in rows[np.argsort(-share[rows], kind="stable")]],
    )
    chosen: dict[int, str] = {}
    for rank in range(len(rows)):
        for ranking in rankings:
            if rank < len(ranking) and len(chosen) < n_worst:
                chosen.setdefault(*ranking[rank])
    return list(chosen.items())


def _view_row(part: Part, row: int, reader: PieceReader, limit: int | None, why: str) -> RowView:
    table = part.table
    documents = []
    n_unknown = 0
    for document in range(int(table.first_document[row]), int(table.first_document[row + 1])):
        window = slice(int(table.first_token[document]), int(table.first_token[document + 1]))
        ids, mask = table.ids[window].tolist(), table.mask[window].tolist()
        n_unknown += ids.count(reader.unknown_id)
        documents.append(DocumentView(tuple(_view_tokens(ids, mask, reader, limit))))
    return RowView(part.name, table.place(row), tuple(documents), n_unknown, why)


def _view_tokens(ids: list[int], mask: list[int], reader: PieceReader, limit: int | None) -> Iterator[TokenView]:
    for position, (id, is_trained) in enumerate(zip(ids, mask, strict=True)):  # noqa: A001
        state: State = "trained" if is_trained and position else "context"
        if limit is not None and position >= limit:
            state = "truncated"
        yield TokenView(reader.read(id), state)
