"""A target → what can be read of that model without its weights: config, headers, tokenizer files, and from where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ftcli.errors import ContentError, HubError, UsageError
from ftcli.model.anatomy import Anatomy, ModelFinding, describe_model
from ftcli.model.dimensions import GGUF_NAMES, Dimensions, read_dimensions, read_gguf_dimensions
from ftcli.model.layout import locate_tensor
from ftcli.store.gguf_header import read_gguf_header
from ftcli.store.run import RunFolder, find_newest_run, read_manifest
from ftcli.store.target import PACKAGE_SCHEME, find_package_file, looks_like_path, suggest_path
from ftcli.store.vocabulary import Vocabulary, read_json, read_vocabulary
from ftcli.store.weight import WeightTable, read_weight_table

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf", ".json")


@dataclass(frozen=True)
class ModelSource:
    """A model as far as it can be read.

    ``origin`` says in words where the answer comes from; ``folder`` is None where no file is here; ``notices`` are
    what a person must know of it, such as an answer from the catalog. ``adapter`` is the folder of an adapter that
    the target was, on this base.
    """

    target: str
    origin: str
    config: Mapping[str, Any] | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    gguf_file: str | None = None
    table: WeightTable | None = None
    vocabulary: Vocabulary | None = None
    adapter: Path | None = None
    notices: tuple[str, ...] = ()


def find_source(target: str | None, *, revision: str | None = None) -> ModelSource:
    """What is here, on the Hub or in the catalog of the model that ``target`` names; the newest run for None.

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
    try:
        is_there = path.exists()
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot be the name of a file: {error}", where=target) from error
    if is_there:
        return _read_folder(path, target) if path.is_dir() else _read_file(path, target)
    if looks_like_path(target):
        raise UsageError("no such file or folder", where=target, hint=suggest_path(path))
    return _ask_hub(target, revision)


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
        files = sorted(entry.name for entry in path.glob("*.gguf"))
        hint = f"name the file: {path / files[0]}" if files else "a model folder holds config.json and weights"
        raise ContentError("this folder holds no model", where=target, hint=hint)
    if config is None and table.files[0].format == "gguf":
        return _read_file(path / table.files[0].name, target)
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
        vocabulary = read_vocabulary(path.parent, path.name)
        return ModelSource(target, "the header of the GGUF file", None, {}, path.parent, path.name, table, vocabulary)
    config = read_json(path.parent / "config.json")
    origin = "the header of this file" + (" and the config.json beside it" if config else "; no config.json beside it")
    return ModelSource(target, origin, config, {}, path.parent, None, table, read_vocabulary(path.parent))


def _read_adapter(path: Path, target: str, base: str) -> ModelSource:
    try:
        source = find_source(base)
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


def _ask_hub(target: str, revision: str | None) -> ModelSource:
    from ftcli.model.catalog import find_entry

    try:
        return _read_hub(target, revision)
    except HubError as error:
        entry = None if revision else find_entry(target)
        if entry is None:
            raise
        place = f"{entry.source.repository}, {entry.source.path}, commit {entry.source.commit[:12]}"
        notice = f"the Hub was not read ({error.what}): this is ftcli's catalog, from {place}"
        if entry.same_architecture_as:
            notice += f"; read for {entry.same_architecture_as}, whose architecture it shares"
        return ModelSource(target, "the bundled catalog", entry.config, notices=(notice,))


def _read_hub(target: str, revision: str | None) -> ModelSource:
    from ftcli.store.hub import read_hub_model

    found = read_hub_model(target, revision)
    config = read_json(found.folder / "config.json")
    if config is None:
        raise ContentError("the repository holds no config.json", where=target, hint="is it a language model?")
    where = "the local Hub cache" if found.is_cached else "the Hub: config and headers, no weights"
    return ModelSource(
        target=target,
        origin=f"{where}, revision {found.revision}" if found.revision else where,
        config=config,
        generation=read_json(found.folder / "generation_config.json") or {},
        folder=found.folder,
        table=found.table,
        vocabulary=read_vocabulary(found.folder),
        notices=() if found.table else ("the headers of its weights were not read: counted from the config",),
    )


def describe_source(source: ModelSource) -> Anatomy | None:
    """The anatomy of the model; None for an adapter whose base cannot be read.

    Raises:
        ContentError: config or headers that no model can have.
    """
    table = source.table
    if source.gguf_file and source.folder and table:
        return _describe_gguf(source.folder / source.gguf_file, table, source.target)
    entries = table.tensors if table else None
    if source.config is None:
        if not entries:
            return None
        return describe_model(_infer_dimensions(table), entries, where=source.target)
    dimensions = read_dimensions(source.config, where=f"{source.target}: config.json")
    return describe_model(dimensions, entries, config=source.config, where=source.target)


def _describe_gguf(path: Path, table: WeightTable, target: str) -> Anatomy:
    shapes = {entry.name: entry.shape for entry in table.tensors}
    embedding = shapes.get("token_embd.weight")
    if not embedding:
        raise ContentError("holds no token_embd.weight: it is no language model", where=target)
    is_tied = "output.weight" not in shapes
    header = read_gguf_header(path)
    dimensions = read_gguf_dimensions(header.metadata, embedding[0], is_tied=is_tied, where=target)
    if dimensions.family == "llama" and "blk.0.attn_qkv.weight" in shapes:
        dimensions = replace(dimensions, family=GGUF_NAMES.get(header.architecture, header.architecture))
    return describe_model(dimensions, table.tensors, is_gguf=True, where=target)


def _infer_dimensions(table: WeightTable | None) -> Dimensions:
    """What names and shapes alone give away; heads are not among it, and stand as 0."""
    entries = table.tensors if table else ()
    layers = [place.layer for entry in entries if (place := locate_tensor(entry.name)).layer is not None]
    embedding = next((e.shape for e in entries if locate_tensor(e.name).part == "embedding"), (0, 0))
    n_layers = 1 + max((layer for layer in layers if layer is not None), default=-1)
    has_head = any(locate_tensor(entry.name).part == "head" for entry in entries)
    return Dimensions(
        family="",
        n_layers=n_layers,
        hidden=embedding[-1] if embedding else 0,
        ffn=0,
        n_heads=0,
        n_kv_heads=0,
        head_dim=0,
        vocab=embedding[0] if embedding else 0,
        is_tied=not has_head,
        activation="",
        context=None,
        rope=None,
        windows=(None,) * min(n_layers, 4096),
        experts=None,
        norm_eps=None,
        flags={},
    )


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
