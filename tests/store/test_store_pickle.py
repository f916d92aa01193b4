"""Tables of .bin files: what torch saved is read back, and nothing that a pickle asks for is run."""

from __future__ import annotations

import io
import os
import pickle
import struct
import time
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from ftcli.errors import ContentError
from ftcli.store.pickle_table import read_bin_tensors
from ftcli.store.weight import read_weight_table

DTYPES = dict(
    [
        *(("F64", torch.float64), ("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)),
        *(("I64", torch.int64), ("I32", torch.int32), ("I16", torch.int16), ("I8", torch.int8), ("U8", torch.uint8)),
        *(("C64", torch.complex64), ("C128", torch.complex128), ("U16", torch.uint16), ("U32", torch.uint32)),
        *(("U64", torch.uint64), ("BOOL", torch.bool), ("F8_E4M3", torch.float8_e4m3fn)),
        *(("F8_E5M2", torch.float8_e5m2), ("F8_E8M0", torch.float8_e8m0fnu)),
        *(("F8_E4M3FNUZ", torch.float8_e4m3fnuz), ("F8_E5M2FNUZ", torch.float8_e5m2fnuz)),
    ]
)


def make_state() -> OrderedDict[str, Any]:
    state: OrderedDict[str, Any] = OrderedDict((name, torch.zeros(2, 3).to(dtype)) for name, dtype in DTYPES.items())
    state["scalar"], state["none"] = torch.tensor(1.0), torch.zeros(0, 5)
    state["parameter"] = torch.nn.Parameter(torch.ones(4))
    state["tied"], state["part"] = state["F32"], torch.zeros(10)[4:6]
    return state


def write_zip(path: Path, data: bytes, sizes: dict[str, int] | None = None, *, packed: bool = False) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", data)
        for key, size in (sizes or {}).items():
            archive.writestr(f"archive/data/{key}", bytes(size))
    return path


def call(module: str, name: str, args: bytes = b"(t") -> bytes:
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + args + b"R."


def pid(key: str = "0", numel: int = 8, kind: str = "torch\nFloatStorage") -> bytes:
    size = b"\x8a\x08" + struct.pack("<q", numel)
    return b"(" + text("storage") + b"c" + kind.encode() + b"\n" + text(key) + text("cpu") + size + b"tQ"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def tensor(shape: bytes = b"(K\x02t", offset: bytes = b"K\x00", storage: bytes = b"") -> bytes:
    arguments = b"(" + (storage or pid()) + offset + shape + b"(K\x01t\x89Nt"
    return b"\x80\x02}" + text("w") + b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"Rs."


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("wrapper", ["", "state_dict", "model", "module"])
def test_what_torch_saved_is_read_back(tmp_path: Path, is_zip: bool, protocol: int, wrapper: str) -> None:
    state = make_state()
    path = tmp_path / "pytorch_model.bin"
    value = {"epoch": 3, "sizes": [torch.Size([2])], wrapper: state} if wrapper else state
    if not is_zip and protocol != 2:
        pytest.skip("the first bytes of the legacy format are those of protocol 2")
    torch.save(value, path, pickle_protocol=protocol, _use_new_zipfile_serialization=is_zip)
    table = read_weight_table(tmp_path)
    assert [(f.name, f.format) for f in table.files] == [("pytorch_model.bin", "bin")]
    assert {t.name: t.shape for t in table.tensors} == {name: tuple(t.shape) for name, t in state.items()}
    found = {t.name: t for t in table.tensors}
    assert {name: found[name].dtype for name in DTYPES} == {name: name for name in DTYPES}
    assert all(found[name].size_bytes == t.nbytes for name, t in state.items() if name != "tied")
    assert (found["tied"].shares, found["tied"].size_bytes) == ("F32", 0)
    assert {t.offset for t in table.tensors} == {None}
    assert not table.findings


def test_a_module_s_own_dict_is_read(tmp_path: Path) -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    torch.save(layer.state_dict(), tmp_path / "x.bin")  # with _metadata, which pickle sets by BUILD
    assert [t.name for t in read_bin_tensors(tmp_path / "x.bin")[0]] == list(layer.state_dict())


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch ran",)


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
def test_nothing_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_zip: bool, protocol: int) -> None:
    monkeypatch.chdir(tmp_path)
    if is_zip or protocol == 2:
        torch.save(
            {"w": torch.ones(2), "x": Evil()}, "x.bin", pickle_protocol=protocol, _use_new_zipfile_serialization=is_zip
        )
        with pytest.raises(ContentError, match=r"asks to run (posix|nt)\.system") as caught:
            read_bin_tensors(tmp_path / "x.bin")
        assert "nothing of the file was run" in caught.value.why
        assert ".safetensors" in caught.value.hint
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "data",
    [
        call("os", "system", text("id") + b"\x85"),
        b"\x80\x02cos\nsystem\n)\x81.",
        b"\x80\x04" + text("os") + text("system") + b"\x93)R.",
        b"\x80\x04" + text("os") + text("system") + b"\x93)}\x92.",
        b"(" + text("id") + b"ios\nsystem\n.",
        b"(cos\nsystem\n" + text("id") + b"o.",
        b"\x80\x02cos\nsystem\n}b.",
    ],
)
def test_every_way_to_call_is_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(ContentError, match=r"asks to run os\.system"):
        read_bin_tensors(write_zip(tmp_path / "x.bin", data))


