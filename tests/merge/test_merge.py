"""A merge held against PEFT's own: the sum bit for bit, the model logit for logit."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ftcli.errors import ContentError, DiskError, NumericError, UsageError
from ftcli.merge.run import merge

Make = Callable[..., tuple[Path, Path]]
IDS = torch.arange(3, 40)[None]

ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7}, "alpha_pattern": {"q_proj": 3}},
    "saved norm and head": {"modules_to_save": ["model.norm", "lm_head"], "tied": False},
    "saved tables": {"modules_to_save": ["embed_tokens", "lm_head"], "tied": False},
    "saved tied table": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "saved table of a tied model": {"modules_to_save": ["embed_tokens"]},
    "rows, tied": {"trainable_token_indices": {"embed_tokens": [3, 9]}},
    "rows, untied": {"trainable_token_indices": {"embed_tokens": [3, 9], "lm_head": [9, 3]}, "tied": False},
    "new tokens, tied": {"trainable_token_indices": {"embed_tokens": [384, 385]}, "n_new": 2},
    "new tokens, untied": {
        "trainable_token_indices": {"embed_tokens": [384, 385], "lm_head": [384, 385]},
        "n_new": 2,
        "tied": False,
    },
    "tables, untied": {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "tied": False},
    "embedding of a tied model": {"target_modules": ["q_proj", "embed_tokens"]},
    "head of a tied model": {"target_modules": ["q_proj", "lm_head"]},
    "tables with DoRA": {"target_modules": ["v_proj", "embed_tokens"], "use_dora": True, "tied": False},
    "tied tables together": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
}


def load_alone(folder: Path, **options: Any) -> Any:
    """The model by transformers alone, with nothing missing and nothing left over."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def load_adapted(base: Path, adapter: Path, dtype: torch.dtype = torch.float32) -> Any:
    from peft import PeftModel

    model = load_alone(base, dtype=dtype)
    config = json.loads((adapter / "adapter_config.json").read_text())
    if indices := config.get("trainable_token_indices"):
        size = max(model.config.vocab_size, 1 + max(i for found in indices.values() for i in found))
        model.resize_token_embeddings(size, mean_resizing=False)
    return PeftModel.from_pretrained(model, str(adapter)).eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ADAPTERS)
