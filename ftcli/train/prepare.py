"""A run before it is one: files found, names checked, rows rendered, steps counted, and nothing written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from glob import glob
from pathlib import Path
from typing import Any

from ftcli.data.chat import ChatRenderer
from ftcli.data.check import list_findings
from ftcli.data.documents import Documents
from ftcli.data.finding import check_findings
from ftcli.data.fit import list_template_findings
from ftcli.data.limits import ModelLimits, read_limits
from ftcli.data.loader import DataSplit, Reading, load_split
from ftcli.data.message import Example, Message
from ftcli.data.role import load_roles
from ftcli.data.tokenizer import NewTokens, add_tokens, hash_template, hash_tokenizer, load_tokenizer
from ftcli.errors import ContentError, UsageError
from ftcli.evaluate.generate import check_context, find_context, find_unfit, has_reference
from ftcli.events import Notice, OnEvent, Progress, Stage, ignore_event
from ftcli.model.base import build_skeleton, choose_device, count_embedding_rows
from ftcli.model.build import check_names, find_adapter
from ftcli.model.quantization import read_packing
from ftcli.recipe import EvalSection, LoadedRecipe, Recipe
from ftcli.store.run import RunFolder, read_manifest
from ftcli.store.target import ModelFiles, find_model, fingerprint_model
from ftcli.train.best import check_metric
from ftcli.train.change import list_identity
from ftcli.train.loop import Plan, plan_run
from ftcli.train.optim import plan_warmup
from ftcli.train.rehearsal import Group, find_largest
from ftcli.train.tracking import check_trackers

_TOLD_ELSEWHERE = ("no-target", "typed-special", "history")


@dataclass(frozen=True)
class Prepared:
    """A run of which everything is known and checked, and nothing is written yet.

    ``inputs`` are the manifest's entries that say what the run is made from.
    """

    loaded: LoadedRecipe
    files: ModelFiles
    renderer: ChatRenderer
    split: DataSplit
    plan: Plan
    new_tokens: NewTokens
    inputs: dict[str, Any]

    @property
    def recipe(self) -> Recipe:
        return self.loaded.recipe

    @cached_property
    def largest(self) -> list[Group]:
        """The micro-batches that take the most memory, the one with the most tokens first."""
        return find_largest(self.recipe, self.split.train.documents, self.plan)

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that ties a checkpoint to runs like this one."""
        inputs = {**self.inputs, "base": self.inputs["base"]["fingerprint"]}
        return {"recipe": list_identity(self.recipe, self.plan.n_processes), "inputs": inputs}


