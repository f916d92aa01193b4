"""The Modelfile: its TEMPLATE, run by Go, writes what the chat template writes, run by transformers."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import CHATML, SMOLLM2, build_tokenizer, find_tokenizer

from ftcli.data.chat import ChatRenderer
from ftcli.data.template import read_template
from ftcli.data.tokenizer import load_tokenizer
from ftcli.gguf.modelfile import build_modelfile, quote_literal
from ftcli.store.target import ModelFiles, find_model

# what Ollama does around a TEMPLATE: messages of one role in a row are joined, all system texts are also one
OLLAMA = r"""
package main

import (
	"bytes"
	"encoding/json"
	"os"
	"strings"
	"text/template"
	"time"
)

type Message struct{ Role, Content, Thinking string }

type Case struct {
	Template string
	Messages []*Message
}

type Result struct{ Text, Error string }

func collate(given []*Message) (string, []*Message) {
	var system []string
	var joined []*Message
	for _, message := range given {
		if message.Role == "system" {
			system = append(system, message.Content)
		}
		if n := len(joined); n > 0 && joined[n-1].Role == message.Role {
			joined[n-1].Content += "\n\n" + message.Content
		} else {
			joined = append(joined, message)
		}
	}
	return strings.Join(system, "\n\n"), joined
}

func render(c Case) (string, error) {
	functions := template.FuncMap{
		"json":        func(v any) string { b, _ := json.Marshal(v); return string(b) },
		"currentDate": func(...string) string { return time.Now().Format("2006-01-02") },
	}
	parsed, err := template.New("").Option("missingkey=zero").Funcs(functions).Parse(c.Template)
	if err != nil {
		return "", err
	}
	system, messages := collate(c.Messages)
	values := map[string]any{"System": system, "Messages": messages, "Tools": nil, "Response": "", "Think": false}
	var b bytes.Buffer
	err = parsed.Execute(&b, values)
	return b.String(), err
}

func main() {
	var cases []Case
	if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil {
		panic(err)
	}
	results := []Result{}
	for _, c := range cases {
		text, err := render(c)
		if err != nil {
			results = append(results, Result{"", err.Error()})
		} else {
			results = append(results, Result{text, ""})
		}
	}
	json.NewEncoder(os.Stdout).Encode(results)
}
"""
PHI3 = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
GEMMA2 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}{% set rules = messages[0]['content'] %}"
    "{% else %}{% set turns = messages %}{% set rules = false %}{% endif %}{% for message in turns %}"
    "{% if loop.index0 == 0 and rules %}{% set content = '<<SYS>>\n' + rules + '\n<</SYS>>\n\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% else %}"
    "{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL_OFFICIAL = (  # the system text only where the last message is a question
    "{% set rules = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}"
    "{% set turns = messages[1:] if rules else messages %}{{ bos_token }}{% for message in turns %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' }}{% if loop.last and rules %}{{ rules + '\n\n' }}{% endif %}"
    "{{ message['content'] + '[/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
DEFAULTED = (  # a system turn of its own where there is none, and braces in what it writes
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are {{Qwen}} of {2024}.<|im_end|>\n' }}"
    "{% endif %}" + CHATML.replace("\n", "\\n")
)
TOPPED = (  # one system turn, at the top
    "{% set rules = messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | join('\n\n') %}"
    "{{ '<|im_start|>system\nYour rules: ' + (rules or 'none') + '<|im_end|>\n' }}"
    "{% for message in messages | rejectattr('role', 'equalto', 'system') %}" + CHATML.partition("%}")[2]
)
DATED = "{{ 'Today: ' + strftime_now('%d %b %Y') + '\n' }}" + CHATML
PRICKLY = CHATML.replace("'<|im_start|>' +", '\'<|im_start|>{{ .X }} """ \\\\ \u200b\u2581\U0001f600{\' +')
OWN = {
    "phi3": PHI3,
    "gemma2": GEMMA2,
    "llama2": LLAMA2,
    "mistral-final": MISTRAL_OFFICIAL,
    "defaulted": DEFAULTED,
    "prickly": PRICKLY,
    "dated": DATED,
    "topped": TOPPED,
    "bundled-chatml": read_template("chatml"),
    "bundled-llama3": read_template("llama3"),
    "bundled-mistral": read_template("mistral"),
}
ASSETS = ["llama-3.1", "qwen3", "mistral-7b-v0.3", "phi-3", "gemma-3"]
_CONTROL = re.compile(r"<\|[a-z_]+\|>|</?s>|<(?:start|end)_of_turn>")


