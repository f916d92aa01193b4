"""Packs: nothing lost, nothing over the wall, as full as they can be, the same every time."""

from __future__ import annotations

import doctest
import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftcli.data import packing
from ftcli.data.packing import pack_lengths


@st.composite
def lengths_and_capacity(draw: st.DrawFn) -> tuple[list[int], int]:
    capacity = draw(st.integers(1, 60))
    return draw(st.lists(st.integers(1, capacity), max_size=80)), capacity


def draw_log_normal(n: int, capacity: int) -> list[int]:
    """Lengths with a mean near 197, as conversations have, clipped to the capacity."""
    dice = random.Random(1)
    return [min(capacity, max(1, round(dice.lognormvariate(5.0, 0.75)))) for _ in range(n)]


@given(lengths_and_capacity())
def test_every_index_stands_in_one_pack_within_the_capacity(case: tuple[list[int], int]) -> None:
    lengths, capacity = case
    packs = pack_lengths(lengths, capacity)
    assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in pack) <= capacity for pack in packs)


@given(lengths_and_capacity(), st.randoms())
def test_the_order_of_the_rows_does_not_change_how_full_the_packs_are(
    case: tuple[list[int], int], dice: random.Random
) -> None:
    lengths, capacity = case
    shuffled = lengths.copy()
    dice.shuffle(shuffled)

    def fill(lengths: list[int]) -> list[int]:
        return sorted(sum(lengths[index] for index in pack) for pack in pack_lengths(lengths, capacity))

    assert fill(shuffled) == fill(lengths)


@given(lengths_and_capacity())
def test_matches_best_fit_decreasing_by_plain_search(case: tuple[list[int], int]) -> None:
    lengths, capacity = case
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        tightest = min(fitting, default=None)
        if tightest is not None:
            rooms.remove(tightest)
        rooms.append((capacity if tightest is None else tightest) - length)
    packs = pack_lengths(lengths, capacity)
    assert sorted(capacity - sum(lengths[index] for index in pack) for pack in packs) == sorted(rooms)


@given(lengths_and_capacity())
def test_indices_rise_within_packs_and_packs_by_their_first(case: tuple[list[int], int]) -> None:
    packs = pack_lengths(*case)
    assert all(pack == sorted(pack) for pack in packs)
    assert packs == sorted(packs)


def test_equal_lengths_are_placed_in_the_order_given() -> None:
    assert pack_lengths([5, 5, 5, 5, 5], 10) == [[0, 1], [2, 3], [4]]


def test_log_normal_lengths_fill_the_packs_to_99_5_percent() -> None:
    lengths = draw_log_normal(10_000, 1024)
    assert 190 < sum(lengths) / len(lengths) < 204
    packs = pack_lengths(lengths, 1024)
    assert sum(lengths) / (1024 * len(packs)) >= 0.995


@pytest.mark.parametrize("capacity", [1024, 131_072])
def test_a_hundred_thousand_rows_take_well_under_two_seconds(capacity: int) -> None:
    dice = random.Random(2)
    lengths = (
        draw_log_normal(100_000, capacity) if capacity == 1024 else [dice.randint(1, capacity) for _ in range(100_000)]
    )
    start = time.process_time()
    pack_lengths(lengths, capacity)
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    ("lengths", "message"),
    [([3, 11], "lengths[1] is 11, outside 1 to 10"), ([0], "lengths[0] is 0, outside 1 to 10")],
)
def test_a_length_that_no_pack_can_hold_is_refused(lengths: list[int], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the message is compared in full
        pack_lengths(lengths, 10)
    assert str(caught.value) == message


def test_no_rows_give_no_packs() -> None:
    assert pack_lengths([], 10) == []


def test_the_examples_in_the_docstrings_are_true() -> None:
    result = doctest.testmod(packing)
    assert result.attempted == 1
    assert result.failed == 0
