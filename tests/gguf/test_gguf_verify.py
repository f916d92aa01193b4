"""What is found wrong with a GGUF file whose weights are right: its vocabulary, its end of a turn, its beginning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import build_model, build_tokenizer, save_model

from ftcli.data.chat import ChatRenderer, Rendered
from ftcli.data.template import ChatTemplate
from ftcli.errors import ContentError, MemoryExhausted, UsageError
from ftcli.events import Event, Notice
from ftcli.gguf.convert import convert
from ftcli.gguf.draft import Draft, draft_model
from ftcli.gguf.kind import find_limit
from ftcli.gguf.reader import VocabularyReader
from ftcli.gguf.verify import Expected, Verification, verify_file
from ftcli.gguf.vocabulary import Training
from ftcli.merge.stream import open_folder
from ftcli.store.gguf_header import read_gguf_header

Change = Callable[[dict[str, Any]], None]


@pytest.fixture(params=["llama.cpp", "own reader"])
def judge(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function (change of the keys) → what verification finds, with llama.cpp and without."""

    def refuse() -> Any:
        raise UsageError("there is no llama.cpp")

    if request.param == "own reader":
        for module in ("ftcli.gguf.verify", "ftcli.evaluate.subject"):
            monkeypatch.setattr(f"{module}.load_library", refuse)
    tokenizer = build_tokenizer()
    folder = save_model(tmp_path / "model", build_model(vocab_size=len(tokenizer)), tokenizer)
    draft = draft_model(open_folder(folder))

    def find(change: Change = lambda keys: None, **expected: Any) -> Verification:
        keys = {key: list(value) if isinstance(value, list) else value for key, value in draft.keys.items()}
        change(keys)
        path = convert(replace(draft, keys=keys), tmp_path / "a.gguf", kind="f32").path
        options: dict[str, Any] = {"tokenizer": tokenizer, "renderer": ChatRenderer(tokenizer), **expected}
        told: list[Event] = options.pop("told", [])
        return verify_file(path, "f32", draft.plan("f32"), Expected(**options), told.append)

    return find


def test_a_vocabulary_that_is_the_tokenizers_passes(judge: Any) -> None:
    found = judge()
    assert (found.has_passed, found.n_texts, found.n_misread) == (True, 3, 0)
    ids = ChatRenderer(build_tokenizer()).tokenizer("a row of words").input_ids
    documents = [Rendered(ids, [True] * len(ids), "f", i) for i in range(5)]
    assert judge(documents=documents).n_texts == 8


def test_tokens_that_changed_places_are_found(judge: Any) -> None:
    def swap(keys: dict[str, Any]) -> None:
        tokens = keys["tokenizer.ggml.tokens"]
        first, second = tokens.index("e"), tokens.index("o")
        tokens[first], tokens[second] = tokens[second], tokens[first]

    assert not judge(swap).has_passed


def test_a_merge_that_is_missing_is_found(judge: Any) -> None:
    def lose(keys: dict[str, Any]) -> None:
        del keys["tokenizer.ggml.merges"][1:]

    found = judge(lose)
    assert "would read texts otherwise" in found.problem


def test_an_end_of_turn_that_no_runtime_knows_is_found(judge: Any) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<over>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<over>"]})
    found = judge(renderer=ChatRenderer(tokenizer))
    assert found.problem == "llama.cpp would not end an answer at <over>"


def test_a_beginning_that_was_not_trained_is_found(judge: Any) -> None:
    tokenizer = build_tokenizer()
    tokenizer.bos_token = "<|endoftext|>"  # which ChatML does not write

    def begin(keys: dict[str, Any]) -> None:
        keys["tokenizer.ggml.add_bos_token"] = True

    assert judge(begin, is_trained=False, tokenizer=tokenizer).has_passed
    assert "it was trained without" in judge(begin, is_trained=True, tokenizer=tokenizer).problem
    tokenizer.chat_template = "{{ bos_token }}{{ bos_token }}" + tokenizer.chat_template
    assert "twice" in judge(renderer=ChatRenderer(tokenizer), tokenizer=tokenizer).problem


