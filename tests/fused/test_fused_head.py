"""The loss in chunks against the loss over all logits: values, gradients, and what is kept."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from fused_models import add_lora, build_flat, build_random, measure_distance, take_loss, take_step
from torch import nn
from torch.nn import functional

from ftcli.fused import head as fused_head
from ftcli.fused.head import compute_losses
from ftcli.fused.layer import fuse


def build_head(vocabulary: int = 300, *, bias: bool = False, scale: float = 0.3) -> nn.Linear:
    torch.manual_seed(0)
    head = nn.Linear(32, vocabulary, bias=bias).requires_grad_(False)
    head.weight.normal_(0, scale)
    return head


def draw_rows(n: int, vocabulary: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(n)
    return torch.randn(n, 32), torch.randint(vocabulary, (n,))


def compute_plain(hidden: torch.Tensor, head: nn.Linear, labels: torch.Tensor, softcap: float | None) -> torch.Tensor:
    logits = head(hidden)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if softcap:
        logits = torch.tanh(logits / softcap) * softcap
    return functional.cross_entropy(logits, labels, reduction="none")


def differentiate(compute: Any, hidden: torch.Tensor, weights: torch.Tensor, *more: Any) -> list[torch.Tensor]:
    """The losses, and the gradient of ``hidden`` when each loss is weighed by ``weights``."""
    hidden = hidden.clone().requires_grad_()
    losses = compute(hidden, *more)
    (losses * weights).sum().backward()
    return [losses.detach(), hidden.grad]


def check_head(n: int, head: nn.Linear, softcap: float | None = None) -> None:
    hidden, labels = draw_rows(n, len(head.weight))
    weights = torch.randn(n)
    expected = differentiate(compute_plain, hidden, weights, head, labels, softcap)
    found = differentiate(compute_losses, hidden, weights, head, labels, softcap)
    assert found[0].dtype == torch.float32
    for right, value in zip(expected, found, strict=True):
        assert value.shape == right.shape
        assert measure_distance(right, value) < 1e-6


@pytest.mark.parametrize("n", [1, 2, 511, 512, 513, 1025])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_losses_and_gradients_are_those_of_all_logits(n: int, bias: bool, softcap: float | None) -> None:
    """Each row's loss is weighed by another number, so rows cannot be mixed up."""
    check_head(n, build_head(bias=bias), softcap)


@pytest.mark.parametrize("block_bytes", [1, 4 * 300, 7 * 4 * 300, 600 * 4 * 300])
@pytest.mark.parametrize("n_rows", [1, 5, 512])
def test_sizes_of_chunks_and_blocks_change_nothing(
    monkeypatch: pytest.MonkeyPatch, block_bytes: int, n_rows: int
) -> None:
    monkeypatch.setattr(fused_head, "HEAD_BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(fused_head, "HEAD_ROWS", n_rows)
    check_head(23, build_head(bias=True), 3.0)


def test_no_rows_are_no_loss() -> None:
    losses, gradient = differentiate(
        compute_losses, torch.randn(0, 32), torch.ones(0), build_head(), torch.ones(0).long()
    )
    assert losses.shape == (0,)
    assert gradient.shape == (0, 32)


def test_large_logits_stay_finite() -> None:
    hidden, labels = draw_rows(9)
    losses, gradient = differentiate(compute_losses, 1e4 * hidden, torch.ones(9), build_head(), labels)
    assert losses.isfinite().all()
    assert gradient.isfinite().all()
    assert losses.max() > 1e4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [171, 255, 513])
def test_a_head_in_16_bits_is_as_near_as_the_plain_one(dtype: torch.dtype, n: int) -> None:
    head = build_head(scale=1.0).to(dtype)
    hidden, labels = draw_rows(n)
    hidden, weights = hidden.to(dtype), torch.full((n,), 1 / n)
    exact = differentiate(compute_plain, hidden.double(), weights, copy.deepcopy(head).double(), labels, None)
    plain = differentiate(compute_plain, hidden, weights, head, labels, None)
    found = differentiate(compute_losses, hidden, weights, head, labels, None)
    assert found[1].dtype == dtype
    for right, rounded, value in zip(exact, plain, found, strict=True):
        assert measure_distance(right, value) < 1.2 * measure_distance(right, rounded)


@pytest.mark.parametrize("n", [215, 227])
def test_the_number_of_rows_is_divided_by_in_float32(n: int) -> None:
    """In bfloat16 1 / 215 and 1 / 227 are off by a quarter per cent, and so would all gradients be alike."""
    head = build_head().bfloat16()
    hidden, labels = draw_rows(n)
    one, share = (
        differentiate(compute_losses, hidden.bfloat16(), torch.full((n,), weight), head, labels)[1].double()
        for weight in (1.0, 1 / n)
    )
    assert (one * share).sum().item() / one.square().sum().item() * n == pytest.approx(1, abs=5e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_head_is_in_16_bits(dtype: torch.dtype) -> None:
    """The last norm's output is in float32 where the embedding is trained."""
    head = build_head().to(dtype)
    hidden, labels = draw_rows(40)
    with torch.autocast("cpu", dtype):
        expected = differentiate(compute_plain, hidden, torch.ones(40), head, labels, None)
        found = differentiate(compute_losses, hidden, torch.ones(40), head, labels, None)
        with torch.no_grad():
            assert torch.equal(compute_losses(hidden, build_head(), labels), found[0])
    assert found[1].dtype == torch.float32
    for right, value in zip(expected, found, strict=True):
        assert measure_distance(right, value) < 5e-3


def test_no_logits_are_kept() -> None:
    """What outlives the forward pass is one gradient of the size of the input, whatever the vocabulary."""
    head = build_head(20_000)
    hidden, labels = draw_rows(600)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        compute_losses(hidden.requires_grad_(), head, labels)
    assert [x.shape for x in kept] == [hidden.shape]


def test_a_step_keeps_no_logits_and_a_trained_head_does() -> None:
    for settings, is_kept in (({}, False), ({"modules_to_save": ["lm_head"]}, True)):
        model = add_lora(build_random("llama", tied=False, vocab_size=1111), **settings)
        assert fuse(model)
        sizes: list[int] = []

        def note(x: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(x.shape[-1] if x.dim() and not isinstance(x, nn.Parameter) else 0)
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            take_step(model, build_flat())
        assert (1111 in sizes) is is_kept


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_evaluation_is_the_loss_of_training(kind: str) -> None:
    for settings in ({}, {"modules_to_save": ["embed_tokens"]}, None):
        model, batch = build_random(kind, tied=False), build_flat()
        model = model.train() if settings is None else add_lora(model, **settings)
        assert fuse(model)
        trained = take_step(model, batch).loss
        with torch.no_grad():
            assert take_loss(model, batch) == pytest.approx(trained, rel=1e-6)
        with torch.inference_mode():
            assert take_loss(model, batch) == pytest.approx(trained, rel=1e-6)
