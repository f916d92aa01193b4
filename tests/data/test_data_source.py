"""Rows: exact values with their line, and for every way a file can be broken the words that mend it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftcli.data.json_text import JsonError, parse_json
from ftcli.data.source import Row, Source, find_sources, hash_sources, read_rows
from ftcli.errors import ContentError, DiskError, FtcliError, Problem, UsageError

JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=12,
)


def write(folder: Path, content: bytes | str, name: str = "train.jsonl") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def say(folder: Path, content: bytes | str) -> str:
    """What the user reads about a file of this content, with the folder's name taken out."""
    with pytest.raises(ContentError) as caught:
        read_rows(write(folder, content))
    return str(caught.value).replace(f"{folder}/", "")


def test_values_keep_their_exact_types(tmp_path: Path) -> None:
    line = '{"date": "2024-01-02", "when": "2024-01-02T03:04:05Z", "n": 1, "x": 1.0, "no": null, "yes": true}'
    [row] = read_rows(write(tmp_path, line))
    assert row.value == {
        "date": "2024-01-02",
        "when": "2024-01-02T03:04:05Z",
        "n": 1,
        "x": 1.0,
        "no": None,
        "yes": True,
    }
    assert [type(value).__name__ for value in row.value.values()] == [
        "str", "str", "int", "float", "NoneType", "bool"
    ]  # fmt: skip


def test_a_row_knows_its_place_and_blank_lines_count(tmp_path: Path) -> None:
    path = write(tmp_path, '\n{"a": 1}\n  \n\t\r\n{"a": 2}\n\n')
    rows = read_rows(path)
    assert rows == [Row(str(path), 2, {"a": 1}), Row(str(path), 5, {"a": 2})]
    assert rows[1].place == f"{path}:5"


@pytest.mark.parametrize(
    "content",
    [
        b'{"a": 1}\n{"a": 2}',
        b'{"a": 1}\n{"a": 2}\n',
        b'{"a": 1}\r\n{"a": 2}\r\n',
        b'\xef\xbb\xbf{"a": 1}\n{"a": 2}\n',
        b' {"a": 1} \n\t{"a": 2}\t\n',
    ],
    ids=["no newline at the end", "newline", "CRLF", "byte order mark", "indented"],
)
def test_harmless_variants_read_alike(tmp_path: Path, content: bytes) -> None:
    assert [(row.line, row.value) for row in read_rows(write(tmp_path, content))] == [
        (1, {"a": 1}),
        (2, {"a": 2}),
    ]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085", "\v", "\f", "\x1c", "\r"])
def test_only_newlines_split_lines(tmp_path: Path, separator: str) -> None:
    inside = separator if ord(separator) >= 0x20 else f"\\u{ord(separator):04x}"
    path = write(tmp_path, f'{{"a": "x{inside}y"}}\n{{"a": "z"}}\n')
    assert [row.value["a"] for row in read_rows(path)] == [f"x{separator}y", "z"]


