"""The model on its held-out rows, before, between and after the steps."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from ftcli.data.loader import DocumentSet
from ftcli.evaluate.generate import score_examples
from ftcli.evaluate.loss import compute_mean_loss
from ftcli.events import EvalDone, OnEvent, Progress, Stage
from ftcli.store.run import RunFolder, append_line
from ftcli.train.prepare import Prepared
from ftcli.train.stop import StopRequest


class Evaluation:
    """Measures the model on the held-out rows and writes ``eval.jsonl`` and ``samples/``."""

    def __init__(
        self,
        run: RunFolder,
        prepared: Prepared,
        model: Any,
        device: torch.device,
        stop: StopRequest,
        on_event: OnEvent,
    ) -> None:
        self.run, self.prepared, self.model, self.device = run, prepared, model, device
        self.stop, self.on_event = stop, on_event

    def measure(self, step: int) -> None:
        """Nothing; loss and score of every held-out set after ``step`` are recorded."""
        for part in self.prepared.split.held_out:
            self.on_event(Stage("eval", f"{part.name}, {len(part.examples)} rows"))
            loss = compute_mean_loss(
                self.model,
                part.documents,
                device=self.device,
                batch_tokens=self.prepared.recipe.data.max_length,
                check_stop=self.stop.check,
            )
            score = self._score(step, part)
            append_line(self.run.eval, {"step": step, "dataset": part.name, "loss": loss, "score": score})
            self.on_event(EvalDone(step, part.name, loss, score, len(part.examples)))

    def _score(self, step: int, part: DocumentSet) -> float | None:
        section = self.prepared.recipe.eval
        if section is None or section.score is None:
            return None
        report = score_examples(
            self.model,
            self.prepared.renderer,
            part.examples,
            metric=section.score,
            max_new_tokens=section.max_new_tokens,
            batch_rows=section.per_device_eval_batch_size,
            check_stop=self.stop.check,
            on_progress=lambda done, total: self.on_event(Progress("eval", done, total)),
        )
        samples = self.run.path / "samples"
        samples.mkdir(exist_ok=True)
        path = samples / f"{part.name}-{step:06d}.jsonl"
        path.unlink(missing_ok=True)
        for answer in report.answers:
            append_line(path, asdict(answer))
        return report.score
