"""Five formats, one conversation; exact texts; and every misfit named with its row and field."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftcli.data.example import read_examples
from ftcli.data.message import FORMATS, Example, Message, detect_format, read_example
from ftcli.data.source import Row
from ftcli.errors import ContentError, Problem, UsageError

ASSETS = Path(os.environ.get("FTCLI_TEST_ASSETS", Path(__file__).parents[3] / "shared" / "assets"))

USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "hello"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
ROLES_LISTED = "the roles are system, developer, user, assistant, tool, function, ipython"


def read(value: dict[str, Any], name: str = "", **options: Any) -> Example:
    row = Row("train.jsonl", 12, value)
    return read_example(row, name or detect_format(row), **options)


def refuse(value: dict[str, Any], name: str = "") -> ContentError:
    with pytest.raises(ContentError) as caught:
        read(value, name)
    assert caught.value.where == "train.jsonl:12"
    return caught.value


def write(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def turn(**fields: Any) -> dict[str, Any]:
    """A messages row of a question and an answer, the answer's fields changed."""
    return {"messages": [USER, ASSISTANT | fields]}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("messages", {"messages": [USER, ASSISTANT]}),
        ("sharegpt", {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}),
        ("alpaca", {"instruction": "hi", "input": "", "output": "hello"}),
        ("alpaca", {"instruction": "hi", "output": "hello"}),
        ("prompt_completion", {"prompt": "hi", "completion": "hello"}),
        ("prompt_completion", {"prompt": [USER], "completion": [ASSISTANT]}),
    ],
)
def test_each_format_reads_the_same_conversation(name: str, value: dict[str, Any]) -> None:
    row = Row("train.jsonl", 12, value)
    assert detect_format(row) == name
    example = read_example(row, name)
    assert example.messages == (Message("user", "hi"), Message("assistant", "hello"))
    assert (example.text, example.tools, example.place) == (None, None, "train.jsonl:12")


@given(st.text(), st.text())
def test_texts_are_kept_to_the_last_blank(question: str, answer: str) -> None:
    conversations = [
        {"messages": [USER | {"content": question}, ASSISTANT | {"content": answer}]},
        {"conversations": [{"from": "user", "value": question}, {"from": "model", "value": answer}]},
        {"instruction": "x" + question, "input": " \n", "output": answer},
        {"prompt": question, "completion": answer},
    ]
    for value in conversations:
        asked, answered = read(value).messages
        assert asked.content == ("x" if "instruction" in value else "") + question
        assert answered.content == answer


def test_a_text_row_is_its_text() -> None:
    assert read({"text": " raw\n"}) == Example((), " raw\n", None, "train.jsonl", 12, "text")


def test_other_columns_and_nulls_do_not_disturb_detection() -> None:
    assert read({"id": 1, "prompt": "hi", "text": None, "messages": [USER, ASSISTANT]}).text is None
    assert detect_format(Row("f", 1, {"messages": None, "text": "raw"})) == "text"
    assert detect_format(Row("f", 1, {"messages": [USER], "text": "rendered"})) == "messages"


@pytest.mark.parametrize(
    "value",
    [
        {"messages": [USER, ASSISTANT]},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
        {"instruction": "hi", "output": "hello"},
        {"prompt": "hi", "completion": "hello"},
    ],
)
def test_a_system_text_of_the_row_leads_and_a_blank_one_is_none(value: dict[str, Any]) -> None:
    plain = (Message("user", "hi"), Message("assistant", "hello"))
    assert read(value | {"system": "be brief "}).messages == (Message("system", "be brief "), *plain)
    assert read(value | {"system": " "}).messages == plain
    assert read(value | {"system": None}).messages == plain


def test_a_system_text_given_twice_is_refused() -> None:
    value = {"system": "a", "messages": [{"role": "system", "content": "b"}, USER, ASSISTANT]}
    assert refuse(value).what == "system: given twice, for the row and in its messages"


def test_unknown_keys_travel_to_the_template_as_they_are() -> None:
    fields = {"reasoning_content": "hm", "name": "bo", "tool_calls": [CALL]}
    message = read(turn(**fields)).messages[1]
    assert message.extra == fields
    assert message.to_template() == {"role": "assistant", "content": "hello", **fields}


