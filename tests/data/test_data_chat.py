"""The loss mask against an independent way to it: what inference shows a model before and after each turn."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import find_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ftcli.data.chat import ChatRenderer, select_turns
from ftcli.data.message import Example, Message
from ftcli.errors import ContentError

FAMILIES = ["llama-3.1", "qwen3", "mistral-7b-v0.3", "phi-3", "gemma-3"]


@pytest.fixture(scope="module")
def real_renderer() -> Any:
    cache: dict[str, ChatRenderer] = {}

    def get(name: str) -> ChatRenderer:
        if name not in cache:
            from transformers import AutoTokenizer

            cache[name] = ChatRenderer(AutoTokenizer.from_pretrained(find_tokenizer(name)))
        return cache[name]

    return get


def chat(*contents: str, system: str | None = None) -> Example:
    messages = [Message("system", system)] if system else []
    messages += [Message("assistant" if i % 2 else "user", text) for i, text in enumerate(contents)]
    return Example(tuple(messages), None, None, "train.jsonl", 3)


def trained_texts(renderer: ChatRenderer, example: Example, train_on: Any = "assistant") -> list[str]:
    """The text of every trained run of tokens, over all documents of the example."""
    texts = []
    for document in renderer.render(example, train_on):
        run: list[int] = []
        for token, is_trained in [*zip(document.ids, document.mask, strict=True), (0, False)]:
            if is_trained:
                run.append(token)
            elif run:
                texts.append(renderer.tokenizer.decode(run))
                run = []
    return texts


def incremental_labels(
    renderer: ChatRenderer, example: Example, *, only_last: bool = False
) -> tuple[list[int], list[bool]]:
    """Ids and mask by another way: token ids of growing prefixes, each turn what comes after its prompt."""
    tokenizer = renderer.tokenizer
    messages = [m.to_template() for m in example.messages]
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    mask = [False] * len(ids)
    ends = set(renderer.end_of_turn_ids)
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or (only_last and i < len(messages) - 1):
            continue
        prompt = tokenizer.apply_chat_template(
            messages[:i], tokenize=True, add_generation_prompt=True, return_dict=False
        )
        assert ids[: len(prompt)] == prompt
        for position in range(len(prompt), len(ids)):
            mask[position] = True
            if ids[position] in ends:
                break
    return ids, mask


@pytest.mark.parametrize("family", ["llama-3.1", "mistral-7b-v0.3", "phi-3", "gemma-3"])
@pytest.mark.parametrize(
    "example",
    [
        chat("Hi", "Hello."),
        chat("Hi", "Hello.", "And?", "More\n\nlines, and an emoji 😀"),
        chat("Hi", "Hello.", "And?", "Bye", "So", "ok 👩‍👩‍👧", system="Be brief."),
        chat("1 + 1 = ", "2", "x\n", "```py\nprint('a')\n```"),
    ],
    ids=["one", "two", "system", "code"],
)
def test_mask_equals_incremental_rendering(real_renderer: Any, family: str, example: Example) -> None:
    renderer = real_renderer(family)
    documents = renderer.render(example)
    moves_system = family.startswith("mistral") and example.messages[0].role == "system"
    if not moves_system:
        assert [(d.ids, d.mask) for d in documents] == [incremental_labels(renderer, example)]
        return
    turns = [i for i, m in enumerate(example.messages) if m.role == "assistant"]
    assert len(documents) == len(turns) == 3  # this template puts the system message before the last question
    for document, i in zip(documents, turns, strict=True):
        part = Example(example.messages[: i + 1], None, None, "f", 1)
        assert (document.ids, document.mask) == incremental_labels(renderer, part, only_last=True)


def test_tiny_mask_equals_incremental_rendering(tiny_tokenizer: Any) -> None:
    renderer = ChatRenderer(tiny_tokenizer)
    example = chat("Hi", "Hello.", "And?", "", "fox", "emoji 😀", system="numbers")
    (document,) = renderer.render(example)
    assert (document.ids, document.mask) == incremental_labels(renderer, example)
    assert trained_texts(renderer, example) == ["Hello.<|im_end|>", "<|im_end|>", "emoji 😀<|im_end|>"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_trained_turn_ends_with_the_turns_end(real_renderer: Any, family: str) -> None:
    renderer = real_renderer(family)
    end = renderer.tokenizer.convert_ids_to_tokens(renderer.end_of_turn_ids[0])
    texts = trained_texts(renderer, chat("Hi", "Hello.", "And?", "Bye."))
    assert len(texts) == 2
    assert all(text.endswith(end) for text in texts)
    assert [text.count(end) for text in texts] == [1, 1]


def test_template_that_rewrites_history_is_split_per_turn(real_renderer: Any) -> None:
    renderer = real_renderer("qwen3")
    example = chat("Hi", "<think>\nhm\n</think>\n\nHello.", "And?", "<think>\nso\n</think>\n\nBye.")
    documents = renderer.render(example)
    assert len(documents) == 2
    assert trained_texts(renderer, example) == [
        "<think>\nhm\n</think>\n\nHello.<|im_end|>",
        "<think>\nso\n</think>\n\nBye.<|im_end|>",
    ]
    second = renderer.tokenizer.decode(documents[1].ids)
    assert "hm" not in second  # inference hides the earlier thoughts, so training does
    messages = [m.to_template() for m in example.messages]
    prompt = renderer.tokenizer.apply_chat_template(messages[:3], add_generation_prompt=True, return_dict=False)
    assert documents[1].ids[: len(prompt)] == prompt
    assert not any(documents[1].mask[: len(prompt)])


def test_think_block_of_the_prompt_is_context(real_renderer: Any) -> None:
    renderer = ChatRenderer(real_renderer("qwen3").tokenizer, {"enable_thinking": False})
    assert trained_texts(renderer, chat("Hi", "Hello.")) == ["Hello.<|im_end|>"]


@pytest.mark.parametrize("family", FAMILIES)
def test_no_double_bos(real_renderer: Any, family: str) -> None:
    renderer = real_renderer(family)
    (document,) = renderer.render(chat("Hi", "Hello."))
    bos = renderer.tokenizer.bos_token_id
    if bos is None or family == "phi-3":
        assert renderer.tokenizer.bos_token not in ("<|begin_of_text|>", "<bos>")
        return
    assert document.ids[0] == bos
    assert document.ids.count(bos) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_typed_special_tokens_stay_text(real_renderer: Any, family: str) -> None:
    renderer = real_renderer(family)
    tokenizer = renderer.tokenizer
    special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    typed = next(t for t in reversed(special) if t.startswith("<") and t.endswith(">"))
    end = tokenizer.convert_ids_to_tokens(renderer.end_of_turn_ids[0])
    plain = chat("say X", "it is X")
    spelled = chat(f"say {typed}{end}", f"it is {typed}{end}")
    (document,) = renderer.render(spelled)
    (reference,) = renderer.render(plain)
    ids = {t: tokenizer.convert_tokens_to_ids(t) for t in special}
    for text, token in ids.items():
        assert document.ids.count(token) == reference.ids.count(token), text
    assert f"{typed}{end}" in tokenizer.decode(document.ids).replace(" ", "")
    assert document.mask[-1] == reference.mask[-1]


def test_typed_special_token_in_a_prompt_stays_text(tiny_tokenizer: Any) -> None:
    renderer = ChatRenderer(tiny_tokenizer)
    ids = renderer.render_prompt([Message("user", "a<|im_end|>b")])
    assert ids.count(tiny_tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1
    assert "a<|im_end|>b<|im_end|>" in tiny_tokenizer.decode(ids)


def test_private_use_characters_alone_are_fine_and_beside_special_tokens_refused(tiny_tokenizer: Any) -> None:
    renderer = ChatRenderer(tiny_tokenizer)
    (document,) = renderer.render(chat("a \U000f0001", "b"))
    assert "\U000f0001" in tiny_tokenizer.decode(document.ids)
    with pytest.raises(ContentError, match="private-use"):
        renderer.render(chat("a \U000f0001 <|im_end|>", "b"))


def test_blank_at_the_start_of_an_answer_is_its_own_token(real_renderer: Any) -> None:
    """The prompt ends with newlines; the answer begins with one: together they would be one other token."""
    tokenizer = real_renderer("llama-3.1").tokenizer
    template = (
        "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] "
        "+ '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    )
    before, tokenizer.chat_template = tokenizer.chat_template, template
    try:
        renderer = ChatRenderer(tokenizer)
        (document,) = renderer.render(chat("Hi", "\n\nHello"))
        prompt = renderer.render_prompt([Message("user", "Hi")])
    finally:
        tokenizer.chat_template = before
    assert document.ids[: len(prompt)] == prompt
    assert document.mask.index(True) == len(prompt)
    trained = [i for i, is_trained in zip(document.ids, document.mask, strict=True) if is_trained]
    assert tokenizer.decode(trained) == "\n\nHello<|eot_id|>"


def test_train_on_and_message_flags(tiny_tokenizer: Any) -> None:
    renderer = ChatRenderer(tiny_tokenizer)
    example = chat("one", "two", "three", "four")
    assert trained_texts(renderer, example, "last_assistant") == ["four<|im_end|>"]
    assert trained_texts(renderer, example, ["user"]) == [
        "<|im_start|>user\none<|im_end|>",
        "<|im_start|>user\nthree<|im_end|>",
    ]
    (whole,) = renderer.render(example, "all")
    assert all(whole.mask)
    flagged = Example(
        (Message("user", "one"), Message("assistant", "two", train=False), Message("user", "three", train=True)),
        None, None, "f", 1,
    )  # fmt: skip
    assert select_turns(flagged.messages, "assistant") == [False, False, True]


def test_text_rows_are_trained_whole_with_one_end(tiny_tokenizer: Any) -> None:
    renderer = ChatRenderer(tiny_tokenizer)
    (document,) = renderer.render(Example((), "the fox <|im_end|>", None, "f", 1))
    end = tiny_tokenizer.eos_token_id
    assert document.ids.count(end) == 1
    assert document.ids[-1] == end
    assert all(document.mask)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "no chat template"),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "no end-of-turn token"),
        ("{{ raise_exception('turns must alternate') }}", "turns must alternate"),
        ("{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}"
         "{% if add_generation_prompt %}{{ 'other' }}{% endif %}", "does not continue its own generation prompt"),
        ("{{ messages[0]['nothing']['x'] }}", "refuses the messages"),
    ],
)  # fmt: skip
def test_unusable_templates_are_named(template: str | None, words: str) -> None:
    from conftest import build_tokenizer

    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ContentError, match=words) as caught:
        ChatRenderer(tokenizer).render(chat("Hi", "Hello."))
    assert caught.value.where == "train.jsonl:3"


def test_another_end_token_after_a_tool_call_is_trained(real_renderer: Any) -> None:
    tokenizer = real_renderer("llama-3.1").tokenizer
    template = (
        "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] }}"
        "{{ '<|eom_id|>' if m['content'].startswith('call') else '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    )
    before, tokenizer.chat_template = tokenizer.chat_template, template
    try:
        texts = trained_texts(ChatRenderer(tokenizer), chat("Hi", "call()", "3", "three"))
    finally:
        tokenizer.chat_template = before
    assert texts == ["call()<|eom_id|>", "three<|eot_id|>"]


contents = st.text(
    st.characters(codec="utf-8", exclude_characters="".join(map(chr, range(0xF0000, 0xF0003)))), max_size=30
) | st.sampled_from(["<|im_end|>", "\n\nx", "  ", "<|im_start|>assistant\n", "👩‍👩‍👧", "é", ""])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(contents, min_size=2, max_size=6))
def test_random_chats_train_exactly_their_answers(tiny_tokenizer: Any, texts: list[str]) -> None:
    renderer = ChatRenderer(tiny_tokenizer)
    example = chat(*texts[: len(texts) // 2 * 2])
    (document,) = renderer.render(example)
    assert trained_texts(renderer, example) == [
        f"{m.content}<|im_end|>" for m in example.messages if m.role == "assistant"
    ]
    start = tiny_tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert document.ids.count(start) == len(example.messages)
    for i, message in enumerate(example.messages):
        if message.role == "assistant":
            prompt = renderer.render_prompt(example.messages[:i])
            assert document.mask[len(prompt)]
            assert not document.mask[len(prompt) - 1]
