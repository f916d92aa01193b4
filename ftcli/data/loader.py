"""The data sets of a recipe → documents to train on and to hold out, with what became of every row.

    section ─▶ rows ─▶ table (or from the cache) ─▶ split ─▶ overflow ─▶ DocumentSet: documents, report

The table does not depend on `data`: a run with another max_length, or another split, renders nothing anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ftcli.data.cache import load_table, name_entry, save_table
from ftcli.data.chat import ChatRenderer
from ftcli.data.collector import paused_collector
from ftcli.data.documents import Documents, Ints, RowTable, build_table, join_tables, select_documents
from ftcli.data.example import read_examples
from ftcli.data.message import ROLES, Example, suggest_name
from ftcli.data.source import Source, check_problems, find_sources, hash_sources
from ftcli.data.tokenizer import hash_tokenizer
from ftcli.errors import ContentError, Problem, UsageError
from ftcli.recipe import DataSection, DatasetSection, RowsSection

_PLACES_SHOWN = 5
_LONGEST_NAME = 100  # of a held-out set; files are named after it


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
    """Documents in the order of their rows; ``rows`` flags those of the table that belong to this set.

    ``is_long`` flags the rows that are longer than ``max_length``, whatever became of them.
    """

    name: str
    documents: Documents
    rows: Ints
    is_long: Ints
    report: DataReport
    sections: tuple[RowsSection, ...]

    @property
    def table(self) -> RowTable:
        return self.documents.table

    def read_examples(self) -> list[Example]:
        """The conversations that went in whole, read from their files again."""
        whole = np.unique(self.documents.row[~self.is_long[self.documents.row]])
        places = {self.table.place(row) for row in whole.tolist()}
        examples = [e for section in self.sections for e in read_section(section, find_section(section))]
        return [example for example in examples if example.place in places]


@dataclass(frozen=True)
class DataSplit:
    """The documents of a run: what is trained on, and what is held out; ``sha256`` is of all that was read.

    ``held_out_by_role`` is, for each held-out set's name, role → documents with that role's turns as learned, where
    that was asked for.
    """

    train: DocumentSet
    held_out: tuple[DocumentSet, ...]
    sha256: str
    notices: tuple[str, ...] = ()
    held_out_by_role: Mapping[str, Mapping[str, Documents]] = field(default_factory=dict)

    @property
    def has_chats(self) -> bool:
        """Whether a row to train on is a conversation, not a raw text."""
        return bool(self.train.table.n_turns.any())


@dataclass
class Reading:
    """How data sets are read: ``skipped``, if it is a list, takes bad rows instead of an error."""

    renderer: ChatRenderer
    uses_cache: bool = True
    skipped: list[Problem] | None = None
    on_progress: Callable[[int, int], None] = lambda done, total: None
    notices: list[str] = field(default_factory=list)
    hashes: list[str] = field(default_factory=list)

    @property
    def sha256(self) -> str:
        """The hash of all that was read."""
        return self.hashes[0] if len(self.hashes) == 1 else hashlib.sha256("".join(self.hashes).encode()).hexdigest()

    def load(self, section: RowsSection) -> RowTable:
        """The table of one section of the recipe, from the cache if it is there.

        Raises:
            ContentError: rows that cannot be read or rendered.
        """
        check_train_on(section.train_on)
        sources = find_section(section)
        self.hashes.append(hash_sources(sources))
        name = name_entry(self._list_origins(section, sources))
        keeps = self.uses_cache and self.skipped is None
        if keeps and (known := load_table(name)):
            return known
        with paused_collector():
            table = self._build(section, sources)
        if keeps and (why := save_table(name, table)):
            self.notices.append(f"the rendered rows are not cached: {why}")
        self.notices += [notice for notice in self.renderer.encoder.notices if notice not in self.notices]
        return table

    def _build(self, section: RowsSection, sources: Sequence[Source]) -> RowTable:
        examples = read_section(section, sources, self.skipped)
        if not examples:
            check_problems(self.skipped or ())
        failures: list[ContentError] | None = None if self.skipped is None else []
        table = build_table(examples, self.renderer, section.train_on, skipped=failures, on_progress=self.on_progress)
        if self.skipped is not None:
            self.skipped += [Problem(error.what, error.where, error.hint) for error in failures or ()]
        return table

    def _list_origins(self, section: RowsSection, sources: Sequence[Source]) -> dict[str, object]:
        template = self.renderer.template
        return {
            "data": self.hashes[-1],
            "names": [source.name for source in sources],
            "section": section.model_dump(mode="json", exclude={"path", "weight"}),
            "tokenizer": hash_tokenizer(self.renderer.tokenizer),
            "special": template.special_tokens,
            "template": template.source,
            "variables": template.variables,
            "date": template.date.isoformat() if template.is_dated else None,
        }


def check_train_on(train_on: str | Sequence[str]) -> None:
    """None if a list of ``train_on`` holds roles that messages can have.

    Raises:
        UsageError: naming one that they cannot.
    """
    for role in () if isinstance(train_on, str) else train_on:
        if role not in ROLES:
            what = f"{role} is no role; the roles are {', '.join(ROLES)}"
            raise UsageError(what, where="datasets[].train_on", hint=suggest_name(role, ROLES))


def find_section(section: RowsSection) -> list[Source]:
    """The files of one section of the recipe."""
    return find_sources(section.path, config=section.name, split=section.split)


def read_section(
    section: RowsSection, sources: Sequence[Source], skipped: list[Problem] | None = None
) -> list[Example]:
    """The examples of one section of the recipe, file by file."""
    return [
        example
        for source in sources
        for example in read_examples(
            source, section.type, columns=section.columns, roles=section.roles, skipped=skipped
        )
    ]


@dataclass(frozen=True)
class Part:
    """The rows of one side of a run before anything is cut: ``rows`` flags those of the table that belong to it."""

    name: str
    table: RowTable
    rows: Ints
    weight: Ints
    sections: tuple[RowsSection, ...]

    def select(self) -> Documents:
        """The documents of the part's rows, whole."""
        return select_documents(self.table, self.rows, self.weight)


