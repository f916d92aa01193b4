"""Answers: the model's continuation of a rendered prompt, through transformers' own generate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ftcli.data.chat import ChatRenderer
from ftcli.data.message import Example
from ftcli.errors import Problem, UsageError
from ftcli.evaluate.score import build_score, check_reference


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen; ``temperature`` 0 takes the most probable one."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    max_new_tokens: int = 512


@dataclass(frozen=True)
class Answer:
    """One held-out row: what was asked, what was wanted, what came, and whether it is right."""

    question: str
    reference: str
    text: str
    is_right: bool


@dataclass(frozen=True)
class ScoreReport:
    """The share of right answers, from 0 to 1 (None if there was no question), and every answer.

    ``n_timed_out`` answers count as wrong because an expression took too long on them.
    """

    metric: str
    score: float | None
    answers: tuple[Answer, ...]
    n_timed_out: int = 0


@torch.no_grad()
def generate_texts(
    model: Any,
    renderer: ChatRenderer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    streamer: Any = None,
    check_stop: Callable[[], None] = lambda: None,
) -> list[str]:
    """The answers to ``prompts`` (ids), generated side by side, without special tokens.

    ``check_stop`` is called after each token and may raise to end the work. The model is left in the mode it was
    found in. Padding is on the left and masked by position, so it does not matter that a pad token may be an
    end-of-turn token.
    """
    tokenizer = renderer.tokenizer
    stops = list_stop_ids(renderer)
    width = max(len(prompt) for prompt in prompts)
    pad = stops[0]
    device = model.get_input_embeddings().weight.device
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    options: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        torch.manual_seed(sampling.seed)
        options = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p or None,
        }
    if sampling.repetition_penalty != 1:
        options["repetition_penalty"] = sampling.repetition_penalty
    with _configured(model):
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=stops,
            pad_token_id=pad,
            use_cache=True,
            streamer=streamer,
            stopping_criteria=[_poll(check_stop, device)],
            **options,
        )
    return [decode_answer(tokenizer, row[width:].tolist(), stops) for row in output]


def build_streamer(tokenizer: Any, on_text: Callable[[str], None]) -> Any:
    """A transformers streamer that hands each piece of text to ``on_text`` as soon as its characters are whole.

    A token is decoded with the piece before it: alone it would lose the blank that some tokenizers write before a
    text's first word.
    """
    from transformers.generation.streamers import BaseStreamer

    class Streamer(BaseStreamer):  # type: ignore[misc]
        def __init__(self) -> None:
            self.is_prompt = True
            self.shown: list[int] = []  # the piece before
            self.waiting: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            if self.is_prompt:
                self.is_prompt = False
                return
            self.waiting += value.tolist()
            self._show(is_last=False)

        def end(self) -> None:
            self._show(is_last=True)

        def _show(self, *, is_last: bool) -> None:
            before, text = self._decode(self.shown), self._decode(self.shown + self.waiting)
            if text.endswith("\ufffd") and not is_last:  # a character whose other bytes are still to come
                return
            if len(text) > len(before):
                on_text(text[len(before) :])
                self.shown, self.waiting = self.waiting, []

        def _decode(self, ids: list[int]) -> str:
            return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    return Streamer()


def _poll(check_stop: Callable[[], None], device: torch.device) -> Callable[..., torch.Tensor]:
    """A stopping criterion of transformers that stops nothing, but calls ``check_stop``."""

    def criterion(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        check_stop()
        return torch.zeros(len(ids), dtype=torch.bool, device=device)

    return criterion


@contextmanager
def _configured(model: Any) -> Iterator[None]:
    """A block in which ``model`` is in evaluation mode and brings no generation settings of its own.

    Many models come with a repetition penalty, which would bend greedy answers and their scores.
    """
    from transformers import GenerationConfig

    holders = [model, model.get_base_model()] if hasattr(model, "get_base_model") else [model]
    before = [holder.generation_config for holder in holders]
    was_training = model.training
    model.eval()
    try:
        for holder in holders:
            holder.generation_config = GenerationConfig()
        yield
    finally:
        for holder, config in zip(holders, before, strict=True):
            holder.generation_config = config
        model.train(was_training)


def list_stop_ids(renderer: ChatRenderer) -> list[int]:
    """The ids that end an answer: those that end a turn, and the end of a text."""
    stops, eos = renderer.end_of_turn_ids, renderer.tokenizer.eos_token_id
    return stops if eos is None or eos in stops else [*stops, eos]


def decode_answer(tokenizer: Any, ids: list[int], stops: Sequence[int]) -> str:
    """The text of ``ids`` up to the first of ``stops``, without special tokens."""
    end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    return str(tokenizer.decode(ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False))


def score_examples(
    model: Any,
    renderer: ChatRenderer,
    examples: Sequence[Example],
    *,
    metric: str,
    pattern: str | None = None,
    max_new_tokens: int,
    batch_rows: int,
    check_stop: Callable[[], None] = lambda: None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> ScoreReport:
    """How many of ``examples`` the model answers as their last assistant turn does, greedily decoded.

    Rows that do not end with an assistant's text are left out.
    """
    asked = [example for example in examples if has_reference(example)]
    prompts = list_prompts(renderer, asked)
    check_context(find_context(model.config), prompts, max_new_tokens)
    sampling = Sampling(max_new_tokens=max_new_tokens)
    texts = answer_prompts(
        lambda group: generate_texts(model, renderer, group, sampling, check_stop=check_stop),
        prompts,
        batch_rows=batch_rows,
        on_progress=on_progress,
    )
    return judge_answers(asked, texts, metric, pattern, check_stop=check_stop)


def list_prompts(renderer: ChatRenderer, asked: Sequence[Example]) -> list[list[int]]:
    """The ids that a model is given to answer each row as its last turn does."""
    return [renderer.render_prompt(example.messages[:-1], example.tools) for example in asked]


def answer_prompts(
    generate: Callable[[list[list[int]]], list[str]],
    prompts: Sequence[list[int]],
    *,
    batch_rows: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """What ``generate`` answers to each of ``prompts``, asked ``batch_rows`` at a time."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # alike lengths waste the least padding
    texts: dict[int, str] = {}
    for start in range(0, len(order), batch_rows):
        group = order[start : start + batch_rows]
        texts.update(zip(group, generate([prompts[i] for i in group]), strict=True))
        on_progress(len(texts), len(order))
    return [texts[i] for i in range(len(order))]


