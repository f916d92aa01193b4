"""NF4 and int8: the folder is the one that transformers itself would save, and loads as it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_model, save_model
from safetensors.torch import load_file

from ftcli.errors import ContentError, NumericError
from ftcli.quantize.method import build_spec
from ftcli.quantize.plan import build_config
from ftcli.quantize.run import quantize


@pytest.fixture
def source(tmp_path: Path, tiny_tokenizer: Any) -> Path:
    return save_model(tmp_path / "source", build_model(tied=False).to(torch.bfloat16), tiny_tokenizer)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])  # gpt2 holds its linear weights transposed
@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_tensors_are_those_that_transformers_saves(method: str, kind: str, tmp_path: Path, tiny_tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = build_model(kind, tied=kind == "gpt2").to(torch.bfloat16)
    source = save_model(tmp_path / "source", model, tiny_tokenizer)
    quantize(str(source), build_spec(method), output=tmp_path / "ours", verifies=False)
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=build_config(build_spec(method), torch.bfloat16), dtype=torch.bfloat16
    )
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (value.dtype, value.shape), name
        assert torch.equal(ours[name], value), name


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_transformers_loads_the_folder_alone_and_answers(
    method: str, source: Path, tmp_path: Path, write_rows: Any
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = quantize(str(source), build_spec(method), output=tmp_path / "out", data=str(write_rows()))
    assert made.verification
    assert made.verification.has_passed
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    kind = {"nf4": "Linear4bit", "int8": "Linear8bitLt"}[method]
    assert sum(type(module).__name__ == kind for module in model.modules()) == 14
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    inputs = tokenizer.apply_chat_template([{"role": "user", "content": "question 1"}], **options)
    answer = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert answer.shape[1] > inputs["input_ids"].shape[1]
    dense = AutoModelForCausalLM.from_pretrained(source).eval()
    with torch.no_grad():
        logits, wanted = (m(inputs["input_ids"]).logits.float() for m in (model, dense))
    cosine = torch.nn.functional.cosine_similarity(logits.flatten(), wanted.flatten(), dim=0)
    assert cosine > {"nf4": 0.97, "int8": 0.999}[method]


def test_shards_and_their_index(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that hold no more than a few kilobytes each; transformers reads them as one model."""
    from functools import partial

    from transformers import AutoModelForCausalLM

    from ftcli.quantize import work

    monkeypatch.setattr(work, "save_tensors", partial(work.save_tensors, most_bytes=20_000))
    quantize(str(source), build_spec("nf4"), output=tmp_path / "out", verifies=False)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors*"))
    assert len(files) > 3
    assert files[-1] == "model.safetensors.index.json"
    monkeypatch.undo()
    quantize(str(source), build_spec("nf4"), output=tmp_path / "one", verifies=False)
    parts: dict[str, torch.Tensor] = {}
    for name in files[:-1]:
        parts |= load_file(tmp_path / "out" / name)
    whole = load_file(tmp_path / "one" / "model.safetensors")
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], value) for name, value in whole.items())
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("method", ["nf4", "int8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused_without_rows(
    value: float, method: str, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    model = build_model()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = value
    source = save_model(tmp_path / "source", model, tiny_tokenizer)
    with pytest.raises(ContentError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN or infinity"):
        quantize(str(source), build_spec(method), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_weight_beyond_float16_is_no_int8(tmp_path: Path, tiny_tokenizer: Any) -> None:
    model = build_model().to(torch.bfloat16)
    model.model.layers[0].mlp.up_proj.weight.data[3, 4] = 1e6
    source = save_model(tmp_path / "source", model, tiny_tokenizer)
    with pytest.raises(NumericError, match="up_proj"):
        quantize(str(source), build_spec("int8"), output=tmp_path / "out")
    quantize(str(source), build_spec("nf4"), output=tmp_path / "out")
