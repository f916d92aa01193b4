"""What a run will need of memory, from its own largest micro-batch, for its manifest."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ftcli.errors import FtcliError
from ftcli.model.base import choose_device, choose_dtype
from ftcli.model.demand import Device, build_recipe_training, describe_files, measure_shape
from ftcli.model.forecast import forecast_memory
from ftcli.store.target import read_config
from ftcli.store.weight import read_weight_table
from ftcli.train.prepare import Prepared


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
    forecast = forecast_memory(shape, training)
    return {
        **{f"{part.name.replace(' ', '_')}_bytes": part.size_bytes for part in forecast.components},
        "total_bytes": forecast.total_bytes,
        "device": kind,
        "tokens": training.tokens,
        "is_calibrated": forecast.is_calibrated,
    }
