"""Attention over documents that lie side by side, each by itself: no mask is larger than a document.

flat      A A A A B B C C C C C C                  one (T, heads, head_dim) tensor each for q, k and v
apart     A A A A │ B B │ C C C C C C              causal attention within each, then side by side again
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch.nn import functional

from ftcli.model.activation import has_matrix_unit


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: Sequence[int],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """What each token of each document sees of that document: (T, heads, head_dim).

    Args:
        q: (T, heads, head_dim).
        k: (T, kv heads, head_dim); each head serves several of ``q``'s.
        v: as ``k``.
        lengths: tokens of each document; they add up to T.
        scale: what q·k is multiplied by.
        window: a token sees so many tokens, itself among them; None: all before it.
        softcap: scores s become c tanh(s / c) (Gemma 2, arXiv 2408.00118 §2).
        dropout: of the attention weights.
    """
    dtype = q.dtype
    if is_faster_wide(q.device):
        q, k, v = q.float(), k.float(), v.float()
    qs, ks, vs = (torch.split(x, list(lengths)) for x in (q, k, v))
    with torch.autocast(q.device.type, enabled=False):  # which would have it in 16 bits again
        seen = [_attend_document(q, k, v, scale, window, softcap, dropout) for q, k, v in zip(qs, ks, vs, strict=True)]
    return (seen[0] if len(seen) == 1 else torch.cat(seen)).to(dtype)


def is_faster_wide(device: torch.device) -> bool:
    """Whether attention is faster in float32 than in 16 bits, as on CPUs without matrix instructions (AMX).

    torch's flash kernel for CPUs took 1.3 times as long in bfloat16 there, and 2.5 times with short documents.
    """
    return device.type == "cpu" and not has_matrix_unit()


def _attend_document(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    dropout: float,
) -> torch.Tensor:
    """The same for one document."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    n_tokens, n_groups = q.shape[2], q.shape[1] // k.shape[1]
    is_windowed = window is not None and window < n_tokens
    if softcap is None:
        mask = build_window(n_tokens, window, q.device) if is_windowed and window else None
        seen = functional.scaled_dot_product_attention(
            q, k, v, mask, dropout, is_causal=mask is None, scale=scale, enable_gqa=n_groups > 1
        )
        return seen[0].transpose(0, 1)
    k, v = k.repeat_interleave(n_groups, 1), v.repeat_interleave(n_groups, 1)
    scores = torch.tanh(q @ k.transpose(2, 3) * (scale / softcap)) * softcap
    mask = build_window(n_tokens, window if is_windowed else None, q.device)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1, dtype=torch.float32).to(q.dtype)
    return (functional.dropout(weights, dropout) @ v)[0].transpose(0, 1)


@lru_cache(maxsize=4)  # they grow with the square of a document; to make one costs little beside attention itself
def build_window(n_tokens: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Which tokens (columns) each token (row) sees: bool (n_tokens, n_tokens)."""
    return torch.ones(n_tokens, n_tokens, dtype=torch.bool, device=device).tril_().triu_(1 - (window or n_tokens))
