"""The word-by-word encoder against the tokenizers that it stands for: the same ids, for whatever it says it knows."""

from __future__ import annotations

import json
import unicodedata
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import build_tokenizer, find_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers

from ftcli.data import byte_level
from ftcli.data.byte_level import ByteLevelEncoder, list_byte_characters
from ftcli.data.encoder import match_any

BUILT = ["llama-3.1", "qwen3"]
N_TEXTS = 60  # of each file

_tokenizers: dict[str, Any] = {}


def get_tokenizer(name: str) -> Any:
    """A real tokenizer, or for "tiny" the one that is made in-process."""
    if name not in _tokenizers:
        _tokenizers[name] = build_tokenizer() if name == "tiny" else read_tokenizer(find_tokenizer(name))
    return _tokenizers[name]


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer without its template and special tokens, which are not needed here and take time."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))


def build(tokenizer: Any) -> ByteLevelEncoder | None:
    return ByteLevelEncoder.build(tokenizer, match_any(t.content for t in tokenizer.added_tokens_decoder.values()))


def get_encoder(name: str) -> ByteLevelEncoder:
    encoder = build(get_tokenizer(name))
    assert encoder is not None
    return encoder


def list_ids(encoder: ByteLevelEncoder, text: str) -> list[int]:
    ids = array("i")
    ids.frombytes(encoder.encode(text))
    return ids.tolist()


def expect_ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids  # type: ignore[no-any-return]


# --- which tokenizers


@pytest.mark.parametrize("name", [*BUILT, "tiny"])
def test_byte_level_tokenizers_have_an_encoder(name: str) -> None:
    assert build(get_tokenizer(name)) is not None


@pytest.mark.parametrize("name", ["mistral-7b-v0.3", "phi-3", "gemma-3"])
def test_other_tokenizers_have_none(name: str) -> None:
    assert build(get_tokenizer(name)) is None


