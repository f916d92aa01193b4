"""Which layers are quantised, in groups of which size, and so which tensors the result has; nothing is read for it.

skeleton ─▶ its linear layers ─▶ group size ─▶ the tensors of the files, their bytes
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ftcli.errors import ContentError
from ftcli.evaluate.block import find_blocks
from ftcli.merge.stream import ModelStream
from ftcli.model.quantization import build_quantization
from ftcli.model.stored import DTYPE_NAMES
from ftcli.quantize.method import Spec
from ftcli.recipe import QuantizationSection
from ftcli.store.shard import PlannedTensor, measure_shards

USUAL_GROUPS = (128, 64, 32)  # which the kernels of vLLM read
_MULTIPLE = 32  # of rows and columns: what is packed into words of 32 bits, and what auto-round packs at all
_NF4_BLOCK, _NESTED_BLOCK = 64, 256  # bitsandbytes: quantize_4bit, and of its scales
STATE = "quant_state.bitsandbytes__nf4"  # the text of QuantState.as_dict, whose length follows from what it says
_STATE_BYTES = 128  # of the JSON text that bitsandbytes writes for each weight, about


@dataclass(frozen=True)
class Layer:
    """A linear layer of ``n_out`` rows of ``n_in`` values; if ``is_transposed``, its source holds columns as rows."""

    name: str
    n_in: int
    n_out: int
    is_transposed: bool = False

    @property
    def n_parameters(self) -> int:
        """Of its weight alone."""
        return self.n_in * self.n_out


@dataclass(frozen=True)
class Plan:
    """What is made of a model: ``layers`` are packed, all other tensors are written in ``dtype``.

    ``group_size`` is 0 where the method has blocks of its own.
    """

    spec: Spec
    group_size: int
    layers: tuple[Layer, ...]
    tensors: tuple[PlannedTensor, ...]
    dtype: torch.dtype
    n_parameters: int

    @property
    def size_bytes(self) -> int:
        """Of the tensors, about: what bitsandbytes writes in text is counted in round numbers."""
        return sum(tensor.size_bytes for tensor in self.tensors)

    @property
    def needed_bytes(self) -> int:
        """On the disk."""
        return measure_shards(self.tensors)

    @property
    def share(self) -> float:
        """Of the parameters, those that are packed."""
        return sum(layer.n_parameters for layer in self.layers) / max(1, self.n_parameters)


def plan_quantization(stream: ModelStream, skeleton: Any, spec: Spec, dtype: torch.dtype) -> Plan:
    """The plan for a model; ``skeleton`` is spent on it.

    Raises:
        ContentError: a layer that cannot be packed, or not in such groups.
    """
    layers = list_fitted_layers(skeleton) if spec.method.is_fitted else list_replaced_layers(skeleton, spec)
    if not layers:
        what = f"the model has no linear layer that {spec.method.title} could pack"
        hint = "--method nf4 or int8, or ftcli export --gguf q8_0" if spec.method.is_fitted else ""
        raise ContentError(what, where=stream.files.reference, hint=hint)
    group_size = choose_group_size(layers, spec) if spec.method.is_fitted else 0
    packed = {f"{layer.name}.weight": layer for layer in layers}
    tensors: list[PlannedTensor] = []
    for tensor in stream.tensors:
        if layer := packed.get(tensor.name):
            tensors += _list_packed(layer, spec, group_size)
        else:
            tensors.append(PlannedTensor(tensor.name, DTYPE_NAMES[dtype], tensor.shape))
    return Plan(spec, group_size, tuple(layers), tuple(tensors), dtype, stream.n_parameters)


def list_fitted_layers(skeleton: Any) -> list[Layer]:
    """The linear layers of the blocks: those that auto-round quantises."""
    layers = []
    for prefix, block in find_blocks(skeleton):
        for name, module in block.named_modules():
            if type(module) is nn.Linear:
                layers.append(Layer(f"{prefix}.{name}", module.in_features, module.out_features))
    return layers


def list_replaced_layers(skeleton: Any, spec: Spec) -> list[Layer]:
    """The linear layers that transformers loads with bitsandbytes: all but the head."""
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers import AutoHfQuantizer

    quantizer = AutoHfQuantizer.from_config(build_config(spec, torch.bfloat16))
    quantizer.preprocess_model(model=skeleton, device_map={"": "cpu"})
    return [
        Layer(name, module.in_features, module.out_features, issubclass(module.source_cls, Conv1D))
        for name, module in skeleton.named_modules()
        if type(module).__name__ in ("Linear4bit", "Linear8bitLt")
    ]


def build_config(spec: Spec, dtype: torch.dtype) -> Any:
    """transformers' ``BitsAndBytesConfig`` for NF4 with double quantisation, or for int8."""
    from transformers import BitsAndBytesConfig

    if spec.method.name == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return build_quantization(QuantizationSection(), dtype)


