"""A target → what can be read of that model without its weights: config, headers, tokenizer files, and from where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcli.errors import ContentError, HubError, UsageError
from ftcli.model.anatomy import Anatomy, ModelFinding
from ftcli.model.demand import describe_files
from ftcli.store.file import read_json
from ftcli.store.run import RunFolder, find_newest_run, read_manifest
from ftcli.store.target import (
    MODEL_FOLDER,
    PACKAGE_SCHEME,
    find_package_file,
    looks_like_path,
    path_exists,
    suggest_gguf,
    suggest_path,
)
from ftcli.store.vocabulary import Vocabulary, read_vocabulary
from ftcli.store.weight import WeightTable, read_weight_table

if TYPE_CHECKING:
    from ftcli.store.hub import HubModel

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf", ".json")


@dataclass(frozen=True)
class ModelSource:
    """A model as far as it can be read.

    ``origin`` says in words where the answer comes from; ``folder`` is None where no file is here; ``notices`` are
    what a person must know of it, such as an answer from the catalog. ``adapter`` is the folder of an adapter that
    the target was, on this base; if ``is_remote_adapter``, its weights are on the Hub and ``adapter_table`` is what
    their header tells, None if it was not read.
    """

    target: str
    origin: str
    config: Mapping[str, Any] | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    table: WeightTable | None = None
    vocabulary: Vocabulary | None = None
    adapter: Path | None = None
    is_remote_adapter: bool = False
    adapter_table: WeightTable | None = None
    notices: tuple[str, ...] = ()


def find_source(target: str | None, *, revision: str | None = None, is_base: bool = False) -> ModelSource:
    """What is here, on the Hub or in the catalog of the model that ``target`` names; the newest run for None.

    ``is_base``: an adapter names it as its base, so that on the Hub it may be no adapter itself.

    Raises:
        UsageError: no such path or run.
        ContentError: files that are damaged, or hold no model.
        HubError: the Hub refused or cannot be reached, and the catalog does not know the model.
    """
    if target is None:
        run = find_newest_run()
        source = find_source(str(run.path))
        return replace(source, notices=(f"no target was named: {run.path} is the newest finished run", *source.notices))
    if target.startswith(PACKAGE_SCHEME):
        return _read_file(find_package_file(target), target)
    path = Path(target).expanduser()
    if path_exists(path, target):
        return _read_folder(path, target) if path.is_dir() else _read_file(path, target)
    if looks_like_path(target):
        raise UsageError("no such file or folder", where=target, hint=suggest_path(path))
    return _ask_hub(target, revision, is_base=is_base)


def _read_folder(path: Path, target: str) -> ModelSource:
    run = RunFolder(path)
    if run.holds_run():
        if run.model.exists():
            return replace(_read_folder(run.model, target), origin=f"the run in {path}")
        if not run.adapter.exists():
            raise ContentError("this run has saved no adapter yet", where=target, hint=f"see {run.manifest}")
        return _read_adapter(run.adapter, target, str(read_manifest(run)["base"]["id"]))
    if (config := read_json(path / "adapter_config.json")) is not None:
        return _read_adapter(path, target, str(config.get("base_model_name_or_path") or ""))
    config = read_json(path / "config.json")
    table = read_weight_table(path)
    if config is None and not table.files:
        raise ContentError("this folder holds no model", where=target, hint=suggest_gguf(path) or MODEL_FOLDER)
    return ModelSource(
        target=target,
        origin="config.json and the headers of its weights" if table.files else "config.json; no weights are here",
        config=config,
        generation=read_json(path / "generation_config.json") or {},
        folder=path,
        table=table if table.files else None,
        vocabulary=read_vocabulary(path),
    )


def _read_file(path: Path, target: str) -> ModelSource:
    if not path.name.endswith(_WEIGHT_SUFFIXES):
        raise ContentError(
            "is no model file", where=target, hint="name a folder, a .safetensors, .bin or .gguf, or a recipe (.yaml)"
        )
    table = read_weight_table(path)
    if path.suffix == ".gguf":
        return ModelSource(
            target=target,
            origin="the header of the GGUF file",
            folder=path.parent,
            table=table,
            vocabulary=read_vocabulary(path.parent, path.name),
        )
    config = read_json(path.parent / "config.json")
    origin = "the header of this file" + (" and the config.json beside it" if config else "; no config.json beside it")
    return ModelSource(
        target=target,
        origin=origin,
        config=config,
        folder=path.parent,
        table=table,
        vocabulary=read_vocabulary(path.parent),
    )


def _read_adapter(path: Path, target: str, base: str) -> ModelSource:
    try:
        if not base:
            raise ContentError("adapter_config.json names none")
        if _holds_adapter(Path(base).expanduser()):
            raise ContentError("is an adapter itself")
        source = find_source(base, is_base=True)
    except (UsageError, HubError, ContentError) as error:
        return ModelSource(
            target,
            "an adapter",
            adapter=path,
            folder=path,
            vocabulary=read_vocabulary(path),
            notices=(f"its base cannot be read: {error.where or base}: {error.what}",),
        )
    vocabulary = read_vocabulary(path) or source.vocabulary
    origin = f"an adapter on {base}: {source.origin}"
    return replace(source, target=target, origin=origin, adapter=path, vocabulary=vocabulary)


def _holds_adapter(path: Path) -> bool:
    return path_exists(path / "adapter_config.json", str(path)) or path_exists(path / "adapter", str(path))


def _ask_hub(target: str, revision: str | None, *, is_base: bool) -> ModelSource:
    from ftcli.model.catalog import find_entry

    try:
        return _read_hub(target, revision, is_base=is_base)
    except HubError as error:
        entry = None if revision else find_entry(target)
        if entry is None:
            raise
        notice = f"the Hub was not read ({error.what}): this is ftcli's catalog, from {entry.source}"
        if entry.same_architecture_as:
            notice += (
                f"; only the architecture is known to be its own: context, rope and KV cache at full context "
                f"are those of {entry.same_architecture_as}"
            )
        if entry.part:
            notice += "; the text part alone, without a vision tower"
        return ModelSource(target, "the bundled catalog", entry.config, notices=(notice,))


def _read_hub(target: str, revision: str | None, *, is_base: bool) -> ModelSource:
    from ftcli.store.hub import read_hub_model

    found = read_hub_model(target, revision)
    if found.is_adapter:
        if is_base:
            raise ContentError("is an adapter itself", where=target)
        return _read_hub_adapter(found, target)
    if found.is_cached:
        where = "the local Hub cache"
    else:
        where = "the Hub: config and headers, no weights" if found.table else "the Hub: its config alone"
    return ModelSource(
        target=target,
        origin=f"{where}, revision {found.revision}",
        config=read_json(found.folder / "config.json"),
        generation=read_json(found.folder / "generation_config.json") or {},
        folder=found.folder,
        table=found.table,
        vocabulary=read_vocabulary(found.folder),
        notices=found.notices,
    )


def _read_hub_adapter(found: HubModel, target: str) -> ModelSource:
    config = read_json(found.folder / "adapter_config.json") or {}
    source = _read_adapter(found.folder, target, str(config.get("base_model_name_or_path") or ""))
    notices = (*found.notices, *source.notices)
    if not (found.folder / "adapter_model.safetensors").is_file():
        notices += (f"how far each module moved is only told of weights that are here; run: hf download {target}",)
    origin = f"the local Hub cache: {source.origin}" if found.is_cached else f"the Hub: {source.origin}"
    return replace(source, origin=origin, is_remote_adapter=True, adapter_table=found.table, notices=notices)


def describe_source(source: ModelSource) -> Anatomy | None:
    """The anatomy of the model; None for an adapter whose base cannot be read.

    Raises:
        ContentError: config or headers that no model can have.
    """
    if source.config is None and source.table is None:
        return None
    return describe_files(source.config, source.table, where=source.target)


def list_source_findings(source: ModelSource, anatomy: Anatomy | None) -> list[ModelFinding]:
    """What the files say against each other: shards, and a tokenizer that does not fit the embedding."""
    findings = [ModelFinding(entry.code, entry.text) for entry in (source.table.findings if source.table else ())]
    vocabulary = source.vocabulary
    if anatomy and vocabulary and vocabulary.entries and anatomy.dimensions.vocab:
        extra = vocabulary.entries - anatomy.dimensions.vocab
        if extra > 0:
            findings.append(
                ModelFinding(
                    "tokenizer_larger",
                    f"the tokenizer has {vocabulary.entries:,} entries, "
                    f"the embedding {anatomy.dimensions.vocab:,} rows",
                    f"{extra:,} ids have no row; a text that holds one of them cannot be trained on",
                )
            )
    return findings
