"""The catalog against transformers: configs that build, counts to the last digit, and the pinned facts."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ftcli.model.catalog import CATALOG_PATH, CatalogEntry, find_entry, list_entries
from ftcli.model.catalog.make_catalog import ROWS, parse_literal

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
    "microsoft/Phi-3-mini-4k-instruct": (32, 3072, 8192, 32, 32, 32064, False, 3_821_079_552),
    "Qwen/Qwen2.5-7B": (28, 3584, 18944, 28, 4, 152064, False, 7_615_616_512),
    "Qwen/Qwen2.5-72B": (80, 8192, 29568, 64, 8, 152064, False, 72_706_203_648),
    "Qwen/Qwen3-0.6B": (28, 1024, 3072, 16, 8, 151936, True, 596_049_920),
    "Qwen/Qwen3-8B": (36, 4096, 12288, 32, 8, 151936, False, 8_190_735_360),
    "openai-community/gpt2": (12, 768, None, 12, None, 50257, True, 124_439_808),
}


def count_parameters(entry: CatalogEntry) -> int:
    """How many parameters transformers gives the model, tied ones once."""
    config = AutoConfig.for_model(**entry.config)
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
    assert count_parameters(entry) == parameters


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
    assert {model_id for row in ROWS for model_id in (row.id, *row.twins)} == set(entries)
    for row in ROWS:
        assert entries[row.id].source == row.source
        for twin in row.twins:
            assert entries[twin].same_architecture_as == row.id
            assert entries[twin].config is entries[row.id].config
    catalog = json.loads(CATALOG_PATH.read_text(encoding="utf-8"))
    assert catalog["schema"] == 1
    assert {model["config"] for model in catalog["models"].values()} == set(catalog["configs"])
    assert CATALOG_PATH.stat().st_size < 120_000


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("entry", list_entries(), ids=lambda entry: entry.id)
def test_every_entry_builds(entry: CatalogEntry) -> None:
    assert count_parameters(entry) > 0


def test_literals_are_read_in_both_spellings_and_nothing_runs() -> None:
    assert parse_literal('x = {"a": [true, None], "b": {"c": null}} {"d": 1}', "here") == {
        "a": [True, None],
        "b": {"c": None},
    }
    with pytest.raises(ValueError, match="malformed"):
        parse_literal("{'a': print()}", "here")
