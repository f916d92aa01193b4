"""The history of conversations: private, bounded, and never in the way."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ftcli.store.history import KEPT_LINES, add_history, read_history


def test_texts_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "chat_history"
    texts = ["one", "two\nlines\\", "Zoë 🦊", "\udcff", "/reset"]
    assert read_history(path) == []
    for text in texts:
        add_history(path, text)
    add_history(path, "/reset")  # at once again: no new line
    assert read_history(path) == texts
    assert [json.loads(line) for line in path.read_bytes().splitlines()] == texts
    assert [p.name for p in path.parent.iterdir()] == ["chat_history"]


def test_only_the_owner_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "chat_history"
    path.write_text('"old"\n')
    path.chmod(0o644)
    before = os.umask(0)
    try:
        add_history(path, "secret")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600
    assert read_history(path) == ["old", "secret"]


def test_the_newest_thousand_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "chat_history"
    path.write_text("".join(f'"{i}"\n' for i in range(1500)))
    assert read_history(path) == [str(i) for i in range(500, 1500)]
    add_history(path, "new")
    assert len(path.read_text().splitlines()) == KEPT_LINES == 1000
    assert read_history(path)[-2:] == ["1499", "new"]


def test_what_is_no_history_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "chat_history"
    path.write_text('"one"\nplain\n{"a": 1}\n' + "[" * 100_000 + '\n"two"\n"three')
    assert read_history(path) == ["one", "two"]
    path.write_bytes(b"\xff\xfe\x00")
    assert read_history(path) == []


@pytest.mark.parametrize("kind", ["file in the way", "folder of that name"])
def test_where_nothing_can_be_written_nothing_happens(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a" / "chat_history"
    if kind == "file in the way":
        (tmp_path / "a").write_text("")
    else:
        path.mkdir(parents=True)
    add_history(path, "one")
    assert read_history(path) == []
    assert len(list(tmp_path.rglob("*"))) == (1 if kind == "file in the way" else 2)
