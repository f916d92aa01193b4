"""What a run will need of memory, from its own largest micro-batch, for its manifest."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from ftcli.errors import FtcliError
from ftcli.model.base import choose_device, choose_dtype
from ftcli.model.demand import Device, build_recipe_training, describe_files, measure_shape
from ftcli.model.forecast import forecast_memory
from ftcli.model.layout import locate_tensor
from ftcli.store.target import read_config
from ftcli.store.weight import WeightTable, read_weight_table
from ftcli.train.prepare import Prepared

_STORED_AS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_WINDOW_BYTES = 1 << 16


def forecast_run(prepared: Prepared) -> dict[str, Any] | None:
    """The manifest's ``forecast``: bytes by component and in all; None for a model that cannot be forecast.

    The micro-batch of the first epoch with the most tokens decides; evaluation is not in it.
    """
    files, recipe, device = prepared.files, prepared.recipe, choose_device()
    try:
        table = read_weight_table(files.gguf_path or files.folder)
        config = None if files.gguf_path else read_config(files)
        anatomy = describe_files(config, table, where=files.reference)
        dtype = str(choose_dtype(recipe.model.dtype, device)).removeprefix("torch.")
        kind: Device = "cuda" if device.type == "cuda" else "cpu"
        training = build_recipe_training(recipe, anatomy, device=kind, dtype=dtype)
        shape = measure_shape(anatomy)
    except FtcliError:
        return None
    documents = prepared.split.train.documents
    lengths, targets = documents.lengths, documents.count_targets().tolist()
    batches = [batch for step in prepared.plan.first_epoch for batch in step]
    largest = max(batches, key=lambda batch: sum(lengths[index] for index in batch))
    training = replace(
        training,
        tokens=sum(lengths[index] for index in largest),
        longest_document=max(lengths[index] for index in largest),
        target_tokens=max(1, sum(targets[index] for index in largest)),
        n_documents=len(largest),
    )
    is_copied = bool(recipe.tokenizer.add_tokens or (recipe.peft and recipe.peft.modules_to_save))
    if kind == "cpu" and training.method != "full" and not anatomy.is_tied and not is_copied:
        training = replace(training, unread_bytes=_count_unread(table, training.dtype, documents.table.ids))
    forecast = forecast_memory(shape, training)
    return {
        **{f"{part.name.replace(' ', '_')}_bytes": part.size_bytes for part in forecast.components},
        "total_bytes": forecast.total_bytes,
        "device": kind,
        "tokens": training.tokens,
        "peak_phase": forecast.peak_phase,
        "is_calibrated": forecast.is_calibrated,
    }


def _count_unread(table: WeightTable, dtype: str, ids: Any) -> int:
    """Bytes of an untied and frozen embedding that stay on disk while only the rows of ``ids`` are read.

    An embedding that is not cast stays a view of its file. The kernel maps the 64 KiB around each page that is read
    (fault_around_bytes, Linux mm/memory.c).
    """
    entry = next((entry for entry in table.tensors if locate_tensor(entry.name).part == "embedding"), None)
    if entry is None or entry.dtype != _STORED_AS[dtype] or not entry.file.endswith(".safetensors"):
        return 0
    row_bytes = entry.size_bytes // entry.shape[0]
    starts = (entry.offset or 0) + np.unique(ids).astype(np.int64) * row_bytes
    windows = np.union1d(starts // _WINDOW_BYTES, (starts + row_bytes - 1) // _WINDOW_BYTES)
    return max(0, entry.size_bytes - len(windows) * _WINDOW_BYTES)
