"""Adapters as GGUF files: against llama.cpp's converter (pinned hashes), and llama.cpp with them against PEFT."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMOLLM2, build_model, save_model
from gguf import GGUFReader
from gguf_models import ADAPTED, convert_model, write_adapter, write_model
from make_lora import NAME
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_gguf_convert import FAMILIES, needs_llama
from test_gguf_export import list_names

from ftcli.data.chat import ChatRenderer, Rendered
from ftcli.errors import ContentError, DiskError, UsageError
from ftcli.evaluate.llama_library import LlamaModel
from ftcli.evaluate.llamacpp import LlamaCppBackend
from ftcli.evaluate.subject import TorchBackend
from ftcli.events import Event, Notice, Progress
from ftcli.gguf import adapter as module
from ftcli.gguf.adapter import export_adapter
from ftcli.gguf.export import export
from ftcli.store.file import hash_file
from ftcli.store.run import RunFolder
from ftcli.store.target import find_model
from ftcli.train.run import train

HASHES = json.loads(Path(__file__).with_name("lora.json").read_text())
UNTIED = [name for name in FAMILIES if not name.startswith("gemma")]
EVERYTHING = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj", "embed_tokens", "lm_head"]
PATTERNS = {
    "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 8},
    "alpha_pattern": {"k_proj": 3, "o_proj": 16},
}


@pytest.fixture
def adapt(tmp_path: Path, tiny_tokenizer: Any) -> Any:
    """A function that saves a base whose logits are far from uniform, and a LoRA that moves them; and returns both."""

    def make(family: str = "llama", changes: dict[str, Any] | None = None, **lora: Any) -> tuple[Path, Path]:
        model = build_model(family, vocab_size=len(tiny_tokenizer), **(changes or {})).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                _ = parameter.mul_(4) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) / 10)
        base = save_model(tmp_path / "base", model, tiny_tokenizer)
        torch.manual_seed(1)
        settings = {"target_modules": "all-linear", "r": 4, "lora_alpha": 6, "init_lora_weights": False, **lora}
        wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
        wrapped.peft_config["default"].base_model_name_or_path = str(base)
        wrapped.save_pretrained(str(tmp_path / "tuned"), save_embedding_layers=False)
        return base, tmp_path / "tuned"

    return make


def compare_logits(base: Path, adapter: Path, file: Path, tokenizer: Any, scratch: Path) -> tuple[float, float, float]:
    """The greatest distance of llama.cpp with the file to PEFT, of PEFT to the base, and of a logit to zero."""
    from transformers import AutoModelForCausalLM

    convert_model(base, scratch / "base.gguf", kind="f32")
    renderer = ChatRenderer(tokenizer)
    n = len(tokenizer)
    documents = [Rendered([i * 7 % n for i in range(40)], [i > 2 for i in range(40)], "f", 1)]
    model = LlamaModel(scratch / "base.gguf", n_threads=1, adapter=file)
    found, _ = LlamaCppBackend(model, renderer).compute_logits(documents)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    before, _ = TorchBackend(plain, renderer).compute_logits(documents)
    tuned = PeftModel.from_pretrained(plain, str(adapter)).eval()
    wanted, _ = TorchBackend(tuned, renderer).compute_logits(documents)
    return tuple(float(v.abs().max()) for v in (found - wanted, before - wanted, wanted))  # type: ignore[return-value]


@pytest.mark.parametrize("case", ADAPTED)
def test_file_is_the_one_that_the_converter_writes(tmp_path: Path, case: str) -> None:
    changes, targets = ADAPTED[case]
    base = write_model(tmp_path / "base", "smollm2", **changes)
    adapter = write_adapter(tmp_path / NAME, base, targets)
    made = export_adapter(str(adapter), base=str(base), output=tmp_path / "out", verifies=False)
    assert hashlib.sha256(made.path.read_bytes()).hexdigest() == HASHES[case]
    assert made.path == tmp_path / "out" / f"{NAME}-F32-LoRA.gguf"
    assert made.size_bytes == made.path.stat().st_size


@needs_llama
@pytest.mark.parametrize("name", FAMILIES)
def test_llama_cpp_computes_what_peft_does(tmp_path: Path, tiny_tokenizer: Any, adapt: Any, name: str) -> None:
    base, adapter = adapt(*FAMILIES[name])
    made = export_adapter(str(adapter), output=tmp_path / "out", verifies=False)
    off, moved, greatest = compare_logits(base, adapter, made.path, tiny_tokenizer, tmp_path)
    assert off < 0.01 < min(moved, greatest) / 100  # llama.cpp's cache is in float16


@needs_llama
@pytest.mark.parametrize(
    "lora",
    [
        {"use_rslora": True},
        PATTERNS,
        {"use_rslora": True, **PATTERNS},
        {"target_modules": ["k_proj", "down_proj"]},
        {"target_modules": r".*\.1\..*(q_proj|v_proj)"},
        {"lora_alpha": -3},
    ],
    ids=["rslora", "patterns", "both", "some", "regex", "negative"],
)
def test_scales_and_choices_are_pefts(tmp_path: Path, tiny_tokenizer: Any, adapt: Any, lora: dict[str, Any]) -> None:
    base, adapter = adapt("llama", {}, **lora)
    made = export_adapter(str(adapter), output=tmp_path / "out", verifies=False)
    off, moved, _ = compare_logits(base, adapter, made.path, tiny_tokenizer, tmp_path)
    assert off < 0.02 < moved / 50


@needs_llama
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
def test_embedding_and_head_are_held_where_they_are_two(
    tmp_path: Path, tiny_tokenizer: Any, adapt: Any, family: str
) -> None:
    modules = ["qkv_proj", "embed_tokens", "lm_head"] if family == "phi3" else EVERYTHING
    changes = {"sliding_window": None, "original_max_position_embeddings": 512} if family == "phi3" else {}
    base, adapter = adapt(family, {"tied": False, **changes}, target_modules=modules, use_rslora=True)
    made = export_adapter(str(adapter), output=tmp_path / "out", verifies=False)
    off, moved, greatest = compare_logits(base, adapter, made.path, tiny_tokenizer, tmp_path)
    assert off < 0.01 < min(moved, greatest) / 100


def test_the_scale_of_each_module_is_in_b(tmp_path: Path, adapt: Any) -> None:
    _, adapter = adapt("qwen2", {}, use_rslora=True, **PATTERNS)
    made = export_adapter(str(adapter), output=tmp_path / "out", verifies=False)
    assert made.ranks == (2, 4, 8)
    reader = GGUFReader(made.path)
    assert reader.fields["adapter.lora.alpha"].contents() == 0
    found = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    stored = load_file(adapter / "adapter_model.safetensors")
    for theirs, ours, scale in (
        ("blk.0.attn_q", "0.self_attn.q_proj", 6 / 2**0.5),
        ("blk.0.attn_k", "0.self_attn.k_proj", 3 / 2),
        ("blk.0.ffn_down", "0.mlp.down_proj", 6 / 2),
        ("blk.1.ffn_down", "1.mlp.down_proj", 6 / 8**0.5),
        ("blk.1.attn_output", "1.self_attn.o_proj", 16 / 2),
    ):
        key = f"base_model.model.model.layers.{ours}.lora_"
        assert torch.equal(found[f"{theirs}.weight.lora_a"], stored[f"{key}A.weight"])
        torch.testing.assert_close(found[f"{theirs}.weight.lora_b"], stored[f"{key}B.weight"] * scale)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
@pytest.mark.parametrize(
    ("changes", "lora", "told"),
    [
        ({}, {"use_dora": True}, "DoRA"),
        ({}, {"trainable_token_indices": [1, 5]}, "trained rows of the vocabulary"),
        ({}, {"modules_to_save": ["lm_head"]}, r"trained whole \(lm_head.weight\)"),
        ({"tied": False}, {"modules_to_save": ["embed_tokens"]}, "trained whole"),
        ({"attention_bias": True}, {"bias": "lora_only"}, r"trained biases \(8, such as"),
        ({}, {"target_modules": ["q_proj", "embed_tokens"]}, "one matrix in this base"),
        ({}, {"use_dora": True, "trainable_token_indices": [1]}, "DoRA.*; nor trained rows"),
    ],
    ids=["dora", "tokens", "head", "embedding", "biases", "tied", "both"],
)
def test_what_only_a_merge_can_hold_is_refused(
    tmp_path: Path, adapt: Any, changes: dict[str, Any], lora: dict[str, Any], told: str
) -> None:
    _, adapter = adapt("llama", changes, **lora)
    with pytest.raises(ContentError, match=told) as caught:
        export_adapter(str(adapter), output=tmp_path / "out")
    assert caught.value.exit_code == 3
    assert caught.value.hint == f"merge first: ftcli merge {adapter}, or export --gguf, which merges as it goes"
    assert not list(tmp_path.glob("*out*"))
    export(str(adapter), kinds=["f16"], output=tmp_path / "out", verifies=False)  # as the hint says


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _poison(path: Path) -> None:
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, path)


def _lose(path: Path) -> None:
    tensors = load_file(path)
    tensors.popitem()
    save_file(tensors, path)


def _explode(path: Path) -> None:
    save_file({name: value * 1e38 for name, value in load_file(path).items()}, path)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (_cut, "cut off"),
        (_poison, "NaN"),
        (_lose, "lora_[AB] is missing"),
        (_explode, "NaN or infinity"),
        (Path.unlink, r"adapter_model.safetensors is missing"),
    ],
)
def test_a_damaged_adapter_is_refused(tmp_path: Path, adapt: Any, damage: Callable[[Path], None], told: str) -> None:
    _, adapter = adapt("llama", {}, lora_alpha=600)
    damage(adapter / "adapter_model.safetensors")
    with pytest.raises(ContentError, match=told):
        export_adapter(str(adapter), output=tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_a_target_without_adapter_is_refused(tmp_path: Path, tiny_model: Path, write_recipe: Any) -> None:
    with pytest.raises(UsageError, match="is no adapter"):
        export_adapter(str(tiny_model))
    full = train(write_recipe(peft=None, output_dir=str(tmp_path / "full")))
    with pytest.raises(UsageError, match="trained all weights"):
        export_adapter(str(full.path))


def test_an_unknown_family_is_named(tmp_path: Path, make_adapter: Any) -> None:
    _, adapter = make_adapter("gpt2", target_modules=["c_attn"], fan_in_fan_out=True)
    with pytest.raises(ContentError, match="how gpt2 is written"):
        export_adapter(str(adapter), output=tmp_path / "out")


@needs_llama
def test_a_run_is_measured_and_told(run: RunFolder) -> None:
    made = export_adapter("run")
    folder = run.path / "gguf"
    assert (made.source, made.path) == ("run", Path("run/gguf/run-F32-LoRA.gguf"))
    assert made.verification is not None
    assert made.verification.verdict is not None
    figures = made.to_json()["verify"]
    assert 0 <= figures["kl"] < 1e-4 < figures["kl_base"]
    assert figures["most_kl"] == min(0.02, max(0.005, figures["kl_base"] / 4))
    assert figures["passed"] is True
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["files"] == {made.path.name: {"sha256": hash_file(made.path), "bytes": made.size_bytes}}
    assert manifest["exports"]["lora"]["verify"] == figures
    assert list_names(folder) == ["README.md", "manifest.json", made.path.name]
    assert not list(run.path.glob(".gguf*"))
    with pytest.raises(UsageError, match="exists already"):
        export_adapter("run")
    export("run", kinds=["f16"], verifies=False)
    card = (folder / "README.md").read_text()
    assert "run-F16.gguf" in card
    assert f"--lora {made.path.name}" in card
    assert GGUFReader(made.path).fields["general.name"].contents() == "Run"


@needs_llama
def test_a_run_in_4_bits_may_be_further_away(tmp_path: Path, write_recipe: Any) -> None:
    made = export_adapter(str(train(write_recipe(quantization={"load_in_4bit": True})).path))
    assert made.from_4bit
    assert made.verification is not None
    assert made.verification.verdict is not None
    figures = made.verification.to_json()
    moved = figures["kl_base"] / 4
    assert figures["most_kl"] == pytest.approx(min(0.02, max(0.005, moved)) + min(0.05, max(0.005, moved)))
    assert 1e-5 < figures["kl"] <= figures["most_kl"]  # in 16 bits it is a tenth of that


@needs_llama
def test_an_adapter_that_is_not_the_one_trained_fails(
    tmp_path: Path, adapt: Any, write_rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows of one matrix are left where they were; and a file that is whole is still measured."""
    _, adapter = adapt("llama", {}, target_modules=["q_proj"], lora_alpha=64)
    options: dict[str, Any] = {"output": tmp_path / "out", "data": str(write_rows()), "overwrite": True}
    assert _verify(adapter, options).has_passed
    monkeypatch.setattr("ftcli.gguf.family.Family.adapt", lambda self, name, values, config: values)
    found = _verify(adapter, options)
    assert "changed otherwise than by model.layers.0.self_attn.q_proj.weight" in found.problem
    monkeypatch.setattr(module, "find_lora_problem", lambda path, draft: "")
    found = _verify(adapter, options)
    assert found.verdict is not None
    assert found.verdict.comparison.kl > found.verdict.most_kl
    assert not found.has_passed
    assert (tmp_path / "out/tuned-F32-LoRA.gguf").is_file()


