"""Presets, names and patterns against models of several families, on the meta device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import build_config, build_model
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config, Qwen2Config

from ftcli.errors import UsageError
from ftcli.model.build import add_lora, count_parameters, list_adapted
from ftcli.model.target import list_modules, plan_layers, plan_targets
from ftcli.recipe import PeftSection


def build_skeleton(config: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def count_lora(skeleton: Any, peft: PeftSection) -> int:
    modules = dict(skeleton.named_modules())
    return sum(peft.r * sum(modules[name].weight.shape) for name in plan_targets(list_modules(skeleton), peft).modules)


LLAMA_3_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
PHI_3_MINI = {
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}
QWEN_2_5_7B = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}


@pytest.mark.parametrize(
    ("config", "counts"),
    [
        (LlamaConfig(**LLAMA_3_8B), (13_631_488, 32_505_856, 41_943_040)),
        (Phi3Config(**PHI_3_MINI, pad_token_id=0), (9_437_184, 19_398_656, 25_165_824)),
        (Qwen2Config(**QWEN_2_5_7B), (10_092_544, 30_277_632, 40_370_176)),
    ],
    ids=["llama-3-8b", "phi-3-mini", "qwen-2.5-7b"],
)
def test_presets_have_the_published_sizes_at_rank_16(config: Any, counts: tuple[int, ...]) -> None:
    skeleton = build_skeleton(config)
    presets = ("attn", "attn+gate_up", "all-linear")
    assert tuple(count_lora(skeleton, PeftSection(target_modules=preset)) for preset in presets) == counts


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3", "gpt2"])
@pytest.mark.parametrize("preset", ["attn", "attn+gate_up", "all-linear"])
@pytest.mark.parametrize("layers", [None, "last:1"])
def test_peft_adapts_what_was_planned(kind: str, preset: str, layers: str | None) -> None:
    model = build_model(kind)
    peft = PeftSection(r=2, target_modules=preset, layers_to_transform=layers)
    planned = plan_targets(list_modules(model), peft)
    wrapped = add_lora(model, peft, planned)
    assert sorted(list_adapted(wrapped)) == sorted(planned.modules)
    assert not any("lm_head" in name or "embed" in name for name in planned.modules)
    assert all("1." in name for name in planned.modules) or layers is None
    assert 0 < count_parameters(wrapped).trainable < 30_000


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target_modules": ["q_porj"]}, r"'q_porj' is no module of this model\nhint: did you mean q_proj\?"),
        ({"target_modules": ["q_proj", "k_prj"]}, "'k_prj' is no module"),
        ({"target_modules": "all-liner"}, r"did you mean all-linear\?"),
        ({"target_modules": r".*\.nothing"}, "matches the full name of no linear layer"),
        ({"target_modules": "[unclosed"}, "no valid regex"),
        ({"target_modules": ["norm"]}, "is a LlamaRMSNorm, which LoRA cannot be put on"),
        ({"target_modules": ["self_attn"]}, "is a LlamaAttention"),
        ({"target_modules": ["lm_head"]}, "trainable_token_indices.*modules_to_save"),
        ({"target_modules": ["embed_tokens"]}, "one matrix"),
        ({"modules_to_save": ["embed_token"]}, r"peft\.modules_to_save: 'embed_token'.*"),
        ({"rank_pattern": {"q_poj": 4}}, r"peft\.rank_pattern: 'q_poj' matches none"),
        ({"layers_to_transform": "0-7"}, "the model has 2 layers, 0 to 1"),
        ({"layers_to_transform": [5]}, "the model has 2 layers"),
        ({"layers_to_transform": "last:3"}, "the model has 2 layers"),
    ],
)
def test_what_matches_nothing_is_named(changes: dict[str, Any], words: str) -> None:
    import re

    with pytest.raises(UsageError) as caught:
        plan_targets(list_modules(build_skeleton(build_config())), PeftSection(**changes))
    assert re.search(words, str(caught.value), re.DOTALL), str(caught.value)


def test_layers() -> None:
    assert plan_layers(None, 30) is None
    assert plan_layers("last:3", 30) == [27, 28, 29]
    assert plan_layers("8-10", 30) == [8, 9, 10]
    assert plan_layers([1, 4], 30) == [1, 4]


def test_an_untied_head_may_be_adapted() -> None:
    skeleton = build_skeleton(build_config(tied=False))
    assert plan_targets(list_modules(skeleton), PeftSection(target_modules=["lm_head"])).modules == ("lm_head",)


def test_a_regex_means_full_names() -> None:
    pattern = r"model\.layers\.[01]\.self_attn\.(q|v)_proj"
    model = build_model()
    planned = plan_targets(list_modules(model), PeftSection(target_modules=pattern))
    assert len(planned.modules) == 4
    assert sorted(list_adapted(add_lora(model, PeftSection(target_modules=pattern), planned))) == sorted(
        planned.modules
    )