def test_null_and_empty_tool_calls_are_not_shown_to_templates() -> None:
    message = read(turn(tool_calls=None, name=None)).messages[1]
    assert message.to_template() == ASSISTANT
    assert read(turn(tool_calls=[])).messages[1].to_template() == ASSISTANT


@pytest.mark.parametrize("fields", [{"tool_calls": [CALL]}, {"reasoning_content": "hm"}, {"thinking": "hm"}])
def test_content_may_be_null_beside_calls_or_reasoning(fields: dict[str, Any]) -> None:
    message = read(turn(content=None, **fields)).messages[1]
    assert message.content is None
    assert message.to_template() == {"role": "assistant", "content": None, **fields}


def test_parts_of_type_text_are_joined() -> None:
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    assert read(turn(content=parts)).messages[1].content == "a b"


@pytest.mark.parametrize(
    ("fields", "train"),
    [
        ({}, None),
        ({"train": None}, None),
        ({"train": True}, True),
        ({"train": False}, False),
        ({"weight": 0}, False),
        ({"weight": 1}, True),
        ({"weight": 1.0}, True),
        ({"weight": 0, "train": False}, False),
    ],
)
def test_a_flag_of_the_row_is_read_and_not_shown(fields: dict[str, Any], train: bool | None) -> None:
    message = read(turn(**fields)).messages[1]
    assert message.train is train
    assert message.to_template() == ASSISTANT


@pytest.mark.parametrize(
    ("messages", "what"),
    [
        ([], "messages: no messages"),
        ({}, "messages: an object where a list of messages belongs"),
        (["hi"], "messages[0]: a string where a message belongs"),
        ([{"content": "hi"}], "messages[0].role: null or missing where a text belongs"),
        ([USER, {"role": "assistant"}], "messages[1].content: null or missing where a text belongs"),
        (
            [USER, ASSISTANT, {"role": "user", "content": None, "reasoning": "hm"}],
            "messages[2].content: null or missing where a text belongs",
        ),
        (
            [USER, ASSISTANT | {"content": None, "tool_calls": []}],
            "messages[1].content: null or missing where a text belongs",
        ),
        ([USER, ASSISTANT | {"content": 3}], "messages[1].content: a number where a text belongs"),
        (
            [USER | {"content": [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {}}]}],
            "messages[0].content[1]: a part of type 'image_url'; only text is trained on",
        ),
        (
            [USER | {"content": [{"type": "text"}]}],
            "messages[0].content[0].text: null or missing where a text belongs",
        ),
        ([USER, ASSISTANT | {"tool_calls": "f()"}], "messages[1].tool_calls: not a list of objects"),
        ([USER, ASSISTANT | {"train": 1}], "messages[1].train: a number where true or false belongs"),
        ([USER, ASSISTANT | {"weight": 0.5}], "messages[1].weight: 0.5; only 0 and 1 are known"),
        ([USER, ASSISTANT | {"weight": True}], "messages[1].weight: True; only 0 and 1 are known"),
        (
            [USER, ASSISTANT | {"weight": 0, "train": True}],
            "messages[1]: train and weight contradict each other",
        ),
        ([USER], "no assistant turn: nothing to learn"),
    ],
)
def test_a_message_that_does_not_fit_is_named_by_its_field(messages: Any, what: str) -> None:
    assert refuse({"messages": messages}, "messages").what == what


@pytest.mark.parametrize(
    ("role", "hint"),
    [
        ("human", "did you mean user? set roles: {human: user}"),
        ("gpt", "did you mean assistant? set roles: {gpt: assistant}"),
        ("bot", "did you mean assistant? set roles: {bot: assistant}"),
        ("asistant", "did you mean assistant? set roles: {asistant: assistant}"),
        ("USER", "did you mean user? set roles: {USER: user}"),
        ("narrator of tales", "set roles: {narrator of tales: ROLE}"),
    ],
)
def test_an_unknown_role_is_refused_with_a_suggestion(role: str, hint: str) -> None:
    error = refuse({"messages": [USER, {"role": role, "content": "x"}]})
    assert error.what == f"messages[1].role: unknown role {role!r}; {ROLES_LISTED}"
    assert error.hint == hint


