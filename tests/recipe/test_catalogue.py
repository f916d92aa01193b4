"""The recipes that come with ftcli: each says what it is for, and fits the card that it names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ftcli.jobs.plan import plan_recipe
from ftcli.model.forecast import parse_memory
from ftcli.recipe import load_recipe

RECIPES = sorted(
    path for path in (Path(__file__).parents[2] / "recipes").glob("**/*.yaml") if path.stem != "quickstart"
)
FAMILIES = ("llama", "qwen3", "qwen2.5", "mistral", "gemma", "phi", "smollm")


def test_the_catalogue_is_whole() -> None:
    names = [path.stem for path in RECIPES]
    assert len(names) == 17
    assert all(any(name.startswith(family) for name in names) for family in FAMILIES)
    assert {name.split("-")[-2] for name in names} == {"qlora", "lora", "full"}
    assert "llama-3.1-8b-qlora-24gb" in names
    assert "llama-3.3-70b-qlora-80gb" in names


@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
def test_a_recipe_fits_its_card(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tenth to spare, which is what a forecast may be wrong by; nothing is asked of the Hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    recipe = load_recipe(path).recipe
    method, card = re.fullmatch(r".*-(qlora|lora|full)-(\d+)gb", path.stem).groups()  # type: ignore[union-attr]
    assert (method == "qlora", method == "full") == (recipe.is_4bit, recipe.peft is None)
    assert recipe.output_dir == f"runs/{path.stem}"
    budget = parse_memory(f"{card}GB")
    plan = plan_recipe(path, budget_bytes=budget, device="cuda")
    assert plan.forecast.total_bytes * 1.1 <= budget
    assert plan.forecast.total_bytes > 0.3 * budget  # a card of half the size would not do much worse
    assert f"--gpu {card}GB" in path.read_text()
    tokens = recipe.data.max_length * recipe.train.per_device_train_batch_size
    assert plan.training.tokens == tokens
