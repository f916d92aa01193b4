"""What a training run will take: the forecast of memory and disk for a model or a recipe, and what makes it fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ftcli.errors import ContentError, FtcliError, UsageError
from ftcli.events import Notice, OnEvent, ignore_event
from ftcli.jobs.source import describe_source, find_source
from ftcli.model.anatomy import Anatomy
from ftcli.model.forecast import Change, Component, Forecast, Shape, Training, fit, forecast_disk, forecast_memory
from ftcli.model.lora import LoraCost, count_lora
from ftcli.recipe import PeftSection, Recipe, load_recipe

Method = Literal["qlora", "lora", "full"]


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


def measure_shape(anatomy: Anatomy) -> Shape:
    """The dimensions that memory follows from.

    Raises:
        ContentError: a model whose heads are not known, or a mixture of experts, which is not trained.
    """
    d, counts = anatomy.dimensions, anatomy.parameters
    if not d.n_heads:
        raise ContentError("without a config.json no training can be forecast", hint="name the model's folder")
    if d.experts:
        raise ContentError("a mixture of experts is not trained by ftcli, so there is nothing to forecast")
    linear = [
        tensor.n_elements
        for tensor in anatomy.tensors
        if len(tensor.shape) == 2 and tensor.place.layer is not None and tensor.place.part in ("attention", "ffn")
    ]
    return Shape(
        n_layers=d.n_layers,
        hidden=d.hidden,
        ffn=d.ffn,
        n_heads=d.n_heads,
        n_kv_heads=d.n_kv_heads,
        head_dim=d.head_dim,
        vocab=d.vocab,
        is_tied=anatomy.is_tied,
        is_gated=anatomy.family.is_gated,
        linear_parameters=sum(linear),
        embedding_parameters=counts.embedding + counts.position,
        head_parameters=counts.head,
        other_parameters=counts.total - sum(linear) - counts.embedding - counts.position - counts.head,
        largest_linear=max(linear, default=0),
    )


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
    training = _build_training(
        method, cost, tokens=sequence * batch, longest=sequence, n_documents=batch, dropout=0.0, is_checkpointed=True
    )
    return _plan(name, shape, training, budget_bytes, should_fit, save_total_limit=2)


def plan_recipe(
    path: Path,
    *,
    overrides: tuple[str, ...] = (),
    budget_bytes: int | None = None,
    should_fit: bool = False,
    device: Literal["cpu", "cuda"] = "cuda",
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
    method: Method = "full" if recipe.peft is None else "qlora" if recipe.is_4bit else "lora"
    notices: list[str] = []
    cost = _count_recipe_lora(recipe, anatomy, notices)
    batch = recipe.train.per_device_train_batch_size
    training = _build_training(
        method,
        cost,
        tokens=recipe.data.max_length * batch,
        longest=recipe.data.max_length,
        n_documents=batch,
        dropout=recipe.peft.lora_dropout if recipe.peft else 0.0,
        is_checkpointed=recipe.train.gradient_checkpointing,
        is_double=recipe.quantization.bnb_4bit_use_double_quant if recipe.quantization else True,
        dtype="bfloat16" if recipe.model.dtype == "auto" else recipe.model.dtype,
        device=device,
    )
    data = _count_data(path, overrides, notices, on_event)
    plan = _plan(
        recipe.model.name_or_path,
        shape,
        training,
        budget_bytes,
        should_fit,
        save_total_limit=recipe.checkpoint.save_total_limit,
    )
    return TrainingPlan(**{**vars(plan), "data": data, "notices": tuple(notices)})


def _count_recipe_lora(recipe: Recipe, anatomy: Anatomy, notices: list[str]) -> LoraCost | None:
    if recipe.peft is None:
        return None
    if recipe.peft.adapter is not None:
        notices.append("the adapter that is gone on from is counted as one with the recipe's default settings")
        return count_lora(anatomy, PeftSection())
    if recipe.peft.modules_to_save or recipe.tokenizer.add_tokens:
        notices.append("modules_to_save and new tokens are not in the forecast")
    return count_lora(anatomy, recipe.peft)


def _count_data(path: Path, overrides: tuple[str, ...], notices: list[str], on_event: OnEvent) -> DataFacts | None:
    """Steps and tokens, where rows and tokenizer can be read here; else a notice says why not."""
    from ftcli.data.loader import build_set
    from ftcli.jobs.rows import open_target
    from ftcli.train.loop import plan_run

    try:
        opened = open_target(str(path), overrides=overrides, on_event=on_event)
        documents = build_set(opened.parts[0], opened.data).documents
        run = plan_run(opened.recipe, documents)
    except FtcliError as error:
        where = f"{error.where}: " if error.where else ""
        notices.append(f"steps and tokens are not known: {where}{error.what}")
        return None
    return DataFacts(run.total_steps, int(sum(documents.lengths)))


def _build_training(
    method: Method,
    cost: LoraCost | None,
    *,
    tokens: int,
    longest: int,
    n_documents: int,
    dropout: float,
    is_checkpointed: bool,
    is_double: bool = True,
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
    device: Literal["cpu", "cuda"] = "cuda",
) -> Training:
    if longest < 1 or tokens < 1:
        raise UsageError("--seq and --batch must be at least 1")
    return Training(
        method=method,
        dtype=dtype,
        double_quant=is_double,
        tokens=tokens,
        longest_document=longest,
        target_tokens=tokens,
        gradient_checkpointing=is_checkpointed,
        lora_parameters=cost.parameters if cost else 0,
        lora_modules=cost.modules if cost else 0,
        r=cost.r if cost else 0,
        lora_dropout=dropout,
        device=device,
        n_documents=n_documents,
    )


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
        "training": {**asdict(plan.training)},
        "forecast": {
            **{f"{part.name.replace(' ', '_')}_bytes": part.size_bytes for part in plan.forecast.components},
            "total_bytes": plan.forecast.total_bytes,
            "peak_phase": plan.forecast.peak_phase,
            "is_calibrated": plan.forecast.is_calibrated,
        },
        "disk": {f"{part.name.replace(' ', '_')}_bytes": part.size_bytes for part in plan.disk},
        "budget_bytes": plan.budget_bytes,
        "fits": plan.fits,
        "changes": [_change_to_json(change) for change in plan.changes],
        "can_fit": plan.can_fit,
        "data": asdict(plan.data) if plan.data else None,
        "notices": list(plan.notices),
    }


def _change_to_json(change: Change) -> Mapping[str, Any]:
    return {
        "key": change.key,
        "value": change.value,
        "saved_bytes": change.saved_bytes,
        "keeps_result": change.keeps_result,
    }
