"""Documents → the optimizer steps of an epoch: which stand side by side, and in which order.

    documents ─▶ order (weights, shuffled) ─▶ packs ─▶ batches ─▶ steps

Everything follows from seed and epoch alone, never from random state, so a resumed run sees the same data.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from ftcli.data.collector import paused_collector
from ftcli.data.packing import pack_lengths

Step = tuple[tuple[int, ...], ...]


@paused_collector()
def plan_epoch(
    lengths: Sequence[int],
    *,
    seed: int,
    epoch: int,
    rows_per_batch: int,
    batches_per_step: int,
    pack_tokens: int | None,
    weights: Sequence[float] | None = None,
) -> list[Step]:
    """The optimizer steps of one epoch: each a tuple of micro-batches, each a tuple of document indices.

    Every document appears as often as its weight says. Without weights the number of steps is the same in every
    epoch; where a fraction of the documents is packed, packs and so steps may be some more or fewer.

    Args:
        lengths: tokens of each document.
        seed: the run's seed.
        epoch: counted from 0.
        rows_per_batch: documents (or packs) side by side in one micro-batch.
        batches_per_step: micro-batches of one optimizer step, over all processes.
        pack_tokens: capacity of a pack, or None for one document a row.
        weights: how often an epoch sees each document; None is once.
    """
    order = choose_documents(weights or [1.0] * len(lengths), seed=seed, epoch=epoch)
    shuffler = random.Random(f"{seed}:{epoch}")
    shuffler.shuffle(order)
    if pack_tokens is None:
        rows = [[index] for index in order]
    else:
        packs = pack_lengths([lengths[index] for index in order], pack_tokens)
        rows = [[order[position] for position in pack] for pack in packs]
        shuffler.shuffle(rows)
    batches = [
        tuple(index for row in rows[i : i + rows_per_batch] for index in row)
        for i in range(0, len(rows), rows_per_batch)
    ]
    n_steps = math.ceil(len(batches) / batches_per_step)
    return [tuple(batches[i * batches_per_step : (i + 1) * batches_per_step]) for i in range(n_steps)]


def choose_documents(weights: Sequence[float], *, seed: int, epoch: int) -> list[int]:
    """The indices that an epoch sees, each as often as its weight says.

    A weight of 2.5 is twice and another half in each epoch: documents of one weight are dealt out from endless
    shuffles of all of them, so after any number of epochs none has been seen twice more often than another.
    """
    members: dict[float, list[int]] = {}
    for index, weight in enumerate(weights):
        members.setdefault(weight, []).append(index)
    chosen: list[int] = []
    for weight, group in members.items():
        n_seen = max(1, round(weight * len(group)))
        first, last = epoch * n_seen, (epoch + 1) * n_seen
        for deal in range(first // len(group), -(-last // len(group))):
            shuffled = list(group)
            if weight != 1:
                random.Random(f"{seed}:{weight}:{deal}").shuffle(shuffled)
            start = deal * len(group)
            chosen += shuffled[max(0, first - start) : last - start]
    return chosen