def build_own(template: str, **tokens: str) -> Any:
    """A small tokenizer with a chat template, and with the control tokens that it writes."""
    tokenizer = build_tokenizer()
    tokens = {"bos_token": "<s>", "eos_token": "</s>", **tokens}
    added = sorted({*_CONTROL.findall(template), *tokens.values()})
    tokenizer.add_special_tokens({"additional_special_tokens": added, **tokens})
    tokenizer.chat_template = template
    return tokenizer


@cache
def load_named(name: str) -> Any:
    """A tokenizer of the tests: a small one with a template of its own, or a real one."""
    if name in OWN:
        return build_own(OWN[name])
    if name == "smollm2":
        return load_tokenizer(find_model(SMOLLM2))
    return load_tokenizer(ModelFiles(name, find_tokenizer(name)))


def build(tokenizer: Any, variables: dict[str, Any] | None = None, **options: Any) -> Any:
    options = {"n_context": 4096, "adds_bos": False, **options}
    return build_modelfile("m-Q8_0.gguf", ChatRenderer(tokenizer, variables), **options)


def read_modelfile(text: str) -> list[tuple[str, str]]:
    """The instructions of a Modelfile and their values, as its documentation has it."""
    instruction = re.compile(r'(?:#[^\n]*|([A-Z]+ (?:stop )?)(?:"""(.*?)"""|"([^"\n]*)"|([^"\n]*)))\n', re.DOTALL)
    found, position = [], 0
    while position < len(text):
        match = instruction.match(text, position)
        assert match, text[position:]
        if match.group(1):
            name, _, rest = match.group(1).partition(" ")
            found.append((name, rest + next(value for value in match.groups()[1:] if value is not None)))
        position = match.end()
    return found


def read_value(text: str, name: str) -> str:
    (value,) = [value for key, value in read_modelfile(text) if key == name]
    return value


def make_turns(roles: str, *, has_reasoning: bool = False) -> list[dict[str, str]]:
    """Messages by the first letters of their roles, each with a text of its own that could be taken for code."""
    names = {"s": "system", "u": "user", "a": "assistant"}
    turns = []
    for i, letter in enumerate(roles):
        turn = {
            "role": names[letter],
            "content": f'{i}: {{{{ .Role }}}} "x" <b> \\n & {{% if %}}\n\n  é 日本 #{letter}',
        }
        if has_reasoning and letter == "a":
            turn["reasoning_content"] = f"because {i}\nand {{{{ more }}}}"
        turns.append(turn)
    return turns


def render_reference(tokenizer: Any, turns: list[dict[str, str]], variables: dict[str, Any]) -> str:
    """What transformers gives the model to go on from ``turns``."""
    is_answered = turns[-1]["role"] == "assistant"
    options: dict[str, Any] = {"continue_final_message": True} if is_answered else {"add_generation_prompt": True}
    return str(tokenizer.apply_chat_template(turns, tokenize=False, **options, **variables))


# --- what is written ---------------------------------------------------------------------------------------------


def test_a_modelfile_names_the_file_its_stop_and_its_context() -> None:
    made = build(build_own(CHATML), system="Be brief.\nBe kind.", others=["m-Q4_K_M.gguf"], n_context=2048)
    values = read_modelfile(made.text)
    assert [key for key, _ in values] == ["FROM", "TEMPLATE", "SYSTEM", "PARAMETER", "PARAMETER"]
    assert values[0] == ("FROM", "./m-Q8_0.gguf")
    assert values[2:] == [
        ("SYSTEM", "Be brief.\nBe kind."),
        ("PARAMETER", "stop <|im_end|>"),
        ("PARAMETER", "num_ctx 2048"),
    ]
    assert "# FROM ./m-Q4_K_M.gguf\n" in made.text
    assert made.problem == ""


