"""JSON documents, CSV, Parquet, Hub data sets: exact values with their place, or one error that names it."""

from __future__ import annotations

import csv
import datetime
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from hypothesis import given, settings
from hypothesis import strategies as st

from ftcli.data import table
from ftcli.data.example import read_examples
from ftcli.data.source import Source, find_sources, hash_sources, read_rows
from ftcli.errors import ContentError, DiskError, FtcliError, HubError, Problem, UsageError

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)


def write(folder: Path, content: bytes | str, name: str) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(folder: Path, content: bytes | str, name: str) -> list[tuple[int, dict[str, Any]]]:
    return [(row.line, row.value) for row in read_rows(write(folder, content, name))]


def say(folder: Path, content: bytes | str, name: str) -> str:
    """What the user reads about a file of this content, with the folder's name taken out."""
    with pytest.raises(ContentError) as caught:
        read_rows(write(folder, content, name))
    return str(caught.value).replace(f"{folder}/", "")


def write_parquet(folder: Path, columns: dict[str, Any], **options: Any) -> Path:
    path = folder / "rows.parquet"
    pq.write_table(pa.table(columns), path, **options)
    return path


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ('[{"a": 1}, {"a": 2}]', [1, 1]),
        ('\ufeff\n[\n  {\n    "a": 1\n  },\n\n  {"a": 2}\n]\n', [3, 7]),
        ('{"version": [1], "data": [\r\n{"a": 1},\r\n{"a": 2}]}', [2, 3]),
        ('{"a": 1}\n{"a": 2}\n', [1, 2]),
    ],
    ids=["one line", "indented", "the only array of objects", "lines in truth"],
)
def test_each_object_of_a_json_file_is_a_row_at_its_line(tmp_path: Path, text: str, lines: list[int]) -> None:
    rows = [(line, {"a": number}) for number, line in enumerate(lines, 1)]
    assert read(tmp_path, text, "rows.json") == rows


def test_one_object_is_one_row(tmp_path: Path) -> None:
    row = {"messages": MESSAGES, "tools": []}
    assert read(tmp_path, "\n" + json.dumps(row, indent=1), "rows.json") == [(2, row)]
    row = {"instruction": "x", "output": "y", "tools": [{"name": "f"}]}
    assert read(tmp_path, json.dumps(row), "rows.json") == [(1, row)]


@settings(deadline=None)
@given(st.lists(st.dictionaries(CELLS, st.none() | st.integers() | CELLS, max_size=3), min_size=1), st.integers(0, 2))
def test_what_json_writes_is_what_is_read(
    tmp_path_factory: pytest.TempPathFactory, values: list[dict[str, Any]], indent: int
) -> None:
    text = json.dumps(values, indent=indent or None, ensure_ascii=False)
    rows = read(tmp_path_factory.mktemp("rows"), text, "rows.json")
    assert [value for _, value in rows] == values


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "rows.json: no rows\n  the file is sound, and holds none"),
        (" \n", "rows.json: no rows\n  the file holds nothing but blank lines"),
        (
            '"x"',
            "rows.json:1: a string where an array of objects belongs\nhint: a .json file holds [{…}, {…}]",
        ),
        (
            '[\n{"a": 1, "a": 2},\n{"a": NaN}, {"a": 1e999},\n{"a": "\\ud800"},\n3]',
            'rows.json:2: the key "a" stands twice in one object\n'
            "  rows.json:3: NaN is not JSON\n"
            "  rows.json:3: 1e999 is too large for a number\n"
            "  rows.json:4: \\ud800 is half of a surrogate pair, which no tokenizer can read\n"
            "  rows.json:5: a number where an object belongs\n"
            "hint: each element of the array is one row",
        ),
        ('{"data": [{"a": 1}], "data": [{}]}', 'rows.json:1: the key "data" stands twice in one object'),
        ('[{"a": 1},\n{"a": 2]', "rows.json:2:8: broken JSON: expecting ',' delimiter"),
        ('[{"a": 1}]\n\n[]', "rows.json:3: broken JSON: something stands after the end of the value"),
        ('[\n"é"]'.encode("latin1"), None),
        ("[{}]".encode("utf-16"), "rows.json: not UTF-8 text: the file is UTF-16 text\nhint: iconv"),
        ("[" * 100_000, "rows.json:1: nested too deeply to be read"),
    ],
)
def test_a_broken_json_file_is_explained(tmp_path: Path, content: bytes | str, message: str | None) -> None:
    expected = message or "rows.json:2:2: the byte 0xe9 is not UTF-8; the file may be Latin-1"
    assert say(tmp_path, content, "rows.json").startswith(expected)


