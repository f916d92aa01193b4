"""Answers to a file of rows, resumable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ftcli.errors import ContentError, UsageError
from ftcli.evaluate.generate import Sampling
from ftcli.evaluate.subject import open_subject
from ftcli.jobs.predict import generate_answers
from ftcli.train.run import train

SHORT = Sampling(max_new_tokens=3)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_row_has_its_answer_in_the_order_of_the_file(write_recipe: Any, write_rows: Any, tmp_path: Path) -> None:
    run = train(write_recipe())
    data, output = write_rows("ask.jsonl", 11), tmp_path / "out.jsonl"
    found = generate_answers(str(data), str(run.path), output=output, sampling=SHORT, batch_rows=2)
    lines = read(output)
    assert (found.n_answers, found.n_kept) == (11, 0)
    assert [line["source"] for line in lines] == [f"{data}:{n}" for n in range(1, 12)]
    rows = read(data)
    assert [line["reference"] for line in lines] == [row["messages"][-1]["content"] for row in rows]
    assert all(line["messages"] == row["messages"][:-1] for line, row in zip(lines, rows, strict=True))
    subject = open_subject(str(run.path))
    for line in lines[::5]:
        prompt = subject.renderer.render_prompt(list(read_messages(line)))
        assert subject.backend.generate([prompt], SHORT)[0] == line["answer"]


def read_messages(line: dict[str, Any]) -> Any:
    from ftcli.data.message import Message

    return [Message(turn["role"], turn["content"]) for turn in line["messages"]]


def test_it_goes_on_where_it_was_stopped(write_recipe: Any, write_rows: Any, tmp_path: Path) -> None:
    run = train(write_recipe())
    data, output = write_rows("ask.jsonl", 40), tmp_path / "out.jsonl"
    options = {"output": output, "sampling": SHORT, "batch_rows": 2}
    whole = tmp_path / "whole.jsonl"
    generate_answers(str(data), str(run.path), **{**options, "output": whole})  # type: ignore[arg-type]
    n_tokens = 0

    def stop() -> None:
        nonlocal n_tokens
        n_tokens += 1
        if n_tokens > 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate_answers(str(data), str(run.path), check_stop=stop, **options)  # type: ignore[arg-type]
    n = len(read(output))
    assert 0 < n < 40
    with output.open("a") as stream:
        stream.write('{"source": "ask')  # torn by a kill
    found = generate_answers(str(data), str(run.path), **options)  # type: ignore[arg-type]
    assert (found.n_answers, found.n_kept) == (40, n)
    assert output.read_bytes() == whole.read_bytes()
    again = generate_answers(str(data), str(run.path), **options)  # type: ignore[arg-type]
    assert again.n_kept == 40
    with pytest.raises(UsageError, match="other rows"):
        generate_answers(str(write_rows("other.jsonl", 5)), str(run.path), **options)  # type: ignore[arg-type]
    found = generate_answers(str(data), str(run.path), overwrite=True, limit=3, **options)  # type: ignore[arg-type]
    assert (found.n_answers, found.n_kept) == (3, 0)


def test_rows_that_only_ask(write_recipe: Any, tmp_path: Path) -> None:
    run = train(write_recipe())
    data = tmp_path / "ask.jsonl"
    data.write_text('{"prompt": "question 1"}\n{"messages": [{"role": "user", "content": "question 2"}]}\n')
    generate_answers(str(data), str(run.path), output=tmp_path / "out.jsonl", sampling=SHORT)
    assert [line["reference"] for line in read(tmp_path / "out.jsonl")] == [None, None]
    data.write_text('{"text": "a text"}\n{"messages": [{"role": "assistant", "content": "x"}]}\n')
    with pytest.raises(ContentError) as caught:
        generate_answers(str(data), str(run.path), output=tmp_path / "no.jsonl", sampling=SHORT)
    assert "ask.jsonl:1" in str(caught.value)
    assert "ask.jsonl:2" in str(caught.value)
    assert not (tmp_path / "no.jsonl").exists()
