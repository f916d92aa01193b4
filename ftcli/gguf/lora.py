"""A LoRA as a GGUF file of its own, which llama.cpp adds to the base while that runs.

    y = W x + s·B (A x)      token_embd.weight.lora_a (vocabulary, r) and .lora_b (width, r): row ids of A, then B
                             else NAME.weight.lora_a (r, in) and .lora_b (out, r)

llama.cpp's s is alpha/rank with one alpha for all modules, and 1 where that is 0. The file says 0, and B is s·B of
each module: rsLoRA and patterns of ranks and alphas are expressed by that, which llama.cpp's own converter gets wrong.
Names, order and keys are those of ``convert_lora_to_gguf.py`` in ggml-org/llama.cpp.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ftcli.errors import ContentError, explain
from ftcli.gguf.family import Config, Family
from ftcli.gguf.metadata import build_adapter_keys
from ftcli.gguf.write import OutputTensor, Value
from ftcli.merge.adapter import Lora
from ftcli.merge.plan import MergePlan
from ftcli.model.stored import read_rows
from ftcli.store.gguf_header import GgufHeader, check_gguf_data, read_gguf_header
from ftcli.store.tensor import TensorEntry

_TABLES = ("model.embed_tokens.weight", "lm_head.weight")
_SEED, _BLOCK_ROWS = 0, 1 << 14
_MOST_ERROR = 2.0**-23  # s·B is rounded to float32 once


@dataclass(frozen=True)
class LoraModule:
    """The weight ``name`` in transformers, ``gguf_name`` in llama.cpp, and its update."""

    name: str
    gguf_name: str
    lora: Lora


@dataclass(frozen=True)
class LoraDraft:
    """The file of an adapter before it is written; ``keys`` and ``tensors`` are in its order."""

    modules: tuple[LoraModule, ...]
    keys: Mapping[str, Value]
    tensors: tuple[OutputTensor, ...]
    family: Family
    config: Config


def check_expressible(plan: MergePlan, *, is_tied: bool, name: str, where: str) -> None:
    """None if llama.cpp can add the adapter of ``plan`` to a base while that runs.

    Args:
        plan: the merge into that base, which says what the adapter changes.
        is_tied: whether the base's head is its embedding.
        name: by which the user knows the adapter.
        where: it lies.

    Raises:
        ContentError: naming all that it cannot.
    """
    parts = plan.parts
    found = []
    if any(part.lora and part.lora.magnitude is not None for part in parts):
        found.append("DoRA, which rescales the base's weights")
    if any(part.rows for part in parts):
        found.append("trained rows of the vocabulary, such as new tokens")
    if biases := [part.name for part in parts if part.whole and part.name.endswith(".bias")]:
        found.append(f"trained biases ({len(biases)}, such as {biases[0]})")
    if whole := [part.name for part in parts if part.whole and not part.name.endswith(".bias")]:
        found.append(f"weights that were trained whole ({', '.join(whole[:3])})")
    # llama.cpp ends the process on the first of both, and finds no matrix for the second
    if is_tied and any(part.lora and part.name in _TABLES for part in parts):
        found.append("LoRA on the embedding or the head, which are one matrix in this base")
    if found:
        raise ContentError(
            f"a GGUF adapter cannot hold {'; nor '.join(found)}",
            where=where,
            why="llama.cpp adds B·A to the matrices of the base, and nothing else",
            hint=f"merge first: ftcli merge {shlex.quote(name)}, or export --gguf, which merges as it goes",
        )
    if not any(part.lora for part in parts):
        raise ContentError("the adapter changes nothing", where=where)


def draft_lora(folder: Path, plan: MergePlan, family: Family, config: Config) -> LoraDraft:
    """The file of an adapter that `check_expressible` lets pass.

    Args:
        folder: of its model card and generation config; its name is the adapter's.
        plan: the merge into its base.
        family: the base's.
        config: the base's.

    Raises:
        ContentError: the family has no such tensor.
    """
    changed = [(part.name, part.lora) for part in plan.parts if part.lora]
    changed.sort(key=lambda pair: pair[0].removesuffix("weight"))  # as safetensors lists A and B
    modules = tuple(LoraModule(name, family.translate(name), lora) for name, lora in changed)
    tensors = tuple(tensor for module in modules for tensor in _list_tensors(module, family, config))
    widths = [tensor.shape[1] for tensor in tensors[::2]]
    n_parameters = sum(tensor.shape[0] * width for tensor, width in zip(tensors[1::2], widths, strict=True))
    keys = build_adapter_keys(folder, family, n_parameters=n_parameters)
    return LoraDraft(modules, keys, tensors, family, config)


def find_lora_problem(path: Path, draft: LoraDraft) -> str:
    """What in the file at ``path`` is not the adapter of ``draft``; empty for nothing.

    Each module's s·B·A is applied to a vector of signs, as it was read from the file and as a merge makes it; rows are
    put back by another way than they were moved.
    """
    try:
        header = read_gguf_header(path)
        check_gguf_data(header, path.stat().st_size, path.name)
    except ContentError as error:
        return explain(error)
    found = [(tensor.name, tensor.shape, tensor.dtype) for tensor in header.tensors]
    wanted = [(tensor.name, tensor.shape, tensor.dtype) for tensor in draft.tensors]
    if wrong := next((want[0] for have, want in zip(found, wanted, strict=False) if have != want), ""):
        return f"the tensor {wrong} is not as it was to be written"
    if len(found) != len(wanted):
        return f"it holds {len(found)} tensors, and {len(wanted)} were to be written"
    if header.metadata.get("adapter.lora.alpha") != 0.0:
        return "its alpha is not 0, by which llama.cpp would scale it once more"
    for number, module in enumerate(draft.modules):
        a, b = (_read(path, header, 2 * number + i) for i in (0, 1))
        if not _is_alike(module, a, _restore(module, b, draft)):
            return f"{module.gguf_name} is changed otherwise than by {module.name} of the adapter"
    return ""


def _list_tensors(module: LoraModule, family: Family, config: Config) -> Sequence[OutputTensor]:
    """A and B of a module, in this order."""
    lora, a = module.lora, module.lora.a
    first = a.T if lora.transposed else a
    return (
        OutputTensor(f"{module.gguf_name}.lora_a", tuple(first.shape), "F32", partial(_cut, first)),
        OutputTensor(f"{module.gguf_name}.lora_b", tuple(lora.b.shape), "F32", partial(_scale, module, family, config)),
    )


def _cut(values: torch.Tensor) -> Iterator[torch.Tensor]:
    yield from torch.split(values, _BLOCK_ROWS)


def _scale(module: LoraModule, family: Family, config: Config) -> Iterator[torch.Tensor]:
    """s·B, whose rows are those of the weight and change places with them."""
    yield from _cut(family.adapt(module.name, module.lora.b * module.lora.scale, config))


def _read(path: Path, header: GgufHeader, number: int) -> torch.Tensor:
    info = header.tensors[number]
    entry = TensorEntry(info.name, info.dtype, info.shape, info.size_bytes, path.name, header.data_offset + info.offset)
    return read_rows(path.parent, entry, 0, info.shape[0])


def _restore(module: LoraModule, b: torch.Tensor, draft: LoraDraft) -> torch.Tensor:
    """B with its rows where transformers has them."""
    if not draft.family.reorders(module.name):
        return b
    n_heads = draft.config["num_attention_heads" if ".q_proj." in module.name else "num_key_value_heads"]
    half = len(b) // n_heads // 2
    places = torch.arange(len(b))
    head, place = places // (2 * half), places % (2 * half)
    return b[head * 2 * half + 2 * (place % half) + place // half]


def _is_alike(module: LoraModule, a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether A and B of the file change the weight as the adapter does.

    The bound is what rounding B may do, which is more than its share of a sum that cancels out (as PiSSA's does).
    """
    lora = module.lora
    generator = torch.Generator().manual_seed(_SEED)
    x = torch.randint(0, 2, (lora.shape[1],), generator=generator).double() * 2 - 1
    if lora.transposed:
        found = a.double() @ (b.double().T @ x)
        low, high = lora.b.double().T @ x, lora.a.double().T
        most = high.abs() @ (lora.b.double().T.abs() @ x.abs())
    else:
        found = b.double() @ (a.double() @ x)
        low, high = lora.a.double() @ x, lora.b.double()
        most = high.abs() @ low.abs()
    off = torch.linalg.vector_norm(found - high @ low * lora.scale)
    return bool(off <= _MOST_ERROR * torch.linalg.vector_norm(most * lora.scale))
