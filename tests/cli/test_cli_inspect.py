"""``ftcli inspect`` as a person and a script meet it: folders, files, catalog, adapters, forecasts, nonsense."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from typer.testing import CliRunner

from ftcli.cli.app import app


def run(*words: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["inspect", *words])
    return result.exit_code, result.stdout, result.stderr


def run_json(*words: str) -> dict[str, Any]:
    code, stdout, stderr = run(*words, "--json")
    assert code == 0, stderr
    document: dict[str, Any] = json.loads(stdout)
    assert document["schema"] == 1
    return document


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_the_catalog_answers_offline_and_says_so() -> None:
    document = run_json("meta-llama/Llama-3.1-8B")
    assert document["parameters"]["total"] == 8_030_261_248
    assert document["lora"]["all-linear"]["parameters"] == 41_943_040
    assert not document["tied"]
    assert "catalog" in document["notices"][0]


def test_a_local_model_is_counted_from_its_headers(tiny_model: Path) -> None:
    document = run_json(str(tiny_model))
    with safe_open(tiny_model / "model.safetensors", "pt") as file:
        reference = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    assert document["parameters"]["total"] == reference
    assert document["findings"] == []
    assert document["files"][0]["format"] == "safetensors"


def test_a_contradiction_between_config_and_files_is_found(tmp_path: Path, tiny_model: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in tiny_model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["intermediate_size"] += 8
    (folder / "config.json").write_text(json.dumps(config))
    assert "shape" in [finding["code"] for finding in run_json(str(folder))["findings"]]


def test_the_table_fits_80_columns(tiny_model: Path) -> None:
    code, stdout, _ = run(str(tiny_model), "--layers", "--gpu", "24GB")
    assert code == 0
    assert max(len(line) for line in stdout.splitlines()) <= 80
    assert "checks     nothing found" in stdout
    assert "fits" in stdout


def test_a_forecast_and_what_makes_it_fit() -> None:
    document = run_json("meta-llama/Llama-3.1-8B", "--fit", "24GB", "--method", "full", "--seq", "4096")
    assert document["fits"] is False
    assert document["changes"]
    assert run_json("meta-llama/Llama-3.1-8B", "--gpu", "80GB")["fits"] is True


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["./nothere"], 2),
        (["nobody/nothing"], 4),
        (["meta-llama/Llama-3.1-8B", "--gpu", "lots"], 2),
        (["meta-llama/Llama-3.1-8B", "--target-modules", "q_prj"], 2),
        (["meta-llama/Llama-3.1-8B", "--layers-to-transform", "last:99"], 2),
        (["meta-llama/Llama-3.1-8B", "--set", "peft.r=4"], 2),
    ],
)
def test_nonsense_is_one_error(words: list[str], code: int) -> None:
    found, _, stderr = run(*words)
    assert found == code
    assert stderr.startswith("error: ")
    assert "Traceback" not in stderr


def test_an_empty_folder_and_a_broken_config(tmp_path: Path) -> None:
    assert run(str(tmp_path))[0] == 3
    (tmp_path / "config.json").write_text("{")
    assert run(str(tmp_path))[0] == 3


def test_torch_is_not_imported(tiny_model: Path) -> None:
    code = (
        "import sys; from ftcli.jobs.inspect import inspect_target; inspect_target(sys.argv[1]); "
        "print(sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, str(tiny_model)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ.copy())
    assert result.stdout.strip() == "[]"
