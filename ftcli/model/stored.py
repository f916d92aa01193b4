"""The base's weights as they lie on disk, read a few rows at a time under the names that the model has in memory.

.safetensors  by offset, never mapped          .bin   torch's own loader, mapped, weights only
.gguf         a tensor at a time, unpacked to float32, q and k of Llama in transformers' order again
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import is_zipfile

import torch
from torch import nn

from ftcli.errors import ContentError
from ftcli.model.layout import GGUF_NORMS, complete_name, translate_gguf_name
from ftcli.model.lora import read_array
from ftcli.model.quantization import build_quantization
from ftcli.recipe import QuantizationSection
from ftcli.store.target import ModelFiles
from ftcli.store.tensor import TensorEntry, open_weights
from ftcli.store.weight import read_weight_table

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
ReadRows = Callable[[int, int], torch.Tensor]  # (first row, the one after the last) → these rows
_COMPARED_ROWS = 1 << 12


@dataclass(frozen=True)
class StoredWeights:
    """Tensors on disk by the names of the model's ``state_dict``; ``heads`` is set for Llama's GGUF files."""

    files: ModelFiles
    entries: Mapping[str, TensorEntry]
    heads: tuple[int, int] | None = None
    _whole: dict[str, torch.Tensor] = field(default_factory=dict)  # the one tensor that was read as a whole last
    _opened: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)  # and the .bin file, by its name

    def get_dtype(self, name: str) -> torch.dtype:
        """The type on disk; float32 for what is packed."""
        return torch.float32 if self.files.gguf_file else TORCH_DTYPES[self.entries[name].dtype]

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows ``start`` to ``stop`` of a tensor, in its dtype on disk; a scalar is its one row.

        Raises:
            ContentError: the file ends before it.
        """
        entry = self.entries[name]
        if not entry.file.endswith(".safetensors"):
            return self.read(name)[start:stop]
        return read_rows(self.files.folder, entry, start, stop)

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor, which is kept until another one is read like this."""
        if name not in self._whole:
            self._whole.clear()
            self._whole[name] = self._read_whole(name)
        return self._whole[name]

    def _read_whole(self, name: str) -> torch.Tensor:
        entry = self.entries[name]
        if entry.file.endswith(".safetensors"):
            return read_rows(self.files.folder, entry, 0, count_rows(entry))
        if entry.file.endswith(".bin"):
            if entry.file not in self._opened:
                self._opened.clear()
                self._opened[entry.file] = load_bin(self.files.folder / entry.file)
            return self._opened[entry.file][entry.name].reshape(entry.shape)
        value = torch.from_numpy(read_array(self.files.folder, entry))
        if self.heads and (".attn_q." in entry.name or ".attn_k." in entry.name):
            n = self.heads[0 if ".attn_q." in entry.name else 1]  # convert_hf_to_gguf.py: LlamaModel.permute
            value = value.view(n, value.shape[0] // n // 2, 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
        return value


@dataclass(frozen=True)
class DequantizedWeights:
    """The same weights as a QLoRA run sees them: what it holds in 4 bits went through that and back.

    ``dtype`` is the run's own, from which bitsandbytes packs and into which it unpacks.
    """

    stored: StoredWeights
    quantized: frozenset[str]
    transposed: frozenset[str]
    quantization: QuantizationSection
    dtype: torch.dtype
    _whole: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def entries(self) -> Mapping[str, TensorEntry]:
        return self.stored.entries

    def get_dtype(self, name: str) -> torch.dtype:
        return self.stored.get_dtype(name)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """As `StoredWeights.read_rows`."""
        if name not in self.quantized:
            return self.stored.read_rows(name, start, stop)
        if name not in self._whole:
            self._whole.clear()
            self._whole[name] = self._pass_through(name)
        return self._whole[name][start:stop]

    def _pass_through(self, name: str) -> torch.Tensor:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        value = self.stored.read_rows(name, 0, self.entries[name].shape[0]).to(self.dtype)
        value = value.T.contiguous() if name in self.transposed else value
        packed, state = quantize_4bit(
            value,
            quant_type=self.quantization.bnb_4bit_quant_type,
            compress_statistics=self.quantization.bnb_4bit_use_double_quant,
        )
        unpacked: torch.Tensor = dequantize_4bit(packed, state)
        return unpacked.T if name in self.transposed else unpacked


def open_stored(files: ModelFiles, skeleton: nn.Module) -> StoredWeights:
    """The weights of ``files``, which are exactly those of ``skeleton``, a model on the meta device.

    Raises:
        ContentError: tensors are missing, left over, misshapen, packed, or in damaged files.
    """
    config: Any = skeleton.config
    table = read_weight_table(files.gguf_path or files.folder)
    problems = table.faults
    wanted = {name: tuple(value.shape) for name, value in list_weights(skeleton).items()}
    entries: dict[str, TensorEntry] = {}
    for entry in table.tensors:
        name = _translate(entry.name) if files.gguf_file else complete_name(entry.name, wanted)
        if name in entries:
            problems.append(f"{entry.name} and {entries[name].name} are both {name}")
        entries[name] = entry
    problems += _describe("no file holds", sorted(wanted.keys() - entries.keys()))
    problems += _describe("the model has no", list_left_over(skeleton, entries, wanted))
    for name in sorted(wanted.keys() & entries.keys()):
        if entries[name].shape != wanted[name]:
            problems.append(f"{name} is {entries[name].shape}, and the config says {wanted[name]}")
        if not files.gguf_file and entries[name].dtype not in ("F64", "F32", "F16", "BF16"):
            problems.append(f"{name} is {entries[name].dtype}: these weights are packed already")
    head = find_name(skeleton, "output")
    if not problems and not files.gguf_file and is_tied(skeleton) and head in entries:
        problems += compare_head(StoredWeights(files, entries), head, find_name(skeleton, "input"))
    if problems:
        raise ContentError(
            f"{len(problems)} things are wrong with the base: {problems[0]}",
            where=files.reference,
            why="\n  ".join(problems[1:6]),
            hint="download or copy the model again; what is quantised already cannot be merged into",
        )
    heads = None
    if table.is_gguf and table.metadata.get("general.architecture") == "llama":
        heads = (int(config.num_attention_heads), int(config.num_key_value_heads))
    return StoredWeights(files, {name: entries[name] for name in wanted}, heads)


def list_left_over(model: Any, names: Iterable[str], wanted: Iterable[str]) -> list[str]:
    """Those of ``names`` that the model has no use for: not wanted, no tied head, nothing that its family drops."""
    tied = {find_name(model, "output")} if is_tied(model) else set()
    ignored = [re.compile(p) for p in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    return sorted(name for name in set(names) - set(wanted) - tied if not _is_ignorable(name, ignored))


def compare_head(stored: StoredWeights, head: str, embedding: str) -> list[str]:
    """What is wrong if the file holds a head that is not the embedding, to which the config ties it."""
    shape = stored.entries[head].shape
    reads = partial(stored.read_rows, head), partial(stored.read_rows, embedding)
    if shape == stored.entries[embedding].shape and are_equal(*reads, shape[0]):
        return []
    return [f"config.json ties the head to the embedding, and the file's {head} is not {embedding}"]


def are_equal(first: ReadRows, second: ReadRows, n_rows: int) -> bool:
    """Whether two tensors hold the same numbers, of which a block at a time is read."""
    cuts = [*range(0, n_rows, _COMPARED_ROWS), n_rows]
    return all(torch.equal(first(*cut), second(*cut)) for cut in pairwise(cuts))


def is_finite(values: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite; forty times faster than ``torch.isfinite`` in bfloat16."""
    if not values.is_floating_point() or not values.numel():
        return True
    return all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(values))