def test_a_name_alone_is_harmless_and_is_not_imported(tmp_path: Path) -> None:
    assert read_bin_tensors(write_zip(tmp_path / "x.bin", b"\x80\x02cno_such_module\nx\n.")) == ([], {})
    for module, name in (("builtins", "eval"), ("builtins", "getattr"), ("torch", "load"), ("torch._utils", "x.y")):
        with pytest.raises(ContentError, match="asks to run"):
            read_bin_tensors(write_zip(tmp_path / "x.bin", call(module, name)))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (tensor(shape=b"(K\x09t"), "larger than its storage"),
        (tensor(offset=b"K\x07"), "larger than its storage"),
        (tensor(offset=b"J\xff\xff\xff\xff"), "no place in it"),
        (tensor(shape=b"(J\xff\xff\xff\xfft"), "up to 64 sizes"),
        (tensor(shape=b"(\x88t"), "up to 64 sizes"),
        (tensor(shape=b"(G" + bytes(8) + b"t"), "up to 64 sizes"),
        (tensor(shape=b"(" + b"K\x01" * 65 + b"t"), "up to 64 sizes"),
        (tensor(shape=b"(\x8a\xff" + b"\x7f" * 255 + b"t"), "up to 64 sizes"),
        (tensor(shape=b"N"), "up to 64 sizes"),
        (tensor(storage=b"N"), "no storage"),
        (tensor(storage=pid(numel=-1)), "no size"),
        (tensor(storage=pid(kind="os\nFloatStorage")), "no known type"),
        (tensor(storage=pid(kind="torch\nTypedStorage")), "no known type"),
        (tensor(storage=b"K\x01Q"), "not described"),
        (b"\x80\x02h\x05.", "damaged"),
        (b"\x80\x02.", "damaged"),
        (b"\x80\x02}", "damaged"),
        (b"", "damaged"),
        (b"\x80\x02ttt.", "damaged"),
        (b"\xff", "damaged"),
        (b"}K\x01s.", "damaged"),
        (b"F" + b"x" * 99999 + b"\n.", "damaged"),
        (b"(" * 2000 + b".", "nested too deeply"),
        (b"N" * 600_000 + b".", "stacks up"),
        (b"}" + text("w") + b"\x82\x01.", "writes no EXT1"),
        (b"\x8e" + b"\xff" * 8, "damaged"),
    ],
)
def test_what_cannot_be_is_an_error(tmp_path: Path, data: bytes, words: str) -> None:
    with pytest.raises(ContentError) as caught:
        read_bin_tensors(write_zip(tmp_path / "x.bin", data, {"0": 32}))
    assert words in str(caught.value)
    assert len(str(caught.value)) < 600
    assert str(caught.value).isprintable() or "\n" in str(caught.value)


