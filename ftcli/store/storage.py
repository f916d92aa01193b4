"""The tensors of a .bin file as bytes, straight from the file: no pickle runs, and no torch is needed.

    table ─▶ BinTensor(place in the file, shape, strides) ─▶ its bytes in order, block by block

A tensor that lies in one piece is read as it is, any other (a transposed weight, some columns of a matrix) is
gathered from the mapped file. Whatever its size no more than a block is held, and of a mapped file pages that the
system may take back.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftcli.errors import ContentError
from ftcli.store.pickle_machine import ITEM_BYTES, Name, Tensor, measure_extent
from ftcli.store.pickle_table import WRAPPERS, Pickled, pick_tensors, read_pickled
from ftcli.store.safetensors_header import DTYPE_BITS
from ftcli.store.tensor import COPY_AGAIN, open_weights

_BLOCK_BYTES = 1 << 22
_MOST_NAMED = 5
_SAVE_AGAIN = "save the weights alone: torch.save(model.state_dict(), FILE)"
_METADATA_KEY = "__metadata__"  # of a safetensors header, so no tensor's name


@dataclass(frozen=True, slots=True)
class BinTensor:
    """A tensor of a .bin file: ``offset`` is the byte of ``path`` at which it begins, ``strides`` count elements."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    path: Path
    offset: int

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """Of its numbers, wherever they lie."""
        return self.n_elements * ITEM_BYTES[self.dtype]

    @property
    def is_contiguous(self) -> bool:
        """Whether its numbers lie one after the other."""
        expected = 1
        for length, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if length != 1 and stride != expected:
                return not self.n_elements
            expected *= length
        return True

    @property
    def view(self) -> tuple[object, ...]:
        """What two names have in common that are one tensor."""
        return self.path, self.offset, self.dtype, self.shape, self.strides


@dataclass(frozen=True)
class BinState:
    """The weights in a .bin file, in the order of their bytes, and the keys beside them that are no part of them."""

    tensors: tuple[BinTensor, ...]
    left_out: tuple[str, ...]


def read_bin_state(path: Path) -> BinState:
    """The weights in the file at ``path``, which torch.save wrote: a dict of tensors, or one that holds just one such.

    Cost: the pickle's bytes, whatever the file's size.

    Raises:
        ContentError: damaged, asks to run code, or holds something else, which is named.
        DiskError: it cannot be read.
    """
    found = read_pickled(path)
    state, left_out = _choose_state(found, str(path))
    tensors = [_place_tensor(name, tensor, path, found.places) for name, tensor in pick_tensors(state).items()]
    return BinState(tuple(sorted(tensors, key=lambda tensor: tensor.offset)), left_out)


def read_pieces(tensor: BinTensor) -> Iterator[bytes]:
    """Yields the tensor's bytes as safetensors holds them, in blocks.

    Raises:
        ContentError: the file ends before it.
        DiskError: it cannot be read.
    """
    if not tensor.is_contiguous:
        yield from _gather(tensor)
    elif tensor.size_bytes:
        with open_weights(tensor.path) as (stream, _):
            stream.seek(tensor.offset)
            for start in range(0, tensor.size_bytes, _BLOCK_BYTES):
                length = min(_BLOCK_BYTES, tensor.size_bytes - start)
                if len(data := stream.read(length)) != length:
                    raise _explain_cut(tensor)
                yield data


def pick_pieces(tensor: BinTensor) -> Iterator[bytes]:
    """Yields the same as `read_pieces`, each number found by its own index: slow, and of no common arithmetic."""
    if tensor.is_contiguous:
        yield from read_pieces(tensor)
        return
    import numpy as np

    with _map_elements(tensor) as values:
        n_block = _BLOCK_BYTES // 8  # of the indices, which are as wide as any number
        for start in range(0, tensor.n_elements, n_block):
            rest = np.arange(start, min(start + n_block, tensor.n_elements))
            places = np.zeros_like(rest)
            for length, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
                rest, index = np.divmod(rest, length)
                places += index * stride
            yield values[places].tobytes()


def _gather(tensor: BinTensor) -> Iterator[bytes]:
    from numpy.lib.stride_tricks import as_strided

    item_bytes = ITEM_BYTES[tensor.dtype]
    with _map_elements(tensor) as values:
        strides = [stride * item_bytes for stride in tensor.strides]
        yield from _cut(as_strided(values, tensor.shape, strides, writeable=False))


def _cut(view: Any) -> Iterator[bytes]:
    """Yields the bytes of the array ``view`` in its order, a block at a time."""
    if view.nbytes <= _BLOCK_BYTES or view.ndim == 0:
        yield view.tobytes()
        return
    n_rows = _BLOCK_BYTES * view.shape[0] // view.nbytes
    for start in range(0, view.shape[0], max(1, n_rows)):
        if n_rows:
            yield view[start : start + n_rows].tobytes()
        else:
            yield from _cut(view[start])


