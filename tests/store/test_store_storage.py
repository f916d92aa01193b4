"""Tensors of .bin files as bytes: what torch loads is what is read, however a tensor lies in its storage."""

from __future__ import annotations

import math
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftcli.errors import ContentError
from ftcli.store import storage
from ftcli.store.pickle_machine import Machine
from ftcli.store.storage import BinTensor, pick_pieces, read_bin_state, read_pieces

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.complex64),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
]


def get_bytes(tensor: torch.Tensor) -> bytes:
    """A tensor's numbers in their order, by torch."""
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype)  # reshape keeps odd strides of a single number
    flat.view(tensor.shape).copy_(tensor.detach())
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def make_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Random bits, so NaN too; only those of a truth value are 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    most = 2 if dtype == torch.bool else 256
    n_bytes = math.prod(shape) * dtype.itemsize
    return torch.randint(0, most, (n_bytes,), dtype=torch.uint8, generator=generator).view(dtype).reshape(shape)


def make_views() -> dict[str, torch.Tensor]:
    matrix = make_bits((6, 5), torch.float32)
    line = make_bits((40,), torch.bfloat16)
    return {
        "matrix": matrix,
        "transposed": matrix.T,
        "columns": matrix[:, 1:3],
        "rows": matrix[2:4],
        "every_other": matrix[::2, ::2],
        "tied": matrix,
        "row_of_column": matrix[3:4, 2:3],
        "line": line,
        "overlap": torch.as_strided(line, (5, 8), (4, 1), 3),
        "expanded": make_bits((1, 4), torch.float16).expand(7, 4),
        "scalar": torch.tensor(1.5),
        "scalar_inside": line[7],
        "empty": torch.zeros(0, 5),
        "empty_inside": matrix[:, :0],
        "deep": make_bits((2, 3, 4, 5), torch.int16).permute(3, 0, 2, 1),
        "ones": make_bits((1, 4, 1), torch.float64),
        "parameter": torch.nn.Parameter(torch.ones(4)),
    }


def save(path: Path, value: Any, *, is_zip: bool = True) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=is_zip)
    return path


def check(path: Path, expected: dict[str, torch.Tensor]) -> None:
    """That the file's tensors are ``expected``, read in both ways."""
    found = read_bin_state(path).tensors
    assert {t.name: t.shape for t in found} == {name: tuple(t.shape) for name, t in expected.items()}
    for tensor in found:
        wanted = get_bytes(expected[tensor.name])
        assert tensor.size_bytes == len(wanted)
        assert b"".join(read_pieces(tensor)) == wanted, tensor.name
        assert b"".join(pick_pieces(tensor)) == wanted, tensor.name


