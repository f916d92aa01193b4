"""Templates: the bundled ones against the published ones, rendering against transformers, and where turns end."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from conftest import CHATML, build_tokenizer, find_tokenizer
from tokenizers import AddedToken

from ftcli.data.chat import ChatRenderer
from ftcli.data.encoder import match_any
from ftcli.data.message import Example, Message
from ftcli.data.template import ChatTemplate, read_template
from ftcli.errors import ContentError, UsageError

CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": {"a": 'é "x"', "b": [1, None]}}}
TEXT_CALL = {"id": "ihgfedcba", "type": "function", "function": {"name": "g", "arguments": '{"z":1}'}}
TOOL = {"type": "function", "function": {"name": "f", "description": "é < ü", "parameters": {"type": "object"}}}
TURNS: dict[str, dict[str, Any]] = {
    "system": {"role": "system", "content": " Be brief.\n"},
    "user": {"role": "user", "content": "Hi <é> 😀 "},
    "answer": {"role": "assistant", "content": "\n'Hello' & \"bye\"."},
    "call": {"role": "assistant", "content": "", "tool_calls": [CALL, TEXT_CALL]},
    "integer": {"role": "tool", "content": "12", "tool_call_id": "abcdefghi", "name": "f"},
    "result": {"role": "tool", "content": '{"é": 1.50}', "tool_call_id": "ihgfedcba"},
}
CONVERSATIONS = {
    "question": "user",
    "one": "user answer",
    "two": "user answer user answer",
    "three": "user answer user answer user answer",
    "system": "system user answer user answer",
    "open": "system user answer user",
    "call": "user call",
    "called": "user call integer result answer",
    "called twice": "system user call result answer user call integer answer user answer",
}


@pytest.fixture(scope="module")
def published() -> Callable[[str], Any]:
    """A function that gives the tokenizer, with the published template, of a family."""
    cache: dict[str, Any] = {}

    def get(name: str) -> Any:
        from transformers import AutoTokenizer

        if name not in cache:
            cache[name] = AutoTokenizer.from_pretrained(find_tokenizer(name))
        return cache[name]

    return get


def list_turns(names: str) -> list[dict[str, Any]]:
    return [TURNS[name] for name in names.split()]


# --- the bundled templates against the published ones

FAMILIES = [("llama3", "llama-3.1"), ("mistral", "mistral-7b-v0.3")]


@pytest.mark.parametrize(("name", "family"), FAMILIES)
@pytest.mark.parametrize("prompt", [False, True], ids=["whole", "prompt"])
@pytest.mark.parametrize("tools", [None, [TOOL, TOOL]], ids=["", "tools"])
@pytest.mark.parametrize("turns", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_a_bundled_template_writes_what_the_published_one_does(
    published: Any, name: str, family: str, prompt: bool, tools: Any, turns: str
) -> None:
    tokenizer, messages = published(family), list_turns(turns)
    expected = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=prompt)
    template = ChatTemplate(read_template(name), tokenizer.special_tokens_map)
    assert template.render(messages, tools, prompt=prompt) == expected


@pytest.mark.parametrize(("name", "family"), FAMILIES)
def test_where_both_accept_an_order_of_roles_they_write_the_same(published: Any, name: str, family: str) -> None:
    tokenizer = published(family)
    template = ChatTemplate(read_template(name), tokenizer.special_tokens_map)
    n_equal = 0
    for n_turns in (1, 2, 3, 4):
        for names in itertools.product(TURNS, repeat=n_turns):
            messages = [TURNS[turn] for turn in names]
            try:
                expected = tokenizer.apply_chat_template(messages, tokenize=False)
                text = template.render(messages)
            except Exception:
                continue
            assert text == expected, names
            n_equal += 1
    assert n_equal > 50


REFUSED = {
    "an answer first": [TURNS["answer"]],
    "an answer first behind a system text": [TURNS["system"], TURNS["answer"]],
    "calls first": [TURNS["call"], TURNS["result"]],
    "an unknown role": [{"role": "developer", "content": "x"}, TURNS["user"]],
    "an unknown role later": [TURNS["user"], TURNS["answer"], {"role": "other", "content": "x"}],
    "an empty answer": [TURNS["user"], {"role": "assistant", "content": ""}],
    "content beside calls": [TURNS["user"], {"role": "assistant", "content": "x", "tool_calls": [CALL]}],
    "a call without an id": [TURNS["user"], {**TURNS["call"], "tool_calls": [{"function": CALL["function"]}]}],
    "a call with a short id": [TURNS["user"], {**TURNS["call"], "tool_calls": [{**CALL, "id": "abc"}]}],
    "a result without an id": [TURNS["user"], TURNS["call"], {"role": "tool", "content": "12"}],
    "a result with a long id": [TURNS["user"], TURNS["call"], {**TURNS["result"], "tool_call_id": "abcdefghij"}],
}


@pytest.mark.parametrize("messages", REFUSED.values(), ids=REFUSED)
def test_mistral_refuses_what_the_published_template_refuses(published: Any, messages: list[dict[str, Any]]) -> None:
    from jinja2 import TemplateError

    tokenizer = published("mistral-7b-v0.3")
    with pytest.raises(TemplateError):
        tokenizer.apply_chat_template(messages, tokenize=False)
    with pytest.raises(ContentError, match="the chat template refuses the messages: "):
        ChatTemplate(read_template("mistral"), tokenizer.special_tokens_map).render(messages)


@pytest.mark.parametrize("order", ["answer user", "system", "call result user", "result answer", "user user answer"])
def test_llama3_refuses_no_order_of_roles(published: Any, order: str) -> None:
    tokenizer, messages = published("llama-3.1"), list_turns(order)
    template = ChatTemplate(read_template("llama3"), tokenizer.special_tokens_map)
    assert template.render(messages) == tokenizer.apply_chat_template(messages, tokenize=False)


# --- the bundled templates, written out


BRIEF = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "Q"},
    {"role": "assistant", "content": "A "},
    {"role": "user", "content": "R"},
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize(
    ("name", "text", "prompt"),
    [
        (
            "chatml",
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n"
            "<|im_start|>assistant\nA <|im_end|>\n<|im_start|>user\nR<|im_end|>\n",
            "<|im_start|>assistant\n",
        ),
        (
            "llama3",
            "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nR<|eot_id|>",
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        ("mistral", "<s>[INST] Q[/INST] A </s>[INST] S\n\nR[/INST]", ""),
    ],
)
def test_a_bundled_template_written_out(name: str, text: str, prompt: str) -> None:
    template = ChatTemplate(read_template(name), SPECIAL)
    assert template.render(BRIEF) == text
    assert template.render(BRIEF, prompt=True) == text + prompt


def test_calls_and_results_of_mistral_written_out() -> None:
    call = {"id": "123456789", "type": "function", "function": {"name": "f", "arguments": {"a": "é"}}}
    messages = [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "7", "tool_call_id": "123456789"},
        {"role": "assistant", "content": "A"},
    ]
    assert ChatTemplate(read_template("mistral"), SPECIAL).render(messages, [{"name": "f"}]) == (
        '<s>[AVAILABLE_TOOLS] [{"name": "f"}][/AVAILABLE_TOOLS][INST] Q[/INST]'
        '[TOOL_CALLS] [{"name": "f", "arguments": {"a": "é"}, "id": "123456789"}]</s>'
        '[TOOL_RESULTS] {"content": 7, "call_id": "123456789"}[/TOOL_RESULTS] A</s>'
    )


def test_a_template_is_read_from_a_file_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_text("{{ 'é' }}\n\n", encoding="utf-8")
    assert read_template(str(path)) == "{{ 'é' }}\n\n"


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"], ids=["missing", "no text"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "own.jinja"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match="the chat template cannot be read") as caught:
        read_template(str(path))
    assert caught.value.where == str(path)


# --- rendering against transformers


def say(content: str | None = "b", **extra: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **extra}


ASK: dict[str, Any] = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    "source",
    [
        CHATML,
        "{% for m in messages %}\n    {%- if m.role == 'user' %}\n{{ m.content }}\n    {% endif %}\n  {% endfor %}\n",
        "{{ messages | tojson }} {{ tools | tojson(indent=2) }}",
        "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ unknown }}|{{ documents }}",
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        "{{ level | default('none') }}|{{ thinking is defined }}|{{ tools is none }}|{{ add_generation_prompt }}",
    ],
    ids=["chatml", "blanks", "json", "special tokens", "break", "generation", "variables"],
)
@pytest.mark.parametrize("tools", [None, [TOOL]], ids=["", "tools"])
@pytest.mark.parametrize("prompt", [False, True], ids=["whole", "prompt"])
def test_a_template_is_rendered_as_transformers_does(
    tiny_tokenizer: Any, source: str, tools: Any, prompt: bool
) -> None:
    messages = [{"role": "user", "content": "<é> & 'x'"}, say("b\n", name="bot")]
    options: dict[str, Any] = {"level": "high", "thinking": False}
    expected = tiny_tokenizer.apply_chat_template(
        messages, tools=tools, chat_template=source, tokenize=False, add_generation_prompt=prompt, **options
    )
    template = ChatTemplate(source, tiny_tokenizer.special_tokens_map, options)
    assert template.render(messages, tools, prompt=prompt) == expected


def test_rendering_leaves_nothing_for_the_next_time() -> None:
    template = ChatTemplate("{% set ns = namespace(n=n | default(0)) %}{% set n = ns.n + 1 %}{{ n }}")
    assert [template.render([ASK]) for _ in range(3)] == ["1", "1", "1"]


def test_a_template_cannot_reach_the_machine() -> None:
    with pytest.raises(ContentError, match="refuses the messages"):
        ChatTemplate("{{ messages.__class__.__mro__ }}").render([ASK])


def test_invalid_jinja_is_an_error_with_its_line() -> None:
    with pytest.raises(ContentError, match=r"no valid Jinja: .* \(line 2\)"):
        ChatTemplate("\n{% for %}").render([ASK])


# --- the date


def test_the_date_is_the_one_that_is_given() -> None:
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", date=datetime(2024, 2, 29, 13, 5))
    assert template.render([ASK]) == "29 Feb 2024"
    assert template.is_dated


def test_without_a_date_it_is_the_beginning_of_today() -> None:
    before = datetime.now().date()
    text = ChatTemplate("{{ strftime_now('%Y-%m-%d %H:%M:%S') }}").render([ASK])
    assert text in {f"{day} 00:00:00" for day in (before, datetime.now().date())}


def test_a_variable_does_not_replace_the_pinned_date() -> None:
    template = ChatTemplate(
        "{{ strftime_now('%Y') }}", variables={"strftime_now": lambda form: "never"}, date=datetime(2001, 1, 1)
    )
    assert template.render([ASK]) == "2001"


def test_a_template_without_a_date_is_not_dated() -> None:
    assert not ChatTemplate(CHATML).is_dated
    assert not ChatTemplate(None).is_dated


# --- reasoning has one of three names


@pytest.mark.parametrize("given", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("wanted", ["reasoning_content", "thinking"])
def test_reasoning_is_found_under_the_name_that_the_template_reads(given: str, wanted: str) -> None:
    template = ChatTemplate(f"{{% for m in messages %}}[{{{{ m.{wanted} }}}}]{{% endfor %}}")
    assert template.render([ASK, say(**{given: "so"})]) == "[][so]"


# --- null content

CALLED = say(None, tool_calls=[CALL])
THOUGHT = say(None, reasoning_content="so")
WRITES_CALLS = "{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}"


def each(body: str) -> str:
    return f"{{% for m in messages %}}{body}{WRITES_CALLS}<|im_end|>{{% endfor %}}"


@pytest.mark.parametrize("turn", [CALLED, THOUGHT], ids=["calls", "reasoning"])
@pytest.mark.parametrize(
    "body",
    ["{{ '' + m.content }}", "{{ m.content }}", "{{ m.content | trim }}", "{{ m['content'].strip() }}"],
    ids=["joins", "writes", "filters", "calls"],
)
def test_a_template_that_does_not_know_null_gets_an_empty_text(body: str, turn: dict[str, Any]) -> None:
    template = ChatTemplate(each(body))
    assert template.render([ASK, turn]) == template.render([ASK, {**turn, "content": ""}])
    assert "None" not in template.render([ASK, turn])


@pytest.mark.parametrize("turn", [CALLED, THOUGHT], ids=["calls", "reasoning"])
@pytest.mark.parametrize(
    "body",
    [
        "{{ 'NULL' if m.content is none else m.content }}",
        "{% if m.content is not none %}<{{ m.content }}>{% endif %}",
        "{% if m.content is defined %}<{{ m.content }}>{% endif %}",
    ],
    ids=["is none", "is not none", "is defined"],
)
def test_null_content_is_what_transformers_makes_of_it_where_that_works(body: str, turn: dict[str, Any]) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = each(body)
    expected = tokenizer.apply_chat_template([ASK, turn], tokenize=False)
    assert ChatTemplate(each(body)).render([ASK, turn]) == expected


@pytest.mark.parametrize("turn", [CALLED, THOUGHT], ids=["calls", "reasoning"])
def test_a_template_that_fails_without_content_gets_null(turn: dict[str, Any]) -> None:
    body = "{% if m.content is none %}NULL{% else %}{{ m.content + '' }}{% endif %}"
    assert ChatTemplate(each(body)).render([ASK, turn]).startswith("a<|im_end|>NULL")


def test_a_template_that_stumbles_over_null_beside_calls_alone_gets_an_empty_text() -> None:
    body = "{{ (m.content + '!') if m.tool_calls else (m.content or 'NULL') }}"
    assert ChatTemplate(each(body)).render([ASK, CALLED]).startswith("a<|im_end|>!")


def test_a_template_that_refuses_calls_altogether_is_still_asked_about_reasoning() -> None:
    refuses = "{% if m.tool_calls %}{{ raise_exception('no calls') }}{% endif %}"
    template = ChatTemplate(each(refuses + "{{ '' + m.content }}"))
    assert template.render([ASK, THOUGHT]) == "a<|im_end|><|im_end|>"
    with pytest.raises(ContentError, match="no calls"):
        template.render([ASK, CALLED])


def test_a_text_that_says_none_stays() -> None:
    assert ChatTemplate(each("{{ m.content }}")).render([ASK, say("None")]) == "a<|im_end|>None<|im_end|>"


def test_the_messages_of_the_caller_stay_as_they_are() -> None:
    turn = say(None, reasoning="so", tool_calls=[CALL])
    before = dict(turn)
    ChatTemplate(each("{{ m.content }}")).render([ASK, turn])
    assert turn == before


# --- where turns end

PHI = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}"
)
COHERE = (
    "{% for m in messages %}{{ '<|START_OF_TURN_TOKEN|>' + m.role }}"
    "{{ '<|START_RESPONSE|>' + m.content + '<|END_RESPONSE|>' if m.role == 'assistant' else m.content }}"
    "<|END_OF_TURN_TOKEN|>{% endfor %}"
    "{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|>assistant{% endif %}"
)
GPT_OSS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% if m.thinking and loop.last %}{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}"
    "{% endif %}{% if m.tool_calls %}"
    "{{ '<|start|>assistant<|channel|>commentary<|message|>' + m.tool_calls[0].function.arguments | tojson }}<|call|>"
    "{% else %}{{ '<|start|>assistant<|channel|>final<|message|>' + m.content }}"
    "{{ '<|return|>' if loop.last else '<|end|>' }}{% endif %}"
    "{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
OTHER_AFTER_CALLS = (  # Llama 3.1 with its own tools
    "{% for m in messages %}{{ '<|start|>' + m.role + '<|message|>' }}"
    "{{ m.tool_calls[0].function.arguments | tojson + '<|eom|>' if m.tool_calls else m.content + '<|eot|>' }}"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|message|>{% endif %}"
)
TOKENS = {
    PHI: ["<|end|>", "<|user|>", "<|assistant|>"],
    COHERE: [
        "<|START_OF_TURN_TOKEN|>",
        "<|END_OF_TURN_TOKEN|>",
        "<|START_RESPONSE|>",
        "<|END_RESPONSE|>",
    ],
    GPT_OSS: ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>"],
    OTHER_AFTER_CALLS: ["<|start|>", "<|message|>", "<|eot|>", "<|eom|>"],
}


def build(source: str, *tokens: str, eos: str = "<|endoftext|>") -> Any:
    """A small tokenizer with a template and its tokens."""
    tokenizer = build_tokenizer()
    wanted = tokens or TOKENS.get(source, [])
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in wanted])
    tokenizer.chat_template = source
    tokenizer.eos_token = eos
    return tokenizer


def find_ends(source: str, *tokens: str) -> tuple[str, ...]:
    return ChatRenderer(build(source, *tokens)).find_turn_ends()


@pytest.mark.parametrize(
    ("source", "ends"),
    [
        (CHATML, ("<|im_end|>",)),
        (PHI, ("<|end|>",)),
        (COHERE, ("<|END_OF_TURN_TOKEN|>",)),
        (GPT_OSS, ("<|return|>", "<|call|>")),
        (OTHER_AFTER_CALLS, ("<|eot|>", "<|eom|>")),
    ],
    ids=["chatml", "phi", "cohere", "gpt-oss", "calls"],
)
def test_the_ends_of_a_turn_are_found(source: str, ends: tuple[str, ...]) -> None:
    assert find_ends(source) == ends


def test_the_ids_of_the_ends_are_theirs() -> None:
    tokenizer = build(GPT_OSS)
    ids = ChatRenderer(tokenizer).end_of_turn_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["<|return|>", "<|call|>"]


def test_blanks_before_the_end_are_passed() -> None:
    assert find_ends(CHATML.replace("'<|im_end|>\n'", "'\n <|im_end|>\n'")) == ("<|im_end|>",)


def test_an_end_of_text_directly_behind_the_last_turn_alone_is_no_end_of_a_turn() -> None:
    source = "{% for m in messages %}{{ m.content + '<|im_end|>' }}{% endfor %}<|endoftext|>"
    assert find_ends(source) == ("<|im_end|>",)


def test_a_template_that_refuses_a_second_question_has_the_end_of_its_first_answer() -> None:
    refuses = "{% if messages | length > 2 %}{{ raise_exception('one answer only') }}{% endif %}"
    assert find_ends(refuses + CHATML) == ("<|im_end|>",)


def test_a_token_of_the_vocabulary_that_is_not_special_ends_a_turn_too() -> None:
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([AddedToken("<end>", special=False, normalized=False)])
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "<end>")
    assert ChatRenderer(tokenizer).find_turn_ends() == ("<end>",)


@pytest.mark.parametrize(
    "source",
    ["{% for m in messages %}{{ m.content + '\n' }}{% endfor %}", "{{ messages[0].content }}", "fixed"],
    ids=["a line", "the question alone", "no answer"],
)
def test_a_template_without_an_end_is_refused(source: str) -> None:
    with pytest.raises(ContentError, match="writes no end-of-turn token") as caught:
        find_ends(source)
    assert caught.value.why == "a model trained on it would never stop"


@pytest.mark.parametrize("end", ["<|eot_id|>", "<end_of_turn>", "[/ANSWER]", "<｜end▁of▁sentence｜>"])
def test_an_end_that_is_no_single_token_is_named(end: str) -> None:
    with pytest.raises(ContentError, match="writes no end-of-turn token") as caught:
        find_ends(CHATML.replace("<|im_end|>", end))
    assert caught.value.why == f"it writes {end}, which is no single token of this vocabulary"


def test_ends_are_taken_from_the_tokens_that_are_given() -> None:
    source = "{% for m in messages %}{{ m.content + '<a><b>' }}{% endfor %}"
    assert ChatTemplate(source).find_turn_ends(match_any(["<a>"])) == ("<a>",)
    assert ChatTemplate(source).find_turn_ends(match_any(["<a>", "<b>"])) == ("<b>",)


# --- through the end, by the renderer


def list_trained(tokenizer: Any, *messages: Message) -> list[list[str]]:
    """For each document the texts of its trained runs of tokens."""
    example = Example(messages, None, None, "train.jsonl", 1)
    documents = []
    for document in ChatRenderer(tokenizer).render(example):
        runs: list[list[int]] = [[]]
        for token, is_trained in zip(document.ids, document.mask, strict=True):
            if is_trained:
                runs[-1].append(token)
            elif runs[-1]:
                runs.append([])
        documents.append([tokenizer.decode(run) for run in runs if run])
    return documents


U = Message("user", "fox")


def test_a_turn_of_two_messages_is_trained_whole() -> None:
    tokenizer = build(GPT_OSS)
    answer = Message("assistant", "dog", extra={"thinking": "so"})
    assert list_trained(tokenizer, U, answer) == [
        ["<|channel|>analysis<|message|>so<|end|><|start|>assistant<|channel|>final<|message|>dog<|return|>"]
    ]


def test_each_turn_that_ends_otherwise_in_history_is_a_document_with_its_own_end() -> None:
    tokenizer = build(GPT_OSS)
    assert list_trained(tokenizer, U, Message("assistant", "dog"), U, Message("assistant", "cat")) == [
        ["<|channel|>final<|message|>dog<|return|>"],
        ["<|channel|>final<|message|>cat<|return|>"],
    ]


def test_a_turn_of_calls_is_trained_through_its_own_end() -> None:
    tokenizer = build(GPT_OSS)
    call = Message("assistant", None, extra={"tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]})
    (document,) = list_trained(tokenizer, U, call)
    assert document == ['<|channel|>commentary<|message|>{"a": 1}<|call|>']


def test_the_end_of_text_behind_the_last_turn_is_not_trained() -> None:
    tokenizer = build(PHI)
    assert list_trained(tokenizer, U, Message("assistant", "dog"), U, Message("assistant", "cat")) == [
        ["dog<|end|>", "cat<|end|>"]
    ]


def test_the_latter_of_two_adjacent_ends_is_trained_too() -> None:
    tokenizer = build(COHERE)
    assert list_trained(tokenizer, U, Message("assistant", "dog"), U, Message("assistant", "cat")) == [
        [
            "<|START_RESPONSE|>dog<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
            "<|START_RESPONSE|>cat<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
        ]
    ]


def test_an_answer_and_a_turn_of_calls_each_end_with_their_token() -> None:
    tokenizer = build(OTHER_AFTER_CALLS)
    call = Message("assistant", None, extra={"tool_calls": [{"function": {"name": "f", "arguments": {}}}]})
    assert list_trained(tokenizer, U, call, Message("tool", "1"), Message("assistant", "dog")) == [
        ["{}<|eom|>", "dog<|eot|>"]
    ]