@contextmanager
def _map_elements(tensor: BinTensor) -> Iterator[Any]:
    """The numbers from the tensor's first to its last as a flat array of integers on the mapped file."""
    import numpy as np

    item_bytes = ITEM_BYTES[tensor.dtype]
    n_elements = measure_extent(tensor.shape, tensor.strides)
    with open_weights(tensor.path) as (stream, size_bytes):
        if tensor.offset + n_elements * item_bytes > size_bytes:
            raise _explain_cut(tensor)
        begin = tensor.offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        length = tensor.offset - begin + n_elements * item_bytes
        # let go with the last array on it: an array that is left would make closing an error
        mapped = mmap.mmap(stream.fileno(), length, access=mmap.ACCESS_READ, offset=begin)
        yield np.frombuffer(mapped, f"<u{item_bytes}", n_elements, tensor.offset - begin)


def _explain_cut(tensor: BinTensor) -> ContentError:
    return ContentError("cut off while it was read", where=str(tensor.path), hint=COPY_AGAIN)


def _place_tensor(name: str, tensor: Tensor, path: Path, places: Mapping[str, int]) -> BinTensor:
    """The tensor in the file.

    Raises:
        ContentError: safetensors cannot hold it, or its bytes are not its numbers.
    """
    where = f"{path}: {quote(name)}"
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise ContentError("is no name that can be written", where=where) from error
    if tensor.dtype not in DTYPE_BITS:
        raise ContentError(f"is {tensor.dtype}, which safetensors does not know", where=where, hint="save real numbers")
    if name == _METADATA_KEY:
        raise ContentError("is no name that a tensor can have in safetensors", where=where, hint="give it another")
    if tensor.is_lazy or tensor.storage.is_part:
        what = "is a view whose bytes are not its numbers" if tensor.is_lazy else "lies in a part of another storage"
        raise ContentError(what, where=where, hint="save a copy of it: tensor.clone()")
    # an empty tensor has no place, and its storage may be none
    place = places.get(tensor.storage.key, 0) + tensor.offset * ITEM_BYTES[tensor.dtype]
    return BinTensor(name, tensor.dtype, tensor.shape, tensor.strides, path, place)


def _choose_state(found: Pickled, where: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The dict of tensors that was saved, alone or as the only one in a dict, and what else lies in that.

    Raises:
        ContentError: none, or more than one; naming what is there.
    """
    root = found.root
    if type(root) is not dict:
        raise ContentError(f"holds {_describe(root)}, not tensors by name", where=where, hint=_SAVE_AGAIN)
    state: dict[str, Any] = root
    left_out: tuple[str, ...] = ()
    if root and not pick_tensors(root):
        inner = [key for key, value in root.items() if pick_tensors(value)]
        if len(inner) != 1 or inner[0] not in WRAPPERS:
            raise ContentError(f"is no dict of tensors: it holds {_list(root)}", where=where, hint=_SAVE_AGAIN)
        state, left_out = root[inner[0]], tuple(quote(key) for key in root if key != inner[0])
    if not state:
        raise ContentError("holds no tensors", where=where)
    if others := {key: value for key, value in state.items() if type(value) is not Tensor}:
        raise ContentError(f"holds more than tensors by name: {_list(others)}", where=where, hint=_SAVE_AGAIN)
    if any(entry is state for entry in found.partial):
        what = "holds an entry whose name is no text, which safetensors cannot hold"
        raise ContentError(what, where=where, hint=_SAVE_AGAIN)
    return state, left_out


def _list(values: dict[str, Any]) -> str:
    named = [f"{quote(key)} ({_describe(value)})" for key, value in list(values.items())[:_MOST_NAMED]]
    return ", ".join(named) + (f" and {len(values) - _MOST_NAMED} more" if len(values) > _MOST_NAMED else "")


def _describe(value: Any) -> str:
    """What kind of thing it is; the thing itself may be of any length, and is never printed."""
    if type(value) is Tensor:
        return "one tensor"
    if type(value) is dict:
        n_tensors = len(pick_tensors(value))
        return f"a dict of {n_tensors} tensors" if n_tensors else f"a dict of {len(value)}"
    if type(value) in (list, tuple):
        return f"a list of {len(value)}"
    names = {bool: "a truth value", int: "a number", float: "a number", str: "a text", bytes: "bytes", Name: "a name"}
    return "nothing" if value is None else names.get(type(value), "an object")


def quote(name: str) -> str:
    """``name`` as it can be printed on a line."""
    return ascii(name if len(name) <= 80 else f"{name[:77]}...")[1:-1]
