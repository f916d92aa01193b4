"""Configs of axolotl, LLaMA-Factory and TRL, as people write them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from ftcli.errors import ContentError, UsageError
from ftcli.recipe import load_recipe
from ftcli.recipe.foreign import TOOLS
from ftcli.recipe.translate import Translation, translate_file

AXOLOTL = """
base_model: NousResearch/Meta-Llama-3-8B
load_in_4bit: true
datasets:
  - path: aaditya/alpaca_subset_1
    type: alpaca
  - path: data/chat.jsonl
    ds_type: json
    type: chat_template
    field_messages: conversations
    roles_to_train: [assistant, tool]
val_set_size: 0.05
output_dir: ./outputs/qlora-out
adapter: qlora
sequence_len: 4096
sample_packing: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 4
optimizer: paged_adamw_32bit
lr_scheduler: cosine
learning_rate: 2e-4
bf16: auto
tf32: false
gradient_checkpointing: true
chat_template: llama3
warmup_steps: 0.1
evals_per_epoch: 4
saves_per_epoch: 1
weight_decay: 0.01
neftune_noise_alpha: 5
flux_capacitor: 88
special_tokens:
  pad_token: "<|end_of_text|>"
"""
LLAMA_FACTORY = """
model_name_or_path: Qwen/Qwen3-4B
trust_remote_code: true
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: q_proj, v_proj
dataset: identity,chats
template: qwen3
cutoff_len: 1024
max_samples: 1000
output_dir: saves/qwen3
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: polynomial
fp16: true
report_to: [tensorboard, swanlab]
"""
TRL = """
model_name_or_path: Qwen/Qwen2.5-0.5B
dataset_name: trl-lib/Capybara
dataset_train_split: train[:10%]
use_peft: true
load_in_4bit: true
max_steps: 200
"""


def translate(tmp_path: Path, text: str, name: str = "config.yml") -> tuple[Translation, dict]:  # type: ignore[type-arg]
    path = tmp_path / name
    path.write_text(text)
    found = translate_file(path)
    (tmp_path / "recipe.yaml").write_text(found.text)
    load_recipe(tmp_path / "recipe.yaml")
    return found, yaml.safe_load(found.text)


def list_keys(found: Translation, *kinds: str) -> set[str]:
    return {note.key for note in found.notes if note.kind in kinds}


def test_axolotl(tmp_path: Path) -> None:
    found, recipe = translate(tmp_path, AXOLOTL)
    assert found.tool == "axolotl"
    assert recipe["model"]["name_or_path"] == "NousResearch/Meta-Llama-3-8B"
    assert recipe["quantization"] == {"load_in_4bit": True}
    assert recipe["peft"] == {"target_modules": "all-linear", "r": 32, "lora_alpha": 16, "lora_dropout": 0.05}
    assert recipe["datasets"] == [
        {"path": "aaditya/alpaca_subset_1", "type": "alpaca"},
        {"path": "data/chat.jsonl", "type": "messages", "columns": {"messages": "conversations"},
         "train_on": ["assistant", "tool"]},
    ]  # fmt: skip
    assert recipe["data"] == {"overflow": "drop", "max_length": 4096, "packing": True, "val_set_size": 0.05}
    train = recipe["train"]
    assert (train["learning_rate"], train["warmup_ratio"], train["weight_decay"]) == (2e-4, 0.1, 0.01)
    assert (train["per_device_train_batch_size"], train["gradient_accumulation_steps"]) == (2, 4)
    assert train["num_train_epochs"] == 4
    assert recipe["tokenizer"] == {"chat_template": "llama3"}
    assert recipe["output_dir"] == "./outputs/qlora-out"
    assert list_keys(found, "differs") == {"optimizer", "saves_per_epoch", "evals_per_epoch"}
    assert list_keys(found, "missing") == {"neftune_noise_alpha"}
    assert list_keys(found, "unknown") == {"flux_capacitor"}


def test_llama_factory(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    registry = {"chats": {"file_name": "chats.json", "formatting": "sharegpt"}}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(registry))
    found, recipe = translate(tmp_path, LLAMA_FACTORY)
    assert found.tool == "LLaMA-Factory"
    assert recipe["model"] == {"dtype": "float16", "name_or_path": "Qwen/Qwen3-4B"}  # and no foreign code
    assert recipe["peft"] == {"target_modules": ["q_proj", "v_proj"], "r": 8, "lora_alpha": 16}
    assert recipe["datasets"][0] == {"path": "identity.json"}
    assert recipe["datasets"][1] == {"path": str(tmp_path / "data" / "chats.json"), "type": "sharegpt"}
    assert recipe["data"] == {"max_length": 1024, "packing": False, "overflow": "truncate"}
    assert recipe["logging"] == {"report_to": ["tensorboard"]}
    assert {"chat_template", "dataset", "lr_scheduler"} <= list_keys(found, "differs")
    assert {"max_samples", "trust_remote_code"} == list_keys(found, "missing")
    assert {"lora_alpha", "overflow", "packing"} <= list_keys(found, "default")


def test_trl(tmp_path: Path) -> None:
    found, recipe = translate(tmp_path, TRL)
    assert found.tool == "TRL"
    assert recipe["peft"] == {"lora_dropout": 0.05, "target_modules": ["q_proj", "v_proj"]}
    assert recipe["quantization"] == {"load_in_4bit": True, "bnb_4bit_use_double_quant": False}
    assert recipe["datasets"] == [{"path": "trl-lib/Capybara", "split": "train[:10%]", "train_on": "all"}]
    assert recipe["train"]["max_steps"] == 200
    assert "num_train_epochs" not in recipe["train"]
    assert (recipe["train"]["learning_rate"], recipe["train"]["lr_scheduler_type"]) == (2e-5, "linear")
    assert (recipe["data"]["max_length"], recipe["data"]["overflow"]) == (1024, "truncate")
    assert "assistant_only_loss" in list_keys(found, "default")
    _, recipe = translate(tmp_path, TRL + "lora_dropout: 0.0\nseed: 0\n")
    assert (recipe["peft"]["lora_dropout"], recipe["train"]["seed"]) == (
        0,
        0,
    )  # as it says, not as where it says nothing
    _, recipe = translate(tmp_path, TRL.replace("use_peft: true\nload_in_4bit: true\n", "assistant_only_loss: true\n"))
    assert recipe["peft"] is None
    assert recipe["datasets"][0]["train_on"] == "assistant"


@pytest.mark.parametrize(("text", "words"), [
    (AXOLOTL + "rl: dpo\n", "preference training"),
    (LLAMA_FACTORY.replace("stage: sft", "stage: dpo"), "another stage"),
    ("learning_rate: 1\n", "no configuration of a tool"),
    ("[1, 2]", "holds no keys"),
    ("a: [", "is no YAML"),
])  # fmt: skip
def test_what_cannot_be_translated_is_told(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "config.yml").write_text(text)
    with pytest.raises(ContentError, match=words):
        translate_file(tmp_path / "config.yml")
    with pytest.raises(UsageError, match="no such file"):
        translate_file(tmp_path / "gone.yml")


def test_every_key_of_ours_is_one() -> None:
    from ftcli.recipe.field import list_keys as list_own

    own = {*list_own(), "output_dir"}
    for tool in TOOLS:
        assert {*tool.keys.values(), *tool.defaults} <= own
        assert not set(tool.silent) & (set(tool.missing) | set(tool.refused))
