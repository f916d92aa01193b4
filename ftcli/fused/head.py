"""The loss of the labelled rows without their logits: in chunks, the gradient made while the logits are there.

    logits = h Wᵀ     loss = logsumexp(logits) - logits[label]     ∂h = (softmax(logits) - onehot(label)) W

As the head is frozen, ∂h is all that the backward pass needs: two products instead of three, and no logits kept.
Softmax and loss are in float32. Source: Cut Your Losses, arXiv 2411.09009 §2; Gemma 2's soft cap 2408.00118 §2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ftcli.fused.projection import follow_autocast
from ftcli.model.forecast import HEAD_BLOCK_BYTES, HEAD_ROWS


def compute_losses(
    hidden: torch.Tensor, head: nn.Linear, labels: torch.Tensor, softcap: float | None = None
) -> torch.Tensor:
    """-log p(label) of each row in float32, shape (rows,); with a gradient for ``hidden`` alone.

    Args:
        hidden: (rows, width), what the head would be given.
        head: its frozen weight is (vocabulary, width).
        labels: ids, (rows,).
        softcap: logits z become c tanh(z / c).
    """
    hidden = follow_autocast(hidden)
    weight = head.weight.to(hidden.dtype)
    return _Losses.apply(hidden, weight, head.bias, labels, softcap)  # type: ignore[no-any-return,no-untyped-call]


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        softcap: float | None,
    ) -> torch.Tensor:
        needs_grad = ctx.needs_input_grad[0]
        losses = torch.empty(len(hidden), device=hidden.device)
        grad = torch.empty_like(hidden) if needs_grad else None
        n_block = max(1, HEAD_BLOCK_BYTES // (4 * len(weight))) if hidden.device.type == "cpu" else HEAD_ROWS
        buffer = hidden.new_empty(min(len(hidden), HEAD_ROWS), len(weight))
        for start in range(0, len(hidden), HEAD_ROWS):
            part = slice(start, start + HEAD_ROWS)
            logits = buffer[: len(hidden[part])]
            torch.mm(hidden[part], weight.T, out=logits)
            if bias is not None:
                logits += bias
            blocks = (torch.split(x, n_block) for x in (logits, labels[part], losses[part]))
            for rows, ids, out in zip(*blocks, strict=True):
                slopes = _measure_rows(rows, ids, out, softcap)
                if grad is not None:
                    rows.copy_(slopes)
            if grad is not None:
                torch.mm(logits, weight, out=grad[part])
        ctx.save_for_backward(grad)
        return losses

    @staticmethod
    def backward(ctx: Any, grad_losses: torch.Tensor) -> tuple[Any, ...]:
        (grad,) = ctx.saved_tensors
        grad_hidden = torch.empty_like(grad)
        parts = (torch.split(x, HEAD_ROWS) for x in (grad_hidden, grad, grad_losses))
        for out, rows, slopes in zip(*parts, strict=True):
            out.copy_(rows * slopes[:, None])  # in float32: 1 / n in bfloat16 is off by up to 0.4 %, for all rows alike
        return grad_hidden, None, None, None, None


def _measure_rows(
    logits: torch.Tensor, labels: torch.Tensor, losses: torch.Tensor, softcap: float | None
) -> torch.Tensor:
    """The gradient of each row's loss by its logits, in float32; the losses are written into ``losses``."""
    wide = logits.float()
    if softcap:
        capped = torch.tanh(wide / softcap)
        wide = capped * softcap
    wide = wide.log_softmax(-1)
    places = labels[:, None]
    losses.copy_(wide.gather(1, places)[:, 0].neg_())
    slopes = wide.exp_()
    slopes.scatter_add_(1, places, torch.full_like(places, -1, dtype=torch.float32))
    return slopes.mul_(1 - capped.square_()) if softcap else slopes
