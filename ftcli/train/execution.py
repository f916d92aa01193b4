"""A run under way: build the model, evaluate, step, save, and leave the artifact."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass

import torch

from ftcli.errors import Interrupted, NumericError
from ftcli.events import Notice, OnEvent, Saved, Stage, StepDone
from ftcli.model.attention import check_documents_apart
from ftcli.model.base import choose_device, choose_dtype
from ftcli.model.build import Built, build_model, count_parameters
from ftcli.recipe import Recipe
from ftcli.store.run import RunFolder, cut_lines, discard_replaced, now_text, seal_manifest
from ftcli.train.artifact import save_artifact
from ftcli.train.checkpoint import (
    Checkpoint,
    load_checkpoint,
    remove_newer_checkpoints,
    rotate_checkpoints,
    save_checkpoint,
)
from ftcli.train.evaluation import Evaluation
from ftcli.train.loop import StepResult, run_steps
from ftcli.train.memory import limit_heap, measure_peak, release_between_blocks, start_measuring
from ftcli.train.optim import build_optimizer
from ftcli.train.prepare import Prepared
from ftcli.train.record import record_step
from ftcli.train.stop import StopRequest


@dataclass
class Execution:
    """Where a run stands; ``resume_command`` is what a person types to go on after a stop."""

    run: RunFolder
    prepared: Prepared
    stop: StopRequest
    on_event: OnEvent
    resume_command: str
    step: int = 0
    saved_step: int = 0
    start_rss_bytes: int = 0

    @property
    def recipe(self) -> Recipe:
        return self.prepared.recipe

    @property
    def total_steps(self) -> int:
        return self.prepared.plan.total_steps

    def run_all(self, checkpoint: Checkpoint | None) -> None:
        """Nothing; the run folder holds the finished run.

        Raises:
            Interrupted: a signal came; the step that it came in is finished and saved.
            FtcliError: what stopped the run; steps that were made are saved where that is possible.
        """
        started = time.perf_counter()
        built = self._build()
        if checkpoint:
            self._restore(checkpoint)
        discard_replaced(self.run)
        try:
            self.stop.check()
            if self.evaluation.is_due(self.step):
                self.evaluation.measure(self.step)
            self._run_steps()
            artifact = save_artifact(self.run, self.prepared, built)
        except Interrupted as error:
            raise self._explain_stop(error) from None
        except NumericError:
            raise
        except Exception:
            with suppress(Exception):  # what is being reported comes first
                self._save()
            raise
        self.on_event(Saved(str(artifact)))
        counts, peak = count_parameters(built.model), measure_peak()
        measured = {
            "seconds": round(time.perf_counter() - started, 3),
            "start_rss_bytes": self.start_rss_bytes,
            "peak_rss_bytes": peak.rss_bytes,
            "peak_device_bytes": peak.device_bytes,
            "allocated_device_bytes": peak.allocated_device_bytes,
            "trainable_parameters": counts.trainable,
            "parameters": counts.total,
        }
        seal_manifest(self.run, artifact, state="finished", finished_at=now_text(), measured=measured)

    def _build(self) -> Built:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState

        self._import_libraries()
        device = choose_device()
        if device.type == "cpu":
            limit_heap()
        self.start_rss_bytes = start_measuring()
        dtype = choose_dtype(self.recipe.model.dtype, device)
        self.on_event(Stage("load", f"{str(dtype).removeprefix('torch.')} on {device.type}"))
        built = build_model(
            self.recipe, self.prepared.files, dtype=dtype, device=device, new_tokens=self.prepared.new_tokens
        )
        if device.type == "cpu":
            release_between_blocks(built.model)
        counts = count_parameters(built.model)
        self.on_event(Stage("parameters", f"{counts.trainable:,} of {counts.total:,} are trained"))
        mixed_precision = choose_mixed_precision(dtype, trains_base_weights=built.trains_base_weights)
        AcceleratorState._reset_state()  # or a second run in this process could not choose another precision
        self.accelerator = Accelerator(mixed_precision=mixed_precision, cpu=device.type == "cpu")
        self.model = built.model
        self.optimizer = build_optimizer(built.model, self.recipe.train)
        self.wrapped_model, self.wrapped_optimizer = self.accelerator.prepare(self.model, self.optimizer)
        if self.recipe.puts_documents_together:
            with self.accelerator.autocast():
                check_documents_apart(built.model)
        self.evaluation = Evaluation(self.run, self.prepared, built.model, self.accelerator, self.stop, self.on_event)
        return built

    def _import_libraries(self) -> None:
        """Nothing; what is resident from now on is the model's and its training's."""
        import peft  # noqa: F401 - and with it transformers
        import transformers.modeling_utils  # noqa: F401

        if self.recipe.is_4bit:
            import bitsandbytes  # noqa: F401

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Nothing; model, optimizer and records stand where the checkpoint was made."""
        load_checkpoint(
            checkpoint,
            self.model,
            self.optimizer,
            scaler=self.accelerator.scaler,
            origin=self.prepared.origin,
        )
        self.step = self.saved_step = checkpoint.step
        for path in remove_newer_checkpoints(self.run, checkpoint.step):
            self.on_event(Notice(f"{path} is not on the way from step {checkpoint.step}: removed"))
        for path in (self.run.metrics, self.run.timing, self.run.eval):
            cut_lines(path, checkpoint.step)

    def _run_steps(self) -> None:
        """Nothing; every step is made, recorded, saved and evaluated as the recipe says."""
        self.on_event(Stage("train", f"{self.total_steps} steps"))
        clock = _Clock(self.total_steps)
        steps = run_steps(
            self.recipe,
            self.prepared.split.train.documents,
            self.prepared.plan,
            self.wrapped_model,
            self.wrapped_optimizer,
            self.accelerator,
            first_step=self.step + 1,
            should_stop=lambda: bool(self.stop.signal_number),
        )
        save_steps = self.recipe.checkpoint.save_steps
        try:
            for result in steps:
                self.step = result.step
                record_step(self.run, result)
                self.on_event(clock.tick(result))
                if self.step == self.total_steps or (save_steps and self.step % save_steps == 0):
                    self._save()
                if self.evaluation.is_due(self.step):
                    self.evaluation.measure(self.step)
            self.stop.check()
        except NumericError as error:
            if isinstance(error.result, StepResult):
                record_step(self.run, error.result)
            last = f"the last checkpoint is of step {self.saved_step}" if self.saved_step else "no checkpoint was made"
            error.hint += f"; {last}"
            raise

    def _save(self) -> None:
        """Nothing; the steps that were made are in a checkpoint."""
        if self.step == self.saved_step:
            return
        path = save_checkpoint(
            self.run,
            self.step,
            self.model,
            self.optimizer,
            scaler=self.accelerator.scaler,
            origin=self.prepared.origin,
        )
        self.saved_step = self.step
        rotate_checkpoints(self.run, self.recipe.checkpoint.save_total_limit)
        self.on_event(Saved(str(path)))

    def _explain_stop(self, error: Interrupted) -> Interrupted:
        """The same interruption, after a checkpoint, saying how to go on."""
        self._save()
        what = f"{error.what} after step {self.step} of {self.total_steps}, which is saved"
        hint = f"go on: {self.resume_command}"
        if not self.step:
            what, hint = f"{error.what} before the first step", ""
        return Interrupted(what, signal_number=self.stop.signal_number, hint=hint)


def choose_mixed_precision(dtype: torch.dtype, *, trains_base_weights: bool) -> str:
    """What accelerate casts: weights of the base that are trained stay in float32 and need autocast.

    LoRA on bfloat16 needs none: PEFT keeps its own weights in float32 and casts around them. float16 always
    needs the loss scaler that comes with it.
    """
    if dtype is torch.float16:
        return "fp16"
    return "bf16" if trains_base_weights and dtype is torch.bfloat16 else "no"


class _Clock:
    """Turns step results into events with the time that is left, from the mean of the steps so far."""

    def __init__(self, total_steps: int) -> None:
        self.total_steps = total_steps
        self.seconds = 0.0
        self.n_steps = 0

    def tick(self, result: StepResult) -> StepDone:
        self.seconds += result.seconds
        self.n_steps += 1
        left = (self.total_steps - result.step) * self.seconds / self.n_steps
        return StepDone(
            step=result.step,
            total_steps=self.total_steps,
            epoch=result.epoch,
            loss=result.loss,
            grad_norm=result.grad_norm,
            lr=result.lr,
            tokens_per_second=result.n_tokens / max(result.seconds, 1e-9),
            seconds_left=left,
        )
