"""GPTQ and AWQ folders in the hands of others: auto-round's own loader and unpacking, and gptqmodel where it is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_model, save_model
from safetensors.torch import load_file

from ftcli.evaluate.subject import load_plain
from ftcli.quantize.method import build_spec
from ftcli.quantize.run import quantize
from ftcli.recipe import ModelSection
from ftcli.store.target import find_model


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    model = build_model(tied=False).to(torch.bfloat16)
    return save_model(tmp_path_factory.mktemp("load") / "source", model, tiny_tokenizer)


def make(method: str, source: Path, rows: Path, out: Path) -> Path:
    spec = build_spec(method, samples=2, seq_len=64, tune=0)
    quantize(str(source), spec, calibration=str(rows), output=out, verifies=False)
    return out


def load_ours(folder: Path) -> Any:
    return load_plain(find_model(str(folder)), ModelSection(name_or_path=str(folder), dtype="float32"))


def load_elsewhere(folder: Path, code: str, tmp_path: Path) -> torch.Tensor:
    """The logits of a few ids from a model that ``code`` loads as ``model``: what it patches stays in its process."""
    code = (
        "import torch\nfrom transformers import AutoModelForCausalLM\n"
        f"folder = {str(folder)!r}\n{code}\n"
        "with torch.no_grad():\n"
        "    logits = model(torch.arange(20, 60)[None]).logits.float()\n"
        f"torch.save(logits, {str(tmp_path / 'logits.pt')!r})\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(tmp_path / "logits.pt", weights_only=True)


@pytest.mark.slow
def test_auto_rounds_own_loader_gives_the_same_logits(source: Path, write_rows: Any, tmp_path: Path) -> None:
    folder = make("gptq", source, write_rows(), tmp_path / "out")
    code = (
        "from transformers import AutoRoundConfig\n"
        "model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=AutoRoundConfig(backend='torch_zp'),"
        " device_map='cpu', dtype=torch.float32)\n"
        "assert sum(type(m).__name__ == 'QuantLinear' for m in model.modules()) == 14"
    )
    theirs = load_elsewhere(folder, code, tmp_path)
    with torch.no_grad():
        ours = load_ours(folder)(torch.arange(20, 60)[None]).logits
    assert torch.allclose(ours, theirs, atol=2e-3 * ours.abs().max().item())


@pytest.mark.slow
def test_awq_unpacks_as_auto_round_unpacks_it(source: Path, write_rows: Any, tmp_path: Path) -> None:
    from auto_round.export.export_to_awq.utils import dequantize_gemm

    folder = make("awq", source, write_rows(), tmp_path / "out")
    tensors, model = load_file(folder / "model.safetensors"), load_ours(folder)
    names = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    assert len(names) == 14
    for name in names:
        parts = (tensors[f"{name}.{part}"] for part in ("qweight", "qzeros"))
        theirs = dequantize_gemm(*parts, tensors[f"{name}.scales"].float(), 4, 64).T
        assert torch.equal(model.get_submodule(name).weight, theirs), name


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_transformers_loads_them_with_gptqmodel(method: str, source: Path, write_rows: Any, tmp_path: Path) -> None:
    pytest.importorskip("gptqmodel")
    folder = make(method, source, write_rows(), tmp_path / "out")
    code = "model = AutoModelForCausalLM.from_pretrained(folder, device_map='cpu')"
    theirs = load_elsewhere(folder, code, tmp_path)
    with torch.no_grad():
        ours = load_ours(folder)(torch.arange(20, 60)[None]).logits
    assert torch.nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.999
