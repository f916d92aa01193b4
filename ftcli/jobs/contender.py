"""A target of an evaluation before it is loaded: that it is there and whole, how large it is, and its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ftcli.data.chat import ChatRenderer
from ftcli.data.tokenizer import load_tokenizer
from ftcli.errors import ContentError, UsageError
from ftcli.evaluate.subject import read_base, read_finished
from ftcli.model.demand import describe_files
from ftcli.recipe import Recipe, load_recipe
from ftcli.store.file import read_json
from ftcli.store.run import RunFolder
from ftcli.store.target import PACKAGE_SCHEME, ModelFiles, find_model, list_weight_files, path_exists
from ftcli.store.weight import read_weight_table

_BROKEN = ("missing_shard", "missing_tensor", "incomplete")


@dataclass(frozen=True)
class Contender:
    """A run, an adapter or a model, found and not loaded; ``is_base`` is the base of the contender before it.

    ``files`` are those of the model, for an adapter of its base, and ``base`` is what names that. ``recipe`` and
    ``data_sha256`` are None for what is no run. ``bits_per_weight`` is of the model without the adapter.
    """

    name: str
    files: ModelFiles
    renderer: ChatRenderer
    size_bytes: int
    bits_per_weight: float
    context: int | None
    recipe: Recipe | None = None
    data_sha256: str | None = None
    base: str | None = None
    revision: str | None = None
    is_base: bool = False


def find_contender(reference: str, offered: ChatRenderer | None = None) -> Contender:
    """What ``reference`` means, from headers alone; what must come from the Hub is fetched.

    ``offered`` serves a GGUF file whose own tokenizer cannot be rebuilt; whether it is the same is seen when it opens.

    Raises:
        UsageError, ContentError, HubError: no such target, or one that is not whole.
    """
    path = Path(reference).expanduser()
    if path.suffix.lower() in (".yaml", ".yml"):
        raise UsageError("is a recipe, and no model", where=reference, hint="name the run that it made, or a model")
    inside = path.name == "adapter" and RunFolder(path.parent).holds_run()
    run = RunFolder(path.parent if inside else path)
    if run.holds_run():
        return _find_run(reference, run)
    if not reference.startswith(PACKAGE_SCHEME) and path_exists(path / "adapter_config.json", reference):
        base = read_base(path)
        files = find_model(base)
        return _describe(reference, files, _load_renderer(path, files), adapter=path, base=base)
    files = find_model(reference)
    try:
        renderer = ChatRenderer(load_tokenizer(files))
    except ContentError:
        if not files.gguf_file or offered is None:
            raise
        renderer = offered
    return _describe(reference, files, renderer)


def find_base(contender: Contender) -> Contender:
    """The model from which the contender was made, as the contender itself reads rows.

    Raises:
        UsageError: it is neither a run nor an adapter.
    """
    if contender.base is None:
        what = "there is no base to compare with: this is neither a run nor an adapter"
        raise UsageError(what, where=contender.name, hint="name the base as a target of its own")
    files = find_model(contender.base, revision=contender.revision)
    found = _describe(contender.base, files, contender.renderer)
    return replace(found, is_base=True)


def _find_run(reference: str, run: RunFolder) -> Contender:
    manifest = read_finished(run)
    recipe = load_recipe(run.recipe).recipe
    base, revision = recipe.model.name_or_path, manifest["base"]["revision"]
    if recipe.peft is None:
        files, adapter = ModelFiles(reference, run.model), None
    else:
        files, adapter = find_model(base, revision=revision), run.adapter
    renderer = _load_renderer(run.artifact, files, recipe.tokenizer.chat_template_kwargs)
    found = _describe(reference, files, renderer, adapter=adapter, base=base)
    return replace(found, recipe=recipe, data_sha256=manifest.get("data_sha256"), revision=revision)


def _load_renderer(folder: Path, files: ModelFiles, template_kwargs: Any = None) -> ChatRenderer:
    """Tokenizer and template as they were saved in ``folder``, or those of ``files``."""
    has_own = (folder / "tokenizer.json").exists()
    return ChatRenderer(load_tokenizer(ModelFiles(str(folder), folder) if has_own else files), template_kwargs)


def _describe(
    name: str, files: ModelFiles, renderer: ChatRenderer, *, adapter: Path | None = None, base: str | None = None
) -> Contender:
    list_weight_files(files)
    table = read_weight_table(files.gguf_path or files.folder)
    for finding in table.findings:
        if finding.code in _BROKEN:
            raise ContentError(finding.text, where=files.reference, hint="download or copy the model again")
    config = None if files.gguf_file else read_json(files.folder / "config.json")
    anatomy = describe_files(config, table, where=files.reference)
    size_bytes = sum(file.size_bytes for file in table.files)
    if adapter is not None:
        size_bytes += sum(path.stat().st_size for path in adapter.glob("adapter_model.*"))
    bits = 8 * table.size_bytes / max(1, anatomy.parameters.total)
    return Contender(name, files, renderer, size_bytes, bits, anatomy.dimensions.context, base=base)
