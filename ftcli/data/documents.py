"""Rendered rows as flat arrays: one table for a data set, documents as windows into it.

    rows        0      1   2          file, line, key, n_words, n_text_tokens, n_turns, traits, first_document
                │      │   │
    documents   0      1   2 3        a row has one, or one for each trained turn; first_token
                │      │   │ │
    ids         AAAAAA BBB CC CCCC    int32, end to end
    mask        ...### .## .# ...#    uint8, 1 where trained

Nothing here is a Python object per token or per row, so a table lies in a file as it lies in memory (`cache`).
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from ftcli.data.chat import ChatRenderer, Rendered, RenderedRow, TrainOn
from ftcli.data.message import Example
from ftcli.data.trait import find_traits
from ftcli.errors import ContentError

Ints = NDArray[Any]
_BATCH_ROWS = 2048
_SAMPLED_ROWS = 256
_ROLE, _TURN = "\x1f", "\x1e"


@dataclass(frozen=True)
class SourceFile:
    """One file of rows, as the report shows it."""

    name: str
    format: str
    n_rows: int


@dataclass(frozen=True)
class RowTable:
    """The rows of one or more files with the documents that they became.

    Shapes: R rows, D documents, N tokens. ``file``, ``line``, ``key``, ``n_words``, ``n_text_tokens``, ``n_turns``,
    ``traits`` (R,); ``first_document`` (R + 1,); ``first_token`` (D + 1,); ``ids``, ``mask`` (N,). ``key`` is a hash
    of the row's content: equal rows have equal keys. ``n_text_tokens`` counts the tokens of the row's texts alone,
    without the template; it is measured on a sample of rows and -1 in the others.
    """

    files: tuple[SourceFile, ...]
    file: Ints
    line: Ints
    key: Ints
    n_words: Ints
    n_text_tokens: Ints
    n_turns: Ints
    traits: Ints
    first_document: Ints
    first_token: Ints
    ids: Ints
    mask: Ints

    @property
    def n_rows(self) -> int:
        return len(self.line)

    def place(self, row: int) -> str:
        """Where a row stands, as errors print it: ``train.jsonl:12``."""
        return f"{self.files[int(self.file[row])].name}:{int(self.line[row])}"

    def list_arrays(self) -> dict[str, Ints]:
        """Name → array of everything but the files."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "files"}


