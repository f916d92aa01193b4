"""The catalog against transformers: configs that build, counts to the last digit, and the pinned facts."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ftcli.model.anatomy import describe_model
from ftcli.model.catalog import CATALOG_PATH, CatalogEntry, find_entry, list_entries
from ftcli.model.catalog.make_catalog import parse_literal
from ftcli.model.catalog.table import ROWS
from ftcli.model.dimensions import read_dimensions

# layers, hidden, FFN, query heads, key/value heads, vocabulary, tied, parameters
FACTS: dict[str, tuple[Any, ...]] = {
    "meta-llama/Meta-Llama-3-8B": (32, 4096, 14336, 32, 8, 128256, False, 8_030_261_248),
    "meta-llama/Llama-3.1-8B": (32, 4096, 14336, 32, 8, 128256, False, 8_030_261_248),
    "meta-llama/Meta-Llama-3-70B": (80, 8192, 28672, 64, 8, 128256, False, 70_553_706_496),
    "meta-llama/Llama-3.1-70B": (80, 8192, 28672, 64, 8, 128256, False, 70_553_706_496),
    "meta-llama/Llama-3.1-405B": (126, 16384, 53248, 128, 8, 128256, False, 405_853_388_800),
    "meta-llama/Llama-3.2-1B": (16, 2048, 8192, 32, 8, 128256, True, 1_235_814_400),
    "meta-llama/Llama-3.2-3B": (28, 3072, 8192, 24, 8, 128256, True, 3_212_749_824),
    "mistralai/Mistral-7B-v0.1": (32, 4096, 14336, 32, 8, 32000, False, 7_241_732_096),
    "mistralai/Mistral-Small-3.1-24B-Instruct-2503": (40, 5120, 32768, 32, 8, 131072, False, 23_572_403_200),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": (28, 1536, 8960, 12, 2, 151936, False, 1_777_088_000),
    "microsoft/Phi-3-mini-4k-instruct": (32, 3072, 8192, 32, 32, 32064, False, 3_821_079_552),
    "Qwen/Qwen2.5-7B": (28, 3584, 18944, 28, 4, 152064, False, 7_615_616_512),
    "Qwen/Qwen2.5-72B": (80, 8192, 29568, 64, 8, 152064, False, 72_706_203_648),
    "Qwen/Qwen3-0.6B": (28, 1024, 3072, 16, 8, 151936, True, 596_049_920),
    "Qwen/Qwen3-8B": (36, 4096, 12288, 32, 8, 151936, False, 8_190_735_360),
    "openai-community/gpt2": (12, 768, None, 12, None, 50257, True, 124_439_808),
}

# The smallest of each family that transformers builds in every run; the others are slow.
SMALL = (
    "HuggingFaceTB/SmolLM2-135M", "mistralai/Mistral-7B-v0.1", "mistralai/Mixtral-8x7B-v0.1", "microsoft/phi-2",
    "microsoft/Phi-4-mini-instruct", "Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen3-0.6B", "Qwen/Qwen3-30B-A3B",
    "google/gemma-2b", "google/gemma-2-2b-it", "google/gemma-3-270m", "HuggingFaceTB/SmolLM3-3B",
    "allenai/OLMo-2-1124-7B", "bigcode/starcoder2-7b", "openai-community/gpt2",
)  # fmt: skip


def describe(entry: CatalogEntry) -> int:
    """The total that the anatomy counts, once for each config."""
    return _describe_id(entry.same_architecture_as or entry.id)


@cache
def _describe_id(model_id: str) -> int:
    entry = find_entry(model_id)
    assert entry
    return describe_model(read_dimensions(entry.config)).parameters.total


def count_parameters(entry: CatalogEntry) -> int:
    """How many parameters transformers gives the model, tied ones once."""
    values = dict(entry.config)
    if (values.get("rope_scaling") or {}).get("type") == "su":  # longrope's first name, which transformers 5 half reads
        values["rope_scaling"] = {**values["rope_scaling"], "type": "longrope"}
    config = AutoConfig.for_model(**values)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_id", FACTS)
def test_pinned_facts(model_id: str) -> None:
    entry = find_entry(model_id)
    assert entry
    config = AutoConfig.for_model(**entry.config)
    *shape, parameters = FACTS[model_id]
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    found = [getattr(config, name, None) for name in names]
    assert [*found, config.vocab_size, config.tie_word_embeddings] == shape
    assert count_parameters(entry) == describe(entry) == parameters


def test_entries_are_found_in_any_case_and_name_their_source() -> None:
    entry = find_entry("Meta-LLAMA/llama-3.1-8b")
    assert entry
    assert entry.id == "meta-llama/Llama-3.1-8B"
    assert find_entry("meta-llama/Llama-9") is None
    for entry in list_entries():
        assert re.fullmatch(r"[0-9a-f]{40}", entry.source.commit)
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", entry.source.repository)
        assert entry.config["model_type"]


def test_catalog_is_what_its_tables_say() -> None:
    entries = {entry.id: entry for entry in list_entries()}
    assert sorted(entries, key=str.casefold) == list(entries)
    assert {model_id for row in ROWS for model_id in (row.id, *row.names, *row.twins)} == set(entries)
    for row in ROWS:
        assert entries[row.id].source == row.source
        for twin in row.twins:
            assert entries[twin].same_architecture_as == row.id
            assert entries[twin].config is entries[row.id].config
    catalog = json.loads(CATALOG_PATH.read_text(encoding="utf-8"))
    assert catalog["schema"] == 1
    assert {model["config"] for model in catalog["models"].values()} == set(catalog["configs"])
    assert CATALOG_PATH.stat().st_size < 130_000


def test_published_counts_agree_to_their_digits() -> None:
    stated = {entry.id: entry for entry in list_entries() if entry.published}
    assert len(stated) > 40
    for entry in stated.values():
        assert entry.published
        text = entry.published.parameters
        digits = len(text.rstrip("B").partition(".")[2])
        unit = 10 ** (9 - digits) if text.endswith("B") else 1
        found = describe(entry)
        assert abs(found - float(text.rstrip("B")) * (1e9 if text.endswith("B") else 1)) < unit, (entry.id, text, found)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_id", SMALL)
def test_one_of_each_family_counts_as_transformers_does(model_id: str) -> None:
    entry = find_entry(model_id)
    assert entry
    assert describe(entry) == count_parameters(entry)


def test_small_entries_cover_every_family() -> None:
    families = {entry.id: read_dimensions(entry.config).family for entry in list_entries()}
    assert {families[model_id] for model_id in SMALL} == set(families.values())
    assert all(describe(entry) > 0 for entry in list_entries())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("entry", list_entries(), ids=lambda entry: entry.id)
def test_every_entry_counts_as_transformers_does(entry: CatalogEntry) -> None:
    assert describe(entry) == count_parameters(entry)


def test_literals_are_read_in_both_spellings_and_nothing_runs() -> None:
    assert parse_literal('x = {"a": [true, None], "b": {"c": null}} {"d": 1}', "here") == {
        "a": [True, None],
        "b": {"c": None},
    }
    assert parse_literal('set {3, 7} then {"a": 1}', "here") == {"a": 1}
    with pytest.raises(ValueError, match="malformed"):
        parse_literal("{'a': print()}", "here")
