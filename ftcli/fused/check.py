"""Proof, on the very model before its first step, that documents do not see each other and the fast path is right.

On the plain path packed rows are kept apart by their positions alone: transformers builds a block-diagonal mask when
there is neither an attention mask nor a cache. A family or version that does not would train on contaminated
contexts without a word. And a config may ask of a known family what ``fused/family.py`` knows nothing of.
"""

from __future__ import annotations

from typing import Any

import torch

from ftcli.errors import ContentError, NumericError
from ftcli.fused.layer import fuse, is_fused, unfuse

_PROBE_TOKENS = 6
_TOLERANCE = 0.25  # of the logits' spread: a wrong mask or layer moves them by all of it, rounding by 0.05 in bfloat16


def fuse_checked(model: Any, *, with_attention: bool = True) -> str:
    """Why ``model`` goes on by the plain path; empty if it now takes the fast one, which gave the same logits.

    Args:
        model: a causal language model of transformers, or PEFT's wrapper of one.
        with_attention: as in ``fuse``.
    """
    expected = _probe(model)
    if not fuse(model, with_attention=with_attention):
        return f"the fast path does not know the family {model.config.model_type}"
    error = _compare(_probe(model), expected)
    if error < _TOLERANCE or not torch.isfinite(expected).all():
        return ""
    unfuse(model)
    return f"the fast path would change this model's logits by {error:.2f} of their spread"


@torch.no_grad()
def check_documents_apart(model: Any) -> None:
    """None if a second document's logits are those that it has alone.

    Three forwards of a few tokens. The tolerance is wide against rounding (a wrong mask moves logits by their
    own size) and relative to the logits' spread.

    Raises:
        ContentError: the model mixes packed documents.
        NumericError: its logits are NaN or infinite.
    """
    together, alone = _probe(model)[_PROBE_TOKENS:], _probe(model, first=_PROBE_TOKENS)
    if not torch.isfinite(alone).all():
        raise NumericError(
            "the model's logits are not finite before the first step",
            where=str(model.config.model_type),
            hint="its weights are damaged, or overflow in this dtype: set model.dtype, or take another copy",
        )
    error = _compare(together, alone)
    if not error < _TOLERANCE:
        raise ContentError(
            "this model does not keep packed documents apart",
            where=str(model.config.model_type),
            why=f"the logits of a document change by {error:.2f} of their spread when another stands before it",
            hint="set model.attn_implementation: sdpa, or data.packing: false and train.per_device_train_batch_size: 1",
        )


@torch.no_grad()
def _probe(model: Any, *, first: int = 0) -> torch.Tensor:
    """Logits of two documents side by side, or of their tokens from ``first`` on alone: (tokens, vocabulary)."""
    was_training = model.training
    model.eval()
    device = model.get_input_embeddings().weight.device
    rows = int(model.config.get_text_config().vocab_size)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(rows, (1, 2 * _PROBE_TOKENS), generator=generator).to(device)
    positions = torch.arange(_PROBE_TOKENS, device=device).repeat(2)[None]
    lengths = [_PROBE_TOKENS] * (1 if first else 2)
    more = {"documents": lengths} if is_fused(model) else {}
    logits = model(input_ids=ids[:, first:], position_ids=positions[:, first:], use_cache=False, **more).logits[0]
    model.train(was_training)
    return logits.float()  # type: ignore[no-any-return]


def _compare(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The root mean square of the difference, as a share of the spread of what is expected.

    Not the largest difference: in bfloat16 rounding moves one of half a million logits by a quarter of the spread.
    """
    return float((found - expected).square().mean().sqrt() / expected.std().clamp(min=1e-6))
