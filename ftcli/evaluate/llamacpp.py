"""A GGUF file as it is, run by llama.cpp: the numbers of a runtime, not those of its dequantised weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ftcli.data.batch import IGNORE_LABEL, list_labels
from ftcli.data.chat import ChatRenderer, Rendered
from ftcli.errors import ContentError
from ftcli.evaluate.generate import Sampling, build_streamer, decode_answer, list_stop_ids
from ftcli.evaluate.llama_library import LlamaModel, check_runnable
from ftcli.evaluate.parity import find_misread, list_probes
from ftcli.evaluate.target import Target
from ftcli.store.gguf_header import check_gguf_data
from ftcli.store.vocabulary import read_gguf_vocabulary


@dataclass(frozen=True)
class LlamaCppBackend:
    """A model that llama.cpp runs; prompts and documents go one after another."""

    model: LlamaModel
    renderer: ChatRenderer

    @property
    def context(self) -> int | None:
        return self.model.context or None

    def compute_logits(self, documents: Sequence[Rendered]) -> tuple[torch.Tensor, torch.Tensor]:
        rows, targets = [], []
        for document in documents:
            labels = list_labels(document)
            places = [i for i, label in enumerate(labels) if label != IGNORE_LABEL]
            if not places:
                continue
            self.model.clear(places[-1])
            rows.append(torch.from_numpy(self.model.decode(document.ids[: places[-1]], [i - 1 for i in places])))
            targets += [labels[i] for i in places]
        logits = torch.cat(rows) if rows else torch.empty(0, self.model.n_vocabulary)
        return logits, torch.tensor(targets, dtype=torch.long)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        on_text: Callable[[str], None] | None = None,
        check_stop: Callable[[], None] = lambda: None,
    ) -> list[str]:
        choose = build_chooser(sampling)
        stops = list_stop_ids(self.renderer)
        answers = []
        for prompt in prompts:
            streamer = build_streamer(self.renderer.tokenizer, on_text) if on_text else None
            ids = self._continue(prompt, choose, stops, sampling.max_new_tokens, streamer, check_stop)
            answers.append(decode_answer(self.renderer.tokenizer, ids, stops))
        return answers

    def _continue(
        self,
        prompt: Sequence[int],
        choose: Callable[[Sequence[int], torch.Tensor], int],
        stops: Sequence[int],
        max_new_tokens: int,
        streamer: Any,
        check_stop: Callable[[], None],
    ) -> list[int]:
        """The ids that follow ``prompt``, the one that ends them among them."""
        self.model.clear(len(prompt) + max_new_tokens)
        if streamer:
            streamer.put(torch.tensor(prompt))
        answer: list[int] = []
        ahead: Sequence[int] = prompt
        while len(answer) < max_new_tokens:
            logits = torch.from_numpy(self.model.decode(ahead, [len(ahead) - 1]))
            token = choose([*prompt, *answer], logits)
            answer.append(token)
            check_stop()
            if streamer:
                streamer.put(torch.tensor([token]))
            if token in stops:
                break
            ahead = [token]
        if streamer:
            streamer.end()
        return answer


def build_chooser(sampling: Sampling) -> Callable[[Sequence[int], torch.Tensor], int]:
    """A function (ids so far, logits (1, vocabulary)) → the next id, by transformers' own rules in its own order."""
    from transformers.generation import logits_process as rules

    bend = rules.LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        bend.append(rules.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature > 0:
        if sampling.temperature != 1:
            bend.append(rules.TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            bend.append(rules.TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            bend.append(rules.TopPLogitsWarper(sampling.top_p))
        if sampling.min_p:
            bend.append(rules.MinPLogitsWarper(sampling.min_p))
    generator = torch.Generator().manual_seed(sampling.seed)

    def choose(ids: Sequence[int], logits: torch.Tensor) -> int:
        scores = bend(torch.tensor([ids]), logits)
        if sampling.temperature > 0:
            return int(torch.multinomial(scores.softmax(-1), 1, generator=generator))
        return int(scores.argmax())

    return choose


def open_llama(path: Path, where: str, *, adapter: Path | None = None) -> LlamaModel:
    """The model of the GGUF file at ``path``, with the LoRA of the file ``adapter``, in llama.cpp's memory.

    Raises:
        UsageError: there is no llama.cpp.
        ContentError: the file is damaged, or llama.cpp refuses it.
        MemoryExhausted: it does not fit.
    """
    header = read_gguf_vocabulary(path)
    check_gguf_data(header, path.stat().st_size, where)
    check_runnable(header, where)
    return LlamaModel(path, n_threads=torch.get_num_threads(), adapter=adapter)


def choose_renderer(model: LlamaModel, target: Target, offered: ChatRenderer | None = None) -> ChatRenderer:
    """The renderer of the tokenizer of ``target`` (a GGUF file), or ``offered`` if that cannot be rebuilt.

    Either must give the ids that llama.cpp gives.

    Raises:
        ContentError: neither does.
    """
    why = ""
    try:
        own = target.load_renderer()
        # transformers invents special tokens where it does not find those of the family
        if len(own.tokenizer) <= model.n_vocabulary and speaks_alike(model, own):
            return own
    except ContentError as error:
        why = f"{error.what} ({error.why})" if error.why else error.what
    if offered is not None and speaks_alike(model, offered):
        return offered
    raise ContentError(
        "the tokenizer of this GGUF file cannot be rebuilt" + (", and the one at hand is another" if offered else ""),
        where=target.name,
        why=why or "what transformers makes of it gives other ids than llama.cpp does",
        hint="name the model's own folder before it, whose tokenizer then serves both",
    )


def speaks_alike(model: LlamaModel, renderer: ChatRenderer) -> bool:
    """Whether the tokenizer of ``renderer`` is that of ``model``: the same ids for some texts, and as many.

    An embedding may have rows that no token uses, which are called ``[PAD…]``; and a tokenizer special tokens that a
    text model has no row for, such as that of an image.
    """
    tokenizer = renderer.tokenizer
    n_ids, special = len(tokenizer), set(tokenizer.all_special_ids)
    return (
        all(model.spell(i).startswith("[PAD") for i in range(n_ids, model.n_vocabulary))
        and all(i in special for i in range(model.n_vocabulary, n_ids))
        and not find_misread(model, tokenizer, list_probes(renderer))
    )