def _verify(adapter: Path, options: dict[str, Any]) -> Any:
    found = export_adapter(str(adapter), **options).verification
    assert found is not None
    return found


@needs_llama
def test_llama_cpp_says_why_it_refuses_an_adapter(tmp_path: Path, adapt: Any, tiny_model: Path) -> None:
    _, adapter = adapt("llama", {"intermediate_size": 96})
    made = export_adapter(str(adapter), output=tmp_path / "out", verifies=False)
    base = convert_model(tiny_model, tmp_path / "other.gguf", kind="f16").path
    with pytest.raises(ContentError, match="cannot use the adapter") as caught:
        LlamaModel(base, n_threads=1, adapter=made.path)
    assert "incorrect shape" in caught.value.why


@pytest.mark.parametrize("why", ["library", "disk", "memory", "rows"])
def test_what_cannot_be_compared_is_told(
    tmp_path: Path, adapt: Any, write_rows: Any, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    def refuse(*words: Any, **options: Any) -> Any:
        raise UsageError("llama.cpp is not installed") if why == "library" else DiskError("the disk is full")

    _, adapter = adapt()
    if why == "memory":
        monkeypatch.setattr(module, "explain_lack", lambda n, dtype: "it takes 9 GB")
    elif why != "rows":
        monkeypatch.setattr(module, {"library": "load_library", "disk": "check_free"}[why], refuse)
    told: list[Event] = []
    data = None if why == "rows" else str(write_rows())
    made = export_adapter(str(adapter), output=tmp_path / "out", data=data, on_event=told.append)
    assert made.verification is not None
    assert (made.verification.verdict, made.verification.has_passed) == (None, True)
    words = {"library": "not installed", "disk": "disk is full", "memory": "takes 9 GB", "rows": "no rows"}[why]
    assert any(isinstance(event, Notice) and words in event.text for event in told)


def test_another_chat_template_is_told(run: RunFolder) -> None:
    told: list[Event] = []
    export_adapter("run", verifies=False, on_event=told.append)
    assert not [event for event in told if isinstance(event, Notice)]
    shutil.copytree(run.adapter, "lone")
    template = Path("lone/chat_template.jinja")
    template.write_text(template.read_text() + "{# another #}")
    export_adapter("lone", verifies=False, on_event=told.append)
    assert any(isinstance(event, Notice) and "another chat template" in event.text for event in told)


def test_an_interruption_leaves_nothing(run: RunFolder) -> None:
    def stop(event: Event) -> None:
        if isinstance(event, Progress) and event.stage == "verify":
            raise KeyboardInterrupt

    before = list_names(run.path)
    with pytest.raises(KeyboardInterrupt):
        export_adapter("run", on_event=stop)
    assert list_names(run.path) == before


@needs_llama
@pytest.mark.real
def test_smollm2s_adapter_speaks_as_in_peft(tmp_path: Path, write_rows: Any) -> None:
    """The base is a GGUF file in 4 bits, beside which llama.cpp loads the adapter as it is."""
    from ftcli.evaluate.subject import load_plain
    from ftcli.recipe import ModelSection

    model = load_plain(find_model(SMOLLM2), ModelSection(name_or_path=SMOLLM2, dtype="float32"))
    torch.manual_seed(1)
    settings = {"target_modules": "all-linear", "r": 8, "lora_alpha": 8, "init_lora_weights": False}
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            _ = parameter.mul_(0.15) if "lora_B" in name else None
    wrapped.save_pretrained(str(tmp_path / "tuned"), save_embedding_layers=False)
    config = tmp_path / "tuned" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": SMOLLM2}))
    (tmp_path / "tuned" / "ftcli.json").write_text(json.dumps({"dtype": "float32"}))
    made = export_adapter(str(tmp_path / "tuned"), output=tmp_path / "out", data=str(write_rows()))
    assert made.verification is not None
    figures = made.verification.to_json()
    assert figures["kl"] < figures["kl_base"] / 100
    LlamaModel(find_model(SMOLLM2).gguf_path or Path(), n_threads=1, adapter=made.path).clear(8)
