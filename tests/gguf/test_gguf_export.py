"""``ftcli export``: a run, an adapter or a folder as GGUF files that are measured, and what is refused or left."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from typer.testing import CliRunner

from ftcli.cli.app import app
from ftcli.cli.exported import explain_failure, find_worst
from ftcli.data.message import Message
from ftcli.errors import DiskError, UsageError
from ftcli.evaluate.compare import Comparison
from ftcli.evaluate.generate import Sampling
from ftcli.evaluate.loss import DocumentLosses
from ftcli.evaluate.subject import open_subject
from ftcli.evaluate.target import Target
from ftcli.evaluate.verdict import Verdict
from ftcli.events import Event, Notice, Progress, Stage
from ftcli.gguf import export as module
from ftcli.gguf.draft import KINDS
from ftcli.gguf.export import ExportedFile, export
from ftcli.gguf.kind import find_kinds, find_limit
from ftcli.gguf.output import name_target
from ftcli.gguf.verify import Verification
from ftcli.merge.run import merge
from ftcli.recipe import ModelSection
from ftcli.store.file import hash_file, name_beside
from ftcli.store.run import RunFolder
from ftcli.store.target import ModelFiles
from ftcli.train.run import train


def invoke(*words: str) -> Any:
    return CliRunner().invoke(app, ["export", *words])


def list_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_run_is_exported_measured_and_told(run: RunFolder) -> None:
    result = invoke("run", "--gguf", "F16", "--gguf", "f32", "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    folder = run.path / "gguf"
    assert (document["command"], document["source"], document["output"]) == ("export", "run", "run/gguf")
    assert [Path(file["path"]).name for file in document["files"]] == ["run-F16.gguf", "run-F32.gguf"]
    assert list_names(folder) == ["Modelfile", "README.md", "manifest.json", "run-F16.gguf", "run-F32.gguf"]
    assert not list(run.path.glob(".gguf*"))
    manifest = json.loads((folder / "manifest.json").read_text())
    for file in document["files"]:
        path = Path(file["path"])
        tensors = GGUFReader(path).tensors  # llama.cpp's own reader
        bits = 8 * sum(int(t.n_bytes) for t in tensors) / sum(int(t.n_elements) for t in tensors)
        assert file["bits_per_weight"] == pytest.approx(bits)
        assert manifest["files"][path.name] == {"sha256": hash_file(path), "bytes": file["bytes"]}
        assert manifest["exports"][file["type"]]["verify"] == file["verify"]
        assert file["verify"]["passed"] is True
        assert file["verify"]["ppl_result"] == pytest.approx(file["verify"]["ppl_source"], rel=1e-3)
        assert 0 <= file["verify"]["kl"] < 1e-4
    assert document["bytes"] == sum(path.stat().st_size for path in folder.glob("*.gguf"))
    assert document["verify"] == max((file["verify"] for file in document["files"]), key=lambda v: v["kl"])
    assert manifest["base"] == json.loads(run.manifest.read_text())["base"]
    question, sampling = [Message("user", "question 3")], Sampling(max_new_tokens=6)
    answers = {open_subject(name).answer(question, sampling) for name in ("run", "run/gguf/run-F32.gguf")}
    assert len(answers) == 1


def test_what_a_person_reads_fits_80_columns(run: RunFolder) -> None:
    text = invoke("--gguf", "f16", "run").stdout
    assert "next:\n  ftcli chat run/gguf/run-F16.gguf\n  llama-cli -m run/gguf/run-F16.gguf -cnv\n" in text
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "not verified" in invoke("run", "--gguf", "bf16", "--no-verify").stdout
    assert set(json.loads((run.path / "gguf/manifest.json").read_text())["exports"]) == {"f16", "bf16"}


def test_a_run_gives_the_file_of_its_merged_folder(run: RunFolder, tmp_path: Path) -> None:
    merge("run", output=tmp_path / "elsewhere" / "run", verifies=False)
    (first,) = export("run", kinds=["f16"], verifies=False).files
    (second,) = export("elsewhere/run", kinds=["f16"], verifies=False).files
    assert second.path == Path("run-gguf/run-F16.gguf")
    assert first.path.read_bytes() == second.path.read_bytes()
    assert (
        json.loads(Path("run-gguf/manifest.json").read_text())["base"] == json.loads(run.manifest.read_text())["base"]
    )


def test_folders_lone_adapters_and_whole_runs_are_exported(
    run: RunFolder, tiny_model: Path, tmp_path: Path, write_recipe: Any, make_adapter: Any
) -> None:
    told: list[Event] = []
    (file,) = export(str(tiny_model), kinds=["f32"], on_event=told.append).files
    assert file.path == Path("llama-gguf/llama-F32.gguf")
    assert file.verification is not None
    assert file.verification.verdict is None
    assert file.verification.has_passed
    assert any(isinstance(event, Notice) and "no rows" in event.text for event in told)
    rows = str(run.path.with_name("held_out.jsonl"))
    _, adapter = make_adapter(tied=False)
    recipe = write_recipe(peft=None, output_dir=str(tmp_path / "full"))
    full = str(train(recipe).path)
    for target, name in ((str(adapter), "adapter-gguf/adapter"), (full, "full/gguf/full"), ("llama", "")):
        if not name:
            shutil.copytree(tiny_model, tmp_path / "copy" / "llama")
            with pytest.raises(UsageError, match="another model of this name"):
                export("copy/llama", kinds=["f16"])
            shutil.copytree(tiny_model, tmp_path / "other")
            target, name = "other", "other-gguf/other"
        (file,) = export(target, kinds=["f16"], data=rows, on_event=told.append).files
        assert file.path.resolve() == (tmp_path / f"{name}-F16.gguf").resolve()
        assert file.verification is not None
        assert file.verification.verdict is not None
        assert 0 <= file.verification.verdict.comparison.kl < 1e-4


def test_what_is_there_stays_unless_it_is_to_be_replaced(run: RunFolder) -> None:
    export("run", kinds=["f16"], verifies=False)
    before = (run.path / "gguf/run-F16.gguf").stat().st_mtime_ns
    result = invoke("run", "--gguf", "bf16", "--gguf", "f16")
    assert (result.exit_code, "--overwrite" in result.stderr) == (2, True)
    assert list_names(run.path / "gguf") == ["Modelfile", "README.md", "manifest.json", "run-F16.gguf"]
    export("run", kinds=["f16"], verifies=False, overwrite=True)
    assert (run.path / "gguf/run-F16.gguf").stat().st_mtime_ns > before
    for folder in (run.path, run.adapter):
        with pytest.raises(UsageError, match="what is exported lies in it"):
            export("run", kinds=["f16"], output=folder)
    Path("link").symlink_to("nowhere")
    with pytest.raises(UsageError, match="is no folder"):
        export("run", kinds=["f16"], output=Path("link"))
    other = run.path.with_name("other")
    other.mkdir()
    (other / "manifest.json").write_text(json.dumps({"command": "merge"}))
    with pytest.raises(UsageError, match="holds something else"):
        export("run", kinds=["f16"], output=other, overwrite=True)
    (other / "manifest.json").unlink()
    (other / "README.md").write_text("mine")
    with pytest.raises(UsageError, match=r"holds a README\.md of something else"):
        export("run", kinds=["f16"], output=other, overwrite=True)
    assert list_names(other) == ["README.md"]


@pytest.mark.parametrize(
    ("folder", "name"),
    [("My Model (1)", "My-Model-1"), (".hidden", "hidden"), ("…", "model"), ("字" * 80, "字" * 53), ("-o", "o")],
)
def test_a_file_is_named_plainly(tmp_path: Path, folder: str, name: str) -> None:
    (tmp_path / folder).mkdir()
    files = ModelFiles(folder, tmp_path / folder)
    assert name_target(Target(folder, files, ModelSection(name_or_path=folder))) == name
    hub = ModelFiles("someone/Model-1B", tmp_path, revision="0f3a")
    assert name_target(Target("someone/Model-1B", hub, ModelSection(name_or_path=folder))) == "Model-1B"


@pytest.mark.parametrize(
    ("name", "told"),
    [("iq4_xs", "q4_k_m"), ("IQ3_M", "q3_k_m"), ("iq2_xxs", "q2_k"), ("iq1_s", "q2_k"), ("q2_k_s", "q2_k")],
)
def test_types_that_need_an_importance_matrix_are_refused(name: str, told: str) -> None:
    result = invoke("nowhere", "--gguf", name)
    assert (result.exit_code, f"take {told}" in result.stderr) == (2, True)


def test_types_are_found_by_name() -> None:
    assert find_kinds(["F16", "f32", "f16"]) == ("f16", "f32")
    assert all(find_limit(kind) > 0 for kind in KINDS)
    with pytest.raises(UsageError, match="did you mean bf16"):
        find_kinds(["bp16"])
    assert invoke("nowhere").exit_code == 2


def test_quantised_types_are_measured_by_what_they_may_lose(run: RunFolder) -> None:
    result = invoke("run", "--gguf", "q8_0", "--gguf", "Q4_K_M", "--gguf", "q2_k", "--json")
    assert result.exit_code == 0, result.output
    files = json.loads(result.stdout)["files"]
    assert [Path(file["path"]).name for file in files] == ["run-Q8_0.gguf", "run-Q4_K_M.gguf", "run-Q2_K.gguf"]
    moved = files[0]["verify"]["kl_base"]  # how far these few steps moved the model
    assert [file["verify"]["most_kl"] for file in files] == [min(0.03, max(0.01, moved / 4)), 0.3, 3.0]
    kls = [file["verify"]["kl"] for file in files]
    assert kls == sorted(kls)
    assert 32 > files[0]["bits_per_weight"] > files[1]["bits_per_weight"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "--safetensors"),
        (("run", "--adapter", "--gguf", "f16"), "cannot be written at once"),
        (("--safetensors",), "needs a model"),
        (("run", "--safetensors", "--data", "x"), "leave out --data"),
        (("run", "--gguf", "f16,q8_0"), "--gguf f16 --gguf q8_0"),
        (("run", "--gguf", ""), "is not one type"),
    ],
)
def test_what_is_not_plain_to_write_is_refused(words: tuple[str, ...], told: str) -> None:
    result = invoke(*words)
    assert (result.exit_code, told in result.stderr) == (2, True), result.stderr


def test_a_number_that_gguf_cannot_hold_is_named(run: RunFolder, tiny_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "huge"))
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 1 << 33}
    (folder / "config.json").write_text(json.dumps(config))
    result = invoke("huge", "--gguf", "f16")
    assert (result.exit_code, "llama.context_length cannot be 8589934592" in result.stderr) == (3, True)
    (folder / "tokenizer.json").unlink()
    result = invoke("huge", "--gguf", "f16")
    assert (result.exit_code, "tmp" in result.stderr.split("hint")[0].replace(str(tmp_path), "")) == (3, False)


def test_the_hint_of_a_failure_names_what_would_do() -> None:
    failed = Verification(problem="cut off")
    bad = Comparison(1, 0.5, 0.5, 0.5, DocumentLosses((1.0,), (1,)), DocumentLosses((2.0,), (1,)))
    lost = Verification(Verdict(bad, limit=0.3))
    entry = ExportedFile("run", "q4_k_m", Path("a.gguf"), 1, 4.5, lost, from_4bit=True)
    error = explain_failure([entry, replace(entry, kind="q2_k", verification=Verification(Verdict(bad, limit=3.0)))])
    assert error is not None
    assert "--gguf q6_k" in error.hint
    assert "--onto dequantized" in error.hint
    assert "KL 0.5000" in error.what
    assert explain_failure([replace(entry, verification=None)]) is None
    worst = find_worst([entry, replace(entry, verification=failed)])
    assert worst is not None
    assert worst.verification == failed


def test_a_gguf_file_in_16_bits_is_exported_and_a_rounded_one_is_not(run: RunFolder, write_rows: Any) -> None:
    rows = str(write_rows())
    original, direct = export("run", kinds=["f32", "q8_0"], verifies=False).files
    result = invoke(str(original.path), "--gguf", "q8_0", "--json", "--data", rows)
    assert result.exit_code == 0, result.output
    (file,) = json.loads(result.stdout)["files"]
    assert file["path"] == "run-gguf/run-Q8_0.gguf"
    assert Path(file["path"]).read_bytes() == direct.path.read_bytes()
    assert 0 < file["verify"]["kl"] < 0.01
    result = invoke(str(direct.path), "--gguf", "q4_0")
    assert result.exit_code == 3
    assert "rounded already" in result.stderr
    assert "export run, from which it was made" in result.stderr
    beside = invoke(str(original.path), "--gguf", "q6_k", "-o", str(original.path.parent), "--no-verify")
    assert beside.exit_code == 0, beside.output
    manifest = json.loads((original.path.parent / "manifest.json").read_text())
    assert (manifest["source"], set(manifest["exports"])) == ("run", {"f32", "q8_0", "q6_k"})
    again = invoke(str(original.path), "--gguf", "f32", "-o", str(original.path.parent), "--overwrite")
    assert "is what is exported" in again.stderr


def test_too_little_disk_is_told_before_anything_is_written(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ftcli.store.file.free_bytes", lambda path: 40 << 20)  # enough for one, not for two
    with pytest.raises(DiskError, match=r"[\d,]+ bytes are needed, 41,943,040 bytes are free"):
        export("run", kinds=["f16", "bf16"])
    assert not list(run.path.glob("*gguf*"))


@pytest.mark.parametrize("stage", ["gguf", "verify"])
def test_an_interruption_leaves_nothing(run: RunFolder, stage: str) -> None:
    def stop(event: Event) -> None:
        if isinstance(event, Progress) and event.stage == stage:
            raise KeyboardInterrupt

    before = list_names(run.path)
    with pytest.raises(KeyboardInterrupt):
        export("run", kinds=["f16"], on_event=stop)
    assert list_names(run.path) == before


def test_what_a_killed_export_left_is_swept(run: RunFolder, tiny_model: Path, tmp_path: Path) -> None:
    final = tmp_path / "llama-gguf"
    left = final.with_name(name_beside(final, "tmp").replace(str(os.getpid()), "999999999"))
    left.mkdir()
    export(str(tiny_model), kinds=["f16"], verifies=False)
    assert not left.exists()


def test_a_file_that_lost_the_fine_tune_fails(
    make_adapter: Any, write_rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the update is left out while the file is written; the document tells both the figures and the error."""
    from ftcli.merge import stream
    from ftcli.merge.arithmetic import make_blocks

    def halve(part: Any, weights: Any) -> Iterator[Any]:
        lora = replace(part.lora, scale=part.lora.scale / 2) if part.lora else None
        return make_blocks(replace(part, lora=lora), weights)

    _, adapter = make_adapter(tied=False, target_modules=["down_proj", "lm_head"], lora_alpha=64)
    words = (str(adapter), "--gguf", "f16", "--data", str(write_rows()), "-o", str(tmp_path / "out"))
    assert invoke(*words).exit_code == 0
    monkeypatch.setattr(stream, "make_blocks", halve)
    result = invoke(*words, "--overwrite", "--json")
    assert result.exit_code == 8, result.output
    document = json.loads(result.stdout)
    assert document["error"]["exit"] == 8
    assert document["verify"]["passed"] is False
    assert "--gguf f32" in document["error"]["hint"]
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["exports"]["f16"]["verify"]["passed"] is False
    assert (tmp_path / "out/adapter-F16.gguf").is_file()
    text = invoke(*words, "--overwrite").stdout
    assert "failed" in text
    assert "next:" not in text
    assert not (tmp_path / "out/Modelfile").exists()  # that of the sound file before


def test_a_file_that_is_not_as_planned_fails(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(source: Any, path: Path, **options: Any) -> Any:
        result = module_convert(source, path, **options)
        path.write_bytes(path.read_bytes()[:-100_000])
        return result

    module_convert = module.convert
    monkeypatch.setattr(module, "convert", convert)
    result = invoke("run", "--gguf", "f16")
    assert (result.exit_code, "cut off" in result.stderr) == (8, True)


def test_without_llama_cpp_a_file_that_nothing_reads_is_not_compared(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*words: Any, **options: Any) -> Any:
        raise UsageError("there is no llama.cpp")

    monkeypatch.setattr("ftcli.gguf.verify.open_subject", refuse)
    monkeypatch.setattr("ftcli.gguf.verify.load_library", refuse)
    told: list[Event] = []
    (file,) = export("run", kinds=["f16"], on_event=told.append).files
    assert file.verification is not None
    assert (file.verification.verdict, file.verification.has_passed) == (None, True)
    assert any(isinstance(event, Notice) and "not compared" in event.text for event in told)
    assert sum(isinstance(event, Stage) and event.name == "verify" for event in told) == 2
