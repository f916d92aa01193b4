"""What is judged: a run, an adapter on its base, a model folder or a GGUF file, opened so that all answer alike.

reference ─▶ Subject(name, renderer, backend, base)      backend: logits where something is learned, and answers
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from ftcli.data.chat import ChatRenderer, Rendered
from ftcli.data.message import Message
from ftcli.data.tokenizer import load_tokenizer
from ftcli.errors import ContentError, UsageError
from ftcli.evaluate.generate import Sampling, build_streamer, find_context, generate_texts
from ftcli.evaluate.llama_library import LlamaModel, check_runnable, load_library
from ftcli.evaluate.llamacpp import LlamaCppBackend, choose_renderer
from ftcli.evaluate.loss import compute_logits
from ftcli.events import Notice, OnEvent, ignore_event
from ftcli.model.base import check_gguf, choose_device, choose_dtype, count_embedding_rows, load_model
from ftcli.model.build import load_adapter
from ftcli.recipe import ModelSection, load_recipe
from ftcli.store.gguf_header import check_gguf_data
from ftcli.store.run import RunFolder, check_files, find_newest_run, read_manifest
from ftcli.store.target import ModelFiles, find_model, fingerprint_model
from ftcli.store.vocabulary import read_gguf_vocabulary


class Backend(Protocol):
    """A model in memory, whatever runs it."""

    @property
    def context(self) -> int | None:
        """The most tokens that it can look at, None where its config does not say."""

    def compute_logits(self, documents: Sequence[Rendered]) -> tuple[torch.Tensor, torch.Tensor]:
        """Float32 logits at the places whose next token is learned, and the ids of those: (T, vocabulary), (T,)."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        on_text: Callable[[str], None] | None = None,
        check_stop: Callable[[], None] = lambda: None,
    ) -> list[str]:
        """The answers to ``prompts`` (ids), without special tokens; that to a single one streams to ``on_text``."""


@dataclass(frozen=True)
class TorchBackend:
    """A transformers model; ``has_adapter`` says whether PEFT wraps it, ``uses_adapter`` whether that is on."""

    model: Any
    renderer: ChatRenderer
    has_adapter: bool = False
    uses_adapter: bool = True

    @property
    def context(self) -> int | None:
        return find_context(self.model.config)

    @torch.no_grad()
    def compute_logits(self, documents: Sequence[Rendered]) -> tuple[torch.Tensor, torch.Tensor]:
        device = self.model.get_input_embeddings().weight.device
        with self._adapted():
            return compute_logits(self.model, documents, device=device)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        on_text: Callable[[str], None] | None = None,
        check_stop: Callable[[], None] = lambda: None,
    ) -> list[str]:
        streamer = build_streamer(self.renderer.tokenizer, on_text) if on_text else None
        with self._adapted():
            return generate_texts(
                self.model, self.renderer, prompts, sampling, streamer=streamer, check_stop=check_stop
            )

    def _adapted(self) -> AbstractContextManager[Any]:
        is_off = self.has_adapter and not self.uses_adapter
        return self.model.disable_adapter() if is_off else nullcontext()


@dataclass(frozen=True)
class Subject:
    """A model that answers and can be measured; ``base`` is the one without its fine-tuning, where it is at hand."""

    name: str
    renderer: ChatRenderer
    backend: Backend
    base: Subject | None = None

    def answer(
        self, messages: Sequence[Message], sampling: Sampling, *, on_text: Callable[[str], None] | None = None
    ) -> str:
        """The next turn after ``messages``, handed to ``on_text`` piece by piece as it comes."""
        return self.backend.generate([self.renderer.render_prompt(messages)], sampling, on_text=on_text)[0]


def open_subject(
    reference: str | None = None,
    *,
    with_base: bool = False,
    renderer: ChatRenderer | None = None,
    on_event: OnEvent = ignore_event,
) -> Subject:
    """The model that ``reference`` means, in memory: a run, an adapter, or a model; None is the newest run.

    An adapter's base is always at hand; for other models ``with_base`` says whether it is loaded beside them. A GGUF
    file is run by llama.cpp where that is installed; else its dequantised weights are, with a notice to ``on_event``.

    Args:
        reference: what the user wrote.
        with_base: whether a run without an adapter brings its base too.
        renderer: of a model with the same vocabulary, for a GGUF file whose own tokenizer cannot be rebuilt.
        on_event: told what is not as the user might expect.

    Raises:
        UsageError, ContentError: no such target, or an adapter whose base is another one now.
    """
    if reference is None:
        return _open_run(find_newest_run(), with_base=with_base)
    path = Path(reference).expanduser()
    if RunFolder(path).holds_run():
        return _open_run(RunFolder(path), with_base=with_base)
    if (path / "adapter_config.json").exists():
        run = RunFolder(path.parent)
        if path.name == "adapter" and run.holds_run():
            return replace(_open_run(run, with_base=with_base), name=reference)
        base = read_base(path)
        files, section = find_model(base), ModelSection(name_or_path=base)
        return open_on_base(reference, path, files, section, None, _open_renderer(path, files))
    files = find_model(reference)
    if files.gguf_path:
        return _open_gguf(files, files.gguf_path, renderer, on_event)
    return _open_plain(reference, files, ModelSection(name_or_path=reference))