def test_bad_elements_are_skipped_if_asked_for(tmp_path: Path) -> None:
    skipped: list[Problem] = []
    path = write(tmp_path, '[{"a": 1},\n{"a": NaN},\n{"a": 2}]', "rows.json")
    assert [row.line for row in read_rows(path, skipped)] == [1, 3]
    assert [problem.where for problem in skipped] == [f"{path}:2"]


@settings(deadline=None)
@given(st.lists(st.tuples(CELLS, CELLS), min_size=1), st.sampled_from([",", "\t"]), st.sampled_from(["\n", "\r\n"]))
def test_what_csv_writes_is_what_is_read(
    tmp_path_factory: pytest.TempPathFactory, cells: list[tuple[str, str]], delimiter: str, end: str
) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerows([("a", "b"), *cells])
    name = "rows.csv" if delimiter == "," else "rows.tsv"
    rows = read(tmp_path_factory.mktemp("rows"), text.getvalue(), name)
    assert [(value["a"], value["b"]) for _, value in rows] == cells


def test_csv_values_stay_texts_and_records_know_their_first_line(tmp_path: Path) -> None:
    text = '\ufeffa,b\r\n"x\n""y""", 007 \r\n\r\n2024-01-02,\r\nnull,1e3'
    assert read(tmp_path, text, "rows.csv") == [
        (2, {"a": 'x\n"y"', "b": " 007 "}),
        (5, {"a": "2024-01-02", "b": ""}),
        (6, {"a": "null", "b": "1e3"}),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n", "rows.csv: no rows\n  the file is sound, and holds none"),
        ("a,\nx,y\n", "rows.csv:1: a column of the header has no name"),
        ("a,b,a\nx,y,z\n", "rows.csv:1: the header names a twice"),
        ("a;b\nx;y\n", "rows.csv:1: the header is one column, 'a;b': its columns seem to be separated by ';'"),
        (
            "a,b\nx\nx,y\nx,y,z\n",
            "rows.csv:2: 1 fields where the header has 2\n  rows.csv:4: 3 fields where the header has 2\nhint: quote",
        ),
        ('a,b\n"x\ny",5" "pipe\n"",z\nx,"never\n\nends\n', "rows.csv:5: broken CSV: the quote that opens here never"),
        ('a,b\n"x"y,z\n', "rows.csv:2: broken CSV: ',' expected after '\"'"),
        ("a,b\nx,\0\n", "rows.csv:2: a NUL byte: the file is damaged"),
        ("a,b\nx,é\n".encode("latin1"), "rows.csv:2:3: the byte 0xe9 is not UTF-8; the file may be Latin-1"),
        (b"PK\x03\x04", "rows.csv: not UTF-8 text: the file is zip\nhint: unzip it first"),
    ],
)
def test_a_broken_csv_file_is_explained(tmp_path: Path, content: bytes | str, message: str) -> None:
    assert say(tmp_path, content, "rows.csv").startswith(message)


def test_a_cell_of_megabytes_is_read(tmp_path: Path) -> None:
    text = "x" * 5_000_000
    assert read(tmp_path, f"text\n{text}\n", "rows.csv") == [(2, {"text": text})]


