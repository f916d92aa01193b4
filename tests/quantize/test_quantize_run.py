"""``ftcli quantize``: folders that are measured, what is told of them, and what is refused or left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_model, save_model
from safetensors.torch import load_file
from typer.testing import CliRunner

from ftcli.cli.app import app
from ftcli.evaluate.subject import open_subject
from ftcli.events import Event, Progress
from ftcli.jobs import compression
from ftcli.merge.run import merge
from ftcli.quantize import rounding, work
from ftcli.quantize.method import build_spec
from ftcli.quantize.run import quantize
from ftcli.store.run import RunFolder

FITTED = ("--samples", "4", "--seq-len", "64", "--tune", "0")


def invoke(*words: str) -> Any:
    return CliRunner().invoke(app, ["quantize", *words])


def list_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


KEYS: dict[str, dict[str, Any]] = {
    "gptq": {"bits": 4, "group_size": 64, "sym": True, "desc_act": False, "checkpoint_format": "gptq"},
    "awq": {"bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True, "load_in_4bit": False},
}


def check_keys(method: str, section: dict[str, Any]) -> None:
    """The documented keys, which transformers' own classes take, and vLLM (bits, group_size, desc_act, sym, …)."""
    from transformers import AwqConfig, BitsAndBytesConfig, GPTQConfig

    assert section["quant_method"] == (method if method in ("gptq", "awq") else "bitsandbytes")
    assert {key: section[key] for key in KEYS[method]} == KEYS[method]
    parsed = {"gptq": GPTQConfig, "awq": AwqConfig}.get(method, BitsAndBytesConfig).from_dict(dict(section))
    if method in ("gptq", "awq"):
        assert (parsed.bits, parsed.group_size) == (4, 64)
    else:
        assert (parsed.load_in_4bit, parsed.load_in_8bit) == (method == "nf4", method == "int8")


@pytest.mark.parametrize("method", ["gptq", pytest.param("awq", marks=pytest.mark.slow), "nf4", "int8"])
def test_a_run_is_quantised_measured_and_told(method: str, run: RunFolder) -> None:
    """No rows are named: rounding is fitted to the run's training data, and the result is held out rows away."""
    options = FITTED if method in ("gptq", "awq") else ()
    result = invoke("run", "--method", method, *options, "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    folder = run.path / f"quantized-{method}"
    assert (document["command"], document["source"], document["output"]) == ("quantize", "run", f"run/{folder.name}")
    assert document["bytes"] == (folder / "model.safetensors").stat().st_size
    assert document["layers"] == 14
    found = document["verify"]
    assert found["passed"] is True
    assert 0 <= found["kl"] < found["most_kl"]
    assert found["worst"]
    assert (document["calibration"] is None) == (method in ("nf4", "int8"))
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["command"] == "quantize"
    assert manifest["method"] == method
    assert manifest["template_sha256"] == json.loads((run.path / "manifest.json").read_text())["template_sha256"]
    assert manifest["files"].keys() == set(list_names(folder)) - {"manifest.json"}
    assert json.loads((run.path / "manifest.json").read_text())["verify"][folder.name]["passed"] is True
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    check_keys(method, config["quantization_config"])
    card = (folder / "README.md").read_text()
    assert "fine-tuned with ftcli" in card
    assert "pip install" in card
    assert not [name for name in list_names(run.path) if name.startswith(".") and name != ".lock"]
    assert not list(folder.glob(".*"))


def test_a_merged_run_gives_what_the_run_gives(run: RunFolder, tmp_path: Path) -> None:
    """Merged on the fly or from its folder: the same bytes."""
    merge("run", dtype="bfloat16")
    quantize("run", build_spec("nf4"), verifies=False)
    quantize("run/merged", build_spec("nf4"), output=tmp_path / "from-merged", verifies=False)
    first, second = (
        load_file(path / "model.safetensors") for path in (run.path / "quantized-nf4", tmp_path / "from-merged")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], value) for name, value in second.items())


@pytest.mark.slow
def test_learned_rounding_and_repeats(run: RunFolder, tmp_path: Path) -> None:
    """Two runs give the same bytes; steps of learning give others."""
    for name, tune in (("a", 0), ("b", 0), ("c", 2)):
        spec = build_spec("gptq", samples=4, seq_len=64, tune=tune)
        quantize("run", spec, output=tmp_path / name, verifies=False)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert files[0] == files[1]
    assert files[0] != files[2]


