"""Two models on the same documents, against transformers' forward and torch's own divergence."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import build_model
from torch.nn import functional

from ftcli.data.chat import ChatRenderer, Rendered
from ftcli.errors import ContentError, DiskError
from ftcli.evaluate import compare as compare_module
from ftcli.evaluate.compare import Comparison, compare, measure, record
from ftcli.evaluate.subject import TorchBackend


def build_documents(n: int = 9, *, vocab: int = 384) -> list[Rendered]:
    generator = torch.Generator().manual_seed(1)
    lengths = [3 + 7 * i % 23 for i in range(n)]
    ids = [torch.randint(0, vocab, (length,), generator=generator).tolist() for length in lengths]
    return [Rendered(row, [i % 3 != 1 for i in range(len(row))], "f", line) for line, row in enumerate(ids)]


def build_backend(tokenizer: Any, kind: str = "llama", *, noise: float = 0.0, scale: float = 1.0) -> TorchBackend:
    model = build_model(kind, tied=False).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(scale)
        for parameter in model.parameters():
            parameter += noise * torch.randn(parameter.shape, generator=generator)
    return TorchBackend(model, ChatRenderer(tokenizer))


def compare_backends(
    source: Any, result: Any, documents: list[Rendered], folder: Path, batch_tokens: int = 32
) -> Comparison:
    recording = record(source, documents, folder, batch_tokens=batch_tokens)
    return compare(recording, result, documents, batch_tokens=batch_tokens)


def list_log_probs(model: Any, documents: list[Rendered]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities at every trained place by one plain forward a document, in float64, and the ids there."""
    rows, ids = [], []
    for document in documents:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([document.ids]), use_cache=False).logits[0].double()
        places = [i for i, flag in enumerate(document.mask) if flag and i]
        rows.append(logits.log_softmax(-1)[[i - 1 for i in places]])
        ids += [document.ids[i] for i in places]
    return torch.cat(rows), torch.tensor(ids)


@pytest.mark.parametrize(("kind", "scale"), [("llama", 1.0), ("qwen3", 30.0), ("gemma2", 1.0)])
@pytest.mark.parametrize("chunk", [1 << 23, 5 * 384])
def test_the_numbers_are_those_of_torch(
    tiny_tokenizer: Any, tmp_path: Path, kind: str, scale: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare_module, "_CHUNK_VALUES", chunk)
    documents = build_documents()
    source = build_backend(tiny_tokenizer, kind, scale=scale)
    result = build_backend(tiny_tokenizer, kind, scale=scale, noise=0.02)
    found = compare_backends(source, result, documents, tmp_path)
    (p, ids), (q, _) = list_log_probs(source.model, documents), list_log_probs(result.model, documents)
    each = functional.kl_div(q, p, log_target=True, reduction="none").sum(1)
    assert found.n_tokens == len(ids)
    assert found.kl == pytest.approx(each.mean().item(), rel=2e-3, abs=1e-7)
    assert found.kl_max == pytest.approx(each.max().item(), rel=5e-3, abs=1e-7)
    assert found.top1 == pytest.approx((p.argmax(1) == q.argmax(1)).double().mean().item())
    assert found.loss_source == pytest.approx(functional.nll_loss(p, ids).item(), rel=1e-5)
    assert found.loss_result == pytest.approx(functional.nll_loss(q, ids).item(), rel=1e-5)
    assert found.ppl_result == pytest.approx(math.exp(found.loss_result))
    assert found.is_finite
    assert measure(result, documents, batch_tokens=32) == found.losses_result


@pytest.mark.parametrize("scale", [0.0, 1.0, 40.0])
def test_a_model_is_not_far_from_itself(tiny_tokenizer: Any, tmp_path: Path, scale: float) -> None:
    backend = build_backend(tiny_tokenizer, scale=scale)
    found = compare_backends(backend, backend, build_documents(), tmp_path)
    assert -1e-9 < found.kl < 2e-8
    assert found.kl_max < 1e-7
    assert found.top1 == 1
    assert found.losses_source == found.losses_result


