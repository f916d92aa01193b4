"""The cache of rendered rows: a hit is the same table without rendering; what is damaged or foreign is made again."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CHATML, build_tokenizer
from tokenizers import AddedToken

from ftcli.data import loader
from ftcli.data.chat import ChatRenderer
from ftcli.data.documents import RowTable, hash_example
from ftcli.data.loader import Reading, load_split
from ftcli.data.message import Example, Message
from ftcli.errors import Problem
from ftcli.recipe import DataSection, DatasetSection
from ftcli.store import cache as store_cache
from ftcli.store.cache import find_cache, prune_cache

DATED = "{{ strftime_now('%Y-%m-%d') }}" + CHATML


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for each test."""
    home = tmp_path / "home"
    monkeypatch.setenv("HF_HOME", str(home))
    return home


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    turns = [("fox", "dog"), ("numbers 1 2", "<|im_end|> ☃"), ("question", "answer")]
    return write(tmp_path / "train.jsonl", [build_row(*turn) for turn in turns])


def build_row(question: str, answer: str, **others: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **others}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(
    path: Path,
    tokenizer: Any,
    *,
    variables: dict[str, Any] | None = None,
    date: datetime | None = None,
    uses_cache: bool = True,
    **section: Any,
) -> RowTable:
    reading = Reading(ChatRenderer(tokenizer, variables, date=date), uses_cache=uses_cache)
    return reading.load(DatasetSection(path=str(path), **section))


def list_entries() -> list[Path]:
    folder = find_cache("rows")
    return sorted(folder.iterdir()) if folder.is_dir() else []


def get_entry() -> Path:
    (entry,) = list_entries()
    return entry


def assert_equal(table: RowTable, other: RowTable) -> None:
    assert table.files == other.files
    arrays, others = table.list_arrays(), other.list_arrays()
    assert arrays.keys() == others.keys()
    for name, array in arrays.items():
        assert array.dtype == others[name].dtype, name
        assert np.array_equal(array, others[name]), name


