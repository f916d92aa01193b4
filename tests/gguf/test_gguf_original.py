"""Smaller GGUF files made of one in 16 or 32 bits, against ``llama_model_quantize`` (pinned hashes); refusals."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from gguf_models import QUANTIZED, convert_model, write_model

from ftcli.errors import ContentError, FtcliError
from ftcli.gguf.convert import convert
from ftcli.gguf.draft import draft_model
from ftcli.gguf.original import draft_gguf
from ftcli.gguf.write import write_gguf
from ftcli.merge.stream import open_folder
from ftcli.store.gguf_header import read_gguf_header

HASHES = json.loads(Path(__file__).with_name("quantized.json").read_text())


@pytest.fixture(scope="module")
def open_case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that returns the folder of a case, whose weights are in bfloat16."""
    return cache(lambda case: write_model(tmp_path_factory.mktemp("case") / "model", "smollm2", **QUANTIZED[case]))


@pytest.mark.parametrize("source", ["f32", "bf16"])
@pytest.mark.parametrize("case", ["wide", "narrow", "llama-3.1", "phi3", "gemma2"])
@pytest.mark.parametrize("kind", ["q8_0", "q4_k_m", "q2_k"])
def test_file_is_the_one_that_llama_quantize_writes(
    tmp_path: Path, open_case: Callable[[str], Path], case: str, source: str, kind: str
) -> None:
    original = convert_model(open_case(case), tmp_path / "a.gguf", kind=source).path
    result = convert(draft_gguf(original), tmp_path / "b.gguf", kind=kind)
    assert hashlib.sha256(result.path.read_bytes()).hexdigest() == HASHES[case][kind]


def test_a_rounded_file_of_another_family_or_part_is_refused(tmp_path: Path, open_case: Callable[[str], Path]) -> None:
    folder, path = open_case("narrow"), tmp_path / "a.gguf"
    with pytest.raises(ContentError, match=r"rounded already: .* is Q8_0"):
        draft_gguf(convert_model(folder, path, kind="q8_0").path)
    draft = draft_model(open_folder(folder))
    changes: list[tuple[dict[str, Any], str]] = [
        ({"general.architecture": "mamba"}, "does not know which types"),
        ({"split.count": 3}, "one of several parts"),
        ({"llama.expert_count": 8}, "mixture of experts"),
        ({"llama.block_count": "two"}, "block_count is two"),
        ({"llama.attention.head_count_kv": 0}, "head_count_kv is 0"),
    ]
    for change, told in changes:
        convert(replace(draft, keys={**draft.keys, **change}), path, kind="f16")
        with pytest.raises(ContentError, match=told):
            draft_gguf(path)
    write_gguf(path, {**draft.list_keys("f16"), "general.alignment": 64}, draft.plan("f16"))
    with pytest.raises(ContentError, match=r"aligned|multiple of 64"):
        draft_gguf(path)


def test_a_file_that_is_cut_off_is_refused(tmp_path: Path, open_case: Callable[[str], Path]) -> None:
    path = convert_model(open_case("narrow"), tmp_path / "a.gguf", kind="f16").path
    path.write_bytes(path.read_bytes()[:-64])
    with pytest.raises(ContentError, match="cut off"):
        draft_gguf(path)


@pytest.mark.parametrize("n_mutants", [60, pytest.param(2000, marks=pytest.mark.slow)])
def test_a_damaged_header_is_an_error_or_a_file(
    tmp_path: Path, open_case: Callable[[str], Path], n_mutants: int
) -> None:
    good = convert_model(open_case("narrow"), tmp_path / "a.gguf", kind="f16").path.read_bytes()
    end = read_gguf_header(tmp_path / "a.gguf").data_offset
    rng = random.Random(n_mutants)
    outcomes = Counter[str]()
    for _ in range(n_mutants):
        mutant = bytearray(good)
        for _ in range(rng.choice((1, 1, 2, 4))):
            at, way = rng.randrange(end), rng.randrange(4)
            if way == 0:
                mutant[at] = rng.randrange(256)
            elif way == 1:
                mutant[at : at + 8] = rng.choice((0, 1, 1 << 32, (1 << 64) - 1)).to_bytes(8, "little")
            elif way == 2:
                del mutant[at : at + rng.randrange(1, 40)]
            else:
                mutant[at:at] = rng.randbytes(rng.randrange(1, 20))
        (tmp_path / "b.gguf").write_bytes(mutant)
        try:
            convert(draft_gguf(tmp_path / "b.gguf"), tmp_path / "c.gguf", kind="q8_0")
            outcomes["file"] += 1
        except FtcliError as error:
            outcomes[type(error).__name__] += 1
    assert outcomes["ContentError"] > n_mutants // 2
    assert outcomes["file"] > 0


def test_a_key_of_another_kind_of_value_is_kept_to_the_byte(tmp_path: Path, open_case: Callable[[str], Path]) -> None:
    draft = draft_model(open_folder(open_case("narrow")))
    keys = {**draft.keys, "own.list": [1.5, 2.5], "own.text": "ü", "own.flag": True, "own.texts": ["a", "b"]}
    convert(replace(draft, keys=keys), tmp_path / "a.gguf", kind="f32")
    first = convert(draft_gguf(tmp_path / "a.gguf"), tmp_path / "b.gguf", kind="f16").path.read_bytes()
    assert first == convert(draft_gguf(tmp_path / "b.gguf"), tmp_path / "c.gguf", kind="f16").path.read_bytes()
    for key in ("own.list", "own.text", "own.flag", "own.texts"):
        assert key.encode() in first