def load_parts(
    datasets: Sequence[DatasetSection],
    data: DataSection,
    held_out: Sequence[RowsSection],
    reading: Reading,
    *,
    seed: int,
) -> list[Part]:
    """The rows of a run, rendered: those to train on first, then each held-out set.

    Raises:
        ContentError: a file or row cannot be used.
    """
    tables = [reading.load(section) for section in datasets]
    table = join_tables(tables)
    weight = np.repeat([section.weight for section in datasets], [part.n_rows for part in tables])
    every = np.ones(table.n_rows, dtype=bool)
    parts = [Part("train", table, every, weight, tuple(datasets))]
    if data.val_set_size is not None:
        chosen = split_rows(table, data.val_set_size, seed=seed)
        once = np.ones(table.n_rows)
        parts = [replace(parts[0], rows=~chosen), Part("val", table, chosen, once, tuple(datasets))]
    for section in held_out:
        own = reading.load(section)
        name = _name_set(section, [part.name for part in parts])
        parts.append(Part(name, own, np.ones(own.n_rows, dtype=bool), np.ones(own.n_rows), (section,)))
    return parts


def load_split(
    datasets: Sequence[DatasetSection],
    data: DataSection,
    held_out: Sequence[RowsSection],
    reading: Reading,
    *,
    seed: int,
) -> DataSplit:
    """All documents of a run, rendered, with the overflow policy applied.

    Raises:
        ContentError: a file or row cannot be used, or nothing is left to train on.
    """
    parts = load_parts(datasets, data, held_out, reading, seed=seed)
    sets = [build_set(part, data) for part in parts]
    return DataSplit(sets[0], tuple(sets[1:]), reading.sha256, tuple(reading.notices))


def _name_set(section: RowsSection, names: Sequence[str]) -> str:
    """A name for a held-out set that no other has: its file's, and a number if need be."""
    stem = name = section.path.rstrip("/").rpartition("/")[2].partition(".")[0][:_LONGEST_NAME] or "eval"
    number = 1
    while name in names:
        number += 1
        name = f"{stem}-{number}"
    return name