def find_name(model: Any, side: str) -> str:
    """The name of the weight that is the ``input`` embedding or the ``output`` head."""
    module = model.get_input_embeddings() if side == "input" else model.get_output_embeddings()
    return next((f"{name}.weight" for name, found in model.named_modules() if found is module), "lm_head.weight")


def list_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Name → weight of a model, without the head where that is the embedding."""
    weights = dict(model.state_dict())
    if is_tied(model):
        weights.pop(find_name(model, "output"), None)
    return weights


def is_tied(model: Any) -> bool:
    """Whether head and embedding of the model are one matrix."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return bool(head is not None and head.weight is embedding.weight)


def open_dequantized(
    stored: StoredWeights, skeleton: Any, quantization: QuantizationSection, dtype: torch.dtype
) -> DequantizedWeights:
    """``stored`` as a run in 4 bits sees it; ``skeleton`` is spent on finding out which modules those are."""
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers import AutoHfQuantizer

    transposed = {f"{name}.weight" for name, module in skeleton.named_modules() if isinstance(module, Conv1D)}
    quantizer = AutoHfQuantizer.from_config(build_quantization(quantization, dtype))
    quantizer.preprocess_model(model=skeleton, device_map={"": "cpu"})
    names = {f"{name}.weight" for name, m in skeleton.named_modules() if type(m).__name__ == "Linear4bit"}
    return DequantizedWeights(stored, frozenset(names), frozenset(transposed & names), quantization, dtype)


