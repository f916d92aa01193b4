"""The fast path against transformers' and PEFT's own forward and backward, of one step, in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fused_models import (
    KINDS,
    add_lora,
    build_flat,
    build_random,
    check_equal,
    join,
    measure_distance,
    take_loss,
    take_step,
)
from torch import nn

from ftcli.fused.checkpoint import keep_attention
from ftcli.fused.family import FAMILIES
from ftcli.fused.layer import fuse, unwrap
from ftcli.fused.projection import read_projection
from ftcli.model.build import enable_checkpointing

TOKENS = build_flat().input_ids[0, :3].tolist()
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]

SETTINGS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True, "r": 5},
    "patterns": {"rank_pattern": {"q_proj": 3, r"^model\.layers\.1\.mlp\.up_proj$": 7}, "alpha_pattern": {"k_proj": 3}},
    "pattern by a regex": {"rank_pattern": {r".*layers\.0\..*": 2}, "alpha_pattern": {r"layers\.1\.self_attn\..*": 1}},
    "attention": {"target_modules": ATTENTION},
    "q": {"target_modules": ["q_proj"]},
    "k and up": {"target_modules": ["k_proj", "up_proj"]},
    "down": {"target_modules": ["down_proj"]},
    "one layer": {"target_modules": ATTENTION, "layers_to_transform": [1]},
    "dora": {"use_dora": True},
    "dora on one rank of many": {"use_dora": True, "rank_pattern": {"v_proj": 2}},
    "norms": {"modules_to_save": ["input_layernorm", "post_attention_layernorm", "model.norm"]},
    "embedding": {"modules_to_save": ["embed_tokens"]},
    "a projection": {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["v_proj", "o_proj"]},
    "biases": {"bias": "all"},
    "biases of adapted": {"bias": "lora_only", "target_modules": ["q_proj", "down_proj"]},
    "pissa": {"init_lora_weights": "pissa"},
    "rows of the embedding": {"trainable_token_indices": {"embed_tokens": TOKENS}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_family_is_equal(kind: str) -> None:
    check_equal(add_lora(build_random(kind)), build_flat())


def test_each_known_family_is_tested() -> None:
    kinds = {build_random(kind).config.model_type for kind in KINDS}
    assert kinds == FAMILIES.keys()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keeps_attention", [pytest.param(False, marks=pytest.mark.slow), True])
def test_checkpointing_changes_no_bit(kind: str, keeps_attention: bool) -> None:
    model, batch = add_lora(build_random(kind), lora_dropout=0.2), build_flat()
    assert fuse(model)
    whole = take_step(model, batch)
    enable_checkpointing(unwrap(model), keep_attention if keeps_attention else None)
    again = take_step(model, batch)
    assert again.loss == whole.loss
    assert torch.equal(join(again), join(whole))


@pytest.mark.parametrize("kind", ["llama", pytest.param("gemma3", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_lora_are_equal(kind: str, name: str) -> None:
    found = check_equal(add_lora(build_random(kind, tied=False), **SETTINGS[name]), build_flat())
    assert len(found.gradients) >= 2


def test_a_bias_of_b_is_equal() -> None:
    model = build_random("llama", attention_bias=True, mlp_bias=True)
    found = check_equal(add_lora(model, lora_bias=True), build_flat())
    assert any(name.endswith("lora_B.default.bias") for name in found.gradients)


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ["lm_head", "v_proj"]},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": {"embed_tokens": TOKENS, "lm_head": TOKENS}},
    ],
)
def test_a_trained_head_of_its_own_is_equal(changes: dict[str, Any]) -> None:
    found = check_equal(add_lora(build_random("gemma2", tied=False), **changes), build_flat())
    assert any("lm_head" in name for name in found.gradients)


@pytest.mark.parametrize(
    "changes",
    [
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"trainable_token_indices": TOKENS},
    ],
)
def test_a_trained_head_that_is_the_embedding_is_equal(changes: dict[str, Any]) -> None:
    check_equal(add_lora(build_random("qwen2", tied=True), **changes), build_flat())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [pytest.param(True, marks=pytest.mark.slow), False])
def test_all_weights_trained_are_equal(kind: str, tied: bool) -> None:
    found = check_equal(build_random(kind, tied=tied).train(), build_flat())
    assert any("norm" in name for name in found.gradients)


@pytest.mark.parametrize("kind", ["llama", "phi3", "gemma2", "gemma3", "smollm3"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_transformers_own_attention_is_equal(kind: str, attention: str) -> None:
    """Windows are shorter than documents, and documents are kept apart by transformers' mask."""
    if (kind, attention) == ("gemma2", "sdpa"):
        pytest.skip("transformers' sdpa has no soft caps")
    model = build_random(kind)
    model.set_attn_implementation(attention)
    check_equal(add_lora(model), build_flat(), with_attention=False)


