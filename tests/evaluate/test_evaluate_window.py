"""Long documents by stride: each token once, with enough before it, and the number of a loop written down plainly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import build_model
from hypothesis import given, settings
from hypothesis import strategies as st

from ftcli.data.chat import ChatRenderer, Rendered
from ftcli.errors import UsageError
from ftcli.evaluate.compare import measure
from ftcli.evaluate.subject import TorchBackend
from ftcli.evaluate.window import cut_windows


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_every_trained_token_is_counted_once_with_its_context(data: st.DataObject) -> None:
    mask = data.draw(st.lists(st.booleans(), min_size=1, max_size=60))
    length = data.draw(st.integers(2, 40))
    stride = data.draw(st.integers(1, length - 1))
    document = Rendered(list(range(100, 100 + len(mask))), mask, "f", 3)
    windows = cut_windows([document], length, stride)
    if len(mask) <= length:
        assert list(windows) == [document]
        return
    seen: list[int] = []
    for window in windows:
        begin = window.ids[0] - 100
        assert window.ids == document.ids[begin : begin + len(window.ids)]
        assert len(window.ids) == len(window.mask) <= length
        counted = [i for i in range(1, len(window.mask)) if window.mask[i]]
        assert counted
        assert all(i >= min(length - stride, begin + i) for i in counted)
        seen += [begin + i for i in counted]
    assert seen == [i for i in range(1, len(mask)) if mask[i]]


def test_the_loss_is_that_of_the_loop_in_the_guide(tiny_tokenizer: Any) -> None:
    """https://huggingface.co/docs/transformers/perplexity, with sums in place of its mean of means."""
    model, length, stride = build_model().eval(), 32, 12
    ids = torch.randint(384, (1, 101), generator=torch.Generator().manual_seed(3))
    total, n_tokens, previous = 0.0, 0, 0
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + length, ids.shape[1])
        window = ids[:, begin:end]
        labels = window.clone()
        labels[:, : -(end - previous)] = -100
        n_valid = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            total += model(window, labels=labels).loss.item() * n_valid
        n_tokens, previous = n_tokens + n_valid, end
        if end == ids.shape[1]:
            break
    document = Rendered(ids[0].tolist(), [True] * ids.shape[1], "f", 1)
    backend = TorchBackend(model, ChatRenderer(tiny_tokenizer))
    losses = measure(backend, cut_windows([document], length, stride), batch_tokens=2 * length)
    assert sum(losses.n_targets) == n_tokens == 100
    assert losses.compute_mean() == pytest.approx(total / n_tokens, rel=1e-5)


def test_a_stride_that_would_leave_tokens_without_context_is_refused() -> None:
    for stride in (0, 8, 9):
        with pytest.raises(UsageError, match="stride"):
            cut_windows([Rendered([1], [True], "f", 1)], 8, stride)
