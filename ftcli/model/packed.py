"""Folders of GPTQ and AWQ weights, unpacked into an ordinary model; and what bitsandbytes packed, checked.

    GPTQ   qweight (in·bits/32, out)   along in, lowest bits first        qzeros (groups, out·bits/32), less 1 in v1
    AWQ    qweight (in, out/8)         8 outputs a word: 0 2 4 6 1 3 5 7  qzeros (groups, out/8), in the same order
    both   weight[o, i] = scales[g, o] · (code[i, o] − zero[g, o]), where g is the group of input i

Layouts: AutoGPTQ (arXiv 2210.17323) and AutoAWQ (arXiv 2306.00978). One module is unpacked at a time: no more than
the model and that module is held.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ftcli.errors import ContentError
from ftcli.model.layout import complete_name
from ftcli.model.quantization import Packing
from ftcli.model.stored import (
    ReadRows,
    StoredWeights,
    compare_head,
    find_name,
    is_finite,
    is_tied,
    list_left_over,
    list_weights,
)
from ftcli.store.target import ModelFiles
from ftcli.store.tensor import TensorEntry
from ftcli.store.weight import read_weight_table

_WORD_BITS = 32
_BLOCK_ROWS = 128  # inputs; a multiple of what a word holds
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output that lies in the first four bits, in the next …
_FLOATS = ("F64", "F32", "F16", "BF16")
_PARTS = {"qweight": ("I32",), "qzeros": ("I32",), "scales": ("F16", "BF16", "F32"), "g_idx": ("I32", "I64")}
_BLOCK_SIZES = {32, 64, 128, 256, 512, 1024, 2048, 4096}  # those that bitsandbytes has kernels for
_COMPUTED = (torch.float32, torch.float16, torch.bfloat16)
_DAMAGED = "download or copy the model again, or quantise it again"


@dataclass(frozen=True)
class PackedPlan:
    """How each weight of a model is read; ``info`` lists what does not fit, as transformers' loading info does.

    ``modules`` are the packed ones, each with the shape (out, in) that it unpacks to.
    """

    stored: StoredWeights
    packing: Packing
    modules: Mapping[str, tuple[int, int]]
    info: Mapping[str, list[str]]


def unpack_gptq(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    groups: torch.Tensor,
    *,
    bits: int,
    adds_one: bool = True,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The weight (out, in) that a GPTQ layer stands for, computed in float32.

    Args:
        qweight: int32 (in * bits / 32, out).
        qzeros: int32 (groups, out * bits / 32).
        scales: (groups, out).
        groups: the group of each input, (in,): ``g_idx``.
        bits: 2, 4 or 8.
        adds_one: whether zeros are stored less 1 (v1, not ``gptq_v2``).
        dtype: of what comes back.
    """
    n_outputs = scales.shape[1]
    mask = (1 << bits) - 1
    shifts = torch.arange(0, _WORD_BITS, bits, dtype=torch.int32, device=qweight.device)
    per_word = _WORD_BITS // bits

    def read_codes(start: int, stop: int) -> torch.Tensor:
        words = qweight[start // per_word : -(-stop // per_word), None]
        return ((words >> shifts[:, None]) & mask).flatten(0, 1)[: stop - start]

    zeros = ((qzeros[:, :, None] >> shifts) & mask).flatten(1)[:, :n_outputs]
    if adds_one:
        zeros = (zeros + 1) & mask  # a zero of 0 was stored as all ones
    return _scale(read_codes, zeros, scales, groups, dtype)


def unpack_awq(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    groups: torch.Tensor,
    *,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The weight (out, in) that an AWQ layer of the version gemm stands for, computed in float32.

    Args:
        qweight: int32 (in, out / 8).
        qzeros: int32 (groups, out / 8).
        scales: (groups, out).
        groups: the group of each input, (in,).
        dtype: of what comes back.
    """
    n_outputs = scales.shape[1]
    places = [4 * _AWQ_ORDER.index(output) for output in range(len(_AWQ_ORDER))]
    shifts = torch.tensor(places, dtype=torch.int32, device=qweight.device)

    def unfold(words: torch.Tensor) -> torch.Tensor:
        return ((words[:, :, None] >> shifts) & 15).flatten(1)[:, :n_outputs]

    return _scale(lambda start, stop: unfold(qweight[start:stop]), unfold(qzeros), scales, groups, dtype)


def _scale(
    read_codes: ReadRows, zeros: torch.Tensor, scales: torch.Tensor, groups: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Codes (in, out), of which a block at a time is unpacked → the weight (out, in)."""
    weight = torch.empty((scales.shape[1], len(groups)), dtype=dtype, device=scales.device)
    groups, scales = groups.long(), scales.float()
    for start in range(0, len(groups), _BLOCK_ROWS):
        block = groups[start : start + _BLOCK_ROWS]
        codes = read_codes(start, start + len(block))
        weight[:, start : start + len(block)] = ((codes - zeros[block]) * scales[block]).T
    return weight


def build_empty(folder: Path, config: Any, options: Mapping[str, Any]) -> Any:
    """The model of ``config``, in evaluation mode, with its buffers and without its weights (on the meta device)."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM, GenerationConfig

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, **options)
    model.tie_weights()  # each of two tied weights became an empty one of its own
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(folder), local_files_only=True)
    return model.eval()


def plan_packed(files: ModelFiles, packing: Packing, model: Any) -> PackedPlan:
    """Where each weight of ``model`` lies in ``files``; nothing but headers is read, and of odd biases the numbers.

    Raises:
        ContentError: files are damaged or not there.
    """
    table = read_weight_table(files.folder)
    if table.faults:
        raise ContentError(table.faults[0], where=files.reference, hint=_DAMAGED)
    wanted = list_weights(model)
    entries = {_complete(entry.name, wanted): entry for entry in table.tensors}
    stored = StoredWeights(files, entries)
    modules = _find_modules(model, entries, wanted)
    expected = {name: tuple(value.shape) for name, value in wanted.items()}
    optional = set()
    for module, (n_outputs, n_inputs) in modules.items():
        del expected[f"{module}.weight"]
        parts = _list_parts(packing, n_outputs, n_inputs)
        expected |= {f"{module}.{part}": shape for part, shape in parts.items()}
        optional.add(f"{module}.g_idx")
    left_over = [name for name in list_left_over(model, entries, expected) if not _is_idle_bias(name, stored, modules)]
    present = sorted(expected.keys() & entries.keys())
    info = {
        "missing_keys": sorted(expected.keys() - entries.keys() - optional),
        "unexpected_keys": left_over,
        "mistyped_keys": [name for name in present if entries[name].dtype not in _list_dtypes(name, modules)],
        "mismatched_keys": [name for name in present if entries[name].shape != expected[name]],
    }
    head = find_name(model, "output")
    has_head = is_tied(model) and head in entries and not any(info.values())
    if has_head and (problems := compare_head(stored, head, find_name(model, "input"))):
        raise ContentError(problems[0], where=files.reference, hint=_DAMAGED)
    return PackedPlan(stored, packing, modules, info)


@torch.no_grad()
def fill_model(model: Any, plan: PackedPlan, device: torch.device) -> None:
    """Nothing; ``model``, of `build_empty`, holds the weights of ``plan``, in its own dtypes and on ``device``.

    Raises:
        ContentError: groups that are not there, or numbers that are not finite, by the tensor's name.
    """
    from transformers.pytorch_utils import Conv1D

    for name, empty in list_weights(model).items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if leaf == "weight" and owner in plan.modules:
            value = _unpack(plan, owner, device, empty.dtype)
            value = value.T.contiguous() if isinstance(module, Conv1D) else value
        else:
            value = plan.stored.read(name).to(device, empty.dtype)
        _check_finite(name, value, plan)
        is_parameter = isinstance(getattr(module, leaf), nn.Parameter)
        setattr(module, leaf, nn.Parameter(value) if is_parameter else value)
    model.tie_weights()


def _unpack(plan: PackedPlan, module: str, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    stored, packing = plan.stored, plan.packing
    n_inputs = plan.modules[module][1]
    qweight, qzeros, scales = (stored.read(f"{module}.{part}").to(device) for part in ("qweight", "qzeros", "scales"))
    _check_finite(f"{module}.scales", scales, plan)
    if packing.method == "awq":
        return unpack_awq(qweight, qzeros, scales, _number_groups(packing, n_inputs, device), dtype=dtype)
    groups = _number_groups(packing, n_inputs, device)
    if f"{module}.g_idx" in stored.entries:
        groups = stored.read(f"{module}.g_idx").to(device)
        low, high = (int(extreme) for extreme in groups.aminmax())
        if low < 0 or high >= len(scales):
            raise ContentError(
                f"{module}.g_idx names the groups {low} to {high}, and there are {len(scales)}",
                where=stored.files.reference,
                hint=_DAMAGED,
            )
    return unpack_gptq(qweight, qzeros, scales, groups, bits=packing.bits, adds_one=packing.adds_one, dtype=dtype)


def _number_groups(packing: Packing, n_inputs: int, device: torch.device) -> torch.Tensor:
    """The group of each input where none is stored: they follow each other."""
    return torch.arange(n_inputs, device=device) // _measure_group(packing, n_inputs)


def _measure_group(packing: Packing, n_inputs: int) -> int:
    return n_inputs if packing.group_size == -1 else packing.group_size


def _list_parts(packing: Packing, n_outputs: int, n_inputs: int) -> dict[str, tuple[int, ...]]:
    """Part → shape of what is stored of a packed weight."""
    n_groups = -(-n_inputs // _measure_group(packing, n_inputs))
    words_in, words_out = (-(-n * packing.bits // _WORD_BITS) for n in (n_inputs, n_outputs))
    constants: dict[str, tuple[int, ...]] = {"qzeros": (n_groups, words_out), "scales": (n_groups, n_outputs)}
    if packing.method == "awq":
        return {"qweight": (n_inputs, words_out), **constants}
    return {"qweight": (words_in, n_outputs), **constants, "g_idx": (n_inputs,)}


def _list_dtypes(name: str, modules: Mapping[str, Any]) -> tuple[str, ...]:
    """The types that a tensor of this name may have on disk."""
    module, _, part = name.rpartition(".")
    return _PARTS.get(part, _FLOATS) if module in modules else _FLOATS


def _complete(name: str, wanted: Mapping[str, Any]) -> str:
    """The name as the whole model has it; what lies beside a weight goes where that goes."""
    module, _, part = name.rpartition(".")
    if part not in (*_PARTS, "bias"):
        return complete_name(name, wanted)
    return f"{complete_name(f'{module}.weight', wanted).removesuffix('.weight')}.{part}"


def _find_modules(
    model: Any, entries: Mapping[str, TensorEntry], wanted: Mapping[str, Any]
) -> dict[str, tuple[int, int]]:
    """Packed module → (out, in); one whose weight is stored as well, or that is not linear, is none of them."""
    from transformers.pytorch_utils import Conv1D

    found = {}
    for name, module in model.named_modules():
        weight = f"{name}.weight"
        if not isinstance(module, nn.Linear | Conv1D) or weight in entries or weight not in wanted:
            continue
        if any(f"{name}.{part}" in entries for part in _PARTS):
            first, second = wanted[weight].shape
            found[name] = (second, first) if isinstance(module, Conv1D) else (first, second)
    return found


def _is_idle_bias(name: str, stored: StoredWeights, modules: Mapping[str, tuple[int, int]]) -> bool:
    """Whether it is a bias of zeros, as early GPTQ tools wrote for layers that have none."""
    module, _, part = name.rpartition(".")
    entry = stored.entries[name]
    if part != "bias" or module not in modules or entry.shape != modules[module][:1] or entry.dtype not in _FLOATS:
        return False
    return not stored.read(name).any()


def _check_finite(name: str, value: torch.Tensor, plan: PackedPlan) -> None:
    if not is_finite(value):
        raise ContentError(
            f"{name} holds numbers that are not finite, or beyond {str(value.dtype).removeprefix('torch.')}",
            where=plan.stored.files.reference,
            hint=_DAMAGED,
        )


def check_bitsandbytes(model: Any, files: ModelFiles) -> None:
    """None if what bitsandbytes packed in ``model`` is as large as its modules say, and finite.

    Its kernels trust these sizes, and would read beyond the end of a tensor that is too short.

    Raises:
        ContentError: it is not, by the tensor's name.
    """
    import bitsandbytes as bnb

    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            problem = _find_4bit_problem(module)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            problem = _find_8bit_problem(module)
        else:
            continue
        if problem:
            raise ContentError(f"{name}.{problem}", where=files.reference, hint=_DAMAGED)


def _find_4bit_problem(module: Any) -> str | None:
    weight, state = module.weight, getattr(module.weight, "quant_state", None)
    shape = (module.out_features, module.in_features)
    if state is None:
        return "weight has no quant_state: it is not packed"
    nested = state.state2 if state.nested else None
    if not {state.blocksize, nested.blocksize if nested else 64} <= _BLOCK_SIZES:
        return f"weight is packed in blocks of {ascii(state.blocksize)[:20]}"
    if state.quant_type not in ("nf4", "fp4") or state.dtype not in _COMPUTED:
        return f"weight is packed as {ascii(state.quant_type)[:20]} of {state.dtype}"
    if tuple(state.shape) != shape:
        return f"weight stands for {tuple(state.shape)}, and the config says {shape}"
    n_values = module.out_features * module.in_features
    if weight.numel() * weight.element_size() != -(-n_values // 2):
        return f"weight has {weight.numel() * weight.element_size()} bytes for {n_values} numbers of 4 bits"
    n_blocks = -(-n_values // state.blocksize)
    scales = [("absmax", state.absmax, n_blocks), ("quant_map", state.code, 16)]
    if bool(nested) != (state.absmax.dtype == torch.uint8):
        return "weight.nested_absmax is missing, or does not belong here"
    if nested:
        scales.append(("nested_absmax", nested.absmax, -(-n_blocks // nested.blocksize)))
        scales += [("nested_quant_map", nested.code, 256), ("nested_offset", state.offset, 1)]
    for part, values, expected in scales:
        if values.numel() != expected:
            return f"weight.{part} has {values.numel()} numbers, and there should be {expected}"
        if not is_finite(values):
            return f"weight.{part} holds numbers that are not finite"
    return None


def _find_8bit_problem(module: Any) -> str | None:
    shape = (module.out_features, module.in_features)
    scales = getattr(module.weight, "SCB", None)
    if scales is None or module.weight.dtype != torch.int8:
        return "weight is not packed in 8 bits"
    if tuple(module.weight.shape) != shape:
        return f"weight is {tuple(module.weight.shape)}, and the config says {shape}"
    if scales.numel() != module.out_features:
        return f"SCB has {scales.numel()} numbers, and there should be {module.out_features}"
    return None if is_finite(scales) else "SCB holds numbers that are not finite"