def forbid_rendering(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise AssertionError("the rows are rendered again")

    monkeypatch.setattr(loader, "build_table", fail)


# --- hits


def test_a_second_load_gives_an_equal_table_and_renders_nothing(
    rows: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cold = load(rows, tiny_tokenizer)
    forbid_rendering(monkeypatch)
    assert_equal(load(rows, tiny_tokenizer), cold)


def test_what_comes_from_the_cache_is_what_is_made_without_it(rows: Path, tiny_tokenizer: Any) -> None:
    load(rows, tiny_tokenizer)
    assert_equal(load(rows, tiny_tokenizer), load(rows, tiny_tokenizer, uses_cache=False))


def test_a_cached_table_holds_what_transformers_renders(rows: Path, tiny_tokenizer: Any) -> None:
    write(rows, [build_row("fox", "dog")])
    load(rows, tiny_tokenizer)
    table = load(rows, tiny_tokenizer)
    messages = build_row("fox", "dog")["messages"]
    assert table.ids.tolist() == tiny_tokenizer.apply_chat_template(messages, return_dict=False)
    assert table.place(0) == f"{rows}:1"


def test_a_table_without_rows_of_conversation_is_kept_too(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = write(tmp_path / "texts.jsonl", [{"text": "fox"}, {"text": "dog"}])
    cold = load(path, tiny_tokenizer)
    assert_equal(load(path, tiny_tokenizer), cold)
    assert len(list_entries()) == 1


def test_several_files_are_one_entry_with_their_names(tmp_path: Path, tiny_tokenizer: Any) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        write(folder / name, [build_row(name, "dog"), build_row("fox", name)])
    load(folder, tiny_tokenizer)
    table = load(folder, tiny_tokenizer)
    assert [(Path(file.name).name, file.format, file.n_rows) for file in table.files] == [
        ("a.jsonl", "messages", 2),
        ("b.jsonl", "messages", 2),
    ]
    assert table.file.tolist() == [0, 0, 1, 1]
    assert len(list_entries()) == 1


def test_weight_is_not_part_of_an_entry(rows: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    load(rows, tiny_tokenizer)
    forbid_rendering(monkeypatch)
    load(rows, tiny_tokenizer, weight=2.5)
    assert len(list_entries()) == 1


def test_max_length_is_not_part_of_an_entry(rows: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    section = DatasetSection(path=str(rows))

    def split(max_length: int) -> list[int]:
        data = DataSection(max_length=max_length, overflow="truncate")
        return load_split((section,), data, (), Reading(ChatRenderer(tiny_tokenizer)), seed=1).train.documents.lengths

    whole = split(512)
    assert max(whole) > 24
    forbid_rendering(monkeypatch)
    assert split(24) == [min(length, 24) for length in whole]
    assert len(list_entries()) == 1


def test_the_date_is_not_part_of_an_entry_of_an_undated_template(rows: Path, tiny_tokenizer: Any) -> None:
    for day in (1, 2):
        load(rows, tiny_tokenizer, date=datetime(2024, 1, day))
    assert len(list_entries()) == 1


def test_a_table_that_leaves_rows_out_is_not_kept(rows: Path, tiny_tokenizer: Any) -> None:
    skipped: list[Problem] = []
    Reading(ChatRenderer(tiny_tokenizer), skipped=skipped).load(DatasetSection(path=str(rows)))
    assert list_entries() == []


def test_nothing_is_kept_if_the_cache_is_not_wanted(rows: Path, tiny_tokenizer: Any) -> None:
    load(rows, tiny_tokenizer, uses_cache=False)
    assert list_entries() == []


# --- misses


def change_row(path: Path, tokenizer: Any) -> RowTable:
    path.write_bytes(path.read_bytes().replace(b"fox", b"cat"))
    return load(path, tokenizer)


def change_blank(path: Path, tokenizer: Any) -> RowTable:
    path.write_bytes(b"\n" + path.read_bytes())  # the same rows, each a line further down
    return load(path, tokenizer)


def change_template(path: Path, tokenizer: Any) -> RowTable:
    tokenizer.chat_template = "{{ 'fox ' }}" + CHATML
    return load(path, tokenizer)


def change_variables(path: Path, tokenizer: Any) -> RowTable:
    return load(path, tokenizer, variables={"opening": "fox"})


def change_tokenizer(path: Path, tokenizer: Any) -> RowTable:
    tokenizer.add_tokens([AddedToken("☃", normalized=False)])
    return load(path, tokenizer)


def change_train_on(path: Path, tokenizer: Any) -> RowTable:
    return load(path, tokenizer, train_on=["user"])


@pytest.mark.parametrize(
    "change", [change_row, change_blank, change_template, change_variables, change_tokenizer, change_train_on]
)
def test_what_the_ids_follow_from_names_the_entry(rows: Path, change: Callable[[Path, Any], RowTable]) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ opening | default('') }}" + CHATML
    before = load(rows, tokenizer)
    after = change(rows, tokenizer)
    assert len(list_entries()) == 2
    same = [np.array_equal(a, b) for a, b in zip(list_all(before), list_all(after), strict=True)]
    assert not all(same)


def list_all(table: RowTable) -> list[Any]:
    return list(table.list_arrays().values())


def test_the_bos_token_that_a_template_writes_names_the_entry(rows: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ bos_token }}" + CHATML
    firsts = []
    for bos in ("<|endoftext|>", "<|im_start|>"):
        tokenizer.bos_token = bos
        firsts.append(int(load(rows, tokenizer).ids[0]))
    assert firsts == tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>"])


def test_another_date_of_a_dated_template_is_another_entry(rows: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = DATED
    for day in (1, 2, 2):
        table = load(rows, tokenizer, date=datetime(2024, 3, day))
        assert tokenizer.decode(table.ids[: table.first_token[1]]).startswith(f"2024-03-0{day}<|im_start|>")
    assert len(list_entries()) == 2


def test_the_same_rows_in_another_file_are_another_entry(rows: Path, tiny_tokenizer: Any) -> None:
    load(rows, tiny_tokenizer)
    other = rows.with_name("other.jsonl")
    shutil.copy(rows, other)
    assert load(other, tiny_tokenizer).place(0) == f"{other}:1"


def test_columns_name_the_entry(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = write(tmp_path / "train.jsonl", [{"text": "fox", "other": "dog"}])
    texts = [
        tiny_tokenizer.decode(load(path, tiny_tokenizer, type="text", columns=columns).ids)
        for columns in ({}, {"text": "other"})
    ]
    assert texts == ["fox<|im_end|>", "dog<|im_end|>"]


# --- damage


def flip_byte(entry: Path) -> None:
    raw = bytearray((entry / "rows.arrow").read_bytes())
    raw[len(raw) // 2] ^= 1
    (entry / "rows.arrow").write_bytes(raw)


def cut_rows(entry: Path) -> None:
    raw = (entry / "rows.arrow").read_bytes()
    (entry / "rows.arrow").write_bytes(raw[: len(raw) // 2])


def cut_description(entry: Path) -> None:
    raw = (entry / "entry.json").read_bytes()
    (entry / "entry.json").write_bytes(raw[: len(raw) // 2])


def lose_rows(entry: Path) -> None:
    (entry / "rows.arrow").unlink()


def lose_description(entry: Path) -> None:
    (entry / "entry.json").unlink()


def empty_rows(entry: Path) -> None:
    (entry / "rows.arrow").write_bytes(b"")


def describe_otherwise(entry: Path) -> None:
    (entry / "entry.json").write_text("[]")


def put_text(entry: Path) -> None:
    """A sound description of what is no Arrow file."""
    (entry / "rows.arrow").write_bytes(b"fox")
    described = {"sha256": hashlib.sha256(b"fox").hexdigest(), "files": []}
    (entry / "entry.json").write_text(json.dumps(described))


@pytest.mark.parametrize(
    "damage",
    [
        flip_byte,
        cut_rows,
        cut_description,
        lose_rows,
        lose_description,
        empty_rows,
        describe_otherwise,
        put_text,
    ],
)
def test_a_damaged_entry_is_made_again(
    rows: Path, tiny_tokenizer: Any, damage: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = load(rows, tiny_tokenizer, uses_cache=False)
    load(rows, tiny_tokenizer)
    damage(get_entry())
    assert_equal(load(rows, tiny_tokenizer), sound)
    forbid_rendering(monkeypatch)  # and it is whole again
    assert_equal(load(rows, tiny_tokenizer), sound)


def test_a_cache_that_cannot_be_written_is_a_notice(rows: Path, tiny_tokenizer: Any, cache_home: Path) -> None:
    sound = load(rows, tiny_tokenizer, uses_cache=False)
    cache_home.mkdir()
    (cache_home / "ftcli").write_text("a file where a folder belongs")
    reading = Reading(ChatRenderer(tiny_tokenizer))
    assert_equal(reading.load(DatasetSection(path=str(rows))), sound)
    (notice,) = reading.notices
    assert notice.startswith("the rendered rows are not cached: ")


def test_a_full_disk_is_a_notice_and_leaves_nothing_behind(
    rows: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = load(rows, tiny_tokenizer, uses_cache=False)

    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    reading = Reading(ChatRenderer(tiny_tokenizer))
    assert_equal(reading.load(DatasetSection(path=str(rows))), sound)
    (notice,) = reading.notices
    assert "the disk is full" in notice
    assert list_entries() == []


# --- age and size


def make_entry(folder: Path, name: str, *, days: float, n_bytes: int = 10) -> Path:
    entry = folder / name
    entry.mkdir(parents=True)
    (entry / "rows.arrow").write_bytes(b"x" * n_bytes)
    used_at = time.time() - days * 24 * 3600
    os.utime(entry, (used_at, used_at))
    return entry


def test_entries_unused_for_a_month_are_pruned(tmp_path: Path) -> None:
    make_entry(tmp_path / "rows", "old", days=30.5)
    make_entry(tmp_path / "rows", "new", days=29.5)
    prune_cache(tmp_path / "rows")
    assert [path.name for path in (tmp_path / "rows").iterdir()] == ["new"]


def test_the_least_recently_used_entries_beyond_the_limit_are_pruned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_cache, "_KEPT_BYTES", 100)
    for name, days in (("c", 3.0), ("a", 1.0), ("d", 4.0), ("b", 2.0)):
        make_entry(tmp_path / "rows", name, days=days, n_bytes=50)
    prune_cache(tmp_path / "rows")
    assert sorted(path.name for path in (tmp_path / "rows").iterdir()) == ["a", "b"]


def test_pruning_a_folder_that_is_not_there_is_nothing(tmp_path: Path) -> None:
    prune_cache(tmp_path / "rows")
    assert not (tmp_path / "rows").exists()


def test_a_hit_makes_an_entry_recent_again(rows: Path, tiny_tokenizer: Any) -> None:
    load(rows, tiny_tokenizer)
    entry = get_entry()
    used_at = time.time() - 29 * 24 * 3600
    os.utime(entry, (used_at, used_at))
    load(rows, tiny_tokenizer)
    assert time.time() - entry.stat().st_mtime < 3600


def test_a_new_entry_prunes_the_old_ones(rows: Path, tiny_tokenizer: Any) -> None:
    old = make_entry(find_cache("rows"), "old", days=31)
    load(rows, tiny_tokenizer)
    assert not old.exists()
    assert len(list_entries()) == 1


# --- what is not loaded


def test_neither_saving_nor_loading_imports_pandas() -> None:
    code = """
import sys
import numpy as np
from ftcli.data.cache import load_table, save_table
from ftcli.data.documents import RowTable, SourceFile
names = "file line key n_words n_text_tokens n_turns traits first_document first_token ids mask".split()
kinds = dict(line=np.int64, key=np.uint64, first_document=np.int64, first_token=np.int64, mask=np.uint8)
table = RowTable((SourceFile("a", "text", 3),), **{n: np.arange(3, dtype=kinds.get(n, np.int32)) for n in names})
assert save_table("entry", table) == ""
again = load_table("entry")
assert again is not None and again.key.tolist() == [0, 1, 2]
assert "pandas" not in sys.modules
import pandas  # it is there to be imported
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- keys


def find_keys(path: Path, rows: list[dict[str, Any]], tokenizer: Any) -> list[int]:
    return load(write(path, rows), tokenizer, uses_cache=False).key.tolist()  # type: ignore[no-any-return]


def test_equal_rows_have_equal_keys_wherever_they_stand(tmp_path: Path, tiny_tokenizer: Any) -> None:
    row, other = build_row("fox", "dog"), build_row("fox", "cat")
    first, second, third = find_keys(tmp_path / "a.jsonl", [row, other, row], tiny_tokenizer)
    assert first == third != second
    assert find_keys(tmp_path / "b.jsonl", [other, row], tiny_tokenizer) == [second, first]


def test_a_key_does_not_depend_on_the_tokenizer_or_what_is_trained(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = write(tmp_path / "a.jsonl", [build_row("fox", "dog")])
    tokenizer = build_tokenizer(300)
    keys = [load(path, tiny_tokenizer).key, load(path, tokenizer).key, load(path, tokenizer, train_on="all").key]
    assert len({int(key[0]) for key in keys}) == 1


TOOL = {"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}


def build_example(*messages: Message, text: str | None = None, tools: tuple[Any, ...] | None = None) -> Example:
    return Example(messages, text, tools, "train.jsonl", 1)


ASK, SAY = Message("user", "fox"), Message("assistant", "dog")
DIFFERENT = {
    "plain": build_example(ASK, SAY),
    "roles": build_example(Message("assistant", "fox"), Message("user", "dog")),
    "order": build_example(SAY, ASK),
    "more": build_example(ASK, SAY, ASK, SAY),
    "tools": build_example(ASK, SAY, tools=(TOOL,)),
    "other tools": build_example(ASK, SAY, tools=({**TOOL, "type": "other"},)),
    "two tools": build_example(ASK, SAY, tools=(TOOL, TOOL)),
    "calls": build_example(ASK, Message("assistant", "dog", extra={"tool_calls": [CALL]})),
    "two calls": build_example(ASK, Message("assistant", "dog", extra={"tool_calls": [CALL, CALL]})),
    "calls of the other": build_example(Message("user", "fox", extra={"tool_calls": [CALL]}), SAY),
    "reasoning": build_example(ASK, Message("assistant", "dog", extra={"reasoning_content": "a"})),
    "text": build_example(text="foxdog"),
    "blank": build_example(Message("user", "fox "), SAY),
}


def test_rows_that_differ_in_anything_they_say_have_different_keys() -> None:
    keys = {name: hash_example(example) for name, example in DIFFERENT.items()}
    assert len(set(keys.values())) == len(DIFFERENT), keys


def test_the_order_of_the_keys_of_an_object_is_not_part_of_a_rows_key() -> None:
    turned = dict(reversed(TOOL.items()))
    assert list(turned) != list(TOOL)
    assert hash_example(build_example(ASK, SAY, tools=(TOOL,))) == hash_example(
        build_example(ASK, SAY, tools=(turned,))
    )
