"""Three ways from marked text to ids: each alone gives the same, and a fast one that is wrong is found out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from conftest import build_tokenizer, find_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ftcli.data import encoder as encoder_module
from ftcli.data.byte_level import ByteLevelEncoder
from ftcli.data.chat import ChatRenderer
from ftcli.data.documents import RowTable, build_table
from ftcli.data.encoder import Encoded, MarkedText, TextEncoder
from ftcli.data.message import Example, Message
from ftcli.errors import ContentError

FAMILIES = ["tiny", "llama-3.1", "qwen3", "mistral-7b-v0.3", "phi-3", "gemma-3"]
BYTE_LEVEL = ["tiny", "llama-3.1", "qwen3"]
MUCH = 1 << 40

_tokenizers: dict[str, Any] = {}


def get_tokenizer(name: str) -> Any:
    if name not in _tokenizers:
        from transformers import AutoTokenizer

        tiny = name == "tiny"
        _tokenizers[name] = build_tokenizer() if tiny else AutoTokenizer.from_pretrained(find_tokenizer(name))
    return _tokenizers[name]


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fast ways are not held against the sure one, so that what they give is seen as it is."""
    monkeypatch.setattr(encoder_module, "_ALWAYS", 0)
    monkeypatch.setattr(encoder_module, "_SAMPLED", MUCH)


def chat(*contents: str) -> Example:
    messages = [Message("assistant" if i % 2 else "user", text) for i, text in enumerate(contents)]
    return Example(tuple(messages), None, None, "train.jsonl", 1)


CHATS = [
    chat("Hi", "Hello."),
    chat("1 + 1 = ", "2", "x\n", "```py\nprint('a')\n```\n"),
    chat("é ü 漢字", "“quotes” – 😀 👩‍👩‍👧", "And?", "I'm  done...   12345\t\n\n"),
    chat("\x1c a\x1f", "e\u0301 and \u212b", "\u200b", "\U0001d15e\u3000x"),
    chat("Hi", "\n\nHello", "So", "  two blanks", "x", "\tfox"),
    chat("a", "b", "c", "d", "e", "f", "g", "h"),
]


def mark(name: str, examples: Sequence[Example]) -> list[MarkedText]:
    renderer = ChatRenderer(get_tokenizer(name))
    return [text for example in examples for text in renderer.mark(example)]


def encode_sure(name: str, texts: Sequence[MarkedText]) -> list[Encoded]:
    encoder = TextEncoder(get_tokenizer(name))
    return [encoder.encode_one(text) for text in texts]


def build_fast(tokenizer: Any) -> TextEncoder:
    encoder = TextEncoder(tokenizer)
    encoder.expect(MUCH)
    return encoder


def count_sure(encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch) -> list[MarkedText]:
    """The texts that from now on go the sure way."""
    seen: list[MarkedText] = []
    right = encoder.encode_one

    def encode_one(text: MarkedText) -> Encoded:
        seen.append(text)
        return right(text)

    monkeypatch.setattr(encoder, "encode_one", encode_one)
    return seen


# --- the ways agree


@pytest.mark.parametrize("name", FAMILIES)
def test_the_sure_way_gives_the_ids_of_transformers(name: str) -> None:
    tokenizer, examples = get_tokenizer(name), [chat("Hi", "Hello."), chat("é 漢字  x", "I'm 12345 😀\n\n")]
    for example, (ids, _) in zip(examples, encode_sure(name, mark(name, examples)), strict=True):
        messages = [message.to_template() for message in example.messages]
        assert ids == tokenizer.apply_chat_template(messages, return_dict=False)


@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_byte_level_gives_the_ids_and_masks_of_the_sure_way(name: str, unchecked: None) -> None:
    texts = mark(name, CHATS)
    encoder = build_fast(get_tokenizer(name))
    assert encoder.encode(texts) == encode_sure(name, texts)
    assert encoder.notices == []


@pytest.mark.parametrize("name", FAMILIES)
def test_by_ids_gives_the_ids_and_masks_of_the_sure_way(name: str, unchecked: None) -> None:
    texts = mark(name, CHATS)  # Phi-3's own tokens eat the blanks behind them, also those that an answer begins with
    encoder = TextEncoder(get_tokenizer(name))
    assert encoder.encode(texts) == encode_sure(name, texts)
    assert encoder.notices == []