def prepare_run(
    loaded: LoadedRecipe,
    on_event: OnEvent = ignore_event,
    *,
    revision: str | None = None,
    template_date: str | None = None,
    n_processes: int = 1,
) -> Prepared:
    """The run that a recipe describes: files found, names checked, rows rendered, steps counted.

    Args:
        loaded: the recipe.
        on_event: told of stages, and of rows that are not trained on as they were written.
        revision: of the base on the Hub, instead of the newest one.
        template_date: what a template that writes the date is told (ISO 8601), instead of today.
        n_processes: how many share the micro-batches of a step.

    Raises:
        FtcliError: anything wrong with recipe, model or data; nothing was written.
    """
    recipe = loaded.recipe
    _check_device(recipe)
    check_trackers(recipe)
    on_event(Stage("model", recipe.model.name_or_path))
    files = find_model(recipe.model.name_or_path, revision=revision or recipe.model.revision)
    skeleton = build_skeleton(files, recipe.model)
    check_names(recipe, skeleton)
    if packing := read_packing(files):
        on_event(Notice(f"the base is packed already ({packing.title}): its adapter can be run, and not be merged"))
    tokenizer = load_tokenizer(
        files,
        chat_template=recipe.tokenizer.chat_template,
        trust_remote_code=recipe.model.trust_remote_code,
    )
    fingerprint = fingerprint_model(files)
    base = {"id": recipe.model.name_or_path, "revision": files.revision, "fingerprint": fingerprint}
    if recipe.peft and recipe.peft.adapter:
        check_parent(find_adapter(recipe.peft.adapter), tokenizer, fingerprint)
    new_tokens = add_tokens(tokenizer, recipe.tokenizer.add_tokens)
    date = datetime.fromisoformat(template_date) if template_date else None
    renderer = ChatRenderer(tokenizer, recipe.tokenizer.chat_template_kwargs, date=date)
    on_event(Stage("data", ", ".join(Path(section.path).name for section in recipe.datasets)))
    n_rows = max(count_embedding_rows(skeleton), *(token + 1 for token in (*new_tokens, 0)))
    limits = read_limits(files, embedding_rows=n_rows)
    split = load_data(recipe, renderer, limits, on_event)
    split = add_evaluation(recipe, split, renderer, skeleton.config, on_event)
    plan = plan_run(recipe, split.train.documents, n_processes)
    if plan_warmup(recipe.train, plan.total_steps) >= plan.total_steps:
        on_event(Notice(f"the warm-up takes all {plan.total_steps} steps: the peak learning rate is never reached"))
    inputs = {
        "base": base,
        "tokenizer_sha256": hash_tokenizer(tokenizer),
        "template_sha256": hash_template(tokenizer),
        "data_sha256": split.sha256,
        "template_date": renderer.template.date.isoformat() if renderer.template.is_dated else None,
    }
    return Prepared(loaded, files, renderer, split, plan, new_tokens, inputs)


def load_data(recipe: Recipe, renderer: ChatRenderer, limits: ModelLimits, on_event: OnEvent) -> DataSplit:
    """The documents of a run, checked.

    Raises:
        ContentError: rows, tokenizer or template are not fit to be trained on.
    """
    is_chosen = recipe.tokenizer.chat_template != "auto"
    findings = list_template_findings(renderer, limits, is_chosen=is_chosen, max_length=recipe.data.max_length)
    reading = Reading(renderer, on_progress=lambda done, total: on_event(Progress("data", done, total)))
    held_out = recipe.eval.datasets if recipe.eval else ()
    try:
        split = load_split(recipe.datasets, recipe.data, held_out, reading, seed=recipe.train.seed)
    except ContentError:
        check_findings(findings)  # what is wrong with the template is why its rows fail
        raise
    sets = (split.train, *split.held_out)
    findings = list_findings(findings, sets, renderer, limits)
    check_findings(findings)
    losses = [f"{part.name}: {sentence}" for part in sets for sentence in part.report.describe_losses()]
    for sentence in (*split.notices, *losses):
        on_event(Notice(sentence))
    for finding in findings:
        if finding.code not in _TOLD_ELSEWHERE:
            place = f" ({finding.places[0]})" if finding.places else ""
            on_event(Notice(f"{finding.what}{place}"))
    return split


def add_evaluation(
    recipe: Recipe, split: DataSplit, renderer: ChatRenderer, config: Any, on_event: OnEvent
) -> DataSplit:
    """The split with what evaluation needs besides; whatever will not be measured is told.

    Raises:
        FtcliError: prompts that the model of ``config`` has no room to answer, or nothing that could be measured.
    """
    section = recipe.eval
    if section is None:
        return split
    check_metric(section, [part.name for part in split.held_out])
    prompts = [renderer.render_prompt([Message("user", prompt)]) for prompt in section.sample_prompts]
    for part in split.held_out if section.score else ():
        asked = [example for example in part.read_examples() if has_reference(example)]
        for sentence in check_references(part.name, asked, section):
            on_event(Notice(sentence))
        prompts += [renderer.render_prompt(example.messages[:-1], example.tools) for example in asked]
    check_context(find_context(config), prompts, section.max_new_tokens)
    by_role: dict[str, Mapping[str, Documents]] = {}
    for part in split.held_out if "role" in section.loss_by else ():
        by_role[part.name], refused = load_roles(part, renderer, recipe.data)
        for sentence in refused:
            on_event(Notice(sentence))
    return replace(split, held_out_by_role=by_role)


