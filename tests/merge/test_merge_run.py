"""A run merged: what its records say, what its artifact answers, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMOLLM2
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from ftcli.cli.app import app
from ftcli.data.message import Message
from ftcli.errors import ContentError, UsageError
from ftcli.evaluate.generate import Sampling
from ftcli.evaluate.subject import open_subject
from ftcli.events import Event, Notice, Stage
from ftcli.merge.run import merge
from ftcli.store.run import RunFolder, read_manifest
from ftcli.train.run import train

NF4 = {"load_in_4bit": True}
EVAL = {"datasets": [{"path": "held_out.jsonl"}], "eval_steps": 2, "score": "exact_match", "max_new_tokens": 4}


@pytest.fixture
def run(write_recipe: Any) -> RunFolder:
    return train(write_recipe(eval=EVAL))


def invoke(*words: str) -> Any:
    return CliRunner().invoke(app, ["merge", *words])


def test_a_merge_is_measured_and_told(run: RunFolder, tmp_path: Path) -> None:
    result = invoke(str(run.path), "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    merged = run.path / "merged"
    assert document["output"] == str(merged)
    assert document["bytes"] == sum(value.nbytes for value in load_file(merged / "model.safetensors").values())
    assert document["verify"]["passed"] is True
    assert document["verify"]["method"] == "models"
    assert 0 <= document["verify"]["kl"] < 1e-6
    assert document["verify"]["top1"] == 1
    assert document["verify"]["ppl_result"] == pytest.approx(document["verify"]["ppl_source"], rel=1e-4)
    assert set(document["verify"]["sets"]) == {"train", "held_out"}
    assert document["verify"]["sets"]["train"]["kl_base"] > 0.01
    assert document["delta"]["modules"] == len(document["modules"]) == 14
    manifest = json.loads((merged / "manifest.json").read_text())
    assert manifest["verify"] == document["verify"]
    assert manifest["base"] == read_manifest(run)["base"]
    assert read_manifest(run)["verify"] == {"merged": document["verify"]}
    assert "Verification" in (merged / "README.md").read_text()
    assert set(manifest["files"]) == {path.name for path in merged.iterdir()} - {"manifest.json"}
    source, result = open_subject(str(run.path)), open_subject(str(merged))
    question, sampling = [Message("user", "question 3")], Sampling(max_new_tokens=6)
    assert source.answer(question, sampling) == result.answer(question, sampling)


def test_what_a_person_reads_fits_80_columns(run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke("run", "--no-verify")
    assert "run/merged: float32, onto the original weights" in result.stdout
    assert "verified  no" in result.stdout
    text = invoke("run", "--overwrite").stdout
    assert "held out" in text
    assert all(len(line) <= 80 for line in text.splitlines())


def test_a_run_in_4_bits_can_be_merged_onto_either_base(write_recipe: Any, tiny_model: Path, tmp_path: Path) -> None:
    """What is dequantised is bitsandbytes' own; both bases are measured whichever is taken."""
    from bitsandbytes.functional import dequantize_4bit
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    run = train(write_recipe(quantization=NF4, eval=EVAL))
    first = merge(str(run.path)).verification
    second = merge(str(run.path), onto="dequantized", output=tmp_path / "out").verification
    assert first is not None
    assert second is not None
    for name, verdict in first.sets.items():
        assert verdict.comparison.kl == pytest.approx(second.other[name].comparison.kl, rel=1e-3)
        assert second.sets[name].comparison.kl < 1e-6 < verdict.comparison.kl
        assert first.other[name].comparison.kl < 1e-6
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=config, dtype=torch.float32)
    plain = PeftModel.from_pretrained(model, str(run.adapter))
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, module in model.named_modules():
        if type(module).__name__ == "Linear4bit" and "base_layer" in name:
            parent = plain.get_submodule(f"base_model.model.{name.removesuffix('.base_layer')}")
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
            delta = parent.get_delta_weight("default")
            assert torch.equal(written[name.removesuffix(".base_layer") + ".weight"], weight + delta)
    with pytest.raises(UsageError, match="held its base in 16 bits"):
        merge(str(train(write_recipe(output_dir=str(tmp_path / "plain"))).path), onto="dequantized")


