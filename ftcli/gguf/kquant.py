"""Weights in the types of GGUF, bit for bit as ``ggml_quantize_chunk`` of llama.cpp writes them without a matrix.

A block of a K type holds 256 values in groups of 16 or 32, whose scales are integers times a half of the block's own:

    Q2_K   scales and minima 16 x (4 + 4) │ 2-bit codes 64 │ half scale │ half minimum                          84 bytes
    Q3_K   third bits 32 │ low 2 bits 64 │ scales 16 x 6 bits │ half scale                                     110
    Q4_K   half scale │ half minimum │ scales and minima 8 x (6 + 6) bits │ codes 128                          144
    Q5_K   the same with fifth bits 32 before the codes                                                        176
    Q6_K   low 4 bits 128 │ high 2 bits 64 │ scales 16 │ half scale                                            210

The searches for scales are in `ftcli.gguf.fit`. Source: ``quantize_row_q*_K_ref`` in ggml/src/ggml-quants.c and the
layouts in ggml-common.h of ggml-org/llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from ftcli.errors import ContentError
from ftcli.gguf.block import quantize_q8_0, quantize_symmetric, quantize_with_minimum
from ftcli.gguf.fit import LEAST_MAGNITUDE, Fit, Search, descend, encode_groups, fit_scale, fit_scale_and_minimum
from ftcli.gguf.lane import (
    divide,
    divide_by,
    find_extreme,
    round_within,
    split_half,
    sum_lanes,
    turn_from_lanes,
    turn_to_lanes,
)
from ftcli.store.gguf_header import GGML_TYPES

_BLOCK = 256  # QK_K
_ALL = 1 << 22  # wider than any integer that is rounded to
_DEVICE_VALUES = 1 << 22  # at a time, which keeps a GPU busy
_SEARCHES = {
    "Q2_K": Search(top=3, first=-0.5, step=0.1, n_steps=15, is_absolute=True),
    "Q4_K": Search(top=15, first=-1.0, step=0.1, n_steps=20, is_absolute=False),
    "Q5_K": Search(top=31, first=-0.5, step=0.1, n_steps=15, is_absolute=False),
}
_SIZES = {name: (block, size_bytes) for name, block, size_bytes in GGML_TYPES.values()}
# type → bytes of a block, and which of them are its scales and minima in float16
SCALES = {
    name: (_SIZES[name][1], places)
    for names, places in (
        (("Q8_0", "Q4_0", "Q5_0"), slice(0, 2)),
        (("Q4_1", "Q5_1", "Q4_K", "Q5_K"), slice(0, 4)),
        (("Q2_K",), slice(80, 84)),
        (("Q3_K",), slice(108, 110)),
        (("Q6_K",), slice(208, 210)),
    )
    for name in names
}
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def quantize_rows(values: torch.Tensor, kind: str) -> torch.Tensor:
    """``values`` (rows, n) as bytes (rows, size) of the GGUF type ``kind``, on the same device.

    Needs about 20 MB beside the two (on a GPU 200) where ``values`` is contiguous, of any floating type; F32 may share
    its memory. Infinities and NaN are not looked for. Threads are the caller's matter: one inside torch serves best,
    with several tensors side by side.

    Raises:
        ContentError: blocks of this type do not fit the row.
    """
    block, size_bytes = _SIZES[kind]
    n_rows, n = values.shape
    if n % block:
        raise ContentError(f"a row of {n} values cannot be {kind}", why=f"its blocks hold {block} values each")
    values = values.detach()
    if kind in _FLOATS:
        return values.to(_FLOATS[kind]).contiguous().view(torch.uint8)
    quantize, n_values = _QUANTIZERS[kind]
    if values.device.type != "cpu":
        n_values = _DEVICE_VALUES
    blocks = values.reshape(-1, block)
    written = torch.empty((len(blocks), size_bytes), dtype=torch.uint8, device=values.device)
    with np.errstate(all="ignore"):  # groups that overflow have their codes in llama.cpp too
        for start in range(0, len(blocks), n_values // block):
            part = slice(start, start + n_values // block)
            written[part] = quantize(blocks[part].float())
    return written.view(n_rows, n // block * size_bytes)


def _quantize_q2_k(x: torch.Tensor) -> torch.Tensor:
    lanes = turn_to_lanes(x, 16)
    search = _SEARCHES["Q2_K"]
    fit = fit_scale_and_minimum(lanes, lanes.abs(), search)
    scale_codes, scale_bytes, scale = _share_scales(fit.scale.view(-1, 16), 15)
    minimum_codes, minimum_bytes, minimum = _share_scales(fit.minimum.view(-1, 16), 15)
    packed = (scale_codes | minimum_codes << 4) & 255
    codes = _encode_with_minimum(lanes, fit, search.top, scale * (packed & 15), minimum * (packed >> 4))
    return torch.cat((packed.to(torch.uint8), _pack_pairs(codes), scale_bytes, minimum_bytes), dim=1)


def _quantize_q3_k(x: torch.Tensor) -> torch.Tensor:
    lanes = turn_to_lanes(x, 16)
    scales, found = descend(lanes, find_extreme(x.reshape(-1, 16)), 4)
    scales = scales.view(-1, 16)
    extreme = find_extreme(_drop_nan(scales)).unsqueeze(1)
    inverse = divide(-32.0, extreme)
    scale_codes = _wrap(round_within(inverse * scales, -_ALL, _ALL)).clamp_(-32, 31).add_(32)
    scale_codes.masked_fill_(extreme == 0, 0)
    scale_bytes, scale = split_half(divide(1.0, inverse).masked_fill_(extreme == 0, 0.0).squeeze(1))
    step = (scale.unsqueeze(1) * (scale_codes - 32)).view(-1)
    codes = round_within(lanes / step, -4, 3).add_(4)
    if len(kept := (step == 0).nonzero().squeeze(1)):
        codes[:, kept] = found[:, kept].to(torch.int32)
    codes = turn_from_lanes(codes, _BLOCK)
    third = _merge_bits((codes >> 2).view(-1, 8, 32), 1)
    low, high = scale_codes.to(torch.uint8) & 15, (scale_codes >> 4).to(torch.uint8).view(-1, 4, 4)
    packed = (low[:, :8] | low[:, 8:] << 4, _merge_bits(high, 2))
    return torch.cat((third, _pack_pairs(codes & 3), *packed, scale_bytes), dim=1)


def _quantize_q45_k(x: torch.Tensor, kind: str) -> torch.Tensor:
    lanes = turn_to_lanes(x, 32)
    magnitude = sum_lanes(lanes * lanes, torch.empty_like(lanes[0])).mul_(1 / 32)
    weights = lanes.abs().add_(magnitude.double().sqrt_().float())  # a float32 root is not always the nearest
    search = _SEARCHES[kind]
    fit = fit_scale_and_minimum(lanes, weights, search)
    scale_codes, scale_bytes, scale = _share_scales(fit.scale.view(-1, 8), 63)
    minimum_codes, minimum_bytes, minimum = _share_scales(fit.minimum.view(-1, 8), 63)
    scale_codes, minimum_codes = (c.bitwise_and_(255).clamp_(max=63) for c in (scale_codes, minimum_codes))
    codes = _encode_with_minimum(lanes, fit, search.top, scale * scale_codes, minimum * minimum_codes)
    pairs = codes.view(-1, 4, 2, 32)
    nibbles = (pairs[:, :, 0] & 15 | pairs[:, :, 1] << 4).view(-1, 128)
    fifth = (_merge_bits((codes >> 4).view(-1, 8, 32), 1),) if kind == "Q5_K" else ()
    packed = _pack_six_bits(scale_codes.to(torch.uint8), minimum_codes.to(torch.uint8))
    return torch.cat((scale_bytes, minimum_bytes, packed, *fifth, nibbles), dim=1)


def _quantize_q6_k(x: torch.Tensor) -> torch.Tensor:
    lanes = turn_to_lanes(x, 16)
    scales, chosen = fit_scale(lanes, find_extreme(x.reshape(-1, 16)), 32)
    is_empty = chosen == 0
    scales = scales.view(-1, 16)
    extreme = find_extreme(_drop_nan(scales)).unsqueeze(1)
    is_zero = extreme.abs() < LEAST_MAGNITUDE
    inverse = divide(-128.0, extreme)
    scale_codes = _wrap(round_within(inverse * scales, -_ALL, 127)).masked_fill_(is_zero, 0)
    scale_bytes, scale = split_half(divide(1.0, inverse).masked_fill_(is_zero, 0.0).squeeze(1))
    step = (scale.unsqueeze(1) * scale_codes).view(-1)
    codes = round_within(lanes / step, -32, 31).add_(32)
    if len(kept := (step == 0).nonzero().squeeze(1)):
        first = round_within(lanes[:, kept] * chosen[kept], -32, 31).add_(32)
        codes[:, kept] = first.masked_fill_(is_empty[kept], 0)
    halves = turn_from_lanes(codes, _BLOCK).masked_fill_(is_zero, 0).view(-1, 2, 4, 32)
    low = (halves[:, :, :2] & 15 | halves[:, :, 2:] << 4).view(-1, 128)
    high = _merge_bits((halves >> 4).view(-1, 4, 32), 2).view(-1, 64)
    return torch.cat((low, high, scale_codes.to(torch.int8).view(torch.uint8), scale_bytes), dim=1)


def _share_scales(scales: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The ``scales`` (n_blocks, n) as integers times one half: the integers, its bytes, and its value (n_blocks, 1)."""
    greatest = _drop_nan(scales).amax(1, keepdim=True).clamp_(min=0.0).add_(0.0)
    inverse = divide(float(top), greatest).masked_fill_(greatest == 0, 0.0)
    codes = round_within(inverse * scales, -_ALL, _ALL).masked_fill_(greatest == 0, 0)
    written, value = split_half(divide_by(greatest, float(top)).squeeze(1))
    return codes, written, value.unsqueeze(1)