def test_a_template_can_be_read() -> None:
    assert read_value(build(build_own(CHATML)).text, "TEMPLATE") == (
        "{{ range $i, $_ := .Messages }}{{ $final := eq (len (slice $.Messages $i)) 1 }}"
        '{{ if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n'
        "{{ .Content }}{{ if not $final }}<|im_end|>\n{{ end }}"
        '{{ else if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n{{ end }}'
        '{{ if and $final (ne .Role "assistant") }}<|im_start|>assistant\n{{ end }}{{ end }}'
    )


def test_a_stop_with_a_quote_in_it_is_one() -> None:
    made = build(build_own(CHATML.replace("<|im_end|>", '<|"|>'), eos_token='<|"|>'))
    stops = [value for key, value in read_modelfile(made.text) if key == "PARAMETER" and value.startswith("stop")]
    assert stops == ['stop <|"|>']


def test_an_unknown_family_has_a_template_if_it_has_a_shape() -> None:
    made = build(build_own(CHATML.replace("im_", "odd_")))
    assert made.problem == ""
    assert "<|odd_start|>user" in read_value(made.text, "TEMPLATE")


def test_bos_is_written_by_one_of_both() -> None:
    tokenizer = build_own(read_template("llama3"))
    kept, left = (read_value(build(tokenizer, adds_bos=adds).text, "TEMPLATE") for adds in (False, True))
    assert (kept.count("<s>"), left.count("<s>")) == (1, 0)
    assert kept == "<s>" + left


def test_a_model_without_a_chat_template_is_given_the_text() -> None:
    made = build_modelfile("m.gguf", None, n_context=512, adds_bos=True, system="Be brief.")
    values = [("FROM", "./m.gguf"), ("TEMPLATE", "{{ .Prompt }}"), ("PARAMETER", "num_ctx 512")]
    assert read_modelfile(made.text) == values
    assert "no SYSTEM" in made.problem
    assert not build_modelfile("m.gguf", None, n_context=512, adds_bos=True).problem
    bare = build_tokenizer()
    bare.chat_template = None
    assert build(bare).text == build_modelfile("m-Q8_0.gguf", None, n_context=4096, adds_bos=False).text


def test_the_date_of_the_training_is_said() -> None:
    renderer = ChatRenderer(build_own(DATED), date=datetime(2024, 7, 26))
    made = build_modelfile("m.gguf", renderer, n_context=512, adds_bos=False)
    assert read_value(made.text, "TEMPLATE").startswith("Today: 26 Jul 2024\n{{ range ")
    assert "# The date" in made.text
    assert "# The date" not in build(build_own(CHATML)).text


# --- what is not written, and said -------------------------------------------------------------------------------

SHAPELESS = {
    "every second question is another": CHATML.replace(
        "'<|im_start|>' + message['role']",
        "('<|im_start|>' if loop.index0 % 4 == 0 or message['role'] != 'user' else '<|im_end|>') + message['role']",
    ),
    "contents are JSON": CHATML.replace("message['content']", "message['content'] | tojson"),
    "contents are changed": CHATML.replace("message['content']", "message['content'] | upper"),
    "the third question is counted": CHATML.replace(
        "message['role']", "message['role'] + (' again' if loop.index0 == 4 else '')"
    ),
    "the system text is written twice": CHATML + "{{ messages[0]['content'] if messages[0]['role'] == 'system' }}",
    "an answer that is continued is cut": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + "
    "(m['content'].split(' ')[0] if loop.last and m['role'] == 'assistant' and loop.length > 4 else m['content']) + "
    "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "only tools are taken": "{% for tool in tools %}{{ tool }}{% endfor %}" + CHATML,
    "it fails": "{{ raise_exception('not today') }}<|im_end|>",
}