def test_turns_under_the_other_format_s_key_say_which_column_to_set() -> None:
    error = refuse({"messages": [{"from": "human", "value": "hi"}]})
    assert error.what == "messages[0]: from and value where role and content belong"
    assert error.hint == "the row looks like ShareGPT: set columns: {conversations: messages}"
    error = refuse({"conversations": [USER, ASSISTANT]})
    assert error.what == "conversations[0]: role and content where from and value belong"
    assert error.hint == "set columns: {messages: conversations}"


def test_without_an_assistant_if_asked_for() -> None:
    example = read({"messages": [USER]}, require_assistant=False)
    assert example.messages == (Message("user", "hi"),)


@pytest.mark.parametrize(
    ("speaker", "role"),
    [(name, "assistant") for name in ("gpt", "assistant", "chatgpt", "bing", "bard", "model")]
    + [("human", "user"), ("user", "user"), ("system", "system"), ("tool", "tool"), ("observation", "tool")],
)
def test_speakers_become_roles(speaker: str, role: str) -> None:
    turns = [{"from": speaker, "value": "x"}, {"from": "gpt", "value": "y"}]
    assert read({"conversations": turns}).messages[0] == Message(role, "x")


def test_a_function_call_becomes_tool_calls() -> None:
    def call(value: str) -> Message:
        return read({"conversations": [{"from": "function_call", "value": value}]}).messages[0]

    other = {"type": "function", "function": {"name": "g", "arguments": {}}}
    one = '{"name": "f", "arguments": {"x": 1}}'
    assert call(one).to_template() == {"role": "assistant", "content": None, "tool_calls": [CALL]}
    assert call(f'[{one}, {{"name": "g"}}]').extra["tool_calls"] == [CALL, other]
    assert call('{"name": "f", "arguments": "{\\"x\\": 1}"}').extra["tool_calls"] == [CALL]
    assert call('{"id": "c1", "name": "g", "arguments": {}}').extra["tool_calls"] == [other | {"id": "c1"}]


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ('{"name": "f"', "broken JSON: expecting ',' delimiter"),
        ("3", "not a call with name and arguments, nor a list of calls"),
        ("[]", "not a call with name and arguments, nor a list of calls"),
        ('{"arguments": {}}', "not a call with name and arguments, nor a list of calls"),
        ('{"name": "f", "arguments": [1]}', "arguments: an array where an object belongs"),
        ('{"name": "f", "name": "g"}', 'the key "name" stands twice in one object'),
    ],
)
def test_a_broken_function_call_is_named_by_its_field(value: str, what: str) -> None:
    error = refuse({"conversations": [{"from": "function_call", "value": value}]})
    assert error.what == f"conversations[0].value: {what}"


@pytest.mark.parametrize(
    ("turns", "what", "hint"),
    [
        ([], "conversations: no messages", ""),
        ([{"from": "gpt", "value": None}], "conversations[0].value: null or missing where a text belongs", ""),
        ([{"value": "x"}], "conversations[0].from: null or missing where a text belongs", ""),
        (
            [{"from": "bot", "value": "x"}],
            "conversations[0].from: unknown speaker 'bot'; the speakers are human, user, gpt, assistant, "
            "chatgpt, bing, bard, model, function_call, system, tool, observation, developer, function, ipython",
            "did you mean assistant? set roles: {bot: assistant}",
        ),
    ],
)
def test_a_sharegpt_turn_that_does_not_fit_is_named(turns: Any, what: str, hint: str) -> None:
    error = refuse({"conversations": turns})
    assert (error.what, error.hint) == (what, hint)


