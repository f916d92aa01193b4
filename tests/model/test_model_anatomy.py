"""Counts against transformers on the meta device, published sizes, and files that contradict their config."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ftcli.errors import ContentError
from ftcli.model.anatomy import describe_model
from ftcli.model.dimensions import read_dimensions, read_gguf_dimensions
from ftcli.model.layout import FAMILIES, locate_tensor, plan_tensors, translate_gguf_name
from ftcli.store.tensor import TensorEntry

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 200,
    "pad_token_id": 0,
}
EXTRA: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48},
}
LLAMA_8B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}


def build_reference(family: str, **changes: Any) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """The config as it is saved, and transformers' own parameters for it."""
    keys = {**SMALL, **EXTRA.get(family, {}), **changes}
    if family == "gpt2":
        keys = {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 200, "n_positions": 128, **changes}
    config = AutoConfig.for_model(family, **keys)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return config.to_diff_dict(), {name: tuple(p.shape) for name, p in model.named_parameters()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_families_have_the_parameters_that_transformers_gives_them(family: str) -> None:
    for changes in ({}, {"tie_word_embeddings": True}):
        config, reference = build_reference(family, **changes)
        planned = plan_tensors(read_dimensions(config))
        assert sum(map(math.prod, planned.values())) == sum(map(math.prod, reference.values()))
        if "moe" not in family and family != "mixtral":  # their experts are one 3-D tensor in memory
            assert planned == reference


@pytest.mark.parametrize("changes", [{"attention_bias": True}, {"mlp_bias": True}, {"head_dim": 24}])
def test_biases_and_head_sizes_are_counted(changes: dict[str, Any]) -> None:
    config, reference = build_reference("llama", **changes)
    assert plan_tensors(read_dimensions(config)) == reference


def test_llama_3_8b_to_the_last_digit() -> None:
    anatomy = describe_model(read_dimensions(LLAMA_8B))
    counts = anatomy.parameters
    assert (counts.total, counts.embedding, counts.head) == (8_030_261_248, 525_336_576, 525_336_576)
    row = anatomy.layers[0]
    assert (row.attention, row.ffn, row.norm) == (41_943_040, 176_160_768, 8_192)
    assert anatomy.weigh()["bf16"] == 16_060_522_496
    assert round(anatomy.weigh_gguf()["q4_k_m"] / 1e9, 2) == 4.91
    assert anatomy.dimensions.attention_kind == "GQA 4:1"
    assert anatomy.dimensions.count_kv_bytes() == 131_072


def test_a_token_passes_through_some_experts() -> None:
    config, _ = build_reference("qwen3_moe")
    counts = describe_model(read_dimensions(config)).parameters
    experts = 3 * 4 * 3 * 32 * 64
    assert counts.total - counts.active == experts // 2


def test_sliding_windows_of_gemma_3_and_the_cache_they_save() -> None:
    config, _ = build_reference("gemma3_text", num_hidden_layers=12, sliding_window=512)
    for key in ("layer_types", "rope_parameters"):
        config.pop(key, None)
    dimensions = read_dimensions(config)
    assert [layer for layer, window in enumerate(dimensions.windows) if window is None] == [5, 11]
    per_position = dimensions.count_kv_bytes() // 12
    assert dimensions.count_kv_bytes_at(4096) == per_position * (10 * 512 + 2 * 4096)


def test_gguf_metadata_give_the_same_dimensions() -> None:
    metadata = {
        "general.architecture": "llama",
        "llama.embedding_length": 4096,
        "llama.block_count": 32,
        "llama.attention.head_count": 32,
        "llama.attention.head_count_kv": 8,
        "llama.feed_forward_length": 14336,
        "llama.context_length": 131072,
    }
    found = read_gguf_dimensions(metadata, 128256, is_tied=False, where="x.gguf")
    assert plan_tensors(found) == plan_tensors(read_dimensions(LLAMA_8B))
    assert translate_gguf_name("blk.3.attn_output.weight") == "model.layers.3.self_attn.o_proj.weight"


def list_entries(config: dict[str, Any]) -> list[TensorEntry]:
    planned = plan_tensors(read_dimensions(config))
    return [TensorEntry(n, "BF16", s, 2 * math.prod(s), "model.safetensors", None) for n, s in planned.items()]


def list_codes(config: dict[str, Any], entries: list[TensorEntry]) -> list[str]:
    return [finding.code for finding in describe_model(read_dimensions(config), entries, config=config).findings]


def test_files_that_contradict_the_config_are_told() -> None:
    config = {**LLAMA_8B, "num_hidden_layers": 2}
    entries = list_entries(config)
    assert list_codes(config, entries) == []
    assert list_codes(config, entries[:-1]) == ["missing_head"]
    assert list_codes({**config, "tie_word_embeddings": True}, entries) == ["tied_head"]
    assert list_codes(config, [e for e in entries if "q_proj" not in e.name]) == ["missing"]
    assert list_codes({**config, "num_key_value_heads": 32}, entries) == ["shape"]
    stranger = TensorEntry("model.layers.0.self_attn.sinks", "BF16", (32,), 64, "model.safetensors", None)
    assert list_codes(config, [*entries, stranger]) == ["unexpected"]
    assert list_codes({**config, "auto_map": {"AutoConfig": "evil.Config"}}, entries) == ["custom_code"]


def test_a_tied_head_in_the_files_is_not_counted_twice() -> None:
    config = {**LLAMA_8B, "num_hidden_layers": 1}
    entries = list_entries(config)
    untied = describe_model(read_dimensions(config), entries).parameters
    tied = describe_model(read_dimensions({**config, "tie_word_embeddings": True}), entries).parameters
    assert untied.total - tied.total == 525_336_576
    assert tied.head == 0


def test_an_unknown_family_is_counted_from_its_headers_only() -> None:
    config = {**LLAMA_8B, "num_hidden_layers": 1, "model_type": "newformer"}
    entries = list_entries({**config, "model_type": "llama"})
    assert describe_model(read_dimensions(config), entries).parameters.ffn == 176_160_768
    with pytest.raises(ContentError, match="newformer"):
        describe_model(read_dimensions(config))


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": None},
        {"hidden_size": "big"},
        {"num_hidden_layers": 10**9},
        {"vocab_size": -1},
        {"num_attention_heads": True},
        {"hidden_size": 0},
        {"intermediate_size": [1, 2]},
    ],
)
def test_nonsense_in_a_config_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ContentError):
        read_dimensions({**LLAMA_8B, **changes})


@pytest.mark.parametrize(
    ("name", "part", "layer"),
    [
        ("model.embed_tokens.weight", "embedding", None),
        ("token_embd.weight", "embedding", None),
        ("output.weight", "head", None),
        ("output_norm.weight", "norm", None),
        ("blk.7.ffn_down_exps.weight", "ffn", 7),
        ("blk.7.attn_q_norm.weight", "norm", 7),
        ("transformer.h.3.attn.c_attn.bias", "attention", 3),
        ("h.3.attn.bias", "buffer", 3),
        ("rope_freqs.weight", "buffer", None),
        ("model.layers.2.block_sparse_moe.experts.1.w2.weight", "ffn", 2),
        ("vision_tower.layers.2.attn.weight", "other", 2),
    ],
)
def test_names_say_where_a_tensor_stands(name: str, part: str, layer: int | None) -> None:
    place = locate_tensor(name)
    assert (place.part, place.layer) == (part, layer)
