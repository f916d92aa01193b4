"""A run folder: its paths, its manifest, its lock, and how a finished one is found again.

runs/NAME/
    recipe.yaml  manifest.json  metrics.jsonl  timing.jsonl  eval.jsonl  samples/
    checkpoints/step-000200/    adapter/ (LoRA) or model/ (full fine-tuning)
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ftcli.errors import ContentError, DiskError, UsageError
from ftcli.store.file import describe_files, disk_errors, hash_file, remove_folder, sync_folder, write_json, write_text

MANIFEST_SCHEMA = 1
STATES = ("running", "finished", "interrupted", "failed")
_LOCK = ".lock"
_REPLACED = ".replaced"  # the whole run that --overwrite replaces, until the new one is known to start
_MOVING = ".moving"  # the part of the only run that is being set aside, or brought back


@dataclass(frozen=True)
class RunFolder:
    """The names inside one run folder."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def manifest(self) -> Path:
        return self.path / "manifest.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def timing(self) -> Path:
        return self.path / "timing.jsonl"

    @property
    def eval(self) -> Path:
        return self.path / "eval.jsonl"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def prompts(self) -> Path:
        """The answers to ``eval.sample_prompts``."""
        return self.samples / "prompts.jsonl"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def card(self) -> Path:
        return self.path / "README.md"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def artifact(self) -> Path:
        """What the run has trained: ``adapter/``, or ``model/`` for full fine-tuning."""
        return self.model if self.model.exists() else self.adapter

    def holds_run(self) -> bool:
        """Whether ftcli made this folder: another program's ``manifest.json`` is not taken for a run's."""
        try:
            entry = json.loads(self.manifest.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return isinstance(entry, dict) and "schema" in entry and entry.get("state") in STATES

    def holds_results(self) -> bool:
        """Whether a step was made here, or something trained lies here."""
        folders = (self.checkpoints, self.adapter, self.model)
        has_steps = self.metrics.is_file() and self.metrics.stat().st_size > 0
        return has_steps or any(folder.is_dir() and any(folder.iterdir()) for folder in folders)

    def holds_replaced(self) -> bool:
        """Whether a run is set aside here, which comes back unless it is discarded."""
        return (self.path / _REPLACED).exists()

    def is_damaged(self) -> bool:
        """Whether ftcli made this folder, but its manifest is gone or cannot be read."""
        return not self.holds_run() and (self.path / _LOCK).is_file() and self.recipe.is_file()


def read_manifest(run: RunFolder) -> dict[str, Any]:
    """The manifest of a run folder.

    Raises:
        ContentError: there is none, it is damaged, or a newer ftcli wrote it.
    """
    try:
        manifest = json.loads(run.manifest.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ContentError("no manifest.json: this is no run folder", where=str(run.path)) from error
    except ValueError as error:
        raise ContentError("manifest.json is damaged", where=str(run.path)) from error
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if schema != MANIFEST_SCHEMA:
        raise ContentError(
            f"manifest.json has schema {schema}; this ftcli reads {MANIFEST_SCHEMA}", where=str(run.path)
        )
    return dict(manifest)


def update_manifest(run: RunFolder, **changes: Any) -> dict[str, Any]:
    """The manifest after ``changes`` were written into it; it is created if there is none."""
    manifest = read_manifest(run) if run.manifest.exists() else {"schema": MANIFEST_SCHEMA}
    manifest.update(changes)
    write_json(run.manifest, manifest)
    return manifest


def seal_manifest(run: RunFolder, folder: Path, **changes: Any) -> dict[str, Any]:
    """The manifest after ``changes`` and the hashes of every file in ``folder`` were written into it."""
    files = {f"{folder.name}/{name}": entry for name, entry in describe_files(folder).items()}
    return update_manifest(run, files=files, **changes)


def check_files(run: RunFolder) -> None:
    """None if every file that the manifest names is there with the bytes that were written.

    Raises:
        ContentError: a file is missing or differs.
    """
    for name, entry in read_manifest(run).get("files", {}).items():
        path = run.path / name
        if not path.is_file() or not isinstance(entry, dict) or hash_file(path) != entry.get("sha256"):
            what = "is missing" if not path.is_file() else "differs from what the run wrote"
            raise ContentError(what, where=str(path), hint="restore the file, or train again")


def now_text() -> str:
    """The present moment in UTC, ISO 8601 with seconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def find_newest_run(root: Path = Path("runs")) -> RunFolder:
    """The finished run below ``root`` that finished last.

    Raises:
        UsageError: there is no finished run.
    """
    finished: list[tuple[str, RunFolder]] = []
    for manifest in sorted(root.glob("*/manifest.json")):
        run = RunFolder(manifest.parent)
        with suppress(ContentError):
            entry = read_manifest(run)
            if entry.get("state") == "finished":
                finished.append((str(entry.get("finished_at", "")), run))
    if not finished:
        raise UsageError(f"no finished run under {root}/", hint="name a run folder, or train first: ftcli train RECIPE")
    return max(finished, key=lambda pair: pair[0])[1]


def find_owner(run: RunFolder | None, folder: Path) -> RunFolder | None:
    """``run`` if ``folder`` lies in it; a run that is only read may be another's, and its folder not ours to write."""
    return run if run and folder.resolve().is_relative_to(run.path.resolve()) else None


@contextmanager
def locked(run: RunFolder) -> Iterator[None]:
    """A block in which no other process can train into this run folder.

    The lock is the operating system's and ends with the process, however that ends.

    Raises:
        DiskError: another run holds the folder, or it cannot be created.
    """
    with disk_errors(run.path):
        run.path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(run.path / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DiskError(
                "another process works in this folder",
                where=str(run.path),
                hint="wait for it, or choose another folder",
            ) from error
        _sweep_leftovers(run)
        yield
    finally:
        os.close(descriptor)


def recover(run: RunFolder) -> None:
    """Nothing; what killed processes left half-made in this folder is gone, and what they had set aside is back.

    Raises:
        DiskError: another process is training into it.
    """
    if (run.path / _LOCK).is_file():
        with locked(run):
            pass


def _sweep_leftovers(run: RunFolder) -> None:
    with disk_errors(run.path):
        for folder in (run.path, run.checkpoints, run.samples):
            for path in folder.glob(".*.old-*") if folder.is_dir() else ():
                final = path.with_name(path.name[1:].rpartition(".old-")[0])
                if final.exists():
                    _remove(path)
                else:
                    path.rename(final)
            for path in folder.glob(".*.tmp-*") if folder.is_dir() else ():
                _remove(path)
    restore_replaced(run)


def set_aside(run: RunFolder) -> None:
    """Nothing; the run folder is empty, and what it held can be restored until it is discarded."""
    moving = run.path / _MOVING
    with disk_errors(run.path):
        entries = [entry for entry in run.path.iterdir() if entry.name != _LOCK]
        if entries:
            moving.mkdir()
            for entry in entries:
                entry.rename(moving / entry.name)
            moving.rename(run.path / _REPLACED)  # from here on, what lies beside it is new
            sync_folder(run.path)


def restore_replaced(run: RunFolder) -> None:
    """Nothing; a run that was set aside is back in place of the one that was to replace it."""
    replaced, moving = run.path / _REPLACED, run.path / _MOVING
    with disk_errors(run.path):
        if replaced.exists():
            for entry in list(run.path.iterdir()):
                if entry.name not in (_LOCK, _REPLACED):
                    _remove(entry)
            replaced.rename(moving)  # from here on, what lies beside it is old
        if moving.exists():
            for entry in list(moving.iterdir()):
                entry.rename(run.path / entry.name)
            moving.rmdir()
            sync_folder(run.path)


def discard_replaced(run: RunFolder) -> None:
    """Nothing; the run that was set aside is gone for good."""
    if run.holds_replaced():
        remove_folder(run.path / _REPLACED)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def append_line(path: Path, value: Mapping[str, Any]) -> None:
    """Nothing; ``value`` is the last line of the JSONL file at ``path``, which holds whole lines only.

    Raises:
        DiskError: it cannot be written; the file is as it was.
    """
    line = (json.dumps(value, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")
    with disk_errors(path, len(line)), path.open("ab", buffering=0) as stream:
        size = stream.tell()
        try:
            while line:
                line = line[stream.write(line) :]
        except BaseException:
            with suppress(OSError):
                stream.truncate(size)
            raise


def read_lines(path: Path, *keys: str) -> list[dict[str, Any]]:
    """The objects of a JSONL file that have all ``keys``; a torn last line (a run was killed) is left out."""
    if not path.exists():
        return []
    if not path.is_file():
        raise ContentError("is no file", where=str(path), hint="move it away; what the run records there begins anew")
    values = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):  # an answer may hold U+2028
        with suppress(ValueError, RecursionError):
            value = json.loads(line)
            if isinstance(value, dict) and all(key in value for key in keys) and isinstance(value.get("step", 0), int):
                values.append(value)
    return values


def hash_lines(path: Path, last_step: int) -> str:
    """A hash of the objects in a JSONL file up to optimizer step ``last_step``."""
    kept = [entry for entry in read_lines(path, "step") if entry["step"] <= last_step]
    return hashlib.sha256(json.dumps(kept).encode()).hexdigest()


def cut_lines(path: Path, last_step: int) -> None:
    """Nothing; lines of ``path`` after optimizer step ``last_step`` are gone, for a run that resumes there."""
    if path.exists():
        kept = [entry for entry in read_lines(path, "step") if entry["step"] <= last_step]
        write_text(path, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in kept))
