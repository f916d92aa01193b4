"""What an adapter's files say, tensor by tensor: LoRA factors, trained rows, and weights that stand in whole.

base_model.model.NAME.lora_A.weight   ─┐
base_model.model.NAME.lora_B.weight    ├▶ lora[NAME.weight]      W' = W + s B A, with DoRA rescaled by row
base_model.model.NAME.lora_magnitude_vector
base_model.model.NAME.token_adapter.…  ─▶ rows[NAME.weight]      some rows are replaced, new ones appended
base_model.model.NAME.weight or .bias  ─▶ whole[NAME.weight]     modules_to_save, biases
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ftcli.errors import ContentError
from ftcli.model.lora import find_scale
from ftcli.model.stored import TORCH_DTYPES, ReadRows, is_finite, load_bin, read_rows
from ftcli.store.file import read_json
from ftcli.store.tensor import TensorEntry
from ftcli.store.weight import read_weight_table

_PREFIX = "base_model.model."
_LORA = re.compile(r"(.+)\.lora_(?:embedding_)?(A|B)(?:\.(?:default\.)?weight|\.default)?")
_MAGNITUDE = re.compile(r"(.+)\.lora_magnitude_vector(?:\.(?:default\.)?weight|\.default)?")
_ROWS = re.compile(r"(.+)\.token_adapter\.trainable_tokens_delta(?:\.default)?")
# keys of LoraConfig that change what the factors mean, and what they ask for
_UNMERGEABLE = {
    "target_parameters": "LoRA on single parameters (experts)",
    "layer_replication": "layers that stand several times",
    "alora_invocation_tokens": "aLoRA, which is only on after certain tokens",
    "arrow_config": "Arrow routing between adapters",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "BD-LoRA",
    "monteclora_config": "MonteCLoRA",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
    "lora_bias": "a bias of its own on each LoRA layer",
}
_MOVES_BASE = ("pissa", "olora", "corda", "loftq")
_BLOCK_ROWS = 1 << 14


@dataclass(frozen=True)
class Value:
    """A tensor of an adapter, of which rows can be read; the file is not held in memory."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read_rows: ReadRows

    def read(self) -> torch.Tensor:
        """All of it."""
        return self.read_rows(0, self.shape[0] if self.shape else 1)


