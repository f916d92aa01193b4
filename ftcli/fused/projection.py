"""Linear layers that share one input, frozen and with LoRA, their backward pass by hand.

    y = x Wᵀ + b + s (x Aᵀ) Bᵀ                       x (T, in), W (out, in), A (r, in), B (out, r)
    ∂x = g W + (s g B) A     ∂A = (s g B)ᵀ x     ∂B = s gᵀ (x Aᵀ)

W is 16-bit, float32 or NF4, which is dequantised where it is multiplied and never kept. What is kept for the
backward pass is x once for all layers, and x Aᵀ. PEFT's own layers keep x in float32 for each of them. The
parameters stay PEFT's; A and B are multiplied in the dtype of x, as under autocast.

Source: LoRA arXiv 2106.09685 §4; PEFT's tuners/lora/layer.py, ``Linear.forward``; QLoRA arXiv 2305.14314 §3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional


@dataclass(frozen=True)
class Projection:
    """A frozen linear layer, and the LoRA on it: factors ``a`` and ``b``, or None without."""

    base: Any
    a: nn.Parameter | None = None
    b: nn.Parameter | None = None
    scaling: float = 1.0
    dropout: float = 0.0

    def load_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight (out, in) in ``dtype``, dequantised if it is packed."""
        weight, state = self.base.weight, find_packing(self.base)
        if state is None:
            return weight.to(dtype)  # type: ignore[no-any-return]
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, state).to(dtype)  # type: ignore[no-any-return]


def find_packing(layer: Any) -> Any:
    """How bitsandbytes packed the weight of ``layer``; None if it did not.

    The weight knows it, or where processes divide it, the layer alone.
    """
    return getattr(layer.weight, "quant_state", None) or getattr(layer, "quant_state", None)


def read_projection(module: nn.Module) -> Projection | None:
    """What ``module`` computes, if it is a frozen linear layer, bare or with one plain LoRA; else None.

    DoRA and other variants, merged or disabled adapters, several adapters, trained weights and Conv1D are not
    covered: such a module is called as it is.
    """
    from peft.tuners.lora import LoraLayer

    if not isinstance(module, LoraLayer):
        return Projection(module) if _is_frozen_linear(module) else None
    base = module.get_base_layer()
    if not _is_frozen_linear(base) or module.merged or getattr(module, "fan_in_fan_out", False):
        return None
    if module.disable_adapters:
        return Projection(base)
    names = [name for name in module.active_adapters if name in module.lora_A]
    if len(names) != 1 or module.lora_variant or module.lora_bias.get(names[0], False):
        return None
    (name,) = names
    rate = getattr(module.lora_dropout[name], "p", 0.0) if module.training else 0.0
    return Projection(base, module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name], rate)


def project(x: torch.Tensor, modules: Sequence[nn.Module]) -> list[torch.Tensor]:
    """What each of ``modules`` makes of ``x`` (…, in): together where they are covered, else each by itself."""
    projections = [read_projection(module) for module in modules]
    covered = [projection for projection in projections if projection]
    factors, narrow = list_factors(covered), follow_autocast(x)
    outputs = iter(_Project.apply(narrow, covered, *factors) if covered else ())  # type: ignore[no-untyped-call]
    return [next(outputs) if p else module(x) for p, module in zip(projections, modules, strict=True)]


def project_last(x: torch.Tensor, module: nn.Module) -> torch.Tensor:
    """What ``module``, the last of a block, makes of ``x``: as ``project``, in two parts.

    Checkpointing stops to compute a block again once it has all that the block kept. Here x is kept by x Aᵀ, and the
    large product after it keeps nothing, so it is never made again.
    """
    projection = read_projection(module)
    if projection is None:
        return module(x)  # type: ignore[no-any-return]
    x = follow_autocast(x)
    if projection.a is None:
        return _Expand.apply(x, None, None, projection)  # type: ignore[no-any-return,no-untyped-call]
    hidden = _Shrink.apply(x, projection.a, projection)  # type: ignore[no-untyped-call]
    return _Expand.apply(x, hidden, projection.b, projection)  # type: ignore[no-any-return,no-untyped-call]


class _Shrink(torch.autograd.Function):
    """x Aᵀ."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, a: torch.Tensor, projection: Projection) -> torch.Tensor:
        mask = _draw_mask(x, projection.dropout) if projection.dropout else None
        ctx.save_for_backward(x, mask)
        ctx.projection = projection
        return _drop(x, mask, projection.dropout) @ a.to(x.dtype).T

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        x, mask = ctx.saved_tensors
        a, rate = ctx.projection.a, ctx.projection.dropout
        dropped = _drop(x, mask, rate).flatten(0, -2)
        grad_x = _drop(grad @ a.to(grad.dtype), mask, rate) if ctx.needs_input_grad[0] else None
        return grad_x, (grad.flatten(0, -2).T @ dropped).to(a.dtype), None


class _Expand(torch.autograd.Function):
    """x Wᵀ + b + s (x Aᵀ) Bᵀ, of which x Aᵀ is given; it stays with the node, small as it is, and nothing else does."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, hidden: torch.Tensor | None, b: torch.Tensor | None, projection: Projection
    ) -> torch.Tensor:
        ctx.hidden, ctx.projection = hidden, projection
        bias = projection.base.bias
        bias = bias if bias is None else bias.to(x.dtype)
        output = functional.linear(x, projection.load_weight(x.dtype), bias)
        if hidden is not None and b is not None:
            flat = output.view(-1, output.shape[-1])
            flat.addmm_(hidden.flatten(0, -2), b.to(x.dtype).T, alpha=projection.scaling)
        return output

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        projection, hidden = ctx.projection, ctx.hidden
        grad_x = grad @ projection.load_weight(grad.dtype) if ctx.needs_input_grad[0] else None
        if hidden is None:
            return grad_x, None, None, None
        grad_hidden = (grad @ projection.b.to(grad.dtype)).mul_(projection.scaling)
        grad_b = (hidden.flatten(0, -2).T @ grad.flatten(0, -2)).mul_(projection.scaling).T.to(projection.b.dtype)
        return grad_x, grad_hidden, grad_b, None