@settings(deadline=None)  # the disk may be slow
@given(st.lists(st.dictionaries(st.text(), JSON_VALUES, max_size=4), min_size=1, max_size=5), st.booleans())
def test_what_json_writes_is_what_is_read(
    tmp_path_factory: pytest.TempPathFactory, values: list[dict[str, Any]], is_ascii: bool
) -> None:
    text = "\n".join(json.dumps(value, ensure_ascii=is_ascii) for value in values)
    rows = read_rows(write(tmp_path_factory.mktemp("rows"), text))
    assert [row.value for row in rows] == values
    assert [row.line for row in rows] == list(range(1, len(values) + 1))


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_no_bytes_escape_as_another_kind_of_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = write(tmp_path_factory.mktemp("rows"), b'{"a": "' + content + b'"}\n{"a": 1}\n')
    try:
        rows = read_rows(path)
    except ContentError as error:
        assert str(path) in error.where
    else:
        assert rows[-1].value == {"a": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "train.jsonl: no rows\n  the file is empty"),
        ("\n \r\n\n", "train.jsonl: no rows\n  the file holds nothing but blank lines"),
        (
            '{"a": 1}\n{"a": "b',
            "train.jsonl:2:7: broken JSON: the last line looks cut off (a string has no end)",
        ),
        (
            '{"a": 1}\n{"a": [1, 2',
            "train.jsonl:2:12: broken JSON: the last line looks cut off (expecting ',' delimiter)",
        ),
        (b'{"a": 1}\n{"a": "\xe2\x82', "train.jsonl:2: broken JSON: the last line looks cut off"),
        (
            '{"a": "b\n{"a": 1}\n',
            "train.jsonl:1:7: broken JSON: a string has no end\nhint: a newline inside a string is written \\n",
        ),
        (
            '{"a": 1} {"a": 2}\n{"a": 3}\n',
            "train.jsonl:1:10: broken JSON: more than one JSON value on the line\nhint: write one JSON object per line",
        ),
        (
            "{'a': 1}\n{'a': 2}\n",
            "train.jsonl:1:2: broken JSON: expecting property name enclosed in double quotes\n"
            "  train.jsonl:2:2: broken JSON: expecting property name enclosed in double quotes\n"
            "hint: JSON has double quotes; these rows look like printed Python objects",
        ),
        ('{"a": 1, "b": {"c": 1, "c": 1}}', 'train.jsonl:1: the key "c" stands twice in one object'),
        ('{"a": NaN}', "train.jsonl:1: NaN is not JSON"),
        ('{"a": [-Infinity]}', "train.jsonl:1: -Infinity is not JSON"),
        ('{"a": 1e999}', "train.jsonl:1: 1e999 is too large for a number"),
        (
            '{"a": "\\ud800"}',
            "train.jsonl:1: \\ud800 is half of a surrogate pair, which no tokenizer can read",
        ),
        (
            '{"\\uDFFF": 1}',
            "train.jsonl:1: \\udfff is half of a surrogate pair, which no tokenizer can read",
        ),
        (f'{{"a": {"9" * 5000}}}', "train.jsonl:1: an integer has too many digits to be read"),
        (f'{{"a": {"[" * 200_000}', "train.jsonl:1: nested too deeply to be read"),
        (f'{{"a": {"[" * 200_000}{"]" * 200_000}}}', "train.jsonl:1: nested too deeply to be read"),
        (f'{{"a": {"[" * 201}{"]" * 201}}}', "train.jsonl:1: nested more than 200 levels deep"),
        (
            '{"a": "b\tc"}',
            "train.jsonl:1:9: broken JSON: a control character inside a string\n"
            "hint: a newline is written \\n, a tab \\t",
        ),
        (
            '{"a": 1}\n[1]\n"b"\n3\nnull\ntrue\n',
            "train.jsonl:2: an array where an object belongs\n"
            "  train.jsonl:3: a string where an object belongs\n"
            "  train.jsonl:4: a number where an object belongs\n"
            "  train.jsonl:5: null where an object belongs\n"
            "  train.jsonl:6: a boolean where an object belongs\n"
            "hint: write one JSON object per line",
        ),
        (b'{"a": 1}\n{"a": "\0\0"}\n', "train.jsonl:2:8: a NUL byte: the file is damaged"),
        (
            '{"a": 1}\n\ufeff{"a": 2}\n',
            "train.jsonl:2:1: broken JSON: a byte order mark inside the file (two files put together?)",
        ),
        (
            '{"a": "café"}\n{"a": "b"}\n'.encode("latin1"),
            "train.jsonl:1:11: the byte 0xe9 is not UTF-8; the file may be Latin-1\n"
            "hint: iconv -f latin1 -t utf-8 train.jsonl > utf8.jsonl",
        ),
        (
            '{"a": "“b”"}\n{"a": "b"}\n'.encode("cp1252"),
            "train.jsonl:1:8: the byte 0x93 is not UTF-8; the file may be Windows-1252\n"
            "hint: iconv -f windows-1252 -t utf-8 train.jsonl > utf8.jsonl",
        ),
    ],
)
def test_a_broken_file_is_explained(tmp_path: Path, content: bytes | str, message: str) -> None:
    assert say(tmp_path, content) == message


@pytest.mark.parametrize("codec", ["utf-16", "utf-16le", "utf-16be", "utf-32"])
def test_wide_encodings_are_named_with_the_command_that_converts(tmp_path: Path, codec: str) -> None:
    assert say(tmp_path, '{"a": "b"}\n'.encode(codec)) == (
        f"train.jsonl: not UTF-8 text: the file is {codec.upper()} text\n"
        f"hint: iconv -f {codec} -t utf-8 train.jsonl > utf8.jsonl"
    )


