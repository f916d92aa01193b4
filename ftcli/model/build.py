"""The model that is trained: base with LoRA (or all weights), new tokens, and what is saved of it.

Everything LoRA is PEFT's own: parameters, names and files. What is here makes sure that PEFT did what the
recipe says, and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from ftcli.errors import ContentError, UsageError, is_memory_error
from ftcli.model.base import build_skeleton, count_embedding_rows, load_model
from ftcli.model.quantization import check_trainable, parse_packing
from ftcli.model.target import Targets, list_modules, plan_targets
from ftcli.recipe import PeftSection, Recipe
from ftcli.store.target import ModelFiles, path_exists, suggest_path

_REWRITES_BASE = ("pissa", "olora")  # inits that move the base weights; see subtract_initial


@dataclass(frozen=True)
class TrainableCount:
    """Parameters that are trained, and all of them (4-bit weights counted as what they stand for)."""

    trainable: int
    total: int


@dataclass(frozen=True)
class Built:
    """A model to train.

    ``initial_lora`` are its first LoRA weights if their init moved the base (PiSSA, OLoRA), else none;
    ``trains_base_weights`` says whether whole weights are trained too, which are in float32 then.
    """

    model: Any
    initial_lora: dict[str, torch.Tensor]
    trains_base_weights: bool


def build_model(
    recipe: Recipe,
    files: ModelFiles,
    *,
    dtype: torch.dtype,
    device: torch.device,
    new_tokens: Mapping[int, list[int]] | None = None,
    is_sharded: bool = False,
) -> Built:
    """The model that ``recipe`` trains, in training mode.

    Names in the recipe are checked before a weight is read. Full fine-tuning keeps its weights in float32.

    Args:
        recipe: model, quantization, peft and train are read.
        files: the base model.
        dtype: of the frozen base, and of the computation.
        device: where the model lies.
        new_tokens: ids beyond the model's own, each with the ids that it starts from.
        is_sharded: it will be divided over processes.

    Raises:
        UsageError, ContentError: as ``plan_targets`` and ``load_model``; an adapter that does not fit.
    """
    targets = check_names(recipe, build_skeleton(files, recipe.model))
    weights_dtype = torch.float32 if recipe.peft is None else dtype
    model = load_model(
        files,
        recipe.model,
        dtype=weights_dtype,
        device=device,
        quantization=recipe.quantization if recipe.is_4bit else None,
        is_sharded=is_sharded,
    )
    if new_tokens:
        add_embeddings(model, new_tokens)
    if recipe.train.gradient_checkpointing:
        enable_checkpointing(model)
    if recipe.peft is None:
        return Built(model.train(), {}, trains_base_weights=True)
    torch.manual_seed(recipe.train.seed)
    if recipe.peft.adapter is not None:
        wrapped = load_adapter(model, find_adapter(recipe.peft.adapter), is_trainable=True)
    else:
        wrapped = add_lora(model, recipe.peft, targets, new_tokens=sorted(new_tokens or ()))
    initial_lora = _copy_lora(wrapped) if _moves_base(recipe.peft) else {}
    return Built(wrapped.train(), initial_lora, trains_base_weights=promote_trained(wrapped))


def promote_trained(model: nn.Module) -> bool:
    """Whether ``modules_to_save`` are trained; every trained parameter of ``model`` is in float32 now.

    PEFT does that for LoRA only. In bfloat16 most updates are smaller than half a step and vanish.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
    return any(".modules_to_save." in name for name, p in model.named_parameters() if p.requires_grad)


