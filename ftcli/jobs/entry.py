"""What each target of an evaluation is asked: the rows as its own tokenizer and template read them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import regex

from ftcli.data.chat import ChatRenderer, Rendered
from ftcli.data.documents import Documents
from ftcli.data.loader import DocumentSet, Reading
from ftcli.data.message import Example
from ftcli.data.source import find_sources
from ftcli.errors import ContentError, UsageError
from ftcli.evaluate.generate import check_context, find_unfit, has_reference, list_prompts
from ftcli.evaluate.sample import load_file_set, load_run_split
from ftcli.evaluate.score import check_package
from ftcli.evaluate.window import cut_windows
from ftcli.jobs.contender import Contender

METRICS = ("exact_match", "json", "regex", "rouge", "bleu")
_NO_LIMIT = 1 << 40
_LONGEST_WINDOW = 2048  # tokens; the logits of one window over a vocabulary of 150,000 are 1.2 GB


@dataclass(frozen=True, kw_only=True)
class Measure:
    """What is measured on which rows.

    ``data`` None are the rows that the run of the first target held out; ``limit`` keeps the first rows of each set.
    Documents of more than ``max_length`` tokens are read in windows that advance by ``stride``: None are the recipe's
    max_length, else 2048 or the shortest context, and half of that. ``metric`` says how generated answers are scored,
    None generates none.
    """

    data: str | None = None
    limit: int | None = None
    max_length: int | None = None
    stride: int | None = None
    metric: str | None = None
    pattern: str | None = None
    max_new_tokens: int = 128
    batch_rows: int = 8

    def check(self) -> None:
        """None if this can be measured.

        Raises:
            UsageError: no such score or file, a pattern that is none, or a package that is missing.
        """
        if self.metric is not None and self.metric not in METRICS:
            raise UsageError(f"there is no score {self.metric}", hint=f"choose one of {', '.join(METRICS)}")
        if self.pattern is not None:
            if self.metric != "regex":
                raise UsageError("a regex is for the score regex alone", hint="add --score regex")
            try:
                regex.compile(self.pattern)
            except regex.error as error:
                raise UsageError(f"is no regular expression: {error}", where=self.pattern) from None
        check_package(self.metric or "")
        if self.data is not None:
            find_sources(self.data)


@dataclass(frozen=True)
class Entry:
    """A contender with the rows as it reads them: ``documents`` in windows, ``asked`` with their prompts (ids).

    ``batch_tokens`` bounds one forward (a longer document goes alone). ``is_same`` says whether all ids are those of
    the first contender; ``n_bytes`` of trained text are counted where some are not.
    """

    contender: Contender
    rows: Rows
    documents: Sequence[Rendered]
    batch_tokens: int
    is_same: bool
    n_bytes: int | None
    asked: tuple[Example, ...]
    prompts: tuple[list[int], ...]


def list_entries(contenders: Sequence[Contender], wanted: Measure, notify: Callable[[str], None]) -> list[Entry]:
    """One entry for each contender; ``notify`` is told what a person must know of the rows.

    Raises:
        FtcliError: rows that cannot be read, or that a contender has no room for.
    """
    read = [load_rows(wanted.data, contenders[0], c.renderer, limit=wanted.limit) for c in contenders]
    first = read[0]
    for notice in (notice for rows in read for notice in rows.notices):
        notify(notice)
    length = _choose_length(contenders, first, wanted.max_length)
    batch_tokens = min(length, _LONGEST_WINDOW)
    is_same = [rows.reads_as(first) for rows in read]
    asked = _list_asked(first, wanted, notify) if wanted.metric else ()
    entries = []
    for contender, own, same in zip(contenders, read, is_same, strict=True):
        rows = first if same else own
        documents = rows.cut(length, wanted.stride or max(1, length // 2))
        if n := rows.count_longer(length):
            n_all = sum(map(len, rows.chosen))
            notify(f"{n} of {n_all} documents are longer than {length} tokens and are read in windows")
        n_bytes = None if all(is_same) else _count_bytes(rows, contender.renderer)
        prompts = tuple(list_prompts(contender.renderer, asked))
        check_context(contender.context, prompts, wanted.max_new_tokens, where="--max-new-tokens")
        entries.append(Entry(contender, rows, documents, batch_tokens, same, n_bytes, asked, prompts))
    others = [entry.contender.name for entry in entries if not entry.is_same]
    if others:
        notify(
            f"the rows are not the same tokens to {contenders[0].name} and {', '.join(others)}, as tokenizer or "
            "template differ: compare bits per byte of trained text, not loss and perplexity"
        )
    return entries


@dataclass(frozen=True)
class Rows:
    """The rows that are measured, as one tokenizer and template read them.

    ``label`` says in words what they are; ``chosen`` holds, for each set, the documents that are left of it by a limit;
    ``max_length`` is the recipe's, None where there is none.
    """

    label: str
    sets: tuple[DocumentSet, ...]
    chosen: tuple[Documents, ...]
    n_rows: int
    max_length: int | None
    notices: tuple[str, ...]

    @cached_property
    def examples(self) -> list[Example]:
        """The conversations themselves, read from their files again."""
        found = []
        for part, documents in zip(self.sets, self.chosen, strict=True):
            places = {part.table.place(row) for row in np.unique(documents.row).tolist()}
            found += [example for example in part.read_examples() if example.place in places]
        return found

    def cut(self, length: int, stride: int) -> Sequence[Rendered]:
        """All documents, those longer than ``length`` in windows."""
        parts = [cut_windows(documents, length, stride) for documents in self.chosen]
        return parts[0] if len(parts) == 1 else [document for part in parts for document in part]

    def count_longer(self, length: int) -> int:
        """Documents of more than ``length`` tokens."""
        return sum(int((documents.end - documents.begin > length).sum()) for documents in self.chosen)

    def reads_as(self, other: Rows) -> bool:
        """Whether both have the same ids, learned at the same places."""
        pairs = zip(self.chosen, other.chosen, strict=True)
        return all(a is b or (len(a) == len(b) and all(map(_are_alike, a, b))) for a, b in pairs)


def load_rows(data: str | None, contender: Contender, renderer: ChatRenderer, *, limit: int | None) -> Rows:
    """The rows of ``data``, or what the run of ``contender`` held out, as ``renderer`` reads them.

    ``limit`` keeps the first rows of each set.

    Raises:
        UsageError: no data was named, and there is no run that held rows out.
        ContentError: rows that cannot be read or rendered, or nothing in them to measure.
    """
    reading, recipe = Reading(renderer), contender.target.recipe
    sets: tuple[DocumentSet, ...]
    if data is not None:
        sets, label, max_length = (load_file_set(data, reading),), data, None
    elif recipe and (recipe.data.val_set_size or (recipe.eval and recipe.eval.datasets)):
        split = load_run_split(recipe, reading)
        sets, max_length = split.held_out, recipe.data.max_length
        label = f"{', '.join(part.name for part in sets)} of {contender.name}"
        if split.sha256 != contender.target.manifest.get("data_sha256"):
            reading.notices.append(f"the data is not what it was when {contender.name} was trained")
    else:
        what = "the run held no rows out" if recipe else "which rows? a model has none of its own"
        raise UsageError(what, where=contender.name, hint="name them: --data FILE")
    chosen = tuple(_keep_first(part, limit) for part in sets)
    losses = [f"{part.name}: {text}" for part in sets for text in part.report.describe_losses()]
    n_rows = sum(len(np.unique(documents.row)) for documents in chosen)
    return Rows(label, sets, chosen, n_rows, max_length, (*reading.notices, *losses))


def _keep_first(part: DocumentSet, limit: int | None) -> Documents:
    documents = part.documents
    if limit is None:
        return documents
    return documents.select(np.isin(documents.row, np.unique(documents.row)[:limit]))


def _are_alike(first: Rendered, second: Rendered) -> bool:
    return first.ids == second.ids and first.mask == second.mask


def _choose_length(contenders: Sequence[Contender], rows: Rows, max_length: int | None) -> int:
    """How many tokens a document may have before it is read in windows."""
    shortest = min(contenders, key=lambda contender: contender.context or math.inf)
    context = shortest.context or _NO_LIMIT
    if max_length is not None and max_length > context:
        what = f"windows of {max_length} tokens do not fit the context of {context}"
        raise UsageError(what, where=shortest.name, hint=f"set --max-length to at most {context}")
    return max_length or min(context, rows.max_length or _LONGEST_WINDOW)


def _count_bytes(rows: Rows, renderer: ChatRenderer) -> int:
    """The UTF-8 bytes of what the trained tokens say, special tokens apart."""
    n_bytes = 0
    for document in (document for documents in rows.chosen for document in documents):
        trained = [token for token, flag in zip(document.ids[1:], document.mask[1:], strict=True) if flag]
        text = renderer.tokenizer.decode(trained, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        n_bytes += len(text.encode("utf-8", "replace"))
    return n_bytes


def _list_asked(rows: Rows, wanted: Measure, notify: Callable[[str], None]) -> tuple[Example, ...]:
    """The rows that have an answer.

    Raises:
        ContentError: there is none, or none that an answer could be held against.
    """
    asked = tuple(example for example in rows.examples if has_reference(example))
    if not asked:
        raise ContentError("no row ends with an answer, so there is nothing to score", where=rows.label)
    unfit = find_unfit(asked, wanted.metric or "", wanted.pattern)
    if len(unfit) == len(asked):
        raise ContentError(unfit[0].what, where=unfit[0].where, hint="choose another --score")
    if unfit:
        notify(f"{len(unfit)} of {len(asked)} rows cannot be right: {unfit[0].what} ({unfit[0].where})")
    return asked