def test_the_command_in_a_hint_quotes_the_path(tmp_path: Path) -> None:
    path = write(tmp_path, '{"a": "é"}'.encode("latin1"), "my rows.jsonl")
    with pytest.raises(ContentError) as caught:
        read_rows(path)
    assert caught.value.hint == f"iconv -f latin1 -t utf-8 '{path}' > utf8.jsonl"


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b"\x1f\x8b\x08\0", "gzip"),
        (b"PAR1\x15\0", "parquet"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a git-lfs pointer"),
        (b"<!DOCTYPE html>\n<html>", "an HTML page"),
    ],
)
def test_other_kinds_of_file_are_named(tmp_path: Path, content: bytes, name: str) -> None:
    assert say(tmp_path, content).startswith(f"train.jsonl: not UTF-8 text: the file is {name}")


ARRAY = (
    "train.jsonl:1: this is a JSON array; write one object per line\n"
    "hint: name the file .json, or jq -c '.[]' train.jsonl > rows.jsonl"
)


@pytest.mark.parametrize(
    "content",
    [
        '[{"a": 1}, {"a": 2}]',
        '[{"a": 1},\n{"a": 2}]\n',
        '[\n  {"a": 1},\n  {"a": 2}\n]\n',
        '[\n  {"a": 1},\n  {"a"',
        "[]",
    ],
    ids=["one line", "a line each", "indented", "indented and cut off", "empty"],
)
def test_a_json_array_is_recognised(tmp_path: Path, content: str) -> None:
    assert say(tmp_path, content) == ARRAY


@pytest.mark.parametrize("content", ['{\n  "a": 1\n}\n', '{"a": [\n1]}\n{"a": [\n2]}\n', '{\n  "a": 1,\n  "b'])
def test_a_document_over_several_lines_is_recognised(tmp_path: Path, content: str) -> None:
    assert say(tmp_path, content) == (
        "train.jsonl:1: this is a JSON object laid out over several lines; write one object per line\n"
        "hint: jq -c . train.jsonl > rows.jsonl"
    )


def test_the_first_ten_bad_lines_are_named_at_once(tmp_path: Path) -> None:
    good, bad = '{"a": 1}\n', '{"a": 1, "a": 2}\n'
    lines = say(tmp_path, good + bad * 17 + good).splitlines()
    places = [f"train.jsonl:{number}: " for number in range(2, 12)]
    assert lines[:10] == [
        f'{"" if i == 0 else "  "}{place}the key "a" stands twice in one object' for i, place in enumerate(places)
    ]
    assert lines[10:] == ["  and 7 more"]


def test_ten_bad_lines_leave_nothing_uncounted(tmp_path: Path) -> None:
    assert "more" not in say(tmp_path, '{"a": 1, "a": 2}\n' * 10)


@pytest.mark.parametrize("call", [read_rows, lambda path: find_sources(str(path))], ids=["rows", "sources"])
def test_a_missing_file_suggests_its_neighbour(tmp_path: Path, call: Any) -> None:
    write(tmp_path, "{}")
    with pytest.raises(UsageError) as caught:
        call(tmp_path / "trian.jsonl")
    assert str(caught.value) == (f"{tmp_path}/trian.jsonl: no such file\nhint: did you mean {tmp_path}/train.jsonl?")
    assert caught.value.exit_code == 2


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        read_rows(tmp_path / "dta" / "train.jsonl")
    assert caught.value.hint == f"there is no folder {tmp_path}/dta"


def test_a_folder_and_a_pattern_are_all_their_files_by_name(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.json", "sub/c.CSV", ".hidden.jsonl", "README.md", "dataset_info.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path, "{}", name)
    found = [source.name for source in find_sources(str(tmp_path))]
    assert found == [f"{tmp_path}/{name}" for name in ("a.json", "b.jsonl", "sub/c.CSV")]
    assert [source.name for source in find_sources(f"{tmp_path}/*.jsonl")] == [f"{tmp_path}/b.jsonl"]
    assert len(find_sources(f"{tmp_path}/**/*.[cC][sS][vV]")) == 1
    assert find_sources("org/name", config="small", split="test") == [Source("org/name", None, "small", "test")]


