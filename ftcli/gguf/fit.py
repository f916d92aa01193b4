"""The searches for the scale of a group, as llama.cpp makes them where no importance matrix is given.

    fit_scale_and_minimum   x ≈ scale * q + minimum    Q2_K, Q4_K, Q5_K   ``make_qkx2_quants``
    fit_scale               x ≈ scale * q              Q6_K               ``make_qx_quants``
    descend                 x ≈ scale * q              Q3_K               ``make_q3_quants``

Each takes lanes (n, n_groups), see `ftcli.gguf.lane`, and looks for the least weighted error. The order of every sum
and product is that of ggml/src/ggml-quants.c in ggml-org/llama.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ftcli.gguf.lane import MOST_ROUNDED, build_mask, divide, overwrite, round_within, sum_lanes

LEAST_MAGNITUDE = 1e-15  # GROUP_MAX_EPS: a group below it counts as zero
_N_DESCENTS = 5
_EACH = 0  # aten's number for a loss that is not added up


@dataclass(frozen=True)
class Search:
    """Codes 0 … ``top``; the inverse scales tried are (``first`` + i * ``step`` + top) / range, i = 0 … ``n_steps``."""

    top: int
    first: float
    step: float
    n_steps: int
    is_absolute: bool

    def list_numerators(self) -> list[float]:
        """What is divided by the range in each try, in C's float arithmetic."""
        first, step, top = np.float32(self.first), np.float32(self.step), np.float32(self.top)
        return [float(first + step * np.float32(i) + top) for i in range(self.n_steps + 1)]


@dataclass(frozen=True)
class Fit:
    """What was found for each group; codes are round((x - ``origin``) * ``inverse``), all (n_groups,).

    ``minimum`` is as C returns it, turned positive.
    """

    scale: torch.Tensor
    minimum: torch.Tensor
    origin: torch.Tensor
    inverse: torch.Tensor


