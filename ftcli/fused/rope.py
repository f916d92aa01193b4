"""Rotary positions: pairs of a head's numbers are turned by an angle that grows with the position.

    (x₁, x₂) → (x₁ cos - x₂ sin, x₂ cos + x₁ sin)     the backward pass turns the gradient back

x₁ and x₂ are the halves of a head's rotated part; what lies beyond it (Phi-3's partial rotation) stays as it is.
Source: arXiv 2104.09864 §3.4; ``apply_rotary_pos_emb`` in modeling_llama.py.
"""

from __future__ import annotations

from typing import Any

import torch


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """``x`` (T, heads, head_dim) turned by the angles of ``cos`` and ``sin`` (T, rotated), halves alike."""
    return _Rotate.apply(x, cos, sin)  # type: ignore[no-any-return,no-untyped-call]


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, sin, -1), None, None


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, direction: int) -> torch.Tensor:
    half = cos.shape[-1] // 2
    cos, sin = cos[:, None, :half], sin[:, None, :half]
    first, second = x[..., :half], x[..., half : 2 * half]
    turned = torch.empty_like(x)
    torch.mul(first, cos, out=turned[..., :half]).addcmul_(second, sin, value=-direction)
    torch.mul(second, cos, out=turned[..., half : 2 * half]).addcmul_(first, sin, value=direction)
    turned[..., 2 * half :] = x[..., 2 * half :]
    return turned
