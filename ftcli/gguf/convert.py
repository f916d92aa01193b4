"""The GGUF file of a draft, written in one pass.

Draft ─▶ keys, and tensors with their types ─▶ write_gguf ─▶ Converted
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ftcli.errors import UsageError
from ftcli.events import OnEvent, Pace, ignore_event
from ftcli.gguf.ahead import count_threads
from ftcli.gguf.draft import KINDS, Draft
from ftcli.gguf.native import find_packer
from ftcli.gguf.write import write_gguf


@dataclass(frozen=True)
class Converted:
    """The file that was written.

    Args:
        path: where it lies.
        size_bytes: of the whole file.
        n_parameters: the model's.
        types: GGUF's type → how many parameters have it.
        bits_per_weight: of the tensors' data.
        fallback: the share of the parameters that lie in rows which the type of their kind does not fit: they have
            another, mostly a larger one.
    """

    path: Path
    size_bytes: int
    n_parameters: int
    types: Mapping[str, int]
    bits_per_weight: float
    fallback: float


def convert(draft: Draft, output: Path, *, kind: str, on_event: OnEvent = ignore_event) -> Converted:
    """The GGUF file that now lies at ``output``.

    Args:
        draft: the file, but for its kind.
        output: its name in the end; what was there is replaced once the new one is complete.
        kind: one of `ftcli.gguf.draft.KINDS`.
        on_event: told of the bytes written.

    Raises:
        UsageError: there is no such kind.
        ContentError: NaN or infinity in the model.
        NumericError: a weight is too large for its type.
        DiskError: the disk is full or may not be written.
    """
    if kind not in KINDS:
        raise UsageError(f"there is no kind of GGUF file called {kind}", hint=f"it is one of {', '.join(KINDS)}")
    tensors = draft.plan(kind)
    for dtype in sorted({tensor.dtype for tensor in tensors}):
        find_packer(dtype)  # before threads ask for it, so that llama.cpp is loaded once
    data_bytes = sum(tensor.size_bytes for tensor in tensors)
    pace = Pace("gguf", data_bytes, unit="bytes")
    size = write_gguf(
        output,
        draft.list_keys(kind),
        tensors,
        n_threads=count_threads(),
        on_bytes=lambda n: on_event(pace.advance(n)),
    )
    types: Counter[str] = Counter()
    for tensor in tensors:
        types[tensor.dtype] += math.prod(tensor.shape)
    return Converted(
        output,
        size,
        draft.n_parameters,
        types=types,
        bits_per_weight=8 * data_bytes / draft.n_parameters,
        fallback=draft.measure_fallback(kind),
    )
