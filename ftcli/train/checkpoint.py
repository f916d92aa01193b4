"""Checkpoints: complete or not there, and nothing in them can execute.

    checkpoints/step-000200/
        weights.safetensors     every trained parameter, by name
        optimizer.safetensors   its moments, as NAME::exp_avg …
        state.json              step, loss scale, hashes of the records up to here
        manifest.json           sha256 and size of the files above, written last

Learning rate, data order and dropout follow from the recipe and the step, so they are not stored.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ftcli.errors import ContentError, NumericError, UsageError
from ftcli.store.file import describe_files, hash_file, remove_folder, staged_folder, write_json
from ftcli.store.run import RunFolder, hash_lines
from ftcli.train.optim import list_trained
from ftcli.train.shard import gather_tensor, spread_tensor

_NAME = re.compile(r"step-(\d{6,})")
_SCHEMA = 1
_SEPARATOR = "::"
_FILES = ("weights.safetensors", "optimizer.safetensors", "state.json")
_SMALL_FILES_BYTES = 64 << 10  # state, manifest and the headers of small models


@dataclass(frozen=True)
class Checkpoint:
    """A sound checkpoint: all its files are there with the bytes that were written."""

    path: Path
    step: int


@dataclass(frozen=True)
class State:
    """What a checkpoint holds, on the CPU: trained weights and their moments by name, the scaler's state if any."""

    weights: dict[str, torch.Tensor]
    moments: dict[str, torch.Tensor]
    loss_scale: dict[str, Any] | None = None


def gather_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer, scaler: Any = None) -> State:
    """The state after the last step, whole tensors; where they are sharded, every process must call it."""
    weights, moments = {}, {}
    for name, parameter in list_trained(model):
        weights[name] = gather_tensor(parameter)
        for moment, value in optimizer.state.get(parameter, {}).items():
            moments[f"{name}{_SEPARATOR}{moment}"] = gather_tensor(torch.as_tensor(value))
    return State(weights, moments, scaler.state_dict() if scaler else None)


def save_checkpoint(run: RunFolder, step: int, state: State, *, origin: str = "") -> Path:
    """The folder of the checkpoint after optimizer step ``step``, on the disk whole.

    ``origin`` says which run it belongs to; only that one will load it. It also holds a hash of what the run has
    recorded so far.

    Raises:
        NumericError: a weight is not finite; nothing was written.
        DiskError: it could not be written; earlier checkpoints are intact.
    """
    final = name_path(run, step)
    check_finite_weights(state.weights, step)
    size = sum(value.nbytes for values in (state.weights, state.moments) for value in values.values())
    with staged_folder(final, size + _SMALL_FILES_BYTES) as folder:
        save_file(state.weights, folder / "weights.safetensors")
        save_file(state.moments, folder / "optimizer.safetensors")
        entry = {"schema": _SCHEMA, "step": step, "origin": origin, "loss_scale": state.loss_scale}
        entry["records"] = hash_records(run, step)
        write_json(folder / "state.json", entry)
        write_json(folder / "manifest.json", {"schema": _SCHEMA, "files": describe_files(folder)})
    return final


def hash_records(run: RunFolder, step: int) -> dict[str, str]:
    """Name → hash of the lines of ``run`` that stand before its checkpoint after ``step`` is made."""
    records = {run.metrics: step, run.timing: step, run.eval: step - 1, run.prompts: step - 1}
    return {str(path.relative_to(run.path)): hash_lines(path, last_step) for path, last_step in records.items()}


def list_changed_records(checkpoint: Checkpoint, run: RunFolder) -> list[str]:
    """The names of the files whose lines are not those that were there when ``checkpoint`` was made."""
    state = json.loads((checkpoint.path / "state.json").read_text(encoding="utf-8"))
    now = hash_records(run, checkpoint.step)
    return [name for name, value in state["records"].items() if now[name] != value]


def check_finite_weights(weights: Mapping[str, torch.Tensor], step: int) -> None:
    """None if what a step has left can be saved.

    Raises:
        NumericError: naming the first weight that is NaN or infinite.
    """
    for name, value in weights.items():
        if not torch.isfinite(value).all():
            raise NumericError(
                f"{name} is not finite after step {step}",
                why="loss and gradient were finite; the update was too large",
                hint="lower train.learning_rate",
            )


def rotate_checkpoints(run: RunFolder, limit: int, *, best_step: int | None = None) -> None:
    """Nothing; only the newest ``limit`` checkpoints and the best one remain."""
    for path in list_checkpoints(run)[limit:]:
        if best_step is None or path != name_path(run, best_step):
            remove_folder(path)


