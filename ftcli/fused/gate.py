"""The gate of an FFN, SwiGLU or GeGLU: act(gate) · up. Kept are gate and up, not what the activation made of them.

Source: arXiv 2002.05202 §2.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch.nn import functional

Activation = Literal["silu", "gelu_tanh"]


def apply_gate(gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """act(``gate``) · ``up``, of the shape of both."""
    return _Gate.apply(gate, up, activation)  # type: ignore[no-any-return,no-untyped-call]


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return _activate(gate, activation).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        gate, up = ctx.saved_tensors
        grad_up = _activate(gate, ctx.activation).mul_(grad)
        if ctx.activation == "silu":
            return torch.ops.aten.silu_backward(grad * up, gate), grad_up, None
        return torch.ops.aten.gelu_backward(grad * up, gate, approximate="tanh"), grad_up, None


def _activate(gate: torch.Tensor, activation: Activation) -> torch.Tensor:
    return functional.silu(gate) if activation == "silu" else functional.gelu(gate, approximate="tanh")