def test_a_sharegpt_turn_may_say_whether_it_is_learned() -> None:
    turns = [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y", "weight": 0}]
    assert read({"conversations": turns}).messages[1] == Message("assistant", "y", False)


def test_tools_come_as_a_list_or_as_its_json_text() -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    value = {"messages": [USER, ASSISTANT]}
    assert read(value | {"tools": [tool]}).tools == (tool,)
    assert read(value | {"tools": json.dumps([tool])}).tools == (tool,)
    for nothing in ([], "[]", "", None):
        assert read(value | {"tools": nothing}).tools is None


def test_bare_sharegpt_tools_get_the_frame_of_a_function() -> None:
    bare = {"name": "f", "description": "d", "parameters": {}}
    framed = {"type": "function", "function": bare}
    value = {"conversations": [{"from": "gpt", "value": "y"}]}
    assert read(value | {"tools": json.dumps([bare, framed])}).tools == (framed, framed)
    assert read({"messages": [USER, ASSISTANT], "tools": [bare]}).tools == (bare,)


@pytest.mark.parametrize("tools", [{"name": "f"}, ["f"], "3", 3])
def test_tools_that_are_no_list_are_refused(tools: Any) -> None:
    error = refuse({"messages": [USER, ASSISTANT], "tools": tools})
    assert error.what == "tools: not a list of objects, nor the JSON text of one"


def test_alpaca_puts_the_input_under_the_instruction() -> None:
    value = {"instruction": "sum", "input": " 1 2", "output": "3", "history": [["hi", "hello"]]}
    assert read(value).messages == (
        Message("user", "hi"),
        Message("assistant", "hello"),
        Message("user", "sum\n\n 1 2"),
        Message("assistant", "3"),
    )
    assert read(value | {"instruction": "", "history": None}).messages[0].content == " 1 2"


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"instruction": " "}, "instruction: blank"),
        ({"input": 3}, "input: a number where a text belongs"),
        ({"output": ["3"]}, "output: an array where a text belongs"),
        ({"history": {}}, None),
        ({"history": "hi"}, "history: a string where a list of pairs belongs"),
        ({"history": [["hi", "hello"], ["hi"]]}, "history[1]: not a pair of texts"),
        ({"history": [["hi", None]]}, "history[0]: not a pair of texts"),
    ],
)
def test_alpaca_fields_are_checked(fields: dict[str, Any], what: str | None) -> None:
    value = {"instruction": "hi", "output": "hello"} | fields
    if what is None:
        assert len(read(value).messages) == 2
    else:
        assert refuse(value, "alpaca").what == what


def test_the_answers_in_a_prompt_are_not_what_is_learned() -> None:
    value = {
        "prompt": [USER, ASSISTANT, ASSISTANT | {"train": True}, USER],
        "completion": [ASSISTANT | {"content": "bye"}],
    }
    assert [message.train for message in read(value).messages] == [None, False, True, None, None]


@pytest.mark.parametrize(
    ("prompt", "completion", "what"),
    [
        (
            "hi",
            [ASSISTANT],
            "prompt and completion: a string and an array; both must be texts, or both lists of messages",
        ),
        ([USER], [], "completion: no messages"),
        ([USER], [{"role": "assistant"}], "completion[0].content: null or missing where a text belongs"),
    ],
)
def test_prompt_and_completion_must_be_alike(prompt: Any, completion: Any, what: str) -> None:
    assert refuse({"prompt": prompt, "completion": completion}).what == what


@pytest.mark.parametrize(
    "value",
    [
        {"prompt": "hi", "chosen": "hello", "rejected": "no"},
        {"messages": [USER, ASSISTANT], "chosen": [ASSISTANT], "rejected": [ASSISTANT]},
        {"prompt": "hi", "completion": "no", "label": False},
    ],
)
def test_preferences_are_refused_with_the_reason(value: dict[str, Any]) -> None:
    error = refuse(value)
    assert error.what == f"a row of preferences (its keys: {', '.join(value)})"
    assert error.why.startswith("ftcli trains on demonstrations; preferences (")


def test_demonstrations_beside_preferences_are_read_if_asked_for() -> None:
    value = {"messages": [USER, ASSISTANT], "chosen": [ASSISTANT], "rejected": [ASSISTANT]}
    assert refuse(value).hint == "to train on its messages alone, set type: messages"
    assert len(read(value, "messages").messages) == 2


def test_a_row_of_no_known_format_names_its_keys_and_what_each_format_needs() -> None:
    assert str(refuse({"question": "hi", "answer": "hello", "text": None})) == (
        "train.jsonl:12: no known format has the keys question, answer\n"
        "  messages needs messages\n"
        "  sharegpt needs conversations\n"
        "  alpaca needs instruction and output\n"
        "  prompt_completion needs prompt and completion\n"
        "  text needs text\n"
        "hint: say which column is which, such as columns: {prompt: question, completion: answer}"
    )
    assert refuse({}).what == "no known format has the keys (none)"


