"""``ftcli train``: one recipe from its files to an adapter in a run folder.

    files → tokenizer → documents → model → longest batch → eval ─▶ steps, checkpoints, evals ─▶ adapter/ ─▶ finished

Everything that can be wrong with recipe, data or names is found before the run folder is touched, and a run that
is to be replaced is only removed when the new one has its model.
"""

from __future__ import annotations

import shlex
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftcli.errors import ContentError, MemoryExhausted, UsageError, is_memory_error
from ftcli.events import Notice, OnEvent, ignore_event
from ftcli.recipe import LoadedRecipe, load_recipe
from ftcli.store.file import explain_disk_error, hash_file
from ftcli.store.run import (
    RunFolder,
    check_files,
    locked,
    read_lines,
    read_manifest,
    recover,
    restore_replaced,
    set_aside,
)
from ftcli.train.card import write_card
from ftcli.train.change import CHOOSES_ARTIFACT, Change, list_changes
from ftcli.train.checkpoint import Checkpoint, find_checkpoint, read_checkpoint
from ftcli.train.execution import Execution
from ftcli.train.forecast import RunForecast, forecast_run
from ftcli.train.memory import measure_available
from ftcli.train.prepare import Prepared, check_inputs_outside, prepare_run
from ftcli.train.record import check_inputs, recorded, write_restart, write_start
from ftcli.train.report import write_report
from ftcli.train.stop import StopRequest
from ftcli.train.world import World, joined_world


def train(
    recipe_path: Path,
    *,
    overrides: tuple[str, ...] = (),
    resume: bool = False,
    resume_from: Path | None = None,
    overwrite: bool = False,
    should_report: bool = False,
    on_event: OnEvent = ignore_event,
) -> RunFolder:
    """The folder of the finished run that ``recipe_path`` describes.

    Args:
        recipe_path: the YAML file.
        overrides: ``key=value`` pairs laid over it, as ``--set``.
        resume: go on from the newest sound checkpoint of ``output_dir``; a finished run is left as it is.
        resume_from: go on from exactly this checkpoint.
        overwrite: remove the run that ``output_dir`` holds.
        should_report: also leave a model card and ``report.html``, however the run ends.
        on_event: told of stages, steps, evaluations and what is saved.

    Raises:
        FtcliError: with the exit code of what happened; what was saved before is intact.
    """
    if sum((resume, resume_from is not None, overwrite)) > 1:
        raise UsageError("--resume, --resume-from and --overwrite exclude each other")
    words = ["ftcli", "train", str(recipe_path), *(f"--set={text}" for text in overrides)]
    with joined_world() as world, StopRequest() as stop:
        loaded = load_recipe(recipe_path, overrides=overrides)
        run = RunFolder(Path(loaded.recipe.output_dir).expanduser())
        check_name(run.path)
        told = on_event if world.is_main else ignore_event
        job = _Job(run, loaded, world, stop, told, _name_resumption(words, world), should_report)
        world.on_main(lambda: recover(run))
        try:
            if resume or resume_from:
                _go_on(job, resume_from)
            else:
                _start(job, overwrite=overwrite)
        except Exception as error:
            if not is_memory_error(error):
                raise
            raise MemoryExhausted(
                "out of memory while the run was prepared",
                why=f"{str(error).partition(chr(10))[0]}\n  {measure_available() / 1e6:,.0f} MB are available",
                hint="raise the limit (ulimit -v, the container's), or end what else runs here",
            ) from error
    return run


def _name_resumption(words: list[str], world: World) -> str:
    """What a person types to go on with a run that was stopped."""
    if world.size == 1:
        return shlex.join([*words, "--resume"])
    if world.n_local == world.size:
        return shlex.join([*words, "--nproc", str(world.size), "--resume"])
    return "the same command on every machine, with --resume"


