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
from ftcli.events import Notice, OnEvent, Pace, ignore_event
from ftcli.gguf.ahead import count_threads
from ftcli.gguf.draft import KINDS, Draft, draft_model
from ftcli.gguf.native import find_packer
from ftcli.gguf.source import Source, open_folder
from ftcli.gguf.write import write_gguf


@dataclass(frozen=True)
class Converted:
    """The file that was written.

    Args:
        path: where it lies.
        size_bytes: of the whole file.
        architecture: llama.cpp's name of the family.
        n_tensors: in it.
        n_parameters: the model's.
        left_out: tokens for which the model has no row.
        types: GGUF's type → how many parameters have it.
        bits_per_weight: of the tensors' data.
        fallback: the share of the parameters that lie in rows which the type of their kind does not fit: they have
            another, mostly a larger one.
    """

    path: Path
    size_bytes: int
    architecture: str
    n_tensors: int
    n_parameters: int
    left_out: tuple[str, ...]
    types: Mapping[str, int]
    bits_per_weight: float
    fallback: float


def convert(
    model: Path | Source | Draft,
    output: Path,
    *,
    kind: str,
    name: str | None = None,
    on_event: OnEvent = ignore_event,
) -> Converted:
    """The GGUF file that now lies at ``output``.

    Args:
        model: a draft; or a transformers folder, or a source that makes its weights as they are asked for.
        output: the file's name in the end; what was there is replaced once the new one is complete.
        kind: one of `KINDS`.
        name: what the model calls itself, where it is no draft; None guesses it as llama.cpp does.
        on_event: told of the bytes written; and of what the file does not hold, where the model is no draft.

    Raises:
        UsageError: there is no such kind.
        ContentError: an unknown family or tokenizer, a damaged model, NaN or infinity in it.
        NumericError: a weight is too large for its type.
        DiskError: the disk is full or may not be written.
    """
    if kind not in KINDS:
        raise UsageError(f"there is no kind of GGUF file called {kind}", hint=f"it is one of {', '.join(KINDS)}")
    if isinstance(model, Draft):
        draft = model
    else:
        draft = draft_model(open_folder(model) if isinstance(model, Path) else model, name=name)
        for text in draft.notices:
            on_event(Notice(text))
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
        draft.architecture,
        len(tensors),
        draft.n_parameters,
        draft.left_out,
        types=types,
        bits_per_weight=8 * data_bytes / draft.n_parameters,
        fallback=draft.measure_fallback(kind),
    )
