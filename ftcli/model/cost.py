"""The arithmetic of training: floating-point operations, counted from the model's own modules.

    per token    forward 2 P, gradients of inputs 2 P, of trained weights 2 P; again 2 P with checkpointing
    attention    per layer and pair of positions that see each other: 2 GEMMs forward, 5 backward (flash attention)

The head runs at trained positions only. Norms, activations and the optimizer are left out: below 1 %.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ftcli.model.target import list_modules, plan_targets
from ftcli.recipe import Recipe


@dataclass(frozen=True)
class TokenCounts:
    """What an epoch holds; ``n_pairs`` counts positions that see each other: the sum of length² / 2."""

    n_tokens: int
    n_targets: int
    n_pairs: int


def count_flops(skeleton: Any, recipe: Recipe, counts: TokenCounts) -> int:
    """The operations of training on ``counts``; a multiply and an add are two.

    Args:
        skeleton: the model, on the meta device.
        recipe: says what is trained, and whether activations are computed twice.
        counts: of all that is trained on.
    """
    head = skeleton.get_output_embeddings()
    n_head = head.weight.numel() if head is not None else 0
    n_linear = sum(_count_weights(module) for module in skeleton.modules() if module is not head)
    n_lora = 0
    if recipe.peft and recipe.peft.adapter is None:
        modules = dict(skeleton.named_modules())
        for name in plan_targets(list_modules(skeleton), recipe.peft).modules:
            n_lora += recipe.peft.r * sum(modules[name].weight.shape)
    again = 1 if recipe.train.gradient_checkpointing else 0
    trains_all = 0 if recipe.peft else 1
    body = n_linear * (2 + 2 + 2 * again + 2 * trains_all) + n_lora * (6 + 2 * again)
    attention = 2 * _measure_attention(skeleton) * (2 + 5 + 2 * again)
    return body * counts.n_tokens + n_head * (4 + 2 * trains_all) * counts.n_targets + attention * counts.n_pairs


def _count_weights(module: Any) -> int:
    """The weights of a linear layer; GPT-2's Conv1D is one."""
    is_linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    return int(module.weight.numel()) if is_linear else 0


def _measure_attention(skeleton: Any) -> int:
    """Layers × width of all query heads."""
    config = skeleton.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(config.num_hidden_layers * config.num_attention_heads * head_dim)