@pytest.mark.parametrize("is_zip", [True, False])
def test_every_dtype_is_read_to_the_bit(tmp_path: Path, is_zip: bool) -> None:
    state = {str(dtype): make_bits((3, 5), dtype, seed) for seed, dtype in enumerate(DTYPES)}
    check(save(tmp_path / "x.bin", state, is_zip=is_zip), state)


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("block", [1, 8, 24, 1 << 22])
def test_every_view_is_read_as_torch_sees_it(
    tmp_path: Path, is_zip: bool, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_BLOCK_BYTES", max(8, block))
    views = make_views()
    check(save(tmp_path / "x.bin", views, is_zip=is_zip), views)
    found = {t.name: t for t in read_bin_state(tmp_path / "x.bin").tensors}
    assert found["tied"].view == found["matrix"].view != found["transposed"].view
    in_one_piece = {name for name, tensor in found.items() if tensor.is_contiguous}
    assert in_one_piece == {name for name, view in views.items() if view.is_contiguous()}


@settings(max_examples=60, deadline=None)
@given(data=st.data(), is_zip=st.booleans())
def test_any_strides_are_followed(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, is_zip: bool) -> None:
    dtype = data.draw(st.sampled_from([torch.int8, torch.bfloat16, torch.float32, torch.float64]))
    shape = data.draw(st.lists(st.integers(0, 4), max_size=4))
    strides = [data.draw(st.integers(0, 9)) for _ in shape]
    offset = data.draw(st.integers(0, 5))
    n_elements = offset + 1 + sum(max(0, n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    view = torch.as_strided(make_bits((n_elements,), dtype), shape, strides, offset)
    check(save(tmp_path_factory.mktemp("x") / "x.bin", {"w": view}, is_zip=is_zip), {"w": view})


def test_a_square_matrix_and_its_transpose_are_not_one_tensor(tmp_path: Path) -> None:
    from ftcli.store.pickle_table import read_bin_tensors

    square = make_bits((4, 4), torch.float32)
    path = save(tmp_path / "x.bin", {"a": square, "b": square.T, "c": square})
    assert [entry.shares for entry in read_bin_tensors(path)[0]] == ["", "", "a"]
    check(path, {"a": square, "b": square.T, "c": square})


def test_an_old_legacy_file_may_begin_at_any_byte(tmp_path: Path) -> None:
    """Storages of the legacy format follow pickles of any length, so numbers lie at odd places."""
    seen = set()
    for length in range(1, 9):
        state = {"n" * length: make_bits((5, 3), torch.float64).T}
        path = save(tmp_path / "x.bin", state, is_zip=False)
        check(path, state)
        seen.add(read_bin_state(path).tensors[0].offset % 8)
    assert len(seen) > 4


def test_weights_inside_a_checkpoint_are_found_and_the_rest_is_named(tmp_path: Path) -> None:
    model = {"w": torch.ones(2)}
    optimizer = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}
    for wrapper in ("state_dict", "model", "module"):
        path = save(tmp_path / "x.bin", {wrapper: model, "optimizer": optimizer, "epoch": 3})
        state = read_bin_state(path)
        assert [t.name for t in state.tensors] == ["w"]
        assert state.left_out == ("optimizer", "epoch")
        assert b"".join(read_pieces(state.tensors[0])) == get_bytes(model["w"])


class Foreign:
    pass


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"w": torch.ones(2), "step": 3}, "holds more than tensors by name: step (a number)"),
        ({"w": torch.ones(2), "extra": None}, "extra (nothing)"),
        ({"w": torch.ones(2), 0: torch.ones(3)}, "whose name is no text"),
        (OrderedDict([("w", torch.ones(2)), (7, torch.ones(3))]), "whose name is no text"),
        ({"model": {"w": torch.ones(2), "step": 1}}, "holds more than tensors by name: step (a number)"),
        ({"model": {"w": torch.ones(2)}, "ema": {"w": torch.ones(2)}}, "it holds model (a dict of 1 tensors), ema (a"),
        ({"model": {"w": torch.ones(2)}, "state_dict": {"w": torch.ones(2)}}, "is no dict of tensors"),
        ({"generator": {"w": torch.ones(2)}}, "generator (a dict of 1 tensors)"),
        ({"model": {"state_dict": {"w": torch.ones(2)}}}, "model (a dict of 1)"),
        ({str(i): [] for i in range(9)}, "4 (a list of 0) and 4 more"),
        (torch.ones(2), "holds one tensor, not tensors by name"),
        ([torch.ones(2)], "holds a list of 1, not"),
        ({}, "holds no tensors"),
        ({"model": {}}, "is no dict of tensors"),
        ({"w": torch.ones(2, dtype=torch.complex128)}, "w: is C128, which safetensors does not know"),
        ({"__metadata__": torch.ones(2)}, "no name that a tensor can have"),
        ({"w": torch.ones(2, dtype=torch.complex64).conj()}, "bytes are not its numbers"),
        ({"w": torch.ones(2, dtype=torch.complex64).conj().imag}, "bytes are not its numbers"),
        ({"a\ud800": torch.ones(2)}, "no name that can be written"),
        ({"w": torch.ones(2).to_sparse()}, "holds a sparse, quantised or other tensor"),
        ({"w": torch.ones(2), "x": Foreign()}, "asks to run test_store_storage.Foreign"),
    ],
)
@pytest.mark.parametrize("is_zip", [True, False])
def test_what_is_no_dict_of_tensors_is_named(tmp_path: Path, value: Any, words: str, is_zip: bool) -> None:
    path = save(tmp_path / "x.bin", value, is_zip=is_zip)
    with pytest.raises(ContentError) as caught:
        read_bin_state(path)
    assert words in str(caught.value)


@pytest.mark.parametrize("is_zip", [True, False])
def test_code_in_the_file_is_refused_by_name(tmp_path: Path, is_zip: bool) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
            return os.system, (f"touch {tmp_path}/ran",)

    path = save(tmp_path / "x.bin", {"w": torch.ones(2), "x": Evil()}, is_zip=is_zip)
    with pytest.raises(ContentError, match=r"asks to run (posix|nt)\.system"):
        read_bin_state(path)
    assert not (tmp_path / "ran").exists()


def rewrite(path: Path, change: Callable[[str, bytes], bytes | None], *, packs: bool = False) -> None:
    """Nothing; the zip at ``path`` has other parts, or other contents in them."""
    with zipfile.ZipFile(path) as archive:
        parts = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if packs else zipfile.ZIP_STORED) as archive:
        for name, data in parts.items():
            if (changed := change(name, data)) is not None:
                archive.writestr(name, changed)