@pytest.mark.parametrize("reference", ["{}/none*.jsonl", "{}/empty", "{}/rows.xlsx/x.jsonl"])
def test_what_holds_no_file_is_an_error(tmp_path: Path, reference: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError):
        find_sources(reference.format(tmp_path))


@pytest.mark.parametrize("name", ["train.txt", "train.xlsx", "train.jsonl.gz"])
def test_other_endings_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_rows(write(tmp_path, "{}", name))
    ending = name[name.rindex(".") :]
    assert caught.value.what.startswith(f"{ending} is not read; these are: .jsonl")
    assert caught.value.hint
    with pytest.raises(UsageError, match="is not read"):
        find_sources(str(tmp_path / name))
    with pytest.raises(UsageError, match="is not read"):
        find_sources(f"{tmp_path}/tr*")


def test_bad_lines_are_skipped_and_kept_where_that_is_asked(tmp_path: Path) -> None:
    path = write(tmp_path, '{"a": 1}\n{"a": \n[1]\n{"b": 2}\n')
    skipped: list[Problem] = []
    assert [row.line for row in read_rows(path, skipped)] == [1, 4]
    assert [problem.where for problem in skipped] == [f"{path}:2:7", f"{path}:3"]
    with pytest.raises(ContentError):
        read_rows(write(tmp_path, "[1]\n", "b.jsonl"), [])


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(UsageError, match="a pipe, not a regular file"):
        read_rows(tmp_path / "pipe.jsonl")
    with pytest.raises(UsageError, match="a pipe, not a regular file"):
        find_sources(str(tmp_path / "pipe.jsonl"))  # before anything opens it to hash it
    with pytest.raises(UsageError, match="no rows: a device"):
        read_rows(Path("/dev/null"))
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    with pytest.raises(UsageError, match="a link to nothing"):
        find_sources(str(tmp_path / "loop.jsonl"))


def test_links_to_folders_do_not_multiply_files(tmp_path: Path) -> None:
    path = write(tmp_path, "{}")
    (tmp_path / "circle").symlink_to(".")
    assert [source.path for source in find_sources(f"{tmp_path}/**/*.jsonl")] == [path]
    assert [source.path for source in find_sources(str(tmp_path))] == [path]


@pytest.mark.parametrize("reference", ["json", "csv", "train", "x.txt", "data/x.jsonl.gz", "./train"])
def test_what_is_no_hub_id_never_reaches_the_hub(reference: str) -> None:
    with pytest.raises(UsageError):  # to datasets, a bare json means the files of the working folder
        find_sources(reference)


def test_a_folder_that_may_not_be_looked_at_is_a_disk_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "exists", refuse)
    with pytest.raises(DiskError, match="Permission denied"):
        find_sources(str(tmp_path / "train.jsonl"))


def test_a_line_of_30_megabytes_is_read(tmp_path: Path) -> None:
    text = "x" * 30_000_000
    (row,) = read_rows(write(tmp_path, json.dumps({"text": text})))
    assert row.value["text"] == text


def test_a_file_that_may_not_be_read_is_a_disk_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "{}")

    def refuse(self: Path) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)  # root may read every file, whatever its mode
    with pytest.raises(DiskError) as caught:
        read_rows(path)
    assert str(caught.value) == f"{path}: cannot be read: Permission denied"
    assert isinstance(caught.value, FtcliError)
    assert caught.value.exit_code == 6


def test_the_hash_is_that_of_the_bytes_in_their_order(tmp_path: Path) -> None:
    first, second = write(tmp_path, "{}\n", "a.jsonl"), write(tmp_path, '{"b": 1}\n', "b.jsonl")
    sources = [Source("a", first), Source("b", second)]
    assert hash_sources(sources) == hashlib.sha256(b'{}\n{"b": 1}\n').hexdigest()
    assert hash_sources(sources[::-1]) != hash_sources(sources)


@given(st.text(max_size=60))
def test_parse_json_raises_nothing_but_json_error(text: str) -> None:
    try:
        value = parse_json(text)
    except JsonError as error:
        assert error.what
    else:
        assert value == json.loads(text)
