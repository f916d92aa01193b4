"""A recipe's rows, or a data set's with some model's tokenizer: opened and rendered, not yet judged."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ftcli.data.chat import ChatRenderer
from ftcli.data.finding import Finding, check_findings
from ftcli.data.fit import list_template_findings
from ftcli.data.limits import ModelLimits, read_limits
from ftcli.data.loader import Part, Reading, load_parts
from ftcli.data.tokenizer import add_tokens, load_tokenizer
from ftcli.errors import ContentError, Problem, UsageError
from ftcli.events import OnEvent, Progress, Stage, ignore_event
from ftcli.recipe import DataSection, Recipe, build_recipe, load_recipe
from ftcli.store.target import ModelFiles, find_tokenizer

_NO_LIMIT = 1 << 40


@dataclass(frozen=True)
class Tokenized:
    """The rows of a target with tokenizer and template, for reports and previews alike."""

    target: str
    recipe: Recipe
    is_recipe: bool
    files: ModelFiles
    renderer: ChatRenderer
    limits: ModelLimits
    reading: Reading
    template_findings: list[Finding] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)

    @property
    def tokenizer(self) -> Any:
        return self.renderer.tokenizer

    @property
    def max_length(self) -> int | None:
        """The recipe's; None where there is no recipe, and so no limit."""
        return self.recipe.data.max_length if self.is_recipe else None

    @property
    def data(self) -> DataSection:
        """The recipe's section `data`, without a limit where there is no recipe."""
        data = self.recipe.data
        return data if self.is_recipe else data.model_copy(update={"max_length": _NO_LIMIT, "packing": False})


def open_target(
    target: str,
    model: str | None = None,
    *,
    overrides: tuple[str, ...] = (),
    skip_bad: bool = False,
    on_event: OnEvent = ignore_event,
) -> Tokenized:
    """The rows of a recipe, or of a data set with the tokenizer of ``model``, rendered and not yet judged.

    Args:
        target: a recipe (``.yaml``), or a file, glob, folder or Hub id of rows.
        model: Hub id, folder, GGUF file or ``package://``; wins over the recipe's.
        overrides: ``key=value`` pairs laid over the recipe.
        skip_bad: leave out rows that cannot be read or rendered, and count them.
        on_event: told of stages and progress.

    Raises:
        FtcliError: the recipe, the tokenizer or the rows cannot be used.
    """
    recipe, is_recipe = _read_target(target, model, overrides)
    on_event(Stage("tokenizer", recipe.model.name_or_path))
    files, tokenizer = open_tokenizer(recipe)
    new_tokens = add_tokens(tokenizer, recipe.tokenizer.add_tokens)
    limits = read_limits(files)
    if limits.embedding_rows is not None and new_tokens:
        limits = replace(limits, embedding_rows=max(limits.embedding_rows, *(token + 1 for token in new_tokens)))
    renderer = ChatRenderer(tokenizer, recipe.tokenizer.chat_template_kwargs)
    skipped: list[Problem] | None = [] if skip_bad else None
    reading = Reading(
        renderer, skipped=skipped, on_progress=lambda done, total: on_event(Progress("rows", done, total))
    )
    on_event(Stage("data", ", ".join(Path(section.path).name for section in recipe.datasets)))
    held_out = recipe.eval.datasets if recipe.eval else ()
    is_chosen, max_length = recipe.tokenizer.chat_template != "auto", recipe.data.max_length if is_recipe else None
    findings = list_template_findings(renderer, limits, is_chosen=is_chosen, max_length=max_length)
    try:
        parts = load_parts(recipe.datasets, recipe.data, held_out, reading, seed=recipe.train.seed)
    except ContentError:
        check_findings(findings)  # what is wrong with the template is why its rows fail
        raise
    return Tokenized(target, recipe, is_recipe, files, renderer, limits, reading, findings, parts)


def open_tokenizer(recipe: Recipe) -> tuple[ModelFiles, Any]:
    """The files and the tokenizer of the recipe's model, without its weights."""
    files = find_tokenizer(recipe.model.name_or_path, revision=recipe.model.revision)
    options = {"trust_remote_code": recipe.model.trust_remote_code}
    return files, load_tokenizer(files, chat_template=recipe.tokenizer.chat_template, **options)


def _read_target(target: str, model: str | None, overrides: tuple[str, ...]) -> tuple[Recipe, bool]:
    if Path(target).suffix.lower() in (".yaml", ".yml"):
        named = (f"model.name_or_path={model}",) if model else ()
        return load_recipe(Path(target), overrides=(*overrides, *named)).recipe, True
    if model is None:
        raise UsageError("which model's tokenizer?", where=target, hint="name one with -m MODEL, or give a recipe")
    if overrides:
        raise UsageError("--set changes a recipe, and this is none", where=target)
    return build_recipe({"model": model, "datasets": [{"path": target}]}, folder=Path(), name="data"), False
