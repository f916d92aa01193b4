"""RMSNorm with its backward pass by hand: what is kept is the input in its own dtype and one number a row.

    n = x / √(mean(x²) + ε)     y = w n     ∂x = (w g - n mean(n w g)) / √(mean(x²) + ε)     ∂w = Σ g n

transformers' modules keep x in float32 and its scaled copy. One float32 copy is worked on in place: fresh memory for
each step would cost more in page faults than the arithmetic. Source: arXiv 1910.07467; modeling_llama.py and
modeling_gemma.py, whose weights are 1 + w.
"""

from __future__ import annotations

from typing import Any

import torch


def normalize(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
    """``x`` (…, n) over its root mean square, times ``weight`` (n,) + ``offset``; in the dtype of ``x``."""
    return _Normalize.apply(x, weight, eps, offset)  # type: ignore[no-any-return,no-untyped-call]


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
        wide = x.to(torch.float32, copy=True)
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, scale, weight)
        ctx.offset = offset
        return wide.mul_(scale).mul_(_shift(weight, offset)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        x, scale, weight = ctx.saved_tensors
        normed = x.to(torch.float32, copy=True).mul_(scale)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)
        weighted = grad.to(torch.float32, copy=True).mul_(_shift(weight, ctx.offset))
        mean = torch.einsum("...i,...i->...", weighted, normed).unsqueeze(-1).div_(x.shape[-1])
        return weighted.addcmul_(normed, mean, value=-1).mul_(scale).to(x.dtype), grad_weight, None, None


def _shift(weight: torch.Tensor, offset: float) -> torch.Tensor:
    wide = weight.float()
    return wide + offset if offset else wide
