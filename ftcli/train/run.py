"""``ftcli train``: one recipe from its files to an adapter in a run folder.

    files → tokenizer → documents → model → eval ─▶ steps, checkpoints, evals ─▶ adapter/ ─▶ manifest: finished

Everything that can be wrong with recipe, data or names is found before the run folder is touched.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ftcli import __version__
from ftcli.data.chat import ChatRenderer
from ftcli.data.loader import DataSplit, DocumentSet, load_split
from ftcli.data.source import hash_files
from ftcli.data.tokenizer import hash_template, hash_tokenizer, load_tokenizer
from ftcli.errors import DiskError, FtcliError, Interrupted, MemoryExhausted, NumericError, UsageError
from ftcli.evaluate.generate import score_examples
from ftcli.evaluate.loss import compute_mean_loss
from ftcli.events import EvalDone, Notice, OnEvent, Progress, Saved, Stage, StepDone, ignore_event
from ftcli.model.attention import check_documents_apart
from ftcli.model.base import choose_device, choose_dtype
from ftcli.model.build import Built, build_model, check_names, count_parameters, save_adapter
from ftcli.recipe import LoadedRecipe, Recipe, compare_recipes, dump_recipe, load_recipe
from ftcli.store.file import staged_folder, write_text
from ftcli.store.run import (
    RunFolder,
    append_line,
    clear_run,
    cut_lines,
    locked,
    now_text,
    read_lines,
    seal_manifest,
    update_manifest,
)
from ftcli.store.target import ModelFiles, find_model, fingerprint_model
from ftcli.train.checkpoint import (
    Checkpoint,
    find_checkpoint,
    load_checkpoint,
    read_checkpoint,
    rotate_checkpoints,
    save_checkpoint,
)
from ftcli.train.loop import Plan, StepResult, plan_run, run_steps
from ftcli.train.memory import measure_memory, measure_peak
from ftcli.train.optim import build_optimizer
from ftcli.train.stop import StopRequest

# what may differ between a run and its resumption without changing a single number of it
_FREE_ON_RESUME = ("checkpoint.", "output_dir")


@dataclass(frozen=True)
class Prepared:
    """A run of which everything is known and checked, and nothing is written yet."""

    loaded: LoadedRecipe
    files: ModelFiles
    renderer: ChatRenderer
    split: DataSplit
    plan: Plan

    @property
    def recipe(self) -> Recipe:
        return self.loaded.recipe


def prepare_run(loaded: LoadedRecipe, on_event: OnEvent = ignore_event) -> Prepared:
    """The run that a recipe describes: files found, names checked, rows rendered, steps counted.

    Raises:
        FtcliError: anything wrong with recipe, model or data; nothing was written.
    """
    recipe = loaded.recipe
    on_event(Stage("model", recipe.model.name_or_path))
    files = find_model(recipe.model.name_or_path, revision=recipe.model.revision)
    check_names(recipe, files)
    tokenizer = load_tokenizer(
        files,
        chat_template=recipe.tokenizer.chat_template,
        trust_remote_code=recipe.model.trust_remote_code,
    )
    renderer = ChatRenderer(tokenizer, recipe.tokenizer.chat_template_kwargs)
    on_event(Stage("data", ", ".join(Path(section.path).name for section in recipe.datasets)))
    held_out = recipe.eval.datasets if recipe.eval else ()
    split = load_split(recipe.datasets, recipe.data, held_out, renderer, seed=recipe.train.seed)
    for part in (split.train, *split.held_out):
        for sentence in part.report.describe_losses():
            on_event(Notice(f"{part.name}: {sentence}"))
    plan = plan_run(recipe, [len(document.ids) for document in split.train.documents])
    return Prepared(loaded, files, renderer, split, plan)


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
        resume: go on from the newest sound checkpoint of ``output_dir``.
        resume_from: go on from exactly this checkpoint.
        overwrite: remove the run that ``output_dir`` holds.
        on_event: told of stages, steps, evaluations and what is saved.

    Raises:
        FtcliError: with the exit code of what happened; what was saved before is intact.
    """
    loaded = load_recipe(recipe_path, overrides=overrides)
    run = RunFolder(Path(loaded.recipe.output_dir))
    is_resumed = resume or resume_from is not None
    checkpoint = _find_start(run, loaded, resume, resume_from, overwrite, on_event) if is_resumed else None
    if not is_resumed:
        check_vacant(run, overwrite=overwrite)
    prepared = prepare_run(loaded, on_event)
    with locked(run), StopRequest() as stop:
        if not is_resumed:
            check_vacant(run, overwrite=overwrite)
            clear_run(run)
        _write_start(run, prepared, is_resumed=is_resumed)
        with _recorded(run):
            _execute(run, prepared, checkpoint, stop, on_event)
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


