"""What is judged: a run, an adapter on its base, a model folder or a GGUF file, opened so that all answer alike.

Target ─▶ Subject(name, renderer, backend, base)      backend: logits where something is learned, and answers
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from ftcli.data.chat import ChatRenderer, Rendered
from ftcli.data.message import Message
from ftcli.errors import ContentError, UsageError
from ftcli.evaluate.generate import Sampling, build_streamer, find_context, generate_texts
from ftcli.evaluate.llama_library import load_library
from ftcli.evaluate.llamacpp import LlamaCppBackend, choose_renderer, open_llama
from ftcli.evaluate.loss import compute_logits
from ftcli.evaluate.target import Target, find_base, find_target
from ftcli.events import Notice, OnEvent, ignore_event
from ftcli.model.base import check_gguf, choose_device, choose_dtype, count_embedding_rows, load_model
from ftcli.model.build import load_adapter
from ftcli.model.quantization import read_packing
from ftcli.recipe import ModelSection
from ftcli.store.gguf_header import check_gguf_data, read_gguf_header
from ftcli.store.target import ModelFiles


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

    The rest is as for `open_target`.

    Raises:
        FtcliError: no such target, or one that cannot be used.
    """
    return open_target(find_target(reference), with_base=with_base, renderer=renderer, on_event=on_event)


def open_target(
    target: Target,
    *,
    with_base: bool = False,
    renderer: ChatRenderer | None = None,
    on_event: OnEvent = ignore_event,
) -> Subject:
    """The model of ``target``, in memory.

    An adapter's base is always at hand; for a run of full fine-tuning ``with_base`` says whether it is loaded beside
    it. A GGUF file is run by llama.cpp where that is installed; else its dequantised weights are, with a notice; so
    are those of a GPTQ or AWQ folder.

    Args:
        target: as it was found.
        with_base: whether a run without an adapter brings its base too.
        renderer: of a model with the same vocabulary, for a GGUF file whose own tokenizer cannot be rebuilt.
        on_event: told what is not as the user might expect.

    Raises:
        ContentError: damaged files, or an adapter and a base that do not fit each other.
        MemoryExhausted: it does not fit.
    """
    packing = read_packing(target.files)
    if packing and packing.is_unpacked_here:
        on_event(Notice(f"{target.files.reference} ({packing.title}) is dequantised to run here"))
    if target.adapter:
        return open_adapter(target, target.load_renderer())
    if target.files.gguf_path:
        return _open_gguf(target, target.files.gguf_path, renderer, on_event)
    base = find_base(target) if with_base and target.manifest else None
    subject = open_plain(target, target.load_renderer())
    return replace(subject, base=open_plain(base, subject.renderer)) if base else subject


def open_plain(target: Target, renderer: ChatRenderer) -> Subject:
    """The whole weights of ``target`` in transformers, which reads by ``renderer``."""
    return Subject(target.name, renderer, TorchBackend(load_plain(target.files, target.section), renderer))


def open_adapter(target: Target, renderer: ChatRenderer) -> Subject:
    """The adapter of ``target`` on its base, with the same without the adapter as its base.

    Raises:
        ContentError: base or adapter are damaged, or do not fit each other.
    """
    assert target.adapter is not None
    model = load_plain(target.files, target.section, target.quantization)
    if len(renderer.tokenizer) > count_embedding_rows(model):  # added tokens; their rows come with the adapter
        model.resize_token_embeddings(len(renderer.tokenizer), mean_resizing=False)
    tuned = TorchBackend(load_adapter(model, target.adapter), renderer, has_adapter=True)
    base = Subject(target.files.reference, renderer, replace(tuned, uses_adapter=False))
    return Subject(target.name, renderer, tuned, base)


def _open_gguf(target: Target, path: Path, renderer: ChatRenderer | None, on_event: OnEvent) -> Subject:
    try:
        load_library()
    except UsageError as error:
        check_gguf_data(read_gguf_header(path), path.stat().st_size, target.name)
        try:
            check_gguf(target.files)
        except ContentError as refusal:
            hint = f"{error.hint}, which runs it as it is; or {refusal.hint}"
            raise ContentError(refusal.what, where=refusal.where, why=str(error.what), hint=hint) from error
        on_event(Notice(f"{error.what}: transformers runs the dequantised weights; {error.hint}"))
        return open_plain(target, target.load_renderer())
    model = open_llama(path, target.name)
    renderer = choose_renderer(model, target, renderer)
    return Subject(target.name, renderer, LlamaCppBackend(model, renderer))


def load_plain(files: ModelFiles, section: ModelSection, quantization: Any = None) -> Any:
    """The model of these files on the best device here, for inference."""
    device = choose_device()
    dtype = choose_dtype(section.dtype, device)
    return load_model(files, section, dtype=dtype, device=device, quantization=quantization).eval()


def require_base(subject: Subject) -> Subject:
    """The model without its fine-tuning.

    Raises:
        UsageError: there is none to compare with.
    """
    if subject.base is None:
        raise UsageError("there is no base to compare with", where=subject.name)
    return subject.base