def read_rows(folder: Path, entry: TensorEntry, start: int, stop: int) -> torch.Tensor:
    """Rows ``start`` to ``stop`` of a tensor in a safetensors file, read by offset.

    Raises:
        ContentError: the file ends before it.
    """
    dtype = TORCH_DTYPES[entry.dtype]
    row_bytes = entry.size_bytes // max(1, count_rows(entry))
    buffer = bytearray((stop - start) * row_bytes)
    with open_weights(folder / entry.file) as (stream, _):
        stream.seek((entry.offset or 0) + start * row_bytes)
        if stream.readinto(buffer) != len(buffer):  # type: ignore[attr-defined]
            raise ContentError("cut off while it was read", where=str(folder / entry.file))
    shape = (stop - start, *entry.shape[1:]) if entry.shape else ()
    return torch.frombuffer(buffer, dtype=dtype).view(shape) if buffer else torch.empty(shape, dtype=dtype)


def count_rows(entry: TensorEntry) -> int:
    """The length of the first dimension; 1 for a scalar."""
    return entry.shape[0] if entry.shape else 1


def load_bin(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .bin file: mapped, or in memory where torch before 1.6 wrote it.

    Raises:
        ContentError: it is damaged, or holds something else.
    """
    read_weight_table(path)  # refuses by name what torch would refuse in its own words
    try:
        tensors: dict[str, torch.Tensor] = torch.load(
            path, map_location="cpu", weights_only=True, mmap=is_zipfile(path)
        )
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, UnpicklingError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ContentError("the weights cannot be read", where=str(path), why=reason) from error
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise ContentError("holds more than tensors by name", where=str(path), hint="save the model as safetensors")
    return tensors


def _translate(name: str) -> str:
    if name == "output_norm.weight":
        return "model.norm.weight"
    found = re.fullmatch(r"blk\.(\d+)\.([a-z_]+)\.weight", name)
    if found and found[2] in GGUF_NORMS:  # of the families whose GGUF files can be trained on
        return f"model.layers.{found[1]}.{GGUF_NORMS[found[2]]}.weight"
    return translate_gguf_name(name)


def _is_ignorable(name: str, patterns: list[re.Pattern[str]]) -> bool:
    return name.endswith("rotary_emb.inv_freq") or any(pattern.search(name) for pattern in patterns)


def _describe(what: str, names: list[str]) -> list[str]:
    return [f"{what} {name}" for name in names]