def fit_scale_and_minimum(x: torch.Tensor, weights: torch.Tensor, search: Search) -> Fit:
    """The scale and minimum of least weighted error among those that ``search`` tries.

    A better minimum is the origin of the tries that follow it.
    """
    low = x.amin(0).clamp_(max=0.0)
    high = x.amax(0)
    is_flat = high == low
    high = torch.where(is_flat, low + 1.0, high)  # these are set at the end
    codes, buffer, spare = (torch.empty_like(x) for _ in range(3))
    sum_w, sum_x, flags = (torch.empty_like(high) for _ in range(3))
    sums, by_l, by_w, by_x = (high.new_empty(3, len(high)) for _ in range(4))  # a call for several rows is cheaper
    sum_l, sum_l2, sum_xl = sums
    sum_lanes(weights, sum_w)
    sum_lanes(torch.mul(weights, x, out=buffer), sum_x)

    def measure(scale: torch.Tensor, minimum: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        torch.mul(codes, scale, out=buffer).add_(minimum)
        if search.is_absolute:
            buffer.sub_(x).abs_()
        else:
            torch.ops.aten.mse_loss.out(buffer, x, _EACH, out=buffer)  # the square of the difference
        return sum_lanes(buffer.mul_(weights), out)

    found, tried = high.new_empty(5, len(high)), high.new_empty(5, len(high))
    best, origin, chosen, scale, least = found
    error, minimum, inverse, new_scale, new_minimum = tried
    minimum.copy_(low)
    divide(search.top, high - minimum, out=inverse)
    divide(1.0, inverse, out=new_scale)
    _encode(x, minimum, inverse, search.top, low, high, out=codes)
    measure(new_scale, minimum, error).masked_fill_(is_flat, -1.0)
    new_minimum.copy_(low)
    found.copy_(tried)
    for numerator in search.list_numerators():
        minimum.copy_(least)
        divide(numerator, high - minimum, out=inverse)
        _encode(x, minimum, inverse, search.top, low, high, out=codes)
        sum_lanes(torch.mul(weights, codes, out=buffer), sum_l)
        sum_lanes(torch.mul(buffer, codes, out=spare), sum_l2)
        sum_lanes(buffer.mul_(x), sum_xl)
        torch.mul(sums, sum_l, out=by_l)
        torch.mul(sums, sum_w, out=by_w)
        torch.mul(sums, sum_x, out=by_x)
        determinant = by_w[1].sub_(by_l[0])
        torch.sub(by_w[2], by_x[0], out=new_scale)
        torch.sub(by_x[1], by_l[2], out=new_minimum)
        tried[3:].div_(determinant)
        if not bool(new_minimum.amax() <= 0):
            overwrite(new_scale, sum_xl / sum_l2, build_mask(torch.gt(new_minimum, 0, out=flags)))
            new_minimum.clamp_(max=0.0)
        measure(new_scale, new_minimum, error)
        overwrite(found, tried, build_mask(torch.lt(error, best, out=flags).mul_(determinant.gt_(0))))
    return Fit(scale.masked_fill(is_flat, 0.0), -least, origin, chosen.masked_fill(is_flat, 0.0))


def _encode(
    x: torch.Tensor,
    origin: torch.Tensor,
    inverse: torch.Tensor,
    top: int,
    low: torch.Tensor,
    high: torch.Tensor,
    *,
    out: torch.Tensor,
) -> None:
    """Nothing; ``out`` holds the codes 0 … ``top`` of ``x``, which lies between ``low`` and ``high``, as floats."""
    torch.sub(x, origin, out=out).mul_(inverse)
    lowest = (low - origin).mul_(inverse).abs_()
    highest = (high - origin).mul_(inverse).abs_()
    if float(lowest.amax()) <= MOST_ROUNDED and float(highest.amax()) <= MOST_ROUNDED:  # which NaN is not
        out.round_().clamp_(0, top)
    else:
        out.copy_(round_within(out, 0, top).clone())


def encode_groups(x: torch.Tensor, fit: Fit, top: int) -> torch.Tensor:
    """The codes (int32) that belong to ``fit``, of the columns ``x``."""
    return round_within((x - fit.origin).mul_(fit.inverse), 0, top)


def fit_scale(x: torch.Tensor, extreme: torch.Tensor, reach: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale, and the inverse scale that the codes -``reach`` … ``reach`` - 1 come from (0: all codes are the least).

    Args:
        x: lanes.
        extreme: the value of greatest magnitude of each group.
        reach: half the number of codes.
    """
    is_zero = extreme.abs() < LEAST_MAGNITUDE
    extreme = extreme.masked_fill(is_zero, 1.0)
    squares = x * x
    cubes = squares * x
    codes, buffer = torch.empty_like(x), torch.empty_like(x)
    sum_lx, sum_l2, flags = (torch.empty_like(extreme) for _ in range(3))
    found, tried = extreme.new_empty(3, len(extreme)), extreme.new_empty(3, len(extreme))
    scale, best, chosen = found
    new_scale, new_best, inverse = tried
    for i in (0, *range(-9, 0), *range(1, 10)):
        divide(-float(np.float32(reach) + np.float32(0.1) * np.float32(i)), extreme, out=inverse)
        torch.mul(x, inverse, out=codes).round_().clamp_(-reach, reach - 1)
        sum_lanes(torch.mul(cubes, codes, out=buffer), sum_lx)
        sum_lanes(torch.mul(squares, codes, out=buffer).mul_(codes), sum_l2)
        if i == 0:
            scale.copy_(torch.where(sum_l2 == 0, 0.0, sum_lx / sum_l2))
            torch.mul(scale, sum_lx, out=best)
            chosen.copy_(inverse)
            continue
        torch.gt(sum_lx * sum_lx, best * sum_l2, out=flags)
        is_better = build_mask(flags.mul_(sum_l2 > 0))
        torch.mul(torch.div(sum_lx, sum_l2, out=new_scale), sum_lx, out=new_best)
        overwrite(found, tried, is_better)
    return scale.masked_fill(is_zero, 0.0), chosen.masked_fill(is_zero, 0.0)


def descend(x: torch.Tensor, extreme: torch.Tensor, reach: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale, and codes 0 … 2 * ``reach`` - 1 as floats like ``x``: each value's in turn moves to where it fits best.

    Args:
        x: lanes.
        extreme: the value of greatest magnitude of each group.
        reach: half the number of codes.
    """
    is_zero = extreme.abs() < LEAST_MAGNITUDE
    inverse = divide(-float(reach), extreme.masked_fill(is_zero, 1.0))
    squares = x * x
    cubes = squares * x
    codes = torch.mul(x, inverse).round_().clamp_(-reach, reach - 1)
    sum_lx = sum_lanes(cubes * codes, torch.empty_like(extreme))
    sum_l2 = sum_lanes((squares * codes).mul_(codes), torch.empty_like(extreme))
    active = torch.arange(x.shape[1], device=x.device)  # the groups in which something moved
    part = (x, squares, cubes, codes.clone(), sum_lx.clone(), sum_l2.clone())
    for _ in range(_N_DESCENTS):
        moved = _descend_once(*part, reach)
        codes[:, active], sum_lx[active], sum_l2[active] = part[3:]
        kept = moved.nonzero().squeeze(1)
        if not len(kept):
            break
        active = active[kept]
        part = tuple(tensor.index_select(-1, kept) for tensor in part)  # type: ignore[assignment]
    scale = torch.where(sum_l2 > 0, sum_lx / sum_l2, 0.0)
    return scale.masked_fill(is_zero, 0.0), (codes + reach).masked_fill_(is_zero, 0.0)


def _descend_once(
    x: torch.Tensor,
    squares: torch.Tensor,
    cubes: torch.Tensor,
    codes: torch.Tensor,
    sum_lx: torch.Tensor,
    sum_l2: torch.Tensor,
    reach: int,
) -> torch.Tensor:
    """Which groups changed, as a mask; ``codes``, ``sum_lx`` and ``sum_l2`` are written to."""
    moved = torch.zeros(x.shape[1], dtype=torch.int32, device=x.device)
    rest_lx, rest_l2, new, left, right, flags = (torch.empty_like(sum_lx) for _ in range(6))
    for value, square, cube, code in zip(x, squares, cubes, codes, strict=True):
        torch.sub(sum_lx, torch.mul(cube, code, out=left), out=rest_lx)
        torch.sub(sum_l2, torch.mul(square, code, out=left).mul_(code), out=rest_l2)
        torch.mul(value, rest_l2, out=left).div_(rest_lx)
        new.copy_(round_within(left, -reach, reach - 1))
        torch.gt(rest_lx, 0, out=flags).mul_(torch.ne(new, code, out=left))
        rest_lx.add_(torch.mul(cube, new, out=left))
        rest_l2.add_(torch.mul(square, new, out=left).mul_(new))
        torch.mul(rest_lx, rest_lx, out=left).mul_(sum_l2)
        torch.mul(sum_lx, sum_lx, out=right).mul_(rest_l2)
        takes = build_mask(flags.mul_(left.gt_(right)).mul_(torch.gt(rest_l2, 0, out=right)))
        overwrite(code, new, takes)
        overwrite(sum_lx, rest_lx, takes)
        overwrite(sum_l2, rest_l2, takes)
        moved.bitwise_or_(takes)
    return moved
