"""How the weights of a folder are packed, as its config.json says, and how NF4 is asked of transformers.

    quantization_config ─▶ Packing(method, bits, group size) ─▶ who unpacks it: `packed` (GPTQ, AWQ) or bitsandbytes

Anything that is not known to come back as the right numbers is refused by name. No torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from ftcli.errors import ContentError
from ftcli.recipe import QuantizationSection
from ftcli.store.target import ModelFiles, read_config
from ftcli.store.tensor import TensorEntry

if TYPE_CHECKING:
    import torch

_LOADED = "what can be loaded: GPTQ in 2, 4 or 8 bits, AWQ (gemm) in 4, bitsandbytes; or the 16-bit model"
_WORD_BITS = 32
_CONSTANTS = (".quant_map", ".qzeros", ".scales", ".g_idx", ".SCB", ".weight_format")


@dataclass(frozen=True)
class Packing:
    """How weights are packed; ``group_size`` -1 is a whole row, ``adds_one`` GPTQ's zeros that are stored less 1."""

    method: Literal["gptq", "awq", "bitsandbytes"]
    bits: int
    group_size: int = -1
    adds_one: bool = False

    @property
    def is_unpacked_here(self) -> bool:
        """Whether ftcli dequantises the weights, so that nothing packed is left in memory."""
        return self.method != "bitsandbytes"

    @property
    def title(self) -> str:
        """What people call it: ``GPTQ, 4 bits``."""
        return f"{self.method if self.method == 'bitsandbytes' else self.method.upper()}, {self.bits} bits"


def read_packing(files: ModelFiles) -> Packing | None:
    """How the weights of ``files`` are packed; None if they are not, or in a GGUF file.

    Raises:
        ContentError: in a way that cannot be loaded, which is named.
    """
    if files.gguf_file:
        return None
    return parse_packing(read_config(files).get("quantization_config"), files.reference)


def parse_packing(section: Any, where: str) -> Packing | None:
    """The packing that the ``quantization_config`` of a config.json describes.

    Raises:
        ContentError: as `read_packing`.
    """
    if not section:
        return None
    if not isinstance(section, Mapping):
        raise _refuse("a quantization_config that is no object", where)
    method = str(section.get("quant_method") or "of no method").lower()[:40]
    if method == "bitsandbytes":
        return _parse_bitsandbytes(section, where)
    if method not in ("gptq", "awq"):
        raise _refuse(method, where)
    bits = section.get("bits", section.get("w_bit"))
    group_size = section.get("group_size", section.get("q_group_size"))
    known = {"gptq": (2, 4, 8), "awq": (4,)}[method]
    if type(bits) is not int or bits not in known:
        raise _refuse(f"{method} in {bits!r} bits", where)
    if type(group_size) is not int or (group_size != -1 and group_size < 1):
        raise _refuse(f"{method} with group_size {group_size!r}", where)
    if method == "awq":
        version = str(section.get("version") or section.get("format") or "gemm").lower()[:40]
        if version != "gemm":
            raise _refuse(f"awq of the version {version}", where)
        return Packing("awq", bits, group_size)
    layout = str(section.get("checkpoint_format") or section.get("format") or "gptq").lower()[:40]
    if section.get("is_marlin_format"):
        layout = "marlin"
    if layout not in ("gptq", "gptq_v2"):
        raise _refuse(f"gptq of the format {layout}", where)
    return Packing("gptq", bits, group_size, adds_one=layout == "gptq")


def _parse_bitsandbytes(section: Mapping[str, Any], where: str) -> Packing:
    is_4bit, is_8bit = (section.get(f"load_in_{n}bit") or section.get(f"_load_in_{n}bit") for n in (4, 8))
    if bool(is_4bit) == bool(is_8bit):
        raise _refuse("bitsandbytes, but neither in 4 bits nor in 8", where)
    return Packing("bitsandbytes", 4 if is_4bit else 8)


def _refuse(what: str, where: str) -> ContentError:
    return ContentError(f"the weights are quantised in a way that cannot be loaded: {what}", where=where, hint=_LOADED)


def check_trainable(packing: Packing | None, where: str, *, is_full: bool, is_4bit: bool) -> None:
    """None if training can start from weights that are packed like this: LoRA on bitsandbytes' 4 bits, nothing else.

    Args:
        packing: None for weights that are not packed.
        where: the model's name.
        is_full: whether all weights are trained.
        is_4bit: whether the recipe asks for 4 bits itself.

    Raises:
        ContentError: it cannot.
    """
    if packing is None:
        return
    if is_4bit:
        raise refuse_twice(packing, where)
    if is_full or packing.is_unpacked_here or packing.bits != 4:
        raise ContentError(
            f"the weights are quantised already ({packing.title})",
            where=where,
            why="training starts from numbers that can be moved; these are for running a finished model",
            hint="name the 16-bit model that it was made from; quantization.load_in_4bit: true saves memory",
        )


def refuse_twice(packing: Packing, where: str) -> ContentError:
    """The error for weights that are to be packed again."""
    return ContentError(
        f"the weights are quantised already ({packing.title}), and are to be quantised to 4 bits",
        where=where,
        hint="name the 16-bit model that it was made from, or leave out quantization.load_in_4bit",
    )


def build_quantization(quantization: QuantizationSection, dtype: torch.dtype, *, is_sharded: bool = False) -> Any:
    """transformers' ``BitsAndBytesConfig`` for the recipe's section; computation is in ``dtype``.

    Weights that are divided over processes are stored in ``dtype`` too, which changes no bit of them: a unit of FSDP
    has one dtype.
    """
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=quantization.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype if is_sharded else None,
    )


def list_unpacked(entries: Iterable[TensorEntry], packing: Packing) -> list[TensorEntry]:
    """The entries with the shapes of the weights that packed ones stand for, without scales and the like.

    A weight in bitsandbytes' 4 bits, whose shape no header holds, is a row of all its numbers.
    """
    per_word = _WORD_BITS // packing.bits
    found = []
    for entry in entries:
        if entry.name.endswith(".qweight") and len(entry.shape) == 2:
            first, second = entry.shape
            shape = (second, first * per_word) if packing.method == "gptq" else (second * per_word, first)
            found.append(replace(entry, name=f"{entry.name.removesuffix('.qweight')}.weight", shape=shape))
        elif packing == Packing("bitsandbytes", 4) and entry.dtype == "U8" and entry.name.endswith(".weight"):
            found.append(replace(entry, shape=(2 * entry.n_elements,)))
        elif not entry.name.endswith(_CONSTANTS):
            found.append(entry)
    return found
