"""What is wrong, or surprising, in rendered rows: each with the rows, the meaning, the remedy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ftcli.data.chat import ChatRenderer
from ftcli.data.documents import Documents, Ints, RowTable
from ftcli.data.finding import Finding, Severity
from ftcli.data.limits import ModelLimits
from ftcli.data.loader import DocumentSet, Part
from ftcli.data.trait import Trait

Rows = Part | DocumentSet  # one side of a run: a name, a table, and flags of the rows that belong to it

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
    Trait.CONTENT_LOST: (
        "warning",
        "content-lost",
        "have text in a question or an answer that the template does not write as it stands",
        "the template cuts or changes it, and so does inference",
        "look at the rows with --row; a </think> in the middle of an answer does that, say",
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
    of_template: Sequence[Finding], parts: Sequence[Rows], renderer: ChatRenderer, limits: ModelLimits
) -> list[Finding]:
    """All that is to be said: of the template, if there are conversations at all, and of the rows.

    Args:
        of_template: what `list_template_findings` says.
        parts: the training set first, then what is held out.
        renderer: tokenizer and template.
        limits: of the model.
    """
    has_chats = any(part.table.n_turns.any() for part in parts)
    findings = [finding for finding in of_template if has_chats or finding.code in _WITHOUT_TEMPLATE]
    for part in parts:
        findings += _check_vocabulary(part, limits)
        findings += _check_traits(part)
        findings += _check_bos(part, renderer)
        findings += _check_targets(part)
        findings += _check_duplicates(part)
    findings += _check_overlap(parts)
    return findings


def find_overflow(part: DocumentSet) -> Iterator[Finding]:
    """A warning if rows are longer than ``max_length``, with what becomes of them."""
    told = next((text for text in part.report.describe_losses() if "max_length" in text), "")
    yield from _tell(
        part,
        part.is_long,
        "warning",
        "overflow",
        told.partition(" rows ")[2],
        "the parts do not see each other"
        if part.report.n_split
        else "what is cut or dropped is not learned, an answer's end among it",
        "raise data.max_length",
    )


def count_stop_tokens(documents: Documents, stop_ids: Sequence[int]) -> int:
    """The trained end-of-turn tokens of ``documents``."""
    table = documents.table
    is_stop = (np.isin(table.ids, stop_ids) & (table.mask > 0)).astype(np.int64)
    total = np.concatenate([[0], np.cumsum(is_stop)])
    return int((total[documents.end] - total[np.minimum(documents.begin + 1, documents.end)]).sum())


def _check_vocabulary(part: Rows, limits: ModelLimits) -> Iterator[Finding]:
    table = part.table
    if limits.embedding_rows is None or not len(table.ids) or int(table.ids.max()) < limits.embedding_rows:
        return
    at = np.flatnonzero(table.ids >= limits.embedding_rows)
    yield from _tell(
        part,
        _flag_rows(table, at),
        "error",
        "vocabulary",
        f"hold tokens that the model has no row for, such as {int(table.ids[at[0]])} "
        f"(its embedding has {limits.embedding_rows} rows)",
        "this tokenizer is not the one of this model",
        "put the model's own tokenizer beside it, or name new tokens in tokenizer.add_tokens",
    )


def _check_traits(part: Rows) -> Iterator[Finding]:
    for trait, words in _TRAITS.items():
        yield from _tell(part, (part.table.traits & int(trait)) > 0, *words)


def _check_bos(part: Rows, renderer: ChatRenderer) -> Iterator[Finding]:
    table, bos = part.table, renderer.tokenizer.bos_token_id
    if bos is None or not len(table.ids):
        return
    first = table.first_token[:-1][np.diff(table.first_token) > 0]
    second = np.minimum(first + 1, len(table.ids) - 1)
    has_bos = table.ids[first] == bos
    twice = has_bos & (table.ids[second] == bos) & ~np.isin(second, first)
    yield from _tell(
        part,
        _flag_rows(table, first[twice]),
        "error",
        "double-bos",
        f"begin with {renderer.tokenizer.bos_token} twice",
        "no model has seen that in its training",
        "let the template write it once, with bos_token",
    )
    if renderer.tokenizer("a").input_ids[:1] == [bos]:
        yield from _tell(
            part,
            _flag_rows(table, first[~has_bos]) & (table.n_turns > 0),
            "warning",
            "no-bos",
            f"begin without {renderer.tokenizer.bos_token}, which this tokenizer puts before every text",
            "the template does not write it, and ftcli adds nothing to a template",
            "begin the template with {{ bos_token }}, if the base model was trained with it",
        )


def _check_targets(part: Rows) -> Iterator[Finding]:
    table = part.table
    total = np.concatenate([[0], np.cumsum(table.mask, dtype=np.int64)])
    borders = table.first_token[table.first_document]
    yield from _tell(
        part,
        total[borders[1:]] == total[borders[:-1]],
        "warning",
        "no-target",
        "have no token to train on and are left out",
        "none of their turns is chosen by train_on, or each says train: false",
        "check datasets[].train_on and the rows' roles",
    )


def _check_duplicates(part: Rows) -> Iterator[Finding]:
    chosen = np.flatnonzero(part.rows)
    _, first = np.unique(part.table.key[chosen], return_index=True)
    again = part.rows.copy()
    again[chosen[first]] = False
    yield from _tell(
        part,
        again,
        "warning",
        "duplicates",
        "stand in the data before",
        "what is repeated is learned more strongly",
        "remove them, or repeat on purpose with datasets[].weight",
    )


def _check_overlap(parts: Sequence[Rows]) -> Iterator[Finding]:
    train, *held_out = parts
    known = train.table.key[train.rows]
    for part in held_out:
        yield from _tell(
            part,
            np.isin(part.table.key, known),
            "warning",
            "overlap",
            "are trained on too",
            "a score on rows that were learned says nothing about new ones",
            "remove them from one side, or use data.val_set_size, which keeps equal rows together",
        )


def _flag_rows(table: RowTable, tokens: Ints) -> Ints:
    """A flag for each row, set where one of ``tokens`` (indices into ``ids``) lies in it."""
    documents = np.searchsorted(table.first_token, tokens, side="right") - 1
    flags = np.zeros(table.n_rows, dtype=bool)
    flags[np.searchsorted(table.first_document, documents, side="right") - 1] = True
    return flags


def _tell(part: Rows, found: Ints, severity: Severity, code: str, what: str, why: str, hint: str) -> Iterator[Finding]:
    """One finding for the rows of ``part`` that ``found`` flags, if there are any."""
    rows = np.flatnonzero(found & part.rows)
    if len(rows):
        places = tuple(part.table.place(int(row)) for row in rows[:_PLACES_SHOWN])
        subject = f"{part.name}: {len(rows):,} of {int(part.rows.sum()):,} rows"
        yield Finding(severity, code, f"{subject} {what}", why, hint, len(rows), places)