def _open_gguf(files: ModelFiles, path: Path, renderer: ChatRenderer | None, on_event: OnEvent) -> Subject:
    header = read_gguf_vocabulary(path)
    check_gguf_data(header, path.stat().st_size, files.reference)
    try:
        load_library()
    except UsageError as error:
        try:
            check_gguf(files)
        except ContentError as refusal:
            hint = f"{error.hint}, which runs it as it is; or {refusal.hint}"
            raise ContentError(refusal.what, where=refusal.where, why=str(error.what), hint=hint) from error
        on_event(Notice(f"{error.what}: transformers runs the dequantised weights; {error.hint}"))
        return _open_plain(files.reference, files, ModelSection(name_or_path=files.reference))
    check_runnable(header, files.reference)
    model = LlamaModel(path, n_threads=torch.get_num_threads())
    renderer = choose_renderer(model, files, renderer)
    return Subject(files.reference, renderer, LlamaCppBackend(model, renderer))


def _open_plain(name: str, files: ModelFiles, section: ModelSection, kwargs: Any = None) -> Subject:
    renderer = ChatRenderer(load_tokenizer(files), kwargs)
    return Subject(name, renderer, TorchBackend(load_plain(files, section), renderer))


def _open_run(run: RunFolder, *, with_base: bool) -> Subject:
    manifest = read_finished(run)
    check_files(run)
    recipe = load_recipe(run.recipe).recipe
    kwargs = recipe.tokenizer.chat_template_kwargs
    if recipe.peft is None:
        subject = _open_plain(str(run.path), ModelFiles(str(run.model), run.model), recipe.model, kwargs)
        if not with_base:
            return subject
        name = recipe.model.name_or_path
        model = load_plain(find_model(name, revision=manifest["base"]["revision"]), recipe.model)
        return replace(subject, base=Subject(name, subject.renderer, TorchBackend(model, subject.renderer)))
    base = manifest["base"]
    files = find_model(recipe.model.name_or_path, revision=base["revision"] or recipe.model.revision)
    check_base(files, base["fingerprint"])
    quantization = recipe.quantization if recipe.is_4bit else None
    renderer = _open_renderer(run.adapter, files, kwargs)
    return open_on_base(str(run.path), run.adapter, files, recipe.model, quantization, renderer)


def _open_renderer(adapter: Path, files: ModelFiles, kwargs: Any = None) -> ChatRenderer:
    """Tokenizer and template as they were trained, where the adapter brings them; else the base's."""
    is_own = (adapter / "tokenizer.json").exists()
    return ChatRenderer(load_tokenizer(ModelFiles(str(adapter), adapter) if is_own else files), kwargs)


def open_on_base(
    name: str, adapter: Path, files: ModelFiles, section: ModelSection, quantization: Any, renderer: ChatRenderer
) -> Subject:
    """The adapter on the base in ``files``, with the same without the adapter as its base.

    Raises:
        ContentError: base or adapter are damaged, or do not fit each other.
    """
    model = load_plain(files, section, quantization)
    if len(renderer.tokenizer) > count_embedding_rows(model):  # added tokens; their rows come with the adapter
        model.resize_token_embeddings(len(renderer.tokenizer), mean_resizing=False)
    tuned = TorchBackend(load_adapter(model, adapter), renderer, has_adapter=True)
    base = Subject(files.reference, renderer, replace(tuned, uses_adapter=False))
    return Subject(name, renderer, tuned, base)


def read_finished(run: RunFolder) -> dict[str, Any]:
    """The manifest of a run that has come to its end.

    Raises:
        ContentError: it has not.
    """
    manifest = read_manifest(run)
    if manifest.get("state") != "finished":
        raise ContentError(
            f"the run is {manifest.get('state')}, not finished",
            where=str(run.path),
            hint=f"go on with it: ftcli train {run.recipe} --set output_dir={run.path} --resume",
        )
    return manifest


def check_base(files: ModelFiles, expected: str | None) -> None:
    """None if these files are the base of which ``expected`` is the fingerprint, or nothing is known of that.

    Raises:
        ContentError: they are another model's.
    """
    if expected is not None and fingerprint_model(files) != expected:
        raise ContentError(
            "the base model is not the one that this adapter was trained on",
            where=files.reference,
            why="its config or weights differ from what the run recorded",
            hint="restore the model, or name the right one (model.revision, or --base where there is that option)",
        )


def load_plain(files: ModelFiles, section: ModelSection, quantization: Any = None) -> Any:
    """The model of these files on the best device here, for inference."""
    device = choose_device()
    dtype = choose_dtype(section.dtype, device)
    return load_model(files, section, dtype=dtype, device=device, quantization=quantization).eval()


def read_base(adapter: Path) -> str:
    """The reference of its base that an adapter's config holds.

    Raises:
        ContentError: it names none.
    """
    try:
        base = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise ContentError("adapter_config.json does not name its base model", where=str(adapter)) from error
    if not isinstance(base, str) or not base:
        raise ContentError("adapter_config.json does not name its base model", where=str(adapter))
    return base


def require_base(subject: Subject) -> Subject:
    """The model without its fine-tuning.

    Raises:
        UsageError: there is none to compare with.
    """
    if subject.base is None:
        raise UsageError("there is no base to compare with", where=subject.name)
    return subject.base


def open_base(reference: str, renderer: ChatRenderer) -> Subject:
    """The model from which the run or adapter ``reference`` was made, alone in memory and read by ``renderer``.

    Raises:
        UsageError: ``reference`` is neither, so there is no base.
    """
    run = RunFolder(Path(reference).expanduser())
    if not (run.holds_run() and run.model.exists()):
        return require_base(open_subject(reference))
    section, revision = load_recipe(run.recipe).recipe.model, read_manifest(run)["base"]["revision"]
    model = load_plain(find_model(section.name_or_path, revision=revision), section)
    return Subject(section.name_or_path, renderer, TorchBackend(model, renderer))
