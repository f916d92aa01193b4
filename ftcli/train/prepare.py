"""A run before it is one: files found, names checked, rows rendered, steps counted, and nothing written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ftcli.data.chat import ChatRenderer
from ftcli.data.loader import DataSplit, load_split
from ftcli.data.tokenizer import NewTokens, add_tokens, load_tokenizer
from ftcli.events import Notice, OnEvent, Stage, ignore_event
from ftcli.model.build import check_names
from ftcli.recipe import LoadedRecipe, Recipe
from ftcli.store.target import ModelFiles, find_model
from ftcli.train.loop import Plan, plan_run


@dataclass(frozen=True)
class Prepared:
    """A run of which everything is known and checked, and nothing is written yet."""

    loaded: LoadedRecipe
    files: ModelFiles
    renderer: ChatRenderer
    split: DataSplit
    plan: Plan
    new_tokens: NewTokens

    @property
    def recipe(self) -> Recipe:
        return self.loaded.recipe


def prepare_run(loaded: LoadedRecipe, on_event: OnEvent = ignore_event) -> Prepared:
    """The run that a recipe describes: files found, names checked, rows rendered, steps counted.

    Raises:
        FtcliError: anything wrong with recipe, model or data; nothing was written.
    """
    recipe = loaded.recipe
    on_event(Stage("model", recipe.model.name_or_path))
    files = find_model(recipe.model.name_or_path, revision=recipe.model.revision)
    check_names(recipe, files)
    tokenizer = load_tokenizer(
        files,
        chat_template=recipe.tokenizer.chat_template,
        trust_remote_code=recipe.model.trust_remote_code,
    )
    new_tokens = add_tokens(tokenizer, recipe.tokenizer.add_tokens)
    renderer = ChatRenderer(tokenizer, recipe.tokenizer.chat_template_kwargs)
    on_event(Stage("data", ", ".join(Path(section.path).name for section in recipe.datasets)))
    held_out = recipe.eval.datasets if recipe.eval else ()
    split = load_split(recipe.datasets, recipe.data, held_out, renderer, seed=recipe.train.seed)
    for part in (split.train, *split.held_out):
        for sentence in part.report.describe_losses():
            on_event(Notice(f"{part.name}: {sentence}"))
    plan = plan_run(recipe, [len(document.ids) for document in split.train.documents])
    return Prepared(loaded, files, renderer, split, plan, new_tokens)
