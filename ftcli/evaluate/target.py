"""What a reference means: a run, an adapter on its base, or a model; found and checked, and nothing of it loaded.

reference ─▶ Target ─▶ a Subject that answers · a Contender that is described · a Source that is merged
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from ftcli.data.chat import ChatRenderer
from ftcli.data.tokenizer import load_tokenizer
from ftcli.errors import ContentError, HubError, UsageError
from ftcli.recipe import ModelSection, QuantizationSection, Recipe, load_recipe
from ftcli.store.file import read_json
from ftcli.store.output import MANIFEST
from ftcli.store.run import RunFolder, check_files, find_newest_run, read_manifest
from ftcli.store.target import ModelFiles, find_model, fingerprint_model, path_exists

ORIGIN = "ftcli.json"  # beside an adapter: what its training was, wherever it is copied
_KIND_OF_FILE = re.compile(r"[-._](B?F(16|32)|I?Q\d\w*)$", re.IGNORECASE)  # at the end of a GGUF file's name


@dataclass(frozen=True)
class Target:
    """A run, an adapter or a model; ``files`` are the model's, for an adapter those of its base.

    ``run`` and ``recipe`` are empty for what is no run; ``adapter`` is None for whole weights. ``manifest`` is what the
    run, the merge or the adapter recorded of where it came from.
    """

    name: str
    files: ModelFiles
    section: ModelSection
    adapter: Path | None = None
    run: RunFolder | None = None
    recipe: Recipe | None = None
    manifest: Mapping[str, Any] = field(default_factory=dict)

    @property
    def quantization(self) -> QuantizationSection | None:
        """How the base was held in 4 bits in training; None if it was not, or nothing is known of it."""
        if self.recipe:
            return self.recipe.quantization if self.recipe.is_4bit else None
        recorded = self.manifest.get("quantization") if self.adapter else None
        return QuantizationSection(**recorded) if recorded else None

    @property
    def template_kwargs(self) -> dict[str, Any]:
        """What the template was told in training besides the messages."""
        recorded = self.manifest.get("chat_template_kwargs")
        return dict(self.recipe.tokenizer.chat_template_kwargs if self.recipe else recorded or {})

    @property
    def added_tokens(self) -> tuple[str, ...]:
        """The words that were added to the vocabulary in training."""
        recorded = self.manifest.get("added_tokens")
        return tuple(self.recipe.tokenizer.add_tokens if self.recipe else recorded or ())

    @property
    def is_trained(self) -> bool:
        """Whether ftcli trained it, so that it knows chats exactly as its template writes them."""
        return bool(self.manifest)

    @property
    def title(self) -> str:
        """What it is called by itself, without the way to it."""
        if self.run:
            return self.run.path.resolve().name
        if self.adapter:
            return self.adapter.resolve().name
        if self.files.gguf_path:
            return _KIND_OF_FILE.sub("", self.files.gguf_path.stem)
        if self.files.revision:  # the Hub's folder is a number
            return self.files.reference.rpartition("/")[2]
        return self.files.folder.resolve().name

    @cached_property
    def tokenizer(self) -> Any:
        """As it was trained, where the adapter brings it; else the model's own."""
        files = self.files
        if self.adapter and (self.adapter / "tokenizer.json").exists():
            files = ModelFiles(str(self.adapter), self.adapter)
        return load_tokenizer(files)

    @cached_property
    def renderer(self) -> ChatRenderer:
        """Tokenizer and template as they were trained, on that day."""
        date = self.manifest.get("template_date")
        return self.load_renderer(date=datetime.fromisoformat(date) if date else None)

    def load_renderer(self, *, date: datetime | None = None) -> ChatRenderer:
        """Tokenizer and template; ``date`` is what a template that asks for it is told, None is today."""
        return ChatRenderer(self.tokenizer, self.template_kwargs, date=date)


def find_target(reference: str | None = None, *, base: str | None = None) -> Target:
    """What ``reference`` means, None the newest finished run; an adapter is of its own base, or of ``base``.

    What must come from the Hub is fetched. Cost: the hashes of a run's artifact, and blocks of its base.

    Raises:
        UsageError: no such target, or its base is not there.
        ContentError: a run that is not finished, damaged files, or a base that is another one now.
        HubError: the Hub refused, or could not be reached.
    """
    reference = reference or str(find_newest_run().path)
    path = Path(reference).expanduser()
    is_inside = path.name == "adapter" and RunFolder(path.parent).holds_run()
    run = RunFolder(path.parent if is_inside else path)
    if run.holds_run():
        return _find_run(reference, run, base)
    if path.suffix.lower() in (".yaml", ".yml"):
        raise UsageError("is a recipe, and no model", where=reference, hint="name the run that it made, or a model")
    if path_exists(path / "adapter_config.json", reference):
        return _find_adapter(reference, path, base)
    found = read_json(path / MANIFEST) if path.is_dir() else None
    manifest = found if found and found.get("command") in ("merge", "quantize") else {}
    return Target(reference, find_model(reference), ModelSection(name_or_path=reference), manifest=manifest)