def test_blank_text_is_refused() -> None:
    assert refuse({"text": " \n"}).what == "text: blank"


def test_a_file_takes_the_format_of_its_first_row_and_names_the_rows_that_do_not_fit(tmp_path: Path) -> None:
    fits = {"instruction": "hi", "output": "hello"}
    path = write(tmp_path, fits, {"messages": [USER, ASSISTANT]}, fits, fits | {"output": 1})
    with pytest.raises(ContentError) as caught:
        read_examples(path)
    assert str(caught.value) == (
        f"{path}:2: instruction and output: missing in a row read as alpaca (its keys: messages)\n"
        f"  {path}:4: output: a number where a text belongs\n"
        "hint: the row looks like messages; a file holds one format"
    )


def test_a_file_of_a_named_format_and_of_a_detected_one_read_alike(tmp_path: Path) -> None:
    path = write(tmp_path, {"messages": [USER, ASSISTANT]}, {"messages": [USER, ASSISTANT]})
    examples = read_examples(path)
    assert examples == read_examples(path, "messages")
    assert [example.place for example in examples] == [f"{path}:1", f"{path}:2"]


def test_more_than_ten_bad_rows_are_counted(tmp_path: Path) -> None:
    with pytest.raises(ContentError) as caught:
        read_examples(write(tmp_path, *[{"messages": [USER]}] * 12))
    assert str(caught.value).count("no assistant turn: nothing to learn") == 10
    assert str(caught.value).endswith("\n  and 2 more")


def test_a_turn_of_two_keys_and_one_of_more_read_alike() -> None:
    plain = read({"messages": [USER, ASSISTANT]})
    assert read({"messages": [USER | {"name": None}, ASSISTANT | {"train": None}]}) == plain


def test_tables_hold_messages_as_json_text() -> None:
    for key, turns in (("messages", [USER, ASSISTANT]), ("conversations", [{"from": "gpt", "value": "[x"}])):
        assert read({key: json.dumps(turns)}) == read({key: turns})
    assert refuse({"messages": "hi"}).what == "messages: a string where a list of messages belongs"
    assert refuse({"messages": '[{"role": '}).what == "messages: broken JSON: expecting value"
    assert read({"prompt": "[1]", "completion": "[2]"}).messages == (
        Message("user", "[1]"),
        Message("assistant", "[2]"),
    )


def test_columns_put_the_file_s_names_for_the_format_s_keys(tmp_path: Path) -> None:
    row = {"question": "q", "answer": "a", "output": "not this"}
    (example,) = read_examples(write(tmp_path, row), columns={"instruction": "question", "output": "answer"})
    assert (example.format, [message.content for message in example.messages]) == ("alpaca", ["q", "a"])
    swapped = {"instruction": "a", "output": "q"}
    (example,) = read_examples(write(tmp_path, swapped), columns={"instruction": "output", "output": "instruction"})
    assert [message.content for message in example.messages] == ["q", "a"]


def test_a_column_that_is_not_there_names_those_that_are(tmp_path: Path) -> None:
    path = write(tmp_path, {"dialog": [USER, ASSISTANT], "id": 1})
    with pytest.raises(ContentError) as caught:
        read_examples(path, columns={"messages": "dialogue"})
    assert str(caught.value) == f"{path}:1: no column dialogue (its columns: dialog, id)\nhint: did you mean dialog?"


def test_roles_put_ours_for_the_file_s_words(tmp_path: Path) -> None:
    roles = {"bot": "assistant", "customer": "user", "boss": "developer"}
    said = [("boss", "be kind"), ("customer", "hi"), ("bot", "hello")]
    turns = {"messages": [{"role": word, "content": text} for word, text in said]}
    spoken = {"conversations": [{"from": word, "value": text} for word, text in said]}
    expected = (Message("developer", "be kind"), Message("user", "hi"), Message("assistant", "hello"))
    for row in (turns, spoken):
        assert read_examples(write(tmp_path, row), roles=roles)[0].messages == expected


@pytest.mark.parametrize("mappings", [{"columns": {"mesages": "x"}}, {"roles": {"bot": "asistant"}}])
def test_mappings_to_what_no_format_knows_are_refused(tmp_path: Path, mappings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"known are|no role") as caught:
        read_examples(write(tmp_path, {"text": "x"}), **mappings)
    assert caught.value.hint.startswith("did you mean")