@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_usual_chats_go_the_byte_level_way(name: str, unchecked: None, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = build_fast(get_tokenizer(name))
    sure = count_sure(encoder, monkeypatch)
    encoder.encode(mark(name, CHATS[:3]))
    assert sure == []


@pytest.mark.parametrize("name", FAMILIES)
def test_usual_chats_go_the_way_by_ids(name: str, unchecked: None, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = TextEncoder(get_tokenizer(name))
    sure = count_sure(encoder, monkeypatch)
    encoder.encode(mark(name, CHATS[:1] * 2))
    assert sure == []


contents = st.lists(
    st.sampled_from(["<|im_end|>", "<|im_start|>", "\n\n", "\n", "  ", "I'm", "123", "é", "e\u0301", "😀", "\x1c"])
    | st.text(st.characters(codec="utf-8", exclude_categories=["Co", "Cs"]), max_size=6),
    max_size=4,
).map("".join)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(contents, min_size=2, max_size=6))
def test_random_chats_are_encoded_alike_by_all_ways(tiny_tokenizer: Any, rows: list[str]) -> None:
    texts = mark("tiny", [chat(*rows[: len(rows) // 2 * 2]), chat("a", "b")])
    sure = encode_sure("tiny", texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder_module, "_ALWAYS", 0)
        patch.setattr(encoder_module, "_SAMPLED", MUCH)
        assert build_fast(tiny_tokenizer).encode(texts) == sure
        assert TextEncoder(tiny_tokenizer).encode(texts) == sure


def test_the_byte_level_way_is_set_up_only_if_it_pays(tiny_tokenizer: Any) -> None:
    encoder = TextEncoder(tiny_tokenizer)
    encoder.expect(1000)
    assert encoder._byte_level is None
    encoder.expect(MUCH)
    assert encoder._byte_level is not None


# --- spans


@pytest.mark.parametrize("prepare", [TextEncoder, build_fast], ids=["ids", "byte level"])
def test_no_token_reaches_over_the_start_of_a_span(
    tiny_tokenizer: Any, unchecked: None, prepare: Callable[[Any], TextEncoder]
) -> None:
    """The tokenizer knows " fox" and "fox" as words: a start inside one cuts it."""
    text = "<|im_start|>the quick brown fox<|im_end|>"
    start = text.index("own")
    first, second = (
        tiny_tokenizer.backend_tokenizer.encode(part, add_special_tokens=False).ids
        for part in (text[:start], text[start:])
    )
    whole = tiny_tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    assert whole != first + second  # the tokenizer would join both sides
    expected = (first + second, [False] * len(first) + [True] * len(second))
    marked = MarkedText(text, [(start, len(text))])
    assert prepare(tiny_tokenizer).encode([marked, marked]) == [expected, expected]


@pytest.mark.parametrize("prepare", [TextEncoder, build_fast], ids=["ids", "byte level"])
def test_newlines_on_both_sides_of_a_start_stay_apart(unchecked: None, prepare: Callable[[Any], TextEncoder]) -> None:
    tokenizer = get_tokenizer("llama-3.1")
    prompt = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    text = f"{prompt}\n\nHello<|eot_id|>"
    marked = MarkedText(text, [(len(prompt), len(text))])
    for ids, mask in prepare(tokenizer).encode([marked, marked]):  # type: ignore[misc]
        n_prompt = len(tokenizer(prompt, add_special_tokens=False).input_ids)
        assert ids[:n_prompt] == tokenizer(prompt, add_special_tokens=False).input_ids
        assert mask == [False] * n_prompt + [True] * (len(ids) - n_prompt)
        assert tokenizer.decode(ids[n_prompt:]) == "\n\nHello<|eot_id|>"


@pytest.mark.parametrize("prepare", [TextEncoder, build_fast], ids=["ids", "byte level"])
def test_a_span_without_a_token_is_an_error(
    tiny_tokenizer: Any, unchecked: None, prepare: Callable[[Any], TextEncoder]
) -> None:
    marked = MarkedText("<|im_start|>the quick", [(12, 12)])
    for found in prepare(tiny_tokenizer).encode([marked, marked]):
        assert isinstance(found, ContentError)
        assert found.what == "the end of a trained turn has no token of its own"


def test_an_error_of_one_text_leaves_the_others(tiny_tokenizer: Any) -> None:
    good = MarkedText("<|im_start|>a<|im_end|>", [(12, 23)])
    bad = MarkedText("<|im_start|>the quick", [(12, 12)])
    first, second, third = TextEncoder(tiny_tokenizer).encode([good, bad, good])
    assert isinstance(second, ContentError)
    ids = tiny_tokenizer.backend_tokenizer.encode(good.text, add_special_tokens=False).ids
    assert first == third == (ids, [False, True, True])


# --- the self-check


def damage(monkeypatch: pytest.MonkeyPatch, is_wrong: Callable[[str], bool]) -> None:
    """The byte-level way repeats the last id of some texts."""
    right = ByteLevelEncoder.encode

    def encode(self: ByteLevelEncoder, text: str) -> bytes:
        ids = right(self, text)
        return ids + ids[-4:] if is_wrong(text) else ids

    monkeypatch.setattr(ByteLevelEncoder, "encode", encode)


def test_a_byte_level_way_that_is_wrong_is_a_notice_and_not_taken(
    tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = mark("tiny", [chat("zebra", str(number)) for number in range(40)])
    encoder = build_fast(tiny_tokenizer)
    damage(monkeypatch, lambda text: "zebra" in text)
    assert encoder.encode(texts) == encode_sure("tiny", texts)
    (notice,) = encoder.notices
    assert notice.startswith("the byte-level encoder disagrees with the tokenizer")


def test_a_byte_level_way_that_becomes_wrong_later_is_found_by_samples(
    tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [chat("fox", str(number)) for number in range(100)] + [chat("zebra", str(n)) for n in range(300)]
    texts = mark("tiny", rows)
    encoder = build_fast(tiny_tokenizer)
    damage(monkeypatch, lambda text: "zebra" in text)
    assert encoder.encode(texts) == encode_sure("tiny", texts)
    assert len(encoder.notices) == 1


def damage_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    right = TextEncoder._find_mask

    def find_mask(self: TextEncoder, marked: MarkedText, *others: Any) -> Encoded | None:
        found = right(self, marked, *others)
        return (found[0], [not flag for flag in found[1]]) if found and "zebra" in marked.text else found

    monkeypatch.setattr(TextEncoder, "_find_mask", find_mask)


def test_a_way_by_ids_that_is_wrong_is_a_notice_and_not_taken(
    tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = mark("tiny", [chat("zebra", str(number)) for number in range(40)])
    damage_masks(monkeypatch)
    encoder = TextEncoder(tiny_tokenizer)
    assert encoder.encode(texts) == encode_sure("tiny", texts)
    (notice,) = encoder.notices
    assert notice.startswith("finding spans by their ids disagrees with the tokenizer")


def test_a_table_is_right_although_a_fast_way_was_wrong_from_some_row_on(
    tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows before the sample that showed it are made again."""
    monkeypatch.setattr("ftcli.data.documents._BATCH_ROWS", 64)
    examples = [chat("fox" if i < 30 else "zebra", str(i)) for i in range(400)]
    damage_masks(monkeypatch)
    renderer = ChatRenderer(tiny_tokenizer)
    table = build_table(examples, renderer, "assistant")
    assert len(renderer.encoder.notices) == 1
    ids: list[int] = []
    trained: list[int] = []
    for example in examples:
        messages = [message.to_template() for message in example.messages]
        ids += tiny_tokenizer.apply_chat_template(messages, return_dict=False)
        end = f"{example.messages[1].content}<|im_end|>"
        trained += tiny_tokenizer.backend_tokenizer.encode(end, add_special_tokens=False).ids
    assert table.ids.tolist() == ids
    assert table.ids[table.mask > 0].tolist() == trained


def test_ways_that_agree_give_no_notice(tiny_tokenizer: Any) -> None:
    renderer = ChatRenderer(tiny_tokenizer)
    build_table([chat("fox é", str(i)) for i in range(600)], renderer, "assistant")
    assert renderer.encoder.notices == []


# --- counting


@pytest.mark.parametrize("prepare", [TextEncoder, build_fast], ids=["tokenizer", "byte level"])
@pytest.mark.parametrize("name", ["tiny", "llama-3.1", "qwen3"])
def test_tokens_are_counted_without_bos_or_eos(name: str, prepare: Callable[[Any], TextEncoder]) -> None:
    tokenizer = get_tokenizer(name)
    texts = ["", "the quick brown fox", "é 漢字 😀 12345", "e\u0301 \u212b", "a\x1cb <|im_end|>", "\n\n  x"]
    expected = sum(len(tokenizer(text, add_special_tokens=False).input_ids) for text in texts)
    assert prepare(tokenizer).count_tokens(texts) == expected


def test_no_texts_have_no_tokens(tiny_tokenizer: Any) -> None:
    assert TextEncoder(tiny_tokenizer).count_tokens([]) == 0
    assert build_fast(tiny_tokenizer).count_tokens([]) == 0


def test_a_fast_way_that_was_wrong_is_never_set_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ByteLevelEncoder.encode

    def encode(self: ByteLevelEncoder, text: str) -> bytes:
        ids = right(self, text)
        return ids + (ids[-4:] if "zebra" in text else b"")

    def build() -> RowTable:
        rows = [
            Example((Message("user", f"zebra {i}"), Message("assistant", "b")), None, None, "f", i) for i in range(600)
        ]
        return build_table(rows, ChatRenderer(build_tokenizer()), "assistant")

    expected = build()
    monkeypatch.setattr("ftcli.data.encoder._WORTH_IT", 1)
    monkeypatch.setattr(ByteLevelEncoder, "encode", encode)
    assert build().ids.tolist() == expected.ids.tolist()
