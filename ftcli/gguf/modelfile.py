"""The Modelfile beside GGUF files: what Ollama is told of the model, above all its prompt as a Go template.

A TEMPLATE is written from the shape that the trained chat template has (`shape`), with its texts as they were measured:
there is no prompt of any family here. A chat template that has none of these shapes gets no TEMPLATE, which is said.

Ollama gives a TEMPLATE all messages at once, those of one role in a row joined by an empty line, and all system texts
also as .System. Its tokenizer reads special tokens in the text, and adds BOS itself where the GGUF file says so. A
Modelfile has what stands in triple quotes as it is, but for characters that do not print, which Ollama drops.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ftcli.data.chat import ChatRenderer
from ftcli.errors import ContentError
from ftcli.gguf.shape import Shape, measure_shape

_MOST_NAME = 60
_FINAL = "{{ $final := eq (len (slice $.Messages $i)) 1 }}"
_FIND_LAST = (
    '{{ $last := 0 }}{{ range $i, $m := .Messages }}{{ if eq $m.Role "user" }}{{ $last = $i }}{{ end }}{{ end }}'
)
_ESCAPES = {"\n": "\\n", "\r": "\\r", "\t": "\\t", '"': '\\"', "\\": "\\\\"}


@dataclass(frozen=True)
class Modelfile:
    """The ``text`` of a Modelfile, and in ``problem`` what Ollama will not do right."""

    text: str
    problem: str


def name_model(name: str) -> str:
    """What Ollama may call a model of this name: short, and of small letters, digits, dots, lines and dashes."""
    return re.sub(r"[^a-z0-9_.-]+", "-", name.lower())[:_MOST_NAME].strip("-._") or "model"


def build_modelfile(
    file_name: str,
    renderer: ChatRenderer | None,
    *,
    n_context: int,
    adds_bos: bool,
    system: str = "",
    others: Sequence[str] = (),
) -> Modelfile:
    """The Modelfile of the GGUF file ``file_name`` beside it.

    Args:
        file_name: the file that Ollama is given.
        renderer: the chat template as it was trained; None for a model without one, which is given the plain text.
        n_context: the length of the context in tokens.
        adds_bos: whether the GGUF file tells its runtime to begin with BOS, so that the template must not.
        system: a system text for conversations that have none.
        others: further files of the same model, which are named in a comment.
    """
    lines = ["# Written by ftcli export; ollama create NAME -f Modelfile", f"FROM ./{file_name}"]
    lines += [f"# FROM ./{other}" for other in others]
    problems: list[str] = []
    renderer = renderer if renderer and renderer.template.source else None
    template, takes_system, stops = "{{ .Prompt }}", False, tuple[str, ...]()
    if renderer:
        template, takes_system, stops = "", True, _find_stops(renderer, problems)
        try:
            shape = measure_shape(renderer.template, renderer.encoder.added, adds_bos=adds_bos)
            template, takes_system = write_template(shape, adds_bos=adds_bos), bool(shape.system)
        except ContentError as error:
            problems.append(f"there is no Ollama TEMPLATE: {error.what}")
    if template:
        lines += ["# The date in it is the one of the training."] if renderer and renderer.template.is_dated else []
        lines.append(f'TEMPLATE """{template}"""')
    else:
        lines += [f"# {_join(problems[-1])}", "# Ollama takes what it finds in the GGUF file, or guesses."]
    if system and not takes_system:
        problems.append("the chat template takes no system text, so the Modelfile has no SYSTEM")
    elif system:
        lines += _list_system(system, problems)
    lines += [f"PARAMETER stop {_quote_stop(stop)}" for stop in stops]
    lines.append(f"PARAMETER num_ctx {n_context}")
    return Modelfile("\n".join(lines) + "\n", "; ".join(_join(problem) for problem in problems))


def _find_stops(renderer: ChatRenderer, problems: list[str]) -> tuple[str, ...]:
    try:
        return renderer.find_turn_ends()
    except ContentError as error:
        problems.append(f"the Modelfile has no stop: {error.what}")
        return ()


def _list_system(system: str, problems: list[str]) -> list[str]:
    """The line of a system text, none where a Modelfile cannot hold it."""
    if '"""' in system:
        problems.append('the Modelfile has no SYSTEM: the text has """ in it, which would end it there')
        return []
    if lost := "".join(sorted({c for c in system if not c.isprintable() and c not in "\n\r\t"})):
        names = ", ".join(f"U+{ord(c):04X}" for c in lost)
        problems.append(f"Ollama drops from SYSTEM the characters that do not print: {names}")
    return [f'SYSTEM """{system}"""']