@pytest.mark.parametrize("name", SHAPELESS)
def test_a_template_of_no_shape_is_said_and_not_guessed(name: str) -> None:
    made = build(build_own(SHAPELESS[name]))
    assert "there is no Ollama TEMPLATE: " in made.problem
    assert "TEMPLATE" not in [key for key, _ in read_modelfile(made.text)]
    assert "# there is no Ollama TEMPLATE: " in made.text
    assert "\n" not in made.problem


def test_a_template_without_an_end_of_turn_has_no_stop_which_is_said() -> None:
    made = build(build_own(CHATML.replace("<|im_end|>", "")))
    assert "no stop" in made.problem
    assert "stop" not in [value.split()[0] for key, value in read_modelfile(made.text) if key == "PARAMETER"]


def test_a_system_text_that_a_modelfile_cannot_hold_is_said() -> None:
    tokenizer = build_own(CHATML)
    made = build(tokenizer, system='say """this"""\nor that')
    assert '"""' in made.problem
    assert "SYSTEM" not in [key for key, _ in read_modelfile(made.text)]
    made = build(tokenizer, system="non\u00a0breaking\nlines\tand tabs")
    assert "U+00A0" in made.problem
    assert "U+000A" not in made.problem
    assert build(tokenizer, system='quotes: "a", \'b\', ""').problem == ""


def test_a_system_text_that_the_template_refuses_is_said() -> None:
    made = build(build_own(GEMMA2), system="Be brief.")
    assert "takes no system text" in made.problem
    assert "SYSTEM" not in [key for key, _ in read_modelfile(made.text)]
    assert read_value(made.text, "TEMPLATE")


@pytest.mark.parametrize(
    ("text", "literal"),
    [
        ("<|im_start|>user\n", "<|im_start|>user\n"),
        ("a {{ b }} {", 'a {{ "{{" }} b }} {{ "{" }}'),
        ('"a" """', '"a" {{ "\\"\\"\\"" }}'),
        ("<｜User｜>▁é", "<｜User｜>▁é"),
        ("a\u00a0\r\tb", 'a{{ "\\U000000a0\\r\\t" }}b'),
        ("\\n", "\\n"),
    ],
)
def test_literals_are_quoted_only_where_they_must_be(text: str, literal: str) -> None:
    assert quote_literal(text) == literal


# --- run by Go ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ollama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function ((TEMPLATE, messages) pairs → texts) that does what Ollama does."""
    go = shutil.which("go")
    if not go:
        pytest.skip("there is no Go: apt-get install golang-go")
    folder = tmp_path_factory.mktemp("go")
    (folder / "main.go").write_text(OLLAMA)
    program = folder / "ollama"
    environment = {**os.environ, "GOTOOLCHAIN": "local", "GOPROXY": "off", "GO111MODULE": "off"}
    environment.setdefault("GOCACHE", str(folder / "cache"))
    subprocess.run([go, "build", "-o", str(program), "main.go"], cwd=folder, env=environment, check=True)

    def run(pairs: list[tuple[str, list[dict[str, str]]]]) -> list[str]:
        cases = [{"Template": template, "Messages": [_name_fields(m) for m in turns]} for template, turns in pairs]
        done = subprocess.run([program], input=json.dumps(cases).encode(), capture_output=True, check=True)
        results = json.loads(done.stdout)
        assert len(results) == len(pairs)
        assert not [result["Error"] for result in results if result["Error"]]
        return [result["Text"] for result in results]

    return run


def _name_fields(message: dict[str, str]) -> dict[str, str]:
    return {
        "Role": message["role"],
        "Content": message["content"],
        "Thinking": message.get("reasoning_content", ""),
    }


_REAL = pytest.param("smollm2", marks=pytest.mark.real)
CONVERSATIONS = ["u", "uau", "uauau", "uauauauau", "ua", "uaua"]
NO_SYSTEM = {"gemma2"}