def test_merged_logits_are_those_of_the_adapter_on_its_base(make_adapter: Make, tmp_path: Path, case: str) -> None:
    base, adapter = make_adapter(**ADAPTERS[case])
    merged = merge(str(adapter), output=tmp_path / "out")
    wanted = load_adapted(base, adapter)
    model = load_alone(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, wanted(IDS).logits, rtol=1e-4, atol=1e-4)
    assert model.config.vocab_size == wanted.config.vocab_size
    assert merged.verification is not None
    assert merged.verification.has_passed
    assert merged.verification.worst_error < 1


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3", "gpt2"])
def test_families(make_adapter: Make, tmp_path: Path, kind: str) -> None:
    """Fused projections (Phi-3), biases (Qwen 2), weights that lie as (in, out) (GPT-2)."""
    options = {"fan_in_fan_out": True, "target_modules": ["c_attn", "c_proj", "c_fc"]} if kind == "gpt2" else {}
    base, adapter = make_adapter(kind, use_dora=kind == "gpt2", **options)
    merge(str(adapter), output=tmp_path / "out")
    with torch.no_grad():
        logits, wanted = load_alone(tmp_path / "out")(IDS).logits, load_adapted(base, adapter)(IDS).logits
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["lora", "rslora", "patterns", "dora"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_result_is_one_rounding_of_the_sum_in_float32(
    make_adapter: Make, tmp_path: Path, case: str, dtype: str
) -> None:
    """Bit for bit, against PEFT's merge of the same base in float32."""
    base, adapter = make_adapter(dtype=dtype, shard_size="60KB", **ADAPTERS[case])
    merge(str(adapter), output=tmp_path / "out")
    exact = load_adapted(base, adapter).merge_and_unload().state_dict()
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert len(list(base.glob("*.safetensors"))) > 3
    assert written.keys() == exact.keys() - {"lm_head.weight"}
    for name, value in written.items():
        assert value.dtype == getattr(torch, dtype)
        assert torch.equal(value, exact[name].to(value.dtype)), name


def test_a_tensor_that_is_cut_into_blocks_is_the_same(
    make_adapter: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, adapter = make_adapter(target_modules=["q_proj", "embed_tokens", "lm_head"], tied=False)
    merge(str(adapter), output=tmp_path / "whole", dtype="bfloat16")
    monkeypatch.setattr("ftcli.merge.arithmetic._BLOCK_BYTES", 1 << 10)
    monkeypatch.setattr("ftcli.merge.arithmetic._ROW_MULTIPLE", 16)
    merge(str(adapter), output=tmp_path / "cut", dtype="bfloat16")
    whole, cut = load_file(tmp_path / "whole" / "model.safetensors"), load_file(tmp_path / "cut" / "model.safetensors")
    assert all(torch.equal(value, cut[name]) for name, value in whole.items())


def test_many_shards_have_an_index_that_transformers_follows(
    make_adapter: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ftcli.merge import folder
    from ftcli.store.shard import plan_shards

    _, adapter = make_adapter()
    merge(str(adapter), output=tmp_path / "one")
    monkeypatch.setattr(folder, "plan_shards", lambda tensors: plan_shards(tensors, 60_000))
    merge(str(adapter), output=tmp_path / "many")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    assert set(index["weight_map"].values()) == {path.name for path in (tmp_path / "many").glob("*.safetensors")}
    one, many = load_alone(tmp_path / "one").state_dict(), load_alone(tmp_path / "many").state_dict()
    assert all(torch.equal(value, many[name]) for name, value in one.items())


def test_dtypes_stay_as_the_base_has_them_and_change_on_request(make_adapter: Make, tmp_path: Path) -> None:
    base, adapter = make_adapter(dtype="bfloat16")
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].float()
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    assert merge(str(adapter), output=tmp_path / "kept").dtype == "bfloat16"
    kept = load_file(tmp_path / "kept" / "model.safetensors")
    assert {name for name, value in kept.items() if value.dtype == torch.float32} == {"model.norm.weight"}
    merge(str(adapter), output=tmp_path / "wide", dtype="float32")
    assert {value.dtype for value in load_file(tmp_path / "wide" / "model.safetensors").values()} == {torch.float32}
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["dtype"] == "float32"


def test_the_folder_is_whole_and_its_permissions_follow_umask(make_adapter: Make, tmp_path: Path) -> None:
    base, adapter = make_adapter()
    (base / "tokenizer.model").write_bytes(b"spm")
    old = os.umask(0o027)
    try:
        merge(str(adapter), output=tmp_path / "deep" / "er" / "out")
    finally:
        os.umask(old)
    out = tmp_path / "deep" / "er" / "out"
    names = {path.name for path in out.iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors", "README.md", "manifest.json"}
    assert names >= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "tokenizer.model"}
    assert not {name for name in names if name.startswith(".")}
    assert {stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()} == {0o640}
    assert stat.S_IMODE(out.stat().st_mode) == 0o750
    # <|im_end|> ends a turn of the template
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 2
    assert "base_model" not in (out / "README.md").read_text()


def spoil_nan(base: Path, adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    weights[next(iter(weights))][0, 0] = float("nan")
    save_file(weights, path)


def spoil_base(base: Path, adapter: Path) -> None:
    weights = load_file(base / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][5, 5] = float("inf")
    save_file(weights, base / "model.safetensors", {"format": "pt"})


def drop_tensor(base: Path, adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    for key in [key for key in weights if "layers.1.self_attn.q_proj" in key]:
        del weights[key]
    save_file(weights, path)


def add_tensor(base: Path, adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    for letter in "AB":
        key = f"base_model.model.model.layers.1.self_attn.q_proj.lora_{letter}.weight"
        weights[key.replace("layers.1", "layers.7")] = weights[key].clone()
    save_file(weights, path)


def drop_base_tensor(base: Path, adapter: Path) -> None:
    weights = load_file(base / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, base / "model.safetensors", {"format": "pt"})


def add_base_tensor(base: Path, adapter: Path) -> None:
    weights = load_file(base / "model.safetensors")
    weights["model.layers.9.mlp.up_proj.weight"] = torch.zeros(2, 2)
    save_file(weights, base / "model.safetensors", {"format": "pt"})


def change_shape(base: Path, adapter: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))


def pack_base(base: Path, adapter: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))


def edit_config(old: str, new: str) -> Callable[[Path, Path], None]:
    def edit(base: Path, adapter: Path) -> None:
        path = adapter / "adapter_config.json"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    return edit


def cut_adapter(base: Path, adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


FAULTS = {
    "NaN or infinity": spoil_nan,
    "down_proj.weight of the base holds NaN": spoil_base,
    "missing: base_model.model.model.layers.1.self_attn.q_proj": drop_tensor,
    "layers.7.self_attn.q_proj": add_tensor,
    "no file holds model.layers.0.mlp.up_proj.weight": drop_base_tensor,
    "the model has no model.layers.9": add_base_tensor,
    "the config says": change_shape,
    "quantised already": pack_base,
    "LOHA": edit_config('"LORA"', '"LOHA"'),
    "pissa": edit_config('"init_lora_weights": false', '"init_lora_weights": "pissa"'),
    "cut off": cut_adapter,
    "lora_alpha": edit_config('"lora_alpha": 8', '"lora_alpha": NaN'),
}


@pytest.mark.parametrize("words", FAULTS)
def test_planted_faults_are_refused_by_name(make_adapter: Make, tmp_path: Path, words: str) -> None:
    base, adapter = make_adapter()
    FAULTS[words](base, adapter)
    with pytest.raises(ContentError) as caught:
        merge(str(adapter), output=tmp_path / "out")
    assert words in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_what_is_too_large_for_half_precision_is_an_error(make_adapter: Make, tmp_path: Path) -> None:
    base, adapter = make_adapter()
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][0] = 70000.0
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(NumericError, match=r"model.norm.weight is too large for float16"):
        merge(str(adapter), output=tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_not_overwritten_without_being_asked(make_adapter: Make, tmp_path: Path) -> None:
    base, adapter = make_adapter()
    out = tmp_path / "out"
    merge(str(adapter), output=out)
    before = (out / "manifest.json").read_bytes()
    with pytest.raises(UsageError, match="exists already"):
        merge(str(adapter), output=out)
    assert (out / "manifest.json").read_bytes() == before
    merge(str(adapter), output=out, overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="no merged model of ftcli"):
        merge(str(adapter), output=tmp_path / "mine", overwrite=True)
    for folder in (base, adapter, tmp_path):
        with pytest.raises(UsageError, match="what is merged lies in it"):
            merge(str(adapter), output=folder, overwrite=True)


def test_too_little_disk_is_told_before_anything_is_written(
    make_adapter: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, adapter = make_adapter()
    monkeypatch.setattr("ftcli.store.file.free_bytes", lambda path: 1000)
    with pytest.raises(DiskError, match=r"[\d,]+ bytes are needed, 1,000 bytes are free"):
        merge(str(adapter), output=tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_an_interruption_leaves_nothing(make_adapter: Make, tmp_path: Path) -> None:
    from ftcli.events import Progress

    _, adapter = make_adapter()

    def stop(event: Any) -> None:
        if isinstance(event, Progress) and event.done > event.total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(str(adapter), output=tmp_path / "out", on_event=stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
