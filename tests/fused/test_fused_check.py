"""When a model takes the fast path and when not, and that generation and evaluation are as before."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import build_model
from fused_models import KINDS, add_lora, build_flat, build_random, join, take_step

from ftcli.errors import NumericError
from ftcli.fused.check import _TOLERANCE, _compare, check_documents_apart, fuse_checked
from ftcli.fused.family import FAMILIES
from ftcli.fused.layer import fuse, is_fused, unfuse


def read_logits(model: Any) -> torch.Tensor:
    ids = build_flat().input_ids
    with torch.no_grad():
        return model(input_ids=ids).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_attention", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_known_family_is_fused_and_nothing_else_changes(kind: str, with_attention: bool) -> None:
    model = add_lora(build_random(kind), lora_dropout=0.5)
    state, names = torch.get_rng_state(), list(model.state_dict())
    assert fuse_checked(model, with_attention=with_attention) == ""
    assert is_fused(model)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert list(model.state_dict()) == names
    assert all(p.grad is None for p in model.parameters())
    check_documents_apart(model)


def test_an_unknown_family_takes_the_plain_path() -> None:
    model = build_model("gpt2")
    assert fuse_checked(model) == "the fast path does not know the family gpt2"
    assert not is_fused(model)
    check_documents_apart(model)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {"norm_offset": 1.0}),
        ("gemma", {"norm_offset": 0.0}),
        ("qwen3", {"has_head_norms": False}),
        ("smollm3", {"rotates": ""}),
    ],
)
def test_a_layer_that_is_not_what_it_should_be_takes_the_plain_path(
    monkeypatch: pytest.MonkeyPatch, kind: str, changes: dict[str, Any]
) -> None:
    """As it would be if a config asked for what the fast path knows nothing of."""
    model = add_lora(build_random(kind, scale=0.3))
    before = read_logits(model)
    family = model.config.model_type
    monkeypatch.setitem(FAMILIES, family, replace(FAMILIES[family], **changes))
    reason = fuse_checked(model)
    assert re.fullmatch(r"the fast path would change this model's logits by \d\.\d\d of their spread", reason)
    assert not is_fused(model)
    assert torch.equal(read_logits(model), before)


def test_rounding_of_many_logits_is_no_reason() -> None:
    """A model of 30 layers in bfloat16 or NF4 is off by 0.05 of the spread, and some logit of so many by 0.26."""
    torch.manual_seed(0)
    expected = torch.randn(12, 49_152)
    noise = 0.053 * torch.randn_like(expected)
    assert noise.abs().max() > 0.25 * expected.std()
    assert _compare(expected + noise, expected) < _TOLERANCE / 3
    assert _compare(torch.randn(12, 49_152), expected) > 4 * _TOLERANCE


def test_logits_that_are_not_finite_are_named_as_such() -> None:
    model = build_random("llama")
    model.model.norm.weight.data.fill_(torch.nan)
    assert fuse_checked(model) == ""
    with pytest.raises(NumericError, match="not finite"):
        check_documents_apart(model)


@pytest.mark.parametrize("kind", KINDS)
def test_unfusing_restores_every_module(kind: str) -> None:
    model, batch = add_lora(build_random(kind)), build_flat()
    before, logits = take_step(model, batch), read_logits(model)
    assert fuse(model)
    assert any("forward" in vars(module) for module in model.modules())
    unfuse(model)
    assert not is_fused(model)
    assert not any("forward" in vars(module) or "is_fused" in vars(module) for module in model.modules())
    assert torch.equal(read_logits(model), logits)
    assert torch.equal(join(take_step(model, batch)), join(before))


def test_fusing_twice_is_fusing_once() -> None:
    model, batch = add_lora(build_random("llama")), build_flat()
    assert fuse(model)
    once = take_step(model, batch)
    assert fuse(model)
    assert torch.equal(join(take_step(model, batch)), join(once))
    unfuse(model)
    assert not any("forward" in vars(module) for module in model.modules())


def generate(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
    found = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=12, do_sample=False, use_cache=True, eos_token_id=None
    )
    return found[:, ids.shape[1] :].tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", KINDS)
def test_generation_gives_the_same_tokens(kind: str) -> None:
    """With a cache, for a batch that is padded on the left; the head is asked for the last logits alone."""
    model = add_lora(build_random(kind, scale=0.2)).eval()
    ids = build_flat((9, 9, 9)).input_ids.view(3, 9)
    mask = torch.tensor([[0] * 4 + [1] * 5, [1] * 9, [0] * 8 + [1]])
    before = generate(model, ids, mask)
    assert fuse(model)
    lengths: list[int] = []
    head = model.get_output_embeddings()
    head.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    assert generate(model, ids, mask) == before
    assert len({tuple(row) for row in before}) > 1
    assert set(lengths) == {1}


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_before(kind: str) -> None:
    """Of a padded batch, of one flat batch of documents, and of the last places only."""
    model = add_lora(build_random(kind)).eval()
    batch = build_flat()
    ids = batch.input_ids[:, :24].view(2, 12)
    calls: list[dict[str, Any]] = [
        {"input_ids": ids, "attention_mask": torch.tensor([[1] * 12, [1] * 7 + [0] * 5])},
        {"input_ids": ids, "logits_to_keep": 2},
        {"input_ids": ids, "labels": ids},
        {"input_ids": ids[:, :1]},
        {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False},
        {"inputs_embeds": model.get_input_embeddings()(ids).detach()},
    ]
    with torch.no_grad():
        before = [model(**call) for call in calls]
        assert fuse(model)
        after = [model(**call) for call in calls]
    for call, right, found in zip(calls, before, after, strict=True):
        seen = call["attention_mask"].bool() if "attention_mask" in call else ...
        assert found.logits.shape == right.logits.shape
        torch.testing.assert_close(found.logits[seen], right.logits[seen], rtol=1e-5, atol=1e-5)
        assert (found.loss is None) == (right.loss is None)
        if found.loss is not None:
            assert found.loss.item() == pytest.approx(right.loss.item(), rel=1e-5)


def test_a_row_of_zeros_is_normalised() -> None:
    from ftcli.fused.norm import normalize

    x = torch.zeros(2, 8, requires_grad=True)
    y = normalize(x, torch.ones(8), 1e-6, 0.0)
    y.sum().backward()
    assert torch.equal(y, torch.zeros(2, 8))
    torch.testing.assert_close(x.grad, torch.full((2, 8), 1e3))