@pytest.mark.parametrize("adds_bos", [False, True], ids=["", "adds-bos"])
@pytest.mark.parametrize("name", [*OWN, *ASSETS, "qwen3-nothink", _REAL])
def test_go_writes_what_jinja_writes(ollama: Any, name: str, adds_bos: bool) -> None:
    variables: dict[str, Any] = {"enable_thinking": False} if name == "qwen3-nothink" else {}
    tokenizer = load_named(name.removesuffix("-nothink"))
    made = build(tokenizer, variables, adds_bos=adds_bos)
    template = read_value(made.text, "TEMPLATE")
    systems = [""] if name in NO_SYSTEM else ["", "s"]
    chats = [make_turns(system + roles) for roles in CONVERSATIONS for system in systems]
    texts = ollama([(template, chat) for chat in chats])
    for chat, text in zip(chats, texts, strict=True):
        expected = render_reference(tokenizer, chat, variables)
        begins = adds_bos and tokenizer.bos_token and expected.startswith(tokenizer.bos_token)
        assert text == (expected.removeprefix(tokenizer.bos_token) if begins else expected)


def test_a_system_text_amid_the_turns_stays_there_where_the_template_has_it_so(ollama: Any) -> None:
    for name, is_moved in [("bundled-chatml", False), ("dated", False), ("defaulted", False), ("topped", True)]:
        tokenizer = load_named(name)
        template = read_value(build(tokenizer).text, "TEMPLATE")
        chat, moved = make_turns("uasu"), make_turns("uasu")
        moved.insert(0, moved.pop(2))
        (text,) = ollama([(template, chat)])
        assert text == render_reference(tokenizer, moved if is_moved else chat, {})


def test_messages_of_one_role_in_a_row_are_one(ollama: Any) -> None:
    tokenizer = build_own(read_template("mistral"))
    template = read_value(build(tokenizer).text, "TEMPLATE")
    chat = make_turns("ssuuaau")
    joined = [
        {"role": chat[i]["role"], "content": "\n\n".join(turn["content"] for turn in chat[i : i + n])}
        for i, n in [(0, 2), (2, 2), (4, 2), (6, 1)]
    ]
    (text,) = ollama([(template, chat)])
    assert text == render_reference(tokenizer, joined, {})


def test_reasoning_stands_where_the_template_has_it(ollama: Any) -> None:
    tokenizer = load_named("qwen3")
    template = read_value(build(tokenizer).text, "TEMPLATE")
    chats = [make_turns(roles, has_reasoning=True) for roles in ("ua", "uau", "suaua", "uauau")]
    for chat, text in zip(chats, ollama([(template, chat) for chat in chats]), strict=True):
        assert text == render_reference(tokenizer, chat, {})
    assert "because" in ollama([(template, chats[0])])[0]
    # a model that is never asked to reason is none that reasons, for Ollama
    assert ".Thinking" not in build(tokenizer, {"enable_thinking": False}).text


def test_reasoning_that_history_keeps_is_kept(ollama: Any) -> None:
    answered = "('<think>\n' + m['reasoning_content'] + '\n</think>\n' if m['reasoning_content'] else '')"
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + "
        + answered
        + " + m['content'] + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = build_own(template)
    written = read_value(build(tokenizer).text, "TEMPLATE")
    chats = [make_turns(roles, has_reasoning=True) for roles in ("ua", "uau", "suaua")] + [make_turns("uau")]
    for chat, text in zip(chats, ollama([(written, chat) for chat in chats]), strict=True):
        assert text == render_reference(tokenizer, chat, {})


def test_a_template_of_the_file_is_what_was_checked(tmp_path: Path, ollama: Any) -> None:
    """A Modelfile that was written and read again still does it."""
    path = tmp_path / "Modelfile"
    tokenizer = build_own(PRICKLY)
    path.write_text(build(tokenizer).text, encoding="utf-8")
    chat = make_turns("sua")
    (text,) = ollama([(read_value(path.read_text(encoding="utf-8"), "TEMPLATE"), chat)])
    assert text == render_reference(tokenizer, chat, {})
