"""What a run will need of memory, from its own largest micro-batch, and what to change when it is too much."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ftcli.errors import FtcliError, MemoryExhausted
from ftcli.fused.family import is_fast
from ftcli.model.activation import Shape, Training
from ftcli.model.base import choose_device, choose_dtype
from ftcli.model.demand import Device, build_recipe_training, describe_files, measure_shape
from ftcli.model.forecast import HALVED_ROWS, Change, Forecast, fit, forecast_memory
from ftcli.model.layout import locate_tensor
from ftcli.recipe import Recipe
from ftcli.store.target import read_config
from ftcli.store.weight import WeightTable, read_weight_table
from ftcli.train.prepare import Prepared

_STORED_AS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_WINDOW_BYTES = 1 << 16
_MARGIN = 1.1  # forecasts are right within a tenth


@dataclass(frozen=True)
class RunForecast:
    """The forecast of one run, with what it was made from."""

    shape: Shape
    training: Training
    forecast: Forecast

    def to_json(self) -> dict[str, Any]:
        """The manifest's ``forecast``: bytes by component and in all."""
        return {
            **{f"{part.name.replace(' ', '_')}_bytes": part.size_bytes for part in self.forecast.components},
            "total_bytes": self.forecast.total_bytes,
            "device": self.training.device,
            "tokens": self.training.tokens,
            "peak_phase": self.forecast.peak_phase,
            "is_calibrated": self.forecast.is_calibrated,
        }


def forecast_run(prepared: Prepared) -> RunForecast | None:
    """The forecast of a run; None for a model that cannot be forecast.

    The micro-batch with the most tokens decides; evaluation is not in it.
    """
    files, recipe, device, n = prepared.files, prepared.recipe, choose_device(), prepared.plan.n_processes
    try:
        table = read_weight_table(files.gguf_path or files.folder)
        config = None if files.gguf_path else read_config(files)
        anatomy = describe_files(config, table, where=files.reference)
        dtype = str(choose_dtype(recipe.model.dtype, device)).removeprefix("torch.")
        kind: Device = "cuda" if device.type == "cuda" else "cpu"
        is_fused = is_fast(recipe, anatomy.dimensions.family)
        training = build_recipe_training(recipe, anatomy, device=kind, is_fused=is_fused, dtype=dtype, n_processes=n)
        shape = measure_shape(anatomy)
    except FtcliError:
        return None
    documents = prepared.split.train.documents
    lengths, targets = documents.lengths, documents.count_targets().tolist()
    largest = prepared.largest[0]
    training = replace(
        training,
        tokens=sum(lengths[index] for index in largest),
        longest_document=max(lengths[index] for index in largest),
        target_tokens=max(1, sum(targets[index] for index in largest)),
        n_documents=len(largest),
        n_rows=recipe.train.per_device_train_batch_size if recipe.data.packing else len(largest),
    )
    is_copied = bool(recipe.tokenizer.add_tokens or (recipe.peft and recipe.peft.modules_to_save))
    if kind == "cpu" and training.method != "full" and not anatomy.is_tied and not is_copied:
        training = replace(training, unread_bytes=_count_unread(table, training.dtype, documents.table.ids))
    return RunForecast(shape, training, forecast_memory(shape, training))


def check_memory(found: RunForecast | None, recipe: Recipe, available_bytes: int) -> None:
    """None if a run on the CPU can fit, where a system ends processes that take too much without a word.

    Raises:
        MemoryExhausted: it cannot, even if the forecast is a tenth too high.
    """
    if found and found.training.device == "cpu" and found.forecast.total_bytes > _MARGIN * available_bytes:
        raise explain_memory(found, recipe, available_bytes, what="the run does not fit into memory")


def explain_memory(
    found: RunForecast | None, recipe: Recipe, available_bytes: int, *, what: str, why: str = ""
) -> MemoryExhausted:
    """The error with the forecast's numbers and the smallest change that fits.

    Args:
        found: the forecast, if there is one.
        recipe: what was asked for.
        available_bytes: what the run could take when it began.
        what: where memory ran out.
        why: what the allocator said.
    """
    if found is None:
        hint = (
            "set train.gradient_checkpointing: true, a smaller data.max_length, or quantization: {load_in_4bit: true}"
        )
        return MemoryExhausted(what, why=why, hint=hint)
    total = found.forecast.total_bytes
    numbers = (
        f"forecast {_format(total)} with micro-batches of up to {found.training.tokens:,} tokens, "
        f"{_format(available_bytes)} available when it began"
    )
    # where less than the forecast was too much, the forecast is no measure of what fits: a tenth less is tried
    changes, can_fit = fit(found.shape, found.training, min(available_bytes, int(total / _MARGIN)))
    if not can_fit:
        least = changes[-1].training if changes else found.training
        size = _format(forecast_memory(found.shape, least).total_bytes)
        hint = f"no setting makes it fit ({size} at the least); take a smaller model, or a larger machine"
    else:
        size = _format(forecast_memory(found.shape, changes[-1].training).total_bytes)
        settings = " ".join(f"--set {text}" for text in _list_settings(recipe, changes))
        keeps = ", with the same result" if all(change.keeps_result for change in changes) else ""
        hint = f"the smallest change that fits: {settings} (forecast {size}{keeps})"
    return MemoryExhausted(what, why="\n  ".join(filter(None, (numbers, why))), hint=hint)


def _list_settings(recipe: Recipe, changes: tuple[Change, ...]) -> list[str]:
    """The changes as ``key=value``, each key once, with its last value."""
    settings: dict[str, str] = {}
    rows = recipe.train.per_device_train_batch_size
    n_rows = rows * recipe.train.gradient_accumulation_steps
    for change in changes:
        if change.key == HALVED_ROWS:
            rows = max(size for size in range(1, change.training.n_rows + 1) if n_rows % size == 0)
            settings["train.per_device_train_batch_size"] = str(rows)
            settings["train.gradient_accumulation_steps"] = str(n_rows // rows)
        elif change.key == "peft":
            settings["peft"] = "{r: 16, target_modules: all-linear}"
        else:
            settings[change.key] = change.value
    return [f"'{key}={value}'" if " " in value else f"{key}={value}" for key, value in settings.items()]


def _format(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.0f} MB"


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
