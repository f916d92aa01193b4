"""Attention within documents: against a plain one over all pairs of tokens, and what it never makes."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from fused_models import KINDS, add_lora, build_flat, build_random, measure_distance, take_step
from torch.utils._python_dispatch import TorchDispatchMode

from ftcli.fused import attention as fused_attention
from ftcli.fused.attention import attend, build_window
from ftcli.fused.checkpoint import keep_attention
from ftcli.fused.layer import fuse, unwrap
from ftcli.model.build import enable_checkpointing

LENGTHS = [9, 1, 30, 2, 17]


def attend_plainly(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None, softcap: float | None
) -> torch.Tensor:
    """The same over all tokens at once, of which each sees those of its document that are not after it, and near."""
    documents = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    places = torch.arange(sum(LENGTHS))
    distance = places[:, None] - places
    sees = (documents[:, None] == documents) & (distance >= 0) & (distance < (window or 1000))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    weights = scores.masked_fill(~sees, -torch.inf).softmax(-1)
    return torch.einsum("hij,jhd->ihd", weights, v)


def draw_heads(n_heads: int, n_kv_heads: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(sum(LENGTHS), n, 8).requires_grad_() for n in (n_heads, n_kv_heads, n_kv_heads)]


@pytest.mark.parametrize("window", [None, 1, 2, 17, 29, 30, 64])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_each_token_sees_its_document_so_far(window: int | None, softcap: float | None, n_kv_heads: int) -> None:
    heads = draw_heads(4, n_kv_heads)
    doubles = [x.detach().double().requires_grad_() for x in heads]
    expected, found = (
        attend_plainly(*doubles, 0.3, window, softcap),
        attend(*heads, LENGTHS, scale=0.3, window=window, softcap=softcap),
    )
    assert measure_distance(expected.detach(), found.detach()) < 1e-6
    slopes = torch.randn_like(found)
    (expected * slopes).sum().backward()
    (found * slopes).sum().backward()
    for right, value in zip(doubles, heads, strict=True):
        assert (value.grad - right.grad).norm() < 1e-6 * doubles[2].grad.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("has_unit", [True, False])
def test_attention_in_16_bits(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, softcap: float | None, has_unit: bool
) -> None:
    """Also where it is computed in float32, as on CPUs without matrix instructions, under autocast too."""
    monkeypatch.setattr(fused_attention, "has_matrix_unit", lambda: has_unit)
    heads = [x.detach().to(dtype).requires_grad_() for x in draw_heads(4, 2)]
    doubles = [x.detach().double().requires_grad_() for x in heads]
    with torch.autocast("cpu", dtype):
        found = attend(*heads, LENGTHS, scale=0.3, window=5, softcap=softcap)
    assert found.dtype == dtype
    expected = attend_plainly(*doubles, 0.3, 5, softcap)
    limit = 4 * torch.finfo(dtype).eps
    assert measure_distance(expected.detach(), found.detach()) < limit
    expected.sum().backward()
    found.sum().backward()
    for right, value in zip(doubles, heads, strict=True):
        assert value.grad.dtype == dtype
        assert (value.grad - right.grad).norm() < limit * doubles[2].grad.norm()


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_dropout_keeps_the_mean(softcap: float | None) -> None:
    torch.manual_seed(0)
    q = k = torch.zeros(4000, 1, 8)
    v = torch.ones(4000, 1, 8)
    seen = attend(q, k, v, [40] * 100, scale=1.0, softcap=softcap, dropout=0.5)
    assert seen.mean().item() == pytest.approx(1, abs=0.02)
    assert seen.std() > 0.1


class Watch(TorchDispatchMode):
    """Notes the largest tensor that any operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for x in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(x, torch.Tensor):
                self.most = max(self.most, x.numel())
        return found


@contextmanager
def watch_sizes() -> Iterator[Watch]:
    build_window.cache_clear()
    with Watch() as watch:
        yield watch


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", [pytest.param(False, marks=pytest.mark.slow), True])
def test_nothing_is_as_large_as_all_pairs_of_tokens(kind: str, checkpointing: bool) -> None:
    """Forward and backward; the plain path makes a mask over all of them."""
    lengths = [50, 30, 40] * 6
    batch, model = build_flat(lengths, vocab_size=64), build_random(kind, vocab_size=64, intermediate_size=64)
    model = add_lora(model)
    with watch_sizes() as watch:
        take_step(model, batch)
    assert watch.most >= sum(lengths) ** 2
    assert fuse(model)
    if checkpointing:
        enable_checkpointing(unwrap(model), keep_attention)
    with watch_sizes() as watch:
        take_step(model, batch)
    assert watch.most <= sum(lengths) * 128  # 720 tokens, and no layer is wider


def test_few_masks_are_kept() -> None:
    """They would fill memory where every document has another length."""
    build_window.cache_clear()
    gc.collect()
    before = {id(x) for x in gc.get_objects() if type(x) is torch.Tensor}
    q = torch.randn(60, 1, 8)
    for n in range(20, 60):
        attend(q[:n], q[:n], q[:n], [n], scale=1.0, window=5)
    gc.collect()
    kept = [x for x in gc.get_objects() if type(x) is torch.Tensor and id(x) not in before and x.dtype == torch.bool]
    assert len(kept) <= 4


@pytest.mark.parametrize("kind", KINDS)
def test_documents_do_not_see_each_other(kind: str) -> None:
    """Another token in the first of three: losses of the others, and the gradients of these, keep every bit."""
    model, batch = add_lora(build_random(kind)), build_flat((20, 15, 9))
    assert fuse(model)
    before = differentiate_others(model, batch)
    batch.input_ids[0, 5] = (batch.input_ids[0, 5] + 1) % 384
    after = differentiate_others(model, batch)
    assert before[0] != after[0]
    for x, y in zip(before[1:], after[1:], strict=True):
        assert torch.equal(x, y)


def differentiate_others(model: Any, batch: Any) -> list[Any]:
    """The loss of the first document; the losses of the others, and their gradients."""
    from ftcli.evaluate.loss import _compute_losses

    first, *_ = batch.count_targets()
    model.zero_grad()
    losses = _compute_losses(model, batch)
    losses[first:].sum().backward()
    return [
        losses[:first].sum().item(),
        losses[first:].detach(),
        *(p.grad for p in model.parameters() if p.requires_grad),
    ]


def test_a_token_sees_none_after_it() -> None:
    model, batch = add_lora(build_random("qwen3")), build_flat((30,))
    assert fuse(model)
    hidden = []
    for _ in range(2):
        with torch.no_grad():
            hidden.append(
                unwrap(model)
                .base_model(
                    batch.input_ids,
                    attention_mask=torch.empty(1, 1, 1, 1),
                    position_ids=batch.position_ids,
                    documents=[30],
                )
                .last_hidden_state[0]
            )
        batch.input_ids[0, 20] = (batch.input_ids[0, 20] + 1) % 384
    assert torch.equal(hidden[0][:20], hidden[1][:20])
    assert not torch.equal(hidden[0][20:], hidden[1][20:])