def test_a_few_rows_that_are_read_otherwise_are_told_and_many_fail(judge: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ftcli.gguf.verify.list_probes", lambda renderer: [])
    tokenizer, told = build_tokenizer(), list[Event]()
    good, bad = (tokenizer(text).input_ids for text in ("a b c", "e e e"))
    documents = [Rendered(good, [True] * len(good), "f", i) for i in range(200)]

    def lose(keys: dict[str, Any]) -> None:
        tokens = keys["tokenizer.ggml.tokens"]
        tokens[tokens.index("e")] = "gone"

    documents[7] = Rendered(bad, [True] * len(bad), "f", 7)
    assert judge(documents=documents).n_misread == 0
    found = judge(lose, documents=documents, told=told)
    assert (found.has_passed, found.n_misread) == (True, 1)
    assert any(isinstance(event, Notice) and "1 of 200 rows are read otherwise" in event.text for event in told)
    found = judge(lose, documents=[documents[7]] * 3)
    assert "3 of 3 rows are read otherwise" in found.problem


def test_a_chat_that_was_trained_without_bos_gets_none(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = build_tokenizer()
    tokenizer.bos_token = bos = "<|endoftext|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    source = open_folder(save_model(tmp_path / "model", build_model(vocab_size=len(tokenizer)), tokenizer))

    def adds(draft: Draft) -> Any:
        return draft.keys["tokenizer.ggml.add_bos_token"]

    assert adds(draft_model(source)) is True  # as llama.cpp's converter writes it
    assert adds(draft_model(source, training=Training())) is False


def test_the_template_in_the_file_knows_what_it_was_told_in_training(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "\n{{ mark }}{{ marks[0] is none }}" + tokenizer.chat_template
    told = {"mark": '😀 "{{ x }}" \\', "marks": [None, {"a": 1.5}], "is_on": False}
    folder = save_model(tmp_path / "model", build_model(vocab_size=len(tokenizer)), tokenizer)
    draft = draft_model(open_folder(folder), training=Training(template_kwargs=told))
    turns = [{"role": "user", "content": "a"}]
    expected = ChatRenderer(tokenizer, told).template.render(turns, None, prompt=True)
    assert expected.startswith('\n😀 "{{ x }}" \\True')
    assert ChatTemplate(str(draft.keys["tokenizer.chat_template"])).render(turns, None, prompt=True) == expected
    path = convert(draft, tmp_path / "a.gguf", kind="f16").path
    options: dict[str, Any] = {"tokenizer": tokenizer, "is_trained": True}
    for variables, problem in ((told, ""), ({**told, "mark": "b"}, "otherwise than in training")):
        expectation = Expected(renderer=ChatRenderer(tokenizer, variables), **options)
        assert problem in verify_file(path, "f16", draft.plan("f16"), expectation, lambda event: None).problem


@pytest.mark.parametrize("error", [MemoryError(), MemoryExhausted("no room")])
def test_memory_that_runs_out_in_a_comparison_is_told(judge: Any, monkeypatch: pytest.MonkeyPatch, error: Any) -> None:
    def fail(*words: Any, **options: Any) -> Any:
        raise error

    monkeypatch.setattr("ftcli.gguf.verify.compare", fail)
    monkeypatch.setattr("ftcli.gguf.verify.open_subject", fail)
    told: list[Event] = []
    found = judge(recording=object(), told=told)
    assert (found.has_passed, found.verdict, found.n_texts) == (True, None, 3)
    assert any(isinstance(event, Notice) and "is not compared" in event.text for event in told)


def test_what_is_no_vocabulary_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    draft = draft_model(open_folder(tiny_model))
    path = convert(replace(draft, keys={**draft.keys, "tokenizer.ggml.model": "t5"}), tmp_path / "a", kind="f16").path
    with pytest.raises(ContentError, match="kind t5 is not read"):
        VocabularyReader(path)
    assert read_gguf_header(path).metadata["tokenizer.ggml.model"] == "t5"


def test_bounds_follow_the_type_and_how_far_training_moved_the_model() -> None:
    assert [find_limit(kind) for kind in ("f16", "q8_0", "q4_k_m", "q2_k")] == [0.02, 0.03, 0.3, 3.0]
    assert [find_limit("bf16", moved) for moved in (0.0, 0.04, 0.06, 1.0)] == [0.005, 0.01, 0.015, 0.02]
    assert [find_limit("q8_0", moved) for moved in (0.0, 0.08, 1.0)] == [0.01, 0.02, 0.03]
    assert find_limit("q4_k_m", 0.01) == 0.3
    assert find_limit("f16", 1.0, is_4bit=True) == pytest.approx(0.07)
