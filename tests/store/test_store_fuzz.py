"""Mutated weight files: each gives a table or an error that says what is wrong, and soon."""

from __future__ import annotations

import io
import json
import random
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ftcli.errors import ContentError, DiskError
from ftcli.store.target import ModelFiles, read_config
from ftcli.store.weight import WeightTable, read_weight_table

N_FILES = 700
EDGES = (0, 1, 2, 7, 8, 63, 127, 128, 255, 1 << 15, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1, (1 << 64) - 1)
TOKENS = (b"-1", b"1e9", b"NaN", b"null", b"true", b"[]", b"{}", b'""', b"9" * 30, b"\xff", b'"\\ud800"', b"[" * 3000)


def make_state() -> dict[str, torch.Tensor]:
    weight = torch.zeros(3, 4)
    return {"a.weight": weight, "b": torch.ones(2, dtype=torch.bfloat16), "tied": weight, "none": torch.zeros(0, 5)}


def write_bin(path: Path, *, is_zip: bool) -> bytes:
    torch.save(make_state(), path, _use_new_zipfile_serialization=is_zip)
    return path.read_bytes()


def write_gguf(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_token_list(["a", "b", "c"])
    writer.add_tensor("a", np.ones((2, 32), np.float32))
    writer.add_tensor("b", np.ones(5, np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def mutate(source: bytes, rng: random.Random) -> bytes:
    """``source`` with up to four changes, most of them in its first 600 bytes."""
    data = bytearray(source)
    for _ in range(rng.randint(1, 4)):
        reach = min(len(data), 600 if rng.random() < 0.8 else len(data)) or 1
        at, kind = rng.randrange(reach), rng.randrange(6)
        if kind == 0 and data:
            data[min(at, len(data) - 1)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[rng.randrange(len(data) + 1) :]
        elif kind == 2:
            width = rng.choice((1, 2, 4, 8))
            data[at : at + width] = (rng.choice(EDGES) & ((1 << 8 * width) - 1)).to_bytes(width, "little")
        elif kind == 3:
            start = rng.randrange(reach)
            data[at:at] = data[start : start + rng.randint(1, 64)]
        elif kind == 4:
            del data[at : at + rng.randint(1, 16)]
        else:
            data[at : at + rng.randint(0, 4)] = rng.choice(TOKENS)
    return bytes(data)


def check(path: Path, read: Callable[[Path], object]) -> bool:
    """Whether ``path`` was read; any error but the two that a reader may raise fails the test."""
    start = time.process_time()
    try:
        read(path)
        accepted = True
    except (ContentError, DiskError) as error:
        assert str(path) in str(error) or str(path.parent) in str(error)
        assert len(str(error)) < 2000
        assert str(error).replace("\n", "").isprintable()
        accepted = False
    assert time.process_time() - start < 1
    return accepted


def read_and_add(path: Path) -> WeightTable:
    table = read_weight_table(path)
    assert table.size_bytes >= 0
    assert all(tensor.n_elements >= 0 for tensor in table.tensors)
    json.dumps([(t.name, t.shape) for t in table.tensors], ensure_ascii=False).encode()
    return table


def mutate_all(source: bytes, seed: int, n: int = N_FILES) -> Iterator[bytes]:
    rng = random.Random(seed)
    return (mutate(source, rng) for _ in range(n))


@pytest.mark.parametrize("suffix", ["safetensors", "gguf", "bin", "legacy.bin"])
def test_mutated_weights_give_a_table_or_an_error(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model.{suffix}"
    if suffix == "safetensors":
        save_file({k: v for k, v in make_state().items() if k != "tied"}, path, metadata={"format": "pt"})
    elif suffix == "gguf":
        write_gguf(path)
    else:
        write_bin(path, is_zip=suffix == "bin")
    assert check(path, read_and_add)
    results = []
    for data in mutate_all(path.read_bytes(), 1):
        path.write_bytes(data)
        results.append(check(path, read_and_add))
    assert False in results


def test_mutated_pickles_in_a_whole_zip_give_a_table_or_an_error(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    with zipfile.ZipFile(io.BytesIO(write_bin(path, is_zip=True))) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    pickled = next(name for name in parts if name.endswith("/data.pkl"))
    results = []
    for data in mutate_all(parts[pickled], 2):
        with zipfile.ZipFile(path, "w") as archive:
            for name, part in parts.items():
                archive.writestr(name, data if name == pickled else part)
        results.append(check(path, read_and_add))
    assert len(set(results)) == 2


def test_mutated_zip_directories_give_a_table_or_an_error(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    whole = write_bin(path, is_zip=True)
    cut = whole.index(b"PK\x01\x02")
    for data in mutate_all(whole[cut:], 3):
        path.write_bytes(whole[:cut] + data)
        check(path, read_and_add)


def test_mutated_indexes_and_configs_give_a_value_or_an_error(tmp_path: Path) -> None:
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    save_file({"a": torch.zeros(2)}, tmp_path / first)
    save_file({"b": torch.zeros(2)}, tmp_path / second)
    index, config = tmp_path / "model.safetensors.index.json", tmp_path / "config.json"
    value = {"metadata": {"total_size": 16}, "weight_map": {"a": first, "b": second}}
    for data in mutate_all(json.dumps(value).encode(), 4):
        index.write_bytes(data)
        check(tmp_path, read_and_add)
    text = json.dumps({"architectures": ["LlamaForCausalLM"], "vocab_size": 384, "rope_scaling": {"factor": 2.0}})
    for data in mutate_all(text.encode(), 5):
        config.write_bytes(data)
        check(config, lambda path: read_config(ModelFiles("x", path.parent)))