def split_rows(table: RowTable, size: float | int, *, seed: int) -> Ints:
    """Flags of the rows to hold out, by a hash of seed and content; equal rows stay on one side.

    Args:
        table: the rows.
        size: the held-out share (float) or number of different rows (int).
        seed: another seed holds out other rows.

    Raises:
        ContentError: one side would be empty.
    """
    distinct = sorted(set(table.key.tolist()), key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).digest())
    n_held_out = size if isinstance(size, int) else round(size * len(distinct))
    if not 0 < n_held_out < len(distinct):
        raise ContentError(
            f"data.val_set_size {size} leaves one side empty: there are {len(distinct)} different rows",
            hint="choose a share or number between",
        )
    return np.isin(table.key, np.array(distinct[:n_held_out], dtype=table.key.dtype))


def build_set(part: Part, data: DataSection) -> DocumentSet:
    """The documents of ``part`` with the overflow policy of ``data`` applied.

    Raises:
        ContentError: rows that are too long (``overflow: error``), or none left.
    """
    table, rows, whole = part.table, part.rows, part.select()
    is_long = (whole.end - whole.begin) > data.max_length
    if is_long.any() and data.overflow == "error":
        raise explain_overflow(whole, is_long, data.max_length)
    fitted = fit_documents(whole, is_long, data)
    targets = fitted.count_targets()
    useful = fitted.select(targets > 0) if (targets == 0).any() else fitted
    if not len(useful):
        raise ContentError(
            f"no row of {part.name} has a token to train on",
            hint="check datasets[].train_on and the rows' roles",
        )
    long_rows, has_target = np.zeros(table.n_rows, dtype=bool), np.zeros(table.n_rows, dtype=bool)
    long_rows[whole.row[is_long]] = True
    has_target[useful.row] = True
    lost = rows & ~has_target & ~(long_rows if data.overflow == "drop" else False)
    counts = {"drop": "n_dropped", "truncate": "n_truncated", "split": "n_split"}
    report = DataReport(
        n_rows=int(rows.sum()),
        n_documents=len(useful),
        n_tokens=int((useful.end - useful.begin).sum()),
        n_target_tokens=int(targets.sum()),
        n_without_target=int(lost.sum()),
        longest=int((useful.end - useful.begin).max()),
        **({counts[data.overflow]: int(long_rows.sum())} if long_rows.any() else {}),
    )
    return DocumentSet(part.name, useful, rows, long_rows, report, part.sections)


def fit_documents(documents: Documents, is_long: Ints, data: DataSection) -> Documents:
    """``documents`` with those that ``is_long`` flags dropped, cut or split, as ``data.overflow`` says."""
    if not is_long.any():
        return documents
    limit = data.max_length
    if data.overflow == "drop":
        return documents.select(~is_long)
    if data.overflow == "truncate":
        end = np.minimum(documents.end, documents.begin + limit)
        return Documents(documents.table, documents.begin, end, documents.row, documents.weight)
    n_parts = np.maximum(1, -(-(documents.end - documents.begin) // limit))
    index = np.repeat(np.arange(len(documents)), n_parts)
    part = np.arange(len(index)) - np.repeat(np.cumsum(n_parts) - n_parts, n_parts)
    begin = documents.begin[index] + part * limit
    end = np.minimum(documents.end[index], begin + limit)
    return Documents(documents.table, begin, end, documents.row[index], documents.weight[index])


def explain_overflow(documents: Documents, is_long: Ints, limit: int) -> ContentError:
    """The error for rows that are longer than ``limit`` tokens."""
    lengths = documents.end - documents.begin
    long_rows = documents.row[is_long]
    shown = dict(zip(long_rows.tolist(), lengths[is_long].tolist(), strict=True))
    places = ", ".join(f"{documents.table.place(row)} ({n})" for row, n in list(shown.items())[:_PLACES_SHOWN])
    more = f" and {len(shown) - _PLACES_SHOWN} more" if len(shown) > _PLACES_SHOWN else ""
    return ContentError(
        f"{len(shown)} rows are longer than data.max_length {limit}: {places}{more}",
        hint=f"raise data.max_length to {int(lengths.max())}, or set data.overflow to drop, truncate or split",
    )
