"""The model on its held-out rows and prompts, before, between and after the steps."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ftcli.data.documents import Documents
from ftcli.data.loader import DocumentSet
from ftcli.data.message import Message
from ftcli.errors import NumericError
from ftcli.evaluate.generate import Sampling, ScoreReport, generate_texts, score_examples
from ftcli.evaluate.loss import DocumentLosses, measure_losses
from ftcli.events import EvalDone, Notice, OnEvent, Progress, Sampled, Stage
from ftcli.store.file import make_folder, write_text
from ftcli.store.run import RunFolder, append_line, read_lines
from ftcli.train.best import read_evals
from ftcli.train.engine import Engine
from ftcli.train.prepare import Prepared
from ftcli.train.shard import is_sharded
from ftcli.train.world import World


@dataclass(frozen=True)
class Evaluation:
    """Measures the model on held-out rows and prompts, and writes ``eval.jsonl`` and ``samples/``.

    Process 0 does, while the others wait; all of them together where each has only a part of the model.
    """

    run: RunFolder
    prepared: Prepared
    engine: Engine
    world: World
    check_stop: Callable[[], None]
    on_event: OnEvent

    def is_due(self, step: int) -> bool:
        """Whether held-out rows are measured after ``step``: before the first, after the last, and as asked."""
        section = self.prepared.recipe.eval
        every = section.eval_steps if section else None
        return step in (0, self.prepared.plan.total_steps) or bool(every and step % every == 0)

    def measure(self, step: int) -> None:
        """Nothing; loss, score and samples after ``step`` are recorded, unless they were already.

        Raises:
            NumericError: a loss that is NaN or infinite, after it was recorded.
        """
        if is_sharded(self.engine.model):
            self._measure(step)
        else:
            self.world.on_main(lambda: self._measure(step))

    def _measure(self, step: int) -> None:
        entries = self._read(lambda: read_evals(self.run))
        known = {entry["dataset"]: entry["loss"] for entry in entries if entry["step"] == step}
        for part in self.prepared.split.held_out:
            if part.name in known:
                _check_finite(known[part.name], part.name, step)
                continue
            with self.engine.accelerator.autocast():
                self._measure_set(step, part)
        with self.engine.accelerator.autocast():
            self._sample(step)

    def _measure_set(self, step: int, part: DocumentSet) -> None:
        self.on_event(Stage("eval", f"{part.name}, {len(part.documents)} documents"))
        losses = self._measure_losses(part.documents)
        loss, report = losses.compute_mean(), self._score(part)
        score = report.score if report else None
        if report and self.world.is_main:
            lines = (json.dumps(asdict(answer), ensure_ascii=False) for answer in report.answers)
            make_folder(self.run.samples)
            write_text(self.run.samples / f"{part.name}-{step:06d}.jsonl", "".join(f"{line}\n" for line in lines))
        entry = {"step": step, "dataset": part.name, "loss": loss, "score": score}
        entry |= dict(self._divide_loss(part, losses))
        if self.world.is_main:
            append_line(self.run.eval, entry)
        if report and report.n_timed_out:
            n = report.n_timed_out
            self.on_event(Notice(f"{n} answers count as wrong: the expression took more than a second on each"))
        _check_finite(loss, part.name, step)
        self.on_event(EvalDone(step, part.name, loss, score, len(report.answers) if report else 0))

    def _measure_losses(self, documents: Documents) -> DocumentLosses:
        recipe = self.prepared.recipe
        return measure_losses(
            self.engine.model,
            documents,
            device=self.engine.accelerator.device,
            batch_tokens=recipe.data.max_length if recipe.puts_documents_together else 1,
            check_stop=self.check_stop,
        )

    def _divide_loss(self, part: DocumentSet, losses: DocumentLosses) -> Iterator[tuple[str, Mapping[str, float]]]:
        """Yields the further entries of a line in ``eval.jsonl`` that ``eval.loss_by`` asks for."""
        section, documents = self.prepared.recipe.eval, part.documents
        if section and "source" in section.loss_by:
            file = documents.table.file[documents.row]
            names = [entry.name for entry in documents.table.files]
            yield (
                "loss_by_source",
                {names[i]: losses.compute_mean((file == i).tolist()) for i in sorted(set(file.tolist()))},
            )
        if section and "role" in section.loss_by:
            roles = self.prepared.split.held_out_by_role[part.name]
            yield "loss_by_role", {role: self._measure_losses(rows).compute_mean() for role, rows in roles.items()}

    def _score(self, part: DocumentSet) -> ScoreReport | None:
        section = self.prepared.recipe.eval
        if section is None or section.score is None:
            return None
        return score_examples(
            self.engine.model,
            self.prepared.renderer,
            part.read_examples(),
            metric=section.score,
            pattern=section.regex,
            max_new_tokens=section.max_new_tokens,
            batch_rows=section.per_device_eval_batch_size,
            check_stop=self.check_stop,
            on_progress=lambda done, total: self.on_event(Progress("eval", done, total)),
        )

    def _sample(self, step: int) -> None:
        """Nothing; the answers to ``eval.sample_prompts`` after ``step`` are in ``samples/prompts.jsonl``."""
        section, path = self.prepared.recipe.eval, self.run.prompts
        if section is None or not section.sample_prompts:
            return
        entries = self._read(lambda: read_lines(path, "step", "prompt"))
        known = {entry["prompt"] for entry in entries if entry["step"] == step}
        asked = [prompt for prompt in section.sample_prompts if prompt not in known]
        renderer, size = self.prepared.renderer, section.per_device_eval_batch_size
        if self.world.is_main:
            make_folder(self.run.samples)
        for first in range(0, len(asked), size):
            prompts = asked[first : first + size]
            ids = [renderer.render_prompt([Message("user", prompt)]) for prompt in prompts]
            sampling = Sampling(max_new_tokens=section.max_new_tokens)
            texts = generate_texts(self.engine.model, renderer, ids, sampling, check_stop=self.check_stop)
            for prompt, text in zip(prompts, texts, strict=True):
                if self.world.is_main:
                    append_line(path, {"step": step, "prompt": prompt, "text": text})
                self.on_event(Sampled(step, prompt, text))

    def _read(self, function: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
        """What process 0 finds in the run folder, for every process that is at work."""
        return self.world.on_main(function) if is_sharded(self.engine.model) else function()


def _check_finite(loss: float, name: str, step: int) -> None:
    if not math.isfinite(loss):
        hint = "lower train.learning_rate" if step else "look at these rows, and at the base model's weights"
        raise NumericError(f"the loss on {name} is {loss} after step {step}", hint=hint)
