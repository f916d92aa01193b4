"""Documents side by side → the flat tensors that a model sees.

    documents   [AAAA] [BB] [CCCCCC]                      one row of data each (or one trained turn)
    batch       A A A A B B C C C C C C                   flat (1, T), side by side, no padding
    positions   0 1 2 3 0 1 0 1 2 3 4 5                   restart with each document
    labels      . . A A . B . . . C C C                   -100 where nothing is learned, not shifted

A batch of rows and a pack are the same thing; attention is block-diagonal over the documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ftcli.data.chat import Rendered

IGNORE_LABEL = -100


@dataclass(frozen=True)
class Batch:
    """One forward's worth of documents, side by side and flat.

    Shapes: ``input_ids``, ``labels``, ``position_ids`` (1, T) int64; ``cu_seqlens`` (documents + 1,) int32.
    ``labels`` are -100 where nothing is learned and at the first token of each document, and not shifted;
    ``n_targets`` counts the others.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    n_targets: int
    places: tuple[str, ...]

    @property
    def n_tokens(self) -> int:
        return self.input_ids.shape[1]

    def list_lengths(self) -> list[int]:
        """Tokens of each document."""
        return self.cu_seqlens.diff().tolist()

    def count_targets(self) -> list[int]:
        """Trained tokens of each document."""
        is_target = self.labels[0].cpu() != IGNORE_LABEL
        return [int(part.sum()) for part in is_target.tensor_split(self.cu_seqlens[1:-1].tolist())]

    def to(self, device: torch.device) -> Batch:
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            position_ids=self.position_ids.to(device, non_blocking=True),
        )


def build_batch(documents: Sequence[Rendered]) -> Batch:
    """The flat batch of ``documents``, side by side in their order."""
    ids = [token for document in documents for token in document.ids]
    labels = [label for document in documents for label in list_labels(document)]
    borders = [0]
    for document in documents:
        borders.append(borders[-1] + len(document.ids))
    return Batch(
        input_ids=torch.tensor([ids]),
        labels=torch.tensor([labels]),
        position_ids=torch.cat([torch.arange(len(d.ids)) for d in documents])[None],
        cu_seqlens=torch.tensor(borders, dtype=torch.int32),
        n_targets=sum(label != IGNORE_LABEL for label in labels),
        places=tuple(f"{d.file}:{d.line}" for d in documents),
    )


def list_labels(document: Rendered) -> list[int]:
    """The document's ids where they are trained on, else -100; its first token is never predicted."""
    trained = zip(document.ids[1:], document.mask[1:], strict=True)
    return [IGNORE_LABEL, *(token if is_trained else IGNORE_LABEL for token, is_trained in trained)]
