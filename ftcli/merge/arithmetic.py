"""The sum: base and update in float32, rounded once, a block of rows at a time.

    W' = round(W + s·B·A)        DoRA: round(m / ‖W + s·B·A‖ · (W + s·B·A)), the norm over the inputs of each output

Sources: LoRA (arXiv 2106.09685) §4.1, DoRA (arXiv 2402.09353) eq. 5; the order of operations is that of PEFT's
``get_delta_weight``, so that LoRA merged in float32 equals PEFT's to the last bit, and DoRA but for the order in which
a norm is added up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ftcli.errors import ContentError, NumericError
from ftcli.merge.plan import Part, Weights
from ftcli.model.stored import is_finite

_BLOCK_BYTES = 4 << 20  # of a block in float32
# A matrix product may round otherwise where few rows are left over, so blocks are multiples of this and the last is
# never smaller: the result does not depend on how a tensor was cut.
_ROW_MULTIPLE = 256


@dataclass(frozen=True)
class Survival:
    """What of one module's update is in the result.

    ``kept`` is the update's share along its own direction (1: all of it); ``noise`` is what rounding added, relative
    to the update; ``size`` is ‖ΔW‖.
    """

    name: str
    kept: float
    noise: float
    size: float


class Measure:
    """Adds up what of an update is left, block by block."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.along = self.total = self.off = 0.0

    def add(self, base: torch.Tensor, wanted: torch.Tensor, result: torch.Tensor) -> None:
        """Nothing; the block counts. ``wanted`` is the sum in float32, ``result`` the same after rounding."""
        update = wanted - base
        self.total += torch.linalg.vector_norm(update).double().item() ** 2
        moved = result.float() - base
        self.along += torch.dot(moved.reshape(-1), update.reshape(-1)).item()
        self.off += torch.linalg.vector_norm(moved.sub_(update)).double().item() ** 2

    def finish(self) -> Survival:
        """What was added up."""
        if not self.total:
            return Survival(self.name, 1.0, 0.0, 0.0)
        return Survival(self.name, self.along / self.total, (self.off / self.total) ** 0.5, self.total**0.5)


def make_blocks(part: Part, weights: Weights, measure: Measure | None = None) -> Iterator[torch.Tensor]:
    """Yields the rows of ``part`` in its dtype, block by block; an update is added to ``measure``.

    Raises:
        ContentError: the base holds NaN or infinity there.
        NumericError: a value is too large for the dtype.
    """
    for start, stop in _cut(part):
        base = read_base(part, weights, start, stop)
        if not is_finite(base):
            raise ContentError(f"{part.source} of the base holds NaN or infinity", hint="copy the base again")
        wanted = _add_update(part, base, start, stop)
        result = wanted.to(part.dtype)
        if not is_finite(result):
            is_wide = part.dtype == torch.float32
            hint = (
                "look at the adapter: its update is that large" if is_wide else "merge with --dtype bfloat16 or float32"
            )
            raise NumericError(f"{part.name} is too large for {str(part.dtype).removeprefix('torch.')}", hint=hint)
        if measure and part.lora:
            measure.add(base.float(), wanted, result)
        yield result


def _cut(part: Part) -> Iterator[tuple[int, int]]:
    n_rows = part.tensor.shape[0] if part.tensor.shape else 1
    row_bytes = 4 * max(1, part.tensor.size_bytes // max(1, n_rows) // part.dtype.itemsize)
    step = max(_ROW_MULTIPLE, _BLOCK_BYTES // row_bytes // _ROW_MULTIPLE * _ROW_MULTIPLE)
    if part.lora and part.lora.transposed and part.lora.magnitude is not None:
        step = n_rows  # a column's norm needs all rows
    start = 0
    while n_rows - start >= step + _ROW_MULTIPLE:
        yield start, start + step
        start += step
    yield start, n_rows


def read_base(part: Part, weights: Weights, start: int, stop: int) -> torch.Tensor:
    """Rows of the base, or of what stands in its place; rows that only the adapter has are 0."""
    if part.whole is not None:
        return part.whole.read_rows(start, stop)
    entry = weights.entries[part.source]
    n_base = entry.shape[0] if entry.shape else 1
    rows = weights.read_rows(part.source, min(start, n_base), min(stop, n_base))
    if stop <= n_base:
        return rows
    return torch.cat([rows, rows.new_zeros((stop - max(start, n_base), *rows.shape[1:]))])


def _add_update(part: Part, base: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    if part.rows is not None:
        indices, values = part.rows
        chosen = [i for i, index in enumerate(indices) if start <= index < stop]
        wanted = base.to(torch.float32, copy=True) if chosen else base
        for i in chosen:
            wanted[indices[i] - start] = values[i].float()
        return wanted
    if part.lora is None:
        return base
    summed = part.lora.make_rows(start, stop).add_(base)
    if part.lora.magnitude is None:
        return summed
    if part.lora.transposed:
        return summed.mul_(part.lora.magnitude / torch.linalg.norm(summed, dim=0))
    magnitude = part.lora.magnitude[start:stop]
    return summed.mul_((magnitude / torch.linalg.norm(summed, dim=1)).view(-1, 1))
