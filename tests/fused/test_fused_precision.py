"""The fast path in 16 bits, and over NF4 weights: as near to float32 as the plain path is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fused_models import (
    KINDS,
    Outcome,
    add_lora,
    build_flat,
    build_random,
    join,
    measure_distance,
    take_loss,
    take_step,
)
from torch import nn

from ftcli.fused.layer import fuse
from ftcli.fused.projection import read_projection
from ftcli.model.build import promote_trained

LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


def take_three(
    kind: str, dtype: torch.dtype, settings: dict[str, Any] | None, *, autocast: bool, tied: bool = True
) -> list[Outcome]:
    """A step in float32, and in ``dtype`` on the plain and on the fast path, from the same weights."""
    wide, narrow = build_random(kind, tied=tied), build_random(kind, tied=tied)
    wide.to(dtype).float()
    if settings is None:
        narrow.to(dtype).float()
    else:
        wide, narrow = add_lora(wide, **settings), add_lora(narrow.to(dtype), **settings)
    promote_trained(narrow)
    narrow.load_state_dict(wide.state_dict())
    batch = build_flat()
    outcomes = [take_step(wide.train(), batch)]
    with torch.autocast("cpu", dtype, enabled=autocast):
        outcomes.append(take_step(narrow.train(), batch))
        assert fuse(narrow)
        outcomes.append(take_step(narrow, batch))
    return outcomes


def check_near(exact: Outcome, plain: Outcome, fast: Outcome, dtype: torch.dtype) -> None:
    """None if the fast path is about as far from float32 as the plain one."""
    step = torch.finfo(dtype).eps
    assert fast.loss == pytest.approx(exact.loss, rel=step)
    assert {name: g.dtype for name, g in fast.gradients.items()} == {
        name: g.dtype for name, g in plain.gradients.items()
    }
    assert measure_distance(join(exact), join(fast)) < 1.25 * measure_distance(join(exact), join(plain))
    assert torch.cosine_similarity(join(exact), join(fast), dim=0) > 1 - step / 10
    for name, gradient in exact.gradients.items():
        limit = 2 * measure_distance(gradient, plain.gradients[name]) + step
        assert measure_distance(gradient, fast.gradients[name]) < limit, name


@pytest.mark.parametrize("kind", KINDS)
def test_lora_on_a_base_in_bfloat16(kind: str) -> None:
    check_near(*take_three(kind, torch.bfloat16, {}, autocast=False), torch.bfloat16)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "phi3", "gemma2", "gemma3"])
@pytest.mark.parametrize("tied", [True, False])
def test_all_weights_under_autocast(kind: str, tied: bool) -> None:
    check_near(*take_three(kind, torch.bfloat16, None, autocast=True, tied=tied), torch.bfloat16)


@pytest.mark.parametrize(
    "kind", ["llama", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("gemma3", "phi3"))]
)
@pytest.mark.parametrize(
    ("settings", "tied"),
    [
        ({"modules_to_save": ["embed_tokens"]}, False),
        ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
        ({"modules_to_save": ["lm_head"]}, False),
        ({"modules_to_save": ["input_layernorm", "model.norm"]}, False),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lora_beside_weights_trained_in_float32(
    kind: str, settings: dict[str, Any], tied: bool, dtype: torch.dtype
) -> None:
    """A trained embedding's output is in float32: only autocast makes it fit the frozen weights."""
    check_near(*take_three(kind, dtype, settings, autocast=True, tied=tied), dtype)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_lora_on_a_base_in_float16(kind: str) -> None:
    check_near(*take_three(kind, torch.float16, {}, autocast=True), torch.float16)


def pack(model: Any, dtype: torch.dtype, **options: Any) -> tuple[Any, Any]:
    """``model`` with its projections in 4 bits, and an ordinary one of what these stand for."""
    import bitsandbytes as bnb
    from bitsandbytes.functional import dequantize_4bit

    packed, plain = model.to(dtype), build_random(model.config.model_type.removesuffix("_text")).to(dtype)
    plain.load_state_dict(packed.state_dict())
    for name, module in list(packed.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            has_bias = module.bias is not None
            layer = bnb.nn.Linear4bit(
                module.in_features,
                module.out_features,
                has_bias,
                compute_dtype=dtype,
                quant_storage=torch.uint8,
                **options,
            )
            layer.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, **options)
            layer.bias = module.bias
            layer = layer.to("cpu")
            layer.support_avx512bf16_for_cpu = False
            packed.set_submodule(name, layer)
            whole = dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(dtype)
            plain.get_submodule(name).weight.data.copy_(whole)
    return packed.requires_grad_(False), plain.requires_grad_(False)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "phi3", "gemma3"])
@pytest.mark.parametrize("options", [{"quant_type": "nf4", "compress_statistics": True}, {"quant_type": "fp4"}])
def test_4_bits_are_what_they_stand_for(kind: str, options: dict[str, Any]) -> None:
    batch = build_flat()
    packed, plain = (add_lora(m) for m in pack(build_random(kind), torch.float32, **options))
    layers = [m for name, m in packed.named_modules() if name.endswith("_proj")]
    assert all(type(layer.base_layer).__name__ == "Linear4bit" for layer in layers)
    assert all(read_projection(layer) for layer in layers)
    plain.load_state_dict({k: v for k, v in packed.state_dict().items() if "lora_" in k}, strict=False)
    on_plain_path = [take_step(model, batch) for model in (packed, plain)]
    assert fuse(packed)
    assert fuse(plain)
    on_fast_path = [take_step(model, batch) for model in (packed, plain)]
    assert on_fast_path[0].loss == on_fast_path[1].loss
    assert torch.equal(join(on_fast_path[0]), join(on_fast_path[1]))
    for outcome in on_plain_path:
        assert measure_distance(join(outcome), join(on_fast_path[0])) < 2e-6


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_4_bits_in_bfloat16_are_as_near_as_on_the_plain_path(kind: str) -> None:
    batch = build_flat()
    packed, plain = (add_lora(m) for m in pack(build_random(kind), torch.bfloat16, quant_type="nf4"))
    plain.load_state_dict({k: v for k, v in packed.state_dict().items() if "lora_" in k}, strict=False)
    exact, before = take_step(plain.float(), batch), take_step(packed, batch)
    assert fuse(packed)
    check_near(exact, before, take_step(packed, batch), torch.bfloat16)
    with torch.no_grad():
        take_loss(packed.eval(), batch)
    packed.train()
    check_near(exact, before, take_step(packed, batch), torch.bfloat16)


def test_a_trained_bias_of_a_4_bit_layer_has_its_gradient() -> None:
    """An adapter with ``bias: all`` trains them."""
    batch = build_flat()
    packed, _ = pack(build_random("qwen2"), torch.float32, quant_type="nf4")
    model = add_lora(packed, bias="all")
    assert any(name.endswith("q_proj.base_layer.bias") and p.requires_grad for name, p in model.named_parameters())
    plain = take_step(model, batch)
    assert fuse(model)
    fast = take_step(model, batch)
    assert fast.gradients.keys() == plain.gradients.keys()
    assert measure_distance(join(plain), join(fast)) < 2e-6
