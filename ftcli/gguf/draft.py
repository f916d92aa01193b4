"""A GGUF file to be: its keys and its tensors, of which only the types depend on the kind that is written.

    transformers folder, merge ─▶ draft_model ─┐
                                               ├─▶ Draft ─▶ plan(kind): a type for each tensor, in the file's order
    GGUF file in 16 or 32 bits ─▶ draft_gguf ──┘

A quantised kind is what llama-quantize makes of the f32 file: of the model's own values, rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ftcli.gguf.family import FILE_TYPE, Config, Family, find_family
from ftcli.gguf.metadata import QUANTIZATION_VERSION, build_keys, read_model_config
from ftcli.gguf.mixture import choose_type, find_position, is_fallback, read_ratios
from ftcli.gguf.vocabulary import Training, build_vocabulary, fit_name
from ftcli.gguf.write import OutputTensor, Value
from ftcli.merge.stream import ModelStream, StreamTensor
from ftcli.model.precision import Ratios

Keys = Mapping[str, Value]

# kind of file → llama.cpp's number for it (enum llama_ftype in llama.h)
KINDS = {
    "f32": 0, "f16": 1, "bf16": 32, "q8_0": 7, "q6_k": 18, "q5_k_m": 17, "q5_k_s": 16, "q5_1": 9, "q5_0": 8,
    "q4_k_m": 15, "q4_k_s": 14, "q4_1": 3, "q4_0": 2, "q3_k_l": 13, "q3_k_m": 12, "q3_k_s": 11, "q2_k": 10,
}  # fmt: skip
_PLAIN_KINDS = ("f32", "f16", "bf16")
_BLOCK_VALUES = 1 << 22
_HEAD_BYTES = 32 << 20  # of metadata and vocabulary


@dataclass(frozen=True)
class DraftTensor:
    """A tensor by llama.cpp's name; ``dtype`` is empty where the kind of file decides it.

    ``make_blocks`` gives its rows in order, in any floating type.
    """

    name: str
    shape: tuple[int, ...]
    make_blocks: Callable[[], Iterator[torch.Tensor]]
    dtype: str = ""


@dataclass(frozen=True)
class Draft:
    """A file of a kind that is still open.

    Args:
        architecture: llama.cpp's name of the family.
        keys: the metadata in order, whatever stands there for the kind.
        tensors: in the order of the source.
        ratios: what the types depend on.
        is_requantized: whether llama-quantize makes every kind of it, and so puts all in its own order.
        notices: what the file will not hold of the model.
    """

    architecture: str
    keys: Keys
    tensors: tuple[DraftTensor, ...]
    ratios: Ratios
    is_requantized: bool = False
    notices: tuple[str, ...] = ()

    @property
    def n_parameters(self) -> int:
        """Of all tensors."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors)

    @property
    def n_vocabulary(self) -> int:
        """Rows of the embedding."""
        return next((tensor.shape[0] for tensor in self.tensors if tensor.name == "token_embd.weight"), 0)

    def plan(self, kind: str) -> list[OutputTensor]:
        """The tensors of the file of this kind in order, none of which is made yet."""
        planned = [
            OutputTensor(t.name, t.shape, t.dtype or choose_type(kind, t.name, t.shape, self.ratios), t.make_blocks)
            for t in self.tensors
        ]
        if self._is_sorted(kind):
            planned.sort(key=lambda tensor: find_position(tensor.name))
        return planned

    def measure_bytes(self, kind: str) -> int:
        """The bytes of the file of this kind at most."""
        return _HEAD_BYTES + sum(tensor.size_bytes for tensor in self.plan(kind))

    def list_keys(self, kind: str) -> Keys:
        """The metadata of the file of this kind."""
        known = {"general.quantization_version": QUANTIZATION_VERSION, FILE_TYPE: KINDS[kind]}
        if not self._is_sorted(kind):
            return {**self.keys, **known}
        return {**{key: value for key, value in self.keys.items() if key not in known}, **known}

    def measure_fallback(self, kind: str) -> float:
        """The share of the parameters in rows that the type of this kind does not fit."""
        fallen = (
            math.prod(tensor.shape)
            for tensor in self.tensors
            if not tensor.dtype and is_fallback(kind, tensor.name, tensor.shape, self.ratios)
        )
        return sum(fallen) / self.n_parameters

    def _is_sorted(self, kind: str) -> bool:
        return self.is_requantized or kind not in _PLAIN_KINDS


def draft_model(source: ModelStream, *, name: str | None = None, training: Training | None = None) -> Draft:
    """The file of a model in transformers' layout.

    Args:
        source: the model.
        name: what it calls itself; None guesses it as llama.cpp does.
        training: what is known of it.

    Raises:
        ContentError: an unknown family or tokenizer, a damaged model, or a tensor that llama.cpp's family has not.
    """
    config = read_model_config(source.folder)
    family = find_family(str(config.get("model_type", "")), str(source.folder))
    tensors = _list_tensors(source, family, config)
    n_parameters = sum(math.prod(tensor.shape) for tensor in tensors)
    keys = build_keys(source.folder, family, config, file_type=0, n_parameters=n_parameters, name=name)
    vocabulary = build_vocabulary(source.tokenizer, source.folder, family, config["vocab_size"], training)
    keys |= vocabulary.keys
    keys["general.name"] = fit_name(str(keys["general.name"]), source.tokenizer, family)
    ratios = read_ratios(config, is_tied=all(tensor.name != "lm_head.weight" for tensor in source.tensors))
    notices = tuple(_list_notices(keys, config, family, vocabulary.left_out))
    return Draft(family.architecture, keys, tensors, ratios, notices=notices)


def _list_tensors(source: ModelStream, family: Family, config: Config) -> tuple[DraftTensor, ...]:
    """The tensors in order: those that transformers computes, then the model's."""
    listed = [
        DraftTensor(name, tuple(values.shape), partial(_give, values), "F32")
        for name, values in family.make_extra(config)
    ]
    for tensor in source.tensors:
        adapted = partial(_adapt_blocks, tensor, family, config)
        listed.append(DraftTensor(family.translate(tensor.name), tensor.shape, adapted))
    return tuple(listed)


def _list_notices(keys: Keys, config: Config, family: Family, left_out: Sequence[str]) -> Iterator[str]:
    """What the file does not hold of the model."""
    if left_out:
        yield f"{len(left_out)} tokens have no row in the model and are left out: {', '.join(left_out[:3])}"
    window, context = config.get("sliding_window"), config["max_position_embeddings"]
    if window and window < context and f"{family.architecture}.attention.sliding_window" not in keys:
        yield f"llama.cpp looks back at the whole context, and this model at {window} tokens: keep it that short"


def _give(values: torch.Tensor) -> Iterator[torch.Tensor]:
    yield values


def _adapt_blocks(tensor: StreamTensor, family: Family, config: Config) -> Iterator[torch.Tensor]:
    """The rows of a weight as llama.cpp wants them; where rows change places, all of them are in memory."""
    if family.reorders(tensor.name):
        whole = family.adapt(tensor.name, torch.cat(list(tensor.make_blocks())), config)
        yield from torch.split(whole, max(1, _BLOCK_VALUES // whole[0].numel()))
        return
    for block in tensor.make_blocks():
        yield family.adapt(tensor.name, block, config)
