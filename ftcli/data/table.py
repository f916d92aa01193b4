"""Rows from everything that is not lines of JSON: JSON documents, CSV and TSV, Parquet, data sets on the Hub.

Each reader gives what the file says and nothing else: no type is guessed from a text, no missing cell is filled.
"""

from __future__ import annotations

import codecs
import csv
import errno
import io
import re
from collections import Counter
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ftcli.data.json_text import JsonError, name_type, parse_json, skim_json, split_array, split_object
from ftcli.data.source import Row, check_encoding, explain_bytes, read_lines
from ftcli.errors import ContentError, DiskError, FtcliError, HubError, Problem, UsageError

if TYPE_CHECKING:
    from ftcli.data.source import Source

_LONGEST_FIELD = 1 << 30
_BATCH_ROWS = 4096
# An object with one of these is itself a row, even if one of its values is a list of objects.
_ROW_KEYS = {"messages", "conversations", "instruction", "prompt", "text"}


class ForeignValue:
    """Stands for a value that JSON cannot say (a date, an image, bytes): an error as soon as a format needs it."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __repr__(self) -> str:
        return f"a column of type {self.kind}"


def read_json_rows(source: Source, raw: bytes, problems: list[Problem]) -> list[Row]:
    """The objects of a JSON array, of the only array of an object, or of lines; one object is one row.

    Raises:
        ContentError: broken JSON, or a root that holds no rows.
    """
    text = _decode(source, raw)
    try:
        parts = _split_document(text)
    except JsonError as error:
        first, _, others = text.strip().partition("\n")
        if others and first.startswith("{") and first.rstrip().endswith("}"):
            return read_lines(source, raw, problems)
        place = f"{error.line}:{error.column}" if error.column else str(error.line)
        raise ContentError(error.what, where=f"{source.name}:{place}", hint=error.hint) from None
    rows: list[Row] = []
    line, counted = 1, 0
    for position, part in parts:
        line, counted = line + text.count("\n", counted, position), position
        try:
            value = parse_json(part)
        except JsonError as error:
            problems.append(Problem(error.what, f"{source.name}:{line}", error.hint))
            continue
        if isinstance(value, dict):
            rows.append(Row(source.name, line, value))
        else:
            what = f"{name_type(value)} where an object belongs"
            problems.append(Problem(what, f"{source.name}:{line}", "each element of the array is one row"))
    return rows


def _split_document(text: str) -> Iterable[tuple[int, str]]:
    """The place and text of each row: the elements of the document's array, or the one object that it is."""
    begin = len(text) - len(text.lstrip(" \t\r\n"))
    if begin == len(text):
        return []
    root, end = skim_json(text, begin)
    if rest := text[end:].lstrip(" \t\r\n"):
        line = text.count("\n", 0, len(text) - len(rest)) + 1
        raise JsonError("broken JSON: something stands after the end of the value", line=line)
    if isinstance(root, list):
        return split_array(text, begin)
    if not isinstance(root, dict):
        found = name_type(parse_json(text))
        raise JsonError(f"{found} where an array of objects belongs", hint="a .json file holds [{…}, {…}]")
    lists = [
        key for key, item in root.items() if isinstance(item, list) and all(isinstance(part, dict) for part in item)
    ]
    if len(lists) != 1 or _ROW_KEYS & root.keys():
        return [(begin, text[begin:end])]
    places = [position for key, position in split_object(text, begin) if key == lists[0]]
    if len(places) > 1:
        raise JsonError(f'the key "{lists[0]}" stands twice in one object')
    return split_array(text, places[0])


def read_csv_rows(source: Source, raw: bytes, problems: list[Problem], *, delimiter: str) -> list[Row]:
    """The records of a CSV file with a header; every value is the text that stands there, an empty cell is empty.

    Raises:
        ContentError: no header, one with empty or repeated names, or a quote that never ends.
    """
    text = _decode(source, raw)
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ContentError("a NUL byte: the file is damaged", where=f"{source.name}:{line}")
    csv.field_size_limit(_LONGEST_FIELD)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[Row] = []
    begin = 1
    header: list[str] = []
    try:
        for record in reader:
            line, begin = begin, reader.line_num + 1
            if not record:
                continue
            if not header:
                header = record
                _check_header(source, header, line)
            elif len(record) != len(header):
                what = f"{len(record)} fields where the header has {len(header)}"
                hint = "quote values that hold the delimiter, a quote or a newline"
                problems.append(Problem(what, f"{source.name}:{line}", hint))
            else:
                rows.append(Row(source.name, line, dict(zip(header, record, strict=True))))
    except csv.Error as error:
        raise _explain_csv(source, text, begin, delimiter, error) from None
    return rows


