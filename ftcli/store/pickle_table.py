"""The tensors of a .bin file as torch.save writes it, without running its pickle.

    zip     NAME/data.pkl │ NAME/data/KEY: the bytes of one storage
    legacy  magic │ protocol │ system │ object │ keys: five pickles │ per key: length i64, bytes

A pickle is a program. Here a small stack machine follows it and builds inert values only: a class or function is
its name, and a call is refused unless it is one of the few that lay out tensors. Every step is counted.
"""

from __future__ import annotations

import io
import math
import pickletools
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ftcli.errors import ContentError
from ftcli.store.safetensors_header import DTYPE_BITS
from ftcli.store.tensor import COPY_AGAIN, TensorEntry, check_name, explain_foreign, open_weights

# the pickles of 0x1950A86A20F9469CFC6C and of 1001
_LEGACY_HEAD = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."
_MOST_BYTES, _MOST_STEPS, _MOST_STACK, _MOST_MARKS = 1 << 26, 1_000_000, 500_000, 1000
_MOST_DIMENSIONS = 64  # torch's own limit
_CUT = "cut off: {} bytes of its tensors are missing"
_WRAPPERS = ("state_dict", "model", "module")
# storage of torch → safetensors' name of its dtype
_STORAGES = {"Double": "F64", "Float": "F32", "Half": "F16", "BFloat16": "BF16", "Long": "I64", "Int": "I32"}
_STORAGES |= {"Short": "I16", "Char": "I8", "Byte": "U8", "Bool": "BOOL", "Untyped": "U8"}
_STORAGES |= {"ComplexFloat": "C64", "ComplexDouble": "C128"}
_DTYPE = re.compile(r"(bfloat|float|complex|uint|int)(\d+)(_\w+?)?(?:fnu?)?")  # float8_e4m3fn is F8_E4M3
_LETTERS = {"bfloat": "BF", "float": "F", "complex": "C", "uint": "U", "int": "I"}
_ITEM_BYTES = {name: n_bits // 8 for name, n_bits in DTYPE_BITS.items()} | {"C128": 16}
_STORAGE_TYPES = (*(f"{name}Storage" for name in _STORAGES), "TypedStorage")
_REBUILDS = {"_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3"}
_WRAPS = {"_rebuild_parameter", "_rebuild_parameter_with_state"}
_HARMLESS = {
    *("torch.Size", "torch.device", "_codecs.encode"),
    *(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in ("dict", "list", "set", "tuple")),
    *(f"{module}.{name}" for module in ("torch", "torch.cuda", "torch.storage") for name in _STORAGE_TYPES),
}
_OPAQUE: Any = object()  # a value that no table needs
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": (), "EMPTY_SET": _OPAQUE}
_PUSHED = {
    *_CONSTANTS,
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
_DAMAGE = (ValueError, LookupError, EOFError, RuntimeError, OverflowError, struct.error, zlib.error, zipfile.BadZipFile)


class _Name(NamedTuple):
    module: str
    name: str

    def __str__(self) -> str:
        text = f"{self.module}.{self.name}"
        return ascii(text if len(text) <= 80 else f"{text[:77]}...")[1:-1]


class _Storage(NamedTuple):
    key: str
    dtype: str
    size_bytes: int


class _Tensor(NamedTuple):
    storage: _Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]


def read_bin_tensors(path: Path) -> tuple[list[TensorEntry], dict[str, Any]]:
    """The tensors of the .bin file at ``path`` in the order of its pickle, and no metadata.

    A tensor on the bytes of an earlier one ``shares`` them. Cost: the pickle's bytes, whatever the file's size.

    Raises:
        ContentError: the file is damaged, cut off, something else, or asks to run code.
        DiskError: it cannot be read.
    """
    where = str(path)
    with open_weights(path) as (stream, size_bytes), warnings.catch_warnings(action="ignore"):
        head = stream.read(32)
        stream.seek(0)
        is_zip = head.startswith(b"PK\x03\x04")
        if not is_zip and (foreign := explain_foreign(head, where, "a file of torch.save")):
            raise foreign
        try:
            root = _read_zip(stream, size_bytes, where) if is_zip else _read_legacy(stream, size_bytes, where)
            return _list_tensors(root, path.name), {}
        except _DAMAGE as error:
            why = ascii(str(error)[:160])[1:-1]  # an error may quote megabytes of the file
            raise ContentError("the .bin file is damaged or cut off", where=where, why=why, hint=COPY_AGAIN) from error


class _Bounded(io.BufferedReader):
    """A file of which no single read takes more than a pickle may: a zip's own directory can lie."""

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(min(size, _MOST_BYTES + 1) if size is not None and size >= 0 else _MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise ValueError(f"a part of it is longer than {_MOST_BYTES >> 20} MiB")
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        if whence == 0 and offset < 0:
            raise ValueError("a part of it would lie before its start")
        return super().seek(offset, whence)


def _read_zip(stream: BinaryIO, size_bytes: int, where: str) -> Any:
    own = io.FileIO(stream.fileno(), closefd=False)
    with _Bounded(own) as bounded, zipfile.ZipFile(bounded) as archive:
        parts = {info.filename: info for info in archive.infolist()}
        name = next((name for name in parts if f"/{name}".endswith("/data.pkl")), "")
        if not name:
            raise ContentError("a zip archive that torch.save did not write: it holds no data.pkl", where=where)
        if parts[name].file_size > _MOST_BYTES:
            raise ContentError(f"its pickle is longer than {_MOST_BYTES >> 20} MiB", where=where)
        if parts[name].compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError("its pickle is packed as torch.save never does")
        with archive.open(name) as part:
            machine = _Machine(io.BytesIO(part.read(_MOST_BYTES)), where)
    root = machine.run()
    for storage in machine.storages.values():
        info = parts.get(f"{name.removesuffix('data.pkl')}data/{storage.key}")
        present = info.file_size if info else 0
        if info and (info.compress_type == zipfile.ZIP_STORED or info.header_offset + info.compress_size > size_bytes):
            present = min(present, info.compress_size, size_bytes - info.header_offset)
        if present < storage.size_bytes:
            raise ContentError(_CUT.format(storage.size_bytes - present), where=where, hint=COPY_AGAIN)
    return root


def _read_legacy(stream: BinaryIO, size_bytes: int, where: str) -> Any:
    pickles = io.BytesIO(stream.read(_MOST_BYTES))
    if not pickles.getbuffer()[:32].tobytes().startswith(_LEGACY_HEAD):
        raise ContentError("is no file that torch.save wrote", where=where, hint=COPY_AGAIN)
    for _ in range(3):  # magic, protocol, system: all told by the head
        _Machine(pickles, where).run()
    machine = _Machine(pickles, where)
    root = machine.run()
    keys = _Machine(pickles, where).run()
    if type(keys) is not list or any(type(key) is not str for key in keys):
        raise ValueError("its storage keys are no list of names")
    if not machine.storages.keys() <= set(keys):
        raise ValueError("a tensor lies in a storage that the file does not list")
    end = pickles.tell() + sum(8 + storage.size_bytes for storage in machine.storages.values())
    if end > size_bytes:
        raise ContentError(_CUT.format(end - size_bytes), where=where, hint=COPY_AGAIN)
    return root


def _list_tensors(root: Any, file: str) -> list[TensorEntry]:
    """The tensors of ``root``, or of the state_dict, model or module in it."""
    found = _pick_tensors(root)
    for key in _WRAPPERS if type(root) is dict else ():
        found = found or _pick_tensors(root.get(key))
    entries = []
    owners: dict[tuple[Any, ...], str] = {}
    for name, tensor in found.items():
        check_name(name)
        size_bytes = math.prod(tensor.shape) * _ITEM_BYTES[tensor.dtype]
        owner = owners.setdefault((tensor.storage.key, tensor.dtype, tensor.offset, tensor.shape), name)
        shares = owner if owner != name and size_bytes else ""
        entries.append(TensorEntry(name, tensor.dtype, tensor.shape, 0 if shares else size_bytes, file, None, shares))
    return entries


def _pick_tensors(value: Any) -> dict[str, _Tensor]:
    return {key: item for key, item in value.items() if type(item) is _Tensor} if type(value) is dict else {}


def _name_dtype(kind: Any) -> str:
    match = _DTYPE.fullmatch(kind.name) if type(kind) is _Name and kind.module == "torch" else None
    dtype = f"{_LETTERS[match[1]]}{match[2]}{(match[3] or '').upper()}" if match else ""
    if type(kind) is _Name and (kind.module, kind.name) == ("torch", "bool"):
        dtype = "BOOL"
    if dtype not in _ITEM_BYTES:
        raise ValueError("a tensor in its pickle has no known dtype")
    return dtype


class _Machine:
    """One pickle of ``stream``, followed step by step; ``storages`` are those that its tensors lie in.

    Values are never hashed, compared or printed: a tuple of tuples can stand for more than memory holds.
    """

    def __init__(self, stream: io.BytesIO, where: str) -> None:
        self.storages: dict[str, _Storage] = {}
        self._stream, self._where = stream, where
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._steps = 0

    def run(self) -> Any:
        """The value that the pickle leaves."""
        for opcode, arg, _ in pickletools.genops(self._stream):
            self._count(1)
            name = opcode.name
            if name == "STOP":
                return self._stack.pop()
            if name in _PUSHED:
                self._stack.append(_CONSTANTS.get(name, arg))
            elif name not in ("PROTO", "FRAME"):
                if name not in _STEPS:
                    raise ValueError(f"torch.save writes no {name}")
                _STEPS[name](self, arg)
            if len(self._stack) > _MOST_STACK:
                raise ValueError("its pickle stacks up too much")
        raise ValueError("its pickle has no end")

    def _count(self, steps: int) -> None:
        self._steps += steps
        if self._steps > _MOST_STEPS:
            raise ValueError(f"its pickle takes more than {_MOST_STEPS} steps")

    def _push(self, value: Any) -> None:  # the stack is looked up after the value is made: a mark may end in between
        self._stack.append(value)

    def _mark(self, _: Any) -> None:
        if len(self._marks) >= _MOST_MARKS:
            raise ValueError("its pickle is nested too deeply")
        self._marks.append(self._stack)
        self._stack = []

    def _pop_mark(self) -> list[Any]:
        items = self._stack
        self._stack = self._marks.pop()
        return items

    def _pop(self, n: int) -> list[Any]:
        return [self._stack.pop() for _ in range(n)][::-1]

    def _put(self, index: Any) -> None:
        self._memo[len(self._memo) if index is None else index] = self._stack[-1]

    def _name(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise ValueError("a name in its pickle is no text")
        self._stack.append(_Name(module, name))

    def _append(self, items: list[Any]) -> None:
        if type(self._stack[-1]) is list:
            self._stack[-1].extend(items)

    def _set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if len(items) % 2:
            raise ValueError("a key in its pickle has no value")
        if type(target) is dict:
            target.update((key, value) for key, value in zip(items[::2], items[1::2], strict=True) if type(key) is str)

    def _find_storage(self, _: Any) -> None:
        pid = self._stack.pop()
        if type(pid) is not tuple or len(pid) < 5 or type(pid[0]) is not str or pid[0] != "storage":
            raise ValueError("a storage in its pickle is not described as torch does")
        kind, key, numel = pid[1], pid[2], pid[4]
        if type(key) is not str or type(numel) is not int or not 0 <= numel < 1 << 60:
            raise ValueError("a storage in its pickle has no key or no size")
        is_type = type(kind) is _Name and f"{kind.module}.{kind.name}" in _HARMLESS
        if not is_type or not (dtype := _STORAGES.get(kind.name.removesuffix("Storage"))):
            raise ValueError("a storage in its pickle is of no known type")
        storage = _Storage(key, dtype, numel * _ITEM_BYTES[dtype])
        if self.storages.setdefault(key, storage).size_bytes != storage.size_bytes:
            raise ValueError("a storage in its pickle has two sizes")
        self._stack.append(storage)

    def _build(self, _: Any) -> None:
        target, _state = self._pop(2)
        if type(target) is _Name:
            raise self._refuse(target)
        self._stack.append(target)

    def _refuse(self, function: _Name) -> ContentError:
        return ContentError(
            f"asks to run {function}",
            where=self._where,
            why="weights need no such call; nothing of the file was run",
            hint="do not load this file unless you trust who made it; a .safetensors file cannot run anything",
        )

    def _follow(self, function: Any, args: Any) -> Any:
        """What a call gives, for the few that lay out tensors."""
        if type(function) is not _Name or type(args) is not tuple:
            raise ValueError("a call in its pickle is none")
        name = f"{function.module}.{function.name}"
        if name == "collections.OrderedDict":
            return self._make_ordered(args)
        if function.module == "torch._utils" and function.name in _WRAPS:
            return args[0]
        if function.module == "torch._utils" and function.name in _REBUILDS:
            return self._rebuild(args, args[6] if name.endswith("v3") else None)
        if name not in _HARMLESS:
            raise self._refuse(function)
        return args[0] if name == "torch.Size" and args and type(args[0]) in (list, tuple) else _OPAQUE

    def _make_ordered(self, args: tuple[Any, ...]) -> dict[str, Any]:
        pairs = args[0] if args and type(args[0]) in (list, tuple) else ()  # as Python 2 wrote it
        self._count(len(pairs))
        return {p[0]: p[1] for p in pairs if type(p) in (list, tuple) and len(p) == 2 and type(p[0]) is str}

    def _rebuild(self, args: tuple[Any, ...], kind: Any) -> _Tensor:
        storage, offset, shape = args[:3] if len(args) > 3 else (None, None, None)
        if type(storage) is not _Storage or type(offset) is not int or offset < 0:
            raise ValueError("a tensor in its pickle has no storage or no place in it")
        is_short = type(shape) in (tuple, list) and len(shape) <= _MOST_DIMENSIONS
        if not is_short or any(type(length) is not int or not 0 <= length < 1 << 60 for length in shape):
            raise ValueError(f"the shape of a tensor is no list of up to {_MOST_DIMENSIONS} sizes")
        dtype = storage.dtype if kind is None else _name_dtype(kind)
        n_elements = math.prod(shape)
        if n_elements and (offset + n_elements) * _ITEM_BYTES[dtype] > storage.size_bytes:
            raise ValueError("a tensor in its pickle is larger than its storage")
        return _Tensor(storage, dtype, offset, tuple(shape))


_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "EMPTY_LIST": lambda m, _: m._push([]),
    "EMPTY_DICT": lambda m, _: m._push({}),
    **{f"TUPLE{n}": lambda m, _, n=n: m._push(tuple(m._pop(n))) for n in (1, 2, 3)},  # type: ignore[misc]
    "TUPLE": lambda m, _: m._push(tuple(m._pop_mark())),
    "ADDITEMS": lambda m, _: m._pop_mark().clear(),
    "APPEND": lambda m, _: m._append(m._pop(1)),
    "APPENDS": lambda m, _: m._append(m._pop_mark()),
    "SETITEM": lambda m, _: m._set_items(m._pop(2)),
    "SETITEMS": lambda m, _: m._set_items(m._pop_mark()),
    "MARK": _Machine._mark,
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _Machine._put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda m, index: m._push(m._memo[index])),
    "GLOBAL": lambda m, arg: m._name(*arg.partition(" ")[::2]),
    "STACK_GLOBAL": lambda m, _: m._name(*m._pop(2)),
    "BINPERSID": _Machine._find_storage,
    **dict.fromkeys(("REDUCE", "NEWOBJ"), lambda m, _: m._push(m._follow(*m._pop(2)))),
    "NEWOBJ_EX": lambda m, _: m._push(m._follow(*m._pop(3)[:2])),
    "INST": lambda m, arg: m._push(m._follow(_Name(*arg.partition(" ")[::2]), tuple(m._pop_mark()))),
    "OBJ": lambda m, _: m._push(m._follow((items := m._pop_mark())[0], tuple(items[1:]))),
    "BUILD": _Machine._build,
}
