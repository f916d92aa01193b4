"""The largest batches of a run, tried before its first step: what does not fit fails now, not in the night."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch

from ftcli.data.batch import build_batch
from ftcli.data.chat import Rendered
from ftcli.data.documents import Documents
from ftcli.evaluate.loss import compute_mean_loss, group_lengths
from ftcli.recipe import Recipe
from ftcli.train.loop import Plan, add_gradients, plan_steps
from ftcli.train.optim import list_trained

Group = tuple[int, ...]


def find_largest(recipe: Recipe, documents: Documents, plan: Plan) -> list[Group]:
    """The micro-batches (indices of documents) that take the most memory: by tokens, then others by logits or length.

    Without packing an epoch may put its longest rows side by side where another does not, so all are looked at;
    packs are as full in one epoch as in the next.
    """
    lengths, targets = np.array(documents.lengths), documents.count_targets()
    batches = list(_list_batches(recipe, documents, plan))
    members = np.fromiter(chain.from_iterable(batches), dtype=np.int64)
    starts = np.concatenate(([0], np.cumsum([len(batch) for batch in batches])[:-1]))
    sizes = (
        np.add.reduceat(lengths[members], starts),
        np.add.reduceat(targets[members], starts),
        np.maximum.reduceat(lengths[members], starts),
    )
    return list(dict.fromkeys(batches[int(size.argmax())] for size in sizes))


def _list_batches(recipe: Recipe, documents: Documents, plan: Plan) -> Iterator[Group]:
    n_left = plan.total_steps
    for epoch, n_steps in enumerate(plan.epoch_steps if not recipe.data.packing else plan.epoch_steps[:1]):
        steps = plan_steps(recipe, documents, epoch=epoch, n_processes=plan.n_processes) if epoch else plan.first_epoch
        yield from chain.from_iterable(steps[:n_left])
        n_left -= n_steps


def rehearse(
    recipe: Recipe,
    largest: Sequence[Sequence[Rendered]],
    held_out: Sequence[Documents],
    model: torch.nn.Module,
    accelerator: Any,
    *,
    plain_model: torch.nn.Module,
    has_moments: bool,
) -> None:
    """Nothing; the largest micro-batches went forward and back, and the largest batch of each held-out set forward.

    The model is left as it was: no step is made and no gradient kept.

    Args:
        recipe: what is trained.
        largest: the documents of each micro-batch to try.
        held_out: documents that evaluation will see.
        model: as it is trained, wrapped.
        accelerator: for device and precision.
        plain_model: as it is evaluated.
        has_moments: the optimizer holds its moments already; else their memory is taken for as long as this lasts.
    """
    moments = [] if has_moments else [torch.zeros_like(p) for _, p in list_trained(plain_model) for _ in range(2)]
    for documents in largest:
        batch = build_batch(documents)
        add_gradients(model, batch, accelerator, 1 / batch.n_targets)
    for parameter in plain_model.parameters():
        parameter.grad = None
    limit = recipe.data.max_length if recipe.puts_documents_together else 1
    for part in held_out:
        lengths = part.lengths
        group = max(group_lengths(lengths, limit), key=lambda chosen: sum(lengths[i] for i in chosen))
        with accelerator.autocast():
            compute_mean_loss(plain_model, [part[i] for i in group], device=accelerator.device, batch_tokens=limit)
    del moments