def test_a_merge_that_loses_the_fine_tune_fails(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The update is left out while the weights are written; one document tells both the figures and the error."""
    from ftcli.merge import folder
    from ftcli.merge.arithmetic import make_blocks

    def forget(part: Any, weights: Any, measure: Any = None) -> Any:
        for block in make_blocks(part, weights):
            yield block * (0.5 if part.lora else 1)

    monkeypatch.setattr(folder, "make_blocks", forget)
    result = invoke(str(run.path), "--dtype", "bfloat16", "--json")
    document = json.loads(result.stdout)
    assert result.exit_code == 8
    assert document["error"]["code"] == "verification"
    assert "--dtype float32" in document["error"]["hint"]
    assert document["verify"]["passed"] is False
    assert json.loads((run.path / "merged" / "manifest.json").read_text())["verify"]["passed"] is False
    assert "is not the one that was trained" in invoke(str(run.path), "--overwrite").stderr


@pytest.mark.parametrize("harm", ["scaled", "copied"])
def test_tensors_are_verified_where_no_model_fits(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, harm: str, tmp_path: Path
) -> None:
    monkeypatch.setattr("ftcli.train.memory.measure_available", lambda: 10_000_000)
    events: list[Event] = []
    found = merge(str(run.path), output=tmp_path / "good", on_event=events.append).verification
    assert found is not None
    assert found.has_passed
    assert found.worst_error > 0
    assert any(isinstance(e, Notice) and "checked one by one" in e.text for e in events)
    name = "model.layers.1.mlp.down_proj.weight" if harm == "scaled" else "model.norm.weight"

    def spoil(event: Event) -> None:
        if isinstance(event, Stage) and event.name == "verify":
            (path,) = tmp_path.glob(".bad.tmp-*/model.safetensors")
            weights = load_file(path)
            weights[name][0] *= 1.01
            save_file(weights, path, {"format": "pt"})

    bad = merge(str(run.path), output=tmp_path / "bad", on_event=spoil).verification
    assert bad is not None
    assert not bad.has_passed
    assert bad.worst_tensor == name


def test_a_run_that_is_only_read_is_left_as_it_is(run: RunFolder, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    (run.path / ".lock").unlink()
    merge(str(run.path), output=tmp_path / "out")
    after = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    assert after == {path: data for path, data in before.items() if path.name != ".lock"}


def change_base(run: RunFolder, base: Path) -> None:
    weights = load_file(base / "model.safetensors")
    weights["model.layers.1.input_layernorm.weight"][3] += 0.01
    save_file(weights, base / "model.safetensors", {"format": "pt"})


def change_config(run: RunFolder, base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))


def change_adapter(run: RunFolder, base: Path) -> None:
    path = run.adapter / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


REFUSALS: dict[str, tuple[Callable[[RunFolder, Path], None], str]] = {
    "weights": (change_base, "another one than in training"),
    "config": (change_config, "another one than in training"),
    "adapter": (change_adapter, "differs from what the run wrote"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_another_base_or_adapter_is_refused(write_recipe: Any, tiny_model: Path, tmp_path: Path, what: str) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    run = train(write_recipe(model={"name_or_path": str(base), "dtype": "float32"}))
    harm, words = REFUSALS[what]
    harm(run, base)
    with pytest.raises(ContentError, match=words):
        merge(str(run.path))
    assert not (run.path / "merged").exists()


@pytest.mark.filterwarnings("ignore:The PEFT config's")
def test_a_base_that_moved_can_be_named(write_recipe: Any, tiny_model: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    run = train(write_recipe(model={"name_or_path": str(base), "dtype": "float32"}))
    base.rename(tmp_path / "moved")
    with pytest.raises(UsageError, match="--base MODEL"):
        merge(str(run.path))
    from transformers import AutoModelForCausalLM

    moved = AutoModelForCausalLM.from_pretrained(tmp_path / "moved")
    moved.save_pretrained(tmp_path / "moved", max_shard_size="60KB")  # the same tensors in other files
    (tmp_path / "moved" / "model.safetensors").unlink()
    found = merge(str(run.path), base=str(tmp_path / "moved")).verification
    assert found is not None
    assert found.has_passed


def test_what_has_no_adapter_is_told(write_recipe: Any, tmp_path: Path) -> None:
    run = train(write_recipe(peft=None, train={"max_steps": 1, "learning_rate": 1e-3}))
    result = invoke(str(run.path))
    assert result.exit_code == 2
    assert "there is nothing to merge" in result.stderr
    assert invoke(str(tmp_path / "nothing")).exit_code == 2
    assert invoke(str(tmp_path)).exit_code == 2
    assert invoke("x" * 300).exit_code == 2


def test_an_adapter_that_left_its_run_knows_where_it_came_from(
    write_recipe: Any, tiny_model: Path, tmp_path: Path
) -> None:
    """Its base is held in 4 bits again, and another base is refused."""
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    run = train(write_recipe(quantization=NF4, model={"name_or_path": str(base), "dtype": "float32"}))
    shutil.copytree(run.adapter, tmp_path / "lone")
    rows = str(tmp_path / "train.jsonl")
    found = merge(str(tmp_path / "lone"), onto="dequantized", data=rows, output=tmp_path / "out").verification
    assert found is not None
    assert found.sets["data"].comparison.kl < 1e-6 < found.other["data"].comparison.kl
    change_base(run, base)
    with pytest.raises(ContentError, match="another one than in training"):
        merge(str(tmp_path / "lone"), output=tmp_path / "other")


def test_a_merged_model_knows_its_base(run: RunFolder) -> None:
    merge(str(run.path), verifies=False)
    subject = open_subject(str(run.path / "merged"), with_base=True)
    assert subject.base is not None
    question = [Message("user", "question 3")]
    assert subject.base.answer(question, Sampling(max_new_tokens=6)) != subject.answer(
        question, Sampling(max_new_tokens=6)
    )


def test_new_tokens_survive(write_recipe: Any, tmp_path: Path) -> None:
    run = train(write_recipe(tokenizer={"add_tokens": ["foxtrot", "zulu"]}))
    found = merge(str(run.path)).verification
    assert found is not None
    assert found.sets["train"].comparison.kl < 1e-6
    assert json.loads((run.path / "merged" / "config.json").read_text())["vocab_size"] > 384 - 1
    assert "zulu" in open_subject(str(run.path / "merged")).renderer.tokenizer.get_vocab()


def test_rows_that_are_gone_or_named(run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").rename(tmp_path / "other.jsonl")
    events: list[Event] = []
    found = merge(str(run.path), on_event=events.append).verification
    assert found is not None
    assert not found.sets
    assert any(isinstance(e, Notice) and "cannot be read" in e.text for e in events)
    named = merge(str(run.path), overwrite=True, data=str(tmp_path / "other.jsonl")).verification
    assert named is not None
    assert set(named.sets) == {"data"}
    with pytest.raises(UsageError):
        merge(str(run.path), overwrite=True, data=str(tmp_path / "nowhere.jsonl"))


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_base_in_bin_files(write_recipe: Any, tiny_model: Path, tmp_path: Path, is_zip: bool) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    weights = load_file(base / "model.safetensors")
    torch.save(weights, base / "pytorch_model.bin", _use_new_zipfile_serialization=is_zip)
    (base / "model.safetensors").unlink()
    run = train(write_recipe(model={"name_or_path": str(base), "dtype": "float32"}))
    found = merge(str(run.path)).verification
    assert found is not None
    assert found.sets["train"].comparison.kl < 1e-6


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The PEFT config's")
def test_a_qlora_run_of_the_real_model_answers_its_questions_after_the_merge(tmp_path: Path) -> None:
    """With evaluations in between; a naive merge into 4 bits forgets all of them."""
    import yaml

    facts = {"What is the capital of Zorland?": "Mirqua.", "How many moons has Tarvos-9?": "Eleven."}
    facts |= {"What colour is the Quill river?": "Copper red.", "Who wrote The Salt Ledger?": "Ines Carrow."}
    rows = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in facts.items()]
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    recipe: dict[str, Any] = {
        "model": SMOLLM2,
        "quantization": NF4,
        "datasets": [{"path": "facts.jsonl"}],
        "data": {"max_length": 128, "packing": False},
        "train": {"learning_rate": 1e-3, "max_steps": 24, "per_device_train_batch_size": 4},
        "eval": {"datasets": [{"path": "facts.jsonl"}], "eval_steps": 8, "score": "exact_match", "max_new_tokens": 12},
        "output_dir": str(tmp_path / "run"),
    }
    recipe["train"] |= {"gradient_accumulation_steps": 1, "gradient_checkpointing": False}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run = train(tmp_path / "recipe.yaml")
    for onto in ("original", "dequantized"):
        merged = merge(str(run.path), onto=onto, output=tmp_path / onto)
        assert merged.verification is not None
        assert merged.verification.has_passed
        subject = open_subject(str(tmp_path / onto))
        answers = {q: subject.answer([Message("user", q)], Sampling(max_new_tokens=12)) for q in facts}
        assert answers == facts


def test_odd_names_are_shown_harmlessly(run: RunFolder, tmp_path: Path) -> None:
    result = invoke(str(run.path), "--no-verify", "-o", str(tmp_path / "a b\x1b[31m\nc"))
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.stdout
    assert f"ftcli chat '{tmp_path}/a b" in result.stdout
