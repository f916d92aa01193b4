"""Small models of the families that the fast path knows, and what one step gives on either path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from conftest import build_model

from ftcli.data.batch import IGNORE_LABEL, Batch
from ftcli.evaluate.loss import compute_loss_sum
from ftcli.fused.layer import fuse, unfuse

LENGTHS = (20, 11, 33, 1, 2)

# what each family is made of, with what is particular to it: windows shorter than a document, biases, no rotation
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 7},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]},
    "qwen3": {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {"sliding_window": 9, "num_key_value_heads": 1},
    "gemma": {"head_dim": 32},
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 20, "final_logit_softcapping": 3.0},
    "gemma3": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "smollm3": {"no_rope_layers": [1, 0]},
}


@dataclass(frozen=True)
class Outcome:
    """What a step gave: the sum of losses, and the gradient of each trained parameter by its name."""

    loss: float
    gradients: dict[str, torch.Tensor]


def build_random(kind: str, *, scale: float = 0.08, seed: int = 0, **changes: Any) -> Any:
    """A model of ``kind`` whose weights are large enough for every part to matter, norms and biases too."""
    model = build_model(kind, seed=seed, **(KINDS.get(kind, {}) | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(scale * torch.randn_like(parameter) + (parameter if parameter.dim() == 1 else 0))
    model.config.use_cache = False
    return model


def add_lora(model: Any, **settings: Any) -> Any:
    """``model`` in PEFT's wrapper, in training mode; A, B and all else that is trained are away from their start."""
    from peft import LoraConfig, get_peft_model

    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **settings}
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return wrapped.train()


def build_flat(lengths: Sequence[int] = LENGTHS, *, vocab_size: int = 384, seed: int = 0) -> Batch:
    """Documents of random tokens side by side; three of five tokens are learned, of each document's first none."""
    generator = torch.Generator().manual_seed(seed)
    n_tokens = sum(lengths)
    ids = torch.randint(vocab_size, (1, n_tokens), generator=generator)
    borders = torch.tensor([0, *lengths]).cumsum(0)
    labels = ids.masked_fill(torch.rand(1, n_tokens, generator=generator) < 0.4, IGNORE_LABEL)
    labels[0, borders[:-1]] = IGNORE_LABEL
    return Batch(
        input_ids=ids,
        labels=labels,
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        cu_seqlens=borders.int(),
        n_targets=int((labels != IGNORE_LABEL).sum()),
        places=("x:1",) * len(lengths),
    )


def take_step(model: Any, batch: Batch, *, seed: int = 5) -> Outcome:
    """The mean loss and its gradients, which ``model`` does not keep."""
    torch.manual_seed(seed)
    model.zero_grad()
    loss = compute_loss_sum(model, batch) / batch.n_targets
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    model.zero_grad()
    return Outcome(loss.item(), found)


def take_loss(model: Any, batch: Batch) -> float:
    """The mean loss."""
    return compute_loss_sum(model, batch).item() / batch.n_targets


def take_exact_step(model: Any, batch: Batch) -> Outcome:
    """The same in float64 throughout, also where transformers' and PEFT's code asks for float32."""
    unfuse(model)
    model.double()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        outcome = take_step(model, batch)
    model.float()
    return outcome


def check_equal(model: Any, batch: Batch, *, with_attention: bool = True) -> Outcome:
    """What the fast path gives, which is what the plain one gives.

    Summed in another order, float32 alone moves a single gradient by up to 1.5e-6 of its norm, the plain path's own
    too. So both are held against the plain path in float64: no gradient is much farther from it than the plain
    path's in float32, and all together lie within 1e-6 of it wherever those of the plain path do.
    """
    plain = take_step(model, batch)
    assert fuse(model, with_attention=with_attention)
    fast = take_step(model, batch)
    exact = take_exact_step(model, batch)
    assert fast.loss == pytest.approx(plain.loss, rel=1e-6)
    assert fast.gradients.keys() == plain.gradients.keys()
    for name, gradient in exact.gradients.items():
        limit = 1e-6 + 1.5 * measure_distance(gradient, plain.gradients[name])
        assert measure_distance(gradient, fast.gradients[name]) <= limit, name
    assert measure_distance(join(exact), join(fast)) < max(1e-6, 1.5 * measure_distance(join(exact), join(plain)))
    return fast


def measure_distance(expected: torch.Tensor, found: torch.Tensor) -> float:
    """The norm of the difference as a share of the norm of what is expected, which is not zero."""
    assert expected.norm() > 0
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def join(outcome: Outcome) -> torch.Tensor:
    """All gradients as one vector, float64."""
    return torch.cat([gradient.flatten().double() for gradient in outcome.gradients.values()])