def test_a_large_index_and_nested_values_cost_nothing(tmp_path: Path) -> None:
    doubled = b"".join(b"(" + b"h\x00" * 2 + b"tq\x00" for _ in range(200))
    values = {
        "index": b"}r\xff\xff\xff\xff" + b"j\xff\xff\xff\xff.",
        "tuples": b"\x80\x02)q\x00" + doubled + b".",
        "key": b"\x80\x02})q\x00" + doubled + b"Ns.",
        "lists": b"\x80\x02]q\x00" + b"h\x00a" * 9999 + b".",
        "deep": b"\x80\x02)" + b"\x85" * 100_000 + b".",
    }
    for data in values.values():
        start = time.perf_counter()
        assert read_bin_tensors(write_zip(tmp_path / "x.bin", data)) == ([], {})
        assert time.perf_counter() - start < 2


def test_no_step_is_free(tmp_path: Path) -> None:
    pairs = b"\x80\x02](" + b"N" * 100_000 + b"eq\x00"
    again = b"ccollections\nOrderedDict\nh\x00\x85R" * 9999
    for data in (b"\x80\x02" + b"]q\x00" + b"Na" * 600_000 + b".", pairs + again + b"."):
        with pytest.raises(ContentError, match="is damaged") as caught:
            read_bin_tensors(write_zip(tmp_path / "x.bin", data, packed=True))
        assert "takes more than" in caught.value.why


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_file_that_is_cut_off_is_an_error(tmp_path: Path, is_zip: bool) -> None:
    path = tmp_path / "x.bin"
    torch.save(make_state(), path, _use_new_zipfile_serialization=is_zip)
    whole = path.read_bytes()
    for size in range(1, len(whole), max(1, len(whole) // 60)):
        path.write_bytes(whole[:size])
        with pytest.raises(ContentError):
            read_bin_tensors(path)
    path.write_bytes(whole[:-1])
    with pytest.raises(ContentError, match="cut off"):
        read_bin_tensors(path)


def test_a_storage_that_the_zip_lacks_is_an_error(tmp_path: Path) -> None:
    for sizes in ({}, {"0": 31}, {"1": 32}):
        with pytest.raises(ContentError, match=r"cut off: (32|1) bytes of its tensors are missing"):
            read_bin_tensors(write_zip(tmp_path / "x.bin", tensor(), sizes))
    assert read_bin_tensors(write_zip(tmp_path / "x.bin", tensor(), {"0": 32}))[0][0].size_bytes == 8


def test_a_pickle_that_unpacks_to_more_than_its_limit_is_refused(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "x.bin", bytes((1 << 26) + 1), packed=True)
    assert path.stat().st_size < 1 << 20
    with pytest.raises(ContentError, match="its pickle is longer than 64 MiB"):
        read_bin_tensors(path)


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1", "Git LFS pointer"),
        (b"<!DOCTYPE html>", "web page"),
        (b"GGUF" + bytes(99), "GGUF"),
        (pickle.dumps({"a": 1}, 2), "no file that torch.save wrote"),
        (b"PK\x03\x04" + bytes(99), "damaged"),
        (bytes(99), "no file that torch.save wrote"),
    ],
)
def test_something_else_is_named(tmp_path: Path, head: bytes, words: str) -> None:
    (tmp_path / "x.bin").write_bytes(head)
    with pytest.raises(ContentError) as caught:
        read_weight_table(tmp_path / "x.bin")
    assert words in str(caught.value)


def test_a_zip_without_a_pickle_is_named(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("readme.txt", "x")
    (tmp_path / "x.bin").write_bytes(buffer.getvalue())
    with pytest.raises(ContentError, match=r"holds no data\.pkl"):
        read_bin_tensors(tmp_path / "x.bin")