def _check_header(source: Source, header: list[str], line: int) -> None:
    where = f"{source.name}:{line}"
    if not all(name.strip() for name in header):
        raise ContentError("a column of the header has no name", where=where, hint="the first line names the columns")
    twice = [name for name, count in Counter(header).items() if count > 1]
    if twice:
        raise ContentError(f"the header names {', '.join(twice)} twice", where=where, hint="rename one of them")
    if len(header) == 1 and (found := next((mark for mark in ";\t,|" if mark in header[0]), None)):
        raise ContentError(
            f"the header is one column, {header[0]!r}: its columns seem to be separated by {found!r}",
            where=where,
            hint="name the file .tsv" if found == "\t" else "separate the columns of a .csv by commas",
        )


def _explain_csv(source: Source, text: str, begin: int, delimiter: str, error: csv.Error) -> ContentError:
    """The error for a record that cannot be read; a quote that never ends is named by the line that it opens on."""
    what, hint = f"broken CSV: {error}", 'a quote inside a quoted value is written twice: ""'
    if str(error) == "unexpected end of data":
        record = "".join(list(io.StringIO(text, newline=""))[begin - 1 :])
        whole_cell = rf'"[^"]*(?:""[^"]*)*"|[^"{delimiter}\r\n][^{delimiter}\r\n]*'
        if found := re.match(rf"(?:(?:{whole_cell})?[{delimiter}\r\n])*", record):
            begin += len(re.findall(r"\r\n|\r|\n", found[0]))
        what = "broken CSV: the quote that opens here never ends"
    return ContentError(what, where=f"{source.name}:{begin}", hint=hint)