def _encode_with_minimum(
    lanes: torch.Tensor, fit: Fit, top: int, step: torch.Tensor, minimum: torch.Tensor
) -> torch.Tensor:
    """The codes (n_blocks, 256) of the scales as they were rounded; a ``step`` of 0 leaves those of the search."""
    step, minimum = step.view(-1), minimum.view(-1)
    codes = round_within((lanes + minimum).div_(step), 0, top)
    if len(kept := (step == 0).nonzero().squeeze(1)):
        found = Fit(*(part[kept] for part in (fit.scale, fit.minimum, fit.origin, fit.inverse)))
        codes[:, kept] = encode_groups(lanes[:, kept], found, top)
    return turn_from_lanes(codes, _BLOCK)


def _drop_nan(scales: torch.Tensor) -> torch.Tensor:
    """``scales`` with 0 for those of groups that overflow: no comparison in C lets NaN through."""
    return scales.masked_fill(scales.isnan(), 0.0)


def _wrap(integers: torch.Tensor) -> torch.Tensor:
    """``integers`` as a conversion to int8 in C leaves them."""
    return integers.add_(128).bitwise_and_(255).sub_(128)


def _merge_bits(parts: torch.Tensor, n_bits: int) -> torch.Tensor:
    """Bytes (n_blocks, m) with part i of ``parts`` (n_blocks, n, m) shifted left by i * ``n_bits``."""
    merged = parts[:, 0].clone()
    for i in range(1, parts.shape[1]):
        merged |= parts[:, i] << i * n_bits
    return merged