@dataclass(frozen=True)
class Documents(Sequence[Rendered]):
    """Documents as windows into a table; indexing builds one as lists.

    Shapes: ``begin``, ``end`` (tokens), ``row``, ``weight`` (D,).
    """

    table: RowTable
    begin: Ints
    end: Ints
    row: Ints
    weight: Ints

    @overload
    def __getitem__(self, index: int) -> Rendered: ...
    @overload
    def __getitem__(self, index: slice) -> list[Rendered]: ...
    def __getitem__(self, index: int | slice) -> Rendered | list[Rendered]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        window = slice(int(self.begin[index]), int(self.end[index]))
        table, row = self.table, int(self.row[index])
        name = table.files[int(table.file[row])].name
        return Rendered(table.ids[window].tolist(), (table.mask[window] > 0).tolist(), name, int(table.line[row]))

    def __len__(self) -> int:
        return len(self.begin)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each document."""
        return (self.end - self.begin).tolist()  # type: ignore[no-any-return]

    def count_targets(self) -> Ints:
        """Trained tokens of each document, without its first, which nothing predicts."""
        total = np.zeros(len(self.table.mask) + 1, dtype=np.int64)
        np.cumsum(self.table.mask, out=total[1:])
        return np.asarray(total[self.end] - total[np.minimum(self.begin + 1, self.end)])

    def select(self, chosen: Ints) -> Documents:
        """The documents that ``chosen`` (indices, or a flag for each) picks."""
        return Documents(self.table, self.begin[chosen], self.end[chosen], self.row[chosen], self.weight[chosen])


def build_table(
    examples: Sequence[Example],
    renderer: ChatRenderer,
    train_on: TrainOn,
    *,
    skipped: list[ContentError] | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> RowTable:
    """The table of ``examples``, rendered.

    Args:
        examples: in the order of their files.
        renderer: tokenizer and template.
        train_on: the turns that are learned.
        skipped: takes the rows that cannot be rendered, which are then left out, instead of an error.
        on_progress: told how many rows of all are done.

    Raises:
        ContentError: rows that cannot be rendered, each different failure once.
    """
    while True:
        n_notices = len(renderer.encoder.notices)
        builder = _TableBuilder(renderer, sample_every=-(-len(examples) // _SAMPLED_ROWS))
        for first in range(0, len(examples), _BATCH_ROWS):
            batch = examples[first : first + _BATCH_ROWS]
            builder.add(renderer.render_rows(batch, train_on, n_expected=len(examples)))
            if len(renderer.encoder.notices) > n_notices:
                break  # a faster way was wrong: what it gave before is made again
            on_progress(first + len(batch), len(examples))
        else:
            if builder.failures and (skipped is None or not builder.rows):
                raise _join_failures(builder.failures)
            if skipped is not None:
                skipped += builder.failures
            return builder.finish()


def join_tables(tables: Sequence[RowTable]) -> RowTable:
    """One table with the rows of all, in their order."""
    if len(tables) == 1:
        return tables[0]
    files: list[SourceFile] = []
    parts: dict[str, list[Ints]] = {name: [] for name in tables[0].list_arrays()}
    n_documents = n_tokens = 0
    for table in tables:
        moved = table.list_arrays() | {
            "file": table.file + len(files),
            "first_document": table.first_document[:-1] + n_documents,
            "first_token": table.first_token[:-1] + n_tokens,
        }
        for name, values in moved.items():
            parts[name].append(values)
        files += table.files
        n_documents += len(table.first_token) - 1
        n_tokens += len(table.ids)
    parts["first_document"].append(np.array([n_documents]))
    parts["first_token"].append(np.array([n_tokens]))
    return RowTable(tuple(files), **{name: np.concatenate(arrays) for name, arrays in parts.items()})


def select_documents(table: RowTable, rows: Ints, weight: Ints) -> Documents:
    """The documents of ``rows`` (flags, one for each row), whole; ``weight`` holds one for each row."""
    row = np.repeat(np.arange(table.n_rows), np.diff(table.first_document))
    documents = Documents(table, table.first_token[:-1], table.first_token[1:], row, weight[row])
    return documents if rows.all() else documents.select(rows[row])


def hash_example(example: Example) -> int:
    """A 64-bit hash of what the row says, the same for equal rows wherever they stand."""
    turns = [
        f"{m.role}{_ROLE}{-1 if m.content is None else len(m.content)}{_ROLE}{m.content}" for m in example.messages
    ]
    text = _TURN.join(turns) if example.text is None else _ROLE + example.text
    extras = [m.extra for m in example.messages]
    if example.tools or any(extras):
        text += _TURN + json.dumps([extras, example.tools], sort_keys=True, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


@dataclass
class _TableBuilder:
    """Grows the arrays of a table batch by batch."""

    renderer: ChatRenderer
    sample_every: int
    files: dict[str, tuple[int, str]] = field(default_factory=dict)  # name → index, format
    rows: list[tuple[int, ...]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    ids: array[int] = field(default_factory=lambda: array("i"))
    mask: bytearray = field(default_factory=bytearray)
    failures: list[ContentError] = field(default_factory=list)

    def add(self, batch: Sequence[RenderedRow]) -> None:
        for rendered in batch:
            if rendered.error:
                self.failures.append(rendered.error)
                continue
            self._add_row(rendered)
            for document in rendered.documents:
                self.lengths.append(len(document.ids))
                self.ids.fromlist(document.ids)
                self.mask += bytes(document.mask)

    def _add_row(self, rendered: RenderedRow) -> None:
        example = rendered.example
        index, _ = self.files.setdefault(example.file, (len(self.files), example.format))
        texts = [example.text] if example.text is not None else [m.content or "" for m in example.messages]
        is_sampled = len(self.rows) % self.sample_every == 0
        self.rows.append(
            (
                index,
                example.line,
                hash_example(example),
                sum(len(text.split()) for text in texts),
                self.renderer.encoder.count_tokens(texts) if is_sampled else -1,
                len(example.messages),
                int(find_traits(rendered, self.renderer.encoder.spell_out)),
                len(rendered.documents),
            )
        )

    def finish(self) -> RowTable:
        columns = list(zip(*self.rows, strict=True)) or [()] * 8
        file, line, key, n_words, n_text_tokens, n_turns, traits, n_documents = columns
        counts = np.bincount(np.array(file, dtype=np.int32), minlength=len(self.files)).tolist()
        return RowTable(
            files=tuple(SourceFile(name, kind, counts[index]) for name, (index, kind) in self.files.items()),
            file=np.array(file, dtype=np.int32),
            line=np.array(line, dtype=np.int64),
            key=np.array(key, dtype=np.uint64),
            n_words=np.array(n_words, dtype=np.int32),
            n_text_tokens=np.array(n_text_tokens, dtype=np.int32),
            n_turns=np.array(n_turns, dtype=np.int32),
            traits=np.array(traits, dtype=np.int32),
            first_document=_add_up(n_documents),
            first_token=_add_up(self.lengths),
            ids=np.frombuffer(self.ids, dtype=np.int32),
            mask=np.frombuffer(self.mask, dtype=np.uint8),
        )


def _add_up(counts: Sequence[int]) -> Ints:
    total = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(np.array(counts, dtype=np.int64), out=total[1:])
    return total


def _join_failures(failures: list[ContentError], shown: int = 5) -> ContentError:
    """One error that shows each different failure once, with the first row that has it."""
    first = failures[0]
    if len(failures) == 1:
        return first
    others = list({error.what: error for error in reversed(failures[1:]) if error.what != first.what}.values())
    lines = [f"{error.where}: {error.what}" for error in others[::-1][: shown - 1]]
    rest = len(failures) - 1 - len(lines)
    lines = [first.what, *lines, *([f"and {rest} more rows"] if rest else [])]
    return ContentError("\n".join(lines), where=first.where, why=first.why, hint=first.hint)
