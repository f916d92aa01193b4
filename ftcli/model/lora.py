"""What LoRA costs on a model, and how far an adapter has moved each of its modules. No torch; numpy for the latter.

    W' = W + s B A      s = alpha / r, or alpha / √r (rsLoRA)      ‖BA‖² = tr(BᵀB AAᵀ), so BA itself is never made

Sources: LoRA arXiv 2106.09685 §4, rsLoRA arXiv 2312.03732, PEFT's ``get_pattern_key`` for patterns.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcli.errors import ContentError
from ftcli.model.anatomy import Anatomy
from ftcli.model.layout import locate_tensor
from ftcli.model.target import ModuleTable, matches_pattern, plan_targets
from ftcli.recipe import PeftSection
from ftcli.store.tensor import TensorEntry, open_weights

if TYPE_CHECKING:
    import numpy as np

_FACTOR = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_(A|B)(?:\.default)?\.weight")
_DTYPES = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}
_OFFSETS = {"Q4_0": 2, "Q4_1": 4}  # bytes of a block before its 32 nibbles: a scale, or scale and minimum in float16
_DEFAULT_ALPHA = 8  # of peft.LoraConfig
_CHUNK = 1 << 22
_BLOCKS = 1 << 13  # their float32 nibbles fit into a cache


@dataclass(frozen=True)
class LoraCost:
    """What LoRA adds: parameters, and the bytes of the adapter's file (weights in float32)."""

    r: int
    modules: int
    parameters: int

    @property
    def size_bytes(self) -> int:
        return 4 * self.parameters


def tabulate_modules(anatomy: Anatomy) -> ModuleTable:
    """The modules of the model, from the names and shapes of its tensors."""
    kinds: dict[str, str] = {}
    for tensor in anatomy.tensors:
        name, _, leaf = tensor.name.rpartition(".")
        if leaf != "weight":
            continue
        for end in (index for index, char in enumerate(name) if char == "."):
            kinds.setdefault(name[:end], "Module")
        part, is_matrix = tensor.place.part, len(tensor.shape) == 2
        if part in ("embedding", "position"):
            kinds[name] = "Embedding"
        else:
            kinds[name] = "Linear" if is_matrix and part in ("attention", "ffn", "head") else "Norm"
    if anatomy.is_tied:
        kinds.setdefault("lm_head", "Linear")
    return ModuleTable(kinds, anatomy.is_tied)


def count_lora(anatomy: Anatomy, peft: PeftSection) -> LoraCost:
    """What the LoRA that ``peft`` describes adds to the model.

    Raises:
        UsageError: targets that the model has not.
    """
    shapes = {tensor.name.removesuffix(".weight"): tensor.shape for tensor in anatomy.tensors}
    names = plan_targets(tabulate_modules(anatomy), peft).modules
    total = 0
    for name in names:
        shape = shapes.get(name) or (anatomy.dimensions.vocab, anatomy.dimensions.hidden)
        total += _match(peft.rank_pattern, name, peft.r) * sum(shape)
        total += shape[0] if peft.use_dora else 0
    return LoraCost(peft.r, len(names), total)


@dataclass(frozen=True)
class Moved:
    """How far one module moved: ‖ΔW‖ in the Frobenius norm, and ‖W‖ of the base, None where it is not here."""

    name: str
    layer: int | None
    module: str
    delta_norm: float
    weight_norm: float | None

    @property
    def share(self) -> float | None:
        return self.delta_norm / self.weight_norm if self.weight_norm else None


def measure_movement(
    entries: Sequence[TensorEntry],
    folder: Path,
    config: Mapping[str, Any],
    measure_base: Callable[[str], float | None],
) -> tuple[Moved, ...]:
    """How far each module moved that an adapter changes, in the order of its file.

    Args:
        entries: the tensors of the adapter's file.
        folder: where that file lies.
        config: ``adapter_config.json``.
        measure_base: full name of a module → ‖W‖ of the base, or None.

    Raises:
        ContentError: factors that do not belong together, or a scale that is no number.
    """
    factors: dict[str, dict[str, TensorEntry]] = {}
    for entry in entries:
        if found := _FACTOR.fullmatch(entry.name):
            factors.setdefault(found.group(1), {})[found.group(2)] = entry
    moved = []
    for name, pair in factors.items():
        if len(pair) < 2 or any(len(entry.shape) != 2 for entry in pair.values()):
            raise ContentError(f"{name} has no matching lora_A and lora_B", where=str(folder))
        a, b = read_array(folder, pair["A"]), read_array(folder, pair["B"])
        if a.shape[0] != b.shape[1] or not a.shape[0]:
            raise ContentError(f"{name}: lora_A is {a.shape} and lora_B {b.shape}", where=str(folder))
        norm = find_scale(config, name, a.shape[0], folder) * _measure_product(a, b)
        place = locate_tensor(f"{name}.weight")
        moved.append(Moved(name, place.layer, place.module, norm, measure_base(name)))
    return tuple(moved)


def list_adapted_layers(entries: Sequence[TensorEntry]) -> tuple[int, ...]:
    """The layers that the LoRA factors among an adapter's tensors change, in order."""
    names = [found.group(1) for entry in entries if (found := _FACTOR.fullmatch(entry.name))]
    layers = {locate_tensor(f"{name}.weight").layer for name in names}
    return tuple(sorted(layer for layer in layers if layer is not None))


