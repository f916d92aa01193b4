"""Whether tokenizer, chat template and model fit together, before a single row is looked at."""

from __future__ import annotations

import json
from collections.abc import Iterator

from ftcli.data.chat import ChatRenderer
from ftcli.data.finding import Finding
from ftcli.data.limits import ModelLimits
from ftcli.errors import ContentError


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
    lacking = list(_check_control_tokens(renderer, is_chosen=is_chosen))
    return [
        *(lacking or _check_stop_tokens(renderer, limits)),
        *_check_size(renderer, limits, max_length),
        *_check_date(renderer),
    ]


def _check_control_tokens(renderer: ChatRenderer, *, is_chosen: bool) -> Iterator[Finding]:
    vocabulary = renderer.tokenizer.get_vocab()
    missing = [token for token in renderer.template.list_control_tokens(strict=is_chosen) if token not in vocabulary]
    if missing and not is_chosen:  # a model's own template may know tokens of its larger siblings
        sample = renderer.template.render_sample()
        missing = [token for token in missing if token in sample]
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