def follow_autocast(x: torch.Tensor) -> torch.Tensor:
    """``x`` in the dtype that autocast, where it is on, would have a product of it in."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def list_factors(projections: Sequence[Projection]) -> list[torch.Tensor]:
    """A and B of each that has LoRA, in order: what a backward pass has gradients for."""
    return [factor for p in projections for factor in (p.a, p.b) if factor is not None]


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, projections: list[Projection], *factors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        flat = x.reshape(-1, x.shape[-1])
        outputs, hidden, masks = multiply(flat, projections)
        ctx.save_for_backward(flat if hidden else None, *hidden, *masks)
        ctx.projections, ctx.n_hidden = projections, len(hidden)
        return tuple(output.view(*x.shape[:-1], -1) for output in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        flat, *rest = ctx.saved_tensors
        hidden, masks = rest[: ctx.n_hidden], rest[ctx.n_hidden :]
        flat_grads = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        grad_x, grad_factors = multiply_back(
            flat_grads, flat, ctx.projections, hidden, masks, needs_x=ctx.needs_input_grad[0]
        )
        shaped = None if grad_x is None else grad_x.view(*grads[0].shape[:-1], -1)
        return shaped, None, *grad_factors


def multiply(
    x: torch.Tensor, projections: Sequence[Projection]
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Outputs (T, out) of ``projections`` for ``x`` (T, in), and of those with LoRA: x Aᵀ (T, r), and dropout masks."""
    adapted = [p for p in projections if p.a is not None]
    masks = [_draw_mask(x, p.dropout) for p in adapted if p.dropout]
    hidden = _shrink(x, adapted, masks)
    left = iter(hidden)
    outputs = []
    for p in projections:
        weight, bias = p.load_weight(x.dtype), p.base.bias
        output = x @ weight.T if bias is None else torch.addmm(bias.to(x.dtype), x, weight.T)
        if p.b is not None:
            output.addmm_(next(left), p.b.to(x.dtype).T, alpha=p.scaling)
        outputs.append(output)
    return outputs, hidden, masks


def multiply_back(
    grads: Sequence[torch.Tensor],
    x: torch.Tensor | None,
    projections: Sequence[Projection],
    hidden: Sequence[torch.Tensor],
    masks: Sequence[torch.Tensor],
    *,
    needs_x: bool = True,
) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    """The gradient of ``x`` (None unless ``needs_x``), and those of the factors as ``list_factors`` orders them.

    ``x`` itself may be None where no projection has LoRA.
    """
    grad_x: torch.Tensor | None = None
    grad_factors: list[torch.Tensor] = []
    left, noise = iter(hidden), iter(masks)
    for grad, p in zip(grads, projections, strict=True):
        if needs_x:
            weight = p.load_weight(grad.dtype)
            grad_x = grad @ weight if grad_x is None else grad_x.addmm_(grad, weight)
        if x is None or p.a is None or p.b is None:
            continue
        mask = next(noise) if p.dropout else None
        a, b = p.a.to(grad.dtype), p.b.to(grad.dtype)
        grad_hidden = (grad @ b).mul_(p.scaling)
        dropped = _drop(x, mask, p.dropout)
        grad_factors.append((grad_hidden.T @ dropped).to(p.a.dtype))
        # as (r, out): what is turned round for the product is the small factor, not the gradient
        grad_factors.append((next(left).T @ grad).mul_(p.scaling).T.to(p.b.dtype))
        if grad_x is not None:
            grad_x = grad_x.addmm_(grad_hidden, a) if mask is None else grad_x + _drop(grad_hidden @ a, mask, p.dropout)
    return grad_x, grad_factors


def _shrink(x: torch.Tensor, adapted: Sequence[Projection], masks: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """x Aᵀ of each, in one product over all factors where no dropout tells their inputs apart."""
    factors = [p.a.to(x.dtype) for p in adapted if p.a is not None]
    if not masks:
        return list(torch.split(x @ torch.cat(factors).T, [len(a) for a in factors], dim=1)) if factors else []
    noise = iter(masks)
    return [(_drop(x, next(noise), p.dropout) if p.dropout else x) @ a.T for p, a in zip(adapted, factors, strict=True)]


def _draw_mask(x: torch.Tensor, rate: float) -> torch.Tensor:
    """Where ``x`` stays, drawn as ``nn.Dropout`` draws on the CPU, kept in a byte each."""
    return torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - rate)


def _drop(x: torch.Tensor, mask: torch.Tensor | None, rate: float) -> torch.Tensor:
    return x if mask is None else (x * mask).div_(1 - rate)


def _is_frozen_linear(module: nn.Module) -> bool:
    """A linear layer that is not trained, 4-bit or plain; subclasses of other libraries are not known."""
    if any(p.requires_grad for p in module.parameters()):
        return False
    if type(module).__name__ == "Linear4bit":
        return find_packing(module) is not None
    return type(module) is nn.Linear