def _pack_pairs(codes: torch.Tensor) -> torch.Tensor:
    """Codes of 2 bits (n_blocks, 256): the four quarters of each half of the block lie in the bits of its 32 bytes."""
    return _merge_bits(codes.view(-1, 4, 32), 2).view(-1, 64)


def _pack_six_bits(scales: torch.Tensor, minima: torch.Tensor) -> torch.Tensor:
    """The 12 bytes of eight ``scales`` and ``minima``: of the last four, the two high bits lie on the first four."""
    first = (part[:, :4] | part[:, 4:] >> 4 << 6 for part in (scales, minima))
    return torch.cat((*first, scales[:, 4:] & 15 | minima[:, 4:] << 4), dim=1)


# type → how its blocks are made, and how many values at a time keep to a CPU's cache
_QUANTIZERS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], int]] = {
    "Q8_0": (quantize_q8_0, 1 << 18),
    "Q4_0": (partial(quantize_symmetric, n_bits=4), 1 << 18),
    "Q4_1": (partial(quantize_with_minimum, n_bits=4), 1 << 18),
    "Q5_0": (partial(quantize_symmetric, n_bits=5), 1 << 18),
    "Q5_1": (partial(quantize_with_minimum, n_bits=5), 1 << 18),
    "Q2_K": (_quantize_q2_k, 1 << 17),
    "Q3_K": (_quantize_q3_k, 1 << 19),
    "Q4_K": (partial(_quantize_q45_k, kind="Q4_K"), 1 << 17),
    "Q5_K": (partial(_quantize_q45_k, kind="Q5_K"), 1 << 17),
    "Q6_K": (_quantize_q6_k, 1 << 17),
}
