"""Lengths to packs: which documents stand side by side in one flat batch.

This module counts; it never sees a token. Documents of a pack do not attend to each other: positions
restart at each wall, and the attention is block-diagonal.

    lengths      0: ███████   1: ██████   2: ████   3: ███       capacity 10

    packed       ███████│███      pack [0, 3]
                 ██████│████      pack [1, 2]

    in rows      ███████│██████   rows [0, 1]    (packing off, two rows at a time: as many
                 ████│███         rows [2, 3]     tokens as the rows have)

How best-fit decreasing finds the packs, longest document first:

    7    ███████···                 a pack; its room left is 3
    6    ███████··· ██████····      6 > 3, so a second pack; rooms 3 and 4
    4    ███████··· ██████████      the tightest room that holds it
    3    ██████████ ██████████
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack_lengths(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Packs of indices into ``lengths``: each index once, no pack longer than ``capacity``.

    Best-fit decreasing: the longest document first, each into the open pack that it leaves fullest, or
    into a new one.

    The number of packs depends on the lengths only, not on their order: packs with equal room are
    interchangeable. Documents of equal length are placed in the order given. Indices rise within a pack
    and packs stand by their first index, so the same lengths always give the same list.

    Cost: O(n log n), and moves within one short list of the distinct rooms left; about 1 µs per document.
    Source: Johnson, Near-optimal bin packing algorithms (1973): for many documents at most 11/9 of the
    fewest packs possible.

    Raises:
        ValueError: a length below 1 or above ``capacity``; overflow is settled before packing.

    >>> pack_lengths([7, 6, 4, 3], 10)
    [[0, 3], [1, 2]]
    """
    for index, length in enumerate(lengths):
        if not 1 <= length <= capacity:
            raise ValueError(f"lengths[{index}] is {length}, outside 1 to {capacity}")
    packs: list[list[int]] = []
    rooms: list[int] = []  # the distinct rooms left in open packs, rising
    open_packs: dict[int, list[list[int]]] = {}  # room left: the packs that have it
    for index in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        length = lengths[index]
        at = bisect_left(rooms, length)
        if at < len(rooms):
            room = rooms[at]
            pack = open_packs[room].pop()
            pack.append(index)
            if not open_packs[room]:
                del open_packs[room], rooms[at]
        else:
            room, pack = capacity, [index]
            packs.append(pack)
        left = room - length
        if left not in open_packs:
            open_packs[left] = []
            insort(rooms, left)
        open_packs[left].append(pack)
    return sorted(sorted(pack) for pack in packs)