def find_base(target: Target) -> Target:
    """The model from which the run or adapter ``target`` was made.

    Raises:
        UsageError: it is neither, or the base is not there.
        ContentError: the base is another one now.
    """
    if target.adapter:
        name = target.files.reference + (" (4 bits)" if target.quantization else "")
        return Target(name, target.files, target.section)
    if not (recorded := target.manifest.get("base")):
        what = "there is no base to compare with: this is no run, no adapter and no merge"
        raise UsageError(what, where=target.name, hint="name the base as a target of its own")
    files = find_model(recorded["id"], revision=recorded["revision"])
    _check_base(files, recorded["fingerprint"])
    return Target(recorded["id"], files, target.section)


def _find_run(name: str, run: RunFolder, base: str | None) -> Target:
    manifest = _read_finished(run)
    check_files(run)
    recipe = load_recipe(run.recipe).recipe
    if recipe.peft is None:
        return Target(name, ModelFiles(str(run.model), run.model), recipe.model, None, run, recipe, manifest)
    recorded = manifest["base"]
    files = _find_adapted(base) if base else _find_adapted(recipe.model.name_or_path, recorded["revision"])
    _check_base(files, recorded["fingerprint"])
    return Target(name, files, recipe.model, run.adapter, run, recipe, manifest)


def _find_adapter(name: str, path: Path, base: str | None) -> Target:
    """An adapter that lies alone; where ftcli made it, it says how, and of which base."""
    origin = _read_origin(path)
    recorded = origin.get("base", {})
    reference = base or recorded.get("id") or _read_base(path)
    files = _find_adapted(reference, None if base else recorded.get("revision"))
    if recorded:
        _check_base(files, recorded["fingerprint"])
    section = ModelSection(name_or_path=reference, dtype=origin.get("dtype", "auto"))
    return Target(name, files, section, path, manifest=origin)


def _read_origin(adapter: Path) -> dict[str, Any]:
    """What an adapter of ftcli says of its training, empty for any other: base, dtype, quantization, template.

    Raises:
        ContentError: it is damaged.
    """
    origin = read_json(adapter / ORIGIN) or {}
    base = origin.get("base", {"id": "", "revision": None, "fingerprint": ""})
    try:
        ModelSection(name_or_path="any", dtype=origin.get("dtype", "auto"))
        QuantizationSection(**(origin.get("quantization") or {}))
        is_whole = isinstance(base, dict) and {"id", "revision", "fingerprint"} <= base.keys()
        is_whole &= _is_date(origin.get("template_date"))
        is_whole &= all(isinstance(token, str) for token in origin.get("added_tokens", ()))
    except (ValueError, TypeError):
        is_whole = False
    if not is_whole:
        raise ContentError("is damaged", where=str(adapter / ORIGIN), hint="copy the adapter again")
    return origin


def _find_adapted(name: str, revision: str | None = None) -> ModelFiles:
    """The files of an adapter's base."""
    try:
        return find_model(name, revision=revision)
    except (UsageError, HubError) as error:
        hint = f"{error.hint}; or name the base where it lies now: ftcli merge … --base MODEL".lstrip("; ")
        kind = type(error)
        raise kind(error.what, where=error.where, why="the adapter's base is not there", hint=hint) from error


def _read_finished(run: RunFolder) -> dict[str, Any]:
    """The manifest of a run that has come to its end, which names its base."""
    manifest = read_manifest(run)
    if manifest.get("state") != "finished":
        raise ContentError(
            f"the run is {manifest.get('state')}, not finished",
            where=str(run.path),
            hint=f"go on with it: ftcli train {run.recipe} --set output_dir={run.path} --resume",
        )
    base, files = manifest.get("base"), manifest.get("files")
    is_whole = isinstance(base, dict) and {"id", "revision", "fingerprint"} <= base.keys() and isinstance(files, dict)
    if not is_whole or not _is_date(manifest.get("template_date")):
        what = "manifest.json is damaged: it does not say what the base is, or what the files"
        raise ContentError(what, where=str(run.path), hint="restore the file, or train again")
    return manifest


def _is_date(value: Any) -> bool:
    """Whether a manifest may say so of the template's date."""
    try:
        return value is None or bool(datetime.fromisoformat(value))
    except (ValueError, TypeError):
        return False


def _read_base(adapter: Path) -> str:
    """The reference of its base that an adapter's config holds."""
    base = (read_json(adapter / "adapter_config.json") or {}).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ContentError("adapter_config.json does not name its base model", where=str(adapter))
    return base


def _check_base(files: ModelFiles, expected: str) -> None:
    """None if these files are the base of which ``expected`` is the fingerprint."""
    if fingerprint_model(files) != expected:
        raise ContentError(
            "the base model is another one than in training",
            where=files.reference,
            why="its config or weights differ from what the run recorded",
            hint="restore the model, or name the right one: ftcli merge … --base MODEL",
        )
