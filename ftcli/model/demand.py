"""What is known of a model's files and of a recipe → the anatomy, and what a forecast starts from. No torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from ftcli.errors import ContentError, UsageError
from ftcli.model.activation import Shape, Strategy, Training, has_matrix_unit
from ftcli.model.anatomy import Anatomy, describe_model
from ftcli.model.dimensions import Dimensions, read_dimensions, read_gguf_dimensions
from ftcli.model.layout import locate_tensor
from ftcli.model.lora import LoraCost, count_lora
from ftcli.recipe import PeftSection, Recipe
from ftcli.store.weight import WeightTable

Method = Literal["qlora", "lora", "full"]
Device = Literal["cpu", "cuda"]


def describe_files(config: Mapping[str, Any] | None, table: WeightTable | None, *, where: str) -> Anatomy:
    """The anatomy of the model that ``config`` and the headers in ``table`` describe; GGUF files need no config.

    Raises:
        ContentError: config or headers that no model can have.
    """
    if table and table.is_gguf:
        return _describe_gguf(table, where)
    entries = table.tensors if table else None
    if config is None:
        return describe_model(_infer_dimensions(table), entries, where=where)
    return describe_model(read_dimensions(config, where=f"{where}: config.json"), entries, config=config, where=where)


def _describe_gguf(table: WeightTable, where: str) -> Anatomy:
    shapes = {entry.name: entry.shape for entry in table.tensors}
    embedding = shapes.get("token_embd.weight")
    if not embedding:
        raise ContentError("holds no token_embd.weight: it is no language model", where=where)
    is_tied = "output.weight" not in shapes
    dimensions = read_gguf_dimensions(table.metadata, embedding[0], is_tied=is_tied, where=where)
    return describe_model(dimensions, table.tensors, is_gguf=True, where=where)


def _infer_dimensions(table: WeightTable | None) -> Dimensions:
    """What names and shapes alone give away; heads are not among it, and stand as 0."""
    entries = table.tensors if table else ()
    places = [locate_tensor(entry.name) for entry in entries]
    embedding = next((e.shape for e, place in zip(entries, places, strict=True) if place.part == "embedding"), (0, 0))
    n_layers = 1 + max((place.layer for place in places if place.layer is not None), default=-1)
    has_head = any(place.part == "head" for place in places)
    return Dimensions(
        family="",
        n_layers=n_layers,
        hidden=embedding[-1] if embedding else 0,
        ffn=0,
        n_heads=0,
        n_kv_heads=0,
        head_dim=0,
        vocab=embedding[0] if embedding else 0,
        is_tied=not has_head,
        activation="",
        context=None,
        rope=None,
        windows=(None,) * min(n_layers, 4096),
        experts=None,
        norm_eps=None,
        flags={},
    )


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
    linear = [tensor.n_elements for tensor in anatomy.tensors if tensor.is_linear]
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


def choose_strategy(recipe: Recipe, n_processes: int) -> Strategy:
    """How so many processes share the run that ``recipe`` describes."""
    if n_processes == 1:
        return "single"
    wanted = recipe.distributed.strategy
    is_asked = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"  # by a config of accelerate
    return "fsdp2" if wanted == "fsdp2" or (wanted != "ddp" and is_asked) else "ddp"


def build_recipe_training(
    recipe: Recipe,
    anatomy: Anatomy,
    *,
    device: Device,
    is_fused: bool,
    dtype: str = "bfloat16",
    n_processes: int = 1,
) -> Training:
    """How ``recipe`` trains the model, at the worst: every micro-batch as long as ``data.max_length`` allows.

    Modules that are trained whole and new tokens are not in it; an adapter that is gone on from counts as one with
    the default settings.

    Raises:
        UsageError: targets that the model has not.
    """
    method: Method = "full" if recipe.peft is None else "qlora" if recipe.is_4bit else "lora"
    peft = PeftSection() if recipe.peft and recipe.peft.adapter else recipe.peft
    training = build_training(
        method,
        count_lora(anatomy, peft) if peft else None,
        is_fused=is_fused,
        sequence=recipe.data.max_length,
        batch=recipe.train.per_device_train_batch_size,
        dropout=recipe.peft.lora_dropout if recipe.peft else 0.0,
        is_checkpointed=recipe.train.gradient_checkpointing,
        is_double=recipe.quantization.bnb_4bit_use_double_quant if recipe.quantization else True,
        dtype=dtype if recipe.model.dtype == "auto" else recipe.model.dtype,
        device=device,
    )
    return replace(training, world_size=n_processes, strategy=choose_strategy(recipe, n_processes))


def build_training(
    method: Method,
    cost: LoraCost | None,
    *,
    sequence: int,
    batch: int,
    dropout: float = 0.0,
    is_checkpointed: bool = True,
    is_double: bool = True,
    dtype: str = "bfloat16",
    device: Device = "cuda",
    is_fused: bool = False,
) -> Training:
    """The training of micro-batches of ``batch`` rows of ``sequence`` tokens, every one of which is learned.

    Raises:
        UsageError: no tokens, or a dtype that nothing is trained in.
    """
    if dtype not in ("bfloat16", "float16", "float32"):
        raise UsageError(f"nothing is trained in {dtype}")
    if sequence < 1 or batch < 1:
        raise UsageError("--seq and --batch must be at least 1")
    return Training(
        method=method,
        dtype=dtype,  # type: ignore[arg-type]
        double_quant=is_double,
        tokens=sequence * batch,
        longest_document=sequence,
        target_tokens=sequence * batch,
        gradient_checkpointing=is_checkpointed,
        lora_parameters=cost.parameters if cost else 0,
        lora_modules=cost.modules if cost else 0,
        r=cost.r if cost else 0,
        lora_dropout=dropout,
        device=device,
        n_documents=batch,
        n_rows=batch,
        is_fused=is_fused,
        attends_wide=is_fused and device == "cpu" and not has_matrix_unit(),
    )
