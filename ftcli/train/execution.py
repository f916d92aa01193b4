"""A run under way: build the model, evaluate, step, save, and leave the artifact.

Every process of the run goes through the same; what lies in the run folder process 0 reads and writes (`ledger`).
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from ftcli.errors import (
    DiskError,
    FtcliError,
    Interrupted,
    MemoryExhausted,
    NumericError,
    explain_stop,
    is_memory_error,
)
from ftcli.events import Notice, OnEvent, Saved, Stage, StepDone
from ftcli.model.build import count_parameters
from ftcli.recipe import Recipe
from ftcli.store.file import check_free, free_bytes
from ftcli.store.run import RunFolder, discard_replaced, now_text, seal_manifest, update_manifest
from ftcli.train.artifact import save_artifact
from ftcli.train.checkpoint import (
    Checkpoint,
    gather_state,
    load_checkpoint,
    load_weights,
    name_path,
    read_checkpoint,
)
from ftcli.train.engine import build_engine, import_libraries
from ftcli.train.evaluation import Evaluation
from ftcli.train.forecast import RunForecast, check_memory, explain_memory
from ftcli.train.ledger import open_ledger
from ftcli.train.loop import StepResult, run_steps
from ftcli.train.memory import (
    limit_heap,
    measure_available,
    measure_memory,
    measure_peak,
    start_measuring,
)
from ftcli.train.optim import list_trained
from ftcli.train.prepare import Prepared
from ftcli.train.rehearsal import rehearse
from ftcli.train.shard import gather_weights, is_sharded
from ftcli.train.stop import StopRequest
from ftcli.train.tracking import open_trackers
from ftcli.train.world import World


@dataclass
class Execution:
    """Where a run stands; ``resume_command`` is what a person types to go on after a stop."""

    run: RunFolder
    prepared: Prepared
    forecast: RunForecast | None
    stop: StopRequest
    on_event: OnEvent
    resume_command: str
    world: World
    step: int = 0
    saved_step: int = 0
    start_rss_bytes: int = 0
    available_bytes: int = 0

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
        try:
            self._build()
            self._restore(checkpoint)
            self._rehearse()
        except Exception as error:
            self._check_memory(error, f"before step {self.step + 1}")
            raise
        self.stop.hold()
        try:
            self._go_through()
            self.ledger.rotate()  # a kill may have come between the last save and its rotation
            artifact = self._leave_artifact()
        except Interrupted as error:
            raise self._explain_stop(error) from None
        except KeyboardInterrupt as error:
            raise self._explain_kill(explain_stop(error)) from None
        except NumericError:
            raise
        except Exception as error:
            with suppress(Exception):  # what is being reported comes first
                self._save_alone()
            self._check_memory(error, f"after step {self.step}")
            raise
        finally:
            self.trackers.close()
        self.on_event(Saved(str(artifact)))
        counts, peak = count_parameters(self.engine.model), measure_peak()
        measured = {
            "seconds": round(time.perf_counter() - started, 3),
            "start_rss_bytes": self.start_rss_bytes,
            "peak_rss_bytes": peak.rss_bytes,
            "peak_device_bytes": peak.device_bytes,
            "allocated_device_bytes": peak.allocated_device_bytes,
            "trainable_parameters": counts.trainable,
            "parameters": counts.total,
        }
        if self.world.is_main:
            seal_manifest(self.run, artifact, state="finished", finished_at=now_text(), measured=measured)

    def _build(self) -> None:
        import_libraries(self.recipe)
        device = self.world.choose_device()
        if device.type == "cpu":
            limit_heap()
        self.start_rss_bytes, self.available_bytes = start_measuring(), measure_available()
        if device.type == "cpu":  # the processes of a machine share its memory
            self.available_bytes //= self.world.n_local
        check_memory(self.forecast, self.recipe, self.available_bytes)
        self.engine = build_engine(self.prepared, device, self.world, self.run, self.on_event)
        self.ledger = open_ledger(self.run, self.prepared, self.world, self.on_event)
        self.trackers = open_trackers(self.recipe, self.run, self.ledger.origin, self.engine.accelerator, self.on_event)
        check_stop = self._check if is_sharded(self.engine.model) else self.stop.check
        tell = self.trackers.report
        self.evaluation = Evaluation(self.run, self.prepared, self.engine, self.world, check_stop, tell)

    def _restore(self, checkpoint: Checkpoint | None) -> None:
        """Nothing; model, optimizer and records stand where the checkpoint was made, or at the beginning."""
        if checkpoint:
            load_checkpoint(
                checkpoint,
                self.engine.model,
                self.engine.optimizer,
                scaler=self.engine.accelerator.scaler,
                origin=self.ledger.origin,
            )
            self.step = self.saved_step = checkpoint.step
        self.ledger.go_back(checkpoint)

    def _rehearse(self) -> None:
        """Nothing; the largest batches fit, and so will a checkpoint and the artifact."""
        self.on_event(Stage("try", "the largest batches, forward and back"))
        documents = self.prepared.split.train.documents
        rehearse(
            self.recipe,
            [[documents[i] for i in group] for group in self.prepared.largest],
            [part.documents for part in self.prepared.split.held_out],
            self.engine.wrapped_model,
            self.engine.accelerator,
            plain_model=self.engine.model,
            has_moments=self.step > 0,
        )
        self.world.on_main(self._check_disk)

    def _check_disk(self) -> None:
        """None if a checkpoint and the artifact fit; whether all that are kept will, is told."""
        size = sum(p.numel() * p.element_size() for _, p in list_trained(self.engine.model))
        checkpoint, limit = 3 * size, self.recipe.checkpoint.save_total_limit  # weights and two moments
        check_free(self.run.path, checkpoint + size)
        if free_bytes(self.run.path) < (needed := (limit + 1) * checkpoint + size):
            free = free_bytes(self.run.path) / 1e6
            self.on_event(Notice(f"checkpoints and artifact may take {needed / 1e6:,.0f} MB, and {free:,.0f} are free"))

    def _go_through(self) -> None:
        """Nothing; every step is made, recorded, saved and evaluated as the recipe says, or as many as helped."""
        self._check()
        if self.evaluation.is_due(self.step):
            self._evaluate()
        if self.world.is_main:
            discard_replaced(self.run)
        if self._is_over():
            return
        self.on_event(Stage("train", f"{self.total_steps} steps"))
        clock = _Clock(self.total_steps, self.start_rss_bytes, self.forecast)
        steps = run_steps(
            self.recipe,
            self.prepared.split.train.documents,
            self.prepared.plan,
            self.engine.wrapped_model,
            self.engine.wrapped_optimizer,
            self.engine.accelerator,
            world=self.world,
            first_step=self.step + 1,
            should_stop=self._is_stopped,
        )
        save_steps = self.recipe.checkpoint.save_steps
        try:
            for result in steps:
                self.step = result.step
                self.ledger.record_step(result)
                self.trackers.report(clock.tick(result))
                if self.step == self.total_steps or (save_steps and self.step % save_steps == 0):
                    self._save()
                if self.evaluation.is_due(self.step):
                    self._evaluate()
                    if self._is_over():
                        break
            self._check()
        except NumericError as error:
            raise self._explain_numbers(error) from None

    def _is_stopped(self) -> bool:
        """Whether a signal came to any process; every process knows then, and must ask at the same point."""
        self.stop.signal_number = self.world.agree(self.stop.signal_number)
        return bool(self.stop.signal_number)

    def _check(self) -> None:
        """None, unless a signal came to any process.

        Raises:
            Interrupted: with the signal's number.
        """
        if self._is_stopped():
            self.stop.check()

    def _evaluate(self) -> None:
        """Nothing; held-out rows are measured after this step, and the step is saved if it is the best so far."""
        try:
            self.evaluation.measure(self.step)
        except Exception as error:
            if self.recipe.eval is None or not is_memory_error(error):
                raise
            rows = max(1, self.recipe.eval.per_device_eval_batch_size // 2)
            raise MemoryExhausted(
                f"out of memory while held-out rows were measured after step {self.step}",
                why=str(error).partition("\n")[0],
                hint=f"generate fewer answers at a time: --set eval.per_device_eval_batch_size={rows}",
            ) from error
        best = self.ledger.find_best()
        if best and best.step == self.step:
            self._save()
        self.ledger.record_best()

    def _is_over(self) -> bool:
        """Whether too many evaluations in a row were no better; the last step is saved then."""
        best, section = self.ledger.find_best(), self.recipe.eval
        patience = section.early_stopping_patience if section else None
        if best is None or patience is None or best.n_since < patience or self.step == self.total_steps:
            return False
        self._save()
        times = "1 evaluation" if best.n_since == 1 else f"{best.n_since} evaluations"
        self.on_event(
            Notice(f"stopped early after step {self.step}: no better {best.metric} in {times} since step {best.step}")
        )
        return True

    def _leave_artifact(self) -> Path:
        """The folder of the adapter or model: of the best step where the recipe says so, else of the last."""
        step, best = self.step, self.ledger.find_best()
        if self.recipe.takes_best and best and best.step != step:
            try:
                path = name_path(self.run, best.step)
                load_weights(self.world.on_main(lambda: read_checkpoint(path)), self.engine.model)
                step = best.step
            except FtcliError as error:
                why = str(error).partition("\n")[0]
                self.on_event(Notice(f"the best step, {best.step}, cannot be taken, so the last one is: {why}"))
        model, is_full = self.engine.model, self.recipe.peft is None
        weights = gather_weights(model, trained_only=not is_full) if is_sharded(model) else None

        def save() -> Path:
            artifact = save_artifact(self.run, self.prepared, self.engine.built, weights)
            update_manifest(self.run, artifact_step=step)
            return artifact

        return self.world.on_main(save)

    def _save(self, *, rotates: bool = True) -> None:
        """Nothing; the steps that were made are in a checkpoint, and their records on the disk."""
        if self.step == self.saved_step:
            return
        state = gather_state(self.engine.model, self.engine.optimizer, self.engine.accelerator.scaler)
        self.ledger.save(self.step, state, rotates=rotates)
        self.saved_step = self.step

    def _save_alone(self) -> None:
        """Nothing; the same where the other processes may be gone: nothing if each has only a part of the model."""
        if not is_sharded(self.engine.model):
            self._save()

    def _explain_stop(self, error: Interrupted) -> Interrupted:
        """The same interruption, after a checkpoint, saying how to go on; every process has come here."""
        self._save()
        self.world.wait()
        what = f"{error.what} after step {self.step} of {self.total_steps}, which is saved"
        hint = f"go on: {self.resume_command}"
        if not self.step:
            what = f"{error.what} before the first step"
        if self.run.holds_replaced():
            hint = f"{self.run.path} holds the run again that was to be replaced"
        return Interrupted(what, signal_number=self.stop.signal_number, hint=hint)

    def _explain_kill(self, error: Interrupted) -> Interrupted:
        """The interruption by a second signal, which nothing was saved after."""
        saved = f"step {self.saved_step} is saved" if self.saved_step else "no step is saved"
        what = f"{error.what} at once, in step {self.step + 1} of {self.total_steps}; {saved}"
        return Interrupted(what, signal_number=error.exit_code - 128, hint=f"go on: {self.resume_command}")

    def _explain_numbers(self, error: NumericError) -> NumericError:
        """The same error, recorded, with the last good step saved and named; older checkpoints stay as they are."""
        if isinstance(error.result, StepResult):
            self.ledger.record_step(error.result)
            with suppress(DiskError, NumericError):
                self._save(rotates=False)
        self.world.wait()
        path = name_path(self.run, self.saved_step)
        error.hint += f"; the last good checkpoint is {path}" if self.saved_step else "; no step is saved"
        return error

    def _check_memory(self, error: Exception, where: str) -> None:
        """None, unless memory ran out.

        Raises:
            MemoryExhausted: saying what would fit.
        """
        if is_memory_error(error):
            what, why = f"out of memory {where}", str(error).partition("\n")[0]
            raise explain_memory(self.forecast, self.recipe, self.available_bytes, what=what, why=why) from error


class _Clock:
    """Turns step results into events with the time that is left, from the mean of the steps so far."""

    def __init__(self, total_steps: int, start_rss_bytes: int, forecast: RunForecast | None) -> None:
        self.total_steps = total_steps
        self.start_bytes = 0 if torch.cuda.is_available() else start_rss_bytes
        self.forecast_bytes = forecast.forecast.total_bytes if forecast else 0
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
            memory_bytes=max(0, measure_memory() - self.start_bytes),
            forecast_bytes=self.forecast_bytes,
        )
