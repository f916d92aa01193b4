"""What a run leaves to be used: ``adapter/`` or ``model/``, with tokenizer and template as they were trained.

Where a trained turn ends, a runtime must stop: the token is an end of sequence in the generation config that is
saved, and the tokenizer's own where that was a token that no trained turn ends with.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from ftcli.data.chat import ChatRenderer
from ftcli.data.tokenizer import save_tokenizer
from ftcli.evaluate.target import ORIGIN
from ftcli.model.base import join_stops, name_dtype
from ftcli.model.build import Built, save_adapter
from ftcli.store.file import staged_folder, write_json
from ftcli.store.run import MANIFEST_SCHEMA, RunFolder
from ftcli.train.prepare import Prepared


def save_artifact(
    run: RunFolder, prepared: Prepared, built: Built, weights: dict[str, torch.Tensor] | None = None
) -> Path:
    """``adapter/`` (LoRA) or ``model/`` (full fine-tuning), with tokenizer and template as they were trained.

    ``weights`` are the model's, by name, where it has only a part of each itself.
    """
    model, is_full = built.model, prepared.recipe.peft is None
    base = model if is_full else model.get_base_model()
    generation_config, tokenizer = _copy_valid(base.generation_config), prepared.renderer.tokenizer
    generation_config._from_model_config = False  # else transformers would take the eos of config.json instead
    if prepared.split.has_chats:
        generation_config.eos_token_id = join_stops(generation_config.eos_token_id, prepared.renderer.end_of_turn_ids)
        tokenizer = _mend_tokenizer(prepared.renderer)
    final = run.model if is_full else run.adapter
    with staged_folder(final) as folder:
        if is_full:
            model.generation_config = generation_config
            model.config.use_cache = True
            model.save_pretrained(str(folder), state_dict=weights)
        else:
            name, revision = prepared.recipe.model.name_or_path, prepared.files.revision
            save_adapter(model, folder, initial_lora=built.initial_lora, base=name, revision=revision, weights=weights)
            generation_config.save_pretrained(str(folder))
            write_json(folder / ORIGIN, _describe_origin(prepared))
        save_tokenizer(tokenizer, folder)
    return final


def _describe_origin(prepared: Prepared) -> dict[str, Any]:
    """What must be known of an adapter's training wherever it is used."""
    recipe = prepared.recipe
    return {
        "schema": MANIFEST_SCHEMA,
        **{key: prepared.inputs[key] for key in ("base", "tokenizer_sha256", "template_sha256", "template_date")},
        "dtype": name_dtype(recipe.model),
        "quantization": recipe.quantization.model_dump() if recipe.quantization and recipe.is_4bit else None,
        "chat_template_kwargs": dict(recipe.tokenizer.chat_template_kwargs),
        "added_tokens": list(recipe.tokenizer.add_tokens),
    }


def _copy_valid(generation_config: Any) -> Any:
    """A copy of the config; transformers refuses to save one that contradicts itself, of which the ids are kept."""
    from transformers import GenerationConfig

    try:
        generation_config.validate(strict=True)
    except ValueError:
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        return GenerationConfig(**{key: getattr(generation_config, key) for key in ids})
    return deepcopy(generation_config)


def _mend_tokenizer(renderer: ChatRenderer) -> Any:
    """The tokenizer with an end of sequence that ends a trained turn; the same one if its own does."""
    tokenizer, ends = renderer.tokenizer, renderer.find_turn_ends()
    if tokenizer.eos_token in ends:
        return tokenizer
    mended = deepcopy(tokenizer)
    mended.eos_token = ends[0]
    return mended
