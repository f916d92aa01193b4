"""Trackers that people already use, through accelerate: they are told what the run reports, and may fail without it."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftcli.errors import UsageError
from ftcli.events import EvalDone, Event, Notice, OnEvent, StepDone
from ftcli.recipe import Recipe
from ftcli.store.run import RunFolder
from ftcli.train.change import flatten_section


def check_trackers(recipe: Recipe) -> None:
    """None if the packages of the trackers that the recipe names are installed.

    Raises:
        UsageError: naming what to install.
    """
    missing = [name for name in recipe.logging.report_to if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"{' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} not installed",
            where="logging.report_to",
            hint=f"run: pip install {' '.join(missing)}",
        )


@dataclass
class Trackers:
    """What is told of a run to its trackers; the first one that fails ends this, with a notice."""

    accelerator: Any
    on_event: OnEvent
    is_open: bool

    def report(self, event: Event) -> None:
        """Nothing; the event was handed on, and its numbers went to the trackers."""
        self.on_event(event)
        if isinstance(event, StepDone):
            values = {"loss": event.loss, "grad_norm": event.grad_norm, "learning_rate": event.lr}
            values |= {"epoch": event.epoch, "tokens_per_second": event.tokens_per_second}
            self._log({f"train/{key}": value for key, value in values.items()}, event.step)
        elif isinstance(event, EvalDone):
            values = {"loss": event.loss} | ({} if event.score is None else {"score": event.score})
            self._log({f"eval/{event.dataset}/{key}": value for key, value in values.items()}, event.step)

    def close(self) -> None:
        """Nothing; the trackers have everything."""
        for tracker in self.accelerator.trackers if self.is_open else ():  # end_training would end the processes' group
            self.attempt(tracker.finish)

    def _log(self, values: Mapping[str, float], step: int) -> None:
        if self.is_open:
            self.attempt(self.accelerator.log, values, step=step)

    def attempt(self, function: Any, *arguments: Any, **options: Any) -> None:
        """Nothing; ``function`` was called; if it failed, the trackers are told no more, and the run goes on."""
        try:
            function(*arguments, **options)
        except Exception as error:
            self.is_open = False
            self.on_event(Notice(f"the trackers are told no more: {str(error).partition(chr(10))[0]}"))


def open_trackers(recipe: Recipe, run: RunFolder, origin: str, accelerator: Any, on_event: OnEvent) -> Trackers:
    """The trackers of the recipe, which know the run by ``origin`` if it goes on; none is opened without any.

    tensorboard writes into the run folder; where the others write, their own variables say (WANDB_MODE,
    MLFLOW_TRACKING_URI, TRACKIO_DIR …).
    """
    trackers = Trackers(accelerator, on_event, is_open=bool(recipe.logging.report_to))
    if not trackers.is_open:
        return trackers
    name = recipe.logging.run_name or run.path.resolve().name
    options: dict[str, dict[str, Any]] = {
        "wandb": {"name": name, "id": origin[:16], "resume": "allow", "dir": str(run.path)},
        "mlflow": {"run_name": name},
        "trackio": {"name": name, "resume": "allow"},
    }
    flat = flatten_section(recipe.model_dump(mode="json", by_alias=True))
    values = {key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in flat}
    trackers.attempt(accelerator.init_trackers, recipe.logging.project, config=values, init_kwargs=options)
    return trackers


def find_folder(run: RunFolder) -> Path:
    """Where trackers that write files write them."""
    return run.path / "trackers"