@dataclass(frozen=True)
class _Job:
    """What this process was asked to do: a recipe, where its run lies, and with whom it works."""

    run: RunFolder
    loaded: LoadedRecipe
    world: World
    stop: StopRequest
    on_event: OnEvent
    resume_command: str
    should_report: bool

    def prepare(self, **inputs: Any) -> Prepared:
        """The run with everything known of it; process 0 reads first, so that the others find its cache."""
        with self.world.main_first():
            return prepare_run(self.loaded, self.on_event, n_processes=self.world.size, **inputs)

    def on_main(self, block: AbstractContextManager[None]) -> AbstractContextManager[None]:
        """``block`` in process 0, where alone it is entered."""
        return block if self.world.is_main else nullcontext()

    def execute(self, prepared: Prepared, forecast: RunForecast | None, checkpoint: Checkpoint | None) -> None:
        """Nothing; the run folder, which says that the run is under way, holds the finished run."""
        run = Execution(self.run, prepared, forecast, self.stop, self.on_event, self.resume_command, self.world)
        try:
            with self.on_main(recorded(self.run)):
                run.run_all(checkpoint)
        finally:
            if self.should_report and self.world.is_main:
                self._report()

    def _report(self) -> None:
        """Nothing; the folder shows what has become of the run; that it cannot is told, and is no failure."""
        try:
            write_card(self.run)
            write_report(self.run)
        except Exception as error:
            self.on_event(Notice(f"there is no report: {str(error).partition(chr(10))[0]}"))


def _start(job: _Job, *, overwrite: bool) -> None:
    """Nothing; the run folder holds the finished run, begun anew."""
    run, world = job.run, job.world
    world.on_main(lambda: check_vacant(run, overwrite=overwrite))
    check_inputs_outside(job.loaded, run.path)
    prepared = job.prepare()
    forecast = forecast_run(prepared)
    with job.on_main(locked(run)):
        world.on_main(lambda: _begin(run, overwrite=overwrite))
        try:
            world.on_main(lambda: write_start(run, prepared, forecast))
            job.execute(prepared, forecast, None)
        except BaseException:
            if world.is_main:
                restore_replaced(run)
            raise


def _begin(run: RunFolder, *, overwrite: bool) -> None:
    """Nothing; the folder is empty, and what lay there is set aside."""
    check_vacant(run, overwrite=overwrite)
    set_aside(run)


def _go_on(job: _Job, resume_from: Path | None) -> None:
    """Nothing; the run folder holds the finished run, which went on from a checkpoint, or from its beginning."""
    run, world = job.run, job.world
    if world.on_main(run.is_damaged):
        raise _explain_damage(run)
    if not world.on_main(run.holds_run):
        raise UsageError(
            "nothing to resume: there is no run in output_dir", where=str(run.path), hint="train without --resume"
        )
    with job.on_main(locked(run)):
        past = world.on_main(lambda: _look_back(job, resume_from))
        if past is None:
            return
        made = past.checkpoint.step if past.checkpoint else 0
        prepared = job.prepare(
            revision=job.loaded.recipe.model.revision or past.manifest["base"]["revision"],
            template_date=past.manifest.get("template_date"),
        )
        world.on_main(lambda: check_inputs(run, prepared.inputs))
        is_done = past.is_finished and not any(change.key in CHOOSES_ARTIFACT for change in past.changes)
        if made > prepared.plan.total_steps or (is_done and made == prepared.plan.total_steps):
            raise UsageError(
                f"nothing to resume: {made} steps are made, and the recipe asks for {prepared.plan.total_steps}",
                where=str(run.path),
                hint="raise train.num_train_epochs or train.max_steps",
            )
        forecast = forecast_run(prepared)
        world.on_main(lambda: write_restart(run, prepared, past.changes, step=made))
        job.execute(prepared, forecast, past.checkpoint)


@dataclass(frozen=True)
class _Past:
    """What a run to be gone on with has been so far."""

    manifest: dict[str, Any]
    checkpoint: Checkpoint | None
    changes: list[Change]
    is_finished: bool


def _look_back(job: _Job, resume_from: Path | None) -> _Past | None:
    """The past of the run; None if it is finished, and nothing is left to do.

    Raises:
        FtcliError: it cannot be gone on with.
    """
    run, on_event = job.run, job.on_event
    manifest = _read_start(run)
    checkpoint = _choose_checkpoint(run, resume_from, on_event)
    processes = int(manifest.get("processes", 1)), job.world.size
    changes = check_changes(run, job.loaded, next_step=checkpoint.step + 1 if checkpoint else 1, processes=processes)
    is_finished = manifest["state"] == "finished" and resume_from is None and _is_whole(run, on_event)
    if is_finished and not any(change.kind == "course" for change in changes):
        unused = f"; {', '.join(change.key for change in changes)} would change nothing now" if changes else ""
        on_event(Notice(f"{run.path} is finished: nothing is left to train{unused}"))
        return None
    for change in changes:
        on_event(Notice(str(change)))
    if run.recipe.exists() and manifest.get("recipe_sha256") not in (None, hash_file(run.recipe)):
        on_event(Notice(f"{run.recipe} is not what the run wrote: what differs may have been changed there"))
    return _Past(manifest, checkpoint, changes, is_finished)


