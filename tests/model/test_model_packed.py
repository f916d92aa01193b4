"""Packed folders: GPTQ and AWQ against a packer that follows the published layouts, auto-round, and bitsandbytes."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from auto_round_folders import FOLDERS
from conftest import build_model, save_model
from packed_models import (
    change_config,
    compute_weight,
    draw_parts,
    pack_awq,
    pack_gptq,
    write_bitsandbytes,
    write_packed,
)
from safetensors.torch import load_file, save_file
from test_model_base import gradients, load, make_batch

from ftcli.errors import ContentError
from ftcli.evaluate.subject import open_subject
from ftcli.events import Notice
from ftcli.jobs.contender import find_contender
from ftcli.jobs.inspect import inspect_target
from ftcli.model.base import build_skeleton
from ftcli.model.build import add_lora, check_names
from ftcli.model.packed import unpack_awq, unpack_gptq
from ftcli.model.stored import is_tied
from ftcli.recipe import PeftSection, QuantizationSection, load_recipe
from ftcli.store.target import find_model

UP = "model.layers.1.mlp.up_proj"
IDS = torch.arange(3, 40)[None]
BITSANDBYTES: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_tokenizer: Any) -> dict[str, Path]:
    """Method → the folder of a tiny model that is packed by it."""
    root = tmp_path_factory.mktemp("packed")
    for method in ("gptq", "awq"):
        write_packed(tiny_model, root / method, method)
    for name, options in BITSANDBYTES.items():
        write_bitsandbytes(tiny_model, root / name, tiny_tokenizer, **options)
    return {path.name: path for path in root.iterdir()}


@pytest.mark.parametrize("adds_one", [True, False])
@pytest.mark.parametrize(("n_outputs", "n_inputs", "group_size"), [(32, 64, 16), (40, 72, -1), (24, 304, 32)])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gptq_is_what_the_layout_says(
    bits: int, n_outputs: int, n_inputs: int, group_size: int, adds_one: bool
) -> None:
    codes, zeros, scales, groups = draw_parts(bits, n_outputs, n_inputs, bits, group_size, is_shuffled=True)
    stored = [torch.from_numpy(array) for array in pack_gptq(codes, zeros, bits, adds_one=adds_one)]
    expected = torch.from_numpy(compute_weight(codes, zeros, scales, groups))
    constants = torch.from_numpy(scales), torch.from_numpy(groups)
    assert torch.equal(unpack_gptq(*stored, *constants, bits=bits, adds_one=adds_one), expected)
    found = unpack_gptq(*stored, *constants, bits=bits, adds_one=adds_one, dtype=torch.bfloat16)
    assert torch.equal(found, expected.bfloat16())


@pytest.mark.parametrize(("n_outputs", "n_inputs", "group_size"), [(32, 64, 16), (40, 72, -1), (24, 304, 32)])
def test_awq_is_what_the_layout_says(n_outputs: int, n_inputs: int, group_size: int) -> None:
    codes, zeros, scales, groups = draw_parts(0, n_outputs, n_inputs, 4, group_size)
    stored = [torch.from_numpy(array) for array in pack_awq(codes, zeros)]
    found = unpack_awq(*stored, torch.from_numpy(scales), torch.from_numpy(groups))
    assert torch.equal(found, torch.from_numpy(compute_weight(codes, zeros, scales, groups)))


@pytest.mark.parametrize(
    ("kind", "method", "options"),
    [
        ("llama", "gptq", {}),
        ("llama", "gptq", {"bits": 2, "group_size": -1, "has_g_idx": False}),
        ("llama", "gptq", {"bits": 8, "is_shuffled": True, "desc_act": True}),
        ("llama", "gptq", {"checkpoint_format": "gptq_v2", "sym": False}),
        ("llama", "awq", {"version": "gemm", "zero_point": True}),
        ("llama", "awq", {"group_size": -1, "version": "GEMM"}),
        ("qwen2", "gptq", {}),
        ("phi3", "awq", {}),
        ("gemma2", "gptq", {}),
        ("gpt2", "gptq", {}),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_a_packed_folder_loads_as_the_model_that_it_stands_for(
    tmp_path: Path, tiny_tokenizer: Any, kind: str, method: str, options: dict[str, Any], tied: bool
) -> None:
    source = save_model(tmp_path / "source", build_model(kind, tied=tied), tiny_tokenizer)
    expected = write_packed(source, tmp_path / "packed", method, **options)
    save_file(expected, source / "model.safetensors", {"format": "pt"})
    dense, model = load(source), load(tmp_path / "packed")
    assert dict(model.state_dict()).keys() == dict(dense.state_dict()).keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, dense.state_dict()[name]), name
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, dense(IDS).logits)
    assert is_tied(model) == is_tied(dense)
    assert model.training == dense.training
    assert not hasattr(model.config, "quantization_config")
    assert model.generation_config.to_dict() == dense.generation_config.to_dict()
    half = load(tmp_path / "packed", torch.bfloat16)
    for name, value in half.state_dict().items():
        assert torch.equal(value, dense.state_dict()[name].bfloat16()), name
    assert half.config.dtype == torch.bfloat16


def test_shards_base_names_and_biases_of_zeros_do_not_matter(tmp_path: Path, tiny_model: Path) -> None:
    folder = tmp_path / "packed"
    expected = write_packed(tiny_model, folder)
    tensors = {name.removeprefix("model."): value for name, value in load_file(folder / "model.safetensors").items()}
    tensors[f"{UP.removeprefix('model.')}.bias"] = torch.zeros(128, dtype=torch.float16)
    tensors["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    found = load(folder).state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_head_of_its_own_in_a_tied_model_is_refused_unless_it_is_the_embedding(
    tmp_path: Path, tiny_model: Path
) -> None:
    folder = tmp_path / "packed"
    write_packed(tiny_model, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    load(folder)
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ContentError, match=r"lm_head\.weight is not model\.embed_tokens\.weight"):
        load(folder)


def drop(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda tensors: tensors.pop(name)


def replace(name: str, change: Callable[[Any], Any]) -> Callable[[dict[str, Any]], Any]:
    return lambda tensors: tensors.update({name: change(tensors[name]).contiguous()})


def spoil(name: str, value: float) -> Callable[[dict[str, Any]], Any]:
    return lambda tensors: tensors[name].view(-1)[-1:].fill_(value)


def state(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    """Other words in the JSON in which bitsandbytes says how a weight is packed."""

    def change(tensors: dict[str, Any]) -> None:
        name = f"{UP}.weight.quant_state.bitsandbytes__nf4"
        text = json.dumps(json.loads(bytes(tensors[name].tolist())) | changes)
        tensors[name] = torch.tensor(list(text.encode()), dtype=torch.uint8)

    return change


@pytest.mark.parametrize(
    ("method", "change", "words"),
    [
        ("gptq", drop(f"{UP}.qweight"), f"1 weights are missing: {UP}.qweight"),
        ("gptq", drop(f"{UP}.qzeros"), f"missing: {UP}.qzeros"),
        ("awq", drop(f"{UP}.scales"), f"missing: {UP}.scales"),
        ("gptq", drop("model.norm.weight"), "missing: model.norm.weight"),
        ("gptq", lambda t: t.update({"model.layers.7.mlp.up_proj.qweight": t[f"{UP}.qweight"].clone()}), "left over"),
        ("gptq", lambda t: t.update({f"{UP}.weight": torch.zeros(128, 64)}), f"left over: {UP}.g_idx, {UP}.qweight"),
        ("gptq", lambda t: t.update({f"{UP}.bias": torch.ones(128)}), f"left over: {UP}.bias"),
        ("awq", lambda t: t.update({f"{UP}.g_idx": torch.zeros(64).int()}), f"left over: {UP}.g_idx"),
        ("gptq", replace(f"{UP}.qweight", lambda v: v[:-1]), f"of another shape: {UP}.qweight"),
        ("awq", replace(f"{UP}.qweight", lambda v: v.T), f"of another shape: {UP}.qweight"),
        ("gptq", replace(f"{UP}.qzeros", lambda v: v[:, :-1]), f"of another shape: {UP}.qzeros"),
        ("gptq", replace(f"{UP}.scales", lambda v: v[0]), f"of another shape: {UP}.scales"),
        ("gptq", replace(f"{UP}.g_idx", lambda v: v[:0]), f"of another shape: {UP}.g_idx"),
        ("gptq", replace(f"{UP}.qweight", lambda v: v.float()), f"of another type: {UP}.qweight"),
        ("gptq", replace("model.norm.weight", lambda v: v.int()), "of another type: model.norm.weight"),
        ("gptq", spoil(f"{UP}.g_idx", 2), f"{UP}.g_idx names the groups 0 to 2, and there are 2"),
        ("gptq", spoil(f"{UP}.g_idx", -1), f"{UP}.g_idx names the groups -1 to 1"),
        ("gptq", spoil(f"{UP}.scales", float("inf")), f"{UP}.scales holds numbers that are not finite"),
        ("awq", spoil(f"{UP}.scales", float("nan")), f"{UP}.scales holds numbers that are not finite"),
        ("awq", spoil("model.norm.weight", float("nan")), "model.norm.weight holds numbers that are not finite"),
    ],
)
def test_broken_folders_are_refused_by_the_tensor(
    tmp_path: Path, tiny_model: Path, method: str, change: Callable[[dict[str, Any]], Any], words: str
) -> None:
    folder = tmp_path / "packed"
    write_packed(tiny_model, folder, method)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ContentError) as caught:
        load(folder)
    assert words in caught.value.what
    assert caught.value.hint


def test_weights_beyond_float16_are_refused_there(tmp_path: Path, tiny_model: Path) -> None:
    folder = tmp_path / "packed"
    write_packed(tiny_model, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{UP}.scales"].fill_(60000)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    load(folder, torch.bfloat16)
    with pytest.raises(ContentError, match=rf"{UP}\.weight holds numbers .* beyond float16"):
        load(folder, torch.float16)


@pytest.mark.parametrize("n_bytes", [100, -1, 0])
def test_files_that_are_cut_off_are_refused(tmp_path: Path, tiny_model: Path, n_bytes: int) -> None:
    folder = tmp_path / "packed"
    write_packed(tiny_model, folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:n_bytes])
    with pytest.raises(ContentError):
        load(folder)
    path.unlink()
    with pytest.raises(ContentError):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bits": 3}, "gptq in 3 bits"),
        ({"bits": "4"}, "gptq in '4' bits"),
        ({"bits": True}, "gptq in True bits"),
        ({"group_size": 0}, "gptq with group_size 0"),
        ({"group_size": None}, "gptq with group_size None"),
        ({"checkpoint_format": "marlin"}, "gptq of the format marlin"),
        ({"is_marlin_format": True}, "gptq of the format marlin"),
        ({"quant_method": "awq", "version": "gemv"}, "awq of the version gemv"),
        ({"quant_method": "awq", "bits": 8}, "awq in 8 bits"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"quant_method": None}, "of no method"),
        ({"quant_method": "bitsandbytes"}, "bitsandbytes, but neither in 4 bits nor in 8"),
    ],
)
def test_what_cannot_be_loaded_is_named(
    tmp_path: Path, packed: dict[str, Path], changes: dict[str, Any], words: str
) -> None:
    config = json.loads((packed["gptq"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    change_config(tmp_path, quantization_config=config["quantization_config"] | changes)
    with pytest.raises(ContentError) as caught:
        load(tmp_path)
    assert words in caught.value.what
    assert "GPTQ in 2, 4 or 8 bits, AWQ (gemm) in 4, bitsandbytes" in caught.value.hint
    change_config(tmp_path, quantization_config=["gptq"])
    with pytest.raises(ContentError, match="a quantization_config that is no object"):
        load(tmp_path)


@pytest.mark.parametrize("name", BITSANDBYTES)
def test_what_bitsandbytes_packed_computes_as_when_it_was_saved(
    packed: dict[str, Path], tiny_model: Path, name: str
) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(**BITSANDBYTES[name])
    saved = AutoModelForCausalLM.from_pretrained(
        tiny_model, quantization_config=config, device_map={"": "cpu"}, dtype=torch.float32
    )
    flags = [m for m in saved.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    for module in flags:
        module.support_avx512bf16_for_cpu = False
    model = load(packed[name])
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, saved(IDS).logits)
    found = [m for m in model.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    assert len(found) == len(flags) == (14 if "nf4" in name else 0)
    assert not any(module.support_avx512bf16_for_cpu for module in found)


def test_lora_on_a_saved_nf4_model_has_the_gradients_of_one_packed_here(
    packed: dict[str, Path], tiny_model: Path
) -> None:
    batch, peft = make_batch(), PeftSection(r=4, lora_dropout=0.0)
    expected = add_lora(load(tiny_model, quantization=QuantizationSection()), peft).train()
    found = add_lora(load(packed["nf4-double"]), peft).train()
    for model in (expected, found):
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.02)
    assert torch.equal(gradients(found, batch), gradients(expected, batch))


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("nf4", drop(f"{UP}.weight.absmax"), ""),
        ("nf4", drop(f"{UP}.weight.quant_state.bitsandbytes__nf4"), ""),
        ("nf4", drop(f"{UP}.weight"), ""),
        ("nf4", replace(f"{UP}.weight.absmax", lambda v: v[:5]), f"{UP}.weight.absmax has 5 numbers, and there"),
        ("nf4", replace(f"{UP}.weight", lambda v: v[:99]), ""),
        ("nf4", replace(f"{UP}.weight.quant_map", lambda v: v[:9]), f"{UP}.weight.quant_map has 9 numbers"),
        ("nf4", spoil(f"{UP}.weight.absmax", float("nan")), f"{UP}.weight.absmax holds numbers that are not finite"),
        ("nf4", replace(f"{UP}.weight.quant_state.bitsandbytes__nf4", lambda v: v[:40]), ""),
        ("nf4-double", replace(f"{UP}.weight.absmax", lambda v: v[:5]), f"{UP}.weight.absmax has 5 numbers"),
        ("nf4-double", drop(f"{UP}.weight.nested_absmax"), ""),
        ("nf4-double", replace(f"{UP}.weight.nested_quant_map", lambda v: v[:9]), "nested_quant_map has 9 numbers"),
        ("nf4", state(blocksize=3), f"{UP}.weight is packed in blocks of 3"),
        ("nf4", state(blocksize="64"), f"{UP}.weight is packed in blocks of '64'"),
        ("nf4", state(blocksize=128), f"{UP}.weight.absmax has 128 numbers, and there should be 64"),
        ("nf4", state(shape=[64, 128]), f"{UP}.weight stands for (64, 128), and the config says (128, 64)"),
        ("nf4", state(shape=7), ""),
        ("nf4", state(dtype="nothing"), ""),
        ("nf4", state(dtype="int32"), f"{UP}.weight is packed as 'nf4' of torch.int32"),
        ("nf4", state(quant_type="zz"), ""),
        ("nf4-double", state(nested_blocksize=0), f"{UP}.weight is packed in blocks of"),
        ("nf4-double", state(nested_offset=float("nan")), f"{UP}.weight.nested_offset holds numbers"),
        ("int8", drop(f"{UP}.SCB"), ""),
        ("int8", replace(f"{UP}.SCB", lambda v: v[:5]), ""),
        ("int8", replace(f"{UP}.weight", lambda v: v[:5]), ""),
        ("int8", spoil(f"{UP}.SCB", float("nan")), f"{UP}.SCB holds numbers that are not finite"),
    ],
)
def test_broken_bitsandbytes_folders_are_refused(
    tmp_path: Path, packed: dict[str, Path], name: str, change: Callable[[dict[str, Any]], Any], words: str
) -> None:
    for file in ("config.json", "generation_config.json"):
        (tmp_path / file).write_bytes((packed[name] / file).read_bytes())
    tensors = load_file(packed[name] / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ContentError) as caught:
        load(tmp_path)
    assert words in caught.value.what


@pytest.mark.parametrize("name", ["gptq", "awq", *BITSANDBYTES])
def test_nothing_is_packed_twice(packed: dict[str, Path], name: str) -> None:
    with pytest.raises(ContentError, match=r"quantised already .*, and are to be quantised to 4 bits"):
        load(packed[name], quantization=QuantizationSection())


@pytest.mark.parametrize("name", ["gptq", "awq", *BITSANDBYTES])
@pytest.mark.parametrize("sections", [{}, {"peft": None}, {"quantization": {"load_in_4bit": True}}])
def test_only_lora_on_four_bits_of_bitsandbytes_is_trained(
    packed: dict[str, Path], write_recipe: Any, name: str, sections: dict[str, Any]
) -> None:
    path = write_recipe(model={"name_or_path": str(packed[name]), "dtype": "float32"}, **sections)
    recipe = load_recipe(path).recipe
    skeleton = build_skeleton(find_model(str(packed[name])), recipe.model)
    if name.startswith("nf4") and not sections:
        assert check_names(recipe, skeleton)
        return
    with pytest.raises(ContentError, match="quantised already") as caught:
        check_names(recipe, skeleton)
    assert "name the 16-bit model" in caught.value.hint


@pytest.mark.parametrize("name", ["gptq", "awq", *BITSANDBYTES])
def test_a_packed_target_is_opened_and_described(packed: dict[str, Path], tiny_model: Path, name: str) -> None:
    events: list[Any] = []
    subject = open_subject(str(packed[name]), on_event=events.append)
    notices = [event.text for event in events if isinstance(event, Notice)]
    is_unpacked = name in ("gptq", "awq")
    assert notices == ([f"{packed[name]} ({name.upper()}, 4 bits) is dequantised to run here"] if is_unpacked else [])
    assert subject.backend.context == 512
    found, dense = inspect_target(str(packed[name])).anatomy, inspect_target(str(tiny_model)).anatomy
    assert found is not None
    assert dense is not None
    assert found.parameters == dense.parameters
    bits = find_contender(str(packed[name])).bits_per_weight
    assert 4 < bits < find_contender(str(tiny_model)).bits_per_weight == 32


@pytest.mark.parametrize("name", ["gptq", "awq", *BITSANDBYTES])
def test_parameters_of_an_unknown_family_are_counted_as_what_they_stand_for(
    tmp_path: Path, packed: dict[str, Path], tiny_model: Path, name: str
) -> None:
    for file in packed[name].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    change_config(tmp_path, model_type="llamatic")
    found, dense = inspect_target(str(tmp_path)).anatomy, inspect_target(str(tiny_model)).anatomy
    assert found is not None
    assert dense is not None
    assert found.parameters == dense.parameters


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("auto_round") is None, reason="auto-round is not installed")
def test_folders_of_auto_round_are_what_its_own_layers_compute(tmp_path: Path, tiny_model: Path) -> None:
    script = Path(__file__).parents[1] / "auto_round_folders.py"
    subprocess.run([sys.executable, str(script), str(tiny_model), str(tmp_path)], check=True, capture_output=True)
    source = load_file(tiny_model / "model.safetensors")
    for name, (_, bits, _, _) in FOLDERS.items():
        found = load(tmp_path / name).state_dict()
        expected = load_file(tmp_path / f"{name}.safetensors")
        assert len(expected) == 14
        for key, value in source.items():
            assert torch.equal(found[key], expected.get(key, value)), f"{name}: {key}"
            if key in expected:
                distance = (found[key] - value).norm() / value.norm()
                assert distance < {2: 0.8, 4: 0.2, 8: 0.01}[bits], f"{name}: {key}"
