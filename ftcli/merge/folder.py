"""The merged model's folder: weights in shards, and beside them all that a runtime asks for.

    model….safetensors + index · config.json · generation_config.json · tokenizer and template · tokenizer.model · *.py

Config and code are the base's, tokenizer and template the adapter's where it brings them: those that were trained.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ftcli.data.tokenizer import load_tokenizer, save_tokenizer
from ftcli.events import OnEvent, Pace
from ftcli.merge.arithmetic import Measure, Survival, make_blocks
from ftcli.merge.plan import MergePlan, Part, Weights
from ftcli.model.base import clean_config, join_stops
from ftcli.store.file import read_json, write_json
from ftcli.store.shard import PlannedTensor, plan_shards, write_shards
from ftcli.store.target import ModelFiles

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
)
_TEMPLATES = "additional_chat_templates"  # a folder


def write_weights(folder: Path, plan: MergePlan, weights: Weights, on_event: OnEvent) -> list[Survival]:
    """What of each module's update is in the weights that now lie in ``folder``.

    Raises:
        ContentError: NaN in the base.
        NumericError: a value is too large for its dtype.
    """
    parts = {part.name: part for part in plan.parts}
    pace = Pace("merge", sum(part.tensor.size_bytes for part in plan.parts), unit="bytes")
    survivals: list[Survival] = []

    def make_pieces(tensor: PlannedTensor) -> Iterator[Any]:
        part, measure = parts[tensor.name], Measure(tensor.name)
        for block in make_blocks(part, weights, measure):
            piece = block.contiguous().reshape(-1).view(torch.uint8).numpy()
            yield piece
            on_event(pace.advance(piece.nbytes))
        if part.lora:
            survivals.append(measure.finish())

    write_shards(folder, plan_shards([part.tensor for part in plan.parts]), make_pieces)
    return survivals


def write_config(folder: Path, files: ModelFiles, skeleton: Any, plan: MergePlan) -> None:
    """Nothing; ``config.json`` is the base's, with what the merge changed; its Python code lies beside it."""
    config = read_json(files.folder / "config.json") if not files.gguf_file else None
    if config is None:
        config = clean_config(skeleton.config).to_diff_dict()
    config.setdefault("architectures", [type(skeleton).__name__])  # which vLLM asks for
    config["vocab_size"] = plan.vocab_size
    if plan.splits_tie:
        config["tie_word_embeddings"] = False
    config["dtype" if "dtype" in config else "torch_dtype" if "torch_dtype" in config else "dtype"] = plan.dtype
    config.pop("_name_or_path", None)
    write_json(folder / "config.json", config)
    for path in files.folder.glob("*.py") if config.get("auto_map") else ():
        shutil.copyfile(path, folder / path.name)


def write_tokenizer(folder: Path, files: ModelFiles, adapter: Path) -> None:
    """Nothing; tokenizer and template are those that the adapter was trained with."""
    if (adapter / "tokenizer.json").exists():
        for name in _TOKENIZER_FILES:
            if (adapter / name).is_file():
                shutil.copyfile(adapter / name, folder / name)
        if (adapter / _TEMPLATES).is_dir():
            shutil.copytree(adapter / _TEMPLATES, folder / _TEMPLATES)
    else:
        save_tokenizer(load_tokenizer(files), folder)
    for source in (adapter, files.folder):
        if (source / "tokenizer.model").is_file() and not (folder / "tokenizer.model").exists():
            shutil.copyfile(source / "tokenizer.model", folder / "tokenizer.model")


def copy_texts(source: Path, folder: Path) -> None:
    """Nothing; what a model's folder holds beside its weights lies in ``folder`` too: configs, tokenizer, its code."""
    names = (*_TOKENIZER_FILES, "tokenizer.model", "config.json", "generation_config.json")
    has_code = bool((read_json(source / "config.json") or {}).get("auto_map"))
    for path in sorted(source.iterdir()):
        if path.is_file() and (path.name in names or (has_code and path.suffix == ".py")):
            shutil.copyfile(path, folder / path.name)
    if (source / _TEMPLATES).is_dir():
        shutil.copytree(source / _TEMPLATES, folder / _TEMPLATES)


def write_generation_config(folder: Path, files: ModelFiles, adapter: Path, skeleton: Any, stops: list[int]) -> None:
    """Nothing; the generation config ends answers where trained turns end: at one of ``stops``, or of its own."""
    config = read_json(adapter / "generation_config.json")
    if config is None and not files.gguf_file:
        config = read_json(files.folder / "generation_config.json")
    if config is None:
        config = json.loads(skeleton.generation_config.to_json_string())
    config["eos_token_id"] = join_stops(config.get("eos_token_id"), stops)
    # with this mark transformers would take the eos of config.json instead
    config.pop("_from_model_config", None)
    write_json(folder / "generation_config.json", config)


def iterate_tensors(plan: MergePlan, weights: Weights) -> Iterator[tuple[Part, torch.Tensor]]:
    """Yields every part with its whole tensor, as `write_weights` would write it."""
    for part in plan.parts:
        blocks = list(make_blocks(part, weights))
        yield part, torch.cat(blocks) if len(blocks) > 1 else blocks[0]