def test_parquet_loses_only_the_nulls_that_arrow_filled_in(tmp_path: Path) -> None:
    calls = [{"function": {"name": "f", "arguments": {"x": 1, "y": None}}}]
    turns = [
        [{"role": "user", "content": "2024-01-02", "tool_calls": None}],
        [{"role": "assistant", "content": None, "tool_calls": calls}],
    ]
    columns = {"messages": turns, "n": [1, None], "tags": [["a", None], None], "__index_level_0__": [0, 1]}
    rows = read_rows(write_parquet(tmp_path, columns))
    assert [(row.line, row.value) for row in rows] == [
        (1, {"messages": [{"role": "user", "content": "2024-01-02"}], "n": 1, "tags": ["a", None]}),
        (
            2,
            {
                "messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}],
                "n": None,
                "tags": None,
            },
        ),
    ]


def test_rows_of_all_batches_are_counted_on(tmp_path: Path) -> None:
    path = write_parquet(tmp_path, {"text": [str(number) for number in range(5000)]}, row_group_size=700)
    rows = read_rows(path)
    assert [(row.line, row.value["text"]) for row in rows] == [(n + 1, str(n)) for n in range(5000)]


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (datetime.date(2024, 1, 2), "date32[day]"),
        (datetime.datetime(2024, 1, 2), "timestamp[us]"),
        (b"x", "binary"),
        ([{"role": "user", "content": "x", "at": datetime.datetime(2024, 1, 2)}], "timestamp[us]"),
    ],
)
def test_a_column_that_json_cannot_say_is_an_error_where_it_is_used(tmp_path: Path, value: Any, kind: str) -> None:
    key, belongs = ("messages", "a list of messages") if isinstance(value, list) else ("text", "a text")
    with pytest.raises(ContentError) as caught:
        read_examples(write_parquet(tmp_path, {key: [value]}))
    assert caught.value.what == f"{key}: a column of type {kind} where {belongs} belongs"
    assert read_examples(write_parquet(tmp_path, {"text": ["x"], "other": [value]}))[0].text == "x"


@settings(deadline=None)
@given(st.data())
def test_damaged_parquet_never_escapes_as_another_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    whole = write_parquet(folder, {"text": ["x", "y"]}, write_page_checksum=True).read_bytes()
    raw = bytearray(whole[: data.draw(st.integers(1, len(whole)))])
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(0, 255))
    try:
        rows = read_rows(write(folder, bytes(raw), "rows.parquet"))
    except ContentError as error:
        assert error.where.endswith("rows.parquet")
    else:
        assert rows


def test_damaged_pages_are_found_by_their_checksum(tmp_path: Path) -> None:
    options = {"compression": "none", "use_dictionary": False, "write_statistics": False, "write_page_checksum": True}
    whole = write_parquet(tmp_path, {"text": ["needle"]}, **options).read_bytes()
    assert "rows.parquet: no sound Parquet file" in say(tmp_path, whole.replace(b"needle", b"noodle"), "rows.parquet")


