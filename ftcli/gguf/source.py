"""What is converted: a folder with config and tokenizer, and weights that come a block of rows at a time.

transformers folder ─▶ open_folder ─┐
                                    ├─▶ Source(folder, tensors)
merge under way ─────▶ open_merge ──┘
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import torch

from ftcli.data.tokenizer import load_tokenizer
from ftcli.errors import ContentError
from ftcli.merge.arithmetic import make_blocks
from ftcli.merge.plan import MergePlan, Weights
from ftcli.model.base import build_skeleton
from ftcli.model.stored import open_stored
from ftcli.recipe import ModelSection
from ftcli.store.target import ModelFiles

_BLOCK_BYTES = 16 << 20  # of a block in float32
_ROW_MULTIPLE = 256


@dataclass(frozen=True)
class SourceTensor:
    """A weight by its name in transformers; ``make_blocks`` gives its rows in order, in any floating-point type."""

    name: str
    shape: tuple[int, ...]
    make_blocks: Callable[[], Iterator[torch.Tensor]]


class Source(Protocol):
    """A model to convert."""

    @property
    def folder(self) -> Path:
        """Where config, generation config, tokenizer and model card lie."""

    @property
    def tokenizer(self) -> Any:
        """That of the folder."""

    @property
    def tensors(self) -> Sequence[SourceTensor]:
        """Its weights in the order of the file to be, a tied head left out."""


@dataclass(frozen=True)
class OpenSource:
    """A `Source` whose tensors are known."""

    folder: Path
    tensors: tuple[SourceTensor, ...]

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(ModelFiles(str(self.folder), self.folder))


def open_folder(folder: Path) -> OpenSource:
    """The model in a transformers folder, in the converter's order: by file, then by name.

    Raises:
        ContentError: it holds no model, or a damaged or packed one.
    """
    if not (folder / "config.json").exists():
        raise ContentError("this folder holds no config.json", where=str(folder))
    files = ModelFiles(str(folder), folder)
    weights = open_stored(files, build_skeleton(files, ModelSection(name_or_path=str(folder))))
    entries = sorted(weights.entries.items(), key=lambda pair: (pair[1].file, pair[1].name))
    tensors = [SourceTensor(name, entry.shape, partial(_read, weights, name)) for name, entry in entries]
    return OpenSource(folder, tuple(tensors))


def open_merge(folder: Path, plan: MergePlan, weights: Weights) -> OpenSource:
    """A merge as it would be written, without writing it: the sums are made when they are asked for.

    Args:
        folder: config and tokenizer of the result.
        plan: what is merged.
        weights: the base's.
    """
    parts = sorted(plan.parts, key=lambda part: (weights.entries[part.source].file, part.name))
    tensors = [SourceTensor(part.name, part.tensor.shape, partial(make_blocks, part, weights)) for part in parts]
    return OpenSource(folder, tuple(tensors))


def cut_rows(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Yields the first row and the one after the last of each block in which a weight of this shape is read."""
    row_bytes = 4 * max(1, math.prod(shape[1:]))
    n_rows, step = shape[0] if shape else 1, max(_ROW_MULTIPLE, _BLOCK_BYTES // row_bytes)
    for start in range(0, n_rows, step):
        yield start, min(start + step, n_rows)


def _read(weights: Weights, name: str) -> Iterator[torch.Tensor]:
    for start, stop in cut_rows(weights.entries[name].shape):
        yield weights.read_rows(name, start, stop)
