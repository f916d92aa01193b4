"""Tensor tables: what independent writers wrote is read back, what is damaged is an error that says so."""

from __future__ import annotations

import json
import os
import random
import resource
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import safetensors
import torch
from safetensors.torch import save_file

from ftcli.errors import ContentError, DiskError
from ftcli.store.gguf_header import GGML_TYPES, read_gguf_header
from ftcli.store.safetensors_header import DTYPE_BITS
from ftcli.store.weight import WeightTable, read_weight_table

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def make_tensors() -> dict[str, torch.Tensor]:
    tensors = {
        f"t.{name}": (torch.arange(6) % 2).reshape(2, 3).to(dtype).contiguous() for name, dtype in DTYPES.items()
    }
    return tensors | {"scalar": torch.tensor(1.0), "none": torch.zeros(0, 5), "naïve": torch.ones(1, 2, 3, 4)}


def write_safetensors(path: Path, entries: dict[str, Any] | bytes, data: bytes = b"") -> Path:
    header = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


def write_gguf(path: Path, n_tokens: int = 3) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_name("tiny")
    writer.add_token_list([f"token{i}" for i in range(n_tokens)])
    writer.add_token_scores([0.0] * n_tokens)
    writer.add_tensor("a", np.arange(64, dtype=np.float32).reshape(2, 32))
    quantized = gguf.quants.quantize(np.ones((3, 64), np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("b", quantized, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("c", np.ones(5, np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def find_codes(table: WeightTable) -> dict[str, str]:
    return {finding.code: finding.text for finding in table.findings}


def test_every_dtype_of_safetensors_is_read_as_it_was_written(tmp_path: Path) -> None:
    tensors = make_tensors()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    table = read_weight_table(tmp_path)
    assert table == read_weight_table(tmp_path / "model.safetensors")
    assert table.metadata == {"format": "pt"}
    assert [(f.name, f.format) for f in table.files] == [("model.safetensors", "safetensors")]
    assert {t.name: t.shape for t in table.tensors} == {name: tuple(t.shape) for name, t in tensors.items()}
    assert {t.name[2:]: t.dtype for t in table.tensors if t.name[:2] == "t."} == {name: name for name in DTYPES}
    whole = (tmp_path / "model.safetensors").read_bytes()
    for entry in table.tensors:
        assert entry.offset is not None
        data = tensors[entry.name].contiguous().flatten().view(torch.uint8).numpy().tobytes()
        assert whole[entry.offset : entry.offset + entry.size_bytes] == data
        assert entry.n_elements == tensors[entry.name].numel()
    assert table.size_bytes == sum(t.nbytes for t in tensors.values())
    assert [t.offset for t in table.tensors] == sorted(t.offset or 0 for t in table.tensors)


def test_every_dtype_that_the_library_knows_is_known(tmp_path: Path) -> None:
    for name, n_bits in [*DTYPE_BITS.items(), ("F7", 8), ("", 8), ("f32", 32)]:
        entry = {"dtype": name, "shape": [8], "data_offsets": [0, n_bits]}
        path = write_safetensors(tmp_path / "x.safetensors", {"w": entry}, bytes(n_bits))
        assert is_accepted(path) == is_accepted_by_library(path) == (name in DTYPE_BITS)


def is_accepted(path: Path) -> bool:
    try:
        read_weight_table(path)
    except ContentError as error:
        assert error.where == str(path)
        return False
    return True


def is_accepted_by_library(path: Path) -> bool:
    try:
        safetensors.deserialize(path.read_bytes())
    except safetensors.SafetensorError:
        return False
    return True


W = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("entries", "data", "words"),
    [
        ({"w": W}, bytes(3), "cut off: 5 of"),
        ({"w": W}, bytes(11), "3 bytes follow the last tensor"),
        ({"w": W | {"shape": [True, 2]}}, bytes(8), "no list of up to 64 sizes"),
        ({"w": W | {"shape": [-1]}}, bytes(8), "no list of up to 64 sizes"),
        ({"w": W | {"shape": [2.0]}}, bytes(8), "no list of up to 64 sizes"),
        ({"w": W | {"shape": None}}, bytes(8), "no list of up to 64 sizes"),
        ({"w": W | {"shape": [1 << 40, 1 << 40, 0]}}, bytes(8), "more elements than any file"),
        ({"w": W | {"shape": [3]}}, bytes(8), "3 elements of 32 bits, but its data_offsets span 8 bytes"),
        ({"w": W | {"dtype": "F4", "shape": [3]}}, bytes(8), "3 elements of 4 bits"),
        ({"w": W | {"data_offsets": [8, 0]}}, bytes(8), "no pair of begin and end"),
        ({"w": W | {"data_offsets": [0]}}, bytes(8), "no pair of begin and end"),
        ({"w": W | {"dtype": 7}}, bytes(8), "no known dtype"),
        ({"w": W, "v": W}, bytes(8), "'v' overlaps another"),
        ({"w": W, "v": W | {"data_offsets": [12, 20]}}, bytes(20), "'v' leaves a hole after another"),
        ({"w": 1}, b"", "is no object"),
        ({"__metadata__": {"a": 1}}, b"", "__metadata__ is no object of strings"),
        ({"__metadata__": []}, b"", "__metadata__ is no object of strings"),
        (b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[-0,8]}}', bytes(8), "no pair of begin and end"),
        (b"[]", b"", "it is no JSON object"),
        (b"\xff{}", b"", "invalid start byte"),
        (b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8), "surrogates not allowed"),
        (b'{"w":{"x":NaN,"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8), "NaN is no JSON"),
        (b'{"w":' * 50_000, b"", "nested too deeply"),
        (b"[" * 50_000, b"", "nested too deeply"),
        (b'{"w":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}', bytes(8), "limit"),
    ],
)
def test_damaged_safetensors_say_why_and_the_library_refuses_them_too(
    tmp_path: Path, entries: Any, data: bytes, words: str
) -> None:
    path = write_safetensors(tmp_path / "x.safetensors", entries, data)
    with pytest.raises(ContentError) as caught:
        read_weight_table(path)
    assert words in str(caught.value)
    assert caught.value.where == str(path)
    assert not is_accepted_by_library(path)


def test_where_ftcli_is_stricter_than_the_library(tmp_path: Path) -> None:
    one = b'{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    path = tmp_path / "x.safetensors"
    for header, words in (
        (b'{"w":%s,"w":%s}' % (one, one), "the key 'w' stands twice"),
        (b'{"__metadata__":{"a":"","a":""}}', "the key 'a' stands twice"),
        (b'{"w":{"dtype":"F32","shape":[%s0],"data_offsets":[0,0]}}' % (b"1," * 64), "up to 64 sizes"),
        (b'{"w":["F32",[0],[0,0]]}', "is no object"),
    ):
        write_safetensors(path, header)
        assert is_accepted_by_library(path)
        with pytest.raises(ContentError, match=words):
            read_weight_table(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer.*\n.*git lfs pull"),
        (b"<!DOCTYPE html><html></html>", "a web page"),
        (b"PK\x03\x04" + bytes(99), "a zip archive, as torch.save writes"),
        (b"GGUF\x03\0\0\0" + bytes(99), "a GGUF file; a safetensors file was expected"),
        (b"\x80\x02ccollections\nOrderedDict", "gives? a header of"),
        (b"abc", "cut off after 3 bytes"),
        (b"\x10\0\0\0\0\0\0\0{}", "cut off in its header: 14 bytes"),
        (b"", "the file is empty"),
    ],
)
def test_what_lies_under_a_name_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ContentError, match=words):
        read_weight_table(path)
    with pytest.raises(ContentError, match=words):
        read_weight_table(tmp_path)


def write_shards(folder: Path) -> dict[str, str]:
    shards = {
        "model-00001-of-00002.safetensors": {"a": torch.ones(2, 2), "b": torch.ones(3)},
        "model-00002-of-00002.safetensors": {"c": torch.ones(4, dtype=torch.bfloat16)},
    }
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
    weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_shards_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    write_shards(tmp_path)
    table = read_weight_table(tmp_path)
    assert [(t.name, t.file[:11]) for t in table.tensors] == [
        ("a", "model-00001"),
        ("b", "model-00001"),
        ("c", "model-00002"),
    ]
    assert not table.findings
    assert table == read_weight_table(tmp_path / "model.safetensors.index.json")
    (tmp_path / "model.safetensors.index.json").unlink()
    assert read_weight_table(tmp_path) == table


def test_what_an_index_and_its_shards_say_against_each_other_is_found(tmp_path: Path) -> None:
    weight_map = write_shards(tmp_path)
    first, second = sorted(set(weight_map.values()))
    (tmp_path.parent / "outside.safetensors").write_bytes(b"not to be opened")
    write_index(
        tmp_path,
        {
            "c": second,
            "d": second,
            "e": "model-00003-of-00003.safetensors",
            "f": "../outside.safetensors",
            "g": str(tmp_path / first),
            "h": "C:\\x.safetensors",
        },
    )
    (tmp_path / "consolidated.safetensors").write_bytes(b"")
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    (tmp_path / "x.incomplete").write_bytes(b"")
    codes = find_codes(read_weight_table(tmp_path))
    assert codes.pop("missing_shard") == "model-00003-of-00003.safetensors: missing"
    assert "../outside.safetensors" in codes["outside"]
    assert codes.pop("outside").endswith("not followed")
    assert codes.pop("missing_tensor") == f"d ({second}): named by the index, but not in its file"
    assert codes.pop("two_layouts").startswith("model.safetensors and model.safetensors.index.json are both here")
    assert codes.pop("both_formats").startswith("pytorch_model.bin: not read")
    assert codes.pop("unread_file") == f"consolidated.safetensors, {first}: not part of the model, and not read"
    assert codes.pop("incomplete").startswith("x.incomplete: a download that did not end")
    assert not codes


def test_misplaced_unnamed_and_double_tensors_are_found(tmp_path: Path) -> None:
    weight_map = write_shards(tmp_path)
    first, second = sorted(set(weight_map.values()))
    save_file({"b": torch.ones(9), "c": torch.ones(4), "extra": torch.ones(1)}, tmp_path / second)
    write_index(tmp_path, {"a": second, "b": second, "c": second, "z": first})
    table = read_weight_table(tmp_path)
    codes = find_codes(table)
    assert codes.pop("double_tensor") == f"b ({first}, {second}): in two files"
    assert codes.pop("misplaced_tensor") == f"a ({first}, not {second}): not in the file that the index names"
    assert codes.pop("unnamed_tensor") == f"extra ({second}): in a file, but not named by the index"
    assert codes.pop("missing_tensor") == f"z ({first}): named by the index, but not in its file"
    assert not codes
    assert [(t.name, t.shape) for t in table.tensors if t.name == "b"] == [("b", (9,))]  # the one that the index means


def test_a_missing_shard_is_found_without_an_index_and_behind_a_dead_link(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    table = read_weight_table(tmp_path)
    assert find_codes(table) == {"missing_shard": "model-00001-of-00002.safetensors: missing"}
    assert [t.name for t in table.tensors] == ["c"]
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "model-00001-of-00002.safetensors").symlink_to(tmp_path / "nowhere")
    assert read_weight_table(tmp_path) == table


def test_a_snapshot_of_the_hub_cache_is_followed_through_its_links(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    save_file({"a": torch.ones(2)}, blobs / "0123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    assert not read_weight_table(snapshot).findings
    (blobs / "4567.incomplete").write_bytes(b"")
    assert "4567.incomplete" in find_codes(read_weight_table(snapshot))["incomplete"]


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[" * 99999, '{"weight_map": "x"}']
)
def test_a_damaged_index_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ContentError, match="the index of the weights is damaged"):
        read_weight_table(tmp_path)


def test_adapters_and_folders_without_weights(tmp_path: Path) -> None:
    assert read_weight_table(tmp_path) == WeightTable((), ())
    (tmp_path / "training_args.bin").write_bytes(b"x")
    (tmp_path / "optimizer.bin").write_bytes(b"x")
    assert read_weight_table(tmp_path) == WeightTable((), ())
    save_file({"lora_A": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    assert [t.name for t in read_weight_table(tmp_path).tensors] == ["lora_A"]
    (tmp_path / "config.json").write_text("{}")
    assert read_weight_table(tmp_path) == WeightTable((), ())
    write_gguf(tmp_path / "x.gguf")
    assert find_codes(read_weight_table(tmp_path)) == {"gguf_only": "x.gguf: name the file itself to read it"}


def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for suffix in (".safetensors", ".bin", ".gguf", ".safetensors.index.json"):
        os.mkfifo(tmp_path / f"pipe{suffix}")
        (tmp_path / f"device{suffix}").symlink_to("/dev/zero")
        (tmp_path / f"empty{suffix}").touch()
        (tmp_path / f"loop{suffix}").symlink_to(tmp_path / f"loop{suffix}")
        for name in ("pipe", "device", "empty", "absent", "loop", "null\0", "long" * 99):
            with pytest.raises(ContentError):
                read_weight_table(tmp_path / f"{name}{suffix}")
    (tmp_path / "model" / "model.safetensors").mkdir(parents=True)
    with pytest.raises(ContentError, match="is a folder"):
        read_weight_table(tmp_path / "model")
    with pytest.raises(ContentError, match="no file of weights"):
        read_weight_table(write_safetensors(tmp_path / "x.txt", {}))

    def refuse(*_: Any) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(DiskError, match="cannot be read: permission denied") as caught:
        read_weight_table(tmp_path / "x.gguf")
    assert caught.value.where == str(tmp_path / "x.gguf")


def test_the_types_of_ggml_are_those_of_the_gguf_package() -> None:
    theirs = {t.value: (t.name, *gguf.GGML_QUANT_SIZES[t]) for t in gguf.GGMLQuantizationType}
    assert theirs == GGML_TYPES


def test_a_gguf_file_is_read_as_its_own_reader_reads_it(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf")
    table = read_weight_table(path)
    theirs = gguf.GGUFReader(path)
    assert [(t.name, t.dtype, t.shape, t.size_bytes, t.offset, t.n_elements) for t in table.tensors] == [
        (t.name, t.tensor_type.name, tuple(int(n) for n in reversed(t.shape)), t.n_bytes, t.data_offset, t.n_elements)
        for t in theirs.tensors
    ]
    assert table.metadata["general.name"] == "tiny"
    assert read_gguf_header(path, keep=10).metadata["tokenizer.ggml.tokens"] == ["token0", "token1", "token2"]
    assert read_gguf_header(path, keep=2).metadata["tokenizer.ggml.tokens"] == 3


def test_a_large_vocabulary_costs_little(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", n_tokens=150_000)
    costs = []
    for _ in range(3):
        before = time.process_time()
        header = read_gguf_header(path)
        costs.append(time.process_time() - before)
    assert header.metadata["tokenizer.ggml.tokens"] == header.metadata["tokenizer.ggml.scores"] == 150_000
    assert min(costs) < 0.3
    assert len(read_gguf_header(path, keep=200_000).metadata["tokenizer.ggml.tokens"]) == 150_000


def test_the_files_of_a_split_gguf_are_read_together(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=1)
    for name in "abc":
        writer.add_tensor(name, np.ones((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    table = read_weight_table(tmp_path / "m-00001-of-00003.gguf")
    assert [t.name for t in table.tensors] == ["a", "b", "c"]
    (tmp_path / "m-00002-of-00003.gguf").unlink()
    table = read_weight_table(tmp_path / "m-00001-of-00003.gguf")
    assert find_codes(table) == {"missing_shard": "m-00002-of-00003.gguf: missing"}


def make_gguf(
    tensors: list[tuple[bytes, tuple[int, ...], int, int]], data: bytes = b"", keys: bytes = b"", n_keys: int = 0
) -> bytes:
    rows = b"".join(
        struct.pack("<Q", len(name)) + name + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, type_id, offset)
        for name, shape, type_id, offset in tensors
    )
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), n_keys) + keys + rows
    return head + bytes(-len(head) % 32) + data


KEY = struct.pack("<Q", 1) + b"k"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (make_gguf([(b"w", (8,), 0, 0)], bytes(31)), "cut off: 1 of 96 bytes"),
        (make_gguf([(b"w", (8,), 0, 4)], bytes(99)), "offset 4 is no multiple of 32"),
        (make_gguf([(b"w", (9,), 0, 0), (b"v", (8,), 0, 32)], bytes(99)), "'v' is damaged\n  its data overlap"),
        (make_gguf([(b"w", (8,), 0, 0)] * 2, bytes(99)), "'w' stands twice"),
        (make_gguf([(b"w", (8,), 99, 0)], bytes(99)), "type 99 is not known"),
        (make_gguf([(b"w", (32,), 31, 0)], bytes(99)), "Q4_0_4_4 is no longer part of GGUF"),
        (make_gguf([(b"w", (31,), 2, 0)], bytes(99)), "no whole blocks of Q4_0"),
        (make_gguf([(b"w", (1,) * 5, 0, 0)], bytes(99)), "5 dimensions"),
        (make_gguf([(b"w", (1 << 40, 1 << 40), 0, 0)], bytes(99)), "larger than any file"),
        (make_gguf([(b"\xff", (1,), 0, 0)], bytes(99)), "invalid start byte"),
        (make_gguf([], b"", (KEY + struct.pack("<IB", 0, 1)) * 2, 2), "'k' stands twice"),
        (make_gguf([], b"", KEY + struct.pack("<IB", 77, 1), 1), "a value of type 77"),
        (make_gguf([], b"", KEY + struct.pack("<IIQ", 9, 77, 1), 1), "a list of type 77"),
        (make_gguf([], b"", KEY + struct.pack("<IIQ", 9, 8, 1 << 60), 1), "a count of 1152921504606846976"),
        (make_gguf([], b"", KEY + struct.pack("<IQ", 8, 1 << 63), 1), "longer than 64 MiB"),
        (make_gguf([], b"", KEY + struct.pack("<IQ", 8, 1 << 20), 1), "ends within a value"),
        (make_gguf([], b"", KEY + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 9, 1), "lists in lists"),
        (
            make_gguf([], b"", struct.pack("<Q", 17) + b"general.alignment" + struct.pack("<II", 4, 0), 1),
            "an alignment of 0 cannot be",
        ),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 50), "a count of"),
        (b"GGUF" + struct.pack("<III", 1, 0, 0), "version 1 is not supported"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"FUGG" + bytes(20), "big-endian"),
        (b"ggjt" + bytes(20), "the format before GGUF"),
        (b"GGUX", "does not begin with GGUF"),
        (b"GGU", "does not begin with GGUF"),
        (b"GGUF", "ends within a value"),
    ],
)
def test_damaged_gguf_files_say_why(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(ContentError) as caught:
        read_weight_table(path)
    assert words in str(caught.value)
    assert caught.value.where == str(path)


def mutate(whole: bytes, rng: random.Random, header_bytes: int) -> bytes:
    """A copy of ``whole`` with a few bits, bytes, lengths or pieces changed, mostly within its header."""
    piece = bytearray(whole)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(max(1, min(header_bytes, len(piece))))
        match rng.randrange(7):
            case 0:
                piece[at : at + 1] = bytes([(piece[at] if piece else 0) ^ 1 << rng.randrange(8)])
            case 1:
                del piece[rng.randrange(len(piece) + 1) :]
            case 2:
                value = rng.choice([0, 1, 255, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1, (1 << 64) - 1])
                piece[at : at + 8] = struct.pack("<Q", value)
            case 3:
                other = rng.randrange(len(piece) or 1)
                piece[at:at] = piece[other : other + rng.randint(1, 64)]
            case 4:
                del piece[at : at + rng.randint(1, 16)]
            case 5:
                piece[at : at + 1] = bytes([rng.randrange(256)])
            case 6:
                piece[at : at + 1] = rng.choice([b"[", b"]", b"{", b"}", b'"', b"-", b"0", b",", b".", b"9", b"e"])
        if not piece:
            break
    return bytes(piece)


def check_mutants(path: Path, whole: bytes, header_bytes: int, seed: int, count: int) -> list[bytes]:
    """The mutants of ``whole`` that are read; each is read or refused in under a second and 64 MB."""
    rng = random.Random(seed)
    read = []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(count):
        mutant = mutate(whole, rng, header_bytes)
        path.write_bytes(mutant)
        start = time.perf_counter()
        if is_accepted(path):
            read.append(mutant)
        assert time.perf_counter() - start < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10
    return read


def make_safetensors(tmp_path: Path) -> bytes:
    save_file(make_tensors(), tmp_path / "whole.safetensors", metadata={"format": "pt"})
    return (tmp_path / "whole.safetensors").read_bytes()


def make_whole_gguf(tmp_path: Path) -> bytes:
    return write_gguf(tmp_path / "whole.gguf", n_tokens=80).read_bytes()


@pytest.mark.parametrize(
    ("suffix", "make"), [(".safetensors", make_safetensors), (".gguf", make_whole_gguf)], ids=["safetensors", "gguf"]
)
def test_mutated_headers_are_read_or_refused(tmp_path: Path, suffix: str, make: Callable[[Path], bytes]) -> None:
    whole = make(tmp_path)
    path = tmp_path / f"x{suffix}"
    path.write_bytes(whole)
    assert is_accepted(path)
    check_mutants(path, whole, len(whole), seed=1, count=1500)


def mutate_entries(header: bytes, rng: random.Random) -> bytes:
    """A copy of the JSON ``header`` in which the values of one or two tensors are changed."""
    entries = json.loads(header)
    for _ in range(rng.randint(1, 2)):
        name = rng.choice(sorted(entries))
        other = entries[rng.choice(sorted(entries))]
        match rng.randrange(6):
            case 0:
                entries[name] = entries[name] | {"dtype": rng.choice([*DTYPE_BITS, "F7", None, 1])}
            case 1:
                entries[name] = entries[name] | {"shape": rng.choice([[6], [3, 2], [6, 1], [2], [0], [-6, -1], [], 6])}
            case 2:
                entries[name] = entries[name] | {"data_offsets": other.get("data_offsets")}
            case 3:
                entries[f"{name}*"] = entries.pop(name)
            case 4:
                entries[name] = entries[name] | {"more": rng.choice([1, None, "x", [1.5], {"a": {}}])}
            case 5:
                entries = {key: entries[key] for key in rng.sample(sorted(entries), len(entries))}
    return json.dumps(entries, ensure_ascii=rng.random() < 0.5).encode()


def test_the_library_agrees_on_mutated_safetensors(tmp_path: Path) -> None:
    whole = make_safetensors(tmp_path)
    header_bytes = struct.unpack("<Q", whole[:8])[0]
    header, data = whole[8 : 8 + header_bytes], whole[8 + header_bytes :]
    path = tmp_path / "x.safetensors"
    rng = random.Random(2)
    n_accepted = 0
    for i in range(2500):
        mutant = mutate_entries(header, rng) if i % 2 else mutate(header, rng, header_bytes)
        write_safetensors(path, mutant, data)
        accepted = is_accepted(path)
        n_accepted += accepted
        if accepted != is_accepted_by_library(path):
            with pytest.raises(ContentError, match="stands twice"):  # the one way in which ftcli is stricter here
                read_weight_table(path)
    assert 400 < n_accepted < 2000
