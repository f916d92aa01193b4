"""``ftcli train``: one recipe from its files to an adapter in a run folder.

    files → tokenizer → documents → model → eval ─▶ steps, checkpoints, evals ─▶ adapter/ ─▶ manifest: finished

Everything that can be wrong with recipe, data or names is found before the run folder is touched.
"""

from __future__ import annotations

import shlex
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from ftcli.errors import Interrupted, NumericError, UsageError
from ftcli.events import Notice, OnEvent, Saved, Stage, StepDone, ignore_event
from ftcli.model.attention import check_documents_apart
from ftcli.model.base import choose_device, choose_dtype
from ftcli.model.build import Built, TrainableCount, build_model, count_parameters
from ftcli.recipe import LoadedRecipe, Recipe, compare_recipes, load_recipe
from ftcli.store.run import (
    RunFolder,
    clear_run,
    cut_lines,
    locked,
    now_text,
    read_lines,
    read_manifest,
    seal_manifest,
)
from ftcli.train.artifact import save_artifact
from ftcli.train.checkpoint import (
    Checkpoint,
    find_checkpoint,
    load_checkpoint,
    read_checkpoint,
    rotate_checkpoints,
    save_checkpoint,
)
from ftcli.train.evaluation import Evaluation
from ftcli.train.loop import StepResult, run_steps
from ftcli.train.memory import measure_peak
from ftcli.train.optim import build_optimizer
from ftcli.train.prepare import Prepared, prepare_run
from ftcli.train.record import record_step, recorded, write_start
from ftcli.train.stop import StopRequest

# what may differ between a run and its resumption without changing a single number of it
_FREE_ON_RESUME = ("checkpoint.", "output_dir")


def train(
    recipe_path: Path,
    *,
    overrides: tuple[str, ...] = (),
    resume: bool = False,
    resume_from: Path | None = None,
    overwrite: bool = False,
    on_event: OnEvent = ignore_event,
) -> RunFolder:
    """The folder of the finished run that ``recipe_path`` describes.

    Args:
        recipe_path: the YAML file.
        overrides: ``key=value`` pairs laid over it, as ``--set``.
        resume: go on from the newest sound checkpoint of ``output_dir``; a finished run is left as it is.
        resume_from: go on from exactly this checkpoint.
        overwrite: remove the run that ``output_dir`` holds.
        on_event: told of stages, steps, evaluations and what is saved.

    Raises:
        FtcliError: with the exit code of what happened; what was saved before is intact.
    """
    if sum((resume, resume_from is not None, overwrite)) > 1:
        raise UsageError("--resume, --resume-from and --overwrite exclude each other")
    loaded = load_recipe(recipe_path, overrides=overrides)
    run = RunFolder(Path(loaded.recipe.output_dir))
    checkpoint = None
    if resume or resume_from:
        check_same_recipe(run, loaded)
        if resume and read_manifest(run)["state"] == "finished":
            on_event(Notice(f"{run.path} is finished: nothing is left to train"))
            return run
        checkpoint = _choose_checkpoint(run, resume_from, on_event)
    else:
        check_vacant(run, overwrite=overwrite)
    prepared = prepare_run(loaded, on_event)
    with locked(run), StopRequest() as stop:
        if checkpoint is None:
            check_vacant(run, overwrite=overwrite)
            clear_run(run)
        write_start(run, prepared, is_resumed=checkpoint is not None)
        with recorded(run):
            words = ["ftcli", "train", str(recipe_path), *(f"--set={text}" for text in overrides), "--resume"]
            _Execution(run, prepared, stop, on_event, shlex.join(words)).run_all(checkpoint)
    return run


def check_vacant(run: RunFolder, *, overwrite: bool) -> None:
    """None if a new run may use this folder.

    Raises:
        UsageError: it holds a run, or files that are not ftcli's.
    """
    if run.path.exists() and not run.path.is_dir():
        raise UsageError("output_dir is a file", where=str(run.path), hint="choose another output_dir")
    if run.holds_run():
        if not overwrite:
            raise UsageError(
                "output_dir holds a run already",
                where=str(run.path),
                hint="go on with it: --resume; replace it: --overwrite; or set another output_dir",
            )
    elif run.path.is_dir() and any(entry.name != ".lock" for entry in run.path.iterdir()):
        raise UsageError(
            "output_dir holds files that are no run of ftcli",
            where=str(run.path),
            hint="choose another output_dir",
        )


def check_same_recipe(run: RunFolder, loaded: LoadedRecipe) -> None:
    """None if ``run`` was started with the recipe that is to go on.

    Raises:
        UsageError: there is no run, or the recipe differs in something that decides its numbers.
    """
    if not run.holds_run():
        raise UsageError(
            "nothing to resume: there is no run in output_dir", where=str(run.path), hint="train without --resume"
        )
    before = load_recipe(run.recipe).recipe
    changed = [
        (key, old, new)
        for key, old, new in compare_recipes(before, loaded.recipe)
        if not key.startswith(_FREE_ON_RESUME)
    ]
    if changed:
        lines = "; ".join(f"{key} was {old!r}, now {new!r}" for key, old, new in changed)
        raise UsageError(
            f"the recipe is not the one that the run was started with: {lines}",
            where=str(loaded.path),
            why="the steps to come would not belong to the steps that were made",
            hint="undo the change, or start a run of its own with another output_dir",
        )


def _choose_checkpoint(run: RunFolder, resume_from: Path | None, on_event: OnEvent) -> Checkpoint:
    if resume_from is not None:
        return read_checkpoint(resume_from)
    checkpoint, damaged = find_checkpoint(run)
    for sentence in damaged:
        on_event(Notice(f"{sentence}; going on from {checkpoint.path.name}"))
    return checkpoint


