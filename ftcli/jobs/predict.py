"""``ftcli generate``: a model's answer to every row of a file, a line each, as they come.

rows ─▶ the conversation before the last answer ─▶ batches ─▶ {"source", "messages", "reference", "answer"}

What is in the output is not asked again: a run that was stopped goes on behind its last whole line.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ftcli.data.message import Example, Message, detect_format, read_example
from ftcli.data.source import Row, check_problems, find_sources, read_rows
from ftcli.errors import ContentError, Problem, UsageError
from ftcli.evaluate.generate import Sampling, answer_prompts, check_context
from ftcli.evaluate.subject import open_target
from ftcli.evaluate.target import find_target
from ftcli.events import Notice, OnEvent, Pace, Stage, ignore_event
from ftcli.store.file import check_new, write_text
from ftcli.store.run import append_line, find_newest_run, read_lines

_BATCHES_AT_A_TIME = 8  # are answered in the order that wastes the least padding, and written in the file's
_KEYS = ("source", "target", "messages", "reference", "answer")


@dataclass(frozen=True)
class Generated:
    """What was written: answers in all, and how many of them were there before."""

    output: str
    target: str
    n_answers: int
    n_kept: int


def generate_answers(
    data: str,
    target: str | None = None,
    *,
    output: Path,
    sampling: Sampling | None = None,
    batch_rows: int = 8,
    limit: int | None = None,
    overwrite: bool = False,
    check_stop: Callable[[], None] = lambda: None,
    on_event: OnEvent = ignore_event,
) -> Generated:
    """The answers that are in ``output``, one for each row of ``data``, in its order.

    Args:
        data: a file, glob, folder or Hub id of rows; a row's last turn, if it is the assistant's, is its reference.
        target: a run, adapter, model folder, GGUF file or Hub id; None is the newest finished run.
        output: a JSONL file; what it holds of the same rows and target is kept.
        sampling: how tokens are chosen; None is greedily, up to 512.
        batch_rows: rows answered at a time.
        limit: only the first so many rows.
        overwrite: begin the output anew.
        check_stop: called after each token; may raise to end the work.
        on_event: told of stages and progress.

    Raises:
        FtcliError: rows or target cannot be used; the output is of other rows, or of another target.
    """
    sampling = sampling or Sampling()
    if target is None:
        target = str(find_newest_run().path)
        on_event(Notice(f"no target was named: {target} is the newest finished run"))
    found = find_target(target)
    on_event(Stage("data", data))
    asked = list_asked(data)[:limit]
    if overwrite:
        check_new(output, overwrite=True)
        output.unlink(missing_ok=True)
    kept = keep_answers(output, asked, found.name)
    if kept == len(asked):
        return Generated(str(output), found.name, kept, kept)
    if kept:
        on_event(Notice(f"{output} has {kept} of {len(asked)} answers: going on behind them"))
    on_event(Stage("model", found.name))
    subject = open_target(found, on_event=on_event)
    left = asked[kept:]
    prompts = [subject.renderer.render_prompt(list(example.messages), example.tools) for example, _ in left]
    check_context(subject.backend.context, prompts, sampling.max_new_tokens, where="--max-new-tokens")
    pace = Pace("answers", len(left))
    size = _BATCHES_AT_A_TIME * batch_rows
    for first in range(0, len(left), size):
        texts = answer_prompts(
            lambda group: subject.backend.generate(group, sampling, check_stop=check_stop),
            prompts[first : first + size],
            batch_rows=batch_rows,
        )
        for (example, reference), text in zip(left[first : first + size], texts, strict=True):
            append_line(output, describe_answer(example, reference, found.name, text))
        on_event(pace.advance(len(texts)))
    return Generated(str(output), found.name, len(asked), kept)


def list_asked(data: str) -> list[tuple[Example, str | None]]:
    """Each row's conversation up to the answer that is asked for, and what the row itself answers, if it does.

    Raises:
        ContentError: rows that cannot be read, or hold nothing that could be answered.
    """
    problems: list[Problem] = []
    found: list[tuple[Example, str | None]] = []
    for source in find_sources(data):
        for row in read_rows(source):
            try:
                found.append(_split(_read(row)))
            except ContentError as error:
                problems.append(Problem(error.what, error.where, error.hint))
    check_problems(problems)
    if not found:
        raise ContentError("holds no rows", where=data)
    return found


def _read(row: Row) -> Example:
    if isinstance(row.value.get("prompt"), str) and row.value.get("completion") is None:
        return Example((Message("user", row.value["prompt"]),), None, None, row.file, row.line)
    return read_example(row, detect_format(row), require_assistant=False)


def _split(example: Example) -> tuple[Example, str | None]:
    messages = example.messages
    if not messages:
        raise ContentError("is a text, and asks nothing", where=example.place)
    if messages[-1].role != "assistant":
        return example, None
    if len(messages) == 1:
        raise ContentError("begins with an answer: nothing is asked", where=example.place)
    return replace(example, messages=messages[:-1]), messages[-1].content


def describe_answer(example: Example, reference: str | None, target: str, text: str) -> dict[str, Any]:
    """A line of the output."""
    turns = [message.to_template() for message in example.messages]
    return {"source": example.place, "target": target, "messages": turns, "reference": reference, "answer": text}


def keep_answers(output: Path, asked: Sequence[tuple[Example, str | None]], target: str) -> int:
    """How many answers ``output`` has already; a torn last line is gone.

    Raises:
        UsageError: they are of other rows, or of another target.
    """
    if not output.exists():
        return 0
    lines = read_lines(output, *_KEYS)
    known = _list_known(asked, target)
    for number, line in enumerate(lines):
        if number >= len(asked) or (line["source"], line["target"], line["messages"]) != next(known):
            raise UsageError(
                "holds answers to other rows, or of another target",
                where=f"{output}:{number + 1}",
                hint="name another file with -o, or begin it anew: --overwrite",
            )
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    if output.read_bytes() != text.encode("utf-8", "surrogatepass"):
        if not lines:
            raise UsageError("is there already", where=str(output), hint="name another with -o, or: --overwrite")
        write_text(output, text)
    return len(lines)


def _list_known(asked: Sequence[tuple[Example, str | None]], target: str) -> Iterator[tuple[str, str, Any]]:
    for example, _ in asked:
        line = describe_answer(example, None, target, "")
        yield line["source"], line["target"], line["messages"]
