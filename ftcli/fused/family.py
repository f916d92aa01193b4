"""What tells the layers of one family from another's, as far as the fast path must know.

All of them share one layer: normalise, project, turn q and k by their positions, attend, project back; normalise,
widen, gate, narrow. Residuals, scaled embeddings and the norms around a sandwich stay transformers' own, and so does
every number that a layer carries (head size, scale, epsilon). To teach the fast path a family, add its line here;
``tests/fused`` holds every line against transformers and PEFT.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ftcli.recipe import Recipe


@dataclass(frozen=True)
class Family:
    """A family's layer.

    Attributes:
        prefix: of its classes in transformers: ``prefix``Attention, MLP and RMSNorm.
        is_merged: q, k and v are one ``qkv_proj``, gate and up one ``gate_up_proj``.
        has_head_norms: q and k are normalised head by head before they are turned.
        norm_offset: is added to the weights of its norms.
        window: where a layer's sliding window stands: on the module, or in the config for all layers.
        has_softcap: scores are capped by the module's ``attn_logit_softcapping``.
        rotates: the module's flag that says whether it turns q and k at all; empty: it does.
    """

    prefix: str
    is_merged: bool = False
    has_head_norms: bool = False
    norm_offset: float = 0.0
    window: Literal["none", "module", "config"] = "none"
    has_softcap: bool = False
    rotates: str = ""


# config.model_type → its layer. Sources: transformers' models/FAMILY/modeling_FAMILY.py
FAMILIES = {
    "llama": Family("Llama"),
    "mistral": Family("Mistral", window="config"),
    "qwen2": Family("Qwen2", window="module"),
    "qwen3": Family("Qwen3", has_head_norms=True, window="module"),
    "phi3": Family("Phi3", is_merged=True, window="config"),
    "gemma": Family("Gemma", norm_offset=1.0),
    "gemma2": Family("Gemma2", norm_offset=1.0, window="module", has_softcap=True),
    "gemma3_text": Family("Gemma3", has_head_norms=True, norm_offset=1.0, window="module"),
    "smollm3": Family("SmolLM3", window="module", rotates="use_rope"),
}


def is_fast(recipe: Recipe, family: str) -> bool:
    """Whether a run of a model of ``family`` (``model_type``) is forecast as one by the fast path throughout."""
    return recipe.train.fused and recipe.model.attn_implementation is None and family in FAMILIES
