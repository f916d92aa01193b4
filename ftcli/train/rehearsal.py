"""The largest batches of a run, tried before its first step: what does not fit fails now, not in the night."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ftcli.data.batch import build_batch
from ftcli.data.documents import Documents
from ftcli.evaluate.loss import compute_loss_sum, compute_mean_loss, group_lengths
from ftcli.recipe import Recipe
from ftcli.train.loop import Plan, plan_steps
from ftcli.train.optim import list_trained

Group = tuple[int, ...]


def find_largest(recipe: Recipe, documents: Documents, plan: Plan) -> list[Group]:
    """The micro-batches (indices of documents) that take the most memory: by tokens, then others by logits or length.

    Without packing an epoch may put its longest rows side by side where another does not, so all are looked at;
    packs are as full in one epoch as in the next.
    """
    lengths, targets = documents.lengths, documents.count_targets().tolist()
    measures: tuple[Callable[[Group], int], ...] = (
        lambda group: sum(lengths[i] for i in group),
        lambda group: sum(targets[i] for i in group),
        lambda group: max(lengths[i] for i in group),
    )
    best: list[Group] = [()] * len(measures)
    sizes = [-1] * len(measures)
    for group in _list_batches(recipe, documents, plan):
        for k, measure in enumerate(measures):
            if (size := measure(group)) > sizes[k]:
                best[k], sizes[k] = group, size
    return list(dict.fromkeys(best))


def _list_batches(recipe: Recipe, documents: Documents, plan: Plan) -> Iterator[Group]:
    n_left = plan.total_steps
    for epoch, n_steps in enumerate(plan.epoch_steps if not recipe.data.packing else plan.epoch_steps[:1]):
        steps = plan_steps(recipe, documents, epoch=epoch) if epoch else plan.first_epoch
        yield from (batch for step in steps[:n_left] for batch in step)
        n_left -= n_steps


def rehearse(
    recipe: Recipe,
    documents: Documents,
    plan: Plan,
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
        documents: to train on.
        plan: its steps.
        held_out: documents that evaluation will see.
        model: as it is trained, wrapped.
        accelerator: for device and precision.
        plain_model: as it is evaluated.
        has_moments: the optimizer holds its moments already; else their memory is taken for as long as this lasts.
    """
    moments = [] if has_moments else [torch.zeros_like(p) for _, p in list_trained(plain_model) for _ in range(2)]
    for group in find_largest(recipe, documents, plan):
        batch = build_batch([documents[i] for i in group])
        loss = compute_loss_sum(model, batch.to(accelerator.device))
        accelerator.backward(loss / batch.n_targets)
    for parameter in plain_model.parameters():
        parameter.grad = None
    limit = recipe.data.max_length if recipe.puts_documents_together else 1
    for part in held_out:
        lengths = part.lengths
        group = max(group_lengths(lengths, limit), key=lambda chosen: sum(lengths[i] for i in chosen))
        with accelerator.autocast():
            compute_mean_loss(plain_model, [part[i] for i in group], device=accelerator.device, batch_tokens=limit)
    del moments
