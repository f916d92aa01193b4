"""Several processes make the same run as one: the same steps, one writer, and nobody left waiting."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

TOLERANCE = 1e-5


def start(*words: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """``ftcli`` in a process, or several, of its own."""
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, *launcher, "-m", "ftcli", *words]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


def run(*words: str, launcher: tuple[str, ...] = (), code: int = 0) -> tuple[str, str]:
    """What it said on stdout and stderr."""
    process = start(*words, launcher=launcher)
    out, err = process.communicate(timeout=180)
    assert process.returncode == code, err
    assert "Traceback" not in err
    return out, err


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def check_same_run(first: Path, second: Path) -> None:
    """None if both made the same steps, and left the same weights."""
    ours, theirs = read_metrics(first), read_metrics(second)
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert all(a[key] == b[key] for key in ("step", "lr", "n_target_tokens", "n_tokens", "rows", "epoch"))
        assert abs(a["loss"] - b["loss"]) < TOLERANCE
        assert abs(a["grad_norm"] - b["grad_norm"]) < TOLERANCE * max(1, a["grad_norm"])
    kept = [
        next(folder.glob("adapter/adapter_model.safetensors"), folder / "model/model.safetensors")
        for folder in (first, second)
    ]
    weights, others = map(load_file, kept)
    assert weights.keys() == others.keys()
    distance = sum((weights[name] - others[name]).double().square().sum() for name in weights)
    size = sum(value.double().square().sum() for value in weights.values())
    assert torch.sqrt(distance / size) < TOLERANCE


@pytest.fixture
def recipe(write_recipe: Any) -> Path:
    """Fourteen rows in steps of eight, the second of which no number of processes divides; dropout, clipping, evals."""
    return write_recipe(
        peft={"r": 4, "lora_alpha": 8, "lora_dropout": 0.1},
        train={
            "learning_rate": 1e-2,
            "max_steps": 5,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 6,
            "gradient_checkpointing": False,
            "max_grad_norm": 0.5,
        },
        eval={
            "datasets": [{"path": "held_out.jsonl"}],
            "eval_steps": 2,
            "sample_prompts": ["fox"],
            "max_new_tokens": 3,
        },
        checkpoint={"save_steps": 2},
    )


def run_one(recipe: Path, folder: Path, *settings: str, times: int = 6) -> Path:
    """The folder of the run by one process."""
    run("train", str(recipe), "--quiet", *list_settings(folder, times, settings))
    return folder


def run_many(recipe: Path, folder: Path, n: int, *settings: str, times: int = 6) -> Path:
    """The folder of the run by ``n`` processes."""
    run("train", str(recipe), "--quiet", "--nproc", str(n), *list_settings(folder, times // n, settings))
    return folder


def list_settings(folder: Path, times: int, settings: tuple[str, ...]) -> list[str]:
    values = (f"output_dir={folder}", f"train.gradient_accumulation_steps={times}", *settings)
    return [f"--set={value}" for value in values]


def test_two_processes_make_the_run_of_one(recipe: Path, tmp_path: Path) -> None:
    one = run_one(recipe, tmp_path / "one")
    two = run_many(recipe, tmp_path / "two", 2)
    check_same_run(one, two)
    evals = [[json.loads(line) for line in (f / "eval.jsonl").read_text().splitlines()] for f in (one, two)]
    assert [e["step"] for e in evals[0]] == [e["step"] for e in evals[1]] == [0, 2, 4, 5]
    assert all(abs(a["loss"] - b["loss"]) < TOLERANCE for a, b in zip(*evals, strict=True))
    manifest = json.loads((two / "manifest.json").read_text())
    assert (manifest["state"], manifest["processes"]) == ("finished", 2)
    assert len((two / "samples" / "prompts.jsonl").read_text().splitlines()) == 4


@pytest.mark.slow
def test_two_processes_that_divide_the_weights_make_the_run_of_one(recipe: Path, tmp_path: Path) -> None:
    one = run_one(recipe, tmp_path / "one")
    check_same_run(one, run_many(recipe, tmp_path / "two", 2, "distributed.strategy=fsdp2"))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize(
    ("n", "settings"),
    [
        (3, ()),
        (2, ("train.gradient_checkpointing=true",)),
        (2, ("train.fused=false",)),
        (2, ("data.packing=true", "data.max_length=64")),
        (2, ("peft=null", "train.learning_rate=1e-3")),
        (2, ("quantization={load_in_4bit: true}",)),
        (3, ("peft.modules_to_save=[lm_head]", "train.gradient_checkpointing=true")),
        (2, ("tokenizer.add_tokens=[quux]",)),
    ],
)
def test_every_kind_of_run(recipe: Path, tmp_path: Path, strategy: str, n: int, settings: tuple[str, ...]) -> None:
    one = run_one(recipe, tmp_path / "one", *settings)
    check_same_run(one, run_many(recipe, tmp_path / "many", n, f"distributed.strategy={strategy}", *settings))


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "n"), [("torchrun", 2), ("accelerate", 1)])
def test_other_launchers(recipe: Path, tmp_path: Path, launcher: str, n: int) -> None:
    """On a CPU accelerate starts several processes through MPI alone."""
    one = run_one(recipe, tmp_path / "one")
    words = {
        "torchrun": ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)),
        "accelerate": ("-m", "accelerate.commands.launch", "--num_processes", str(n), "--cpu", "--num_machines", "1"),
    }[launcher]
    out, _ = run("train", str(recipe), "--json", *list_settings(tmp_path / "two", 6 // n, ()), launcher=words)
    assert json.loads(out)["steps"] == 5  # one document, of process 0
    check_same_run(one, tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_processes(recipe: Path, tmp_path: Path, before: int, after: int) -> None:
    settings = ("train.lr_scheduler_type=constant",)  # another curve would be for another number of steps
    whole = run_one(recipe, tmp_path / "whole", *settings)
    folder, times = tmp_path / "run", 6 // before
    stopped = list_settings(folder, times, ("train.max_steps=2", *settings))
    run("train", str(recipe), "--quiet", "--nproc", str(before), *stopped)
    words = ("train", str(recipe), "--resume", "--nproc", str(after))
    _, err = run(*words, *list_settings(folder, times, settings), code=2)
    assert f"train.gradient_accumulation_steps={6 // after}" in err
    _, err = run(*words, *list_settings(folder, 6 // after, settings))
    assert f"processes was {before}, now {after}" in err
    check_same_run(whole, folder)


@pytest.fixture
def endless() -> Iterator[Any]:
    """Starts a run that does not end by itself, and ends it after the test."""
    started: list[subprocess.Popen[str]] = []

    def begin(*words: str) -> subprocess.Popen[str]:
        started.append(start(*words))
        return started[-1]

    yield begin
    for process in started:
        for worker in (*list_workers(process), process.pid):
            with suppress(OSError):
                os.kill(worker, signal.SIGKILL)
        process.communicate()


def wait_for_checkpoint(folder: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not any(folder.glob("checkpoints/step-*")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    assert process.poll() is None
    assert any(folder.glob("checkpoints/step-*"))


def list_workers(process: subprocess.Popen[str]) -> list[int]:
    """The processes of the run, by rank."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, StopIteration):
            if int((folder / "stat").read_text().rpartition(") ")[2].split()[1]) == process.pid:
                entries = (folder / "environ").read_bytes().split(b"\0")
                rank = next(entry for entry in entries if entry.startswith(b"RANK="))
                found[int(rank.removeprefix(b"RANK="))] = int(folder.name)
    return [found[rank] for rank in sorted(found)]


