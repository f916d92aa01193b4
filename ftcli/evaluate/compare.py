"""Two models on the same documents: how far the one's next-token distribution is from the other's.

    source ─▶ record ─▶ file: two bytes for each trained place and entry ─┐
    (is freed)                                                            ├─▶ Comparison: KL, top-1, losses
    result ─▶ its logits, batch by batch ─────────────────────────────────┘

Only one of both models is in memory at a time, and at most a batch of logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from ftcli.data.chat import Rendered
from ftcli.errors import ContentError
from ftcli.evaluate.loss import DocumentLosses, compute_perplexity, count_targets, group_lengths, list_lengths
from ftcli.evaluate.subject import Backend
from ftcli.store.file import check_free, disk_errors

# A log-probability is kept as its distance to the greatest of its place, in 16 bits and steps of 2^-11. Half precision
# would be coarser where it matters: rounding to steps of s costs a KL of s²/24, here 1e-8 and in float16 up to 2.5e-6.
_STEPS, _IMPOSSIBLE = 2048, 65535  # the last code stands for all that is less than e^-32 times as likely as the best
_CHUNK_VALUES = 1 << 20  # of logits that are worked on at once: 4 MiB, which stay in the cache of a CPU


@dataclass(frozen=True)
class Recording:
    """What one model says at every trained place of some documents.

    ``path`` holds (n_targets, vocab) uint16; ``top`` (n_targets,) int32 is the most probable id of each place, -1 where
    the logits are not finite. ``losses`` and ``top`` are exact, from float32.
    """

    path: Path
    n_targets: int
    vocab: int
    losses: DocumentLosses
    top: NDArray[np.int32]


@dataclass(frozen=True)
class Comparison:
    """How far a result is from its source: means over ``n_tokens`` trained tokens, in nats.

    ``kl`` is KL(source || result) and ``kl_max`` that of the worst token; ``top1`` is the share of tokens for which
    both find the same id the most probable. NaN or infinite where one of both gives logits that are not finite.
    """

    n_tokens: int
    kl: float
    kl_max: float
    top1: float
    losses_source: DocumentLosses
    losses_result: DocumentLosses

    @property
    def loss_source(self) -> float:
        return self.losses_source.compute_mean()

    @property
    def loss_result(self) -> float:
        return self.losses_result.compute_mean()

    @property
    def ppl_source(self) -> float:
        return compute_perplexity(self.loss_source)

    @property
    def ppl_result(self) -> float:
        return compute_perplexity(self.loss_result)

    @property
    def is_finite(self) -> bool:
        """Whether both models gave numbers everywhere."""
        return all(map(isfinite, (self.kl, self.kl_max, self.loss_source, self.loss_result)))


def measure(
    backend: Backend,
    documents: Sequence[Rendered],
    *,
    batch_tokens: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> DocumentLosses:
    """The loss of each of ``documents``, as `record` and `compare` find it besides."""
    walk = _Walk(backend, documents, batch_tokens, on_progress)
    for _ in walk:
        pass
    return walk.gather_losses()


def record(
    backend: Backend,
    documents: Sequence[Rendered],
    folder: Path,
    *,
    batch_tokens: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Recording:
    """What ``backend`` says of ``documents``, in a file of ``folder`` which is the caller's to remove.

    Args:
        backend: the source of a comparison; it may be freed afterwards.
        documents: what to compare on.
        folder: is there, and has room for two bytes times trained tokens times vocabulary.
        batch_tokens: an upper bound of tokens in one forward (a longer document goes alone).
        on_progress: told how many of all documents are done.

    Raises:
        ContentError: nothing in ``documents`` is trained on.
        DiskError: the folder has no room, or may not be written.
    """
    path = folder / "source.u16"
    walk = _Walk(backend, documents, batch_tokens, on_progress)
    n_targets, vocab, tops = sum(walk.counts), 0, []
    if not n_targets:
        raise ContentError("there is no trained token to compare two models on")
    with disk_errors(path), path.open("wb") as stream:
        for logits, _ in walk:
            if not vocab:
                vocab = logits.shape[1]
                check_free(path, 2 * n_targets * vocab)
            greatest, top = _find_top(logits)
            codes = ((greatest - logits) * _STEPS).round_().clamp_(max=_IMPOSSIBLE).nan_to_num_(nan=_IMPOSSIBLE)
            codes.to(torch.int32).cpu().numpy().astype(np.uint16).tofile(stream)
            tops.append(top.to(torch.int32).cpu().numpy())
    return Recording(path, n_targets, vocab, walk.gather_losses(), np.concatenate(tops))


def compare(
    recording: Recording,
    backend: Backend,
    documents: Sequence[Rendered],
    *,
    batch_tokens: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Comparison:
    """How far ``backend`` is from the model of ``recording``, on the ``documents`` that were recorded.

    Vocabularies may be padded to different widths: the distributions are then those over the entries that both have.

    Raises:
        ContentError: a document holds an id that one of both models has not.
    """
    walk = _Walk(backend, documents, batch_tokens, on_progress)
    divergences, is_same, first = [], [], 0
    with recording.path.open("rb") as stream:
        for logits, _ in walk:
            n = len(logits)
            codes = np.fromfile(stream, dtype=np.uint16, count=n * recording.vocab).reshape(n, recording.vocab)
            width = min(recording.vocab, logits.shape[1])
            logits = logits[:, :width]
            source = torch.from_numpy(codes[:, :width].astype(np.int32)).to(logits.device)
            known = torch.from_numpy(recording.top[first : first + n]).to(logits.device)
            _, top = _find_top(logits)
            found = _compute_divergences(source, logits)
            divergences.append(torch.where(known < 0, torch.nan, found).cpu())
            is_same.append(((known == top) & (known >= 0)).cpu())
            first += n
    kl = torch.cat(divergences)
    return Comparison(
        n_tokens=len(kl),
        kl=kl.mean().item(),
        kl_max=kl.max().item(),
        top1=torch.cat(is_same).double().mean().item(),
        losses_source=recording.losses,
        losses_result=walk.gather_losses(),
    )


class _Walk:
    """One pass of a model over documents: yields logits and ids of some trained places at a time, and sums losses."""

    def __init__(
        self,
        backend: Backend,
        documents: Sequence[Rendered],
        batch_tokens: int,
        on_progress: Callable[[int, int], None],
    ) -> None:
        self.backend, self.documents, self.batch_tokens = backend, documents, batch_tokens
        self.on_progress = on_progress
        self.counts = count_targets(documents)
        self.losses: list[torch.Tensor] = []

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for group in group_lengths(list_lengths(self.documents), self.batch_tokens):
            chosen = [self.documents[i] for i in group if self.counts[i]]
            if chosen:
                logits, ids = self.backend.compute_logits(chosen)
                n_rows = max(1, _CHUNK_VALUES // logits.shape[1])
                for part, targets in zip(torch.split(logits, n_rows), torch.split(ids, n_rows), strict=True):
                    self.losses.append(functional.cross_entropy(part, targets, reduction="none").double().cpu())
                    yield part, targets
                del logits, part
            self.on_progress(group[-1] + 1, len(self.documents))

    def gather_losses(self) -> DocumentLosses:
        """The loss of each document, after the pass."""
        parts = torch.split(torch.cat(self.losses), self.counts) if self.losses else [torch.zeros(0)] * len(self.counts)
        return DocumentLosses(tuple(part.sum().item() for part in parts), tuple(self.counts))


def _find_top(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The greatest logit of each row, (T, 1), and its id, (T,): -1 where a logit is NaN or +inf, or all are -inf."""
    greatest, top = logits.max(dim=1, keepdim=True)
    return greatest, torch.where(greatest.isfinite(), top, -1).squeeze(1)


def _compute_divergences(codes: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL(source || result) of each row, in float64; ``codes`` are the source's, of the same shape as ``logits``.

    With a and b as log-probabilities up to a constant: Σ eᵃ(a - b) / Σ eᵃ - log Σ eᵃ + log Σ eᵇ. The sums are in
    float64, as the rounding of a float32 normaliser would be a hundred times the KL of a model to itself.
    """
    is_impossible = codes == _IMPOSSIBLE
    a = (codes.float() / -_STEPS).masked_fill_(is_impossible, -torch.inf)
    b = logits - logits.amax(dim=1, keepdim=True)
    weights = a.exp()
    total, total_result = weights.sum(dim=1, dtype=torch.float64), b.exp().sum(dim=1, dtype=torch.float64)
    terms = a.sub_(b).mul_(weights).masked_fill_(is_impossible, 0.0)
    return terms.sum(dim=1, dtype=torch.float64) / total - total.log() + total_result.log()
