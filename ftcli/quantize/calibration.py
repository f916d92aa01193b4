"""The rows that rounding is fitted to: rendered as the model was trained, one after another, cut into windows.

    run's training rows, file or recipe ─▶ documents ─▶ shuffled, joined ─▶ (windows, length) ids

Windows are all of one length, as what reads them takes no other. Nothing is ever fetched that was not named.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ftcli.data.documents import Documents
from ftcli.data.limits import read_limits
from ftcli.data.loader import Reading
from ftcli.errors import ContentError, UsageError
from ftcli.evaluate.sample import load_file_set, load_run_split
from ftcli.evaluate.target import Target
from ftcli.events import Notice, OnEvent
from ftcli.quantize.method import DEFAULT_SEQ_LEN, Spec
from ftcli.recipe import load_recipe

_SEED = 0
_FEW_TOKENS = 8192  # fewer say little about what activations a model has


@dataclass(frozen=True)
class Calibration:
    """``windows`` of ids, (N, L), cut from ``n_rows`` rows of ``source``, which have ``n_tokens`` tokens in all."""

    source: str
    n_rows: int
    n_tokens: int
    windows: torch.Tensor

    def describe(self) -> str:
        """A line on it."""
        n, length = self.windows.shape
        windows = "1 window" if n == 1 else f"{n} windows"
        rows = "1 row" if self.n_rows == 1 else f"{self.n_rows:,} rows"
        return f"{rows} of {self.source}: {windows} of {length:,} tokens"


def load_calibration(target: Target, source: str | None, spec: Spec, on_event: OnEvent) -> Calibration:
    """The windows of ``source`` (a file, glob, folder, Hub id or recipe), or of what the run was trained on.

    Raises:
        UsageError: nothing was named, and the target is no run; or no such file.
        ContentError: rows that cannot be read, or more tokens a window than the model can look at.
    """
    context = read_limits(target.files).context
    length = spec.seq_len or min(DEFAULT_SEQ_LEN, context or DEFAULT_SEQ_LEN)
    if context is not None and length > context:
        what = f"windows of {length} tokens do not fit the context of {context}"
        raise UsageError(what, where=target.name, hint=f"set --seq-len to at most {context}")
    documents, name = _load_documents(target, source)
    found = cut_windows(documents, name, spec.samples, length)
    if found.windows.numel() < min(_FEW_TOKENS, spec.samples * length):
        n = found.windows.numel()
        on_event(Notice(f"rounding is fitted to {n:,} tokens only: name more rows with --calibration FILE"))
    return found


def cut_windows(documents: Documents, name: str, samples: int, seq_len: int) -> Calibration:
    """At most ``samples`` windows of ``seq_len`` tokens, each row used once; one shorter window if there is less.

    Raises:
        ContentError: there are not two tokens.
    """
    order = list(range(len(documents)))
    random.Random(_SEED).shuffle(order)
    ids: list[int] = []
    n_documents = 0
    for index in order:
        if len(ids) >= samples * seq_len:
            break
        ids += documents[index].ids
        n_documents += 1
    length = min(seq_len, len(ids))
    if length < 2:
        raise ContentError("there are no tokens to fit the rounding to", where=name)
    n_windows = min(samples, len(ids) // length)
    windows = torch.tensor(ids[: n_windows * length]).view(n_windows, length)
    return Calibration(name, n_documents, len(ids), windows)


def read_source(target: Target, source: str | None) -> tuple[Target, str | None]:
    """The target with the recipe whose rows are read, and the file that they are read from instead of that.

    Raises:
        UsageError: a recipe that is not there, or wrong.
    """
    if source is not None and Path(source).suffix.lower() in (".yaml", ".yml"):
        return replace(target, recipe=load_recipe(Path(source)).recipe), None
    return target, source


def choose_rows(
    target: Target, data: str | None, calibration: str | None, on_event: OnEvent
) -> tuple[Target, str | None]:
    """Whose rows models are compared on: ``data``, the run's own, else those that rounding is fitted to."""
    known, source = read_source(target, calibration)
    if data is None and known.recipe is None and source is not None:
        on_event(Notice("compared on the rows that rounding is fitted to: name others with --data FILE"))
        data = source
    return known, data


def _load_documents(target: Target, source: str | None) -> tuple[Documents, str]:
    """The documents, and what they are called."""
    known, path = read_source(target, source)
    if path is not None:
        return load_file_set(path, Reading(known.renderer)).documents, Path(path).name
    if known.recipe is None:
        raise UsageError(
            "which rows is the rounding fitted to? a model has none of its own",
            where=target.name,
            hint="name them: --calibration FILE, or the recipe that it was trained with",
        )
    name = Path(source).name if source else target.name
    return load_run_split(known.recipe, Reading(known.renderer)).train.documents, f"the training data of {name}"
