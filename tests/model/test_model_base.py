"""Base models: what loads, what is refused, and NF4 that trains with right gradients."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_model, save_model

from ftcli.data.batch import build_batch
from ftcli.data.chat import Rendered
from ftcli.errors import ContentError, UsageError
from ftcli.evaluate.loss import compute_loss_sum
from ftcli.fused.check import check_documents_apart
from ftcli.model.base import build_skeleton, choose_dtype, load_model
from ftcli.model.build import add_lora
from ftcli.recipe import ModelSection, PeftSection, QuantizationSection
from ftcli.store.target import find_model

CPU = torch.device("cpu")


def load(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    section = ModelSection(name_or_path=str(folder))
    return load_model(find_model(str(folder)), section, dtype=dtype, device=CPU, **options)


def make_batch() -> Any:
    generator = torch.Generator().manual_seed(1)
    documents = [
        Rendered(torch.randint(300, (n,), generator=generator).tolist(), [i > 2 for i in range(n)], "f", n)
        for n in (7, 12, 20)
    ]
    return build_batch(documents)


def gradients(model: Any, batch: Any) -> torch.Tensor:
    model.zero_grad()
    (compute_loss_sum(model, batch) / batch.n_targets).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_nf4_gradients_equal_a_dense_model_of_the_dequantised_weights(tiny_model: Path) -> None:
    """Also after an evaluation, which makes bitsandbytes repack the weights unless it is kept from that."""
    import bitsandbytes as bnb

    peft = PeftSection(r=4, init_lora_weights=False)
    torch.manual_seed(0)
    quantized = add_lora(load(tiny_model, quantization=QuantizationSection()), peft).train()
    torch.manual_seed(0)
    dense = add_lora(load(tiny_model), peft).train()
    layers = dict(dense.named_modules())
    n_replaced = 0
    for name, module in quantized.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            layers[name].weight.data.copy_(weight)
            n_replaced += 1
    assert n_replaced == 14  # seven in each of two blocks: head and embedding stay as they are
    batch = make_batch()
    expected = gradients(dense, batch)
    first = gradients(quantized, batch)
    assert (first - expected).norm() / expected.norm() < 1e-6
    quantized.eval()
    with torch.no_grad():
        compute_loss_sum(quantized, batch)
    assert torch.equal(gradients(quantized.train(), batch), first)


def test_nf4_leaves_norms_and_embeddings_in_the_compute_dtype(tiny_model: Path) -> None:
    model = load(tiny_model, torch.bfloat16, quantization=QuantizationSection())
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    assert dtypes["model.layers.0.self_attn.q_proj.weight"] is torch.uint8
    others = {d for n, d in dtypes.items() if "proj" not in n}
    assert others == {torch.bfloat16}


@pytest.mark.parametrize(("has_bf16", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_choice_of_dtype(monkeypatch: pytest.MonkeyPatch, has_bf16: bool, dtype: torch.dtype) -> None:
    monkeypatch.setattr("ftcli.model.base.has_cpu_bf16", lambda: has_bf16)
    assert choose_dtype("auto", CPU) is dtype
    assert choose_dtype("float16", CPU) is torch.float16


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3", "gpt2"])
def test_documents_stay_apart_in_every_family(kind: str) -> None:
    check_documents_apart(build_model(kind))


def test_a_model_that_mixes_documents_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model()
    forward = model.forward

    def leak(**inputs: Any) -> Any:
        inputs["position_ids"] = torch.arange(inputs["input_ids"].shape[1])[None]
        return forward(**inputs)

    monkeypatch.setattr(model, "forward", leak)
    with pytest.raises(ContentError, match="does not keep packed documents apart"):
        check_documents_apart(model)


def test_missing_weights_are_named(tmp_path: Path, tiny_tokenizer: Any) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_model(tmp_path / "m", build_model(), tiny_tokenizer)
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ContentError, match=r"1 weights are missing: model\.layers\.1\.mlp\.up_proj\.weight"):
        load(folder)


def test_damaged_weights_and_config_are_content_errors(tmp_path: Path, tiny_tokenizer: Any) -> None:
    folder = save_model(tmp_path / "m", build_model(), tiny_tokenizer)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ContentError):
        load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ContentError):
        build_skeleton(find_model(str(folder)), ModelSection(name_or_path=str(folder)))


def test_a_mixture_of_experts_is_refused_by_name(tmp_path: Path) -> None:
    config = {"model_type": "mixtral", "num_local_experts": 8, "architectures": ["MixtralForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ContentError, match="mixtral is a mixture of experts"):
        build_skeleton(find_model(str(tmp_path)), ModelSection(name_or_path=str(tmp_path)))


def test_code_beside_the_model_is_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass C: pass\n")
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises((UsageError, ContentError)):
        build_skeleton(find_model(str(tmp_path)), ModelSection(name_or_path=str(tmp_path)))
    assert not marker.exists()
