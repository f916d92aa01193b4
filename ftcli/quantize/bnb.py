"""NF4 and int8 as bitsandbytes stores them, a weight at a time: what transformers would save, without the model.

NF4   quantize_4bit with double quantisation (QLoRA, arXiv 2305.14314 §3): 64 values a block, scales in 8 bits
int8  int8_vectorwise_quant (LLM.int8, arXiv 2208.07339 §3.1): a scale a row
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ftcli.errors import NumericError
from ftcli.events import OnEvent, Pace
from ftcli.merge.stream import ModelStream, StreamTensor
from ftcli.model.base import choose_device
from ftcli.model.stored import DTYPE_NAMES, is_finite
from ftcli.quantize.plan import Plan
from ftcli.store.shard import PlannedTensor


def pack_tensors(stream: ModelStream, plan: Plan, on_event: OnEvent) -> Iterator[tuple[PlannedTensor, Any]]:
    """Yields every tensor of the result with its bytes.

    Raises:
        ContentError: a weight holds NaN or infinity.
        NumericError: one is too large for what it becomes.
    """
    packed = {f"{layer.name}.weight": layer for layer in plan.layers}
    pack = pack_int8 if plan.spec.method.name == "int8" else pack_nf4
    pace = Pace("quantize", sum(map(_measure, stream.tensors)), unit="bytes")
    device = choose_device()
    for tensor in stream.tensors:
        value = tensor.read(plan.dtype)
        if layer := packed.get(tensor.name):
            made = pack(tensor.name, (value.T if layer.is_transposed else value).to(device))
        else:
            made = {tensor.name: value}
        for name, part in made.items():
            yield describe_tensor(name, part), view_bytes(part)
        on_event(pace.advance(_measure(tensor)))


def pack_nf4(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Name → tensor of what stands for a weight, as ``Linear4bit`` saves it."""
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(weight.contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4")
    return {name: packed} | {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}


def pack_int8(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Name → tensor of what stands for a weight, as ``Linear8bitLt`` saves it.

    Raises:
        NumericError: a value is beyond float16.
    """
    from bitsandbytes.functional import int8_vectorwise_quant

    half = weight.to(torch.float16).contiguous()
    if not is_finite(half):
        raise NumericError(f"{name} is too large for int8, which is made in float16", hint="take --method nf4")
    values, scales, _ = int8_vectorwise_quant(half)
    layer = name.removesuffix(".weight")
    row_major = torch.tensor(0, dtype=torch.uint8)
    return {name: values, f"{layer}.SCB": scales.float(), f"{layer}.weight_format": row_major}


def describe_tensor(name: str, value: torch.Tensor) -> PlannedTensor:
    """A tensor as a file names it."""
    return PlannedTensor(name, DTYPE_NAMES[value.dtype], tuple(value.shape))


def view_bytes(value: torch.Tensor) -> Any:
    """The bytes of a tensor, in host memory."""
    return value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _measure(tensor: StreamTensor) -> int:
    """Bytes that a weight has in 16 bits."""
    return 2 * tensor.n_values
