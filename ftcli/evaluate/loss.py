"""The loss: the sum of cross entropies over the trained tokens of a batch.

A step divides the sum over all its batches by the number of trained tokens in all of them, so the loss and
its gradient are the same however the step is split.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch.nn import functional

from ftcli.data.batch import IGNORE_LABEL, Batch, build_batch
from ftcli.data.chat import Rendered


def compute_loss_sum(model: Any, batch: Batch) -> torch.Tensor:
    """Σ −log p(label) over the labels of ``batch`` that are learned: a scalar in float32, with its graph.

    The head sees only positions whose next token is learned; logits of the others are never made. No attention
    mask and no cache: then, and only then, attention is block-diagonal over the documents.
    """
    targets = torch.nonzero(batch.labels[0] != IGNORE_LABEL).squeeze(1)
    if _keeps_logits(_unwrap(model)):
        logits = model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            use_cache=False,
            logits_to_keep=targets - 1,
        ).logits[0]
    else:
        logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits[
            0, targets - 1
        ]
    return functional.cross_entropy(logits.float(), batch.labels[0, targets], reduction="sum")


@torch.no_grad()
def compute_mean_loss(
    model: Any,
    documents: Sequence[Rendered],
    *,
    device: torch.device,
    batch_tokens: int,
    check_stop: Callable[[], None] = lambda: None,
) -> float:
    """The mean loss per trained token over ``documents``, in nats; the model is left as it was found.

    Args:
        model: any causal language model.
        documents: what to measure on; batches hold whole documents up to ``batch_tokens``.
        device: where the model lies.
        batch_tokens: an upper bound of tokens in one forward (a longer document goes alone).
        check_stop: called before each batch; may raise to end the work.
    """
    was_training = model.training
    model.eval()
    total, n_targets = 0.0, 0
    group: list[Rendered] = []
    size = 0
    try:
        for document in chain(documents, (None,)):
            if group and (document is None or size + len(document.ids) > batch_tokens):
                check_stop()
                batch = build_batch(group).to(device)
                total += compute_loss_sum(model, batch).item()
                n_targets += batch.n_targets
                group, size = [], 0
            if document is not None:
                group.append(document)
                size += len(document.ids)
    finally:
        model.train(was_training)
    return total / max(1, n_targets)


def _unwrap(model: Any) -> Any:
    while hasattr(model, "module"):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _keeps_logits(model: Any) -> bool:
    return "logits_to_keep" in inspect.signature(type(model).forward).parameters
