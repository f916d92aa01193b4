"""``ftcli train``: one recipe from its files to an adapter in a run folder.

    files → tokenizer → documents → model → eval ─▶ steps, checkpoints, evals ─▶ adapter/ ─▶ manifest: finished

Everything that can be wrong with recipe, data or names is found before the run folder is touched, and a run that
is to be replaced is only removed when the new one has its model.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from ftcli.errors import UsageError
from ftcli.events import Notice, OnEvent, ignore_event
from ftcli.recipe import LoadedRecipe, compare_recipes, load_recipe
from ftcli.store.run import RunFolder, locked, read_manifest, restore_replaced, set_aside
from ftcli.train.checkpoint import Checkpoint, find_checkpoint, read_checkpoint
from ftcli.train.execution import Execution
from ftcli.train.prepare import check_inputs_outside, prepare_run
from ftcli.train.record import check_inputs, recorded, write_start
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
    checkpoint, revision, template_date = None, loaded.recipe.model.revision, None
    if resume or resume_from:
        check_same_recipe(run, loaded)
        manifest = read_manifest(run)
        if resume and manifest["state"] == "finished":
            on_event(Notice(f"{run.path} is finished: nothing is left to train"))
            return run
        checkpoint = _choose_checkpoint(run, resume_from, on_event)
        revision = revision or manifest["base"]["revision"]
        template_date = manifest.get("template_date")
    else:
        check_vacant(run, overwrite=overwrite)
        check_inputs_outside(loaded.recipe, run.path)
    prepared = prepare_run(loaded, on_event, revision=revision, template_date=template_date)
    words = ["ftcli", "train", str(recipe_path), *(f"--set={text}" for text in overrides), "--resume"]
    with locked(run), StopRequest() as stop:
        if checkpoint is None:
            check_vacant(run, overwrite=overwrite)
            set_aside(run)
        else:
            check_inputs(run, prepared.inputs)
        try:
            write_start(run, prepared, is_resumed=checkpoint is not None)
            with recorded(run):
                Execution(run, prepared, stop, on_event, shlex.join(words)).run_all(checkpoint)
        except BaseException:
            restore_replaced(run)
            raise
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