def _measure_product(a: np.ndarray, b: np.ndarray) -> float:
    import numpy as np

    gram_a, gram_b = a.astype(np.float64) @ a.T.astype(np.float64), b.T.astype(np.float64) @ b.astype(np.float64)
    return _take_root(float((gram_a * gram_b).sum()))


def _take_root(square: float) -> float:
    """√square, where rounding may have left it below 0; NaN stays NaN."""
    return square if math.isnan(square) else math.sqrt(max(0.0, square))


def find_scale(config: Mapping[str, Any], name: str, rank: int, folder: Path) -> float:
    """The factor of B·A in the module ``name``, by the ``adapter_config.json`` in ``folder``.

    Raises:
        ContentError: it is no finite number.
    """
    default = config.get("lora_alpha")
    try:
        alpha = float(_match(config.get("alpha_pattern") or {}, name, _DEFAULT_ALPHA if default is None else default))
    except (TypeError, ValueError, OverflowError, AttributeError, re.error) as error:
        where = str(folder / "adapter_config.json")
        raise ContentError(f"lora_alpha or alpha_pattern cannot be read: {error}", where=where) from error
    if not math.isfinite(alpha):
        raise ContentError(f"lora_alpha is {alpha}", where=str(folder / "adapter_config.json"))
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _match(pattern: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of the first pattern that matches ``name``, which is the one that PEFT takes."""
    return next((value for key, value in pattern.items() if matches_pattern(key, name)), default)


def measure_norm(folder: Path, entry: TensorEntry) -> float | None:
    """‖W‖ of a tensor on disk, read in pieces; None for a type that numpy does not give back."""
    import numpy as np

    if entry.offset is None:
        return None
    if entry.dtype in _OFFSETS:
        with open_weights(folder / entry.file) as (stream, _):
            stream.seek(entry.offset)
            return _take_root(_sum_squares(stream.read(entry.size_bytes), entry.dtype))
    total = 0.0
    for piece in _read_pieces(folder, entry):
        if piece is None:
            return None
        flat = piece.reshape(-1)
        total += float(np.dot(flat, flat))
    return _take_root(total)


def _sum_squares(data: bytes, kind: str) -> float:
    """Σ w² over Q4_0 or Q4_1 blocks without unpacking them: 32 weights w = d·q + m each (ggml-quants.c).

    Σ w² = d²·Σq² + 2·d·m·Σq + 32·m², and m = -8·d in Q4_0.
    """
    import numpy as np

    n_before, total, ones = _OFFSETS[kind], 0.0, np.ones(16, np.float32)
    blocks = np.frombuffer(data, np.uint8).reshape(-1, n_before + 16)
    for start in range(0, len(blocks), _BLOCKS):
        piece = blocks[start : start + _BLOCKS]
        scales = np.ascontiguousarray(piece[:, :n_before]).view("<f2").astype(np.float64)
        d, m = scales[:, 0], scales[:, 1] if kind == "Q4_1" else -8 * scales[:, 0]
        low, high = (piece[:, n_before:] & 15).astype(np.float32), (piece[:, n_before:] >> 4).astype(np.float32)
        sums, squares = (low + high) @ ones, (low * low + high * high) @ ones
        total += float(d * d @ squares + 2 * (d * m @ sums) + 32 * (m @ m))
    return total


def read_array(folder: Path, entry: TensorEntry) -> np.ndarray:
    """A tensor on disk as float32.

    Raises:
        ContentError: its type cannot be read.
    """
    import numpy as np

    pieces = [piece for piece in _read_pieces(folder, entry) if piece is not None]
    if not pieces and entry.n_elements:
        raise ContentError(f"{entry.name} is {entry.dtype}, which cannot be read", where=str(folder / entry.file))
    return np.concatenate([piece.reshape(-1) for piece in pieces]).reshape(entry.shape)


def _read_pieces(folder: Path, entry: TensorEntry) -> Any:
    """Float32 pieces of a tensor, or None for a type that is not known."""
    import numpy as np

    with open_weights(folder / entry.file) as (stream, _):
        stream.seek(entry.offset or 0)
        if entry.dtype == "BF16" or entry.dtype in _DTYPES:
            width = 2 if entry.dtype == "BF16" else np.dtype(_DTYPES[entry.dtype]).itemsize
            left = entry.n_elements
            while left:
                n = min(left, _CHUNK)
                data = stream.read(n * width)
                if entry.dtype == "BF16":
                    yield (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
                else:
                    yield np.frombuffer(data, _DTYPES[entry.dtype]).astype(np.float32)
                left -= n
            return
        yield _dequantize(stream.read(entry.size_bytes), entry)


def _dequantize(data: bytes, entry: TensorEntry) -> Any:
    """The float32 values of a GGUF tensor; None for a type that the package gguf cannot unpack."""
    import numpy as np
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    try:
        kind = GGMLQuantizationType[entry.dtype]
        return dequantize(np.frombuffer(data, np.uint8), kind)
    except (KeyError, NotImplementedError):
        return None