def test_rows_that_do_not_fit_are_skipped_and_kept_if_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path, {"messages": [USER]}, {"messages": [USER, ASSISTANT]}, {"text": "x"})
    path.write_text(path.read_text() + "{\n")
    skipped: list[Problem] = []
    assert [example.line for example in read_examples(path, skipped=skipped)] == [2]
    assert sorted(problem.where.removeprefix(str(path))[:2] for problem in skipped) == [":1", ":3", ":4"]
    assert read_examples(write(tmp_path, {"messages": [USER]}), skipped=skipped) == []
    assert len(skipped) == 4


def test_a_preference_anywhere_in_a_file_is_refused(tmp_path: Path) -> None:
    good = {"prompt": "a", "completion": "b"}
    for bad in ({"label": False}, {"label": "True"}, {"chosen": "c", "rejected": "d"}):
        with pytest.raises(ContentError, match="a row of preferences") as caught:
            read_examples(write(tmp_path, good, {**good, **bad}))
        assert caught.value.where.endswith(":2")
    named = {**good, "label": "sports"}
    assert len(read_examples(write(tmp_path, good, named))) == 2
    assert len(read_examples(write(tmp_path, {**good, "label": False}), "prompt_completion")) == 1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"foo": 1}, "no function with a name"),
        ({"function": "f"}, "no function with a name"),
        ({"function": {"name": "f", "arguments": "{a: 1"}}, "arguments: broken JSON"),
        ({"function": {"name": "f", "arguments": 7}}, "arguments: a number where an object belongs"),
    ],
)
def test_calls_that_are_none_are_refused_by_their_place(tmp_path: Path, call: Any, words: str) -> None:
    turn = {"role": "assistant", "content": None, "tool_calls": [call]}
    with pytest.raises(ContentError, match=words) as caught:
        read_examples(write(tmp_path, {"messages": [USER, turn]}))
    assert "messages[1].tool_calls[0]" in caught.value.what


def test_a_file_without_assistants_if_asked_for(tmp_path: Path) -> None:
    assert len(read_examples(write(tmp_path, {"messages": [USER]}), require_assistant=False)) == 1


def test_an_unknown_format_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        read_examples(write(tmp_path, {"text": "x"}), "shareGPT")
    assert str(caught.value) == (
        "unknown format shareGPT; the formats are auto, messages, sharegpt, alpaca, prompt_completion, text\n"
        "hint: did you mean sharegpt?"
    )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
TURNS = st.lists(
    st.dictionaries(
        st.sampled_from(["role", "content", "from", "value", "tool_calls", "train", "weight", "name"]),
        JSON | st.sampled_from(["user", "assistant", "gpt", "function_call"]),
    )
    | JSON,
    max_size=3,
)
ROW_KEYS = ["messages", "conversations", "instruction", "input", "output", "history", "prompt", "completion"]
ROW_KEYS += ["text", "system", "tools", "chosen", "label"]


@given(st.dictionaries(st.sampled_from(ROW_KEYS), TURNS | JSON), st.sampled_from(FORMATS))
def test_no_row_escapes_as_another_kind_of_error(value: dict[str, Any], name: str) -> None:
    try:
        example = read(value, name)
    except ContentError as error:
        assert error.where == "train.jsonl:12"
    else:
        assert bool(example.messages) != (example.text is not None)


@pytest.mark.skipif(not (ASSETS / "datasets").is_dir(), reason="no data sets in FTCLI_TEST_ASSETS")
@pytest.mark.parametrize(
    ("name", "rows", "roles"),
    [
        ("alpaca_en_demo", 999, {"user", "assistant"}),
        ("chitchat_400", 400, {"user", "assistant"}),
        ("glaive_toolcall_en_demo", 300, {"user", "assistant", "tool"}),
        ("wiki_demo", 30, set()),
    ],
)
def test_public_data_sets_read_without_a_word(name: str, rows: int, roles: set[str]) -> None:
    examples = read_examples(ASSETS / "datasets" / f"{name}.jsonl")
    assert len(examples) == rows
    assert {message.role for example in examples for message in example.messages} == roles
