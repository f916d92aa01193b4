"""Checkpointing that keeps what is cheap to keep: each block's input, and what attention made of it.

On a CPU attention is the dearest part of a block to compute again, by far for long documents, and its output is no
larger than the block's input. On CUDA its kernels are fast, and memory is what checkpointing is for: there a block
keeps its input alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.checkpoint import create_selective_checkpoint_contexts

_KEPT = [torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default]


def keep_attention() -> Any:
    """The contexts of one checkpointed block, as ``torch.utils.checkpoint`` asks for them in ``context_fn``."""
    return create_selective_checkpoint_contexts(_KEPT)  # type: ignore[no-untyped-call]
