"""What a model's own files say about the data that it can take; read without loading anything."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from ftcli.store.gguf_header import read_gguf_header
from ftcli.store.target import ModelFiles, read_config


@dataclass(frozen=True)
class ModelLimits:
    """What the model's own files say, None where they do not."""

    embedding_rows: int | None = None
    context: int | None = None
    eos_ids: tuple[int, ...] = ()


def read_limits(files: ModelFiles, *, embedding_rows: int | None = None) -> ModelLimits:
    """The limits of the model in ``files``, which may be a tokenizer alone.

    Args:
        files: where the model lies.
        embedding_rows: of a model that is known better than by its config, with new tokens.

    Raises:
        ContentError: a config that is no JSON.
    """
    if path := files.gguf_path:
        header = read_gguf_header(path)
        shapes = {tensor.name: tensor.shape for tensor in header.tensors}
        rows = embedding_rows or shapes.get("token_embd.weight", (None,))[0]
        return ModelLimits(rows, header.metadata.get(f"{header.architecture}.context_length"))
    if not (files.folder / "config.json").exists():
        return ModelLimits(embedding_rows)
    config = read_config(files)
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    assert isinstance(text, dict)
    context = text.get("max_position_embeddings", text.get("n_positions"))
    rows = embedding_rows or text.get("vocab_size", config.get("vocab_size"))
    return ModelLimits(rows, context, _read_eos(files, config))


def _read_eos(files: ModelFiles, config: dict[str, Any]) -> tuple[int, ...]:
    """The ids at which generation stops: those of generation_config.json, else of the config."""
    path = files.folder / "generation_config.json"
    try:
        given = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    except (OSError, ValueError, AttributeError):
        given = config.get("eos_token_id")
    return tuple(token for token in (given if isinstance(given, list) else [given]) if isinstance(token, int))
