"""JSON files of a model with up to three values that nobody expects: an answer or one error, never a traceback."""

from __future__ import annotations

import copy
import json
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from ftcli.cli.app import app

ODD: list[Any] = [
    None, True, False, 0, -1, 1, 7, 0.5, 1e308, float("nan"), float("inf"), 10**30, 10**400, "", "x", "\ud800",
    "\x1b[31m", "../..", "a" * 5000, [], {}, [[]], [1, "a", None], {"a": 1}, [{}], "llama", "gpt2", "mixtral",
    ["LlamaForCausalLM"], {"rope_type": "llama3"}, {"rope_type": "longrope", "factor": "x"}, [1] * 3000,
]  # fmt: skip
ADDED = (
    "auto_map", "quantization_config", "rope_scaling", "num_experts", "sliding_window", "layer_types", "text_config",
    "head_dim", "layers_to_transform", "alpha_pattern", "rank_pattern", "modules_to_save", "use_rslora", "eos_token_id",
    "added_tokens_decoder", "chat_template",
)  # fmt: skip
FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "adapter_config.json")
OPTIONS: tuple[list[str], ...] = ([], ["--json"], ["--layers"], ["--gpu", "24GB"])


def list_places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in ``value`` with a key or index of it."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(min(5, len(value))):
            yield value, key
            yield from list_places(value[key])


def mutate(value: Any, rng: random.Random) -> Any:
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        places = list(list_places(value))
        if rng.random() < 0.02 or not places:
            return copy.deepcopy(rng.choice(ODD))
        container, key = rng.choice(places)
        if rng.random() < 0.1:
            del container[key]
        else:
            container[key] = copy.deepcopy(rng.choice(ODD))
        if rng.random() < 0.2 and isinstance(value, dict):
            value[rng.choice(ADDED)] = copy.deepcopy(rng.choice(ODD))
    return value


def refuse(literal: str) -> Any:
    raise AssertionError(f"{literal} is no JSON")


@pytest.mark.parametrize("n", [12, pytest.param(400, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FILES)
def test_odd_values_are_answered_or_told(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, name: str, n: int
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    target = base
    if name == "adapter_config.json":
        target = tmp_path / "adapter"
        model: Any = AutoModelForCausalLM.from_pretrained(base)
        get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(target)
    path = target / name
    value = json.loads(path.read_text())
    rng = random.Random(name)
    codes = set()
    for _ in range(n):
        path.write_text(json.dumps(mutate(value, rng)))
        options, start = rng.choice(OPTIONS), time.process_time()
        result = CliRunner().invoke(app, ["inspect", str(target), *options])
        assert result.exit_code in (0, 2, 3), path.read_text()[:3000] + result.output
        assert time.process_time() - start < 5
        if options == ["--json"]:
            json.loads(result.stdout, parse_constant=refuse)
        codes.add(result.exit_code)
    assert codes & {0, 3}