def enable_checkpointing(model: Any, context_fn: Callable[[], Any] | None = None) -> None:
    """Nothing; the blocks of ``model`` keep their inputs, and run again in the backward pass.

    What else they keep, and do not compute again, ``context_fn`` says (torch.utils.checkpoint).
    """
    options = {"use_reentrant": False} | ({"context_fn": context_fn} if context_fn else {})
    if hasattr(model, "activation_checkpointing_enable"):  # its name from transformers 5.20 on
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def check_names(recipe: Recipe, skeleton: Any) -> Targets | None:
    """The modules that LoRA goes on, checked on the model without its weights; None for full fine-tuning.

    Raises:
        UsageError: names or lengths that the model has not.
        ContentError: its weights are packed so that they cannot be trained from.
    """
    reference = recipe.model.name_or_path
    packing = parse_packing(getattr(skeleton.config, "quantization_config", None), reference)
    check_trainable(packing, reference, is_full=recipe.peft is None, is_4bit=recipe.is_4bit)
    context = getattr(skeleton.config, "max_position_embeddings", None)
    if context and recipe.data.max_length > context:
        raise UsageError(
            f"{recipe.data.max_length} is beyond the model's context of {context} tokens",
            where="data.max_length",
            hint=f"set it to at most {context}, or extend the context by a rope scaling in config.json",
        )
    if recipe.peft is None:
        return None
    if recipe.peft.adapter is not None:
        find_adapter(recipe.peft.adapter)
        return None
    return plan_targets(list_modules(skeleton), recipe.peft)


@torch.no_grad()
def add_embeddings(model: Any, new_tokens: Mapping[int, list[int]]) -> None:
    """Nothing; ``model`` has a row for each of ``new_tokens``, in the head too.

    A row starts as the mean of the rows of its description's tokens, or of all rows of the old vocabulary.
    Rows that a model keeps in reserve beyond its tokenizer (Qwen) are used before any is added.
    """
    old_size = min(new_tokens)
    if max(new_tokens) >= count_embedding_rows(model):
        model.resize_token_embeddings(max(new_tokens) + 1, mean_resizing=False)
    tables = {id(m.weight): m.weight for m in (model.get_input_embeddings(), model.get_output_embeddings())}
    for weight in tables.values():
        for token, sources in new_tokens.items():
            rows = weight[torch.tensor(sources, device=weight.device)] if sources else weight[:old_size]
            weight[token] = rows.float().mean(dim=0).to(weight.dtype)


def add_lora(model: Any, peft: PeftSection, targets: Targets | None = None, *, new_tokens: Sequence[int] = ()) -> Any:
    """``model`` wrapped by PEFT with fresh LoRA weights on exactly the modules that ``peft`` means.

    The rows of ``new_tokens`` are trained too, through PEFT's ``trainable_token_indices``.
    """
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    targets = targets or plan_targets(list_modules(model), peft)
    is_conv1d = any(isinstance(model.get_submodule(name), Conv1D) for name in targets.modules)
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    saved_whole = set(peft.modules_to_save or ())
    config = LoraConfig(
        trainable_token_indices=_name_token_rows(model, new_tokens, saved_whole, tied=tied),
        task_type="CAUSAL_LM",
        r=peft.r,
        lora_alpha=peft.lora_alpha,
        lora_dropout=peft.lora_dropout,
        target_modules=targets.target_modules,
        layers_to_transform=targets.layers_to_transform,
        modules_to_save=name_saved_modules(model, peft.modules_to_save or ()) or None,
        use_rslora=peft.use_rslora,
        use_dora=peft.use_dora,
        init_lora_weights=peft.init_lora_weights,
        rank_pattern=dict(peft.rank_pattern),
        alpha_pattern=dict(peft.alpha_pattern),
        fan_in_fan_out=is_conv1d,
        ensure_weight_tying=tied and bool({"embed_tokens", "lm_head", "wte"} & saved_whole),
    )
    wrapped = get_peft_model(model, config)
    adapted = set(list_adapted(wrapped))
    if adapted != set(targets.modules):
        difference = sorted(adapted ^ set(targets.modules))[:3]
        raise RuntimeError(f"PEFT adapted other modules than planned: {difference}")
    return wrapped


def name_saved_modules(model: nn.Module, wanted: Sequence[str]) -> list[str]:
    """``wanted`` so that PEFT means the same modules: it compares endings, and ``norm`` ends ``input_layernorm``."""
    names = [name for name, _ in model.named_modules()]
    saved: list[str] = []
    for entry in wanted:
        meant = [name for name in names if name == entry or name.endswith("." + entry)]
        is_plain = meant == [name for name in names if name.endswith(entry)]
        saved += [entry] if is_plain else meant
    return saved


