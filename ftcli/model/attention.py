"""Proof that documents side by side do not see each other.

Packed rows are kept apart by their positions alone: transformers builds a block-diagonal mask when there is
neither an attention mask nor a cache. A family or version that does not would train on contaminated contexts
without a word, so the very model is asked before the first step.
"""

from __future__ import annotations

from typing import Any

import torch

from ftcli.errors import ContentError, NumericError

_PROBE_TOKENS = 6


@torch.no_grad()
def check_documents_apart(model: Any) -> None:
    """None if a second document's logits are those that it has alone.

    Three forwards of a few tokens. The tolerance is wide against rounding (a wrong mask moves logits by their
    own size) and relative to the logits' spread.

    Raises:
        ContentError: the model mixes packed documents.
        NumericError: its logits are NaN or infinite.
    """
    was_training = model.training
    model.eval()
    device = model.get_input_embeddings().weight.device
    rows = int(model.config.get_text_config().vocab_size)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(rows, (1, 2 * _PROBE_TOKENS), generator=generator).to(device)
    positions = torch.arange(_PROBE_TOKENS, device=device).repeat(2)[None]
    together = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0, _PROBE_TOKENS:].float()
    alone = (
        model(input_ids=ids[:, _PROBE_TOKENS:], position_ids=positions[:, _PROBE_TOKENS:], use_cache=False)
        .logits[0]
        .float()
    )
    model.train(was_training)
    if not torch.isfinite(alone).all():
        raise NumericError(
            "the model's logits are not finite before the first step",
            where=str(model.config.model_type),
            hint="its weights are damaged, or overflow in this dtype: set model.dtype, or take another copy",
        )
    error = (together - alone).abs().max() / alone.std().clamp(min=1e-6)
    if not error < 0.25:
        raise ContentError(
            "this model does not keep packed documents apart",
            where=str(model.config.model_type),
            why=f"the logits of a document change by {error:.2f} of their spread when another stands before it",
            hint="set model.attn_implementation: sdpa, or data.packing: false and train.per_device_train_batch_size: 1",
        )
