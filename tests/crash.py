"""Trains in forked children that are killed before one of their changes to the disk, and lets each run go on.

    python crash.py RECIPE FOLDER CASE NUMBER…

Prints a line of JSON for each number: the change before which a child was killed, and what was found afterwards.
CASE is ``begin`` (a new run), ``overwrite`` (one that replaces a finished run) or ``resume`` (one that goes on).
Without a number it prints how many changes there are.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"GOMP_SPINCOUNT": "1000", "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}

# imported once, for all children
import accelerate  # noqa: F401
import peft  # noqa: F401
import torch
import transformers.models.llama.modeling_llama  # noqa: F401

from ftcli.errors import Interrupted, UsageError
from ftcli.events import StepDone
from ftcli.store.run import RunFolder
from ftcli.train import run as training

_WRITES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod"}


def watch(folder: Path, kill_before: int | None) -> list[str]:
    """The changes made below ``folder`` from now on; before the one of that number the process is killed."""
    changes: list[str] = []

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        is_write = event in _WRITES or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        is_here = isinstance(arguments[0], str | Path) and str(folder) in str(arguments[0])
        # rmtree names what it removes by descriptor
        if not is_write or not (is_here or event in ("os.rmdir", "os.remove")):
            return
        if len(changes) == kill_before:
            os.kill(os.getpid(), signal.SIGKILL)
        changes.append(f"{event} {arguments[0]}")

    sys.addaudithook(hook)
    return changes


def in_child(work: Callable[[], Any]) -> tuple[int, Any]:
    """The exit status of a forked child that does ``work``, and what that gave back."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        os.close(reader)
        torch.set_num_threads(1)
        try:
            result = {"value": work()}
        except BaseException:
            result = {"error": traceback.format_exc()}
        os.write(writer, json.dumps(result).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        text = stream.read()
    _, status = os.waitpid(child, 0)
    return status, json.loads(text) if text else None


def train(recipe: Path, folder: Path, **options: Any) -> str:
    return str(training.train(recipe, overrides=(f"output_dir={folder}",), **options).path)


def stop_in_the_middle(recipe: Path, folder: Path) -> None:
    def on_event(event: Any) -> None:
        if isinstance(event, StepDone) and event.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        train(recipe, folder, on_event=on_event)
    except Interrupted:
        return


def read_run(folder: Path) -> dict[str, Any]:
    """What must be the same however often a run was killed."""
    run = RunFolder(folder)
    names = (run.metrics, run.eval, run.samples / "prompts.jsonl", run.adapter / "adapter_model.safetensors")
    manifest = json.loads(run.manifest.read_text())
    leftovers = [str(p) for p in folder.rglob("*") if p.name.startswith(".") and p.name != ".lock"]
    return {
        **{path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in names},
        "state": manifest["state"],
        "best": manifest["best"],
        "checkpoints": sorted(path.name for path in run.checkpoints.iterdir()),
        "leftovers": leftovers,
    }


def begin(recipe: Path, folder: Path, case: str) -> Callable[[], Any]:
    """What is to be killed, after what has to stand before was made."""
    if case == "overwrite":
        in_child(lambda: train(recipe, folder))
        (folder / "old.txt").write_text("of the run that is replaced")
        return lambda: train(recipe, folder, overwrite=True)
    if case == "resume":
        in_child(lambda: stop_in_the_middle(recipe, folder))
        return lambda: train(recipe, folder, resume=True)
    return lambda: train(recipe, folder)


def go_on(recipe: Path, folder: Path) -> dict[str, Any]:
    """What stands after a person typed ``--resume``, and the first command again where there is no run yet."""
    try:
        train(recipe, folder, resume=True)
    except UsageError:
        train(recipe, folder)
    return read_run(folder)


def main(recipe: Path, root: Path, case: str, numbers: list[int]) -> None:
    reference = in_child(lambda: go_on(recipe, root / "reference"))[1]["value"]
    if not numbers:
        work = begin(recipe, root / "count", case)
        show(in_child(lambda: count(root / "count", work))[1])
        return
    for number in numbers:
        folder = root / f"{case}-{number}"
        work = begin(recipe, folder, case)
        status, _ = in_child(lambda: (watch(folder, number), work()))  # noqa: B023 - called before the next one
        is_old = (folder / "old.txt").exists()
        _, result = in_child(lambda: go_on(recipe, folder))  # noqa: B023
        found, error = result.get("value", {}), result.get("error", "")
        differs = [key for key, value in reference.items() if found.get(key) != value]
        entry = {"number": number, "killed": status, "differs": differs, "is_old": is_old, "error": error}
        show(entry)
        shutil.rmtree(folder)


def show(value: Any) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def count(folder: Path, work: Callable[[], Any]) -> list[str]:
    changes = watch(folder, None)
    work()
    return changes


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], [int(text) for text in sys.argv[4:]])