def test_two_columns_of_one_name_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table([["x"], ["y"]], names=["text", "text"]), path)
    with pytest.raises(ContentError, match="two columns are named text"):
        read_rows(path)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that sets what ``load_dataset`` gives, or raises; it returns the list of its calls."""
    calls: list[Any] = []

    def answer(result: Any) -> list[Any]:
        def load_dataset(*args: Any, **options: Any) -> Any:
            calls.append((args, options))
            if isinstance(result, Exception):
                raise result
            return result

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return calls

    table._load_hub_set.cache_clear()
    yield answer
    table._load_hub_set.cache_clear()


def test_a_hub_data_set_is_read_like_parquet_and_fetched_once(hub: Any) -> None:
    rows = [{"messages": MESSAGES, "n": 1}, {"messages": [MESSAGES[0], MESSAGES[1] | {"name": "bot"}], "n": 2}]
    calls = hub(datasets.Dataset.from_list(rows))
    (source,) = find_sources("org/name", config="small", split="test")
    assert [(row.file, row.line, row.value) for row in read_rows(source)] == [
        ("org/name", 1, rows[0]),
        ("org/name", 2, rows[1]),
    ]
    assert read_examples(source)[1].place == "org/name:2"
    assert len(hash_sources([source])) == 64
    assert calls == [(("org/name", "small"), {"split": "test"})]


def test_the_hash_of_a_hub_data_set_is_that_of_its_version(hub: Any) -> None:
    hashes = []
    for text in ("x", "y", "x"):
        table._load_hub_set.cache_clear()
        hub(datasets.Dataset.from_list([{"text": text}]))
        hashes.append(hash_sources([Source("org/name", None)]))
    assert hashes[0] == hashes[2] != hashes[1]


def test_json_features_are_parsed_and_keep_their_nulls(hub: Any) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "any": datasets.List(datasets.Json())})
    values = [{"text": "x", "any": [{"a": None}, {"a": [1, "b"]}]}]
    hub(datasets.Dataset.from_list(values, features=features))
    assert [row.value for row in read_rows(Source("org/name", None))] == values


def build_response(status: int) -> Any:
    return SimpleNamespace(status_code=status, headers={}, request=None)


def wrap(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


NOT_FOUND = datasets.exceptions.DatasetNotFoundError


@pytest.mark.parametrize(
    ("error", "what", "hint"),
    [
        (
            wrap(NOT_FOUND("x"), GatedRepoError("x", response=build_response(403))),
            "the data set is gated",
            "ask its owner",
        ),
        (
            wrap(NOT_FOUND("x"), RepositoryNotFoundError("x", response=build_response(401))),
            "neither a path",
            "check the spell",
        ),
        (NOT_FOUND("Revision 'x' doesn't exist"), "neither a path here nor a data set", "check the spelling"),
        (HfHubHTTPError("x", response=build_response(401)), "the Hub did not accept the token", "run: hf auth login"),
        (HfHubHTTPError("x", response=build_response(503)), "the Hub answered with status 503", "try again later"),
        (ConnectionError("Couldn't reach 'x' on the Hub"), "neither a path here nor in the local", "check the network"),
        (ValueError("BuilderConfig 'x' not found. Available: ['a']"), "builderConfig 'x' not", "set name"),
        (
            ValueError("Config name is missing.\nPlease pick one: ['a']\nE"),
            "config name is missing. Please",
            "set name",
        ),
        (ValueError("Unknown split \"x\". Should be one of ['a']."), 'unknown split "x". Should', "set split in"),
        (RuntimeError("Dataset scripts are no longer supported, but found x.py"), "it holds no files", "look for"),
        (KeyError("x"), "cannot be loaded: KeyError: 'x'", "download its files"),
    ],
)
def test_each_refusal_of_the_hub_has_one_remedy(hub: Any, error: Exception, what: str, hint: str) -> None:
    hub(error)
    with pytest.raises(HubError) as caught:
        read_rows(Source("org/name", None))
    assert caught.value.where == "org/name"
    assert caught.value.what.startswith(what)
    assert caught.value.hint.startswith(hint)


@pytest.mark.parametrize(
    ("cause", "kind"), [(OSError(28, "No space left on device"), DiskError), (ValueError("at 3"), ContentError)]
)
def test_a_full_disk_and_broken_files_are_no_fault_of_the_hub(hub: Any, cause: Exception, kind: type) -> None:
    hub(wrap(datasets.exceptions.DatasetGenerationError("An error occurred"), cause))
    with pytest.raises(kind):
        read_rows(Source("org/name", None))


def test_without_the_package_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    table._load_hub_set.cache_clear()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError) as caught:
        read_rows(Source("org/name", None))
    assert caught.value.hint == "pip install datasets"


def test_without_the_network_an_unknown_data_set_is_a_hub_error() -> None:
    table._load_hub_set.cache_clear()
    with pytest.raises(FtcliError) as caught:  # the tests run with HF_HUB_OFFLINE=1
        read_rows(Source("nobody/nothing-of-this-name", None))
    assert caught.value.exit_code == 4
