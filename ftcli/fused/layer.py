"""The modules of a known family with the fast path's forward in place of their own.

    CausalLM     blocks as transformers runs them ─▶ loss of the labelled rows, or logits where none are asked for
    Attention    q, k, v together ─▶ head norms ─▶ rotate ─▶ attend within documents ─▶ o
    MLP          gate, up together ─▶ gate ─▶ down
    RMSNorm      normalize

Only instances are touched: parameters, names and files stay transformers' and PEFT's. A module goes its own way
again where the fast one does not apply: with a cache, for one token at a time, without ``documents``.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ftcli.fused.attention import attend
from ftcli.fused.family import FAMILIES, Family
from ftcli.fused.gate import Activation, apply_gate
from ftcli.fused.head import compute_losses
from ftcli.fused.norm import normalize
from ftcli.fused.projection import project, project_last
from ftcli.fused.rope import rotate

_ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def fuse(model: Any, *, with_attention: bool = True) -> bool:
    """Whether the modules of ``model``, of a known family, now take the fast path; of any other, nothing changes.

    Args:
        model: a causal language model of transformers, or PEFT's wrapper of one.
        with_attention: False leaves attention to transformers and the implementation that the model was loaded with.
    """
    base = unwrap(model)
    config = base.config
    family = FAMILIES.get(config.model_type)
    if family is None:
        return False
    name = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", "")
    activation = _ACTIVATIONS.get(str(name))
    for module in base.modules():
        name = type(module).__name__
        if name == f"{family.prefix}RMSNorm":
            module.forward = partial(forward_norm, module, family)
        elif name == f"{family.prefix}MLP" and activation:
            module.forward = partial(forward_ffn, module, family, activation)
        elif name == f"{family.prefix}Attention" and with_attention:
            module.forward = partial(forward_attention, module, family)
    own = inspect.signature(base.forward)
    base.forward = partial(forward_losses, base, with_attention)
    base.forward.__signature__ = own  # which generation reads, to ask for the last logits only
    base.is_fused = True
    return True


def unfuse(model: Any) -> None:
    """Nothing; ``model`` goes its own way again."""
    for module in model.modules():
        forward = vars(module).get("forward")
        if isinstance(forward, partial) and forward.func.__module__ == __name__:
            del module.forward
        vars(module).pop("is_fused", None)


def is_fused(model: Any) -> bool:
    """Whether ``model``, wrapped or not, gives losses when it is called with ``documents``, ``rows`` and ``labels``."""
    return getattr(unwrap(model), "is_fused", False) is True


def unwrap(model: Any) -> Any:
    """The causal language model of transformers inside of what accelerate and PEFT put around it."""
    while hasattr(model, "module"):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def forward_losses(
    model: Any,
    with_attention: bool,
    input_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    *,
    documents: Sequence[int] | None = None,
    rows: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """-log p of ``labels`` in float32, shape (rows,), and no logits; without ``rows`` what the model itself gives.

    Args:
        model: the causal language model.
        with_attention: as in ``fuse``.
        input_ids: flat, (1, T).
        attention_mask: for the model's own forward.
        documents: lengths of the documents side by side, which add up to T.
        rows: the places whose output predicts a label, (rows,).
        labels: the ids to predict there, (rows,).
        kwargs: what else the model's own forward takes.
    """
    if documents is None or rows is None or labels is None:
        if documents is not None and with_attention:
            attention_mask = _omit_mask(input_ids)
        more = kwargs if documents is None else kwargs | {"documents": documents}
        return type(model).forward(model, input_ids, attention_mask, labels=labels, **more)
    positions = kwargs.get("position_ids")
    hidden = model.base_model(
        input_ids=input_ids,
        attention_mask=_omit_mask(input_ids) if with_attention else None,
        position_ids=positions,
        use_cache=False,
        documents=documents,
    ).last_hidden_state[0, rows]
    head, softcap = model.get_output_embeddings(), getattr(model.config, "final_logit_softcapping", None)
    is_trained = any(p.requires_grad for p in head.parameters())
    if type(head) is nn.Linear and not (is_trained and torch.is_grad_enabled()):
        return compute_losses(hidden, head, labels, softcap)
    logits = head(hidden).float()
    if softcap:
        logits = torch.tanh(logits / softcap) * softcap
    return functional.cross_entropy(logits, labels, reduction="none")


def _omit_mask(input_ids: torch.Tensor | None) -> torch.Tensor:
    """A mask that no layer reads: transformers hands on what has four dimensions, and else makes one of T · T."""
    return torch.empty(1, 1, 1, 1, device=input_ids.device if input_ids is not None else None)


def forward_attention(
    module: Any,
    family: Family,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    attention_mask: torch.Tensor | None = None,
    past_key_values: Any = None,
    *,
    documents: Sequence[int] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What attention adds to ``hidden_states`` (1, T, width), and None for its weights."""
    if documents is None:
        own = (hidden_states, position_embeddings, attention_mask, past_key_values)
        return type(module).forward(module, *own, **kwargs)  # type: ignore[no-any-return]
    q, k, v = _project_heads(module, family, hidden_states[0])
    if family.has_head_norms:
        q, k = module.q_norm(q), module.k_norm(k)
    if not family.rotates or getattr(module, family.rotates):
        cos, sin = (table[0] for table in position_embeddings)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    seen = attend(
        q,
        k,
        v,
        documents,
        scale=module.scaling,
        window=_find_window(module, family),
        softcap=module.attn_logit_softcapping if family.has_softcap else None,
        dropout=module.attention_dropout if module.training else 0.0,
    )
    (out,) = project(seen.flatten(1), [module.o_proj])
    return out[None], None


def _find_window(module: Any, family: Family) -> int | None:
    """How many tokens a token of this layer sees, itself among them; None: all before it."""
    if family.window == "none":
        return None
    return getattr(module if family.window == "module" else module.config, "sliding_window", None)


def _project_heads(module: Any, family: Family, x: torch.Tensor) -> list[torch.Tensor]:
    """q, k and v of ``x`` (T, width), each (T, heads, head_dim)."""
    if family.is_merged:
        (merged,) = project(x, [module.qkv_proj])
        keys = module.config.num_key_value_heads * module.head_dim
        parts = torch.split(merged, [merged.shape[-1] - 2 * keys, keys, keys], dim=-1)
    else:
        parts = tuple(project(x, [module.q_proj, module.k_proj, module.v_proj]))
    return [part.view(len(x), -1, module.head_dim) for part in parts]


def forward_ffn(module: Any, family: Family, activation: Activation, x: torch.Tensor) -> torch.Tensor:
    """What the FFN adds to ``x`` (1, T, width)."""
    if x.shape[1] == 1:  # one token at a time is decoding, for which bitsandbytes has products of its own
        return type(module).forward(module, x)  # type: ignore[no-any-return]
    if family.is_merged:
        gate, up = project(x, [module.gate_up_proj])[0].chunk(2, dim=-1)
    else:
        gate, up = project(x, [module.gate_proj, module.up_proj])
    return project_last(apply_gate(gate, up, activation), module.down_proj)


def forward_norm(module: Any, family: Family, x: torch.Tensor) -> torch.Tensor:
    """``x`` normalised."""
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    return normalize(x, module.weight, eps, family.norm_offset)
