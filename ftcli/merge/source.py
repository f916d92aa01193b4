"""What is merged: the adapter that a reference means, its base, and what its run says of both."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import torch

from ftcli.errors import ContentError, UsageError
from ftcli.evaluate.subject import Subject, open_adapter
from ftcli.evaluate.target import Target, find_target
from ftcli.model.base import choose_device, choose_dtype
from ftcli.model.build import find_adapter
from ftcli.store.run import RunFolder
from ftcli.store.target import read_config


@dataclass(frozen=True)
class Source(Target):
    """An adapter on its base, of which one model can be made."""

    adapter: Path

    @property
    def dtype(self) -> torch.dtype:
        """What the run computed in; what it would compute in here, if it did not write that down."""
        name = self.manifest.get("dtype")
        return getattr(torch, name) if name else choose_dtype(self.section.dtype, choose_device())

    def open(self) -> Subject:
        """The adapter on its base, in memory as it was trained."""
        return open_adapter(self, self.renderer)


def find_source(reference: str | None = None, base: str | None = None) -> Source:
    """The adapter that ``reference`` means (None: of the newest finished run) on its own base, or on ``base``.

    Raises:
        UsageError: there is no adapter, or the run has none.
        ContentError: the run is not finished or damaged, or the base is another one, or packed.
    """
    if reference is not None and Path(reference).suffix.lower() in (".yaml", ".yml"):
        raise UsageError("is a recipe", where=reference, hint="name the run that it made, or an adapter")
    if reference is not None and not RunFolder(Path(reference).expanduser()).holds_run():
        reference = str(find_adapter(reference))
    return build_source(find_target(reference, base=base))


def build_source(target: Target) -> Source:
    """The adapter of ``target`` on its base.

    Raises:
        UsageError: it has none.
        ContentError: the base is packed.
    """
    if target.adapter is None:
        raise UsageError(
            "the run trained all weights: there is nothing to merge",
            where=target.name,
            hint=f"{target.files.folder} is the model",
        )
    _check_unpacked(target)
    return Source(**{field.name: getattr(target, field.name) for field in fields(target)})


def _check_unpacked(target: Target) -> None:
    """None if the base's weights are numbers to which an update can be added.

    Raises:
        ContentError: they are quantised.
    """
    files = target.files
    if not files.gguf_file and (packed := read_config(files).get("quantization_config")):
        method = packed.get("quant_method") if isinstance(packed, dict) else None
        raise ContentError(
            f"the base is quantised already ({method or 'unknown'})",
            where=files.reference,
            why="a merge into packed weights would lose the update in their rounding",
            hint="train on the 16-bit model, with quantization.load_in_4bit: true"
            if target.manifest
            else "name the 16-bit model that it was made from: --base MODEL",
        )