@pytest.mark.parametrize(
    ("target", "strategy"),
    [
        pytest.param("launcher", "ddp", marks=pytest.mark.slow),
        pytest.param("1", "ddp", marks=pytest.mark.slow),
        pytest.param("1", "fsdp2", marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_any_of_them_saves_once(
    endless: Any, recipe: Path, tmp_path: Path, target: str, strategy: str
) -> None:
    folder = tmp_path / "run"
    settings = list_settings(folder, 3, ("train.max_steps=100000", f"distributed.strategy={strategy}", "eval=null"))
    process = endless("train", str(recipe), "--nproc", "2", *settings)
    wait_for_checkpoint(folder, process)
    os.kill(process.pid if target == "launcher" else list_workers(process)[int(target)], signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert err.count("stopped by SIGTERM after step") == 1
    assert "--nproc 2 --resume" in err
    last = read_metrics(folder)[-1]["step"]
    assert json.loads((folder / "manifest.json").read_text())["state"] == "interrupted"
    resumed = list_settings(folder, 3, (f"train.max_steps={last + 2}", f"distributed.strategy={strategy}", "eval=null"))
    run("train", str(recipe), "--nproc", "2", "--resume", *resumed)
    assert [entry["step"] for entry in read_metrics(folder)] == list(range(1, last + 3))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_one_that_is_killed_takes_the_others_down(
    endless: Any, recipe: Path, tmp_path: Path, rank: int, strategy: str
) -> None:
    folder = tmp_path / "run"
    settings = list_settings(folder, 3, ("train.max_steps=100000", f"distributed.strategy={strategy}", "eval=null"))
    process = endless("train", str(recipe), "--nproc", "2", *settings)
    wait_for_checkpoint(folder, process)
    os.kill(list_workers(process)[rank], signal.SIGKILL)
    began = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - began < 30
    assert process.returncode == 137
    assert err.count("another process of this run is gone") == 1, err
    steps = int(sorted((folder / "checkpoints").iterdir())[-1].name.removeprefix("step-"))
    resumed = list_settings(
        folder, 3, (f"train.max_steps={steps + 2}", f"distributed.strategy={strategy}", "eval=null")
    )
    run("train", str(recipe), "--nproc", "2", "--resume", *resumed)
    assert [entry["step"] for entry in read_metrics(folder)] == list(range(1, steps + 3))


@pytest.mark.parametrize(("settings", "code", "words"), [
    (("train.learning_rte=1",), 2, "learning_rte"),
    pytest.param(("datasets.0.path=gone.jsonl",), 2, "gone.jsonl", marks=pytest.mark.slow),
])  # fmt: skip
def test_what_is_wrong_is_told_once(
    recipe: Path, tmp_path: Path, settings: tuple[str, ...], code: int, words: str
) -> None:
    _, err = run("train", str(recipe), "--nproc", "2", *list_settings(tmp_path / "run", 3, settings), code=code)
    assert err.count("error:") == 1, err
    assert words in err


def test_commands_for_other_machines(tmp_path: Path, recipe: Path) -> None:
    out, _ = run("train", str(recipe), "--print-launch", "--nodes", "3", "--nproc", "2", "--set", "train.max_steps=3")
    lines = out.splitlines()
    assert len(lines) == 3
    for rank, line in enumerate(lines):
        assert line.startswith("torchrun --nnodes 3 --nproc-per-node 2 ")
        assert f"--node-rank {rank} --master-addr " in line
        assert line.endswith(f"-m ftcli train {recipe} --set=train.max_steps=3")
