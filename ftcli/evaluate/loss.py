"""The loss: the sum of cross entropies over the trained tokens of a batch.

A step divides the sum over all its batches by the number of trained tokens in all of them, so the loss and
its gradient are the same however the step is split.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from ftcli.data.batch import IGNORE_LABEL, Batch, build_batch
from ftcli.data.chat import Rendered
from ftcli.data.documents import Documents
from ftcli.errors import ContentError
from ftcli.fused.layer import is_fused, unwrap


def compute_loss_sum(model: Any, batch: Batch) -> torch.Tensor:
    """Σ −log p(label) over the labels of ``batch`` that are learned: a scalar in float32, with its graph.

    The head sees only positions whose next token is learned; logits of the others are never made. No attention
    mask and no cache: then, and only then, attention is block-diagonal over the documents.
    """
    return _compute_losses(model, batch).sum()


def compute_logits(
    model: Any, documents: Sequence[Rendered], *, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits in float32 at the places of ``documents`` whose next token is learned, and the ids of those.

    Raises:
        ContentError: an id has no row in the model's embedding, which on a GPU would end the process's use of it.
    """
    n_rows = len(model.get_input_embeddings().weight)
    for document in documents:
        if (largest := max(document.ids, default=0)) >= n_rows:
            where = f"{document.file}:{document.line}"
            raise ContentError(f"the model has no token {largest}: its embedding has {n_rows} rows", where=where)
    return _compute_logits(model, build_batch(documents).to(device))


def _compute_losses(model: Any, batch: Batch) -> torch.Tensor:
    """-log p of each label that is learned, in float32: (targets,)."""
    if not is_fused(model):
        return functional.cross_entropy(*_compute_logits(model, batch), reduction="none")
    targets = torch.nonzero(batch.labels[0] != IGNORE_LABEL).squeeze(1)
    return model(  # type: ignore[no-any-return]
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        documents=batch.list_lengths(),
        rows=targets - 1,
        labels=batch.labels[0, targets],
    )


def _compute_logits(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits in float32 at the places whose next token is learned, and that token's ids: (targets, vocabulary)."""
    targets = torch.nonzero(batch.labels[0] != IGNORE_LABEL).squeeze(1)
    arguments = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
    if _keeps_logits(unwrap(model)):
        logits = model(**arguments, logits_to_keep=targets - 1).logits[0]
    else:
        logits = model(**arguments).logits[0, targets - 1]
    return logits.float(), batch.labels[0, targets]


@dataclass(frozen=True)
class DocumentLosses:
    """The loss of each document: Σ −log p over its trained tokens in nats, and how many these are; shapes (D,)."""

    sums: tuple[float, ...]
    n_targets: tuple[int, ...]

    def compute_mean(self, chosen: Sequence[bool] | None = None) -> float:
        """The mean per trained token over the documents that ``chosen`` flags, or over all."""
        flags = chosen or [True] * len(self.sums)
        total = sum(value for value, flag in zip(self.sums, flags, strict=True) if flag)
        return total / max(1, sum(n for n, flag in zip(self.n_targets, flags, strict=True) if flag))


def compute_mean_loss(
    model: Any,
    documents: Sequence[Rendered],
    *,
    device: torch.device,
    batch_tokens: int,
    check_stop: Callable[[], None] = lambda: None,
) -> float:
    """The mean loss per trained token over ``documents``, as ``measure_losses`` finds it."""
    losses = measure_losses(model, documents, device=device, batch_tokens=batch_tokens, check_stop=check_stop)
    return losses.compute_mean()


@torch.no_grad()
def measure_losses(
    model: Any,
    documents: Sequence[Rendered],
    *,
    device: torch.device,
    batch_tokens: int,
    check_stop: Callable[[], None] = lambda: None,
) -> DocumentLosses:
    """The loss of each of ``documents``; the model is left as it was found.

    Args:
        model: any causal language model.
        documents: what to measure on; batches hold whole documents up to ``batch_tokens``.
        device: where the model lies.
        batch_tokens: an upper bound of tokens in one forward (a longer document goes alone).
        check_stop: called before each batch; may raise to end the work.
    """
    was_training = model.training
    model.eval()
    sums: list[float] = []
    n_targets: list[int] = []
    try:
        for group in group_lengths(list_lengths(documents), batch_tokens):
            check_stop()
            batch = build_batch([documents[i] for i in group]).to(device)
            counts = batch.count_targets()
            losses = _compute_losses(model, batch).double().cpu()
            sums += [part.sum().item() for part in torch.split(losses, counts)]
            n_targets += counts
    finally:
        model.train(was_training)
    return DocumentLosses(tuple(sums), tuple(n_targets))


def compute_perplexity(loss: float) -> float:
    """e to a mean loss in nats; infinite where that is too large for a number."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def count_targets(documents: Sequence[Rendered]) -> list[int]:
    """Trained tokens of each document, without its first, which nothing predicts."""
    if isinstance(documents, Documents):
        return documents.count_targets().tolist()  # type: ignore[no-any-return]
    return [sum(document.mask[1:]) for document in documents]


def list_lengths(documents: Sequence[Rendered]) -> list[int]:
    """Tokens of each document."""
    return documents.lengths if isinstance(documents, Documents) else [len(document.ids) for document in documents]


def group_lengths(lengths: Sequence[int], batch_tokens: int) -> Iterator[tuple[int, ...]]:
    """Yields runs of neighbours (as indices) of up to ``batch_tokens`` together, each of at least one."""
    group: list[int] = []
    size = 0
    for index, length in enumerate(lengths):
        if group and size + length > batch_tokens:
            yield tuple(group)
            group, size = [], 0
        group.append(index)
        size += length
    if group:
        yield tuple(group)


def _keeps_logits(model: Any) -> bool:
    return "logits_to_keep" in inspect.signature(type(model).forward).parameters
