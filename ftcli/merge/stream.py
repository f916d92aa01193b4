"""A model as a folder with config and tokenizer, and weights that come a block of rows at a time.

transformers folder ─▶ open_folder ─┐
                                    ├─▶ ModelStream(folder, tensors) ─▶ GGUF file, quantised folder
merge under way ─────▶ open_merge ──┘

A merge is not written for it: the sums are made when they are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from ftcli.data.tokenizer import load_tokenizer
from ftcli.errors import ContentError, NumericError
from ftcli.evaluate.target import Target
from ftcli.events import OnEvent
from ftcli.merge.arithmetic import make_blocks
from ftcli.merge.plan import MergePlan, Weights
from ftcli.merge.run import Merging
from ftcli.merge.source import Source
from ftcli.model.base import build_skeleton
from ftcli.model.quantization import read_packing
from ftcli.model.stored import is_finite, open_stored
from ftcli.recipe import ModelSection
from ftcli.store.card import build_front
from ftcli.store.file import disk_errors, write_text
from ftcli.store.target import ModelFiles

_BLOCK_BYTES = 16 << 20  # of a block in float32
_ROW_MULTIPLE = 256


@dataclass(frozen=True)
class StreamTensor:
    """A weight by its name in transformers; ``make_blocks`` gives its rows in order, in any floating-point type."""

    name: str
    shape: tuple[int, ...]
    make_blocks: Callable[[], Iterator[torch.Tensor]]

    @property
    def n_values(self) -> int:
        """Of the whole weight."""
        return math.prod(self.shape)

    def read(self, dtype: torch.dtype) -> torch.Tensor:
        """The whole weight, every value of it finite.

        Raises:
            ContentError: it holds NaN or infinity.
            NumericError: a value is too large for ``dtype``.
        """
        blocks = list(self.make_blocks())
        weight = torch.cat(blocks) if len(blocks) > 1 else blocks[0]
        if not is_finite(weight):
            raise ContentError(f"{self.name} holds NaN or infinity", hint="copy or train the model again")
        value = weight.to(dtype)
        if not is_finite(value):
            raise NumericError(f"{self.name} is too large for {str(dtype).removeprefix('torch.')}")
        return value


@dataclass(frozen=True)
class ModelStream:
    """A model whose weights are known and not read; ``folder`` holds config, generation config and tokenizer.

    ``tensors`` are in the order of the files, a tied head left out. Errors call it ``name``, or by its folder.
    """

    folder: Path
    tensors: tuple[StreamTensor, ...]
    name: str = ""

    @cached_property
    def tokenizer(self) -> Any:
        """That of the folder."""
        return load_tokenizer(self.files)

    @property
    def n_parameters(self) -> int:
        """Of all weights."""
        return sum(tensor.n_values for tensor in self.tensors)

    @property
    def files(self) -> ModelFiles:
        """The folder, as what loads models takes it."""
        return ModelFiles(self.name or str(self.folder), self.folder)


def open_model(target: Target, folder: Path, final: Path, on_event: OnEvent) -> ModelStream:
    """The model of ``target``, whose config and tokenizer are at ``folder`` now; an adapter is merged as it is read.

    Args:
        target: an adapter is a `Source`.
        folder: a free name, from which converters take what the model is called.
        final: the folder that the result is for.
        on_event: told what is not as the user might expect.

    Raises:
        ContentError: it holds no model, or a damaged or packed one, or adapter and base do not fit.
    """
    with disk_errors(folder):
        folder.parent.mkdir(exist_ok=True)
        if not isinstance(target, Source):
            folder.symlink_to(target.files.folder.resolve())
        else:
            folder.mkdir()
    if not isinstance(target, Source):
        return open_folder(folder, target.section, target.name)
    merging = Merging(target, final, None, "original", on_event)
    merging.write_texts(folder)
    base = target.manifest.get("base", {}).get("id", target.files.reference)
    write_text(folder / "README.md", "\n".join(build_front(base)))
    return replace(open_merge(folder, merging.plan, merging.weights), name=target.name)


def open_folder(folder: Path, section: ModelSection | None = None, name: str = "") -> ModelStream:
    """The model in a transformers folder, in the converter's order: by file, then by name; errors call it ``name``.

    Raises:
        ContentError: it holds no model, or a damaged or packed one.
    """
    files = ModelFiles(name or str(folder), folder)
    if not (folder / "config.json").exists():
        raise ContentError("this folder holds no config.json", where=files.reference)
    if packing := read_packing(files):
        raise ContentError(
            f"the weights are quantised already ({packing.title})",
            where=files.reference,
            why="to round twice loses more than to round once",
            hint="name the 16-bit model that it was made from",
        )
    weights = open_stored(files, build_skeleton(files, section or ModelSection(name_or_path=str(folder))))
    entries = sorted(weights.entries.items(), key=lambda pair: (pair[1].file, pair[1].name))
    tensors = [StreamTensor(weight, entry.shape, partial(_read, weights, weight)) for weight, entry in entries]
    return ModelStream(folder, tuple(tensors), name)


def open_merge(folder: Path, plan: MergePlan, weights: Weights) -> ModelStream:
    """A merge as it would be written, without writing it: the sums are made when they are asked for.

    Args:
        folder: config and tokenizer of the result.
        plan: what is merged.
        weights: the base's.
    """
    parts = sorted(plan.parts, key=lambda part: (weights.entries[part.source].file, part.name))
    tensors = [StreamTensor(part.name, part.tensor.shape, partial(make_blocks, part, weights)) for part in parts]
    return ModelStream(folder, tuple(tensors))


def cut_rows(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Yields the first row and the one after the last of each block in which a weight of this shape is read."""
    row_bytes = 4 * max(1, math.prod(shape[1:]))
    n_rows, step = shape[0] if shape else 1, max(_ROW_MULTIPLE, _BLOCK_BYTES // row_bytes)
    for start in range(0, n_rows, step):
        yield start, min(start + step, n_rows)


def _read(weights: Weights, name: str) -> Iterator[torch.Tensor]:
    for start, stop in cut_rows(weights.entries[name].shape):
        yield weights.read_rows(name, start, stop)
