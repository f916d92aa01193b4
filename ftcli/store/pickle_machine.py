"""The pickle of a .bin file, followed step by step without running it.

    opcodes ─▶ Machine ─▶ dicts, lists and tuples of Tensor, Storage, Name and plain values

A pickle is a program. Here a small stack machine follows it and builds inert values only: a class or function is
its name, and a call is refused unless it is one of the few that lay out tensors. Every step is counted.
"""

from __future__ import annotations

import math
import pickletools
import re
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO, NamedTuple

from ftcli.errors import ContentError
from ftcli.store.safetensors_header import DTYPE_BITS

MOST_BYTES, _MOST_STEPS, _MOST_STACK, _MOST_MARKS = 1 << 26, 1_000_000, 500_000, 1000
_MOST_DIMENSIONS = 64  # torch's own limit
# storage of torch → safetensors' name of its dtype
_STORAGES = {"Double": "F64", "Float": "F32", "Half": "F16", "BFloat16": "BF16", "Long": "I64", "Int": "I32"}
_STORAGES |= {"Short": "I16", "Char": "I8", "Byte": "U8", "Bool": "BOOL", "Untyped": "U8"}
_STORAGES |= {"ComplexFloat": "C64", "ComplexDouble": "C128"}
_DTYPE = re.compile(r"(bfloat|float|complex|uint|int)(\d+)(_\w+?)?(?:fnu?)?")  # float8_e4m3fn is F8_E4M3
_LETTERS = {"bfloat": "BF", "float": "F", "complex": "C", "uint": "U", "int": "I"}
ITEM_BYTES = {name: n_bits // 8 for name, n_bits in DTYPE_BITS.items()} | {"C128": 16}
_STORAGE_TYPES = (*(f"{name}Storage" for name in _STORAGES), "TypedStorage")
_REBUILDS = {"_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3"}
_WRAPS = {"_rebuild_parameter", "_rebuild_parameter_with_state"}
_HARMLESS = {
    *("torch.Size", "torch.device", "_codecs.encode"),
    *(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in ("dict", "list", "set", "tuple")),
    *(f"{module}.{name}" for module in ("torch", "torch.cuda", "torch.storage") for name in _STORAGE_TYPES),
}
OPAQUE: Any = object()  # a value that no table needs
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": (), "EMPTY_SET": OPAQUE}
_PUSHED = {
    *_CONSTANTS,
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}


class Name(NamedTuple):
    """A class or function that the pickle names; it is not imported."""

    module: str
    name: str

    def __str__(self) -> str:
        text = f"{self.module}.{self.name}"
        return ascii(text if len(text) <= 80 else f"{text[:77]}...")[1:-1]


class Storage(NamedTuple):
    """Bytes that tensors lie in; ``is_part``: of another storage, as torch before 0.4 wrote."""

    key: str
    dtype: str
    size_bytes: int
    is_part: bool = False


class Tensor(NamedTuple):
    """A tensor in its storage: ``offset`` and ``strides`` count elements.

    ``is_lazy``: its numbers are the conjugate or the negative of those that lie there.
    """

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    is_lazy: bool = False


def measure_extent(shape: Sequence[int], strides: Sequence[int]) -> int:
    """The elements from the first of a tensor to its last, with those between them that are not its own."""
    if 0 in shape:
        return 0
    return 1 + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))


def _name_dtype(kind: Any) -> str:
    match = _DTYPE.fullmatch(kind.name) if type(kind) is Name and kind.module == "torch" else None
    dtype = f"{_LETTERS[match[1]]}{match[2]}{(match[3] or '').upper()}" if match else ""
    if type(kind) is Name and (kind.module, kind.name) == ("torch", "bool"):
        dtype = "BOOL"
    if dtype not in ITEM_BYTES:
        raise ValueError("a tensor in its pickle has no known dtype")
    return dtype


