"""What a run leaves to be used: ``adapter/`` or ``model/``, with tokenizer and template as they were trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ftcli.data.chat import ChatRenderer
from ftcli.model.build import Built, save_adapter
from ftcli.store.file import staged_folder
from ftcli.store.run import RunFolder
from ftcli.train.prepare import Prepared


def save_artifact(run: RunFolder, prepared: Prepared, built: Built) -> Path:
    """``adapter/`` (LoRA) or ``model/`` (full fine-tuning), with tokenizer and template as they were trained."""
    model = built.model
    is_full = prepared.recipe.peft is None
    final = run.model if is_full else run.adapter
    with staged_folder(final) as folder:
        if is_full:
            model.generation_config = _mend_stop_tokens(model.generation_config, prepared.renderer)
            model.config.use_cache = True
            model.save_pretrained(str(folder))
        else:
            base, revision = prepared.recipe.model.name_or_path, prepared.files.revision
            save_adapter(model, folder, initial_lora=built.initial_lora, base=base, revision=revision)
        prepared.renderer.tokenizer.save_pretrained(str(folder))
    return final


def _mend_stop_tokens(generation_config: Any, renderer: ChatRenderer) -> Any:
    """The generation config with every token that ends a trained turn among its eos."""
    eos = generation_config.eos_token_id
    known = [] if eos is None else list(eos) if isinstance(eos, list) else [eos]
    if renderer.tokenizer.chat_template:
        known += [token for token in renderer.end_of_turn_ids if token not in known]
    generation_config.eos_token_id = known[0] if len(known) == 1 else known or None
    return generation_config
