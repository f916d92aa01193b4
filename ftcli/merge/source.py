"""What is merged: the adapter that a reference means, its base, and what its run says of both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ftcli.data.chat import ChatRenderer, Rendered
from ftcli.data.limits import read_limits
from ftcli.data.tokenizer import load_tokenizer
from ftcli.errors import ContentError, UsageError
from ftcli.evaluate.sample import load_file_rows, load_run_rows
from ftcli.evaluate.subject import Subject, check_base, open_on_base, read_base, read_finished
from ftcli.model.base import choose_device, choose_dtype
from ftcli.model.build import find_adapter
from ftcli.recipe import ModelSection, QuantizationSection, Recipe, load_recipe
from ftcli.store.run import RunFolder, check_files, find_newest_run
from ftcli.store.target import ModelFiles, find_model, read_config


@dataclass(frozen=True)
class Source:
    """An adapter and its base; ``run`` and what it recorded are empty for an adapter that lies alone."""

    name: str
    adapter: Path
    files: ModelFiles
    section: ModelSection
    run: RunFolder | None = None
    recipe: Recipe | None = None
    manifest: Mapping[str, Any] = field(default_factory=dict)

    @property
    def quantization(self) -> QuantizationSection | None:
        """How the run held the base in 4 bits; None if it did not, or nothing is known of it."""
        return self.recipe.quantization if self.recipe and self.recipe.is_4bit else None

    @property
    def dtype(self) -> torch.dtype:
        """What the run computed in; what it would compute in here, if it did not write that down."""
        name = self.manifest.get("dtype")
        return getattr(torch, name) if name else choose_dtype(self.section.dtype, choose_device())

    @cached_property
    def renderer(self) -> ChatRenderer:
        """Tokenizer and template as they were trained."""
        is_own = (self.adapter / "tokenizer.json").exists()
        tokenizer = load_tokenizer(ModelFiles(str(self.adapter), self.adapter) if is_own else self.files)
        kwargs = self.recipe.tokenizer.chat_template_kwargs if self.recipe else None
        date = self.manifest.get("template_date")
        return ChatRenderer(tokenizer, kwargs, date=datetime.fromisoformat(date) if date else None)

    def open(self) -> Subject:
        """The adapter on its base, in memory as it was trained."""
        return open_on_base(self.name, self.adapter, self.files, self.section, self.quantization, self.renderer)

    def load_rows(self, data: str | None, most_tokens: int) -> dict[str, list[Rendered]]:
        """Name → documents to compare models on: of the file ``data``, else of the run; none for a lone adapter."""
        options: dict[str, Any] = {"most_tokens": most_tokens, "context": read_limits(self.files).context}
        if data is not None:
            return load_file_rows(data, self.renderer, **options)
        return load_run_rows(self.recipe, self.renderer, **options) if self.recipe else {}


def find_source(target: str | None = None, base: str | None = None) -> Source:
    """The adapter that ``target`` means (None: of the newest finished run) on its own base, or on ``base``.

    Raises:
        UsageError: there is no adapter, or the run has none.
        ContentError: the run is not finished or damaged, or the base is another one, or packed.
    """
    run = find_newest_run() if target is None else RunFolder(Path(target).expanduser())
    if target is not None and not run.holds_run():
        adapter = find_adapter(target)
        run = RunFolder(adapter.parent)
        if adapter.name != "adapter" or not run.holds_run():
            name = base or read_base(adapter)
            return Source(target, adapter, _find_base(name, None, None), ModelSection(name_or_path=name))
    manifest = read_finished(run)
    check_files(run)
    recipe = load_recipe(run.recipe).recipe
    if recipe.peft is None:
        raise UsageError(
            "the run trained all weights: there is nothing to merge",
            where=str(run.path),
            hint=f"{run.model} is the model",
        )
    recorded = manifest["base"]
    name = base or recipe.model.name_or_path
    revision = None if base else recorded["revision"] or recipe.model.revision
    files = _find_base(name, revision, recorded["fingerprint"])
    return Source(target or str(run.path), run.adapter, files, recipe.model, run, recipe, manifest)


def _find_base(name: str, revision: str | None, expected: str | None) -> ModelFiles:
    try:
        files = find_model(name, revision=revision)
    except UsageError as error:
        hint = f"{error.hint}; name the base that the adapter was trained on: --base MODEL".lstrip("; ")
        raise UsageError(error.what, where=error.where, why="the adapter's base is not there", hint=hint) from error
    if not files.gguf_file and (packed := read_config(files).get("quantization_config")):
        method = packed.get("quant_method") if isinstance(packed, dict) else None
        raise ContentError(
            f"the base is quantised already ({method or 'unknown'})",
            where=name,
            why="a merge into packed weights would lose the update in their rounding",
            hint="name the 16-bit model that it was made from: --base MODEL",
        )
    check_base(files, expected)
    return files
