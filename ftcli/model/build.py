"""The model that is trained: base with LoRA (or all weights), new tokens, and what is saved of it.

Everything LoRA is PEFT's own: parameters, names and files. What is here makes sure that PEFT did what the
recipe says, and nothing else.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from ftcli.errors import ContentError, UsageError
from ftcli.model.base import build_skeleton, load_model
from ftcli.model.target import Targets, plan_targets
from ftcli.recipe import PeftSection, Recipe
from ftcli.store.target import ModelFiles, suggest_path

_REWRITES_BASE = ("pissa", "olora")  # inits that move the base weights; see save_adapter


@dataclass(frozen=True)
class TrainableCount:
    """Parameters that are trained, and all of them (4-bit weights counted as what they stand for)."""

    trainable: int
    total: int


def build_model(
    recipe: Recipe, files: ModelFiles, *, dtype: torch.dtype, device: torch.device, initial_folder: Path
) -> Any:
    """The model that ``recipe`` trains, in training mode.

    Names in the recipe are checked before a weight is read. Full fine-tuning keeps its weights in float32.

    Args:
        recipe: model, quantization, peft and train are read.
        files: the base model.
        dtype: of the frozen base, and of the computation.
        device: where the model lies.
        initial_folder: where an init that moves the base weights (PiSSA, OLoRA) leaves its first adapter.

    Raises:
        UsageError, ContentError: as ``plan_targets`` and ``load_model``; an adapter that does not fit.
    """
    targets = check_names(recipe, files)
    weights_dtype = torch.float32 if recipe.peft is None else dtype
    model = load_model(
        files,
        recipe.model,
        dtype=weights_dtype,
        device=device,
        quantization=recipe.quantization if recipe.is_4bit else None,
    )
    if recipe.train.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if recipe.peft is None:
        return model.train()
    torch.manual_seed(recipe.train.seed)
    if recipe.peft.adapter is not None:
        wrapped = load_adapter(model, find_adapter(recipe.peft.adapter), is_trainable=True)
    else:
        wrapped = add_lora(model, recipe.peft, targets)
    if _moves_base(recipe.peft):
        _save_initial(wrapped, initial_folder)
    return wrapped.train()


def check_names(recipe: Recipe, files: ModelFiles) -> Targets | None:
    """The modules that LoRA goes on, checked on the model without its weights; None for full fine-tuning."""
    skeleton = build_skeleton(files, recipe.model)
    context = getattr(skeleton.config, "max_position_embeddings", None)
    if context and recipe.data.max_length > context:
        raise UsageError(
            f"{recipe.data.max_length} is beyond the model's context of {context} tokens",
            where="data.max_length",
            hint=f"set it to at most {context}, or extend the context with a rope scaling in the model's config.json",
        )
    if recipe.peft is None:
        return None
    if recipe.peft.adapter is not None:
        find_adapter(recipe.peft.adapter)
        return None
    return plan_targets(skeleton, recipe.peft)


def add_lora(model: Any, peft: PeftSection, targets: Targets | None = None) -> Any:
    """``model`` wrapped by PEFT with fresh LoRA weights on exactly the modules that ``peft`` means."""
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    targets = targets or plan_targets(model, peft)
    is_conv1d = any(isinstance(model.get_submodule(name), Conv1D) for name in targets.modules)
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=peft.r,
        lora_alpha=peft.lora_alpha,
        lora_dropout=peft.lora_dropout,
        target_modules=targets.target_modules,
        layers_to_transform=targets.layers_to_transform,
        modules_to_save=list(peft.modules_to_save) if peft.modules_to_save else None,
        use_rslora=peft.use_rslora,
        use_dora=peft.use_dora,
        init_lora_weights=peft.init_lora_weights,
        rank_pattern=dict(peft.rank_pattern),
        alpha_pattern=dict(peft.alpha_pattern),
        fan_in_fan_out=is_conv1d,
        ensure_weight_tying=tied and bool(peft.modules_to_save),
    )
    wrapped = get_peft_model(model, config)
    adapted = set(list_adapted(wrapped))
    if adapted != set(targets.modules):
        difference = sorted(adapted ^ set(targets.modules))[:3]
        raise RuntimeError(f"PEFT adapted other modules than planned: {difference}")
    return wrapped


def list_adapted(model: Any) -> list[str]:
    """Full names, in the base model, of the modules that carry LoRA."""
    from peft.tuners.lora import LoraLayer

    prefix = "base_model.model."
    return [name.removeprefix(prefix) for name, m in model.named_modules() if isinstance(m, LoraLayer)]


def find_adapter(path: str) -> Path:
    """The folder of an adapter: the folder itself, or ``adapter/`` of a run folder.

    Raises:
        UsageError: there is no adapter.
    """
    folder = Path(path).expanduser()
    for candidate in (folder, folder / "adapter"):
        if (candidate / "adapter_config.json").exists():
            return candidate
    hint = "an adapter folder holds adapter_config.json" if folder.exists() else suggest_path(folder)
    raise UsageError("is no adapter folder", where=str(path), hint=hint)


def load_adapter(model: Any, folder: Path, *, is_trainable: bool = False) -> Any:
    """``model`` with the adapter in ``folder``, every weight of which found its place.

    Raises:
        ContentError: the files are damaged, hold NaN, or are of a model with other modules or shapes.
    """
    from peft import PeftModel
    from peft.utils import get_peft_model_state_dict

    stored = _read_adapter_shapes(folder)
    try:
        wrapped = PeftModel.from_pretrained(model, str(folder), is_trainable=is_trainable)
    except (ValueError, RuntimeError, KeyError, TypeError, OSError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ContentError(
            "the adapter does not fit this base model", where=str(folder), why=str(error).splitlines()[0]
        ) from error
    wanted = {name: tuple(value.shape) for name, value in get_peft_model_state_dict(wrapped).items()}
    if differing := sorted(name for name in stored.keys() | wanted.keys() if stored.get(name) != wanted.get(name)):
        raise ContentError(
            f"the adapter does not fit this base model: {len(differing)} weights, such as {differing[0]}",
            where=str(folder),
            hint="name the base that the adapter was trained on",
        )
    return wrapped


def _read_adapter_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    path = folder / "adapter_model.safetensors"
    try:
        with safe_open(path, framework="pt") as weights:
            shapes = {}
            for name in weights.keys():  # noqa: SIM118 - safe_open is no mapping
                tensor = weights.get_tensor(name)
                shapes[name] = tuple(tensor.shape)
                if not torch.isfinite(tensor).all():
                    raise ContentError(f"{name} holds NaN or infinity", where=str(path))
            return shapes
    except (OSError, ValueError, RuntimeError) as error:
        raise ContentError(f"the adapter cannot be read: {error}", where=str(path)) from error
    except Exception as error:
        if type(error).__name__ == "SafetensorError":
            raise ContentError(f"the adapter is damaged: {error}", where=str(path)) from error
        raise


def count_parameters(model: nn.Module) -> TrainableCount:
    """How many parameters of ``model`` are trained, and how many it has."""
    trainable = total = 0
    for parameter in model.parameters():
        shape = getattr(getattr(parameter, "quant_state", None), "shape", None)
        size = torch.Size(shape).numel() if shape is not None else parameter.numel()
        total += size
        trainable += size if parameter.requires_grad else 0
    return TrainableCount(trainable, total)


def save_adapter(model: Any, folder: Path, *, initial_folder: Path, base: str) -> None:
    """Nothing; ``folder`` holds the adapter as plain PEFT loads it onto the untouched base.

    An init that moved the base weights (PiSSA, OLoRA) is turned into an ordinary LoRA of twice the rank: the
    difference to the first adapter (``initial_folder``). Source: PEFT docs, developer_guides/lora#pissa.
    """
    extra = {"path_initial_model_for_weight_conversion": str(initial_folder)} if initial_folder.exists() else {}
    model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False, **extra)
    path = folder / "adapter_config.json"
    if not path.exists():
        raise RuntimeError(f"PEFT saved no adapter into {folder}")
    saved = json.loads(path.read_text(encoding="utf-8"))
    saved["base_model_name_or_path"] = base
    if extra:
        saved["init_lora_weights"] = True
    path.write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / "README.md").unlink(missing_ok=True)


def _moves_base(peft: PeftSection) -> bool:
    return isinstance(peft.init_lora_weights, str) and peft.init_lora_weights.startswith(_REWRITES_BASE)


def _save_initial(model: Any, folder: Path) -> None:
    """Keep the first adapter of an init that moved the base; on resume the same init makes the same one."""
    config = model.peft_config["default"]
    init, config.init_lora_weights = config.init_lora_weights, True
    model.save_pretrained(str(folder), save_embedding_layers=False)
    config.init_lora_weights = init