@pytest.mark.parametrize(
    ("kind", "rope"),
    [
        ("llama", {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}),
        ("llama", {"rope_type": "linear", "factor": 2.0}),
        ("qwen2", {"rope_type": "yarn", "factor": 4.0}),
        ("mistral", {"rope_type": "dynamic", "factor": 2.0}),
        ("phi3", {"rope_type": "default", "partial_rotary_factor": 0.5}),
        ("phi3", {"rope_type": "longrope", "short_factor": [1.0, 1.5] * 4, "long_factor": [2.0, 4.0] * 4}),
        ("smollm3", {"rope_type": "yarn", "factor": 2.0}),
    ],
)
@pytest.mark.parametrize("context", [pytest.param(512, marks=pytest.mark.slow), 24])
def test_scaled_and_partial_rotation_is_equal(kind: str, rope: dict[str, Any], context: int) -> None:
    """A context of 24 is what the longest document exceeds."""
    more = {"original_max_position_embeddings": 24} if rope["rope_type"] in {"llama3", "yarn", "longrope"} else {}
    outer = {"original_max_position_embeddings": 24} if rope["rope_type"] == "longrope" else {}
    model = build_random(
        kind, rope_parameters={"rope_theta": 100.0, **rope, **more}, max_position_embeddings=context, **outer
    )
    check_equal(add_lora(model), build_flat())


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("gemma2", {"attn_logit_softcapping": 2.0, "final_logit_softcapping": None}),
        ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": 2.0}),
        ("gemma2", {"sliding_window": 2}),
        ("gemma3", {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 3}),
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": 33}),
        ("mistral", {"sliding_window": 32}),
        ("qwen2", {"use_sliding_window": False, "layer_types": None}),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 5, "layer_types": None}),
        ("smollm3", {"attention_bias": True, "mlp_bias": True}),
        ("qwen3", {"attention_bias": True}),
        ("llama", {"num_key_value_heads": 4}),
        ("llama", {"num_key_value_heads": 1, "head_dim": 8}),
        ("llama", {"hidden_act": "gelu"}),
        ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
        ("llama", {"rms_norm_eps": 0.1}),
        ("gemma", {"hidden_act": "gelu", "hidden_activation": None}),
    ],
)
def test_what_a_config_asks_for_is_equal(kind: str, changes: dict[str, Any]) -> None:
    check_equal(add_lora(build_random(kind, **changes)), build_flat())


@pytest.mark.parametrize("n", [1, 2, 7])
def test_documents_of_a_token_are_equal(n: int) -> None:
    check_equal(add_lora(build_random("qwen3")), build_flat((1, n, 1, 9, 1)))


def test_dropout_draws_pefts_masks() -> None:
    """One seed gives one loss, although q, k and v are drawn for before any is multiplied."""
    for kind in ("llama", "phi3", "gemma3"):
        model, batch = add_lora(build_random(kind), lora_dropout=0.3), build_flat()
        plain = take_step(model, batch)
        assert fuse(model)
        fast, other = take_step(model, batch), take_step(model, batch, seed=6)
        assert fast.loss == pytest.approx(plain.loss, rel=1e-6)
        assert measure_distance(join(plain), join(fast)) < 2e-6
        assert measure_distance(join(plain), join(other)) > 0.01
        model.eval()
        assert take_step(model, batch).loss == take_step(model, batch, seed=6).loss


def test_dropout_of_one_rate_drops_that_share() -> None:
    from ftcli.fused.projection import project

    base = nn.Sequential(nn.Linear(64, 64, bias=False))
    model = add_lora_to(base, lora_dropout=0.25)
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.base_layer.weight.zero_()
        layer.lora_A["default"].weight.copy_(torch.eye(64))
        layer.lora_B["default"].weight.copy_(torch.eye(64) / layer.scaling["default"])
        (seen,) = project(torch.ones(2000, 64), [layer])
    assert seen.unique().tolist() == pytest.approx([0, 4 / 3])
    assert (seen == 0).float().mean().item() == pytest.approx(0.25, abs=0.005)


def test_dropout_of_attention_is_drawn_in_training_alone() -> None:
    model, batch = add_lora(build_random("llama", attention_dropout=0.3)), build_flat()
    assert fuse(model)
    assert take_step(model, batch).loss != take_step(model, batch, seed=6).loss
    model.eval()
    assert take_step(model, batch).loss == take_step(model, batch, seed=6).loss


def test_a_disabled_adapter_is_the_base() -> None:
    model, batch = add_lora(build_random("qwen2", tied=False), modules_to_save=["embed_tokens"]), build_flat()
    with model.disable_adapter():
        plain = take_loss(model, batch)
    assert fuse(model)
    adapted = take_step(model, batch).loss
    with model.disable_adapter():
        assert take_loss(model, batch) == pytest.approx(plain, rel=1e-6)
    assert take_step(model, batch).loss == adapted != pytest.approx(plain, rel=1e-3)


def test_a_merged_adapter_counts_once() -> None:
    model, batch = add_lora(build_random("llama")), build_flat()
    model.eval()
    with torch.no_grad():
        assert fuse(model)
        before = take_loss(model, batch)
        model.merge_adapter()
        assert take_loss(model, batch) == pytest.approx(before, rel=1e-5)
        model.unmerge_adapter()
        assert take_loss(model, batch) == pytest.approx(before, rel=1e-5)
        assert take_loss(model.merge_and_unload(), batch) == pytest.approx(before, rel=1e-5)


def test_two_adapters_are_as_on_the_plain_path() -> None:
    from peft import LoraConfig

    model, batch = add_lora(build_random("llama")), build_flat()
    model.add_adapter("second", LoraConfig(r=3, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    check_equal(model, batch)
    assert fuse(model)
    model.set_adapter("second")
    check_equal(model, batch)


@pytest.mark.parametrize(
    ("changes", "is_covered"),
    [({}, True), ({"lora_dropout": 0.5}, True), ({"use_dora": True}, False), ({"lora_bias": True}, False)],
)
def test_what_is_covered_takes_the_fast_path(changes: dict[str, Any], is_covered: bool) -> None:
    """Else the tests above would hold the plain path against itself."""
    model = add_lora(build_random("llama"), **changes)
    layers = [module for name, module in model.named_modules() if name.endswith("_proj")]
    assert len(layers) == 14
    assert {read_projection(layer) is not None for layer in layers} == {is_covered}


def add_lora_to(model: nn.Module, **settings: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=64, lora_alpha=8, target_modules=["0"], **settings)).train()