class Machine:
    """One pickle of ``stream``, followed step by step; ``storages`` are those that its tensors lie in.

    ``partial`` are the dicts that lack an entry of the file, because its key is no name. Values are
    never hashed, compared or printed: a tuple of tuples can stand for more than memory holds.
    """

    def __init__(self, stream: BinaryIO, where: str) -> None:
        self.storages: dict[str, Storage] = {}
        self.partial: list[dict[str, Any]] = []
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
        self._stack.append(Name(module, name))

    def _append(self, items: list[Any]) -> None:
        if type(self._stack[-1]) is list:
            self._stack[-1].extend(items)

    def _set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if len(items) % 2:
            raise ValueError("a key in its pickle has no value")
        if type(target) is dict:
            target.update((key, value) for key, value in zip(items[::2], items[1::2], strict=True) if type(key) is str)
            if any(type(key) is not str for key in items[::2]):
                self.partial.append(target)

    def _find_storage(self, _: Any) -> None:
        pid = self._stack.pop()
        if type(pid) is not tuple or len(pid) < 5 or type(pid[0]) is not str or pid[0] != "storage":
            raise ValueError("a storage in its pickle is not described as torch does")
        kind, key, numel = pid[1], pid[2], pid[4]
        if type(key) is not str or type(numel) is not int or not 0 <= numel < 1 << 60:
            raise ValueError("a storage in its pickle has no key or no size")
        is_type = type(kind) is Name and f"{kind.module}.{kind.name}" in _HARMLESS
        if not is_type or not (dtype := _STORAGES.get(kind.name.removesuffix("Storage"))):
            raise ValueError("a storage in its pickle is of no known type")
        storage = Storage(key, dtype, numel * ITEM_BYTES[dtype], len(pid) > 5 and pid[5] is not None)
        if self.storages.setdefault(key, storage).size_bytes != storage.size_bytes:
            raise ValueError("a storage in its pickle has two sizes")
        self._stack.append(storage)

    def _build(self, _: Any) -> None:
        target, _state = self._pop(2)
        if type(target) is Name:
            raise self._refuse(target)
        self._stack.append(target)

    def _refuse(self, function: Name) -> ContentError:
        if str(function) == "torch.serialization._get_layout" or str(function).startswith("torch._utils._rebuild_"):
            what = f"holds a sparse, quantised or other tensor that is more than numbers in order ({function})"
            return ContentError(what, where=self._where, hint="save ordinary tensors: tensor.to_dense(), .dequantize()")
        return ContentError(
            f"asks to run {function}",
            where=self._where,
            why="weights need no such call; nothing of the file was run",
            hint="do not load this file unless you trust who made it; a .safetensors file cannot run anything",
        )

    def _follow(self, function: Any, args: Any) -> Any:
        """What a call gives, for the few that lay out tensors."""
        if type(function) is not Name or type(args) is not tuple:
            raise ValueError("a call in its pickle is none")
        name = f"{function.module}.{function.name}"
        if name == "collections.OrderedDict":
            return self._make_ordered(args)
        if function.module == "torch._utils" and function.name in _WRAPS:
            return args[0]
        if function.module == "torch._utils" and function.name in _REBUILDS:
            kind, marks = (args[6:7], args[7:8]) if name.endswith("v3") else ((), args[6:7])
            return self._rebuild(args, kind[0] if kind else None, is_lazy=any(type(m) is dict and m for m in marks))
        if name not in _HARMLESS:
            raise self._refuse(function)
        return args[0] if name == "torch.Size" and args and type(args[0]) in (list, tuple) else OPAQUE

    def _make_ordered(self, args: tuple[Any, ...]) -> dict[str, Any]:
        pairs = args[0] if args and type(args[0]) in (list, tuple) else ()  # as Python 2 wrote it
        self._count(len(pairs))
        made = {p[0]: p[1] for p in pairs if type(p) in (list, tuple) and len(p) == 2 and type(p[0]) is str}
        if len(made) != len(pairs):
            self.partial.append(made)
        return made

    def _rebuild(self, args: tuple[Any, ...], kind: Any, *, is_lazy: bool) -> Tensor:
        storage, offset, shape = args[:3] if len(args) > 3 else (None, None, None)
        if type(storage) is not Storage or type(offset) is not int or offset < 0:
            raise ValueError("a tensor in its pickle has no storage or no place in it")
        is_short = type(shape) in (tuple, list) and len(shape) <= _MOST_DIMENSIONS
        if not is_short or any(type(length) is not int or not 0 <= length < 1 << 60 for length in shape):
            raise ValueError(f"the shape of a tensor is no list of up to {_MOST_DIMENSIONS} sizes")
        strides = args[3]
        if type(strides) not in (tuple, list) or len(strides) != len(shape):
            raise ValueError("a tensor in its pickle does not have a stride for each size")
        if any(type(stride) is not int or not 0 <= stride < 1 << 60 for stride in strides):
            raise ValueError("a stride of a tensor in its pickle is no number of elements")
        dtype = storage.dtype if kind is None else _name_dtype(kind)
        if math.prod(shape) >= 1 << 60:
            raise ValueError("a tensor in its pickle has more elements than any file")
        end = offset + measure_extent(shape, strides)
        if end > offset and end * ITEM_BYTES[dtype] > storage.size_bytes:
            raise ValueError("a tensor in its pickle is larger than its storage")
        return Tensor(storage, dtype, offset, tuple(shape), tuple(strides), is_lazy)


_STEPS: dict[str, Callable[[Machine, Any], None]] = {
    "EMPTY_LIST": lambda m, _: m._push([]),
    "EMPTY_DICT": lambda m, _: m._push({}),
    **{f"TUPLE{n}": lambda m, _, n=n: m._push(tuple(m._pop(n))) for n in (1, 2, 3)},  # type: ignore[misc]
    "TUPLE": lambda m, _: m._push(tuple(m._pop_mark())),
    "ADDITEMS": lambda m, _: m._pop_mark().clear(),
    "APPEND": lambda m, _: m._append(m._pop(1)),
    "APPENDS": lambda m, _: m._append(m._pop_mark()),
    "SETITEM": lambda m, _: m._set_items(m._pop(2)),
    "SETITEMS": lambda m, _: m._set_items(m._pop_mark()),
    "MARK": Machine._mark,
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), Machine._put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda m, index: m._push(m._memo[index])),
    "GLOBAL": lambda m, arg: m._name(*arg.partition(" ")[::2]),
    "STACK_GLOBAL": lambda m, _: m._name(*m._pop(2)),
    "BINPERSID": Machine._find_storage,
    **dict.fromkeys(("REDUCE", "NEWOBJ"), lambda m, _: m._push(m._follow(*m._pop(2)))),
    "NEWOBJ_EX": lambda m, _: m._push(m._follow(*m._pop(3)[:2])),
    "INST": lambda m, arg: m._push(m._follow(Name(*arg.partition(" ")[::2]), tuple(m._pop_mark()))),
    "OBJ": lambda m, _: m._push(m._follow((items := m._pop_mark())[0], tuple(items[1:]))),
    "BUILD": Machine._build,
}
