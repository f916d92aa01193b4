"""The tensors of a .bin file as torch.save writes it, without running its pickle.

zip     NAME/data.pkl │ NAME/data/KEY: the bytes of one storage
legacy  magic │ protocol │ system │ object │ keys: five pickles │ per key: length i64, bytes
"""

from __future__ import annotations

import io
import math
import struct
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from ftcli.errors import ContentError
from ftcli.store.pickle_machine import ITEM_BYTES, MOST_BYTES, Machine, Tensor
from ftcli.store.tensor import COPY_AGAIN, TensorEntry, check_name, explain_foreign, open_weights

WRAPPERS = ("state_dict", "model", "module")
# the pickles of 0x1950A86A20F9469CFC6C and of 1001
_LEGACY_HEAD = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."
_CUT = "cut off: {} bytes of its tensors are missing"
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a part of a zip: signature, length of its name, of its extra field
_DAMAGE = (ValueError, LookupError, EOFError, RuntimeError, OverflowError, struct.error, zlib.error, zipfile.BadZipFile)


@dataclass(frozen=True)
class Pickled:
    """What a .bin file holds: ``root`` is the value that was saved, ``partial`` the dicts in it that lack an entry.

    ``places`` tells for each storage at which byte of the file it begins; empty where that was not asked for.
    """

    root: Any
    partial: list[dict[str, Any]]
    places: Mapping[str, int] = field(default_factory=dict)


def read_bin_tensors(path: Path) -> tuple[list[TensorEntry], dict[str, Any]]:
    """The tensors of the .bin file at ``path`` in the order of its pickle, and no metadata.

    A tensor on the bytes of an earlier one ``shares`` them. Cost: the pickle's bytes, whatever the file's size.

    Raises:
        ContentError: the file is damaged, cut off, something else, or asks to run code.
        DiskError: it cannot be read.
    """
    return _list_tensors(read_pickled(path, locates=False).root, path), {}


def read_pickled(path: Path, *, locates: bool = True) -> Pickled:
    """What the .bin file at ``path`` holds, and where its storages lie if it ``locates`` them.

    Raises:
        ContentError: as `read_bin_tensors`; or its storages are not such that their bytes are the numbers.
        DiskError: it cannot be read.
    """
    where = str(path)
    with open_weights(path) as (stream, size_bytes), warnings.catch_warnings(action="ignore"):
        head = stream.read(32)
        is_zip = head.startswith(b"PK\x03\x04")
        if not is_zip and (foreign := explain_foreign(head, where, "a file of torch.save")):
            raise foreign
        try:
            own = io.FileIO(stream.fileno(), closefd=False)
            if is_zip:
                with _Bounded(own) as bounded:
                    return _read_zip(bounded, size_bytes, where, locates)
            with _Head(own) as beginning:
                return _read_legacy(beginning, size_bytes, where, locates)
        except _DAMAGE as error:
            raise _explain_damage(error, where) from error


def _explain_damage(error: Exception, where: str) -> ContentError:
    why = ascii(str(error)[:160])[1:-1]  # an error may quote megabytes of the file
    return ContentError("the .bin file is damaged or cut off", where=where, why=why, hint=COPY_AGAIN)


class _Bounded(io.BufferedReader):
    """A file of which no single read takes more than a pickle may: a zip's own directory can lie."""

    def read(self, size: int | None = -1) -> bytes:
        most = MOST_BYTES + 1
        return _check_length(super().read(min(size, most) if size is not None and size >= 0 else most))

    def seek(self, offset: int, whence: int = 0) -> int:
        if whence == 0 and offset < 0:
            raise ValueError("a part of it would lie before its start")
        return super().seek(offset, whence)


class _Head(_Bounded):
    """The pickles at the start of a file, which together are no longer than one may be."""

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self._check_place()
        return data

    def readline(self, size: int | None = -1) -> bytes:
        line = _check_length(super().readline(MOST_BYTES + 1))
        self._check_place()
        return line

    def read_at(self, place: int, size: int) -> bytes:
        """Bytes from anywhere in the file."""
        self.seek(place)
        return super().read(size)

    def _check_place(self) -> None:
        if self.tell() > MOST_BYTES:
            raise ValueError(f"its pickle is longer than {MOST_BYTES >> 20} MiB")


def _check_length(data: bytes) -> bytes:
    if len(data) > MOST_BYTES:
        raise ValueError(f"a part of it is longer than {MOST_BYTES >> 20} MiB")
    return data


