"""What is wrong, or surprising, in rendered rows: each with the rows, the meaning, the remedy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ftcli.data.chat import ChatRenderer
from ftcli.data.documents import Documents, Ints, RowTable
from ftcli.data.finding import Finding, Severity
from ftcli.data.limits import ModelLimits
from ftcli.data.loader import DocumentSet
from ftcli.data.trait import Trait

_PLACES_SHOWN = 5
_WITHOUT_TEMPLATE = ("context", "vocabulary-size")  # said of raw texts too

# trait → severity, what, what it means, what to do
_TRAITS: dict[Trait, tuple[Severity, str, str, str, str]] = {
    Trait.TYPED_SPECIAL: (
        "note",
        "typed-special",
        "spell out a special token in a message",
        "it is encoded as text, never as the control token",
        "remove it from the rows if it is a remnant of another template",
    ),
    Trait.SPLIT: (
        "note",
        "history",
        "become one document for each trained turn",
        "the template rewrites earlier turns, so each turn is learned in the context that inference shows it",
        "",
    ),
    Trait.SYSTEM_LOST: (
        "warning",
        "system-lost",
        "have a system text that the template drops",
        "the model never sees it, neither here nor at inference",
        "put it into the first question, or use a chat_template with a system role",
    ),
    Trait.TOOLS_LOST: (
        "warning",
        "tools-lost",
        "list tools that the template does not write",
        "the model would learn to call tools that it was not told of",
        "use a chat_template with tools",
    ),
    Trait.CALLS_LOST: (
        "warning",
        "tool-calls-lost",
        "have tool calls that the template does not write",
        "these turns teach less than the row says, or nothing",
        "use a chat_template with tool calls, or write the calls into content",
    ),
    Trait.CALLS_QUOTED: (
        "warning",
        "tool-calls-quoted",
        "have tool calls whose arguments are written twice encoded",
        'the template encodes arguments itself, and a text of JSON becomes "{\\"…\\"}"',
        "give arguments as an object, not as a text",
    ),
    Trait.REASONING_LOST: (
        "warning",
        "reasoning-lost",
        "have reasoning that the template does not write",
        "the model is not trained on it",
        "use a chat_template with reasoning, or write it into content",
    ),
}


def list_findings(
    of_template: Sequence[Finding],
    parts: Sequence[tuple[str, RowTable, Ints]],
    renderer: ChatRenderer,
    limits: ModelLimits,
) -> list[Finding]:
    """All that is to be said: of the template, if there are conversations at all, and of the rows.

    Args:
        of_template: what `list_template_findings` says.
        parts: (name, table, flags of its rows), the training set first.
        renderer: tokenizer and template.
        limits: of the model.
    """
    has_chats = any(table.n_turns.any() for _, table, _ in parts)
    findings = [finding for finding in of_template if has_chats or finding.code in _WITHOUT_TEMPLATE]
    for name, table, rows in parts:
        findings += _check_vocabulary(name, table, limits)
        findings += _check_traits(name, table, rows)
        findings += _check_bos(name, table, renderer)
        findings += _check_targets(name, table, rows)
        findings += _check_duplicates(name, table, rows)
    findings += _check_overlap(parts)
    return findings


def find_overflow(part: DocumentSet) -> Iterator[Finding]:
    """A warning if rows are longer than ``max_length``, with what becomes of them."""
    rows = np.flatnonzero(part.is_long)
    if len(rows):
        told = next(text for text in part.report.describe_losses() if "max_length" in text)
        why = "what is cut or dropped is not learned, an answer's end among it"
        yield _tell_rows(
            "warning",
            "overflow",
            told.partition(" rows ")[2],
            why if not part.report.n_split else "the parts do not see each other",
            "raise data.max_length",
            name=part.name,
            table=part.table,
            rows=rows,
        )


def count_stop_tokens(documents: Documents, stop_ids: Sequence[int]) -> int:
    """The trained end-of-turn tokens of ``documents``."""
    table = documents.table
    is_stop = (np.isin(table.ids, stop_ids) & (table.mask > 0)).astype(np.int64)
    total = np.concatenate([[0], np.cumsum(is_stop)])
    return int((total[documents.end] - total[np.minimum(documents.begin + 1, documents.end)]).sum())


def _check_vocabulary(name: str, table: RowTable, limits: ModelLimits) -> Iterator[Finding]:
    if limits.embedding_rows is None or not len(table.ids) or int(table.ids.max()) < limits.embedding_rows:
        return
    at = np.flatnonzero(table.ids >= limits.embedding_rows)
    rows = np.unique(_find_rows(table, at))
    yield _tell_rows(
        "error",
        "vocabulary",
        f"hold tokens that the model has no row for, such as {int(table.ids[at[0]])} "
        f"(its embedding has {limits.embedding_rows} rows)",
        "this tokenizer is not the one of this model",
        "put the model's own tokenizer beside it, or name new tokens in tokenizer.add_tokens",
        name=name,
        table=table,
        rows=rows,
    )


def _check_traits(name: str, table: RowTable, rows: Ints) -> Iterator[Finding]:
    for trait, (severity, code, what, why, hint) in _TRAITS.items():
        found = np.flatnonzero(((table.traits & int(trait)) > 0) & rows)
        if len(found):
            yield _tell_rows(severity, code, what, why, hint, name=name, table=table, rows=found)


def _check_bos(name: str, table: RowTable, renderer: ChatRenderer) -> Iterator[Finding]:
    bos = renderer.tokenizer.bos_token_id
    if bos is None or not len(table.ids):
        return
    first = table.first_token[:-1]
    second = np.minimum(first + 1, len(table.ids) - 1)
    has_bos = table.ids[first] == bos
    twice = np.flatnonzero(has_bos & (table.ids[second] == bos) & (second < table.first_token[1:]))
    if len(twice):
        yield _tell_rows(
            "error",
            "double-bos",
            f"begin with {renderer.tokenizer.bos_token} twice",
            "no model has seen that in its training",
            "let the template write it once, with bos_token",
            name=name,
            table=table,
            rows=np.unique(_find_rows(table, first[twice])),
        )
    adds_bos = renderer.tokenizer("a").input_ids[:1] == [bos]
    chats = np.flatnonzero(~has_bos & (table.n_turns[_find_rows(table, first)] > 0))
    if adds_bos and len(chats):
        yield _tell_rows(
            "warning",
            "no-bos",
            f"begin without {renderer.tokenizer.bos_token}, which this tokenizer puts before every text",
            "the template does not write it, and ftcli adds nothing to a template",
            "begin the template with {{ bos_token }}, if the base model was trained with it",
            name=name,
            table=table,
            rows=np.unique(_find_rows(table, first[chats])),
        )


def _check_targets(name: str, table: RowTable, rows: Ints) -> Iterator[Finding]:
    total = np.concatenate([[0], np.cumsum(table.mask, dtype=np.int64)])
    borders = table.first_token[table.first_document]
    found = np.flatnonzero((total[borders[1:]] - total[borders[:-1]] == 0) & rows)
    if len(found):
        yield _tell_rows(
            "warning",
            "no-target",
            "have no token to train on and are left out",
            "none of their turns is chosen by train_on, or each says train: false",
            "check datasets[].train_on and the rows' roles",
            name=name,
            table=table,
            rows=found,
        )


def _check_duplicates(name: str, table: RowTable, rows: Ints) -> Iterator[Finding]:
    chosen = np.flatnonzero(rows)
    _, first = np.unique(table.key[chosen], return_index=True)
    again = np.setdiff1d(np.arange(len(chosen)), first)
    if len(again):
        yield _tell_rows(
            "warning",
            "duplicates",
            "stand in the data before",
            "what is repeated is learned more strongly",
            "remove them, or repeat on purpose with datasets[].weight",
            name=name,
            table=table,
            rows=chosen[again],
        )


def _check_overlap(parts: Sequence[tuple[str, RowTable, Ints]]) -> Iterator[Finding]:
    (_, train, train_rows), *held_out = parts
    known = train.key[train_rows.astype(bool)]
    for name, table, rows in held_out:
        found = np.flatnonzero(np.isin(table.key, known) & rows)
        if len(found):
            yield _tell_rows(
                "warning",
                "overlap",
                "are trained on too",
                "a score on rows that were learned says nothing about new ones",
                "remove them from one side, or use data.val_set_size, which keeps equal rows together",
                name=name,
                table=table,
                rows=found,
            )


def _find_rows(table: RowTable, tokens: Ints) -> Ints:
    """The row of each token (an index into ``ids``)."""
    documents = np.searchsorted(table.first_token, tokens, side="right") - 1
    return np.asarray(np.searchsorted(table.first_document, documents, side="right") - 1)


def _tell_rows(
    severity: Severity, code: str, what: str, why: str, hint: str, *, name: str, table: RowTable, rows: Ints
) -> Finding:
    places = tuple(table.place(int(row)) for row in rows[:_PLACES_SHOWN])
    subject = f"{name}: {len(rows):,} of {table.n_rows:,} rows"
    return Finding(severity, code, f"{subject} {what}", why, hint, len(rows), places)
