"""A block of a weight's rows as the bytes that the file holds, checked before and after.

rows ─▶ finite? ─▶ F32, F16, BF16, or quantised ─▶ nothing overflowed? ─▶ bytes
"""

from __future__ import annotations

import torch

from ftcli.errors import ContentError, NumericError
from ftcli.gguf.kquant import SCALES, quantize_rows
from ftcli.gguf.native import find_packer
from ftcli.model.stored import is_finite

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def encode_block(block: torch.Tensor, dtype: str, name: str) -> torch.Tensor:
    """The bytes (flat, on the CPU) of the rows in ``block`` as GGUF's type ``dtype``; made on a GPU where there is one.

    Raises:
        ContentError: the weight ``name`` holds NaN or infinity.
        NumericError: it is too large for the type.
    """
    if not is_finite(block):
        raise ContentError(f"{name} holds NaN or infinity", hint="copy or train the model again")
    if dtype in _DTYPES:
        written = scales = block.float().to(_DTYPES[dtype])
    else:
        written = _pack(block, dtype)
        scales = _read_scales(written, dtype)
    if not is_finite(scales):
        raise NumericError(f"{name} is too large for {dtype}", hint="write bf16 or f32 instead")
    return written.cpu().contiguous().reshape(-1).view(torch.uint8)


def _pack(block: torch.Tensor, dtype: str) -> torch.Tensor:
    if packer := find_packer(dtype):
        return packer(block)
    return quantize_rows(block.to("cuda") if torch.cuda.is_available() else block, dtype)


def _read_scales(written: torch.Tensor, dtype: str) -> torch.Tensor:
    """The scales, and minima, of blocks: all types write them in float16."""
    size_bytes, places = SCALES[dtype]
    return written.view(-1, size_bytes)[:, places].contiguous().view(torch.float16)