def remove_newer_checkpoints(run: RunFolder, step: int) -> list[Path]:
    """The checkpoints after ``step`` that were there: damaged ones, or of a way that is not gone on."""
    newer = [path for path in list_checkpoints(run) if int(path.name.removeprefix("step-")) > step]
    for path in newer:
        remove_folder(path)
    return newer


def name_path(run: RunFolder, step: int) -> Path:
    """Where the checkpoint of ``step`` lies, if there is one."""
    return run.checkpoints / f"step-{step:06d}"


def find_checkpoint(run: RunFolder) -> tuple[Checkpoint | None, list[str]]:
    """The newest sound checkpoint of ``run`` (None if it has none), and what is wrong with each newer one.

    Raises:
        ContentError: every checkpoint is damaged; training is never begun anew in silence.
    """
    paths = list_checkpoints(run)
    damaged: list[str] = []
    for path in paths:
        try:
            return read_checkpoint(path), damaged
        except ContentError as error:
            damaged.append(str(error).splitlines()[0])
    if damaged:
        raise ContentError(
            "every checkpoint is damaged:\n" + "\n".join(damaged),
            where=str(run.path),
            hint="start anew with --overwrite",
        )
    return None, []


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in ``path``, every file of which was held against its hash.

    Raises:
        UsageError: there is no such folder.
        ContentError: a file is missing or differs, naming it.
    """
    if not path.is_dir():
        raise UsageError("no such checkpoint", where=str(path))
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        hashes = {str(name): str(entry["sha256"]) for name, entry in manifest["files"].items()}
        schema = manifest["schema"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ContentError("the checkpoint's manifest.json is missing or damaged", where=str(path)) from error
    if schema != _SCHEMA:
        raise ContentError(f"the checkpoint has schema {schema}, not {_SCHEMA}", where=str(path))
    for name in dict.fromkeys((*_FILES, *hashes)):
        file = path / Path(name).name
        if not file.is_file():
            raise ContentError("a file of the checkpoint is missing", where=str(file))
        if hash_file(file) != hashes.get(name):
            raise ContentError("damaged: its bytes are not those that were written", where=str(file))
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    return Checkpoint(path, int(state["step"]))


def load_checkpoint(
    checkpoint: Checkpoint,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    scaler: Any = None,
    origin: str = "",
) -> None:
    """Nothing; model and optimizer are as they were after the checkpoint's step.

    Raises:
        ContentError: the checkpoint is of a run with another recipe, base or data.
    """
    state = json.loads((checkpoint.path / "state.json").read_text(encoding="utf-8"))
    if state["origin"] != origin:
        raise ContentError(
            "the checkpoint is of another run: its recipe, base, tokenizer, data or manifest.json differ",
            where=str(checkpoint.path),
            hint="name a checkpoint of the run in output_dir",
        )
    load_weights(checkpoint, model)
    trained = dict(list_trained(model))
    moments = load_file(checkpoint.path / "optimizer.safetensors")
    by_name: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in moments.items():
        name, _, moment = key.rpartition(_SEPARATOR)
        by_name.setdefault(name, {})[moment] = value
    is_fused = bool(optimizer.defaults.get("fused"))
    for name, parameter in trained.items():
        if name in by_name:  # torch keeps the step count on the CPU, unless AdamW is fused
            optimizer.state[parameter] = {
                moment: spread_tensor(value, parameter) if moment != "step" or is_fused else value
                for moment, value in by_name[name].items()
            }
    if scaler and state["loss_scale"]:
        scaler.load_state_dict(state["loss_scale"])


def load_weights(checkpoint: Checkpoint, model: torch.nn.Module) -> None:
    """Nothing; what is trained of the model has the values of the checkpoint.

    Raises:
        ContentError: the checkpoint has other parameters.
    """
    weights = load_file(checkpoint.path / "weights.safetensors")
    trained = dict(list_trained(model))
    shapes = {name: tuple(p.shape) for name, p in trained.items()}
    if {name: tuple(value.shape) for name, value in weights.items()} != shapes:
        raise ContentError(
            "the checkpoint is of a run that trains other parameters",
            where=str(checkpoint.path),
            hint="resume with the recipe that the run was started with",
        )
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(spread_tensor(weights[name], parameter))


def list_checkpoints(run: RunFolder) -> list[Path]:
    """Folders of committed checkpoints, the newest first."""
    if not run.checkpoints.is_dir():
        return []
    folders = [path for path in run.checkpoints.iterdir() if path.is_dir()]
    found = [(int(match.group(1)), path) for path in folders if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]
