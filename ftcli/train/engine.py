"""What makes the steps: the model, its optimizer, and accelerate around both."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch

from ftcli.errors import UsageError
from ftcli.events import Notice, OnEvent, Stage
from ftcli.fused.check import check_documents_apart, fuse_checked
from ftcli.fused.checkpoint import keep_attention
from ftcli.fused.layer import is_fused, unwrap
from ftcli.model.base import choose_dtype
from ftcli.model.build import Built, build_model, count_parameters, enable_checkpointing
from ftcli.model.demand import choose_strategy
from ftcli.recipe import Recipe
from ftcli.store.run import RunFolder
from ftcli.train.memory import FUSED_GROWTH, PLAIN_GROWTH, release_between_blocks
from ftcli.train.optim import build_optimizer
from ftcli.train.prepare import Prepared
from ftcli.train.shard import shard_model
from ftcli.train.tracking import find_folder
from ftcli.train.world import World


@dataclass(frozen=True)
class Engine:
    """The model as it is evaluated and saved, and as it is trained (``wrapped_``)."""

    built: Built
    optimizer: torch.optim.AdamW
    accelerator: Any
    wrapped_model: Any
    wrapped_optimizer: Any

    @property
    def model(self) -> Any:
        return self.built.model


def import_libraries(recipe: Recipe) -> None:
    """Nothing; what is resident from now on is the model's and its training's."""
    import peft  # noqa: F401 - and with it transformers
    import transformers.modeling_utils  # noqa: F401

    if recipe.is_4bit:
        import bitsandbytes  # noqa: F401


def build_engine(prepared: Prepared, device: torch.device, world: World, run: RunFolder, on_event: OnEvent) -> Engine:
    """The engine of a run before its first step.

    Raises:
        ContentError: the model's weights are not what its config says, or it mixes packed documents.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    recipe = prepared.recipe
    dtype = choose_dtype(recipe.model.dtype, device)
    on_event(Stage("load", f"{str(dtype).removeprefix('torch.')} on {device.type}"))
    is_sharded = choose_strategy(recipe, world.size) == "fsdp2"
    if is_sharded and dtype is torch.float16:
        raise UsageError(
            "fsdp2 does not train in float16: its loss scaler does not know gradients that are divided",
            where="distributed.strategy",
            hint="set model.dtype: bfloat16 where the device has it, or distributed.strategy: ddp",
        )
    built = build_model(
        recipe,
        prepared.files,
        dtype=dtype,
        device=torch.device("cpu") if is_sharded and not recipe.is_4bit else device,
        new_tokens=prepared.new_tokens,
        is_sharded=is_sharded,
    )
    mixed_precision = choose_mixed_precision(dtype, trains_base_weights=built.trains_base_weights)
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # accelerate would wrap the model in its own way
    AcceleratorState._reset_state()  # or a second run in this process could not choose another precision
    accelerator = Accelerator(
        mixed_precision=mixed_precision,
        cpu=device.type == "cpu",
        log_with=list(recipe.logging.report_to) or None,
        project_dir=find_folder(run),
    )
    if recipe.train.fused:
        with accelerator.autocast():
            reason = fuse_checked(built.model, with_attention=recipe.model.attn_implementation is None)
        if reason:
            on_event(Notice(f"{reason}: training takes the plain path, which is slower"))
    is_fast, counts = is_fused(built.model), count_parameters(built.model)
    way = ", by the fast path" if is_fast else ""
    on_event(Stage("parameters", f"{counts.trainable:,} of {counts.total:,} are trained{way}"))
    if device.type == "cpu":
        drops = bool(recipe.peft and recipe.peft.lora_dropout)  # whose masks leave holes that nothing else fits into
        release_between_blocks(built.model, growth=FUSED_GROWTH if is_fast and not drops else PLAIN_GROWTH)
        if is_fast and recipe.train.gradient_checkpointing:
            enable_checkpointing(unwrap(built.model), keep_attention)
    if is_sharded:
        shard_model(built.model, device, world.size)  # accelerate has no part in it
        optimizer = build_optimizer(built.model, recipe.train)
        wrapped_model, wrapped_optimizer = built.model, optimizer
    else:
        optimizer = build_optimizer(built.model, recipe.train)
        wrapped_model, wrapped_optimizer = accelerator.prepare(built.model, optimizer)
    if recipe.puts_documents_together:
        with accelerator.autocast():
            check_documents_apart(built.model)
    return Engine(built, optimizer, accelerator, wrapped_model, wrapped_optimizer)


def choose_mixed_precision(dtype: torch.dtype, *, trains_base_weights: bool) -> str:
    """What accelerate casts: weights of the base that are trained stay in float32 and need autocast.

    LoRA on bfloat16 needs none: PEFT keeps its own weights in float32 and casts around them. float16 always
    needs the loss scaler that comes with it.
    """
    if dtype is torch.float16:
        return "fp16"
    return "bf16" if trains_base_weights and dtype is torch.bfloat16 else "no"
