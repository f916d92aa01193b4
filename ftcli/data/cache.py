"""Tables of rendered rows on disk, so that a second start need not render.

An entry is a folder named by a hash of everything that its ids follow from (the rows' bytes, tokenizer, template
and policy): `rows.arrow`, one record batch whose flat arrays are mapped into memory as they are, and
`entry.json` with the files and the hash of the former. An entry that does not check out is made again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ftcli import __version__
from ftcli.data.documents import Ints, RowTable, SourceFile
from ftcli.errors import DiskError
from ftcli.store.cache import find_cache, prune_cache
from ftcli.store.file import hash_file, staged_folder, write_json

_VERSION = 3  # of the arrays and of what the flags mean


def name_entry(values: Mapping[str, Any]) -> str:
    """The name of the entry whose ids follow from ``values``."""
    known = {"version": _VERSION, "ftcli": __version__, **values}
    return hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()[:32]


def load_table(name: str) -> RowTable | None:
    """The table of an entry, mapped into memory, or None where there is no sound one."""
    import pyarrow as pa

    folder = find_cache("rows") / name
    try:
        entry = json.loads((folder / "entry.json").read_text(encoding="utf-8"))
        if hash_file(folder / "rows.arrow") != entry["sha256"]:
            return None
        with pa.memory_map(str(folder / "rows.arrow")) as mapped:
            batch = pa.ipc.open_file(mapped).get_batch(0)
        arrays = {name: _unwrap(batch.column(name).values) for name in batch.schema.names}
        table = RowTable(tuple(SourceFile(**file) for file in entry["files"]), **arrays)
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        return None
    with suppress(OSError):
        os.utime(folder)
    return table


def save_table(name: str, table: RowTable) -> str:
    """Why the table could not be kept, empty if it could; that is no error."""
    import pyarrow as pa

    folder = find_cache("rows") / name
    arrays = table.list_arrays()
    columns = [
        pa.LargeListArray.from_arrays(_wrap(np.array([0, len(array)])), _wrap(array)) for array in arrays.values()
    ]
    batch = pa.record_batch(columns, names=list(arrays))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        prune_cache(folder.parent)
        with staged_folder(folder) as staging:
            path = Path(staging) / "rows.arrow"
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
                writer.write_batch(batch)
            write_json(staging / "entry.json", {"sha256": hash_file(path), "files": [asdict(f) for f in table.files]})
    except (OSError, DiskError) as error:
        return str(error).splitlines()[0]
    return ""


# pyarrow's own conversions, either way, would import pandas


def _wrap(array: Ints) -> Any:
    """An Arrow array over the memory of ``array``."""
    import pyarrow as pa

    kind = pa.from_numpy_dtype(array.dtype)
    return pa.Array.from_buffers(kind, len(array), [None, pa.py_buffer(np.ascontiguousarray(array))])


def _unwrap(array: Any) -> Ints:
    """A NumPy array over the memory of an Arrow one."""
    kind = np.dtype(array.type.to_pandas_dtype())
    return np.frombuffer(array.buffers()[1], kind, len(array), array.offset * kind.itemsize)
