"""A conversation with a run, an adapter or a model, in the template that it was trained with."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftcli.data.chat import ChatRenderer
from ftcli.data.message import Message
from ftcli.data.tokenizer import load_tokenizer
from ftcli.errors import ContentError, UsageError
from ftcli.evaluate.generate import Sampling, generate_texts
from ftcli.model.base import choose_device, choose_dtype, count_embedding_rows, load_model
from ftcli.model.build import load_adapter
from ftcli.recipe import ModelSection, load_recipe
from ftcli.store.run import RunFolder, check_files, find_newest_run, read_manifest
from ftcli.store.target import PACKAGE_SCHEME, ModelFiles, find_model, fingerprint_model


@dataclass(frozen=True)
class ChatModel:
    """A loaded model that answers; ``base`` is the model without its fine-tuning, where there is one."""

    name: str
    model: Any
    renderer: ChatRenderer
    base: Any
    has_adapter: bool

    def answer(
        self,
        messages: Sequence[Message],
        sampling: Sampling,
        *,
        use_base: bool = False,
        on_text: Callable[[str], None] | None = None,
    ) -> str:
        """The next turn after ``messages``, handed to ``on_text`` piece by piece as it comes."""
        if use_base and self.base is None:
            raise UsageError("there is no base to compare with", where=self.name)
        model = self.base if use_base else self.model
        without = model.disable_adapter() if use_base and self.has_adapter else nullcontext()
        prompt = self.renderer.render_prompt(messages)
        streamer = build_streamer(self.renderer.tokenizer, on_text) if on_text else None
        with without:
            return generate_texts(model, self.renderer, [prompt], sampling, streamer=streamer)[0]


def load_chat_model(target: str | None = None, *, with_base: bool = False) -> ChatModel:
    """The model that ``target`` means, ready to answer: a run, an adapter, or a model; None is the newest run.

    Raises:
        UsageError, ContentError: no such target, or an adapter whose base is another one now.
    """
    if target is None:
        return _load_run(find_newest_run(), with_base=with_base)
    path = Path(target).expanduser()
    if (path / "manifest.json").exists():
        return _load_run(RunFolder(path), with_base=with_base)
    if (path / "adapter_config.json").exists():
        return _load_on_base(target, path, _read_base(path), ModelSection(name_or_path=_read_base(path)), None)
    files = find_model(target)
    model = _load_plain(files, ModelSection(name_or_path=target), None)
    return ChatModel(target, model, ChatRenderer(load_tokenizer(files)), None, has_adapter=False)


def _load_run(run: RunFolder, *, with_base: bool) -> ChatModel:
    manifest = read_manifest(run)
    if manifest.get("state") != "finished":
        raise ContentError(
            f"the run is {manifest.get('state')}, not finished",
            where=str(run.path),
            hint=f"go on with it: ftcli train {run.recipe} --set output_dir={run.path} --resume",
        )
    check_files(run)
    recipe = load_recipe(run.recipe).recipe
    kwargs = recipe.tokenizer.chat_template_kwargs
    if recipe.peft is None:
        files = ModelFiles(str(run.model), run.model)
        model = _load_plain(files, recipe.model, None)
        base = _load_plain(find_model(recipe.model.name_or_path), recipe.model, None) if with_base else None
        return ChatModel(str(run.path), model, ChatRenderer(load_tokenizer(files), kwargs), base, has_adapter=False)
    quantization = recipe.quantization if recipe.is_4bit else None
    base = manifest["base"]
    return _load_on_base(
        str(run.path),
        run.adapter,
        recipe.model.name_or_path,
        recipe.model,
        quantization,
        expected=base["fingerprint"],
        revision=base["revision"],
        kwargs=kwargs,
    )


def _load_on_base(
    name: str,
    adapter: Path,
    reference: str,
    section: ModelSection,
    quantization: Any,
    expected: str | None = None,
    revision: str | None = None,
    kwargs: Any = None,
) -> ChatModel:
    files = find_model(reference, revision=revision or section.revision)
    if expected is not None and fingerprint_model(files) != expected:
        raise ContentError(
            "the base model is not the one that this adapter was trained on",
            where=reference,
            why="its config or weights have changed since",
            hint="restore the model, or set model.revision to the commit that was used",
        )
    has_tokenizer = (adapter / "tokenizer.json").exists()
    tokenizer = load_tokenizer(ModelFiles(str(adapter), adapter) if has_tokenizer else files)
    base = _load_plain(files, section, quantization)
    if len(tokenizer) > count_embedding_rows(base):  # tokens that the run added; their rows come with the adapter
        base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model = load_adapter(base, adapter)
    return ChatModel(name, model, ChatRenderer(tokenizer, kwargs), model, has_adapter=True)


def _load_plain(files: ModelFiles, section: ModelSection, quantization: Any) -> Any:
    device = choose_device()
    dtype = choose_dtype(section.dtype, device)
    return load_model(files, section, dtype=dtype, device=device, quantization=quantization).eval()


def _read_base(adapter: Path) -> str:
    try:
        base = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise ContentError("adapter_config.json does not name its base model", where=str(adapter)) from error
    if not isinstance(base, str) or (not base and not base.startswith(PACKAGE_SCHEME)):
        raise ContentError("adapter_config.json does not name its base model", where=str(adapter))
    return base


def build_streamer(tokenizer: Any, on_text: Callable[[str], None]) -> Any:
    """A transformers streamer that hands each finished piece of text to ``on_text``."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):  # type: ignore[misc]
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if text:
                on_text(text)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