def check_name(path: Path) -> None:
    """None if a folder may have this name.

    Raises:
        UsageError: the system knows no such names, or it is a link to nothing.
        DiskError: the system does not let us look.
    """
    try:
        path.stat()
    except FileNotFoundError as error:
        if path.is_symlink():
            raise UsageError("output_dir is a link to nothing", where=str(path), hint="mend the link") from error
    except ValueError as error:
        raise UsageError(f"output_dir is no name for a folder: {error}", hint="choose another output_dir") from error
    except OSError as error:
        raise explain_disk_error(error, path) from error


def check_vacant(run: RunFolder, *, overwrite: bool) -> None:
    """None if a new run may use this folder.

    Raises:
        UsageError: it holds a run, or files that are not ftcli's.
    """
    if run.path.exists() and not run.path.is_dir():
        raise UsageError("output_dir is a file", where=str(run.path), hint="choose another output_dir")
    if run.holds_run() or run.is_damaged():
        if not overwrite and run.holds_results():
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


def _read_start(run: RunFolder) -> dict[str, Any]:
    """The manifest of a run that was begun.

    Raises:
        ContentError: it lacks something that it was begun with.
    """
    manifest = read_manifest(run)
    base = manifest.get("base")
    needed = ("started_at", "tokenizer_sha256", "template_sha256", "data_sha256", "template_date")
    if not isinstance(base, dict) or not {"id", "revision", "fingerprint"} <= base.keys():
        raise _explain_damage(run)
    can_be_null = ("template_sha256", "template_date")
    if any(not isinstance(manifest.get(key), str) for key in needed if key not in can_be_null or manifest.get(key)):
        raise _explain_damage(run)
    return manifest


def _is_whole(run: RunFolder, on_event: OnEvent) -> bool:
    """Whether the artifact of a finished run is as it was left; if not, it is made again from the last checkpoint."""
    try:
        check_files(run)
    except ContentError as error:
        on_event(Notice(f"{str(error).partition(chr(10))[0]}; it is made again"))
        return False
    return True


def _explain_damage(run: RunFolder) -> ContentError:
    return ContentError(
        "manifest.json is missing or damaged",
        where=str(run.path),
        why="without it checkpoints cannot be told from those of another run",
        hint="restore the file, or start anew with --overwrite",
    )


def check_changes(
    run: RunFolder, loaded: LoadedRecipe, *, next_step: int, processes: tuple[int, int] = (1, 1)
) -> list[Change]:
    """What the recipe says otherwise than the one that the run was made with so far, all of it possible.

    Raises:
        UsageError: something differs that the steps made so far cannot be gone on with.
    """
    if not run.recipe.exists() and run.holds_results():
        raise ContentError(
            "recipe.yaml of the run is missing",
            where=str(run.path),
            why="without it nothing says whether the steps to come belong to the steps that were made",
            hint="restore the file, or start anew with --overwrite",
        )
    if not run.recipe.exists():  # killed in its first moment
        return []
    changes = list_changes(load_recipe(run.recipe).recipe, loaded.recipe, next_step=next_step, processes=processes)
    if foreign := [change for change in changes if change.kind == "foreign"]:
        raise UsageError(
            "the recipe is not the one that the run was started with:\n"
            + "\n".join(f"  {change}" for change in foreign),
            where=str(loaded.path),
            hint="undo the change, or start a run of its own with another output_dir",
        )
    return changes


def _choose_checkpoint(run: RunFolder, resume_from: Path | None, on_event: OnEvent) -> Checkpoint | None:
    """The checkpoint to go on from; None for a run that was stopped before its first one."""
    if resume_from is not None:
        return read_checkpoint(resume_from)
    checkpoint, damaged = find_checkpoint(run)
    for sentence in damaged:
        on_event(Notice(f"{sentence}; going on from {checkpoint.path.name if checkpoint else 'the beginning'}"))
    if checkpoint is None:
        _check_none_lost(run)
        on_event(Notice("the run was stopped before its first checkpoint: it begins at step 1"))
    return checkpoint


def _check_none_lost(run: RunFolder) -> None:
    save_steps = load_recipe(run.recipe).recipe.checkpoint.save_steps if run.recipe.exists() else None
    made = max((entry["step"] for entry in read_lines(run.metrics)), default=0)
    if save_steps and made > save_steps:
        raise UsageError(
            f"nothing to resume: {made} steps were made, and the run has no checkpoint",
            where=str(run.checkpoints),
            hint="restore the folder, or start anew with --overwrite",
        )
