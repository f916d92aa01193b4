"""The types whose blocks are one group of 32 values with a scale of its own, as llama.cpp's reference makes them.

    Q8_0         half scale │ 32 bytes
    Q4_0, Q5_0   half scale │ fifth bits (4 bytes, Q5_0) │ 16 bytes: value i in the low, i + 16 in the high nibble
    Q4_1, Q5_1   half scale │ half minimum │ the same

All functions take float32 (n_blocks, 32) and give bytes (n_blocks, size). Source: ``quantize_row_q*_ref`` in
ggml/src/ggml-quants.c of ggml-org/llama.cpp.
"""

from __future__ import annotations

import torch

from ftcli.gguf.lane import divide, divide_by, find_extreme

_BELOW_HALF = 0.49999997  # the greatest float32 below 1/2: truncation after adding it rounds halves away from zero
_SPREAD = 0x0102040810204080  # times eight bytes of 0 or 1: byte i's bit moves to bit 56 + i


def quantize_q8_0(x: torch.Tensor) -> torch.Tensor:
    """Blocks of Q8_0."""
    low, high = x.amin(1), x.amax(1)
    scale = divide_by(torch.maximum(high, -low).add_(0.0), 127.0)
    inverse, is_lost = _invert(scale)
    scaled = x * inverse
    codes = scaled.add_(torch.full_like(scaled, _BELOW_HALF).copysign_(scaled)).to(torch.int8).view(torch.uint8)
    return torch.cat((_pack_half(scale), _clear(codes, is_lost)), dim=1)


def quantize_symmetric(x: torch.Tensor, n_bits: int) -> torch.Tensor:
    """Blocks of Q4_0 or Q5_0."""
    reach = 1 << n_bits - 1
    scale = divide_by(find_extreme(x), -float(reach))
    inverse, is_lost = _invert(scale)
    codes = _clear((x * inverse).add_(reach + 0.5).clamp_(max=2 * reach - 1).to(torch.uint8), is_lost)
    return torch.cat((_pack_half(scale), *_pack_codes(codes, n_bits)), dim=1)


def quantize_with_minimum(x: torch.Tensor, n_bits: int) -> torch.Tensor:
    """Blocks of Q4_1 or Q5_1."""
    top = (1 << n_bits) - 1
    low, high = x.amin(1), x.amax(1)
    if len(zeros := (low == 0).nonzero().squeeze(1)):  # the sign of the first zero is written
        found = x[zeros]
        low[zeros] = found.gather(1, (found == 0).to(torch.uint8).argmax(1, keepdim=True)).squeeze(1)
    scale = divide_by((high - low).add_(0.0), float(top))
    inverse, is_lost = _invert(scale)
    codes = _clear((x - low.unsqueeze(1)).mul_(inverse).add_(0.5).clamp_(max=top).to(torch.uint8), is_lost)
    return torch.cat((_pack_half(scale), _pack_half(low), *_pack_codes(codes, n_bits)), dim=1)


def _invert(scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """1 / ``scale`` (0 for 0; n_blocks, 1), and the blocks where either overflows: C's codes there are 0."""
    inverse = torch.where(scale == 0, 0.0, divide(1.0, scale))
    return inverse.unsqueeze(1), (inverse.isinf() | scale.isinf()).nonzero().squeeze(1)


def _clear(codes: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    if len(blocks):
        codes[blocks] = 0
    return codes


def _pack_half(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.float16).unsqueeze(1).view(torch.uint8)


def _pack_codes(codes: torch.Tensor, n_bits: int) -> list[torch.Tensor]:
    """The fifth bits where there are any, and the nibbles."""
    low, high = codes[:, :16], codes[:, 16:]
    if n_bits == 4:
        return [low | high << 4]
    bits = (codes >> 4).view(torch.int64).mul_(_SPREAD).bitwise_right_shift_(56).to(torch.uint8)
    return [bits, low & 15 | high << 4]
