"""What an execution leaves in its run folder: lines, checkpoints, the best step. Process 0 alone writes it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from ftcli.events import Notice, OnEvent, Saved
from ftcli.recipe import Recipe
from ftcli.store.file import sync_file
from ftcli.store.run import RunFolder, cut_lines, read_manifest, update_manifest
from ftcli.train.best import Best, find_best
from ftcli.train.checkpoint import (
    Checkpoint,
    State,
    list_changed_records,
    remove_newer_checkpoints,
    rotate_checkpoints,
    save_checkpoint,
)
from ftcli.train.loop import StepResult
from ftcli.train.prepare import Prepared
from ftcli.train.record import record_step
from ftcli.train.world import World


def open_ledger(run: RunFolder, prepared: Prepared, world: World, on_event: OnEvent) -> Ledger:
    """The records of the run that was started in this folder."""
    entry = [world.on_main(lambda: read_manifest(run)["started_at"]), prepared.identity]
    origin = hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()
    return Ledger(run, prepared, world, on_event, origin)


@dataclass(frozen=True)
class Ledger:
    """The records of one run. Process 0 writes them, and all are told what it reads.

    ``origin`` is a hash that ties checkpoints to this run: when it was started, and from what.
    """

    run: RunFolder
    prepared: Prepared
    world: World
    on_event: OnEvent
    origin: str

    @property
    def recipe(self) -> Recipe:
        return self.prepared.recipe

    def go_back(self, checkpoint: Checkpoint | None) -> None:
        """Nothing; the records end where the checkpoint was made, or at the beginning."""
        self.world.on_main(lambda: self._go_back(checkpoint))

    def _go_back(self, checkpoint: Checkpoint | None) -> None:
        run, step = self.run, checkpoint.step if checkpoint else 0
        for path in remove_newer_checkpoints(run, step):
            self.on_event(Notice(f"{path} is not on the way from step {step}: removed"))
        for path in (run.metrics, run.timing, run.eval, run.prompts):
            cut_lines(path, step if checkpoint else -1)
        for path in run.samples.glob("*-*.jsonl"):
            digits = path.stem.rpartition("-")[2]
            if digits.isdecimal() and int(digits) > step:
                path.unlink()
        best = read_manifest(run).get("best")
        if best and best["step"] > step:
            update_manifest(run, best=None)
        self._record_best()
        for name in list_changed_records(checkpoint, run) if checkpoint else ():
            self.on_event(Notice(f"{run.path / name} is damaged: its lines are not those that the run wrote"))

    def record_step(self, result: StepResult) -> None:
        """Nothing; ``metrics.jsonl`` and ``timing.jsonl`` end with this step."""
        if self.world.is_main:
            record_step(self.run, result)

    def save(self, step: int, state: State, *, rotates: bool = True) -> None:
        """Nothing; ``state`` is in a checkpoint, and the records of its steps on the disk."""
        if not self.world.is_main:
            return
        for path in (self.run.metrics, self.run.timing, self.run.eval):
            if path.exists():
                sync_file(path)
        path = save_checkpoint(self.run, step, state, origin=self.origin)
        if rotates:
            self.rotate()
        self.on_event(Saved(str(path)))

    def find_best(self) -> Best | None:
        """The best step so far."""
        return self.world.on_main(lambda: find_best(self.run, self.recipe.eval))

    def record_best(self) -> None:
        """Nothing; the manifest names the best step, and the one that was best before may go."""
        self.world.on_main(self._record_best)

    def _record_best(self) -> None:
        best = find_best(self.run, self.recipe.eval)
        entry = {"step": best.step, "metric": best.metric, "value": best.value} if best else None
        if entry != read_manifest(self.run).get("best"):
            update_manifest(self.run, best=entry)
            self.rotate()

    def rotate(self) -> None:
        """Nothing; no more checkpoints lie here than the recipe allows."""
        if self.world.is_main:
            best = find_best(self.run, self.recipe.eval)
            limit = self.recipe.checkpoint.save_total_limit
            rotate_checkpoints(self.run, limit, best_step=best.step if best else None)