def _find_start(
    run: RunFolder,
    loaded: LoadedRecipe,
    resume: bool,
    resume_from: Path | None,
    overwrite: bool,
    on_event: OnEvent,
) -> Checkpoint:
    """The checkpoint to go on from, of a run with the same recipe."""
    if overwrite or (resume and resume_from):
        raise UsageError("--resume, --resume-from and --overwrite exclude each other")
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
    if resume_from is not None:
        return read_checkpoint(resume_from)
    checkpoint, damaged = find_checkpoint(run)
    for sentence in damaged:
        on_event(Notice(f"{sentence}; going on from {checkpoint.path.name}"))
    return checkpoint


def _write_start(run: RunFolder, prepared: Prepared, *, is_resumed: bool) -> None:
    recipe, loaded = prepared.recipe, prepared.loaded
    if is_resumed:
        update_manifest(run, state="running", finished_at=None)
        return
    write_text(run.recipe, dump_recipe(recipe, loaded.sources))
    update_manifest(
        run,
        state="running",
        started_at=now_text(),
        finished_at=None,
        versions=list_versions(),
        base={
            "id": recipe.model.name_or_path,
            "revision": prepared.files.revision,
            "fingerprint": fingerprint_model(prepared.files),
        },
        tokenizer_sha256=hash_tokenizer(prepared.renderer.tokenizer),
        template_sha256=hash_template(prepared.renderer.tokenizer),
        data_sha256=hash_files(prepared.split.files),
        parent=recipe.peft.adapter if recipe.peft else None,
        data={part.name: asdict(part.report) for part in (prepared.split.train, *prepared.split.held_out)},
        forecast=None,
        measured=None,
        verify=None,
        files={},
    )


@contextmanager
def _recorded(run: RunFolder) -> Iterator[None]:
    """A block whose end, however it comes, is written into the manifest's ``state``."""
    try:
        yield
    except BaseException as error:
        is_interrupted = isinstance(error, Interrupted | KeyboardInterrupt)
        with suppress(DiskError):  # the disk that is full is what is being reported
            update_manifest(run, state="interrupted" if is_interrupted else "failed", finished_at=now_text())
        if isinstance(error, FtcliError | KeyboardInterrupt) or not _is_memory_error(error):
            raise
        raise MemoryExhausted(
            "out of memory",
            why=str(error).splitlines()[0],
            hint="lower data.max_length or train.per_device_train_batch_size, set "
            "train.gradient_checkpointing: true, or add quantization: {load_in_4bit: true}",
        ) from error


def _is_memory_error(error: BaseException) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _execute(
    run: RunFolder, prepared: Prepared, checkpoint: Checkpoint | None, stop: StopRequest, on_event: OnEvent
) -> None:
    """Build, evaluate, step, save: the run itself."""
    from accelerate import Accelerator

    recipe, started = prepared.recipe, time.perf_counter()
    device = choose_device()
    dtype = choose_dtype(recipe.model.dtype, device)
    on_event(Stage("load", f"{str(dtype).removeprefix('torch.')} on {device.type}"))
    built = build_model(recipe, prepared.files, dtype=dtype, device=device)
    model = built.model
    check_documents_apart(model)
    counts = count_parameters(model)
    on_event(Stage("parameters", f"{counts.trainable:,} of {counts.total:,} are trained"))
    accelerator = Accelerator(mixed_precision=_choose_mixed_precision(recipe, dtype), cpu=device.type == "cpu")
    optimizer = build_optimizer(model, recipe.train)
    prepared_model, prepared_optimizer = accelerator.prepare(model, optimizer)
    first_step = 1
    if checkpoint:
        load_checkpoint(checkpoint, model, optimizer, scaler=accelerator.scaler)
        first_step = checkpoint.step + 1
        for path in (run.metrics, run.timing, run.eval):
            cut_lines(path, checkpoint.step)
    stop.check()

    evaluation = Evaluation(run, prepared, model, device, stop, on_event)
    if recipe.eval and not any(entry["step"] == 0 for entry in read_lines(run.eval)):
        evaluation.measure(0)
    on_event(Stage("train", f"{prepared.plan.total_steps} steps"))
    last_step = _run_loop(
        run, prepared, prepared_model, optimizer, prepared_optimizer, accelerator, first_step, stop, evaluation
    )
    if recipe.eval and not any(entry["step"] == last_step for entry in read_lines(run.eval)):
        evaluation.measure(last_step)
    artifact = save_artifact(run, prepared, built)
    on_event(Saved(str(artifact)))
    seal_manifest(
        run,
        artifact,
        state="finished",
        finished_at=now_text(),
        measured={
            "seconds": round(time.perf_counter() - started, 3),
            "peak_rss_bytes": measure_peak().rss_bytes,
            "peak_device_bytes": measure_peak().device_bytes,
            "trainable_parameters": counts.trainable,
            "parameters": counts.total,
        },
    )


