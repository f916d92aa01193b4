"""Which documents an epoch sees, and in which steps: functions of seed and epoch alone."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftcli.data.plan import choose_documents, plan_epoch

lengths = st.lists(st.integers(1, 60), min_size=1, max_size=40)


@given(lengths, st.integers(1, 3), st.integers(1, 4), st.integers(0, 3), st.booleans())
def test_every_document_is_in_one_step_of_every_epoch(
    sizes: list[int], rows: int, batches: int, epoch: int, packs: bool
) -> None:
    options = {"seed": 3, "rows_per_batch": rows, "batches_per_step": batches, "pack_tokens": 64 if packs else None}
    steps = plan_epoch(sizes, epoch=epoch, **options)
    assert Counter(i for step in steps for batch in step for i in batch) == Counter(range(len(sizes)))
    assert all(1 <= len(step) <= batches for step in steps)
    assert all(len(step) == batches for step in steps[:-1])
    if packs:
        assert all(sum(sizes[i] for i in batch) <= 64 * rows for step in steps for batch in step)
    else:
        assert all(len(batch) <= rows for step in steps for batch in step)
    assert steps == plan_epoch(sizes, epoch=epoch, **options)


def test_seed_and_epoch_shuffle() -> None:
    sizes = list(range(1, 51))
    options = {"rows_per_batch": 1, "batches_per_step": 1, "pack_tokens": None}
    plans = [plan_epoch(sizes, seed=seed, epoch=epoch, **options) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(plan) for plan in plans}) == 4


@pytest.mark.parametrize("weight", [0.25, 0.5, 1.0, 1.5, 2.0, 2.75])
def test_a_weight_is_how_often_an_epoch_sees_a_document(weight: float) -> None:
    n, n_epochs = 40, 8
    seen: Counter[int] = Counter()
    for epoch in range(n_epochs):
        chosen = choose_documents([weight] * n + [1.0] * 7, seed=5, epoch=epoch)
        counts = Counter(chosen)
        assert all(counts[i] == 1 for i in range(n, n + 7))
        assert sum(counts[i] for i in range(n)) == round(weight * n)
        seen.update(i for i in chosen if i < n)
        assert max(seen[i] for i in range(n)) - min(seen[i] for i in range(n)) <= 1
    assert sum(seen.values()) == round(weight * n) * n_epochs


def test_a_small_weight_of_few_documents_still_sees_one() -> None:
    assert len(choose_documents([0.01, 0.01], seed=0, epoch=0)) == 1
