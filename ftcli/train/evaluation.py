"""The model on its held-out rows, before, between and after the steps."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ftcli.data.loader import DocumentSet
from ftcli.evaluate.generate import ScoreReport, score_examples
from ftcli.evaluate.loss import compute_mean_loss
from ftcli.events import EvalDone, OnEvent, Progress, Stage
from ftcli.store.run import RunFolder, append_line, read_lines
from ftcli.train.prepare import Prepared
from ftcli.train.stop import StopRequest


@dataclass(frozen=True)
class Evaluation:
    """Measures the model on the held-out rows and writes ``eval.jsonl`` and ``samples/``."""

    run: RunFolder
    prepared: Prepared
    model: Any
    accelerator: Any
    stop: StopRequest
    on_event: OnEvent

    def is_due(self, step: int) -> bool:
        """Whether held-out rows are measured after ``step``: before the first, after the last, and as asked."""
        section = self.prepared.recipe.eval
        every = section.eval_steps if section else None
        return step in (0, self.prepared.plan.total_steps) or bool(every and step % every == 0)

    def measure(self, step: int) -> None:
        """Nothing; loss and score of every held-out set after ``step`` are recorded, unless they were already."""
        known = {entry["dataset"] for entry in read_lines(self.run.eval) if entry["step"] == step}
        for part in self.prepared.split.held_out:
            if part.name in known:
                continue
            self.on_event(Stage("eval", f"{part.name}, {len(part.documents)} documents"))
            with self.accelerator.autocast():
                loss = self._measure_loss(part)
                report = self._score(part)
            score = report.score if report else None
            if report:
                self._write_samples(step, part, report)
            append_line(self.run.eval, {"step": step, "dataset": part.name, "loss": loss, "score": score})
            self.on_event(EvalDone(step, part.name, loss, score, len(report.answers) if report else 0))

    def _measure_loss(self, part: DocumentSet) -> float:
        recipe = self.prepared.recipe
        return compute_mean_loss(
            self.model,
            part.documents,
            device=self.accelerator.device,
            batch_tokens=recipe.data.max_length if recipe.puts_documents_together else 1,
            check_stop=self.stop.check,
        )

    def _score(self, part: DocumentSet) -> ScoreReport | None:
        section = self.prepared.recipe.eval
        if section is None or section.score is None:
            return None
        return score_examples(
            self.model,
            self.prepared.renderer,
            part.read_examples(),
            metric=section.score,
            max_new_tokens=section.max_new_tokens,
            batch_rows=section.per_device_eval_batch_size,
            check_stop=self.stop.check,
            on_progress=lambda done, total: self.on_event(Progress("eval", done, total)),
        )

    def _write_samples(self, step: int, part: DocumentSet, report: ScoreReport) -> None:
        samples = self.run.path / "samples"
        samples.mkdir(exist_ok=True)
        path = samples / f"{part.name}-{step:06d}.jsonl"
        path.unlink(missing_ok=True)
        for answer in report.answers:
            append_line(path, asdict(answer))
