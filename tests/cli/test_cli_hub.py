"""``ftcli inspect ORG/NAME`` from the outside, with a Hub on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import CONFIG, PARAMETERS, FakeHub, list_shapes, make_safetensors, use_hub
from typer.testing import CliRunner

from ftcli.cli.app import app

LLAMA = "meta-llama/Llama-3.1-8B"


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    server = FakeHub()
    server.add("org/name", {"config.json": CONFIG, "model.safetensors": make_safetensors(list_shapes())})
    server.add(LLAMA, {"config.json": CONFIG})
    yield server
    server.close()


def run(hub: FakeHub, home: Path, *words: str, limit: float = 20) -> tuple[int, str, str]:
    """What a process of its own gives that asks ``hub`` for at most ``limit`` seconds: exit code, stdout, stderr."""
    code = f"import ftcli.store.hub as h; h._MOST_SECONDS = {limit}; from ftcli.cli.app import main; main()"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-c", code, "inspect", *words]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    return result.returncode, result.stdout, result.stderr


def test_a_model_on_the_hub_is_inspected(hub: FakeHub, tmp_path: Path) -> None:
    code, stdout, stderr = run(hub, tmp_path, "org/name", "--json")
    assert (code, stderr) == (0, "")
    document = json.loads(stdout)
    assert document["parameters"]["total"] == PARAMETERS
    assert document["dtypes"] == {"BF16": {"tensors": 21, "bytes": 2 * PARAMETERS}}
    assert document["notices"] == []


def test_a_gated_model_is_one_error_with_its_remedy(hub: FakeHub, tmp_path: Path) -> None:
    hub.fail(403, "/resolve/", X_Error_Code="GatedRepo")
    code, stdout, stderr = run(hub, tmp_path, "org/name")
    assert (code, stdout) == (4, "")
    assert stderr.splitlines() == [
        "error: org/name: the model is gated: its owner must grant access",
        "hint: ask for access on the page of org/name, then run: hf auth login",
    ]


@pytest.mark.parametrize("status", [0, 429])
def test_the_command_ends_when_the_hub_does_not(hub: FakeHub, tmp_path: Path, status: int) -> None:
    hub.fail(status, "/resolve/", Retry_After="40")
    begin = time.monotonic()
    code, stdout, stderr = run(hub, tmp_path, "org/name", limit=0.5)
    assert (code, stdout) == (4, "")
    assert stderr.startswith("error: org/name: the Hub was busy or did not answer within 0.5 s\nhint: try again later")
    assert stderr.count("\n") == 2
    assert time.monotonic() - begin < 12


@pytest.mark.parametrize("is_gated", [True, False])
def test_the_catalog_answers_where_the_hub_does_not(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, is_gated: bool
) -> None:
    use_hub(monkeypatch, hub.url if is_gated else "http://127.0.0.1:9", tmp_path)
    hub.fail(401, "/resolve/", X_Error_Code="GatedRepo")
    result = CliRunner().invoke(app, ["inspect", LLAMA, "--json"])
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["parameters"]["total"] == 8_030_261_248
    assert document["origin"] == "the bundled catalog"
    (notice,) = document["notices"]
    assert "this is ftcli's catalog" in notice
    assert ("the model is gated" if is_gated else "the Hub cannot be reached") in notice
