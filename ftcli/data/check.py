"""What is wrong, or surprising, in rows, tokenizer and template together: each with the rows, the meaning, the remedy.

error     what would be learned is not what the rows say: `train` stops before the model is loaded
warning   something is lost or doubled
note      ftcli dealt with it, and says how
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ftcli.data.chat import ChatRenderer
from ftcli.data.documents import Documents, Ints, RowTable
from ftcli.data.limits import ModelLimits
from ftcli.data.loader import DocumentSet
from ftcli.data.trait import Trait
from ftcli.errors import ContentError

Severity = Literal["error", "warning", "note"]
_PLACES_SHOWN = 5

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


@dataclass(frozen=True)
class Finding:
    """One thing found; ``places`` are the first rows, of ``n_rows`` in all (0: not a matter of rows)."""

    severity: Severity
    code: str
    what: str
    why: str = ""
    hint: str = ""
    n_rows: int = 0
    places: tuple[str, ...] = ()


def check_findings(findings: Sequence[Finding]) -> None:
    """None if there is no error among ``findings``.

    Raises:
        ContentError: all errors at once.
    """
    errors = [finding for finding in findings if finding.severity == "error"]
    if errors:
        lines = [finding.what for finding in errors]
        hints = dict.fromkeys(finding.hint for finding in errors if finding.hint)
        where = errors[0].places[0] if errors[0].places else ""
        raise ContentError("\n".join(lines), where=where, why=errors[0].why, hint="; ".join(hints))


def list_template_findings(
    renderer: ChatRenderer, limits: ModelLimits, *, is_chosen: bool, max_length: int | None
) -> list[Finding]:
    """What is to be said of tokenizer and template before a single row.

    Args:
        renderer: both of them.
        limits: of the model.
        is_chosen: whether the recipe names a template, instead of taking the model's own.
        max_length: the recipe's, None where there is no recipe.
    """
    return [
        *_check_control_tokens(renderer, is_chosen=is_chosen),
        *_check_stop_tokens(renderer, limits),
        *_check_size(renderer, limits, max_length),
        *_check_date(renderer),
    ]


def list_row_findings(
    parts: Sequence[tuple[str, RowTable, Ints]], renderer: ChatRenderer, limits: ModelLimits
) -> list[Finding]:
    """What is to be said of the rows: ``parts`` are (name, table, flags of its rows), the training set first."""
    findings: list[Finding] = []
    for name, table, rows in parts:
        findings += _check_vocabulary(name, table, limits)
        findings += _check_traits(name, table, rows)
        findings += _check_bos(name, table, renderer)
        findings += _check_targets(name, table, rows)
        findings += _check_duplicates(name, table, rows)
    findings += _check_overlap(parts)
    return findings


def count_stop_tokens(documents: Documents, stop_ids: Sequence[int]) -> int:
    """The trained end-of-turn tokens of ``documents``."""
    table = documents.table
    is_stop = (np.isin(table.ids, stop_ids) & (table.mask > 0)).astype(np.int64)
    total = np.concatenate([[0], np.cumsum(is_stop)])
    return int((total[documents.end] - total[np.minimum(documents.begin + 1, documents.end)]).sum())


def describe_loss(part: DocumentSet) -> list[str]:
    """A sentence for each kind of row that is not trained on as it was written."""
    return [f"{part.name}: {sentence}" for sentence in part.report.describe_losses()]


def _check_control_tokens(renderer: ChatRenderer, *, is_chosen: bool) -> Iterator[Finding]:
    vocabulary = renderer.tokenizer.get_vocab()
    wanted = renderer.template.list_control_tokens(strict=is_chosen)
    missing = [token for token in wanted if token not in vocabulary]
    if missing:
        yield Finding(
            "error",
            "template-tokens",
            f"the vocabulary lacks {len(missing)} of the tokens that the chat template writes: {', '.join(missing)}",
            "each would be spelled out in several tokens, which the model never learned as a mark",
            f"add them: tokenizer.add_tokens: {json.dumps(missing, ensure_ascii=False)}; "
            "or choose a template of this model's family",
        )


def _check_stop_tokens(renderer: ChatRenderer, limits: ModelLimits) -> Iterator[Finding]:
    if not renderer.template.source:
        return
    try:
        texts, ids = renderer.find_turn_ends(), renderer.end_of_turn_ids
    except ContentError as error:
        yield Finding("error", "stop-token", error.what, error.why, error.hint)
        return
    tokenizer = renderer.tokenizer
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ids:
        yield Finding(
            "note",
            "eos",
            f"the template ends a turn with {texts[0]}, the tokenizer's end of sequence is {tokenizer.eos_token}",
            "a runtime that stops at the latter alone would never stop",
            f"what is saved names {texts[0]}",
        )
    if limits.eos_ids and not set(ids) & set(limits.eos_ids):
        known = ", ".join(tokenizer.convert_ids_to_tokens(list(limits.eos_ids)))
        yield Finding(
            "note",
            "generation-eos",
            f"the template ends a turn with {texts[0]}, the model's generation_config stops at {known}",
            "a model trained on this would not stop where its turns end",
            f"what is saved adds {texts[0]}",
        )


def _check_size(renderer: ChatRenderer, limits: ModelLimits, max_length: int | None) -> Iterator[Finding]:
    n_entries = max(renderer.tokenizer.get_vocab().values(), default=-1) + 1
    if limits.embedding_rows is not None and n_entries > limits.embedding_rows:
        yield Finding(
            "warning",
            "vocabulary-size",
            f"the tokenizer has {n_entries:,} entries, the model's embedding {limits.embedding_rows:,} rows",
            "a token without a row cannot be looked up; rows of data that hold one are errors",
            "name new tokens in tokenizer.add_tokens, which makes the embedding larger",
        )
    if max_length is not None and limits.context is not None and max_length > limits.context:
        yield Finding(
            "error",
            "context",
            f"data.max_length is {max_length:,}, the model's context {limits.context:,} tokens",
            "positions beyond it were never trained",
            f"set data.max_length to {limits.context}; only a model whose config.json says so (rope_parameters "
            "and max_position_embeddings) reaches further",
        )


def _check_date(renderer: ChatRenderer) -> Iterator[Finding]:
    if renderer.template.is_dated:
        yield Finding(
            "note",
            "dated",
            f"the chat template writes the date, which is {renderer.template.date:%d %b %Y} for the whole run",
            "on another day the same rows would be other tokens",
            "the manifest records it, and a resumed run keeps it",
        )


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
