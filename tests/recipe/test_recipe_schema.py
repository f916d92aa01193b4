"""The schema as Python sees it: strict types, defaults, frozen values, and a description for each key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from ftcli.errors import RecipeError
from ftcli.recipe import ModelSection, PeftSection, Recipe, TrainSection, build_recipe
from ftcli.recipe.field import Kind, describe_kind, find_kind, list_keys

MINIMAL: dict[str, Any] = {"model": "m", "datasets": [{"path": "d"}]}


def build(**sections: Any) -> Recipe:
    return build_recipe(MINIMAL | sections, folder=Path("/f"), name="try")


def test_defaults_are_those_of_the_design() -> None:
    recipe = build()
    assert recipe.model.name_or_path == "m"
    assert recipe.peft == PeftSection(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear")
    assert (recipe.quantization, recipe.eval, recipe.is_4bit) == (None, None, False)
    assert recipe.data.model_dump() == {
        "max_length": 2048,
        "overflow": "error",
        "packing": True,
        "val_set_size": None,
    }
    assert (recipe.train.learning_rate, recipe.train.max_steps, recipe.train.seed) == (2e-4, None, 42)
    assert (recipe.train.adam_beta1, recipe.train.adam_beta2, recipe.train.adam_epsilon) == (0.9, 0.999, 1e-8)
    assert (recipe.checkpoint.save_steps, recipe.checkpoint.save_total_limit) == (200, 2)
    assert recipe.output_dir == "runs/try"
    assert recipe.datasets[0].path == "/f/d"


def test_every_key_is_described_in_one_line() -> None:
    keys = list_keys()
    assert len(keys) == 89
    for key in keys:
        kind = find_kind([0 if part == "" else part for part in key.replace("[]", ".").split(".")])
        assert kind is not None, key
        assert describe_kind(kind) not in ("", "a value"), key


def test_a_key_that_is_none_has_no_kind() -> None:
    assert find_kind(("peft", "lora_rank")) is None
    assert find_kind(("peft", "r", "x")) is None
    assert find_kind(("datasets", 0, "path")) == Kind(str, find_kind(("datasets", 3, "path")).limits)  # type: ignore[union-attr]


@pytest.mark.parametrize("value", [True, "5", 5.0, None])
def test_an_integer_is_nothing_else(value: object) -> None:
    with pytest.raises(RecipeError, match=r"peft\.r: expected an integer of at least 1, got"):
        build(peft={"r": value})


def test_an_integer_serves_as_a_number() -> None:
    train = build(train={"learning_rate": 1, "num_train_epochs": 3}).train
    assert (train.learning_rate, train.num_train_epochs) == (1.0, 3.0)
    assert type(train.num_train_epochs) is float


def test_alpha_keeps_the_type_it_was_given() -> None:
    assert isinstance(build(peft={"lora_alpha": 8}).peft.lora_alpha, int)  # type: ignore[union-attr]


@pytest.mark.parametrize("value", [float("inf"), float("nan"), float("-inf")])
def test_no_infinity(value: float) -> None:
    with pytest.raises(RecipeError, match="learning_rate"):
        build(train={"learning_rate": value})
    with pytest.raises(RecipeError, match="chat_template_kwargs"):
        build(tokenizer={"chat_template_kwargs": {"a": [value]}})


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "pissa", "olora", "pissa_niter_16"])
def test_known_initialisations(init: object) -> None:
    assert build(peft={"init_lora_weights": init}).peft.init_lora_weights == init  # type: ignore[union-attr]


@pytest.mark.parametrize("init", ["pissa_niter_", "pissa_niter_0", "pissa_niter_x", "eva", "", 1, None])
def test_unknown_initialisations(init: object) -> None:
    with pytest.raises(RecipeError, match="init_lora_weights"):
        build(peft={"init_lora_weights": init})


@pytest.mark.parametrize("layers", ["last:8", "8-23", "0-0", [0, 5], None])
def test_layers(layers: object) -> None:
    found = build(peft={"layers_to_transform": layers}).peft.layers_to_transform  # type: ignore[union-attr]
    assert found == (tuple(layers) if isinstance(layers, list) else layers)


@pytest.mark.parametrize("layers", ["last:0", "last", "23-8", "8-", "-1", "last:8\n", [-1], [1, 1], [], [True], 5])
def test_layers_that_are_none(layers: object) -> None:
    with pytest.raises(RecipeError, match="layers_to_transform"):
        build(peft={"layers_to_transform": layers})


@pytest.mark.parametrize(("size", "kind"), [(0.1, float), (1, int), (500, int), (0.999, float)])
def test_val_set_size_is_a_share_or_a_number_of_rows(size: float, kind: type) -> None:
    found = build(data={"val_set_size": size}).data.val_set_size
    assert (found, type(found)) == (size, kind)


@pytest.mark.parametrize("size", [0, 1.0, 0.0, 1.5, -1, True, "0.1"])
def test_val_set_size_out_of_range(size: object) -> None:
    with pytest.raises(RecipeError, match=r"data\.val_set_size: expected a share between 0 and 1, a number of rows"):
        build(data={"val_set_size": size})


def test_4bit_that_is_off_is_no_quantization() -> None:
    off = {"load_in_4bit": False}
    recipe = build(quantization=off, peft=None, train={"learning_rate": 1e-5})
    assert not recipe.is_4bit
    assert not build(quantization=off, peft={"init_lora_weights": "pissa"}).is_4bit
    assert build(quantization={}, peft={"use_dora": True}).is_4bit


def test_the_learning_rate_of_full_fine_tuning_may_be_the_default_if_it_is_given() -> None:
    assert build(peft=None, train={"learning_rate": 2e-4}).train.learning_rate == 2e-4


def test_values_cannot_be_changed() -> None:
    recipe = build()
    with pytest.raises(ValidationError, match="frozen"):
        recipe.train.seed = 1  # type: ignore[misc]


def test_sections_stand_on_their_own() -> None:
    assert ModelSection(name_or_path="x").dtype == "auto"
    assert TrainSection().learning_rate == 2e-4


def test_python_errors_name_the_key() -> None:
    with pytest.raises(RecipeError) as caught:
        build(peft={"lora_rank": 8}, train={"lr_scheduler_type": "cosin"})
    assert {(p.where, p.what) for p in caught.value.problems} == {
        ("peft.lora_rank", "unknown key; did you mean peft.r?"),
        ("train.lr_scheduler_type", 'expected one of linear, cosine, constant, got "cosin"; did you mean cosine?'),
    }


def test_python_values_that_hold_themselves_are_refused() -> None:
    mapping: dict[str, Any] = dict(MINIMAL)
    mapping["tokenizer"] = mapping
    with pytest.raises(RecipeError, match="nested more than"):
        build_recipe(mapping, folder=Path(), name="try")


def test_python_paths_and_tuples_serve() -> None:
    recipe = build(datasets=({"path": Path("a.jsonl")},), peft={"target_modules": ("q_proj", "v_proj")})
    assert recipe.datasets[0].path == "/f/a.jsonl"
    assert recipe.peft is not None
    assert recipe.peft.target_modules == ("q_proj", "v_proj")


def test_word_and_empty_traps_are_those_of_yaml_only() -> None:
    assert build(model={"name_or_path": "no"}, eval=None).model.name_or_path == "no"