@dataclass(frozen=True)
class Lora:
    """One module's update s·B·A with A (r, in) and B (out, r) in float32.

    ``magnitude`` (out,) is DoRA's, None without it. ``transposed`` says that the weight lies as (in, out).
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    magnitude: torch.Tensor | None = None
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight that it changes."""
        shape = (self.b.shape[0], self.a.shape[1])
        return shape[::-1] if self.transposed else shape

    def make_rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows ``start`` to ``stop`` of s·B·A, laid out as the weight is, in float32."""
        if self.transposed:
            return (self.b @ self.a[:, start:stop]).T * self.scale
        return (self.b[start:stop] @ self.a) * self.scale


@dataclass(frozen=True)
class Adapter:
    """An adapter's changes by the name of the base's weight that they change.

    ``rows`` are the numbers of the trained rows and their values; ``shapes`` names all tensors as the file does.
    """

    folder: Path
    lora: Mapping[str, Lora]
    rows: Mapping[str, tuple[list[int], torch.Tensor]]
    whole: Mapping[str, Value]
    shapes: Mapping[str, tuple[int, ...]]


def read_adapter(folder: Path) -> Adapter:
    """The adapter in ``folder``, every value of it finite; whole weights stay on disk.

    Raises:
        ContentError: damaged files, NaN, a tensor that means nothing here, or a kind that cannot be merged.
    """
    config = read_json(folder / "adapter_config.json") or {}
    _check_kind(config, folder)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    rows: dict[str, tuple[list[int], torch.Tensor]] = {}
    whole: dict[str, Value] = {}
    unknown: list[str] = []
    values = _open_values(folder)
    for key, value in values.items():
        name = key.removeprefix(_PREFIX)
        if found := _LORA.fullmatch(name):
            parts.setdefault(found[1], {})[found[2]] = value.read().float()
        elif found := _MAGNITUDE.fullmatch(name):
            parts.setdefault(found[1], {})["magnitude"] = value.read().float()
        elif found := _ROWS.fullmatch(name):
            rows[f"{found[1]}.weight"] = (_find_indices(config, found[1], value.shape[0], folder), value.read())
        elif ".original_module." in name:
            continue  # what a saved module replaces; PEFT writes it where a vocabulary grew
        elif key.startswith(_PREFIX) and name.endswith((".weight", ".bias")) and ".lora_" not in name:
            whole[name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = value
        else:
            unknown.append(key)
    if unknown:
        raise ContentError(
            f"the adapter holds {len(unknown)} tensors that are no part of a LoRA, such as {unknown[0]}",
            where=str(folder),
            hint="merge it with the tool that made it",
        )
    lora = {f"{name}.weight": _build_lora(name, found, config, folder) for name, found in parts.items()}
    return Adapter(folder, lora, rows, whole, {key: value.shape for key, value in values.items()})


def _check_kind(config: Mapping[str, Any], folder: Path) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ContentError(
            f"an adapter of the type {kind} cannot be merged" if kind else "adapter_config.json names no peft_type",
            where=str(folder),
            hint="LoRA, rsLoRA and DoRA can",
        )
    for key, what in _UNMERGEABLE.items():
        if config.get(key):
            raise ContentError(f"{key}: {what} cannot be merged", where=str(folder))
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_MOVES_BASE):
        raise ContentError(
            f"the adapter is of a base that its {init} initialisation had moved",
            where=str(folder),
            why="on the original base its factors mean something else",
            hint="save it as a plain LoRA: PEFT's save_pretrained(path_initial_model_for_weight_conversion=…)",
        )


def _open_values(folder: Path) -> dict[str, Value]:
    """Name → value of every tensor in the adapter's file, all of them looked through for NaN."""
    path = folder / "adapter_model.safetensors"
    if path.exists():
        values = {entry.name: _open_entry(folder, entry) for entry in read_weight_table(path).tensors}
    elif (path := folder / "adapter_model.bin").exists():
        values = _load_bin(path)
    else:
        raise ContentError("adapter_model.safetensors is missing", where=str(folder), hint="copy the adapter again")
    for key, value in values.items():
        n_rows = value.shape[0] if value.shape else 1
        for start in range(0, n_rows, _BLOCK_ROWS):
            if not is_finite(value.read_rows(start, min(n_rows, start + _BLOCK_ROWS))):
                hint = "train again, or take an older adapter"
                raise ContentError(f"{key} holds NaN or infinity", where=str(path), hint=hint)
    return values


def _open_entry(folder: Path, entry: TensorEntry) -> Value:
    if entry.dtype not in TORCH_DTYPES:
        raise ContentError(f"{entry.name} is {entry.dtype}, which cannot be read", where=str(folder / entry.file))
    return Value(entry.shape, TORCH_DTYPES[entry.dtype], partial(read_rows, folder, entry))


def _load_bin(path: Path) -> dict[str, Value]:
    return {name: Value(tuple(t.shape), t.dtype, partial(_take_rows, t)) for name, t in load_bin(path).items()}


def _take_rows(tensor: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    return tensor[start:stop]


def _find_indices(config: Mapping[str, Any], module: str, n_rows: int, folder: Path) -> list[int]:
    """The rows of ``module`` that were trained, as the config's ``trainable_token_indices`` lists them."""
    asked = config.get("trainable_token_indices")
    leaf = module.rsplit(".", 1)[-1]
    found = asked if isinstance(asked, list) else (asked or {}).get(leaf, (asked or {}).get(module))
    if not isinstance(found, list) or len(found) != n_rows or not all(isinstance(i, int) and i >= 0 for i in found):
        raise ContentError(
            f"{module}: {n_rows} trained rows, but trainable_token_indices does not say which",
            where=str(folder / "adapter_config.json"),
        )
    return found


def _build_lora(name: str, parts: Mapping[str, torch.Tensor], config: Mapping[str, Any], folder: Path) -> Lora:
    if not {"A", "B"} <= parts.keys() or any(parts[key].ndim != 2 for key in "AB"):
        raise ContentError(f"{name}: lora_A or lora_B is missing", where=str(folder))
    a, b = parts["A"], parts["B"]
    if a.shape[0] != b.shape[1] or not a.shape[0]:
        raise ContentError(f"{name}: lora_A is {tuple(a.shape)}, lora_B {tuple(b.shape)}", where=str(folder))
    return Lora(a, b, find_scale(config, name, a.shape[0], folder), parts.get("magnitude"))
