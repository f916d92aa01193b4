"""From a model in transformers' layout to a GGUF file.

Source ─▶ family ─▶ keys (metadata, vocabulary) ─┐
     └──▶ tensors renamed, adapted, typed ───────┴─▶ write_gguf

A quantised kind is what llama-quantize makes of the f32 file: of the model's own values, rounded once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ftcli.errors import UsageError
from ftcli.events import Notice, OnEvent, Pace, ignore_event
from ftcli.gguf.ahead import count_threads
from ftcli.gguf.family import FILE_TYPE, Config, Family, find_family
from ftcli.gguf.metadata import build_keys, read_model_config
from ftcli.gguf.mixture import choose_type, find_position, is_fallback, read_ratios
from ftcli.gguf.source import Source, SourceTensor, open_folder
from ftcli.gguf.vocabulary import build_vocabulary, fit_name
from ftcli.gguf.write import OutputTensor, Value, write_gguf
from ftcli.model.precision import Ratios

Keys = Mapping[str, Value]
Choose = Callable[[str, tuple[int, ...]], str]  # (llama.cpp's name of a tensor, its shape) → its type

# kind of file → llama.cpp's number for it (enum llama_ftype in llama.h)
KINDS = {
    "f32": 0, "f16": 1, "bf16": 32, "q8_0": 7, "q6_k": 18, "q5_k_m": 17, "q5_k_s": 16, "q5_1": 9, "q5_0": 8,
    "q4_k_m": 15, "q4_k_s": 14, "q4_1": 3, "q4_0": 2, "q3_k_l": 13, "q3_k_m": 12, "q3_k_s": 11, "q2_k": 10,
}  # fmt: skip
_LAST_KEYS = ("general.quantization_version", FILE_TYPE)  # of a quantised kind
_PLAIN_KINDS = ("f32", "f16", "bf16")
_BLOCK_VALUES = 1 << 22


@dataclass(frozen=True)
class Converted:
    """The file that was written.

    Args:
        path: where it lies.
        size_bytes: of the whole file.
        architecture: llama.cpp's name of the family.
        n_tensors: in it.
        n_parameters: the model's.
        left_out: tokens for which the model has no row.
        types: GGUF's type → how many tensors have it.
        bits_per_weight: of the tensors' data.
        n_fallbacks: tensors whose rows the type of their kind does not fit: they have another, mostly a larger one.
    """

    path: Path
    size_bytes: int
    architecture: str
    n_tensors: int
    n_parameters: int
    left_out: tuple[str, ...]
    types: Mapping[str, int]
    bits_per_weight: float
    n_fallbacks: int


def convert(
    model: Path | Source,
    output: Path,
    *,
    kind: str,
    name: str | None = None,
    visible: Collection[str] = (),
    on_event: OnEvent = ignore_event,
) -> Converted:
    """The GGUF file that now lies at ``output``.

    Args:
        model: a transformers folder, or a source that makes its weights as they are asked for.
        output: the file's name in the end; what was there is replaced once the new one is complete.
        kind: one of `KINDS`.
        name: what the model calls itself; None guesses it as llama.cpp does.
        visible: added tokens that are words, and must be seen in an answer whatever they look like.
        on_event: told of the bytes written, and of what the file does not hold.

    Raises:
        UsageError: there is no such kind.
        ContentError: an unknown family or tokenizer, a damaged model, NaN or infinity in it.
        NumericError: a weight is too large for its type.
        DiskError: the disk is full or may not be written.
    """
    if kind not in KINDS:
        raise UsageError(f"there is no kind of GGUF file called {kind}", hint=f"it is one of {', '.join(KINDS)}")
    source = open_folder(model) if isinstance(model, Path) else model
    config = read_model_config(source.folder)
    family = find_family(str(config.get("model_type", "")), str(source.folder))
    ratios = _find_ratios(source, config)
    tensors = plan_tensors(source, family, config, partial(choose_type, kind, ratios=ratios))
    n_parameters = sum(math.prod(tensor.shape) for tensor in tensors)
    keys = build_keys(source.folder, family, config, file_type=KINDS[kind], n_parameters=n_parameters, name=name)
    vocabulary = build_vocabulary(source.tokenizer, source.folder, family, config["vocab_size"], visible=visible)
    keys |= vocabulary.keys
    keys["general.name"] = fit_name(str(keys["general.name"]), source.tokenizer, family)
    if kind not in _PLAIN_KINDS:
        keys |= {key: keys.pop(key) for key in _LAST_KEYS}
        tensors.sort(key=lambda tensor: find_position(tensor.name))
    for text in _list_notices(keys, config, family, vocabulary.left_out):
        on_event(Notice(text))
    data_bytes = sum(tensor.size_bytes for tensor in tensors)
    pace = Pace("gguf", data_bytes, unit="bytes")
    size = write_gguf(
        output,
        keys,
        tensors,
        n_threads=count_threads(),
        on_bytes=lambda n: on_event(pace.advance(n)),
    )
    return Converted(
        output,
        size,
        family.architecture,
        len(tensors),
        n_parameters,
        vocabulary.left_out,
        types=Counter(tensor.dtype for tensor in tensors),
        bits_per_weight=8 * data_bytes / n_parameters,
        n_fallbacks=sum(is_fallback(kind, tensor.name, tensor.shape, ratios) for tensor in tensors),
    )


def plan_file(source: Source, kind: str) -> list[OutputTensor]:
    """The tensors of the file of this kind, none of which is made yet.

    Raises:
        ContentError: an unknown family, or a damaged config.
    """
    config = read_model_config(source.folder)
    family = find_family(str(config.get("model_type", "")), str(source.folder))
    return plan_tensors(source, family, config, partial(choose_type, kind, ratios=_find_ratios(source, config)))


def plan_tensors(source: Source, family: Family, config: Config, choose: Choose) -> list[OutputTensor]:
    """The tensors of the file in order: those that transformers computes, then the model's.

    Raises:
        ContentError: llama.cpp's family has no such tensor.
    """
    planned = [
        OutputTensor(name, tuple(values.shape), "F32", partial(_give, values))
        for name, values in family.make_extra(config)
    ]
    for tensor in source.tensors:
        name = family.translate(tensor.name)
        adapted = partial(_adapt_blocks, tensor, family, config)
        planned.append(OutputTensor(name, tensor.shape, choose(name, tensor.shape), adapted))
    return planned


def _find_ratios(source: Source, config: Config) -> Ratios:
    return read_ratios(config, is_tied=all(tensor.name != "lm_head.weight" for tensor in source.tensors))


def _list_notices(keys: Keys, config: Config, family: Family, left_out: Sequence[str]) -> Iterator[str]:
    """What the file does not hold of the model."""
    if left_out:
        yield f"{len(left_out)} tokens have no row in the model and are left out: {', '.join(left_out[:3])}"
    window, context = config.get("sliding_window"), config["max_position_embeddings"]
    if window and window < context and f"{family.architecture}.attention.sliding_window" not in keys:
        yield f"llama.cpp looks back at the whole context, and this model at {window} tokens: keep it that short"


def _give(values: torch.Tensor) -> Iterator[torch.Tensor]:
    yield values


def _adapt_blocks(tensor: SourceTensor, family: Family, config: Config) -> Iterator[torch.Tensor]:
    """The rows of a weight as llama.cpp wants them; where rows change places, all of them are in memory."""
    if family.reorders(tensor.name):
        whole = family.adapt(tensor.name, torch.cat(list(tensor.make_blocks())), config)
        yield from torch.split(whole, max(1, _BLOCK_VALUES // whole[0].numel()))
        return
    for block in tensor.make_blocks():
        yield family.adapt(tensor.name, block, config)
