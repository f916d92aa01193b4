"""What an adapter moved against PEFT's own delta, and adapters whose files do not belong together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from ftcli.cli.app import app
from ftcli.errors import ContentError
from ftcli.jobs.inspect import inspect_target
from ftcli.model.lora import measure_norm
from ftcli.store.tensor import TensorEntry


def save_adapter(folder: Path, base: Path, **changes: Any) -> Any:
    """The PEFT model whose adapter lies in ``folder``, with factors that are not zero."""
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "down_proj"], **changes),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return model


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "changes",
    [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.down_proj": 5}}],
)
def test_movement_is_that_of_peft(tmp_path: Path, tiny_model: Path, changes: dict[str, Any]) -> None:
    model = save_adapter(tmp_path, tiny_model, **changes)
    facts = inspect_target(str(tmp_path)).adapter
    assert facts
    modules = dict(model.base_model.model.named_modules())
    assert len(facts.moved) == 4
    for moved in facts.moved:
        layer = modules[moved.name]
        assert moved.delta_norm == pytest.approx(layer.get_delta_weight("default").norm().item(), rel=1e-5)
        assert moved.weight_norm == pytest.approx(layer.base_layer.weight.norm().item(), rel=1e-5)
    assert facts.layers == (0, 1)
    assert facts.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("base", "words"), [("", "names none"), (".", "is an adapter itself"), ("./nothere", "no such file")]
)
def test_an_adapter_without_its_base_is_still_shown(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, base: str, words: str
) -> None:
    save_adapter(tmp_path, tiny_model)
    change_config(tmp_path, base_model_name_or_path=base)
    monkeypatch.chdir(tmp_path)
    found = inspect_target(str(tmp_path))
    assert found.anatomy is None
    assert words in found.source.notices[0]
    assert found.adapter
    assert all(moved.weight_norm is None and moved.delta_norm > 0 for moved in found.adapter.moved)


@pytest.mark.parametrize(
    "changes",
    [{"lora_alpha": "much"}, {"alpha_pattern": {"(": 3}}, {"alpha_pattern": [1]}, {"lora_alpha": [1]}],
)
def test_nonsense_in_an_adapter_config_is_refused(tmp_path: Path, tiny_model: Path, changes: dict[str, Any]) -> None:
    save_adapter(tmp_path, tiny_model)
    change_config(tmp_path, **changes)
    with pytest.raises(ContentError):
        inspect_target(str(tmp_path))


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "BF16"])
def test_norm_of_a_packed_tensor_is_that_of_its_values(tmp_path: Path, kind: str) -> None:
    values = np.random.default_rng(0).normal(size=(96, 320)).astype(np.float32) + 0.3
    packed = quantize(values, GGMLQuantizationType[kind])
    (tmp_path / "w").write_bytes(b"head" + packed.tobytes())
    entry = TensorEntry("w", kind, values.shape, packed.nbytes, "w", 4)
    expected = np.linalg.norm(dequantize(packed, GGMLQuantizationType[kind]).astype(np.float64))
    assert measure_norm(tmp_path, entry) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_that_is_not_finite_is_found(tmp_path: Path, tiny_model: Path, value: float) -> None:
    save_adapter(tmp_path / "adapter", tiny_model)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    broken = next(name for name in tensors if "lora_B" in name)
    tensors[broken][0, 0] = value
    save_file(tensors, path, metadata={"format": "pt"})
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "adapter")])
    assert result.exit_code == 0
    assert "not finite" in result.stdout
    assert "NaN or infinity in 1 of 4 modules" in " ".join(result.stdout.split())
