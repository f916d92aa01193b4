"""``ftcli train``: one recipe from its files to an adapter in a run folder.

    files → tokenizer → documents → model → longest batch → eval ─▶ steps, checkpoints, evals ─▶ adapter/ ─▶ finished

Everything that can be wrong with recipe, data or names is found before the run folder is touched, and a run that
is to be replaced is only removed when the new one has its model.
"""

from __future__ import annotations

import shlex
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
from ftcli.train.change import CHOOSES_ARTIFACT, Change, list_changes
from ftcli.train.checkpoint import Checkpoint, find_checkpoint, read_checkpoint
from ftcli.train.execution import Execution
from ftcli.train.forecast import forecast_run
from ftcli.train.memory import measure_available
from ftcli.train.prepare import check_inputs_outside, prepare_run
from ftcli.train.record import check_inputs, recorded, write_restart, write_start
from ftcli.train.stop import StopRequest


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
    run = RunFolder(Path(loaded.recipe.output_dir).expanduser())
    check_name(run.path)
    words = ["ftcli", "train", str(recipe_path), *(f"--set={text}" for text in overrides), "--resume"]
    command = shlex.join(words)
    with StopRequest() as stop:
        recover(run)
        try:
            if resume or resume_from:
                _go_on(run, loaded, resume_from, stop, on_event, command)
            else:
                _start(run, loaded, overwrite, stop, on_event, command)
        except Exception as error:
            if not is_memory_error(error):
                raise
            raise MemoryExhausted(
                "out of memory while the run was prepared",
                why=f"{str(error).partition(chr(10))[0]}\n  {measure_available() / 1e6:,.0f} MB are available",
                hint="raise the limit (ulimit -v, the container's), or end what else runs here",
            ) from error
    return run


def _start(
    run: RunFolder, loaded: LoadedRecipe, overwrite: bool, stop: StopRequest, on_event: OnEvent, command: str
) -> None:
    """Nothing; the run folder holds the finished run, begun anew."""
    check_vacant(run, overwrite=overwrite)
    check_inputs_outside(loaded, run.path)
    prepared = prepare_run(loaded, on_event)
    forecast = forecast_run(prepared)
    with locked(run):
        check_vacant(run, overwrite=overwrite)
        set_aside(run)
        try:
            write_start(run, prepared, forecast)
            with recorded(run):
                Execution(run, prepared, forecast, stop, on_event, command).run_all(None)
        except BaseException:
            restore_replaced(run)
            raise


def _go_on(
    run: RunFolder,
    loaded: LoadedRecipe,
    resume_from: Path | None,
    stop: StopRequest,
    on_event: OnEvent,
    command: str,
) -> None:
    """Nothing; the run folder holds the finished run, which went on from a checkpoint, or from its beginning."""
    if run.is_damaged():
        raise _explain_damage(run)
    if not run.holds_run():
        raise UsageError(
            "nothing to resume: there is no run in output_dir", where=str(run.path), hint="train without --resume"
        )
    with locked(run):
        manifest = _read_start(run)
        checkpoint = _choose_checkpoint(run, resume_from, on_event)
        changes = check_changes(run, loaded, next_step=checkpoint.step + 1 if checkpoint else 1)
        is_finished = manifest["state"] == "finished" and resume_from is None and _is_whole(run, on_event)
        if is_finished and not any(change.kind == "course" for change in changes):
            unused = f"; {', '.join(change.key for change in changes)} would change nothing now" if changes else ""
            on_event(Notice(f"{run.path} is finished: nothing is left to train{unused}"))
            return
        for change in changes:
            on_event(Notice(str(change)))
        if run.recipe.exists() and manifest.get("recipe_sha256") not in (None, hash_file(run.recipe)):
            on_event(Notice(f"{run.recipe} is not what the run wrote: what differs may have been changed there"))
        prepared = prepare_run(
            loaded,
            on_event,
            revision=loaded.recipe.model.revision or manifest["base"]["revision"],
            template_date=manifest.get("template_date"),
        )
        check_inputs(run, prepared.inputs)
        made = checkpoint.step if checkpoint else 0
        is_done = is_finished and not any(change.key in CHOOSES_ARTIFACT for change in changes)
        if made > prepared.plan.total_steps or (is_done and made == prepared.plan.total_steps):
            raise UsageError(
                f"nothing to resume: {made} steps are made, and the recipe asks for {prepared.plan.total_steps}",
                where=str(run.path),
                hint="raise train.num_train_epochs or train.max_steps",
            )
        forecast = forecast_run(prepared)
        write_restart(run, prepared, changes, step=made)
        with recorded(run):
            Execution(run, prepared, forecast, stop, on_event, command).run_all(checkpoint)


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


def check_changes(run: RunFolder, loaded: LoadedRecipe, *, next_step: int) -> list[Change]:
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
    changes = list_changes(load_recipe(run.recipe).recipe, loaded.recipe, next_step=next_step)
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
