"""Checkpoints: complete or not there, and nothing in them can execute.

    checkpoints/step-000200/
        weights.safetensors     every trained parameter, by name
        optimizer.safetensors   its moments, as NAME::exp_avg …
        state.json              step, loss scale
        manifest.json           sha256 and size of the files above, written last

Learning rate, data order and dropout follow from the recipe and the step, so they are not stored.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ftcli.errors import ContentError, UsageError
from ftcli.store.file import describe_files, hash_file, staged_folder, write_json
from ftcli.store.run import RunFolder
from ftcli.train.optim import list_trained

_NAME = re.compile(r"step-(\d{6,})")
_SCHEMA = 1
_SEPARATOR = "::"


@dataclass(frozen=True)
class Checkpoint:
    """A sound checkpoint: all its files are there with the bytes that were written."""

    path: Path
    step: int


def save_checkpoint(
    run: RunFolder,
    step: int,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    scaler: Any = None,
    origin: str = "",
) -> Path:
    """The folder of the checkpoint after optimizer step ``step``, on the disk whole.

    ``origin`` says which runs it belongs to; only those will load it.

    Raises:
        DiskError: it could not be written; earlier checkpoints are intact.
    """
    final = run.checkpoints / f"step-{step:06d}"
    weights = {name: p.detach().cpu().contiguous() for name, p in list_trained(model)}
    with staged_folder(final) as folder:
        save_file(weights, folder / "weights.safetensors")
        save_file(_gather_moments(model, optimizer), folder / "optimizer.safetensors")
        loss_scale = scaler.state_dict() if scaler else None
        state = {"schema": _SCHEMA, "step": step, "origin": origin, "loss_scale": loss_scale}
        write_json(folder / "state.json", state)
        write_json(folder / "manifest.json", {"schema": _SCHEMA, "files": describe_files(folder)})
    return final


def rotate_checkpoints(run: RunFolder, limit: int) -> None:
    """Nothing; only the newest ``limit`` checkpoints remain."""
    for path in _list_checkpoints(run)[limit:]:
        shutil.rmtree(path)


def remove_newer_checkpoints(run: RunFolder, step: int) -> list[Path]:
    """The checkpoints after ``step`` that were there: damaged ones, or of a way that is not gone on."""
    newer = [path for path in _list_checkpoints(run) if int(path.name.removeprefix("step-")) > step]
    for path in newer:
        shutil.rmtree(path)
    return newer


def find_checkpoint(run: RunFolder) -> tuple[Checkpoint, list[str]]:
    """The newest sound checkpoint of ``run``, and what is wrong with each newer one.

    Raises:
        UsageError: the run has no checkpoint.
        ContentError: every checkpoint is damaged; training is never begun anew in silence.
    """
    paths = _list_checkpoints(run)
    if not paths:
        raise UsageError(
            "nothing to resume: the run has no checkpoint",
            where=str(run.path),
            hint="start anew with --overwrite",
        )
    damaged: list[str] = []
    for path in paths:
        try:
            return read_checkpoint(path), damaged
        except ContentError as error:
            damaged.append(str(error).splitlines()[0])
    raise ContentError(
        "every checkpoint is damaged:\n" + "\n".join(damaged),
        where=str(run.path),
        hint="start anew with --overwrite",
    )


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
        files = dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ContentError("the checkpoint's manifest.json is missing or damaged", where=str(path)) from error
    if manifest.get("schema") != _SCHEMA:
        raise ContentError(f"the checkpoint has schema {manifest.get('schema')}, not {_SCHEMA}", where=str(path))
    for name, entry in files.items():
        file = path / Path(name).name
        if not file.is_file():
            raise ContentError("a file of the checkpoint is missing", where=str(file))
        if hash_file(file) != entry["sha256"]:
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
            "the checkpoint is of another run: its recipe, base, tokenizer or data differ",
            where=str(checkpoint.path),
            hint="name a checkpoint of the run in output_dir",
        )
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
            parameter.copy_(weights[name])
    moments = load_file(checkpoint.path / "optimizer.safetensors")
    by_name: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in moments.items():
        name, _, moment = key.rpartition(_SEPARATOR)
        by_name.setdefault(name, {})[moment] = value
    is_fused = bool(optimizer.defaults.get("fused"))
    for name, parameter in trained.items():
        if name in by_name:  # torch keeps the step count on the CPU, unless AdamW is fused
            optimizer.state[parameter] = {
                moment: value.to(parameter.device) if moment != "step" or is_fused else value
                for moment, value in by_name[name].items()
            }
    if scaler and state["loss_scale"]:
        scaler.load_state_dict(state["loss_scale"])


def _gather_moments(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{name}{_SEPARATOR}{moment}": torch.as_tensor(value).detach().cpu().contiguous()
        for name, parameter in list_trained(model)
        for moment, value in optimizer.state.get(parameter, {}).items()
    }


def _list_checkpoints(run: RunFolder) -> list[Path]:
    """Folders of committed checkpoints, the newest first."""
    if not run.checkpoints.is_dir():
        return []
    found = [(int(match.group(1)), p) for p in run.checkpoints.iterdir() if (match := _NAME.fullmatch(p.name))]
    return [path for _, path in sorted(found, reverse=True)]