def _read_zip(stream: BinaryIO, size_bytes: int, where: str, locates: bool) -> Pickled:
    with zipfile.ZipFile(stream) as archive:
        parts = {info.filename: info for info in archive.infolist()}
        name = next((name for name in parts if f"/{name}".endswith("/data.pkl")), "")
        if not name:
            raise ContentError("a zip archive that torch.save did not write: it holds no data.pkl", where=where)
        if parts[name].file_size > MOST_BYTES:
            raise ContentError(f"its pickle is longer than {MOST_BYTES >> 20} MiB", where=where)
        if parts[name].compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError("its pickle is packed as torch.save never does")
        with archive.open(name) as part:
            machine = Machine(io.BytesIO(part.read(MOST_BYTES)), where)
        folder = name.removesuffix("data.pkl")
        order = archive.read(f"{folder}byteorder") if locates and f"{folder}byteorder" in parts else b"little"
    if order != b"little":
        raise ContentError(
            f"its numbers lie in the byte order {ascii(order[:20])[2:-1]}; only little-endian files are read",
            where=where,
            hint="save it again on the machine that wrote it, as safetensors",
        )
    root = machine.run()
    places = {}
    for storage in machine.storages.values():
        info = parts.get(f"{folder}data/{storage.key}")
        present = info.file_size if info else 0
        if info and (info.compress_type == zipfile.ZIP_STORED or info.header_offset + info.compress_size > size_bytes):
            present = min(present, info.compress_size, size_bytes - info.header_offset)
        if present < storage.size_bytes:
            raise ContentError(_CUT.format(storage.size_bytes - present), where=where, hint=COPY_AGAIN)
        if locates and info and storage.size_bytes:
            places[storage.key] = _find_part(stream, info, where)
            _check_end(places[storage.key] + storage.size_bytes, size_bytes, where)
    return Pickled(root, machine.partial, places)


def _find_part(stream: BinaryIO, info: zipfile.ZipInfo, where: str) -> int:
    """The byte of the file at which the data of this part of a zip begin."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise ContentError(
            "its tensors are compressed or encrypted, as torch.save never writes them",
            where=where,
            hint="unpack the archive, and zip it again without compression (zip -0)",
        )
    stream.seek(info.header_offset)
    signature, n_name, n_extra = _LOCAL_HEADER.unpack(stream.read(_LOCAL_HEADER.size))
    encoding = "utf-8" if info.flag_bits & 0x800 else "cp437"
    if signature != b"PK\x03\x04" or stream.read(n_name).decode(encoding) != info.orig_filename:
        raise ValueError("a part of it is not where its directory says")
    return int(info.header_offset + _LOCAL_HEADER.size + n_name + n_extra)


def _read_legacy(stream: _Head, size_bytes: int, where: str, locates: bool) -> Pickled:
    stream.seek(0)
    if stream.read(len(_LEGACY_HEAD)) != _LEGACY_HEAD:
        raise ContentError("is no file that torch.save wrote", where=where, hint=COPY_AGAIN)
    Machine(stream, where).run()  # system: torch writes numbers in little-endian order on any
    machine = Machine(stream, where)
    root = machine.run()
    keys = Machine(stream, where).run()
    if type(keys) is not list or any(type(key) is not str for key in keys):
        raise ValueError("its storage keys are no list of names")
    if not machine.storages.keys() <= set(keys):
        raise ValueError("a tensor lies in a storage that the file does not list")
    begin = stream.tell()
    _check_end(begin + sum(8 + storage.size_bytes for storage in machine.storages.values()), size_bytes, where)
    return Pickled(root, machine.partial, _locate_legacy(stream, begin, machine, keys) if locates else {})


def _locate_legacy(stream: _Head, place: int, machine: Machine, keys: list[str]) -> dict[str, int]:
    """Key → the byte at which that storage begins; they follow one another, each after its length."""
    if len(set(keys)) != len(keys) or set(keys) != machine.storages.keys():
        raise ValueError("its storages are not those of its tensors")
    places = {}
    for key in keys:
        storage = machine.storages[key]
        (n_elements,) = struct.unpack("<q", stream.read_at(place, 8))
        if n_elements * ITEM_BYTES[storage.dtype] != storage.size_bytes:
            raise ValueError("a storage in it is not as long as its pickle says")
        places[key] = place + 8
        place += 8 + storage.size_bytes
    return places


def _check_end(end: int, size_bytes: int, where: str) -> None:
    if end > size_bytes:
        raise ContentError(_CUT.format(end - size_bytes), where=where, hint=COPY_AGAIN)


def _list_tensors(root: Any, path: Path) -> list[TensorEntry]:
    """The tensors of ``root``, or of the state_dict, model or module in it."""
    found = pick_tensors(root)
    for key in WRAPPERS if type(root) is dict else ():
        found = found or pick_tensors(root.get(key))
    entries = []
    owners: dict[tuple[Any, ...], str] = {}
    for name, tensor in found.items():
        try:
            check_name(name)
        except ValueError as error:
            raise _explain_damage(error, str(path)) from error
        size_bytes = math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype]
        owner = owners.setdefault((tensor.storage.key, *tensor[1:]), name)
        shares = owner if owner != name and size_bytes else ""
        size_bytes = 0 if shares else size_bytes
        entries.append(TensorEntry(name, tensor.dtype, tensor.shape, size_bytes, path.name, None, shares))
    return entries


def pick_tensors(value: Any) -> dict[str, Tensor]:
    """Name → tensor of those that lie in ``value`` itself, if that is a dict."""
    return {key: item for key, item in value.items() if type(item) is Tensor} if type(value) is dict else {}
