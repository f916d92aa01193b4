"""Other tools' names lead to ours, wherever they stand."""

from __future__ import annotations

from pathlib import Path

import pytest

from ftcli.errors import RecipeError
from ftcli.recipe import build_recipe
from ftcli.recipe.alias import ALIASES, suggest_key
from ftcli.recipe.field import list_keys

EXPECTED = {
    "model.name_or_path": "base_model model_name_or_path",
    "data.max_length": "sequence_len cutoff_len max_seq_length max_seq_len",
    "peft.r": "lora_r lora_rank rank",
    "peft.target_modules": "lora_target lora_target_modules lora_target_linear",
    "quantization": "quantization_bit",
    "train.per_device_train_batch_size": "micro_batch_size batch_size",
    "train.num_train_epochs": "num_epochs epochs",
    "train.learning_rate": "lr",
    "train.optim": "optimizer",
    "train.lr_scheduler_type": "lr_scheduler",
    "data.packing": "sample_packing packed",
    "tokenizer.chat_template": "template prompt_style",
    "datasets[].train_on": "train_on_inputs train_on_prompt mask_prompt assistant_only_loss",
    "data.val_set_size": "val_size test_split_size",
    "tokenizer.add_tokens": "tokens",
    "train.max_steps": "iters",
}
PAIRS = [(alias, key) for key, aliases in EXPECTED.items() for alias in aliases.split()]


def test_the_table_is_this_one() -> None:
    assert dict(PAIRS) == ALIASES
    assert set(ALIASES.values()) <= set(list_keys())
    assert not {key.rpartition(".")[2] for key in list_keys()} & ALIASES.keys()


@pytest.mark.parametrize(("alias", "key"), PAIRS)
def test_an_alias_is_known_at_the_top_and_in_any_section(alias: str, key: str) -> None:
    mapping = {"model": "m", "datasets": [{"path": "d", alias: 1}], alias: 1, "train": {alias: 1}}
    with pytest.raises(RecipeError) as caught:
        build_recipe(mapping, folder=Path(), name="x")
    assert {(p.where, p.what) for p in caught.value.problems} == {
        (place, f"unknown key; did you mean {key}?") for place in (alias, f"train.{alias}", f"datasets.0.{alias}")
    }


@pytest.mark.parametrize(
    ("section", "key", "suggestion"),
    [
        ((), "learning_rate", "train.learning_rate"),
        ((), "r", "peft.r"),
        ((), "train_on", "datasets[].train_on"),
        (("train",), "packing", "data.packing"),
        (("datasets", 0), "pth", "datasets[].path"),
        (("eval", "datasets", 3), "pth", "eval.datasets[].path"),
        (("eval",), "max_new_token", "eval.max_new_tokens"),
        ((), "quantisation", "quantization"),
        ((), "gradient_acumulation_steps", "train.gradient_accumulation_steps"),
        ((), "zzzz", None),
    ],
)
def test_suggestions(section: tuple[str | int, ...], key: str, suggestion: str | None) -> None:
    assert suggest_key(section, key) == suggestion
