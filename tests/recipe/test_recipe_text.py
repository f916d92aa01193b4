"""A recipe written and read again, the JSON schema, differences, and the generated reference page."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ftcli.recipe import Recipe, build_recipe, compare_recipes, dump_recipe, load_recipe, recipe_json_schema

ROOT = Path(__file__).resolve().parents[2]

name = st.text(min_size=1, max_size=12).filter(lambda text: max(text) < "\ud800" or max(text) > "\udfff")
name |= st.sampled_from(
    ["no", "Yes", "010", "1e-4", "null", "~", "a: b", "#x", "- x", "2024-01-01", "12:30", "<<", "é\u2028"]
)
positive = st.floats(min_value=1e-300, max_value=1e300)
share = st.floats(min_value=0, max_value=1, exclude_max=True)
count = st.integers(1, 10**20)
names = st.lists(name, min_size=1, max_size=3, unique=True)
json_value = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | name,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(name, inner, max_size=3),
    max_leaves=6,
)
dataset = st.fixed_dictionaries(
    {"path": name},
    optional={
        "type": st.sampled_from(["auto", "messages", "text"]),
        "train_on": st.sampled_from(["assistant", "all"]) | names,
    },
)
lora = st.fixed_dictionaries(
    {},
    optional={
        "r": count,
        "lora_alpha": positive | count,
        "lora_dropout": share,
        "target_modules": name | names,
        "layers_to_transform": st.sampled_from(["last:8", "8-23", None, [3, 1]]),
        "modules_to_save": names | st.none(),
        "init_lora_weights": st.sampled_from([True, False, "pissa", "pissa_niter_7"]),
        "rank_pattern": st.dictionaries(name, count, max_size=3),
        "alpha_pattern": st.dictionaries(name, positive | count, max_size=3),
    },
)
train = st.fixed_dictionaries(
    {"learning_rate": positive},
    optional={
        "adam_epsilon": positive,
        "weight_decay": positive,
        "max_grad_norm": positive | st.none(),
        "seed": count,
    },
)
steps = st.sampled_from([{}, {"max_steps": 7}, {"num_train_epochs": 0.5}, {"warmup_steps": 0}, {"warmup_ratio": 0.1}])
recipes = st.builds(
    lambda mapping, length: mapping | {"train": mapping["train"] | length},
    st.fixed_dictionaries(
        {"model": name, "datasets": st.lists(dataset, min_size=1, max_size=3), "train": train},
        optional={
            "peft": lora | st.none() | st.fixed_dictionaries({"adapter": name}),
            "tokenizer": st.fixed_dictionaries(
                {},
                optional={
                    "chat_template": st.just("t.jinja"),
                    "chat_template_kwargs": st.dictionaries(name, json_value, max_size=3),
                    "add_tokens": names | st.dictionaries(name, name, max_size=3),
                },
            ),
            "eval": st.none() | st.fixed_dictionaries({"datasets": st.lists(dataset, min_size=1, max_size=2)}),
            "output_dir": name,
        },
    ),
    steps,
)


@settings(deadline=None)
@given(mapping=recipes)
def test_what_is_dumped_reads_back_equal(mapping: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    recipe = build_recipe(mapping, folder=Path("/f"), name="x")
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    text = dump_recipe(recipe, {"train.learning_rate": "recipe.yaml:3", "peft": "--set", "datasets.0.path": "a\nb"})
    path.write_text(text, encoding="utf-8")
    again = load_recipe(path).recipe
    assert again == recipe
    assert dump_recipe(again) == dump_recipe(recipe)
    assert compare_recipes(recipe, again) == []
    assert yaml.safe_load(text)["train"]["learning_rate"] == recipe.train.learning_rate


def test_the_dump_names_sources_and_keeps_the_order(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("datasets: [{path: /d}]\nmodel: m\nquantization: {}\ntrain: {learning_rate: 2e-5}\npeft: {r: 8}\n")
    loaded = load_recipe(path, overrides=["train.max_steps=5"])
    lines = dump_recipe(loaded.recipe, loaded.sources).splitlines()
    assert [line.partition(":")[0] for line in lines if line[0].isalpha()] == [
        "schema", "model", "tokenizer", "quantization", "peft", "datasets", "data", "train", "eval", "checkpoint",
        "logging", "distributed", "output_dir",
    ]  # fmt: skip
    assert [line.strip() for line in lines if "#" in line] == [
        "name_or_path: m  # r.yaml:2",
        "quantization:  # r.yaml:3",
        "r: 8  # r.yaml:5",
        "- path: /d  # r.yaml:1",
        "learning_rate: 2.0e-05  # r.yaml:4",
        "max_steps: 5  # --set",
    ]
    assert not any("num_train_epochs" in line for line in lines)


def test_a_very_long_key_reads_back(tmp_path: Path) -> None:
    mapping = {"model": "m", "datasets": [{"path": "/d"}], "tokenizer": {"add_tokens": {"x" * 3000: "y", "z": "é"}}}
    recipe = build_recipe(mapping, folder=tmp_path, name="r")
    (tmp_path / "r.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(tmp_path / "r.yaml").recipe == recipe


def build(**sections: Any) -> Recipe:
    return build_recipe({"model": "m", "datasets": [{"path": "/d"}]} | sections, folder=Path("/"), name="r")


def test_differences() -> None:
    assert compare_recipes(build(), build()) == []
    assert compare_recipes(build(), build(train={"seed": 1}, peft={"target_modules": ["q"]})) == [
        ("peft.target_modules", "all-linear", ("q",)),
        ("train.seed", 42, 1),
    ]
    (difference,) = compare_recipes(build(), build(peft=None, train={"learning_rate": 2e-4}))
    assert (difference[0], difference[1]["r"], difference[2]) == ("peft", 16, None)
    assert compare_recipes(build(), build(datasets=[{"path": "/e"}])) == [("datasets.0.path", "/d", "/e")]
    assert [key for key, _, _ in compare_recipes(build(), build(datasets=[{"path": "/d"}, {"path": "/e"}]))] == [
        "datasets"
    ]


def test_json_schema() -> None:
    schema = recipe_json_schema()
    assert json.loads(json.dumps(schema)) == schema
    assert schema["required"] == ["model", "datasets"]
    assert schema["additionalProperties"] is False
    assert {"type": "string"} in schema["properties"]["model"]["anyOf"]
    assert "schema" in schema["properties"]
    assert "schema_version" not in schema["properties"]


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys, ftcli.recipe; "
        "print(*(set(sys.modules) & {'torch', 'transformers', 'peft', 'rich', 'numpy', 'datasets'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == ""