def check_references(name: str, asked: Sequence[Example], section: EvalSection) -> list[str]:
    """A sentence for what the score of the held-out set ``name`` will not say of the rows that are ``asked``.

    Raises:
        ContentError: no answer to any of them could be right.
    """
    if not asked:
        return [f"no row of {name} ends with an answer: there is no score"]
    unfit = find_unfit(asked, section.score or "", section.regex)
    if len(unfit) == len(asked):
        raise ContentError(unfit[0].what, where=unfit[0].where, hint="set another eval.score")
    if not unfit:
        return []
    return [f"{len(unfit)} of {len(asked)} rows of {name} cannot be right: {unfit[0].what} ({unfit[0].where})"]


def check_inputs_outside(loaded: LoadedRecipe, output: Path) -> None:
    """None if nothing that the run reads lies in the folder that it writes and may empty.

    Raises:
        UsageError: naming the input.
    """
    recipe = loaded.recipe
    read = {f"datasets.{i}.path": section.path for i, section in enumerate(recipe.datasets)}
    read |= {f"eval.datasets.{i}.path": s.path for i, s in enumerate(recipe.eval.datasets if recipe.eval else ())}
    read["model.name_or_path"] = recipe.model.name_or_path
    read["tokenizer.chat_template"] = recipe.tokenizer.chat_template
    if recipe.peft and recipe.peft.adapter:
        read["peft.adapter"] = recipe.peft.adapter
    read["the recipe"] = str(loaded.path)
    for key, text in read.items():
        plain = Path(text).expanduser()
        for path in [plain] if plain.exists() else map(Path, glob(str(plain), recursive=True)):
            if path.resolve().is_relative_to(output.resolve()):
                raise UsageError(f"{key} lies in output_dir", where=text, hint="set another output_dir")


def check_parent(adapter: Path, tokenizer: Any, fingerprint: str) -> None:
    """None if an adapter that is to be trained on was made for this base, tokenizer and template.

    What is not recorded beside the adapter cannot be checked; shapes are, when it is loaded.

    Raises:
        ContentError: naming what differs.
    """
    run = RunFolder(adapter.parent)
    if run.holds_run() and read_manifest(run)["base"]["fingerprint"] != fingerprint:
        raise ContentError(
            "the adapter was trained on another base model",
            where=str(adapter),
            hint=f"set model to {read_manifest(run)['base']['id']}",
        )
    if not (adapter / "tokenizer.json").exists():
        return
    own = load_tokenizer(ModelFiles(str(adapter), adapter))
    if own.get_vocab() != tokenizer.get_vocab():
        raise ContentError(
            "the adapter was trained with tokens that this tokenizer has not",
            where=str(adapter),
            why="going on from an adapter with added tokens is not supported",
            hint="train anew with tokenizer.add_tokens, or merge the adapter first",
        )
    if own.chat_template != tokenizer.chat_template:
        raise ContentError(
            "the adapter was trained with another chat template",
            where=str(adapter),
            hint=f"set tokenizer.chat_template: {adapter / 'chat_template.jinja'}",
        )


def _check_device(recipe: Recipe) -> None:
    if recipe.model.dtype == "float16" and choose_device().type == "cpu":
        raise UsageError(
            "training in float16 needs a CUDA device: its small gradients vanish without a loss scaler",
            where="model.dtype",
            hint="set it to auto or bfloat16",
        )
    if recipe.peft and recipe.peft.adapter and recipe.tokenizer.add_tokens:
        raise UsageError(
            "excludes peft.adapter: an adapter brings its own tokens", where="tokenizer.add_tokens", hint="drop one"
        )