def judge_answers(
    asked: Sequence[Example],
    texts: Sequence[str],
    metric: str,
    pattern: str | None = None,
    *,
    check_stop: Callable[[], None] = lambda: None,
) -> ScoreReport:
    """Which of ``texts`` are right, held against the rows that were ``asked``."""
    is_right = build_score(metric, pattern)
    rows, n_timed_out = [], 0
    for example, text in zip(asked, texts, strict=True):
        check_stop()
        question = next((m.content or "" for m in reversed(example.messages[:-1]) if m.role == "user"), "")
        reference = example.messages[-1].content or ""
        try:
            rows.append(Answer(question, reference, text, is_right(text, reference)))
        except TimeoutError:
            n_timed_out += 1
            rows.append(Answer(question, reference, text, is_right=False))
    n_right = sum(row.is_right for row in rows)
    return ScoreReport(metric, n_right / len(rows) if rows else None, tuple(rows), n_timed_out)


def has_reference(example: Example) -> bool:
    """Whether a row ends with an assistant's text, against which an answer can be held."""
    return bool(example.messages and example.messages[-1].role == "assistant" and example.messages[-1].content)


def find_unfit(asked: Sequence[Example], metric: str, pattern: str | None = None) -> list[Problem]:
    """What is wrong with each row, of those that have an answer, against which none could be held."""
    found = ((e, check_reference(e.messages[-1].content or "", metric, pattern)) for e in asked)
    return [Problem(what, example.place) for example, what in found if what]


def find_context(config: Any) -> int | None:
    """The most tokens that a model of this config can look at, None where it does not say."""
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(found) if found else None


def check_context(
    context: int | None, prompts: Sequence[Sequence[int]], max_new_tokens: int, *, where: str = "eval.max_new_tokens"
) -> None:
    """None if the longest of ``prompts`` (ids) and its answer fit ``context``.

    Raises:
        UsageError: they do not; ``where`` names what sets the answer's length.
    """
    longest = max(map(len, prompts), default=0)
    if context and prompts and longest + max_new_tokens > context:
        raise UsageError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones do not fit the context of {context}",
            where=where,
            hint=f"set it to at most {max(1, context - longest)}, or leave the longest rows out",
        )
