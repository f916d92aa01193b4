"""Findings: for each one a case in which it is said, of the right rows, and cases like it in which it is not."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import numpy as np
import pytest
from conftest import CHATML, build_tokenizer
from tokenizers import AddedToken, processors

from ftcli.data.chat import ChatRenderer
from ftcli.data.check import find_overflow, list_findings
from ftcli.data.documents import build_table
from ftcli.data.finding import Finding, check_findings
from ftcli.data.fit import list_template_findings
from ftcli.data.limits import ModelLimits
from ftcli.data.loader import Part, build_set
from ftcli.data.message import Example, Message
from ftcli.errors import ContentError
from ftcli.recipe import DataSection

# short templates in the manner of ChatML, each with one property
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
OPEN, CLOSE = "{{ '<|im_start|>' + m.role + '\n' }}", "{{ '<|im_end|>\n' }}"
LAST_WORD = (  # of earlier turns, only what stands behind the last # is kept
    f"{{% for m in messages %}}{OPEN}{{{{ m.content if loop.last else m.content.split('#')[-1] }}}}{CLOSE}"
    f"{{% endfor %}}{PROMPT}"
)
NO_SYSTEM = f"{{% for m in messages if m.role != 'system' %}}{OPEN}{{{{ m.content }}}}{CLOSE}{{% endfor %}}{PROMPT}"
LATE_SYSTEM = (
    "{% set system = messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | join %}"
    f"{{% for m in messages if m.role != 'system' %}}{OPEN}"
    "{{ system + ' ' if loop.index == (loop.length + 1) // 2 * 2 - 1 }}"
    f"{{{{ m.content }}}}{CLOSE}{{% endfor %}}{PROMPT}"
)
JSON_SYSTEM = (
    f"{{% for m in messages %}}{OPEN}{{{{ m.content | tojson if m.role == 'system' else m.content }}}}{CLOSE}"
    f"{{% endfor %}}{PROMPT}"
)
TOOLS = "{% if tools %}{{ tools | tojson + '\n' }}{% endif %}" + CHATML
WITH_CALLS = (
    f"{{% for m in messages %}}{OPEN}{{{{ m.content or '' }}}}"
    "{% for call in m.tool_calls or [] %}{{ call.function.name + ' ' }}{{ ARGUMENTS }}{% endfor %}"
    f"{CLOSE}{{% endfor %}}{PROMPT}"
)
JSON_CALLS = WITH_CALLS.replace("ARGUMENTS", "call.function.arguments | tojson")
VERBATIM_CALLS = WITH_CALLS.replace("ARGUMENTS", "call.function.arguments")
NAMED_CALLS = WITH_CALLS.replace("{{ ARGUMENTS }}", "")
REASONING = (
    f"{{% for m in messages %}}{OPEN}{{{{ '<think>' + m.reasoning_content + '</think>' if m.reasoning_content }}}}"
    f"{{{{ m.content }}}}{CLOSE}{{% endfor %}}{PROMPT}"
)


def ask(text: str = "fox") -> Message:
    return Message("user", text)


def say(text: str | None = "dog", *, train: bool | None = None, **extra: Any) -> Message:
    return Message("assistant", text, train, extra)


def system(text: str) -> Message:
    return Message("system", text)


def build_example(row: Any, line: int, file: str) -> Example:
    if isinstance(row, str):
        return Example((), row, None, file, line, "text")
    if isinstance(row[0], tuple):
        return Example(row[0], None, row[1], file, line)
    return Example(row, None, None, file, line)


def build_part(renderer: ChatRenderer, rows: Sequence[Any], name: str = "train", train_on: Any = "assistant") -> Part:
    examples = [build_example(row, line, name) for line, row in enumerate(rows, 1)]
    table = build_table(examples, renderer, train_on)
    return Part(name, table, np.ones(len(rows), dtype=bool), np.ones(len(rows)), ())


def inspect(
    *sides: Sequence[Any],
    template: str | None = CHATML,
    limits: ModelLimits | None = None,
    tokenizer: Any = None,
    is_chosen: bool = False,
    max_length: int | None = None,
    train_on: Any = "assistant",
) -> list[Finding]:
    """All findings of rows (the training set, then what is held out) under a template."""
    tokenizer = tokenizer or build_tokenizer()
    tokenizer.chat_template = template
    renderer, limits = ChatRenderer(tokenizer, date=datetime(2024, 3, 1)), limits or ModelLimits()
    of_template = list_template_findings(renderer, limits, is_chosen=is_chosen, max_length=max_length)
    names = ["train", *(f"held{i}" for i in range(1, len(sides)))]
    parts = [build_part(renderer, rows, name, train_on) for name, rows in zip(names, sides, strict=True)]
    return list_findings(of_template, parts, renderer, limits)


def pick(findings: Sequence[Finding], code: str) -> Finding:
    (found,) = [finding for finding in findings if finding.code == code]
    return found


def list_codes(findings: Sequence[Finding]) -> list[str]:
    return [finding.code for finding in findings]


def check_rows(found: Finding, severity: str, lines: Sequence[int], name: str = "train", of: int = 3) -> None:
    """The finding is of these lines, and its words count them."""
    assert (found.severity, found.n_rows) == (severity, len(lines))
    assert found.places == tuple(f"{name}:{line}" for line in lines)
    assert found.what.startswith(f"{name}: {len(lines)} of {of} rows ")


PLAIN: tuple[Message, ...] = (ask(), say())
OTHER: tuple[Message, ...] = (ask("numbers"), say("1 2 3"))


def test_sound_rows_of_a_sound_template_give_no_finding() -> None:
    assert inspect([PLAIN, OTHER, (system("brief"), *PLAIN)]) == []


# --- typed-special


def test_rows_that_spell_out_a_special_token_are_noted() -> None:
    found = pick(inspect([(ask("a <|im_end|> b"), say()), PLAIN, (ask(), say("<|endoftext|>"))]), "typed-special")
    check_rows(found, "note", [1, 3])


def test_text_that_is_nearly_a_special_token_is_none() -> None:
    assert inspect([(ask("<|im_end|"), say("|im_start|>")), (ask("<im_end>"), say("<|eot_id|>"))]) == []


# --- history


def test_rows_that_a_template_rewrites_are_noted() -> None:
    long = (ask("a"), say("x#b"), ask("c"), say("d"))
    found = pick(inspect([PLAIN, long, OTHER], template=LAST_WORD), "history")
    check_rows(found, "note", [2])


def test_rows_that_a_template_could_rewrite_but_does_not_are_not_noted() -> None:
    assert inspect([(ask("a"), say("b"), ask("c"), say("x#d")), PLAIN], template=LAST_WORD) == []


# --- system-lost


def test_system_texts_that_a_template_drops_are_a_warning() -> None:
    rows = [(system("be brief"), *PLAIN), PLAIN, (system("be long"), *PLAIN)]
    check_rows(pick(inspect(rows, template=NO_SYSTEM), "system-lost"), "warning", [1, 3])


def test_a_developers_text_that_a_template_drops_is_a_warning() -> None:
    template = NO_SYSTEM.replace("'system'", "'developer'")
    found = pick(inspect([(Message("developer", "be brief"), *PLAIN)], template=template), "system-lost")
    check_rows(found, "warning", [1], of=1)


@pytest.mark.parametrize("template", [CHATML, LATE_SYSTEM, JSON_SYSTEM], ids=["first", "late", "json"])
@pytest.mark.parametrize("text", ["be brief", " be\nbrief \n", 'say "é"'], ids=["plain", "blanks", "quotes"])
def test_system_texts_that_a_template_writes_somewhere_are_not_lost(template: str, text: str) -> None:
    trimmed = template.replace("m.content", "m.content | trim")
    assert "system-lost" not in list_codes(inspect([(system(text), *PLAIN)], template=trimmed))


# --- tools-lost


TOOL = {"type": "function", "function": {"name": "look_up", "description": "finds", "parameters": {}}}


def test_tools_that_a_template_does_not_write_are_a_warning() -> None:
    found = pick(inspect([PLAIN, (OTHER, (TOOL,)), (PLAIN, (TOOL, TOOL))]), "tools-lost")
    check_rows(found, "warning", [2, 3])


@pytest.mark.parametrize("tool", [TOOL, TOOL["function"]], ids=["framed", "bare"])
def test_tools_that_a_template_writes_are_not_lost(tool: Any) -> None:
    assert inspect([(PLAIN, (tool,)), OTHER], template=TOOLS) == []


def test_one_lost_tool_of_two_is_a_warning() -> None:
    template = TOOLS.replace("tools |", "tools[:1] |")
    tools = (TOOL, {"name": "forget"})
    assert list_codes(inspect([(PLAIN, tools)], template=template)) == ["tools-lost"]


# --- tool-calls-lost, tool-calls-quoted


def call(arguments: Any, name: str = "look_up") -> dict[str, Any]:
    return {"tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}]}


def test_tool_calls_that_a_template_does_not_write_are_a_warning() -> None:
    rows = [(ask(), say(None, **call({"word": "cat"}))), PLAIN, (ask(), say("wait", **call({"word": "cat"})))]
    check_rows(pick(inspect(rows), "tool-calls-lost"), "warning", [1, 3])


def test_arguments_that_a_template_does_not_write_are_a_warning() -> None:
    rows = [(ask(), say(None, **call({"word": "cat"}))), (ask(), say(None, **call({})))]
    check_rows(pick(inspect(rows, template=NAMED_CALLS), "tool-calls-lost"), "warning", [1], of=2)


@pytest.mark.parametrize(
    "arguments",
    [{"word": "cat", "n": 3, "all": True}, {"word": 'a "b"\n\\'}, {"word": "é"}, {"at": {"x": 1.50}, "of": [1]}, {}],
    ids=["plain", "escaped", "beyond ascii", "nested", "none"],
)
def test_arguments_that_a_template_writes_as_json_are_neither_lost_nor_quoted(arguments: dict[str, Any]) -> None:
    assert inspect([(ask(), say(None, **call(arguments)))], template=JSON_CALLS) == []


def test_arguments_that_are_encoded_twice_are_a_warning() -> None:
    rows = [(ask(), say(None, **call({"word": "cat"}))), (ask(), say(None, **call('{"word": "cat"}')))]
    found = inspect(rows, template=JSON_CALLS)
    check_rows(pick(found, "tool-calls-quoted"), "warning", [2], of=2)
    assert "tool-calls-lost" not in list_codes(found)


def test_arguments_as_text_that_are_written_as_they_are_are_not_quoted() -> None:
    assert inspect([(ask(), say(None, **call('{"word": "cat"}')))], template=VERBATIM_CALLS) == []


# --- reasoning-lost


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_that_a_template_does_not_write_is_a_warning(key: str) -> None:
    rows = [PLAIN, (ask(), say(**{key: "so it is"})), (ask(), say(**{key: "thus"}))]
    check_rows(pick(inspect(rows), "reasoning-lost"), "warning", [2, 3])


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_that_a_template_writes_is_not_lost(key: str) -> None:
    assert inspect([(ask(), say(**{key: " so it is\n"})), OTHER], template=REASONING) == []


def test_reasoning_that_is_blank_is_not_lost() -> None:
    assert inspect([(ask(), say(reasoning_content=" \n"))]) == []


def test_reasoning_that_is_hidden_in_later_turns_alone_is_not_lost() -> None:
    template = REASONING.replace("if m.reasoning_content", "if m.reasoning_content and loop.last")
    rows = [(ask(), say(reasoning_content="so"), ask("b"), say("c", reasoning_content="thus"))]
    assert list_codes(inspect(rows, template=template)) == ["history"]


# --- vocabulary


def add_token(tokenizer: Any, text: str, *, special: bool = False) -> int:
    tokenizer.add_tokens([AddedToken(text, special=special, normalized=False)])
    return int(tokenizer.convert_tokens_to_ids(text))


def test_rows_with_tokens_that_the_model_has_no_row_for_are_an_error() -> None:
    tokenizer = build_tokenizer()
    number = add_token(tokenizer, "snowman")
    rows = [PLAIN, (ask("a snowman"), say()), (ask("b"), say("snowman snowman"))]
    found = pick(inspect(rows, tokenizer=tokenizer, limits=ModelLimits(embedding_rows=number)), "vocabulary")
    check_rows(found, "error", [2, 3])
    assert f"such as {number} (its embedding has {number} rows)" in found.what


def test_the_last_row_of_an_embedding_is_a_row() -> None:
    tokenizer = build_tokenizer()
    number = add_token(tokenizer, "snowman")
    rows = [(ask("a snowman"), say())]
    assert inspect(rows, tokenizer=tokenizer, limits=ModelLimits(embedding_rows=number + 1)) == []


def test_held_out_rows_with_unknown_tokens_are_of_their_own_side() -> None:
    tokenizer = build_tokenizer()
    number = add_token(tokenizer, "snowman")
    sides = [PLAIN], [OTHER, (ask("a snowman"), say())]
    found = pick(inspect(*sides, tokenizer=tokenizer, limits=ModelLimits(embedding_rows=number)), "vocabulary")
    check_rows(found, "error", [2], name="held1", of=2)


# --- double-bos, no-bos


def build_with_bos(*, adds: bool) -> Any:
    tokenizer = build_tokenizer()
    number = add_token(tokenizer, "<s>", special=True)
    tokenizer.bos_token = "<s>"
    if adds:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", number)]
        )
    return tokenizer


def test_rows_that_begin_with_bos_twice_are_an_error() -> None:
    template = "{{ bos_token + (bos_token if messages[0].content == 'twice' else '') }}" + CHATML
    rows = [PLAIN, (ask("twice"), say()), OTHER]
    check_rows(pick(inspect(rows, template=template, tokenizer=build_with_bos(adds=True)), "double-bos"), "error", [2])


def test_one_bos_of_the_template_and_one_typed_are_not_two() -> None:
    template = "{{ bos_token }}{% for m in messages %}{{ m.content + '<|im_end|>' }}{% endfor %}"
    rows = [(ask("<s>"), say()), (ask(), say())]
    found = inspect(rows, template=template, tokenizer=build_with_bos(adds=True))
    assert list_codes(found) == ["typed-special"]


def test_rows_without_the_bos_that_a_tokenizer_puts_before_texts_are_a_warning() -> None:
    template = "{{ bos_token if messages[0].content == 'once' else '' }}" + CHATML
    rows = [PLAIN, (ask("once"), say()), "a text", OTHER]
    found = pick(inspect(rows, template=template, tokenizer=build_with_bos(adds=True)), "no-bos")
    check_rows(found, "warning", [1, 4], of=4)


def test_rows_without_bos_are_fine_for_a_tokenizer_that_adds_none() -> None:
    assert inspect([PLAIN, OTHER], tokenizer=build_with_bos(adds=False)) == []


# --- no-target


def test_rows_without_anything_to_learn_are_a_warning() -> None:
    rows = [(ask(), say(train=False)), PLAIN, (ask("b"), say(train=False), ask("c"), say("d", train=False))]
    check_rows(pick(inspect(rows), "no-target"), "warning", [1, 3])


def test_rows_with_one_turn_to_learn_are_not_without() -> None:
    assert inspect([(ask(), say(train=False), ask("b"), say("c"))]) == []


def test_rows_without_a_role_that_is_trained_are_a_warning() -> None:
    rows = [(system("brief"), *PLAIN), OTHER, PLAIN]
    check_rows(pick(inspect(rows, train_on=["system"]), "no-target"), "warning", [2, 3])


# --- duplicates, overlap


def test_rows_that_stand_in_the_data_before_are_a_warning() -> None:
    found = pick(inspect([PLAIN, OTHER, PLAIN, PLAIN, (ask(), say("cat")), OTHER]), "duplicates")
    check_rows(found, "warning", [3, 4, 6], of=6)


def test_rows_that_differ_in_a_blank_or_in_tools_are_no_duplicates() -> None:
    rows = [PLAIN, (ask("fox "), say()), (PLAIN, (TOOL,)), "fox dog"]
    assert "duplicates" not in list_codes(inspect(rows, template=TOOLS))


def test_duplicates_are_counted_on_each_side_for_itself() -> None:
    found = [f for f in inspect([PLAIN, OTHER], [PLAIN, PLAIN, OTHER]) if f.code == "duplicates"]
    (held_out,) = found
    check_rows(held_out, "warning", [2], name="held1")


def test_held_out_rows_that_are_trained_on_are_a_warning() -> None:
    found = pick(inspect([PLAIN, OTHER], [(ask("b"), say()), OTHER, PLAIN]), "overlap")
    check_rows(found, "warning", [2, 3], name="held1")


def test_held_out_rows_that_are_held_out_twice_do_not_overlap() -> None:
    assert "overlap" not in list_codes(inspect([PLAIN], [OTHER], [OTHER]))


def test_only_rows_of_the_training_side_of_a_split_overlap() -> None:
    tokenizer = build_tokenizer()
    renderer = ChatRenderer(tokenizer)
    whole = build_part(renderer, [PLAIN, OTHER, PLAIN])
    is_held = np.array([False, True, False])
    train = Part("train", whole.table, ~is_held, whole.weight, ())
    val = Part("val", whole.table, is_held, whole.weight, ())
    findings = list_findings([], [train, val], renderer, ModelLimits())
    assert list_codes(findings) == ["duplicates"]
    check_rows(findings[0], "warning", [3], of=2)


# --- overflow


def overflow(policy: Any, max_length: int) -> list[Finding]:
    rows = [PLAIN, (ask("dog " * 40), say()), (ask(), say("dog " * 50))]
    part = build_part(ChatRenderer(build_tokenizer()), rows)
    return list(find_overflow(build_set(part, DataSection(max_length=max_length, overflow=policy))))


@pytest.mark.parametrize(
    ("policy", "words"), [("drop", "are dropped"), ("truncate", "are cut"), ("split", "are split")]
)
def test_rows_that_are_too_long_are_a_warning_that_says_what_becomes_of_them(policy: str, words: str) -> None:
    (found,) = overflow(policy, 48)
    check_rows(found, "warning", [2, 3])
    assert found.code == "overflow"
    assert found.what.endswith(f"are longer than data.max_length and {words}")


@pytest.mark.parametrize("policy", ["drop", "truncate", "split", "error"])
def test_rows_that_fit_do_not_overflow(policy: str) -> None:
    assert overflow(policy, 512) == []


# --- template-tokens


LACKING = CHATML.replace("<|im_start|>", "<|start_header_id|>") + "{{ '<|eom_id|>' if messages | length > 99 }}"


def test_tokens_that_the_vocabulary_lacks_are_an_error() -> None:
    found = pick(inspect([PLAIN], template=LACKING), "template-tokens")
    assert (found.severity, found.n_rows) == ("error", 0)
    assert found.what.endswith("lacks 1 of the tokens that the chat template writes: <|start_header_id|>")
    assert 'tokenizer.add_tokens: ["<|start_header_id|>"]' in found.hint


def test_a_chosen_template_may_lack_none_of_its_tokens_even_of_rare_branches() -> None:
    found = pick(inspect([PLAIN], template=LACKING, is_chosen=True), "template-tokens")
    assert found.what.endswith("lacks 2 of the tokens that the chat template writes: <|start_header_id|>, <|eom_id|>")


def test_a_models_own_template_may_know_tokens_that_a_usual_chat_does_not_need() -> None:
    template = CHATML + "{{ '<|eom_id|>' if messages | length > 99 }}"
    assert inspect([PLAIN], template=template, is_chosen=False) == []


BRACKETS = (
    "{% for m in messages %}{{ '[INST] ' + m.content + '[/INST]' if m.role == 'user' else m.content + '<|im_end|>' }}"
    "{% endfor %}"
)


def test_brackets_of_a_chosen_template_are_tokens() -> None:
    found = pick(inspect([PLAIN], template=BRACKETS, is_chosen=True), "template-tokens")
    assert found.what.endswith("lacks 2 of the tokens that the chat template writes: [INST], [/INST]")


def test_brackets_of_a_models_own_template_may_be_text() -> None:
    assert inspect([PLAIN], template=BRACKETS, is_chosen=False) == []


@pytest.mark.parametrize(
    "addition",
    ["{# <|eot_id|> #}", "{{ '<|' + messages[0].role + '|>' if false }}", "{{ '<|' ~ 'x' ~ '|>' if false }}"],
    ids=["comment", "made of parts", "joined"],
)
def test_what_only_looks_like_a_token_in_the_source_is_none(addition: str) -> None:
    assert inspect([PLAIN], template=addition + CHATML, is_chosen=True) == []


def test_tokens_that_were_added_are_not_lacking() -> None:
    tokenizer = build_tokenizer()
    add_token(tokenizer, "<|eot_id|>", special=True)
    template = CHATML.replace("<|im_end|>", "<|eot_id|>")
    assert "template-tokens" not in list_codes(inspect([PLAIN], template=template, tokenizer=tokenizer))


# --- stop-token, eos, generation-eos


def list_of_template(template: str, limits: ModelLimits | None = None, tokenizer: Any = None) -> list[Finding]:
    tokenizer = tokenizer or build_tokenizer()
    tokenizer.chat_template = template
    return list_template_findings(
        ChatRenderer(tokenizer), limits or ModelLimits(), is_chosen=False, max_length=None
    )  # rows of these templates cannot be rendered


NO_END = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"


def test_a_template_that_ends_no_turn_is_an_error() -> None:
    found = pick(list_of_template(NO_END), "stop-token")
    assert found.severity == "error"
    assert "no end-of-turn token" in found.what


def test_a_tokenizer_without_a_template_lacks_no_stop_token() -> None:
    assert inspect(["a text"], template=None) == []


def test_an_end_of_sequence_that_ends_no_turn_is_noted() -> None:
    tokenizer = build_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    found = pick(inspect([PLAIN], tokenizer=tokenizer), "eos")
    assert found.severity == "note"
    assert "ends a turn with <|im_end|>, the tokenizer's end of sequence is <|endoftext|>" in found.what


def test_an_end_of_sequence_that_ends_turns_of_calls_alone_is_none_to_note() -> None:
    tokenizer = build_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    template = (
        f"{{% for m in messages %}}{OPEN}{{{{ m.tool_calls | tojson if m.tool_calls else m.content }}}}"
        "{{ '<|endoftext|>' if m.tool_calls else '<|im_end|>' }}"
        f"{{% endfor %}}{PROMPT}"
    )
    assert list_of_template(template, tokenizer=tokenizer) == []


def test_a_generation_config_that_stops_elsewhere_is_noted() -> None:
    tokenizer = build_tokenizer()
    (number,) = tokenizer.convert_tokens_to_ids(["<|endoftext|>"])
    found = pick(inspect([PLAIN], limits=ModelLimits(eos_ids=(number,))), "generation-eos")
    assert found.severity == "note"
    assert "ends a turn with <|im_end|>, the model's generation_config stops at <|endoftext|>" in found.what


def test_a_generation_config_that_stops_at_the_turns_end_among_others_is_fine() -> None:
    numbers = build_tokenizer().convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert inspect([PLAIN], limits=ModelLimits(eos_ids=tuple(numbers))) == []


# --- vocabulary-size, context, dated


def test_more_entries_than_rows_of_the_embedding_are_a_warning() -> None:
    tokenizer = build_tokenizer()
    number = add_token(tokenizer, "snowman")
    found = pick(inspect([PLAIN], tokenizer=tokenizer, limits=ModelLimits(embedding_rows=number)), "vocabulary-size")
    assert found.severity == "warning"
    assert found.what == f"the tokenizer has {number + 1} entries, the model's embedding {number} rows"


def test_as_many_or_fewer_entries_than_rows_are_fine() -> None:
    n_entries = max(build_tokenizer().get_vocab().values()) + 1
    for rows in (n_entries, n_entries + 1):
        assert inspect([PLAIN], limits=ModelLimits(embedding_rows=rows)) == []


def test_a_max_length_beyond_the_context_is_an_error() -> None:
    found = pick(inspect([PLAIN], limits=ModelLimits(context=4096), max_length=4097), "context")
    assert found.severity == "error"
    assert found.what == "data.max_length is 4,097, the model's context 4,096 tokens"


@pytest.mark.parametrize(("context", "max_length"), [(4096, 4096), (4096, None), (None, 4096)])
def test_a_max_length_within_the_context_is_fine(context: int | None, max_length: int | None) -> None:
    assert inspect([PLAIN], limits=ModelLimits(context=context), max_length=max_length) == []


def test_a_template_that_writes_the_date_is_noted_with_the_date_of_the_run() -> None:
    found = pick(inspect([PLAIN], template="{{ strftime_now('%Y') }}" + CHATML), "dated")
    assert found.severity == "note"
    assert "which is 01 Mar 2024 for the whole run" in found.what


def test_what_is_said_of_a_template_is_not_said_to_raw_texts() -> None:
    template = "{{ strftime_now('%Y') }}" + NO_END + "{{ '<|eot_id|>' }}"
    limits = ModelLimits(embedding_rows=8, context=64, eos_ids=(0,))
    findings = inspect(["fox", "dog"], template=template, limits=limits, max_length=128)
    assert set(list_codes(findings)) == {"vocabulary-size", "context", "vocabulary"}


# --- what becomes of findings


def make_errors() -> dict[str, list[Finding]]:
    tokenizer = build_tokenizer()
    number = add_token(tokenizer, "snowman")
    twice = "{{ bos_token + bos_token }}" + CHATML
    lacking = CHATML.replace("<|im_end|>", "<|eot_id|>")
    snowman = [(ask("snowman"), say())]
    return {
        "vocabulary": inspect(snowman, tokenizer=tokenizer, limits=ModelLimits(embedding_rows=number)),
        "double-bos": inspect([PLAIN], template=twice, tokenizer=build_with_bos(adds=True)),
        "template-tokens": list_of_template(lacking),
        "stop-token": list_of_template(NO_END),
        "context": inspect([PLAIN], limits=ModelLimits(context=8), max_length=9),
    }


def test_each_error_stops_with_its_own_words() -> None:
    for code, findings in make_errors().items():
        with pytest.raises(ContentError) as caught:
            check_findings(findings)
        assert caught.value.what == pick(findings, code).what
        assert caught.value.hint == pick(findings, code).hint


def test_an_error_of_rows_names_the_first() -> None:
    with pytest.raises(ContentError) as caught:
        check_findings(make_errors()["vocabulary"])
    assert caught.value.where == "train:1"


def test_all_errors_are_told_at_once() -> None:
    errors = [finding for findings in make_errors().values() for finding in findings if finding.severity == "error"]
    with pytest.raises(ContentError) as caught:
        check_findings(errors)
    assert caught.value.what.splitlines() == [error.what for error in errors]
    assert len(errors) == 5


def test_warnings_and_notes_do_not_stop() -> None:
    rows = [(system("x <|im_end|>"), *PLAIN), (system("brief"), *PLAIN), (system("brief"), *PLAIN)]
    findings = inspect(rows, template=NO_SYSTEM)
    assert {finding.severity for finding in findings} == {"warning", "note"}
    check_findings(findings)


def test_the_first_five_rows_are_named_and_all_are_counted() -> None:
    found = pick(inspect([PLAIN] * 1300), "duplicates")
    assert found.n_rows == 1299
    assert found.what.startswith("train: 1,299 of 1,300 rows ")
    assert found.places == ("train:2", "train:3", "train:4", "train:5", "train:6")