@dataclass(frozen=True)
class Changed:
    """A backend whose logits ``change`` has had a hand in."""

    backend: TorchBackend
    change: Any
    context: None = None

    def compute_logits(self, documents: Any) -> Any:
        logits, ids = self.backend.compute_logits(documents)
        return self.change(logits), ids

    generate: Any = None


def test_padding_of_the_vocabulary_does_not_count(tiny_tokenizer: Any, tmp_path: Path) -> None:
    backend = build_backend(tiny_tokenizer)
    padded = Changed(backend, lambda logits: functional.pad(logits, (0, 16), value=-3.0))
    for pair in ((backend, padded), (padded, backend)):
        found = compare_backends(*pair, build_documents(), tmp_path)
        assert found.kl < 2e-8
        assert found.top1 == 1
        assert found.n_tokens == sum(sum(document.mask[1:]) for document in build_documents())


def test_tokens_that_cannot_come_are_no_distance(tiny_tokenizer: Any, tmp_path: Path) -> None:
    backend = build_backend(tiny_tokenizer)
    masked = Changed(backend, lambda logits: logits.index_fill(1, torch.arange(300, 384), -torch.inf))
    documents = build_documents(vocab=300)
    assert compare_backends(masked, masked, documents, tmp_path).kl < 2e-8
    (p, _), keeps = list_log_probs(backend.model, documents), torch.arange(384) < 300
    expected = -p[:, keeps].logsumexp(1).mean().item()  # KL to what they are renormalised from
    assert compare_backends(masked, backend, documents, tmp_path).kl == pytest.approx(expected, rel=1e-3)
    assert compare_backends(backend, masked, documents, tmp_path).kl == math.inf


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_no_numbers_are_seen(tiny_tokenizer: Any, tmp_path: Path, value: float) -> None:
    backend = build_backend(tiny_tokenizer)

    def spoil(logits: torch.Tensor) -> torch.Tensor:
        logits = logits.clone()
        logits[0] = value
        return logits

    broken, documents = Changed(backend, spoil), build_documents()
    for pair in ((backend, broken), (broken, backend), (broken, broken)):
        found = compare_backends(*pair, documents, tmp_path)
        assert not found.is_finite
        assert math.isnan(found.kl)
        assert found.top1 < 1


def test_what_cannot_be_compared_is_refused(
    tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = build_backend(tiny_tokenizer)
    with pytest.raises(ContentError, match="no trained token"):
        record(backend, [Rendered([1, 2], [True, False], "f", 1)], tmp_path, batch_tokens=8)
    with pytest.raises(ContentError, match="no token 384: its embedding has 384 rows"):
        record(backend, [Rendered([1, 384], [True, True], "f", 7)], tmp_path, batch_tokens=8)
    with pytest.raises(DiskError):
        record(backend, build_documents(), tmp_path / "absent", batch_tokens=8)
    monkeypatch.setattr("ftcli.store.file.shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(DiskError, match=r"\d+ bytes are needed, 1,000 bytes are free"):
        record(backend, build_documents(), tmp_path, batch_tokens=8)


def test_documents_without_a_target_count_nothing(tiny_tokenizer: Any, tmp_path: Path) -> None:
    backend, documents = build_backend(tiny_tokenizer), build_documents(4)
    silent = Rendered([5, 6, 7], [True, False, False], "f", 9)
    mixed = [silent, *documents[:2], silent, silent, *documents[2:], silent]
    told: list[tuple[int, int]] = []
    losses = measure(backend, mixed, batch_tokens=3, on_progress=lambda *done: told.append(done))
    assert [n for n in losses.n_targets if n] == [sum(document.mask[1:]) for document in documents]
    assert losses.compute_mean() == pytest.approx(measure(backend, documents, batch_tokens=3).compute_mean())
    assert told[-1] == (8, 8)