def set_prefix_space(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def set_lower_case(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()


def set_other_normal_form(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()


def set_dropout(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.model.dropout = 0.5


def set_whole_digits(tokenizer: Any) -> None:
    steps = [pre_tokenizers.Digits(individual_digits=False), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)


def set_lossy_pattern(tokenizer: Any) -> None:
    """Letters are words of their own, and so is what lies between them."""
    steps = [
        pre_tokenizers.Split(Regex(r"\p{L}+"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)


def set_no_split(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def add_stripping_token(tokenizer: Any) -> None:
    tokenizer.add_tokens([AddedToken("<strip>", lstrip=True, normalized=False)])


def add_word_token(tokenizer: Any) -> None:
    tokenizer.add_tokens([AddedToken("word", single_word=True, normalized=False)])


@pytest.mark.parametrize(
    "change",
    [
        set_prefix_space,
        set_lower_case,
        set_other_normal_form,
        set_dropout,
        set_whole_digits,
        set_lossy_pattern,
        set_no_split,
        add_stripping_token,
        add_word_token,
    ],
)
def test_what_is_not_split_as_expected_has_no_encoder(change: Any) -> None:
    tokenizer = build_tokenizer()
    change(tokenizer)
    assert build(tokenizer) is None


# --- the same ids


pieces = st.one_of(
    st.sampled_from(["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|eot_id|>", "<think>", "</tool_call>", "<|im"]),
    st.sampled_from(["I'm", "'S", "DON'T", "'ll ", "’re", "'", "''s", "we'Ve", "'ſ", "'K"]),
    st.text(st.sampled_from(" \t\n\r\x0b\x0c\xa0\u3000\u2028\x85"), min_size=1, max_size=6),
    st.text(st.sampled_from("0123456789٣²½Ⅷ𝟘"), min_size=1, max_size=7),
    st.sampled_from(["def f(x):\n    return x[1]  # é\n", "{}", "==--__", "a_b.c", "\\n", "/* */", "</div>\r\n"]),
    st.text(st.sampled_from("\x00\x1b\x1c\x1d\x1e\x1f\x7f\x9f\u200b\u200d\ufeff"), min_size=1, max_size=3),
    st.text(st.sampled_from("eo\u0301\u0308\u0327\u0345\u20dd"), min_size=1, max_size=5),
    st.sampled_from(["漢字", "日本語。", "한국어", "각", "カ\u3099", "ไทย", "हिन्दी", "العربية"]),
    st.sampled_from(["😀", "👩‍👩‍👧", "🇩🇪", "👍🏽", "𝒜𝓑", "𐐷", "𠀋", "\U0001d15e", "\U000e0041", "\U0010fffd"]),
    st.sampled_from(["Å", "Ω", "豈", "क़", "ffi", "\u0340", "A\u030a", "\u0344"]),  # what NFC changes, among others
    st.text(st.characters(codec="utf-8"), max_size=4),
    st.sampled_from(["the quick", " brown", "Fox", "answer", "x"]),
)
texts = st.lists(pieces, max_size=10).map("".join)


@pytest.mark.parametrize("name", [*BUILT, "tiny"])
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=texts)
def test_ids_are_those_of_the_tokenizer_for_every_text_that_is_known(name: str, text: str) -> None:
    tokenizer, encoder = get_tokenizer(name), _encoder(name)
    if encoder.knows(text):
        assert list_ids(encoder, text) == expect_ids(tokenizer, text)


_encoders: dict[str, ByteLevelEncoder] = {}


def _encoder(name: str) -> ByteLevelEncoder:
    """One encoder for all examples, so that what it remembers of one text is there for the next."""
    if name not in _encoders:
        _encoders[name] = get_encoder(name)
    return _encoders[name]


@pytest.mark.parametrize("name", [*BUILT, "tiny"])
@settings(max_examples=150, deadline=None)
@given(parts=st.lists(st.text(st.characters(max_codepoint=127), max_size=6), max_size=6), token=st.integers(0, 100))
def test_every_ascii_text_with_added_tokens_is_known_and_right(name: str, parts: list[str], token: int) -> None:
    tokenizer, encoder = get_tokenizer(name), _encoder(name)
    added = [t.content for t in tokenizer.added_tokens_decoder.values()]
    text = added[token % len(added)].join(parts)
    assert encoder.knows(text)
    assert list_ids(encoder, text) == expect_ids(tokenizer, text)


KNOWN = ["é ü ß", "漢字と仮名", "한국어", "Кириллица и", "“quotes” – dashes…", "😀 👍", "αβγ", "العربية", "1² ½"]


@pytest.mark.parametrize("name", [*BUILT, "tiny"])
@pytest.mark.parametrize("text", KNOWN)
def test_usual_scripts_are_known(name: str, text: str) -> None:
    assert get_encoder(name).knows(unicodedata.normalize("NFC", text))


@pytest.mark.parametrize("text", ["e\u0301", "A\u030a", "\u212b", "\u1100\u1161", "か\u3099"])
def test_text_that_a_tokenizer_normalises_is_not_known(text: str) -> None:
    plain, tokenizer = build(build_tokenizer()), build_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    normalising = build(tokenizer)
    assert plain is not None
    assert normalising is not None
    assert plain.knows(text)
    assert not normalising.knows(text)
    assert normalising.knows(unicodedata.normalize("NFC", text))


@pytest.mark.parametrize("separator", ["\x1c", "\x1d", "\x1e", "\x1f"])
@pytest.mark.parametrize("name", [*BUILT, "tiny"])
def test_separators_that_python_counts_among_the_blanks_are_cut_as_the_tokenizer_does(
    name: str, separator: str
) -> None:
    tokenizer, encoder = get_tokenizer(name), get_encoder(name)
    for text in (f"a{separator}b", f" {separator} {separator}{separator}1", f"\n{separator}\n x{separator}", separator):
        assert list_ids(encoder, text) == expect_ids(tokenizer, text)


def test_individual_digits_are_cut_as_the_tokenizer_does() -> None:
    tokenizer = build_tokenizer()
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    encoder = build(tokenizer)
    assert encoder is not None
    for text in ("a1b 22  333 ", "  7", "x   1\n\n 2", " 1 2", "٣٤ ½ ²", "\t9"):
        assert not encoder.knows(text) or list_ids(encoder, text) == expect_ids(tokenizer, text), text


def test_the_longest_of_two_added_tokens_is_taken() -> None:
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([AddedToken("<a>", normalized=False), AddedToken("<a><b>", normalized=False)])
    encoder = build(tokenizer)
    assert encoder is not None
    long = tokenizer.convert_tokens_to_ids("<a><b>")
    assert list_ids(encoder, "<a><b>") == [long] == expect_ids(tokenizer, "<a><b>")


def test_a_full_memory_of_words_changes_no_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byte_level, "_MOST_WORDS", 3)
    tokenizer = build_tokenizer()
    encoder = build(tokenizer)
    assert encoder is not None
    text = "the quick brown fox <|im_end|> numbers 1 2 3 the quick <|im_end|> fox"
    assert list_ids(encoder, text) == expect_ids(tokenizer, text)


def test_a_word_that_was_seen_is_not_asked_for_again() -> None:
    tokenizer = build_tokenizer()
    encoder = build(tokenizer)
    assert encoder is not None
    first = list_ids(encoder, "zebra zebra<|im_end|>")

    def fail(word: str) -> list[int]:
        raise AssertionError(word)

    encoder._words.encode = fail
    assert list_ids(encoder, "zebra zebra<|im_end|>") == first
    with pytest.raises(AssertionError):
        encoder.encode("giraffe")


def test_bytes_are_spelled_by_the_characters_of_the_pre_tokenizers_alphabet() -> None:
    characters = list_byte_characters()
    assert set(characters.values()) == set(pre_tokenizers.ByteLevel.alphabet())
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ((word, _),) = whole.pre_tokenize_str("é \n\x7f😀")
    assert word == "".join(characters[byte] for byte in "é \n\x7f😀".encode())


# --- real rows


def list_strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from list_strings(part)


def read_texts() -> list[str]:
    """Texts of all data sets that lie beside the tokenizers, evenly spread."""
    folder = Path(find_tokenizer("llama-3.1")).parents[1] / "datasets"
    found: list[str] = []
    for path in sorted(folder.glob("*.jsonl")):
        lines = path.read_text(encoding="utf-8").splitlines()
        for line in lines[:: max(1, len(lines) // N_TEXTS)]:
            found += list_strings(json.loads(line))
    if not found:
        pytest.skip("no data sets beside the tokenizers")
    return found


@pytest.mark.parametrize("name", [*BUILT, "tiny"])
def test_ids_of_real_rows_are_those_of_the_tokenizer(name: str) -> None:
    tokenizer, encoder = get_tokenizer(name), get_encoder(name)
    every = read_texts()
    known = [text for text in every if encoder.knows(text)]
    assert len(known) > 0.95 * len(every)
    expected = tokenizer.backend_tokenizer.encode_batch_fast(known, add_special_tokens=False)
    for text, encoding in zip(known, expected, strict=True):
        assert list_ids(encoder, text) == encoding.ids, text
