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
from torch.autograd.function import once_differentiable
from torch.nn import functional

from ftcli.data.batch import IGNORE_LABEL, Batch, build_batch
from ftcli.data.chat import Rendered

_LOGITS_AT_A_TIME = 1 << 22  # 16 MiB in float32: small beside any head, large enough for a kernel
_SUM = 2  # at::Reduction::Sum


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
    return sum_cross_entropy(logits, batch.labels[0, targets])


def sum_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """``cross_entropy(logits.float(), targets, reduction="sum")`` to the bit, in a third to a half of its memory.

    Autograd holds log-softmax, the gradient of the picked values and the gradient of log-softmax side by side: 12
    bytes for each logit. Here the same operators make the gradient some rows at a time, and in float32 it takes the
    place of the log-softmax: 6 bytes for each 16-bit logit, 8 in float32. One backward pass, no second derivative.

    Shapes: ``logits`` (N, vocabulary), ``targets`` (N,), none of which is ignored.
    """
    loss: torch.Tensor = _CrossEntropySum.apply(logits, targets)  # type: ignore[no-untyped-call]
    return loss


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


class _CrossEntropySum(torch.autograd.Function):
    """What ``sum_cross_entropy`` says, as an operator of autograd's."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        own = logits.float()
        is_copy = own is not logits
        log_p = torch.log_softmax(own, 1, out=own) if is_copy else torch.log_softmax(own, 1)
        ctx.save_for_backward(log_p, targets)
        ctx.dtype = logits.dtype
        return functional.nll_loss(log_p, targets, reduction="sum")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[torch.Tensor, None]:
        log_p, targets = ctx.saved_tensors
        grad = log_p if ctx.dtype is torch.float32 else torch.empty_like(log_p, dtype=ctx.dtype)
        n_rows = max(1, _LOGITS_AT_A_TIME // log_p.shape[1])
        weight = torch.zeros_like(grad_loss)  # of all targets; a sum is not divided by it
        for start in range(0, len(targets), n_rows):
            rows, wanted = log_p[start : start + n_rows], targets[start : start + n_rows]
            picked = torch.ops.aten.nll_loss_backward(grad_loss, rows, wanted, None, _SUM, IGNORE_LABEL, weight)
            grad[start : start + n_rows] = torch.ops.aten._log_softmax_backward_data(picked, rows, 1, torch.float32)
        return grad, None


def _unwrap(model: Any) -> Any:
    while hasattr(model, "module"):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _keeps_logits(model: Any) -> bool:
    return "logits_to_keep" in inspect.signature(type(model).forward).parameters
