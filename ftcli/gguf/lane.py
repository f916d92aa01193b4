"""Arithmetic that comes out as llama.cpp's does, to the bit, on many groups of values at once.

A group is what shares a scale. The searches hold one in each *column*, so that a step of C's loop over a group is a
step down the rows, and all of it runs along memory:

    values (n_groups, 16 or 32) ─▶ lanes (16 or 32, n_groups)

What has to be kept of C: sums go from the first value to the last, a product is rounded before it is added, and of
equal values the first one counts. Source: ggml/src/ggml-quants.c in ggml-org/llama.cpp.
"""

from __future__ import annotations

import math

import numpy as np
import torch

MOST_ROUNDED = 4194303.0  # up to here the rounding below is that of every other library
_ROUNDER = 12582912.0  # 1.5 * 2**23: what is added to it loses its fraction, ties to even
_MANTISSA, _HALF_MANTISSA = 0x7FFFFF, 0x400000


def turn_to_lanes(values: torch.Tensor, n_lanes: int) -> torch.Tensor:
    """``values`` (any shape) as float32 (n_lanes, n_groups), copied."""
    turned = values.reshape(-1, n_lanes).t()
    return torch.empty(turned.shape, dtype=torch.float32, device=values.device).copy_(turned)


def turn_from_lanes(codes: torch.Tensor, n_per_block: int) -> torch.Tensor:
    """Integers (n_lanes, n_groups) as bytes (n_blocks, n_per_block) in the order of the values."""
    return codes.to(torch.uint8).t().reshape(-1, n_per_block)


def sum_lanes(lanes: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """``out`` (n_groups,), the sum over the rows of ``lanes`` from first to last; torch's own sum takes other orders.

    numpy adds row to row when it reduces the slow axis, which a single group would not make the first one.
    """
    if lanes.device.type == "cpu":
        np.add.reduce(lanes.numpy(), axis=0, out=out.numpy())
        return out
    out.copy_(lanes[0])
    for lane in lanes[1:]:
        out.add_(lane)
    return out


def round_within(values: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """``values`` as int32 between ``low`` and ``high``, in the same memory: ``nearest_int`` of ggml-quants.c.

    Values over `MOST_ROUNDED`, infinities and NaN come out as arbitrarily, and as reliably, as there on x86.
    """
    if values.device.type != "cpu":  # has a NaN of other bits
        values.nan_to_num_(0.0, math.inf, -math.inf)
    bits = values.add_(_ROUNDER).view(torch.int32)
    return bits.bitwise_and_(_MANTISSA).sub_(_HALF_MANTISSA).clamp_(low, high)


def divide(number: float, values: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """``number`` / ``values``, rounded once; torch's own ``number / tensor`` rounds the reciprocal first."""
    return torch.div(torch.full((), number, dtype=torch.float32, device=values.device), values, out=out)


def divide_by(values: torch.Tensor, number: float) -> torch.Tensor:
    """``values`` / ``number``, rounded once on every device; CUDA multiplies by the reciprocal of a plain number."""
    return torch.div(values, torch.full((), number, dtype=torch.float32, device=values.device))


def build_mask(flags: torch.Tensor) -> torch.Tensor:
    """All bits of an int32 where ``flags``, floats, are 1, and none where they are 0; for `overwrite`."""
    return flags.to(torch.int32).neg_()


def overwrite(old: torch.Tensor, new: torch.Tensor, mask: torch.Tensor) -> None:
    """Nothing; ``old`` holds ``new`` where ``mask`` has bits. torch.where branches at each value: 10 times as slow."""
    bits = old.view(torch.int32)
    bits.bitwise_xor_((bits ^ new.view(torch.int32)).bitwise_and_(mask))


def find_extreme(groups: torch.Tensor) -> torch.Tensor:
    """The value of greatest magnitude in each row of ``groups`` (n_groups, n), the first of equals; 0 is never -0."""
    low, high = groups.amin(1), groups.amax(1)  # torch.aminmax takes ten times as long
    extreme = torch.where(high > -low, high, low).add_(0.0)
    if len(ties := ((high == -low) & (high > 0)).nonzero().squeeze(1)):
        tied = groups[ties]
        first = (tied.abs() == high[ties].unsqueeze(1)).to(torch.uint8).argmax(1, keepdim=True)
        extreme[ties] = tied.gather(1, first).squeeze(1)
    return extreme


def split_half(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``values`` as float16 bytes (…, 2), and as the float32 that a reader gets."""
    half = values.to(torch.float16)
    return half.view(torch.uint8).view(*half.shape, 2), half.float()