@dataclass
class _Execution:
    """A run under way: build, evaluate, step, save."""

    run: RunFolder
    prepared: Prepared
    stop: StopRequest
    on_event: OnEvent
    resume_command: str
    step: int = 0
    saved_step: int = 0

    @property
    def recipe(self) -> Recipe:
        return self.prepared.recipe

    def run_all(self, checkpoint: Checkpoint | None) -> None:
        """Nothing; the run folder holds the finished run."""
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState

        started = time.perf_counter()
        device = choose_device()
        dtype = choose_dtype(self.recipe.model.dtype, device)
        self.on_event(Stage("load", f"{str(dtype).removeprefix('torch.')} on {device.type}"))
        built = build_model(
            self.recipe, self.prepared.files, dtype=dtype, device=device, new_tokens=self.prepared.new_tokens
        )
        check_documents_apart(built.model)
        counts = count_parameters(built.model)
        self.on_event(Stage("parameters", f"{counts.trainable:,} of {counts.total:,} are trained"))
        mixed_precision = _choose_mixed_precision(self.recipe, dtype)
        AcceleratorState._reset_state()  # or a second run in this process could not choose another precision
        self.accelerator = Accelerator(mixed_precision=mixed_precision, cpu=device.type == "cpu")
        self.optimizer = build_optimizer(built.model, self.recipe.train)
        self.model = built.model
        if checkpoint:
            self._restore(checkpoint)
        self.evaluation = Evaluation(self.run, self.prepared, built.model, device, self.stop, self.on_event)
        try:
            self.stop.check()
            self._evaluate_once(self.step)
            self._run_steps()
            self._evaluate_once(self.step)
        except Interrupted as error:
            raise self._explain_stop(error) from None
        self._finish(built, counts, started)

    def _restore(self, checkpoint: Checkpoint) -> None:
        load_checkpoint(checkpoint, self.model, self.optimizer, scaler=self.accelerator.scaler)
        self.step = self.saved_step = checkpoint.step
        for path in (self.run.metrics, self.run.timing, self.run.eval):
            cut_lines(path, checkpoint.step)

    def _evaluate_once(self, step: int) -> None:
        """Before the first step and after the last, unless that was done already."""
        is_edge = step in (0, self.prepared.plan.total_steps)
        if (
            self.prepared.split.held_out
            and is_edge
            and all(entry["step"] != step for entry in read_lines(self.run.eval))
        ):
            self.evaluation.measure(step)

    def _run_steps(self) -> None:
        """Nothing; every step is made, recorded, evaluated and saved as the recipe says.

        Raises:
            Interrupted: a signal came; the step that it came in is finished.
            NumericError: the steps went out of bounds; the message names the last checkpoint.
        """
        total_steps = self.prepared.plan.total_steps
        self.on_event(Stage("train", f"{total_steps} steps"))
        model, optimizer = self.accelerator.prepare(self.model, self.optimizer)
        clock = _Clock(total_steps)
        steps = run_steps(
            self.recipe,
            self.prepared.split.train.documents,
            model,
            optimizer,
            self.accelerator,
            first_step=self.step + 1,
            should_stop=lambda: bool(self.stop.signal_number),
        )
        try:
            for result in steps:
                self.step = result.step
                record_step(self.run, result)
                self.on_event(clock.tick(result))
                self._save_and_evaluate()
            self.stop.check()
        except NumericError as error:
            if isinstance(error.result, StepResult):
                record_step(self.run, error.result)
            last = f"the last checkpoint is of step {self.saved_step}" if self.saved_step else "no checkpoint was made"
            error.hint += f"; {last}"
            raise

    def _save_and_evaluate(self) -> None:
        save_steps = self.recipe.checkpoint.save_steps
        if save_steps and self.step % save_steps == 0 and self.step < self.prepared.plan.total_steps:
            self._save()
        if self.recipe.eval and self.recipe.eval.eval_steps and self.step % self.recipe.eval.eval_steps == 0:
            self.evaluation.measure(self.step)

    def _save(self) -> None:
        path = save_checkpoint(self.run, self.step, self.model, self.optimizer, scaler=self.accelerator.scaler)
        rotate_checkpoints(self.run, self.recipe.checkpoint.save_total_limit)
        self.saved_step = self.step
        self.on_event(Saved(str(path)))

    def _explain_stop(self, error: Interrupted) -> Interrupted:
        """The same interruption, after a checkpoint, saying how to go on."""
        if self.step > self.saved_step:
            self._save()
        what = f"{error.what} after step {self.step} of {self.prepared.plan.total_steps}, which is saved"
        hint = f"go on: {self.resume_command}"
        if not self.step:
            what, hint = f"{error.what} before the first step", ""
        return Interrupted(what, signal_number=self.stop.signal_number, hint=hint)

    def _finish(self, built: Built, counts: TrainableCount, started: float) -> None:
        artifact = save_artifact(self.run, self.prepared, built)
        self.on_event(Saved(str(artifact)))
        peak = measure_peak()
        seal_manifest(
            self.run,
            artifact,
            state="finished",
            finished_at=now_text(),
            measured={
                "seconds": round(time.perf_counter() - started, 3),
                "peak_rss_bytes": peak.rss_bytes,
                "peak_device_bytes": peak.device_bytes,
                "trainable_parameters": counts.trainable,
                "parameters": counts.total,
            },
        )


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


def _choose_mixed_precision(recipe: Recipe, dtype: torch.dtype) -> str:
    """What accelerate casts: full fine-tuning keeps float32 weights under autocast; float16 needs its scaler.

    LoRA on bfloat16 needs no autocast: PEFT keeps its own weights in float32 and casts around them.
    """
    if dtype is torch.float16:
        return "fp16"
    return "bf16" if recipe.peft is None and dtype is torch.bfloat16 else "no"
