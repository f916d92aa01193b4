"""Loss, answers and scores against transformers' own forward and generate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_model

from ftcli.data.batch import build_batch
from ftcli.data.chat import ChatRenderer, Rendered
from ftcli.data.message import Example, Message
from ftcli.evaluate.generate import Sampling, generate_texts, score_examples
from ftcli.evaluate.loss import compute_loss_sum, compute_mean_loss
from ftcli.evaluate.score import score_exact_match, score_json


@pytest.mark.parametrize("kind", ["llama", "qwen3", "phi3", "gemma2", "gpt2"])
def test_loss_is_the_one_of_transformers(kind: str) -> None:
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if kind == "gpt2" else {}
    model = build_model(kind, **dropout)
    documents = [Rendered(list(range(10, 10 + n)), [i >= 3 for i in range(n)], "f", n) for n in (9, 14)]
    batch = build_batch(documents)
    ours = compute_loss_sum(model, batch).item()
    theirs = 0.0
    for document in documents:
        labels = [t if m else -100 for t, m in zip(document.ids, document.mask, strict=True)]
        output = model(input_ids=torch.tensor([document.ids]), labels=torch.tensor([labels]), use_cache=False)
        theirs += output.loss.item() * sum(document.mask)
    assert ours == pytest.approx(theirs, rel=1e-5)
    mean = compute_mean_loss(model, documents, device=torch.device("cpu"), batch_tokens=16)
    assert mean == pytest.approx(ours / batch.n_targets, rel=1e-5)
    assert model.training


def test_answers_side_by_side_are_those_alone(tiny_tokenizer: Any) -> None:
    model, renderer = build_model().eval(), ChatRenderer(tiny_tokenizer)
    prompts = [renderer.render_prompt([Message("user", text)]) for text in ("fox", "the quick brown fox jumps", "9")]
    sampling = Sampling(max_new_tokens=12)
    together = generate_texts(model, renderer, prompts, sampling)
    assert together == [generate_texts(model, renderer, [prompt], sampling)[0] for prompt in prompts]
    reference = model.generate(torch.tensor([prompts[1]]), max_new_tokens=12, do_sample=False, eos_token_id=2)
    ids = reference[0, len(prompts[1]) :].tolist()
    ids = ids[: ids.index(2)] if 2 in ids else ids
    assert together[1] == tiny_tokenizer.decode(ids, skip_special_tokens=True)


def test_sampling_follows_its_seed(tiny_tokenizer: Any) -> None:
    model, renderer = build_model().eval(), ChatRenderer(tiny_tokenizer)
    prompt = renderer.render_prompt([Message("user", "fox")])
    answers = [
        generate_texts(
            model, renderer, [prompt], Sampling(temperature=1.5, top_p=0.95, top_k=50, seed=seed, max_new_tokens=16)
        )[0]
        for seed in (1, 1, 2, 3)
    ]
    assert answers[0] == answers[1]
    assert len(set(answers)) > 1


def test_rows_without_an_answer_are_not_asked(tiny_tokenizer: Any) -> None:
    model, renderer = build_model(), ChatRenderer(tiny_tokenizer)
    asked = Example((Message("user", "x"), Message("assistant", "y")), None, None, "f", 1)
    unasked = Example((), "raw text", None, "f", 2)
    report = score_examples(model, renderer, [asked, unasked], metric="exact_match", max_new_tokens=2, batch_rows=4)
    assert [answer.question for answer in report.answers] == ["x"]
    assert model.training


def test_scores() -> None:
    assert score_exact_match(" a ", "a")
    assert not score_exact_match("A", "a")
    assert score_json('{"a": 1, "b": [2]}', '{"b":[2.0],"a":1}')
    assert not score_json('{"a": 1', '{"a": 1}')
    assert not score_json('{"a": 2}', '{"a": 1}')
    assert not score_json('{"a": true}', '{"a": 1}')
    assert not score_json("[" * 5000, "[]")


@pytest.mark.real
def test_the_embedded_model_answers(tmp_path: Path) -> None:
    from conftest import SMOLLM2

    from ftcli.evaluate.subject import open_subject

    model = open_subject(SMOLLM2)
    answer = model.answer([Message("user", "What is the capital of Japan?")], Sampling(max_new_tokens=20))
    assert "Tokyo" in answer
    assert model.renderer.tokenizer.convert_ids_to_tokens(model.renderer.tokenizer("in 2026").input_ids)[-4:] == list(
        "2026"
    )
    pieces: list[str] = []
    streamed = model.answer([Message("user", "Hi")], Sampling(max_new_tokens=12), on_text=pieces.append)
    assert "".join(pieces).strip() == streamed.strip()


def test_generation_settings_of_the_base_do_not_bend_greedy_answers(tiny_tokenizer: Any) -> None:
    model, renderer = build_model().eval(), ChatRenderer(tiny_tokenizer)
    prompt = renderer.render_prompt([Message("user", "fox")])
    plain = generate_texts(model, renderer, [prompt], Sampling(max_new_tokens=12))
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.no_repeat_ngram_size = 1
    assert generate_texts(model, renderer, [prompt], Sampling(max_new_tokens=12)) == plain
    assert model.generation_config.repetition_penalty == 5.0


def test_answers_beyond_the_context_are_refused_first(tiny_tokenizer: Any) -> None:
    from ftcli.errors import UsageError

    asked = Example((Message("user", "x"), Message("assistant", "y")), None, None, "f", 1)
    with pytest.raises(UsageError, match="do not fit the context of 512"):
        score_examples(
            build_model(), ChatRenderer(tiny_tokenizer), [asked], metric="json", max_new_tokens=600, batch_rows=1
        )