def _name_token_rows(
    model: Any, new_tokens: Sequence[int], saved_whole: set[str], *, tied: bool
) -> dict[str, list[int]] | None:
    """Table → rows to train; PEFT follows a tied head by itself, an untied one must be named."""
    if tied and saved_whole & {"embed_tokens", "lm_head", "wte"}:
        return None  # the one matrix is trained whole
    names = {id(module): name.rsplit(".", 1)[-1] for name, module in model.named_modules()}
    tables = [model.get_input_embeddings(), *([] if tied else [model.get_output_embeddings()])]
    rows = {names[id(table)]: list(new_tokens) for table in tables if names[id(table)] not in saved_whole}
    return rows if new_tokens and rows else None


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
        if path_exists(candidate / "adapter_config.json", path):
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
    except (ValueError, RuntimeError, KeyError, TypeError, IndexError, OSError) as error:
        if is_memory_error(error):
            raise
        raise ContentError(
            "the adapter does not fit this base model", where=str(folder), why=str(error).splitlines()[0]
        ) from error
    wanted = {
        name: tuple(value.shape)
        for name, value in get_peft_model_state_dict(wrapped, save_embedding_layers=False).items()
    }
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
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ContentError(f"the adapter cannot be read: {error}", where=str(path)) from error


def count_parameters(model: nn.Module) -> TrainableCount:
    """How many parameters of ``model`` are trained, and how many it has."""
    trainable = total = 0
    for parameter in model.parameters():
        shape = getattr(getattr(parameter, "quant_state", None), "shape", None)
        size = torch.Size(shape).numel() if shape is not None else parameter.numel()
        total += size
        trainable += size if parameter.requires_grad else 0
    return TrainableCount(trainable, total)


def save_adapter(
    model: Any,
    folder: Path,
    *,
    initial_lora: dict[str, torch.Tensor],
    base: str,
    revision: str | None,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Nothing; ``folder`` holds the adapter as plain PEFT loads it onto the untouched base ``base``.

    ``weights`` are what is trained of ``model``, by name, where it has only a part of each itself.
    """
    model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False, state_dict=weights)
    config_path, weights_path = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if not config_path.exists() or not weights_path.exists():
        raise RuntimeError(f"PEFT saved no adapter into {folder}")
    config = json.loads(config_path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"], config["revision"] = base, revision
    if initial_lora:
        save_file(subtract_initial(load_file(weights_path), initial_lora), weights_path, {"format": "pt"})
        config |= _double_rank(config)
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / "README.md").unlink(missing_ok=True)


def subtract_initial(trained: dict[str, torch.Tensor], initial: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An ordinary LoRA of twice the rank that equals ``trained`` on the base that the init had moved.

    W − B₀A₀ + BA = W + [B, −B₀]·[A; A₀].  Source: PiSSA (arXiv 2404.02948) §3; PEFT docs, lora#pissa.
    """
    converted = dict(trained)
    for name, first in initial.items():
        first = first.to(trained[name])
        converted[name] = (
            torch.cat([trained[name], first], dim=0) if "lora_A" in name else torch.cat([trained[name], -first], dim=1)
        ).contiguous()
    return converted


def _double_rank(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of an adapter of twice the rank and the same scale: alpha / r, or alpha / sqrt(r)."""
    factor = 2**0.5 if config["use_rslora"] else 2
    return {
        "r": 2 * config["r"],
        "lora_alpha": factor * config["lora_alpha"],
        "rank_pattern": {key: 2 * rank for key, rank in config["rank_pattern"].items()},
        "alpha_pattern": {key: factor * alpha for key, alpha in config["alpha_pattern"].items()},
        "init_lora_weights": True,
    }


def _moves_base(peft: PeftSection) -> bool:
    return isinstance(peft.init_lora_weights, str) and peft.init_lora_weights.startswith(_REWRITES_BASE)


def _copy_lora(model: Any) -> dict[str, torch.Tensor]:
    from peft.utils import get_peft_model_state_dict

    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: value.detach().cpu().clone() for name, value in weights.items() if ".lora_" in name}
