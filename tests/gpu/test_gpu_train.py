"""The same promises on a CUDA device: every way to train, exact resumption, gradients, the end of memory."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from ftcli.data.batch import build_batch
from ftcli.data.chat import ChatRenderer
from ftcli.data.example import read_examples
from ftcli.data.tokenizer import load_tokenizer
from ftcli.errors import Interrupted, MemoryExhausted
from ftcli.evaluate.loss import compute_loss_sum
from ftcli.events import StepDone
from ftcli.model.base import load_model
from ftcli.model.build import add_lora
from ftcli.recipe import ModelSection, PeftSection, QuantizationSection
from ftcli.store.run import RunFolder, read_lines, read_manifest
from ftcli.store.target import find_model
from ftcli.train.run import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
WAYS = {
    "bf16 LoRA": ("model.dtype=bfloat16",),
    "fp16 LoRA": ("model.dtype=float16",),
    "NF4 LoRA": ("model.dtype=bfloat16", "quantization={load_in_4bit: true}"),
    "NF4 LoRA fp16": ("model.dtype=float16", "quantization={load_in_4bit: true}"),
    "full bf16 autocast": ("model.dtype=bfloat16", "peft=null"),
    "full fp16 autocast": ("model.dtype=float16", "peft=null"),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_learns_on_the_device(write_recipe: Any, way: str) -> None:
    overrides = (*WAYS[way], "train.max_steps=30", "train.gradient_checkpointing=true", "train.learning_rate=3e-3")
    run = train(write_recipe(), overrides=overrides)
    metrics = read_lines(run.metrics)
    assert metrics[-1]["loss"] < 0.7 * metrics[0]["loss"]
    manifest = read_manifest(run)
    assert manifest["state"] == "finished"
    assert manifest["measured"]["peak_device_bytes"] > 0


@pytest.mark.parametrize("way", ["bf16 LoRA", "NF4 LoRA", "fp16 LoRA"])
def test_resume_is_byte_equal(write_recipe: Any, tmp_path: Path, way: str) -> None:
    overrides = (*WAYS[way], "peft.lora_dropout=0.1", "data.packing=true")

    def stop(event: Any) -> None:
        if isinstance(event, StepDone) and event.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    path = write_recipe()
    whole = train(path, overrides=(*overrides, f"output_dir={tmp_path / 'whole'}"))
    with pytest.raises(Interrupted):
        train(path, overrides=overrides, on_event=stop)
    run = RunFolder(tmp_path / "run")
    train(path, overrides=overrides, resume=True)
    assert run.metrics.read_bytes() == whole.metrics.read_bytes()


def build(folder: Path, dtype: torch.dtype, quantization: QuantizationSection | None = None) -> Any:
    model = load_model(
        find_model(str(folder)),
        ModelSection(name_or_path=str(folder)),
        dtype=dtype,
        device=torch.device("cuda", 0),
        quantization=quantization,
    )
    torch.manual_seed(0)
    wrapped = add_lora(model, PeftSection(r=4, init_lora_weights=False))
    return wrapped.train()


def gradients(model: Any, documents: Any) -> torch.Tensor:
    batch = build_batch(documents).to(torch.device("cuda", 0))
    (compute_loss_sum(model, batch) / batch.n_targets).backward()
    return torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])


@pytest.fixture
def documents(tiny_model: Path, write_rows: Any) -> Any:
    renderer = ChatRenderer(load_tokenizer(find_model(str(tiny_model))))
    return [renderer.render(example)[0] for example in read_examples(write_rows())]


def test_bf16_gradients_point_where_float32_gradients_do(tiny_model: Path, documents: Any) -> None:
    reference = gradients(build(tiny_model, torch.float32), documents)
    half = gradients(build(tiny_model, torch.bfloat16), documents)
    assert torch.nn.functional.cosine_similarity(reference, half, dim=0) > 0.99


def test_nf4_gradients_equal_a_dense_model_of_the_same_weights(tiny_model: Path, documents: Any) -> None:
    import bitsandbytes as bnb

    quantized = build(tiny_model, torch.float32, QuantizationSection())
    dense = build(tiny_model, torch.float32)
    weights = dict(dense.named_modules())
    n_replaced = 0
    for name, module in quantized.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            weights[name].weight.data.copy_(weight)
            n_replaced += 1
    assert n_replaced == 14
    with torch.no_grad():
        for (name, a), (other, b) in zip(quantized.named_parameters(), dense.named_parameters(), strict=True):
            assert name == other
            if "lora_" in name:
                b.copy_(a)
    first, second = gradients(quantized, documents), gradients(dense, documents)
    assert (first - second).norm() / second.norm() < 1e-5


def test_packed_loss_equals_rows_apart(tiny_model: Path, documents: Any) -> None:
    model = build(tiny_model, torch.float32)
    device = torch.device("cuda", 0)
    with torch.no_grad():
        packed = compute_loss_sum(model, build_batch(documents).to(device)).item()
        apart = sum(compute_loss_sum(model, build_batch([d]).to(device)).item() for d in documents)
    assert packed == pytest.approx(apart, rel=1e-5)


def test_the_split_of_a_step_changes_nothing(write_recipe: Any, tmp_path: Path) -> None:
    path = write_recipe()
    first = train(path)
    changes = ("train.per_device_train_batch_size=1", "train.gradient_accumulation_steps=4")
    second = train(path, overrides=(*changes, f"output_dir={tmp_path / 'second'}"))
    for a, b in zip(read_lines(first.metrics), read_lines(second.metrics), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("way", ["bf16 LoRA", "NF4 LoRA"])
def test_a_run_answers_and_counts_memory(write_recipe: Any, tmp_path: Path, way: str) -> None:
    from ftcli.data.message import Message
    from ftcli.evaluate.generate import Sampling
    from ftcli.evaluate.subject import open_subject

    held_out = {"datasets": [{"path": "held_out.jsonl"}], "score": "exact_match", "max_new_tokens": 8}
    run = train(write_recipe(eval=held_out), overrides=WAYS[way])
    model = open_subject(str(run.path))
    greedy = model.answer([Message("user", "question 1")], Sampling(max_new_tokens=8))
    assert greedy == model.answer([Message("user", "question 1")], Sampling(max_new_tokens=8))
    sampled = Sampling(temperature=1.0, top_p=0.9, top_k=20, seed=3, max_new_tokens=8)
    assert model.answer([Message("user", "x")], sampled) == model.answer([Message("user", "x")], sampled)
    assert all(json.loads(line)["memory_bytes"] > 0 for line in run.timing.read_text().splitlines())


def test_the_end_of_device_memory_has_a_name(write_recipe: Any, tmp_path: Path, tiny_tokenizer: Any) -> None:
    from conftest import build_model, save_model

    folder = save_model(tmp_path / "wide", build_model(intermediate_size=16384, hidden_size=1024), tiny_tokenizer)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 120e6) / total)
    try:
        with pytest.raises(MemoryExhausted) as caught:
            train(write_recipe(model={"name_or_path": str(folder), "dtype": "float32"}))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert caught.value.exit_code == 7
    assert "load_in_4bit" in caught.value.hint