def test_a_result_that_is_broken_is_exit_8_and_says_so(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def swap(folder: Path, tensors: Any) -> None:
        """Scales of one layer are a hundred times too large."""
        parts = {}
        for tensor, data in tensors:
            value = torch.frombuffer(bytearray(data), dtype=torch.float32) if "nested_absmax" in tensor.name else None
            if value is not None and "layers.1.mlp.down_proj" in tensor.name:
                data = (value * 100).view(torch.uint8).numpy()
            parts[tensor] = data
        saved(folder, parts.items())

    saved = work.save_tensors
    monkeypatch.setattr(work, "save_tensors", swap)
    result = invoke("run", "--method", "nf4", "--json")
    assert result.exit_code == 8, result.output
    document = json.loads(result.stdout)
    assert document["verify"]["passed"] is False
    assert document["verify"]["worst"][0]["name"] == "model.layers.1"
    assert document["error"]["exit"] == 8
    manifest = json.loads((run.path / "quantized-nf4" / "manifest.json").read_text())
    assert manifest["verify"]["passed"] is False
    assert "**Failed**" in (run.path / "quantized-nf4" / "README.md").read_text()


def test_a_tensor_that_is_missing_is_found(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = work.save_tensors
    monkeypatch.setattr(
        work, "save_tensors", lambda folder, tensors: saved(folder, (t for t in tensors if "up_proj" not in t[0].name))
    )
    result = invoke("run", "--method", "int8")
    assert result.exit_code == 8
    assert "up_proj" in result.output


@pytest.mark.parametrize("method", [pytest.param("gptq", marks=pytest.mark.slow), "nf4"])
def test_ctrl_c_leaves_nothing(method: str, run: RunFolder) -> None:
    before = list_names(run.path)

    def stop(event: Event) -> None:
        if isinstance(event, Progress) and event.stage == "quantize":
            raise KeyboardInterrupt

    options = {"samples": 2, "seq_len": 64, "tune": 0} if method == "gptq" else {}
    with pytest.raises(KeyboardInterrupt):
        quantize("run", build_spec(method, **options), on_event=stop)
    assert list_names(run.path) == before


def test_what_auto_round_says_when_it_gives_up(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even by ``sys.exit``, which is not the user's exit code."""
    import auto_round

    def give_up(*_: Any, **__: Any) -> None:
        raise SystemExit(-1)

    monkeypatch.setattr(auto_round, "AutoRound", give_up)
    result = invoke("run", "--method", "gptq", *FITTED)
    assert result.exit_code == 3
    assert "auto-round gave up" in result.output
    assert not (run.path / "quantized-gptq").exists()


def test_an_output_that_exists_stays_unless_it_is_ours(run: RunFolder) -> None:
    assert invoke("run", "--method", "nf4", "--no-verify").exit_code == 0
    result = invoke("run", "--method", "nf4", "--no-verify")
    assert result.exit_code == 2
    assert "--overwrite" in result.output
    assert invoke("run", "--method", "nf4", "--no-verify", "--overwrite").exit_code == 0
    other = run.path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    assert invoke("run", "--method", "nf4", "-o", str(other), "--overwrite").exit_code == 2
    assert (other / "thesis.txt").read_text() == "mine"


def test_what_is_quantised_already_is_refused(run: RunFolder) -> None:
    quantize("run", build_spec("nf4"), verifies=False)
    result = invoke("run/quantized-nf4", "--method", "int8")
    assert result.exit_code == 3
    assert "quantised already (bitsandbytes, 4 bits)" in result.output


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (("run",), 2, "which method?"),
        (("run", "--method", "gguf"), 2, "there is no such method"),
        (("run", "--method", "nf4", "--calibration", "rows.jsonl"), 2, "is fitted to no rows"),
        (("run", "--method", "gptq", "--calibration", "none.jsonl"), 2, "none.jsonl"),
        (("run", "--method", "gptq", "--group-size", "128"), 3, "--group-size 64"),
        (("run", "--method", "nf4", "--max-size", "1GB"), 2, "--max-size is for --compare"),
        (("run", "--compare", "nf4,zip"), 2, "is neither a method nor a type"),
        (("run", "--compare", ","), 2, "nothing is named"),
        (("run", "--compare", "nf4", "--max-size", "small"), 2, "is no size"),
        (("run", "--compare", "nf4", "--method", "awq"), 2, "is not among those"),
        (("run", "--compare", "nf4", "--max-size", "1kB"), 2, "none is as small"),
        (("run", "--compare", "nf4", "--bits", "4"), 2, "does not go with --compare"),
        (("run", "--compare", "nf4", "--data", "none.jsonl"), 2, "none.jsonl"),
        (("run", "--compare", "nf4,q8_0", "--group-size", "64"), 2, "nothing that is compared takes this"),
        (("nothing/here", "--method", "nf4"), 4, "nothing/here"),
    ],
)
def test_nonsense_is_one_clear_error(words: tuple[str, ...], code: int, text: str, run: RunFolder) -> None:
    before = list_names(run.path)
    result = invoke(*words)
    assert result.exit_code == code, result.output
    assert text in result.output
    assert "Traceback" not in result.output
    assert list_names(run.path) == before


def test_a_gguf_file_is_sent_elsewhere(run: RunFolder) -> None:
    from ftcli.gguf.export import export

    made = export("run", kinds=["f16"], verifies=False)
    result = invoke(str(made.files[0].path), "--method", "nf4")
    assert result.exit_code == 2
    assert "ftcli export" in result.output


@pytest.mark.slow
def test_a_model_alone_is_measured_on_what_it_is_fitted_to(tiny_model: Path, write_rows: Any, tmp_path: Path) -> None:
    rows = str(write_rows())
    out = tmp_path / "out"
    result = invoke(str(tiny_model), "--method", "awq", "--calibration", rows, *FITTED, "-o", str(out))
    assert result.exit_code == 0, result.output
    assert "compared on the rows that rounding is fitted to" in result.output
    assert json.loads((out / "manifest.json").read_text())["verify"]["n_tokens"] > 0
    assert "fine-tuned" not in (out / "README.md").read_text()


def test_the_lack_of_memory_is_told_before_work(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    stages: list[str] = []
    monkeypatch.setattr(work, "explain_lack", lambda n, dtype: "it takes 99.0 GB in memory, and 1.0 are free")
    result = invoke("run", "--method", "gptq", *FITTED)
    assert result.exit_code == 7
    assert "99.0 GB" in result.output
    assert "--samples" in result.output
    assert "quantize" not in stages


def test_json_says_why_nothing_was_compared(tiny_model: Path, run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    document = json.loads(invoke(str(tiny_model), "--method", "nf4", "--json").stdout)
    assert (document["verify"]["kl"], document["verify"]["skipped"]) == (None, "there are no rows to compare on")
    monkeypatch.setattr(work, "explain_lack", lambda n, dtype: "it takes 99.0 GB in memory, and 1.0 are free")
    found = json.loads(invoke("run", "--method", "nf4", "--json").stdout)["verify"]
    assert found["skipped"] == "the source does not fit in memory: it takes 99.0 GB in memory, and 1.0 are free"
    assert found["passed"] is True


@pytest.mark.slow
def test_a_quantised_folder_answers(run: RunFolder) -> None:
    """`ftcli chat` and `ftcli eval` take it as they take any model."""
    quantize("run", build_spec("gptq", samples=4, seq_len=64, tune=0), verifies=False)
    subject = open_subject("run/quantized-gptq")
    assert subject.renderer.template is not None
    result = CliRunner().invoke(app, ["eval", "run", "run/quantized-gptq", "--json"])
    assert result.exit_code == 0, result.output
    targets = json.loads(result.stdout)["targets"]
    assert targets[1]["kl"] < 0.1


@pytest.mark.slow
def test_forms_side_by_side_and_the_best_that_fits_is_kept(run: RunFolder) -> None:
    words = ("--compare", "nf4,int8,gptq,awq,q8_0,q4_k_m", "--max-size", "110kB")
    result = invoke("run", *words, *FITTED, "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    names = [entry["target"] for entry in document["targets"]]
    assert names == ["run", "nf4", "int8", "gptq", "awq", "q8_0", "q4_k_m"]
    assert all(
        entry["kl"] is not None and entry["score"]["metric"] == "exact_match" for entry in document["targets"][1:]
    )
    fitting = [entry for entry in document["targets"][1:] if entry["bytes"] <= 110_000]
    assert 0 < len(fitting) < 6
    best = min(fitting, key=lambda entry: entry["kl"])["target"]
    assert document["kept"] == best
    assert Path(document["output"]).exists()
    assert document["verify"]["passed"] is True
    made = [path for path in list_names(run.path) if path.startswith("quantized") or path == "gguf"]
    assert len(made) == 1
    assert not [name for name in list_names(run.path) if name.startswith(".") and name != ".lock"]


@pytest.mark.parametrize(
    ("name", "place"), [("nf4", "quantized-nf4/model.safetensors"), ("q8_0", "gguf/run-Q8_0.gguf")]
)
def test_the_one_that_is_named_is_kept(name: str, place: str, run: RunFolder) -> None:
    result = invoke("run", "--compare", "nf4,q8_0", "--method", name)
    assert result.exit_code == 0, result.output
    assert (run.path / place).is_file()
    assert str(place).split("/")[0] in result.output
    other = invoke("run", "--compare", "nf4,q8_0", "--method", name)
    assert other.exit_code == 2


def test_none_is_kept_where_none_is_asked_for(run: RunFolder) -> None:
    before = list_names(run.path)
    result = invoke("run", "--compare", "nf4,q8_0")
    assert result.exit_code == 0, result.output
    assert "none is kept" in result.output
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert list_names(run.path) == before


@pytest.mark.slow
def test_a_model_alone_is_compared_on_rows_that_are_named(tiny_model: Path, write_rows: Any, tmp_path: Path) -> None:
    result = invoke(str(tiny_model), "--compare", "nf4,int8", "-o", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert "--data FILE" in result.output
    assert "quantize" not in result.output.split("error:")[0]
    rows = str(write_rows())
    result = invoke(
        str(tiny_model), "--compare", "nf4,awq", "--calibration", rows, *FITTED, "-o", str(tmp_path / "out")
    )
    assert result.exit_code == 0, result.output
    assert "compared on the rows that rounding is fitted to" in result.output


def test_sizes() -> None:
    assert compression.read_size("5GB") == 5_000_000_000
    assert compression.read_size("1.5 GiB") == 3 << 29
    assert compression.read_size("800M") == 800_000_000


@pytest.mark.slow
def test_the_library_is_not_imported_for_what_does_not_need_it() -> None:
    import subprocess
    import sys

    code = "import sys, ftcli.quantize.run, ftcli.jobs.compression; print('auto_round' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_padding_that_ends_a_turn_is_fitted_to_as_well(tiny_tokenizer: Any) -> None:
    changed = rounding._without_padding(tiny_tokenizer)
    assert changed.pad_token_id is None
    assert tiny_tokenizer.pad_token_id is not None


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_biases_are_kept(method: str, tmp_path: Path, tiny_tokenizer: Any, write_rows: Any) -> None:
    """Those of Qwen 2 lie beside packed weights, and have the type of what is not packed."""
    model = build_model("qwen2")
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    source = save_model(tmp_path / "source", model.to(torch.bfloat16), tiny_tokenizer)
    spec = build_spec(method, samples=2, seq_len=64, tune=0)
    made = quantize(str(source), spec, calibration=str(write_rows()), output=tmp_path / "out")
    assert made.verification
    assert made.verification.has_passed
    packed, dense = (load_file(path / "model.safetensors") for path in (tmp_path / "out", source))
    biases = [name for name in dense if name.endswith("bias")]
    assert len(biases) == 6
    for name in biases:
        assert packed[name].dtype == torch.bfloat16
        if method == "gptq":  # awq scales those of v_proj with its channels
            torch.testing.assert_close(packed[name], dense[name], atol=1e-6, rtol=0)


def test_an_error_names_the_model_and_no_folder_of_ours(tmp_path: Path, tiny_tokenizer: Any, write_rows: Any) -> None:
    source = save_model(tmp_path / "gpt2", build_model("gpt2"), tiny_tokenizer)
    result = invoke(str(source), "--method", "gptq", "--calibration", str(write_rows()), "-o", str(tmp_path / "out"))
    assert result.exit_code == 3
    assert f"error: {source}: the model has no linear layer that GPTQ could pack" in result.output
    assert "--method nf4" in result.output


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ((), "which rows? a model has none of its own"),
        (("--data", "none.jsonl"), "none.jsonl"),
        (("--calibration", "recipe.yaml"), "which rows? a model has none of its own"),
    ],
)
def test_rows_to_compare_on_are_read_before_anything_is_made(
    words: tuple[str, ...],
    text: str,
    tiny_model: Path,
    write_recipe: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_recipe()
    monkeypatch.setattr(work, "save_tensors", lambda *_: pytest.fail("something was made"))
    result = invoke(str(tiny_model), "--compare", "nf4", *words)
    assert result.exit_code == 2, result.output
    assert text in result.output


@pytest.mark.slow
def test_rows_longer_than_the_context_are_cut_for_rounding_and_not_for_comparing(
    tiny_model: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "long.jsonl"
    turns = [{"role": "user", "content": "fox " * 600}, {"role": "assistant", "content": "yes"}]
    rows.write_text(json.dumps({"messages": turns}) + "\n")
    words = (str(tiny_model), "--method", "gptq", "--calibration", str(rows), *FITTED, "-o", str(tmp_path / "out"))
    result = invoke(*words)
    assert result.exit_code == 3
    assert "--no-verify" in result.output
    assert invoke(*words, "--no-verify").exit_code == 0
