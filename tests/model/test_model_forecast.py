"""The memory forecast: against autograd's own saved tensors, published figures, and itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from ftcli.data.batch import Batch
from ftcli.errors import UsageError
from ftcli.evaluate.loss import compute_loss_sum
from ftcli.fused.layer import fuse
from ftcli.model.activation import Shape, Training, has_matrix_unit
from ftcli.model.build import add_lora, enable_checkpointing, promote_trained
from ftcli.model.forecast import (
    count_saved_bytes,
    fit,
    forecast_disk,
    forecast_memory,
    parse_memory,
)
from ftcli.recipe import PeftSection

GB = 10**9
LLAMA_8B = Shape(
    n_layers=32, hidden=4096, ffn=14336, n_heads=32, n_kv_heads=8, head_dim=128, vocab=128256, is_tied=False,
    is_gated=True, linear_parameters=6_979_321_856, embedding_parameters=525_336_576, head_parameters=525_336_576,
    other_parameters=266_240, largest_linear=4096 * 14336,
)  # fmt: skip
QLORA = Training(
    method="qlora", dtype="bfloat16", double_quant=True, tokens=4096, longest_document=1024, target_tokens=4096,
    gradient_checkpointing=True, lora_parameters=41_943_040, lora_modules=224, r=16, lora_dropout=0.0, device="cuda",
    n_documents=4,
)  # fmt: skip


def find_size(shape: Shape, training: Training, name: str) -> int:
    return next(part.size_bytes for part in forecast_memory(shape, training).components if part.name == name)


def build_tiny(training: Training) -> tuple[Any, Shape]:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=300, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    is_full = training.method == "full"
    model = AutoModelForCausalLM.from_config(config).to(torch.float32 if is_full else getattr(torch, training.dtype))
    if training.gradient_checkpointing:
        enable_checkpointing(model)
    if not is_full:
        model = add_lora(model, PeftSection(r=8, lora_alpha=8, lora_dropout=training.lora_dropout))
        promote_trained(model)
    if training.is_fused:
        assert fuse(model)
    linear = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160)
    return model.train(), Shape(2, 64, 160, 4, 2, 16, 300, True, True, linear, 300 * 64, 0, 5 * 64, 64 * 160)


def measure_saved(model: Any, training: Training) -> int:
    """Bytes of the distinct storages that autograd keeps, parameters and buffers left out."""
    owned = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in owned:
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    n, length = training.tokens, training.longest_document
    ids = torch.randint(300, (1, n))
    positions = torch.arange(length).repeat(training.n_documents)[None]
    labels = torch.where(positions == 0, -100, ids)
    n_targets = int((labels != -100).sum())
    assert n_targets == training.target_tokens
    borders = torch.arange(0, n + 1, length, dtype=torch.int32)
    batch = Batch(ids, labels, positions, borders, n_targets, ())
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=training.is_autocast),
    ):
        loss = compute_loss_sum(model, batch)
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del loss
    return total


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("method", "dtype", "dropout"),
    [
        ("lora", "bfloat16", 0.0),
        ("lora", "float32", 0.0),
        ("lora", "bfloat16", 0.1),
        ("full", "float32", 0.0),
        ("full", "bfloat16", 0.0),
    ],
)
def test_activations_are_what_autograd_saves(
    method: Any, dtype: Any, dropout: float, checkpointing: bool, fused: bool
) -> None:
    plain = replace(
        QLORA, method=method, dtype=dtype, tokens=256, gradient_checkpointing=checkpointing, lora_modules=14, r=8,
        device="cuda" if fused and checkpointing else "cpu",  # what a CPU keeps besides, autograd's hooks do not see
        lora_dropout=dropout, is_fused=fused, attends_wide=fused and not has_matrix_unit(),
    )  # fmt: skip
    model, shape = build_tiny(plain)
    for n in (1, 4):
        training = replace(plain, longest_document=256 // n, n_documents=n, target_tokens=256 - n)
        assert count_saved_bytes(shape, training) == pytest.approx(measure_saved(model, training), rel=0.02)


def test_weights_of_an_8b_in_nf4() -> None:
    shape = LLAMA_8B
    assert shape.parameters == 8_030_261_248
    rest = 2 * (shape.parameters - shape.linear_parameters)
    assert rest == pytest.approx(2.10 * GB, rel=0.002)
    nf4 = find_size(shape, QLORA, "weights") - rest + find_size(shape, QLORA, "quantization constants")
    assert nf4 == pytest.approx(3.60 * GB, rel=0.002)
    single = replace(QLORA, double_quant=False)
    constants = find_size(shape, single, "quantization constants")
    assert constants == pytest.approx(shape.linear_parameters * 0.5 / 8, rel=1e-6)
    lora = replace(QLORA, method="lora")
    assert find_size(shape, lora, "weights") == 2 * shape.parameters
    assert find_size(shape, replace(QLORA, method="full"), "optimizer") == 8 * shape.parameters


def test_more_of_anything_never_takes_less() -> None:
    def total(**changes: Any) -> int:
        return forecast_memory(LLAMA_8B, replace(QLORA, **changes)).total_bytes

    base = total()
    assert total(tokens=8192, target_tokens=8192) > base
    assert total(target_tokens=2048) < base
    assert total(gradient_checkpointing=False) > base
    assert total(double_quant=False) > base
    assert base < total(method="lora") < total(method="full")
    assert total(gradient_checkpointing=False, lora_dropout=0.1) > total(gradient_checkpointing=False)
    assert total(gradient_checkpointing=False, n_documents=1) < total(gradient_checkpointing=False)
    assert total(method="full", strategy="ddp") > total(method="full")
    shards = [total(method="full", strategy="fsdp2", world_size=n) for n in (1, 2, 4, 8)]
    assert shards == sorted(shards, reverse=True)
    assert len(set(shards)) == 4


def test_components_add_up_and_say_where_they_come_from() -> None:
    for method in ("qlora", "lora", "full"):
        forecast = forecast_memory(LLAMA_8B, replace(QLORA, method=method))
        assert sum(part.size_bytes for part in forecast.components) == forecast.total_bytes
        assert all(part.formula and part.size_bytes >= 0 for part in forecast.components)
        assert not forecast.is_calibrated
    assert forecast_memory(LLAMA_8B, replace(QLORA, device="cpu", dtype="float32")).is_calibrated


@pytest.mark.parametrize("card", ["8GB", "24GB", "48GB", "80GB", "1000GB"])
@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
def test_what_fit_returns_fits(card: str, method: Any) -> None:
    training = replace(QLORA, method=method, gradient_checkpointing=False, double_quant=False)
    budget = parse_memory(card)
    changes, fits = fit(LLAMA_8B, training, budget)
    last = changes[-1].training if changes else training
    before, after = forecast_memory(LLAMA_8B, training).total_bytes, forecast_memory(LLAMA_8B, last).total_bytes
    assert fits == (after <= budget)
    assert fits or card == "8GB"
    assert before - after == sum(change.saved_bytes for change in changes)
    assert all(change.saved_bytes > 0 for change in changes)
    kept = [change.keeps_result for change in changes]
    assert kept == sorted(kept, reverse=True)
    if card == "1000GB":
        assert not changes


def test_fit_ends_when_nothing_is_left() -> None:
    changes, fits = fit(LLAMA_8B, replace(QLORA, method="full"), 1)
    assert not fits
    assert [change.key for change in changes][-1] == "data.max_length"
    assert changes[-1].training.longest_document >= 128


def test_disk() -> None:
    sizes = {part.name: part.size_bytes for part in forecast_disk(LLAMA_8B, QLORA, save_total_limit=3)}
    assert sizes["checkpoints"] == 3 * 12 * 41_943_040
    assert sizes["staging copy"] == 12 * 41_943_040
    assert sizes["merged model"] == 2 * 8_030_261_248


def test_memory_of_a_card() -> None:
    assert parse_memory("24GB") == parse_memory(" 24 gib ") == parse_memory("24g") == parse_memory("24576MB")
    assert 23 << 30 < parse_memory("24GB") < 24 << 30


@pytest.mark.parametrize(
    "text", ["", "GB", "-4GB", "0GB", "1e3GB", "24XB", "24 GB 3", "nanGB", "0.1GB", "9" * 40, "٣GB"]
)
def test_nonsense_is_no_memory(text: str) -> None:
    with pytest.raises(UsageError):
        parse_memory(text)
