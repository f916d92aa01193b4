"""``--set``: what it reads, where it merges, and what it says when it cannot."""

from __future__ import annotations

from pathlib import Path

import pytest

from ftcli.errors import RecipeError
from ftcli.recipe import Recipe, load_recipe

MINIMAL = "model: m\ndatasets: [{path: d.jsonl}]\n"


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load(text: str, *overrides: str) -> Recipe:
    Path("recipe.yaml").write_text(MINIMAL + text)
    return load_recipe(Path("recipe.yaml"), overrides=overrides).recipe


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.learning_rate=1e-4", "train.learning_rate", 1e-4),
        ("train.learning_rate = 1e-4 ", "train.learning_rate", 1e-4),
        ("peft.target_modules=[q_proj, v_proj]", "peft.target_modules", ("q_proj", "v_proj")),
        ("peft.target_modules=no", "peft.target_modules", "no"),
        ("peft.target_modules=[no]", "peft.target_modules", ("no",)),
        ("peft.target_modules=.*\\.q_proj: #x", "peft.target_modules", ".*\\.q_proj: #x"),
        ("model.revision=1234567", "model.revision", "1234567"),
        ("model.revision=1e10", "model.revision", "1e10"),
        ("model.revision=null", "model.revision", None),
        ("model.revision='null'", "model.revision", "null"),
        ("output_dir=2024", "output_dir", "2024"),
        ("output_dir=a=b", "output_dir", "a=b"),
        ("peft=null", "peft", None),
        ("peft.rank_pattern.model.layers.0=8", "peft.rank_pattern", {"q": 4, "model.layers.0": 8}),
        ("peft.rank_pattern={v: 2}", "peft.rank_pattern", {"v": 2}),
        ("peft.rank_pattern.q=null", "peft.rank_pattern", {}),
        ("tokenizer.chat_template_kwargs.think=false", "tokenizer.chat_template_kwargs", {"think": False}),
        ("tokenizer.add_tokens=[<a>, <b>]", "tokenizer.add_tokens", ("<a>", "<b>")),
        ("tokenizer.add_tokens.<a.b>=a word", "tokenizer.add_tokens", {"<a.b>": "a word"}),
        ("data.max_length=null", "data.max_length", 2048),
        ("train.max_grad_norm=null", "train.max_grad_norm", None),
        ("quantization={}", "quantization.load_in_4bit", True),
        ("eval={datasets: [{path: /h}]}", "eval.max_new_tokens", 128),
    ],
)
def test_values(override: str, key: str, value: object) -> None:
    found: object = load(
        "peft: {rank_pattern: {q: 4}}\ndata: {max_length: 64}\ntrain: {learning_rate: 1e-5}\n", override
    )
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("peft.lora_rank=8", "peft.lora_rank: unknown key; did you mean peft.r?"),
        ("lora_rank=8", "lora_rank: unknown key; did you mean peft.r?"),
        ("nope.x=8", "nope: unknown key"),
        ("peft.r=x", 'peft.r: expected an integer of at least 1, got "x"'),
        ("data.packing=no", 'data.packing: expected true or false, got "no"; write false'),
        ("datasets.1.path=x", "datasets has no entry 1; it has 1 (counted from 0)"),
        ("datasets.-1.path=x", "datasets has no entry -1; it has 1 (counted from 0)"),
        ("datasets.path=x", "datasets has no entry path; it has 1 (counted from 0)"),
        ("eval.datasets.0.path=x", "eval.datasets has no entry 0; it has none"),
        ("datasets.0.pth=x", "datasets.0.pth: unknown key; did you mean datasets[].path?"),
        ("peft.r.x=1", "peft.r holds no keys"),
        ("peft.r", "expected KEY=VALUE; there is no ="),
        ("=5", "expected KEY=VALUE; a key is empty"),
        ("peft..r=5", "expected KEY=VALUE; a key is empty"),
        (
            "peft.target_modules=[q",
            "broken YAML while parsing a flow sequence: expected ',' or ']', but got the end",
        ),
        ("train={seed: 1, seed: 2}", "seed: given twice"),
        ("train=5", "train: expected a section, got 5"),
    ],
)
def test_errors(override: str, problem: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load("", override)
    assert [(p.where, p.what) for p in caught.value.problems] == [(f"--set {override}", problem)]


def test_a_wrong_section_in_the_file_is_not_hidden() -> None:
    with pytest.raises(RecipeError) as caught:
        load("train: 5\n", "train.seed=1")
    assert [str(p) for p in caught.value.problems] == [
        "recipe.yaml:3:8: train: expected a section, got 5",
        "--set train.seed=1: train holds no keys",
    ]


def test_a_null_that_leaves_nothing_is_a_missing_key() -> None:
    with pytest.raises(RecipeError) as caught:
        load("", "datasets=null")
    assert [str(p) for p in caught.value.problems] == ["recipe.yaml:1:1: datasets: missing required key"]


def test_a_model_by_name_keeps_what_else_is_said_of_it() -> None:
    assert load("", "model.dtype=float32").model.model_dump() == load("", "model={dtype: float32}").model.model_dump()
    assert load("", "model.dtype=float32", "model=other").model.dtype == "float32"
    assert load("", "model=other").model.name_or_path == "other"


def test_a_section_merges() -> None:
    recipe = load("peft: {r: 8, use_dora: true}\n", "peft={r: 4, lora_alpha: 8}")
    assert recipe.peft is not None
    assert (recipe.peft.r, recipe.peft.lora_alpha, recipe.peft.use_dora) == (4, 8, True)


def test_a_key_of_a_section_that_is_null_brings_it_back() -> None:
    recipe = load("peft: null\ntrain: {learning_rate: 1e-5}\n", "peft.r=4")
    assert recipe.peft is not None
    assert recipe.peft.r == 4


def test_an_entry_of_a_list_goes_with_null() -> None:
    recipe = load("peft: {target_modules: [q, v]}\n", "peft.target_modules.0=null")
    assert recipe.peft is not None
    assert recipe.peft.target_modules == ("v",)


def test_the_last_one_wins() -> None:
    assert load("", "train.seed=1", "train.seed=2").train.seed == 2


@pytest.mark.parametrize(
    ("one", "other"), [("max_steps: 5", "num_train_epochs: 2"), ("warmup_steps: 5", "warmup_ratio: 0.5")]
)
def test_the_command_line_wins_over_what_it_excludes(one: str, other: str) -> None:
    for in_file, on_command_line in ((one, other), (other, one)):
        override = "train." + on_command_line.replace(": ", "=")
        train = load(f"train: {{{in_file}}}\n", override).train
        assert train.model_fields_set == {on_command_line.partition(":")[0]}


def test_what_excludes_each_other_on_the_command_line_is_an_error() -> None:
    with pytest.raises(RecipeError, match=r"train\.max_steps: excludes num_train_epochs"):
        load("", "train.max_steps=5", "train.num_train_epochs=1")


def test_null_excludes_nothing() -> None:
    assert load("train: {num_train_epochs: 3}\n", "train.max_steps=null").train.num_train_epochs == 3