def read_parquet_rows(source: Source, raw: bytes, problems: list[Problem]) -> list[Row]:
    """The rows of a Parquet file, counted from 1; fields that Arrow filled with null are left out.

    Raises:
        ContentError: the file is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(pa.BufferReader(raw), page_checksum_verification=True)
        return _take_rows(source, file.iter_batches(_BATCH_ROWS))
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        hint = "write or download the file again"
        raise ContentError(f"no sound Parquet file: {reason}", where=source.name, hint=hint) from error


def read_hub_rows(source: Source) -> list[Row]:
    """The rows of a data set on the Hub, counted from 1.

    Raises:
        HubError: it is missing, gated, or cannot be reached; or it has no such configuration or split.
    """
    return _take_rows(source, _load_hub_set(source).with_format("arrow").iter(_BATCH_ROWS))


def identify_hub_set(source: Source) -> str:
    """What tells this version of a Hub data set from another: the fingerprint that ``datasets`` gives it."""
    return f"{source.name}:{source.config}:{source.split}:{_load_hub_set(source)._fingerprint}"


@lru_cache(maxsize=8)  # one version for the hash, the training rows and the samples, whatever is pushed meanwhile
def _load_hub_set(source: Source) -> Any:
    try:
        import datasets
    except ImportError as error:
        what, hint = "data sets of the Hub need the package datasets", "pip install datasets"
        raise UsageError(what, where=source.name, hint=hint) from error
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(source.name, source.config, split=source.split)
    except Exception as error:
        raise _explain_hub_set(error, source) from error


def _explain_hub_set(error: Exception, source: Source) -> FtcliError:
    """What keeps a data set from being loaded, with one remedy; ``datasets`` wraps the errors of the Hub."""
    from datasets.exceptions import DatasetGenerationError

    chain = [error]
    while isinstance(inner := chain[-1].__cause__ or chain[-1].__context__, Exception):
        chain.append(inner)
    if any(isinstance(inner, OSError) and inner.errno == errno.ENOSPC for inner in chain):
        return DiskError("the disk is full", where=source.name, hint="make room in HF_HOME, or set it to another disk")
    if isinstance(error, DatasetGenerationError):
        what, hint = f"its files cannot be read: {chain[-1]}", "download and mend them, then name their folder"
        return ContentError(what, where=source.name, hint=hint)
    what, hint = _explain_refusal(chain) or _explain_lack(error)
    return HubError(what, where=source.name, hint=hint)


def _explain_refusal(chain: list[Exception]) -> tuple[str, str] | None:
    """What the Hub answered and the remedy, or None if it did not refuse."""
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    status = next((code for e in chain if (code := getattr(getattr(e, "response", None), "status_code", None))), None)
    if any(isinstance(error, GatedRepoError) for error in chain):
        return "the data set is gated", "ask its owner for access on its page, then run: hf auth login"
    if any(isinstance(error, RepositoryNotFoundError | DatasetNotFoundError) for error in chain):
        what = "neither a path here nor a data set on the Hub (or it is private)"
        return what, "check the spelling; for a private data set run: hf auth login"
    if status == 401:
        return "the Hub did not accept the token", "run: hf auth login"
    return (f"the Hub answered with status {status}", "try again later") if status else None


def _explain_lack(error: Exception) -> tuple[str, str]:
    """What the data set lacks, or that it cannot be reached, and the remedy."""
    from datasets.exceptions import DataFilesNotFoundError
    from huggingface_hub.errors import OfflineModeIsEnabled

    said = " ".join(str(error).splitlines()[:2])
    if isinstance(error, DataFilesNotFoundError) or "scripts are no longer supported" in said:
        what = "it holds no files of rows (a loading script is never run)"
        return what, "look for a version of it in Parquet or JSONL"
    if isinstance(error, ValueError):  # in the words of datasets, which list what there is
        key = "split" if said.startswith("Unknown split") else "name (the configuration)"
        return said[:1].lower() + said[1:], f"set {key} in datasets[]"
    if isinstance(error, OSError | OfflineModeIsEnabled):
        what = "neither a path here nor in the local Hub cache, and the Hub cannot be reached"
        return what, "check the network (and HF_HUB_OFFLINE), or name a local file"
    return f"cannot be loaded: {type(error).__name__}: {said}", "download its files and name their folder"


def _take_rows(source: Source, batches: Iterable[Any]) -> list[Row]:
    """The rows of Arrow batches or tables of one schema."""
    rows: list[Row] = []
    names: list[str] = []
    for batch in batches:
        if not rows:
            names = [name for name in batch.schema.names if name != "__index_level_0__"]  # what pandas adds
            if twice := [name for name, count in Counter(names).items() if count > 1]:
                hint = "rename one of them"
                raise ContentError(f"two columns are named {', '.join(twice)}", where=source.name, hint=hint)
        columns = [_read_column(source, batch, name) for name in names]
        rows += [
            Row(source.name, number, dict(zip(names, values, strict=True)))
            for number, values in enumerate(zip(*columns, strict=True), len(rows) + 1)
        ]
    return rows


def _read_column(source: Source, batch: Any, name: str) -> list[Any]:
    column = batch[name]
    if foreign := _find_foreign(column.type):
        return [ForeignValue(foreign)] * len(column)
    clean = _build_cleaner(column.type)
    try:
        values: list[Any] = column.to_pylist()
        return [None if value is None else clean(value) for value in values] if clean else values
    except (JsonError, UnicodeDecodeError) as error:
        raise ContentError(f"the column {name} is damaged: {error}", where=source.name) from error


def _find_foreign(kind: Any) -> str:
    """The first type inside ``kind`` that JSON cannot say, in Arrow's words; empty if there is none."""
    from pyarrow import types

    if types.is_struct(kind):
        return next((found for field in kind if (found := _find_foreign(field.type))), "")
    if hasattr(kind, "value_type") and not types.is_map(kind):  # lists of all kinds, dictionaries
        return _find_foreign(kind.value_type)
    is_text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind) or _is_json(kind)
    is_number = types.is_integer(kind) or types.is_floating(kind)
    return "" if is_text or is_number or types.is_boolean(kind) or types.is_null(kind) else str(kind)


def _build_cleaner(kind: Any) -> Callable[[Any], Any] | None:
    """A function for values of ``kind`` that drops fields that Arrow filled with null; None where it has nothing to do.

    A field is null because another row has it, or because the row says null: Arrow does not tell which.
    """
    from pyarrow import types

    if types.is_struct(kind):
        fields = {field.name: _build_cleaner(field.type) for field in kind}
        return lambda value: {
            name: clean(item) if (clean := fields[name]) else item for name, item in value.items() if item is not None
        }
    if hasattr(kind, "value_type") and (clean := _build_cleaner(kind.value_type)):
        return lambda value: [None if item is None else clean(item) for item in value]
    return parse_json if _is_json(kind) else None


def _is_json(kind: Any) -> bool:
    return getattr(kind, "extension_name", "") == "arrow.json"


def _decode(source: Source, raw: bytes) -> str:
    check_encoding(source.name, raw)
    raw = raw.removeprefix(codecs.BOM_UTF8)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line, start = raw.count(b"\n", 0, error.start) + 1, raw.rfind(b"\n", 0, error.start) + 1
        here = UnicodeDecodeError("utf-8", raw, error.start - start, error.end - start, error.reason)
        found = explain_bytes(source.name, raw[start:].partition(b"\n")[0], here)
        raise ContentError(found.what, where=f"{source.name}:{line}:{found.column}", hint=found.hint) from None