def test_a_big_endian_file_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "x.bin", {"w": torch.ones(2)})
    rewrite(path, lambda name, data: b"big" if name.endswith("byteorder") else data)
    with pytest.raises(ContentError, match="byte order big; only little-endian"):
        read_bin_state(path)
    rewrite(path, lambda name, data: None if name.endswith("byteorder") else data)  # as torch before 2.1 wrote
    check(path, {"w": torch.ones(2)})


def test_a_compressed_file_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "x.bin", {"w": torch.ones(2)})
    rewrite(path, lambda _, data: data, packs=True)
    with pytest.raises(ContentError, match="compressed or encrypted"):
        read_bin_state(path)


def test_a_directory_that_lies_about_places_is_damage(tmp_path: Path) -> None:
    path = save(tmp_path / "x.bin", {"a": torch.ones(2), "b": torch.zeros(2)})
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        offsets = {info.filename: info.header_offset for info in archive.infolist()}
    entry = data.rindex(b"x/data/1") - 46  # in the directory
    assert struct.unpack_from("<I", data, entry + 42)[0] == offsets["x/data/1"]
    for lie in (offsets["x/data/0"], offsets["x/data/1"] + 1):
        struct.pack_into("<I", data, entry + 42, lie)
        path.write_bytes(data)
        with pytest.raises(ContentError, match="damaged or cut off"):
            read_bin_state(path)


def test_a_legacy_file_whose_lengths_disagree_is_damage(tmp_path: Path) -> None:
    path = save(tmp_path / "x.bin", {"a": torch.ones(3), "b": torch.ones(5)}, is_zip=False)
    data = path.read_bytes()
    place = data.rindex(struct.pack("<q", 5))
    path.write_bytes(data[:place] + struct.pack("<q", 4) + data[place + 8 :])
    with pytest.raises(ContentError, match="damaged") as caught:
        read_bin_state(path)
    assert "not as long as its pickle says" in caught.value.why


def test_a_legacy_file_with_a_storage_that_no_tensor_has_is_damage(tmp_path: Path) -> None:
    """Which torch would fall over as well; the places of those after it would be unknown."""
    path = save(tmp_path / "x.bin", {"a": torch.ones(3)}, is_zip=False)
    data = path.read_bytes()
    with path.open("rb") as stream:
        for _ in range(3):
            pickle.load(stream)
        Machine(stream, "").run()  # the object, which pickle alone cannot load
        begin = stream.tell()
        keys = pickle.load(stream)
        end = stream.tell()
    path.write_bytes(data[:begin] + pickle.dumps(["7", *keys], 2) + data[end:] + bytes(99))
    with pytest.raises(ContentError, match="damaged") as caught:
        read_bin_state(path)
    assert "not those of its tensors" in caught.value.why


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path, is_zip: bool) -> None:
    path = save(tmp_path / "x.bin", {"a": torch.ones(50, 50), "b": torch.ones(50, 50).T}, is_zip=is_zip)
    tensors = read_bin_state(path).tensors
    assert {tensor.name: tensor.is_contiguous for tensor in tensors} == {"a": True, "b": False}
    os.truncate(path, 2000)
    for tensor in tensors:
        for read in (read_pieces, pick_pieces):
            with pytest.raises(ContentError, match="cut off while it was read"):
                list(read(tensor))


def test_a_tensor_of_more_elements_than_any_file_is_damage(tmp_path: Path) -> None:
    huge = torch.ones(1).expand(1 << 31, 1 << 31)
    with pytest.raises(ContentError, match="damaged") as caught:
        read_bin_state(save(tmp_path / "x.bin", {"w": huge}))
    assert "more elements than any file" in caught.value.why


@settings(max_examples=150, deadline=None)
@given(data=st.data(), is_zip=st.booleans())
def test_damage_is_an_error_or_a_state(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, is_zip: bool
) -> None:
    """Whatever bytes are others, there is a ContentError, or tensors that lie in the file."""
    path = save(tmp_path_factory.mktemp("x") / "x.bin", make_views(), is_zip=is_zip)
    broken = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(broken)
    try:
        for tensor in read_bin_state(path).tensors:
            if tensor.size_bytes < 1 << 20:
                assert sum(map(len, read_pieces(tensor))) == tensor.size_bytes
    except ContentError:
        pass


def test_what_lies_in_one_piece() -> None:
    for shape, strides in (((), ()), ((3, 1, 2), (2, 99, 1)), ((0, 3), (7, 7)), ((1, 1), (0, 0)), ((5,), (1,))):
        assert BinTensor("w", "F32", shape, strides, Path("x"), 0).is_contiguous
    for shape, strides in (((5,), (2,)), ((2, 2), (1, 2)), ((2,), (0,)), ((2, 3), (4, 1))):
        assert not BinTensor("w", "F32", shape, strides, Path("x"), 0).is_contiguous
