"""What a training run will take: the forecast of memory and disk for a model or a recipe, and what makes it fit."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ftcli.errors import ContentError, FtcliError
from ftcli.events import Notice, OnEvent, ignore_event
from ftcli.fused.family import FAMILIES, is_fast
from ftcli.jobs.source import describe_source, find_source
from ftcli.model.activation import Shape, Training
from ftcli.model.anatomy import Anatomy
from ftcli.model.demand import Device, Method, build_recipe_training, build_training, measure_shape
from ftcli.model.forecast import Change, Component, Forecast, fit, forecast_disk, forecast_memory
from ftcli.model.lora import count_lora
from ftcli.recipe import PeftSection, Recipe, load_recipe


@dataclass(frozen=True)
class DataFacts:
    """What a run takes from its data: optimizer steps in all, and tokens of one epoch."""

    steps: int
    tokens: int


@dataclass(frozen=True)
class TrainingPlan:
    """A forecast for ``budget_bytes`` (None: no device was named); ``changes`` make it fit, if that was asked."""

    model: str
    training: Training
    forecast: Forecast
    disk: tuple[Component, ...]
    budget_bytes: int | None
    changes: tuple[Change, ...] = ()
    can_fit: bool | None = None
    data: DataFacts | None = None
    notices: tuple[str, ...] = ()

    @property
    def fits(self) -> bool | None:
        return None if self.budget_bytes is None else self.forecast.total_bytes <= self.budget_bytes


def plan_model(
    anatomy: Anatomy,
    name: str,
    *,
    method: Method = "qlora",
    sequence: int = 2048,
    batch: int = 1,
    peft: PeftSection | None = None,
    budget_bytes: int | None = None,
    should_fit: bool = False,
) -> TrainingPlan:
    """The forecast of training the model on a CUDA device, with the recipe's defaults for all else.

    Args:
        anatomy: the model.
        name: what it is called.
        method: ``qlora``, ``lora`` or ``full``.
        sequence: tokens of a row.
        batch: rows of a micro-batch.
        peft: LoRA's settings; the recipe's defaults if None.
        budget_bytes: memory that is there.
        should_fit: also look for the changes that make it fit.
    """
    shape = measure_shape(anatomy)
    cost = None if method == "full" else count_lora(anatomy, peft or PeftSection())
    is_fused = anatomy.dimensions.family in FAMILIES
    training = build_training(method, cost, sequence=sequence, batch=batch, is_fused=is_fused)
    return _plan(name, shape, training, budget_bytes, should_fit, save_total_limit=2)


def plan_recipe(
    path: Path,
    *,
    overrides: tuple[str, ...] = (),
    budget_bytes: int | None = None,
    should_fit: bool = False,
    device: Device | None = None,
    n_processes: int = 1,
    on_event: OnEvent = ignore_event,
) -> TrainingPlan:
    """The forecast of the run that a recipe describes; steps and tokens where its data and tokenizer are here.

    Raises:
        FtcliError: the recipe or the model cannot be read.
    """
    recipe = load_recipe(path, overrides=overrides).recipe
    source = find_source(recipe.model.name_or_path, revision=recipe.model.revision)
    for sentence in source.notices:
        on_event(Notice(sentence))
    anatomy = describe_source(source)
    if anatomy is None:
        raise ContentError("holds no model", where=recipe.model.name_or_path)
    shape = measure_shape(anatomy)
    notices = _list_notices(recipe)
    found, dtype = (device, "bfloat16") if device else _find_device(recipe)
    is_fused = is_fast(recipe, anatomy.dimensions.family)
    training = build_recipe_training(
        recipe, anatomy, device=found, is_fused=is_fused, dtype=dtype, n_processes=n_processes
    )
    data = _count_data(path, overrides, n_processes, notices, on_event)
    plan = _plan(
        recipe.model.name_or_path,
        shape,
        training,
        budget_bytes,
        should_fit,
        save_total_limit=recipe.checkpoint.save_total_limit,
    )
    return replace(plan, data=data, notices=tuple(notices))


def _list_notices(recipe: Recipe) -> list[str]:
    if recipe.peft and recipe.peft.adapter:
        return ["the adapter that is gone on from is counted as one with the recipe's default settings"]
    if recipe.peft and (recipe.peft.modules_to_save or recipe.tokenizer.add_tokens):
        return ["modules_to_save and new tokens are not in the forecast"]
    return []


def _find_device(recipe: Recipe) -> tuple[Device, str]:
    """The device that a run here would take, and the dtype."""
    from ftcli.model.base import choose_device, choose_dtype

    device = choose_device()
    dtype = str(choose_dtype(recipe.model.dtype, device)).removeprefix("torch.")
    return ("cuda" if device.type == "cuda" else "cpu"), dtype


def _count_data(
    path: Path, overrides: tuple[str, ...], n_processes: int, notices: list[str], on_event: OnEvent
) -> DataFacts | None:
    """Steps and tokens, where rows and tokenizer can be read here; else a notice says why not."""
    from ftcli.data.loader import build_set
    from ftcli.jobs.rows import open_target
    from ftcli.train.loop import plan_run

    try:
        opened = open_target(str(path), overrides=overrides, on_event=on_event)
        documents = build_set(opened.parts[0], opened.data).documents
        run = plan_run(opened.recipe, documents, n_processes)
    except FtcliError as error:
        where = f"{error.where}: " if error.where else ""
        notices.append(f"steps and tokens are not known: {where}{error.what}")
        return None
    return DataFacts(run.total_steps, int(sum(documents.lengths)))


def _plan(
    name: str, shape: Shape, training: Training, budget_bytes: int | None, should_fit: bool, *, save_total_limit: int
) -> TrainingPlan:
    changes: tuple[Change, ...] = ()
    can_fit = None
    if should_fit and budget_bytes is not None:
        changes, can_fit = fit(shape, training, budget_bytes)
    disk = forecast_disk(shape, training, save_total_limit=save_total_limit)
    return TrainingPlan(
        name, training, forecast_memory(shape, training), disk, budget_bytes, changes=changes, can_fit=can_fit
    )


def plan_to_json(plan: TrainingPlan) -> dict[str, Any]:
    """The keys that a plan adds to the document of ``--json``."""
    return {
        "model": plan.model,
        "training": asdict(plan.training),
        "forecast": {
            **{f"{part.name.replace(' ', '_')}_bytes": part.size_bytes for part in plan.forecast.components},
            "total_bytes": plan.forecast.total_bytes,
            "peak_phase": plan.forecast.peak_phase,
            "is_calibrated": plan.forecast.is_calibrated,
        },
        "disk": {f"{part.name.replace(' ', '_')}_bytes": part.size_bytes for part in plan.disk},
        "budget_bytes": plan.budget_bytes,
        "fits": plan.fits,
        "changes": [
            {
                "key": change.key,
                "value": change.value,
                "saved_bytes": change.saved_bytes,
                "keeps_result": change.keeps_result,
            }
            for change in plan.changes
        ],
        "can_fit": plan.can_fit,
        "data": asdict(plan.data) if plan.data else None,
        "notices": list(plan.notices),
    }
