"""What long work reports while it runs: frozen values handed to an ``on_event`` callable.

The core prints nothing. The CLI turns these into a live line or plain lines; a script may collect them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """A part of the work begins, such as loading the model."""

    name: str
    detail: str = ""


@dataclass(frozen=True)
class Notice:
    """Something the user can act on, or would otherwise be surprised by."""

    text: str


@dataclass(frozen=True)
class Progress:
    """``done`` of ``total`` items of the current stage are finished; 0 of 0 where it has none to count.

    ``unit`` is ``bytes`` where these are counted.
    """

    stage: str
    done: int
    total: int
    unit: str = ""
    seconds_left: float | None = None


@dataclass(frozen=True)
class StepDone:
    """One optimizer step of a training run is finished; the memory is that of model and training, 0 if unknown."""

    step: int
    total_steps: int
    epoch: float
    loss: float
    grad_norm: float
    lr: float
    tokens_per_second: float
    seconds_left: float
    memory_bytes: int = 0
    forecast_bytes: int = 0


@dataclass(frozen=True)
class EvalDone:
    """One pass over a held-out data set is finished; ``score`` is a share from 0 to 1."""

    step: int
    dataset: str
    loss: float
    score: float | None
    n_rows: int


@dataclass(frozen=True)
class Sampled:
    """The model's answer to one of the recipe's prompts."""

    step: int
    prompt: str
    text: str


@dataclass(frozen=True)
class Saved:
    """A checkpoint or an artifact lies complete under its final name."""

    path: str


class Pace:
    """Counts what is done of ``total``, and foretells the rest from the mean pace so far."""

    def __init__(self, stage: str, total: int, *, unit: str = "") -> None:
        self.stage, self.total, self.unit = stage, total, unit
        self.done = 0
        self.started = time.perf_counter()

    def advance(self, amount: int) -> Progress:
        """What to report after ``amount`` more is done."""
        self.done += amount
        elapsed = time.perf_counter() - self.started
        left = elapsed * (self.total - self.done) / max(1, self.done)
        return Progress(self.stage, self.done, self.total, self.unit, left)


Event = Stage | Notice | Progress | StepDone | EvalDone | Sampled | Saved
OnEvent = Callable[[Event], None]


def ignore_event(event: Event) -> None:
    """Nothing: the default ``on_event``."""