def _run_loop(
    run: RunFolder,
    prepared: Prepared,
    model: Any,
    optimizer: torch.optim.Optimizer,
    prepared_optimizer: Any,
    accelerator: Any,
    first_step: int,
    stop: StopRequest,
    evaluation: Evaluation,
) -> int:
    """The number of the last step; steps are recorded, evaluated and saved as the recipe says."""
    recipe, total_steps = prepared.recipe, prepared.plan.total_steps
    saved_step, step = first_step - 1, first_step - 1
    clock = _Clock(total_steps)

    def save() -> None:
        nonlocal saved_step
        path = save_checkpoint(run, step, accelerator.unwrap_model(model), optimizer, scaler=accelerator.scaler)
        rotate_checkpoints(run, recipe.checkpoint.save_total_limit)
        saved_step = step
        evaluation.on_event(Saved(str(path)))

    steps = run_steps(
        recipe,
        prepared.split.train.documents,
        model,
        prepared_optimizer,
        accelerator,
        first_step=first_step,
        should_stop=lambda: bool(stop.signal_number),
    )
    try:
        for result in steps:
            step = result.step
            record_step(run, result)
            evaluation.on_event(clock.tick(result))
            if recipe.checkpoint.save_steps and step % recipe.checkpoint.save_steps == 0 and step < total_steps:
                save()
            if recipe.eval and recipe.eval.eval_steps and step % recipe.eval.eval_steps == 0:
                evaluation.measure(step)
        stop.check()
    except Interrupted as error:
        if step > saved_step:
            save()
        raise Interrupted(
            f"{error.what} after step {step} of {total_steps}, which is saved" if step else f"{error.what}",
            signal_number=stop.signal_number,
            hint=f"go on: ftcli train {prepared.loaded.path} --resume" if step else "",
        ) from None
    except NumericError as error:
        if isinstance(error.result, StepResult):
            record_step(run, error.result)
        error.hint += f"; the last checkpoint is of step {saved_step}" if saved_step else "; no checkpoint was made"
        raise
    return step


def record_step(run: RunFolder, result: StepResult) -> None:
    """Nothing; ``metrics.jsonl`` and ``timing.jsonl`` end with this step."""
    append_line(
        run.metrics,
        {
            "step": result.step,
            "epoch": round(result.epoch, 6),
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": result.lr,
            "n_target_tokens": result.n_target_tokens,
            "n_tokens": result.n_tokens,
            "rows": result.n_rows,
        },
    )
    seconds = max(result.seconds, 1e-9)
    append_line(
        run.timing,
        {
            "step": result.step,
            "seconds": round(seconds, 4),
            "tokens_per_second": round(result.n_tokens / seconds, 1),
            "memory_bytes": measure_memory(),
        },
    )


def save_artifact(run: RunFolder, prepared: Prepared, built: Built) -> Path:
    """``adapter/`` (LoRA) or ``model/`` (full fine-tuning), with tokenizer and template as they were trained."""
    model = built.model
    is_full = prepared.recipe.peft is None
    final = run.model if is_full else run.adapter
    with staged_folder(final) as folder:
        if is_full:
            model.generation_config = _mend_stop_tokens(model.generation_config, prepared.renderer)
            model.config.use_cache = True
            model.save_pretrained(str(folder))
        else:
            base = prepared.recipe.model.name_or_path
            save_adapter(model, folder, initial_lora=built.initial_lora, base=base)
        prepared.renderer.tokenizer.save_pretrained(str(folder))
    return final


def _mend_stop_tokens(generation_config: Any, renderer: ChatRenderer) -> Any:
    """The generation config with every token that ends a trained turn among its eos."""
    eos = generation_config.eos_token_id
    known = [] if eos is None else list(eos) if isinstance(eos, list) else [eos]
    if renderer.tokenizer.chat_template:
        known += [token for token in renderer.end_of_turn_ids if token not in known]
    generation_config.eos_token_id = known[0] if len(known) == 1 else known or None
    return generation_config


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


def list_versions() -> dict[str, str]:
    """Name → version of what decides a run's numbers."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    versions = {"ftcli": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "safetensors", "tokenizers"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions
