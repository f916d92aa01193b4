"""Documents to batches: every row once, the right labels, the overflow policy, and a held-out split that holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftcli.data.batch import IGNORE_LABEL, build_batch
from ftcli.data.chat import ChatRenderer, Rendered
from ftcli.data.documents import RowTable, build_table
from ftcli.data.loader import Reading, load_split, split_rows
from ftcli.data.message import Example, Message
from ftcli.data.plan import choose_documents, plan_epoch
from ftcli.errors import ContentError
from ftcli.recipe import DataSection, DatasetSection


def test_a_batch_is_flat_and_its_labels_start_after_each_first_token() -> None:
    first = Rendered([5, 6, 7, 8], [True, False, True, True], "a.jsonl", 1)
    second = Rendered([9, 10], [True, True], "a.jsonl", 4)
    batch = build_batch([first, second])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 10]]
    assert batch.labels.tolist() == [[IGNORE_LABEL, IGNORE_LABEL, 7, 8, IGNORE_LABEL, 10]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1]]
    assert batch.cu_seqlens.tolist() == [0, 4, 6]
    assert (batch.n_targets, batch.n_tokens, batch.places) == (3, 6, ("a.jsonl:1", "a.jsonl:4"))
    assert batch.input_ids.dtype is torch.int64


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=80),
    st.integers(1, 4),
    st.integers(1, 4),
    st.booleans(),
    st.integers(0, 9),
)
def test_every_document_is_seen_once_an_epoch(
    lengths: list[int], rows: int, batches: int, packing: bool, epoch: int
) -> None:
    options = {
        "seed": 3,
        "rows_per_batch": rows,
        "batches_per_step": batches,
        "pack_tokens": 64 if packing else None,
    }
    steps = plan_epoch(lengths, epoch=epoch, **options)
    seen = [index for step in steps for group in step for index in group]
    assert sorted(seen) == list(range(len(lengths)))
    assert all(1 <= len(step) <= batches for step in steps)
    assert all(sum(lengths[i] for i in group) <= 64 * rows for step in steps for group in step) or not packing
    assert steps == plan_epoch(lengths, epoch=epoch, **options)
    assert len(steps) == len(plan_epoch(lengths, epoch=epoch + 1, **options))


def test_epochs_and_seeds_differ_in_order() -> None:
    options = {"rows_per_batch": 1, "batches_per_step": 1, "pack_tokens": None}
    orders = {tuple(plan_epoch([1] * 50, seed=s, epoch=e, **options)) for s in (1, 2) for e in (0, 1)}
    assert len(orders) == 4


def make_table(tokenizer: Any, n: int, same: int = 0) -> RowTable:
    texts = [f"row {i}" for i in range(n)] + ["again"] * same
    examples = [
        Example((Message("user", text), Message("assistant", text)), None, None, "f", line)
        for line, text in enumerate(texts, 1)
    ]
    return build_table(examples, ChatRenderer(tokenizer), "all")


def test_a_split_keeps_equal_rows_on_one_side(tiny_tokenizer: Any) -> None:
    table = make_table(tiny_tokenizer, 200, same=40)
    held_out = split_rows(table, 0.25, seed=1)
    assert not set(table.key[held_out].tolist()) & set(table.key[~held_out].tolist())
    assert len(set(table.key[held_out].tolist())) == round(0.25 * 201)
    assert (split_rows(table, 0.25, seed=1) == held_out).all()
    assert not (split_rows(table, 0.25, seed=2) == held_out).all()
    assert split_rows(make_table(tiny_tokenizer, 30), 7, seed=1).sum() == 7
    with pytest.raises(ContentError, match="leaves one side empty"):
        split_rows(make_table(tiny_tokenizer, 3), 3, seed=1)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([0.3, 0.5, 1.0, 2.0, 2.5]), min_size=1, max_size=40), st.integers(1, 6))
def test_weights_say_how_often_a_document_is_seen(weights: list[float], n_epochs: int) -> None:
    seen = [0] * len(weights)
    for epoch in range(n_epochs):
        chosen = choose_documents(weights, seed=1, epoch=epoch)
        assert chosen == choose_documents(weights, seed=1, epoch=epoch)
        for index in chosen:
            seen[index] += 1
    for weight in set(weights):
        group = [count for count, other in zip(seen, weights, strict=True) if other == weight]
        assert max(group) - min(group) <= 1
        assert sum(group) == n_epochs * max(1, round(weight * len(group)))


@pytest.fixture
def split_long_rows(tmp_path: Path, tiny_tokenizer: Any) -> Any:
    lengths = (1, 60, 2)
    path = tmp_path / "train.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "fox " * n}]} for n in lengths
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def split(overflow: str) -> Any:
        sections = (DatasetSection(path=str(path)),)
        data = DataSection(max_length=32, overflow=overflow)
        return load_split(sections, data, (), Reading(ChatRenderer(tiny_tokenizer)), seed=1).train

    return split


@pytest.mark.parametrize(
    ("overflow", "n_documents", "words"),
    [("drop", 2, "1 of 3 rows are longer"), ("truncate", 3, "and are cut"), ("split", 5, "and are split")],
)
def test_overflow_is_done_and_said(split_long_rows: Any, overflow: str, n_documents: int, words: str) -> None:
    documents = split_long_rows(overflow)
    assert documents.report.n_documents == len(documents.documents) == n_documents
    assert any(words in sentence for sentence in documents.report.describe_losses())
    assert all(len(document.ids) <= 32 for document in documents.documents)


def test_overflow_is_an_error_by_default(split_long_rows: Any) -> None:
    with pytest.raises(ContentError, match=r"1 rows are longer than data\.max_length 32: .*train\.jsonl:2"):
        split_long_rows("error")