def write_template(shape: Shape, *, adds_bos: bool) -> str:
    """The Go template that writes what ``shape`` writes, less the first token where the runtime adds it."""
    slots = {key: quote_literal(value) for key, value in vars(shape).items() if isinstance(value, str)}
    if shape.reasoning:
        opened, closed = map(quote_literal, shape.reasoning)
        slots["reasoning"] = f"{opened}{{{{ .Thinking }}}}{closed}"
    parts = ["" if adds_bos else slots["bos"], slots["head"], _write_begin(shape, slots)]
    parts += ["{{ range $i, $_ := .Messages }}", _FINAL]
    parts += ['{{ if eq .Role "user" }}', _write_ask(shape, slots), "{{ .Content }}", slots["ask_close"]]
    parts += ['{{ else if eq .Role "assistant" }}', _write_answer(shape, slots)]
    if shape.system == "anywhere":
        parts += ['{{ else if eq .Role "system" }}', slots["system_open"], "{{ .Content }}", slots["system_close"]]
    parts.append("{{ end }}")
    if shape.prompt:
        parts.append(f'{{{{ if and $final (ne .Role "assistant") }}}}{slots["prompt"]}{{{{ end }}}}')
    return "".join([*parts, "{{ end }}"])


def _write_begin(shape: Shape, slots: dict[str, str]) -> str:
    """What stands before the first message, and the variables that it and the others need."""
    default = slots["default"]
    if shape.system == "front":
        otherwise = f"{{{{ else }}}}{default}" if default else ""
        return f"{{{{ if .System }}}}{_put_system(slots, '.System')}{otherwise}{{{{ end }}}}"
    if shape.system == "anywhere" and default:
        return f'{{{{ if ne (index .Messages 0).Role "system" }}}}{default}{{{{ end }}}}'
    if shape.system == "first":
        return (f"{{{{ if not .System }}}}{default}{{{{ end }}}}" if default else "") + "{{ $asked := false }}"
    return default + (_FIND_LAST if shape.system == "last" else "")


def _write_ask(shape: Shape, slots: dict[str, str]) -> str:
    """What stands before a question."""
    place = {"first": "not $asked", "last": "eq $i $last", "final": "$final"}.get(shape.system)
    if not place:
        return slots["ask_open"]
    condition = f"and $.System ({place})" if " " in place else f"and $.System {place}"
    told = f"{{{{ if {condition} }}}}{_put_system(slots, '$.System')}{{{{ else }}}}{slots['ask_open']}{{{{ end }}}}"
    return told + ("{{ $asked = true }}" if shape.system == "first" else "")


def _write_answer(shape: Shape, slots: dict[str, str]) -> str:
    """An answer: whole, or to be continued.

    Ollama finds the tags of reasoning as the plain texts around .Thinking, so these have a branch of their own.
    """
    if shape.final_open.startswith(shape.answer_open):
        rest = quote_literal(shape.final_open.removeprefix(shape.answer_open))
        opened = slots["answer_open"]
    else:
        rest, opened = "", ""
    cases = []
    if shape.reasoning:
        condition = ".Thinking" if shape.keeps_reasoning else "and $final .Thinking"
        before = "" if opened else slots["answer_open"]
        cases.append((condition, before + slots["reasoning"]))
    if not shape.final_open.startswith(shape.answer_open):
        cases.append(("$final", slots["final_open"]))
        cases.append(("", slots["answer_open"]))
    elif rest:
        cases.append(("$final", rest))
    for i, (condition, text) in enumerate(cases):
        opened += f"{{{{ {'else ' if i else ''}{'if ' + condition if condition else ''}".rstrip() + f" }}}}{text}"
    opened += "{{ end }}" if cases else ""
    return opened + "{{ .Content }}" + f"{{{{ if not $final }}}}{slots['answer_close']}{{{{ end }}}}"


def _put_system(slots: dict[str, str], name: str) -> str:
    return f"{slots['system_open']}{{{{ {name} }}}}{slots['system_close']}"


def quote_literal(text: str) -> str:
    """``text`` so that a Go template in a Modelfile writes it: what either takes for its own is a Go string."""
    return re.sub(r'\{+|"{2,}|[^ -~\n]+', _quote_run, text)


def _quote_run(run: re.Match[str]) -> str:
    text = run.group()
    if text.isprintable() and text[0] not in '{"':
        return text  # Ollama drops from a Modelfile what does not print
    return '{{ "' + "".join(_ESCAPES.get(c) or (c if c.isprintable() else f"\\U{ord(c):08x}") for c in text) + '" }}'


def _quote_stop(stop: str) -> str:
    return f'"""{stop}"""' if '"' in stop else f'"{stop}"'


def _join(text: str) -> str:
    """``text`` in one line, as a comment needs it."""
    return " ".join(text.split())