def choose_group_size(layers: Sequence[Layer], spec: Spec) -> int:
    """The group size that is asked for, or the largest usual one that cuts the rows of every layer.

    Raises:
        ContentError: it does not, or a layer cannot be packed at all; named are the layer and what would work.
    """
    title = spec.method.title
    for layer in layers:
        if layer.n_in % _MULTIPLE or layer.n_out % _MULTIPLE:
            raise ContentError(
                f"{title} has no group size for a weight of {layer.n_out} by {layer.n_in}",
                where=layer.name,
                why=f"it packs rows and columns in multiples of {_MULTIPLE}, which this model's are not",
                hint="--method nf4 and int8 take any width; so does ftcli export --gguf q8_0",
            )
    usual = [size for size in USUAL_GROUPS if not any(layer.n_in % size for layer in layers)]
    if spec.group_size is None:
        return usual[0]
    for layer in layers:
        if layer.n_in % spec.group_size or spec.group_size % _MULTIPLE:
            raise ContentError(
                f"rows of {layer.n_in} values cannot be cut into groups of {spec.group_size}",
                where=layer.name,
                why="" if layer.n_in % spec.group_size else f"groups are multiples of {_MULTIPLE}",
                hint=f"the largest group size that works for every layer: --group-size {usual[0]}",
            )
    return spec.group_size


def _list_packed(layer: Layer, spec: Spec, group_size: int) -> Iterator[PlannedTensor]:
    """Yields the tensors that stand for the weight of a layer."""
    name, n_in, n_out, bits = layer.name, layer.n_in, layer.n_out, spec.bits
    if spec.method.is_fitted:
        groups = n_in // group_size
        packed = (n_in * bits // 32, n_out) if spec.method.name == "gptq" else (n_in, n_out * bits // 32)
        yield PlannedTensor(f"{name}.qweight", "I32", packed)
        yield PlannedTensor(f"{name}.qzeros", "I32", (groups, n_out * bits // 32))
        yield PlannedTensor(f"{name}.scales", "F16", (groups, n_out))
        if spec.method.name == "gptq":
            yield PlannedTensor(f"{name}.g_idx", "I32", (n_in,))
    elif spec.method.name == "int8":
        yield PlannedTensor(f"{name}.weight", "I8", (n_out, n_in))
        yield PlannedTensor(f"{name}.SCB", "F32", (n_out,))
        yield PlannedTensor(f"{name}.weight_format", "U8", ())
    else:
        n_blocks = math.ceil(layer.n_parameters / _NF4_BLOCK)
        yield PlannedTensor(f"{name}.weight", "U8", (math.ceil(layer.n_parameters / 2), 1))
        yield PlannedTensor(f"{name}.weight.absmax", "U8", (n_blocks,))
        yield PlannedTensor(f"{name}.weight.quant_map", "F32", (16,))
        yield PlannedTensor(f"{name}.weight.nested_absmax", "F32", (math.ceil(n_blocks / _NESTED_BLOCK),))
        yield PlannedTensor(f"{name}.weight.nested_quant_map", "F32", (256,))
        yield PlannedTensor(f"{name}.weight.{STATE}", "U8", (_STATE_BYTES,))
