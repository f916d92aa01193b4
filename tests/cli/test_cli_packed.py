"""Packed folders on the command line: what runs them, what describes them, and what does not train them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from packed_models import write_bitsandbytes, write_packed
from test_cli import ftcli  # noqa: F401

KINDS = ("gptq", "awq", "nf4", "int8")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_tokenizer: Any) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("packed")
    for method in ("gptq", "awq"):
        write_packed(tiny_model, root / method, method)
    write_bitsandbytes(tiny_model, root / "nf4", tiny_tokenizer, load_in_4bit=True, bnb_4bit_quant_type="nf4")
    write_bitsandbytes(tiny_model, root / "int8", tiny_tokenizer, load_in_8bit=True)
    return {name: root / name for name in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_chat_and_inspect_take_a_packed_folder(
    ftcli: Any,  # noqa: F811
    packed: dict[str, Path],
    tiny_model: Path,
    kind: str,
) -> None:
    answer = ftcli("chat", packed[kind], "--prompt", "x", "--max-new-tokens", "4")
    assert answer.code == 0, answer.err
    assert ("is dequantised to run here" in answer.err) == (kind in ("gptq", "awq"))
    found, dense = (json.loads(ftcli("inspect", path, "--json").out) for path in (packed[kind], tiny_model))
    assert found["parameters"] == dense["parameters"]
    assert "quantized" in str(found["findings"])


def test_eval_compares_packed_folders(ftcli: Any, packed: dict[str, Path], write_rows: Any) -> None:  # noqa: F811
    rows = write_rows(n=4)
    result = ftcli("eval", *(packed[kind] for kind in KINDS), "--data", rows, "--json")
    assert result.code == 0, result.err
    targets = json.loads(result.out)["targets"]
    assert len(targets) == 4
    assert all(4 < target["bits_per_weight"] < 32 for target in targets)


@pytest.mark.parametrize("kind", KINDS)
def test_training_says_what_a_packed_base_is_good_for(
    ftcli: Any,  # noqa: F811
    packed: dict[str, Path],
    write_recipe: Any,
    kind: str,
) -> None:
    result = ftcli("train", write_recipe(model={"name_or_path": str(packed[kind]), "dtype": "float32"}))
    if kind == "nf4":
        assert result.code == 0, result.err
        assert "its adapter can be run, and not be merged" in result.err
    else:
        assert result.code == 3
        assert "the weights are quantised already" in result.err
        assert "name the 16-bit model" in result.err
