"""From a model in transformers' layout to a GGUF file.

Source ─▶ family ─▶ keys (metadata, vocabulary) ─┐
     └──▶ tensors renamed, adapted, typed ───────┴─▶ write_gguf
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ftcli.data.tokenizer import load_tokenizer
from ftcli.errors import UsageError
from ftcli.events import Notice, OnEvent, Pace, ignore_event
from ftcli.gguf.family import Config, Family, find_family
from ftcli.gguf.metadata import build_keys, read_model_config
from ftcli.gguf.source import Source, SourceTensor, open_folder
from ftcli.gguf.vocabulary import build_vocabulary, fit_name
from ftcli.gguf.write import Encode, OutputTensor, Value, encode_rows, write_gguf
from ftcli.store.target import ModelFiles

Keys = Mapping[str, Value]
Choose = Callable[[str, tuple[int, ...], Config], str]


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Args:
        file_type: llama.cpp's number for it (enum llama_ftype in llama.h).
        choose: (llama.cpp's name of a weight, its shape, the config) → its type; vectors and norms are always F32.
        encode: rounds rows to a type.
    """

    file_type: int
    choose: Choose
    encode: Encode = encode_rows


KINDS = {
    "f32": Kind(0, lambda name, shape, config: "F32"),
    "f16": Kind(1, lambda name, shape, config: "F16"),
    "bf16": Kind(32, lambda name, shape, config: "BF16"),
}


@dataclass(frozen=True)
class Converted:
    """The file that was written; ``left_out`` are tokens for which the model has no row."""

    path: Path
    size_bytes: int
    architecture: str
    n_tensors: int
    n_parameters: int
    left_out: tuple[str, ...]


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
    tensors = plan_tensors(source, family, config, KINDS[kind].choose)
    n_parameters = sum(math.prod(tensor.shape) for tensor in tensors)
    keys = build_keys(
        source.folder, family, config, file_type=KINDS[kind].file_type, n_parameters=n_parameters, name=name
    )
    tokenizer = load_tokenizer(ModelFiles(str(source.folder), source.folder))
    vocabulary = build_vocabulary(tokenizer, source.folder, family, config["vocab_size"], visible=visible)
    keys |= vocabulary.keys
    keys["general.name"] = fit_name(str(keys["general.name"]), tokenizer, family)
    for text in _list_notices(keys, config, family, vocabulary.left_out):
        on_event(Notice(text))
    pace = Pace("gguf", sum(tensor.size_bytes for tensor in tensors), unit="bytes")
    size = write_gguf(
        output,
        keys,
        tensors,
        encode=KINDS[kind].encode,
        on_bytes=lambda n: on_event(pace.advance(n)),
    )
    return Converted(output, size, family.architecture, len(tensors), n_parameters, vocabulary.left_out)


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
        is_small = len(tensor.shape) < 2 or name.endswith("_norm.weight")
        dtype = "F32" if is_small else choose(name, tensor.shape, config)
        planned.append(OutputTensor(name, tensor.shape, dtype, partial(_adapt_blocks, tensor, family, config)))
    return planned


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
    """The rows of a weight in float32 as llama.cpp wants them; one block where rows change places."""
    if family.reorders(tensor.name):
        yield family.adapt(tensor.name, torch.cat([block.float() for block in tensor.make_blocks()]), config)
        return
    for block in tensor.make_blocks():
        yield family.adapt(tensor.name, block.float(), config)
