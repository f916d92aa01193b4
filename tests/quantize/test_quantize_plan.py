"""What is asked for, which layers are packed and in which groups, and which rows rounding is fitted to."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_model, save_model
from safetensors.torch import load_file

from ftcli.data.chat import Rendered
from ftcli.data.documents import Documents
from ftcli.data.loader import Reading
from ftcli.errors import ContentError, UsageError
from ftcli.evaluate.sample import load_file_set
from ftcli.evaluate.target import find_target
from ftcli.events import Event, Notice
from ftcli.merge.stream import open_folder
from ftcli.model.base import build_skeleton
from ftcli.quantize.calibration import cut_windows, load_calibration
from ftcli.quantize.method import METHODS, build_spec, check_package, find_limit
from ftcli.quantize.plan import Plan, plan_quantization
from ftcli.recipe import ModelSection


def plan(folder: Path, name: str, **options: Any) -> Plan:
    stream = open_folder(folder)
    skeleton = build_skeleton(stream.files, ModelSection(name_or_path=str(folder)))
    return plan_quantization(stream, skeleton, build_spec(name, **options), torch.bfloat16)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("gtpq", {}, "there is no such method"),
        ("awq", {"bits": 8}, "awq rounds to 4 bits"),
        ("gptq", {"bits": 3}, "gptq rounds to 2, 4 or 8 bits"),
        ("nf4", {"group_size": "64"}, "reads no rows"),
        ("int8", {"samples": 4}, "reads no rows"),
        ("gptq", {"group_size": "big"}, "is no group size"),
        ("gptq", {"group_size": "0"}, "is no group size"),
    ],
)
def test_what_a_method_does_not_take_is_said(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        build_spec(name, **options)
    assert words in str(caught.value)
    assert caught.value.hint


def test_what_is_usual() -> None:
    specs = {name: build_spec(name) for name in METHODS}
    assert {name: spec.bits for name, spec in specs.items()} == {"gptq": 4, "awq": 4, "nf4": 4, "int8": 8}
    assert (specs["gptq"].samples, specs["gptq"].seq_len, specs["gptq"].group_size) == (128, None, None)
    assert specs["gptq"].tune > 0
    assert build_spec("gptq", tune=0).tune == 0


def test_a_missing_extra_is_told_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="needs the package auto-round") as caught:
        check_package(METHODS["gptq"])
    assert caught.value.hint == 'run: pip install "ftcli[quantize]"'


def test_bounds_grow_with_what_the_source_itself_does_not_know() -> None:
    spec = build_spec("nf4")
    assert find_limit(spec, 0.01) == find_limit(spec, 0.1) == pytest.approx(0.1)
    assert find_limit(spec, 4.0) == pytest.approx(1.0)
    assert find_limit(spec, 4.0, 1.0, is_4bit=True) > find_limit(spec, 4.0, 1.0)
    assert find_limit(build_spec("gptq", bits=8), 1.0, 0.001) < find_limit(build_spec("gptq", bits=8), 1.0)
    assert find_limit(build_spec("gptq", bits=2), 1.0) > find_limit(spec, 1.0)


def test_the_largest_usual_group_that_cuts_every_row(tmp_path: Path, tiny_tokenizer: Any) -> None:
    folder = save_model(
        tmp_path / "m", build_model(hidden_size=192, intermediate_size=384, head_dim=48), tiny_tokenizer
    )
    found = plan(folder, "gptq")
    assert found.group_size == 64
    assert len(found.layers) == 14
    assert plan(folder, "awq", group_size="96").group_size == 96
    with pytest.raises(ContentError) as caught:
        plan(folder, "gptq", group_size="128")
    text = str(caught.value)
    assert "rows of 192 values cannot be cut into groups of 128" in text
    assert "model.layers.0.self_attn.q_proj" in text
    assert "--group-size 64" in text
    with pytest.raises(ContentError, match="multiples of 32"):
        plan(folder, "gptq", group_size="48")


def test_a_width_that_no_group_divides_is_refused_by_name(tmp_path: Path, tiny_tokenizer: Any) -> None:
    folder = save_model(tmp_path / "m", build_model(hidden_size=200, head_dim=50), tiny_tokenizer)
    with pytest.raises(ContentError) as caught:
        plan(folder, "awq")
    assert "model.layers.0.self_attn.q_proj" in str(caught.value)
    assert "nf4" in caught.value.hint
    assert len(plan(folder, "nf4").layers) == len(plan(folder, "int8").layers) == 14


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "phi3", "gemma2", "gemma3", "mistral"])
def test_layers_are_those_of_the_blocks_in_every_family(kind: str, tmp_path: Path, tiny_tokenizer: Any) -> None:
    model = build_model(kind, tied=False)
    folder = save_model(tmp_path / kind, model, tiny_tokenizer)
    linear = {name for name, module in model.named_modules() if type(module) is torch.nn.Linear} - {"lm_head"}
    for name in METHODS:
        assert {layer.name for layer in plan(folder, name).layers} == linear
    size = sum(value.numel() for value in load_file(folder / "model.safetensors").values())
    assert plan(folder, "gptq").n_parameters == size


def load_documents(folder: Path, path: Path) -> Documents:
    return load_file_set(str(path), Reading(find_target(str(folder)).renderer)).documents


def test_windows_hold_whole_rows_in_turn_each_once(tiny_model: Path, write_rows: Any) -> None:
    documents = load_documents(tiny_model, write_rows(n=40))
    found = cut_windows(documents, "rows", 5, 64)
    assert found.windows.shape == (5, 64)
    joined = found.windows.reshape(-1).tolist()
    known: list[Rendered] = list(documents)
    used: set[int] = set()
    start = 0
    while start < len(joined):
        fits = [i for i, document in enumerate(known) if i not in used and _begins(joined[start:], document.ids)]
        assert fits, f"no row begins at {start}"
        used.add(fits[0])
        start += len(known[fits[0]].ids)
    assert len(used) == found.n_rows


def _begins(ids: list[int], row: list[int]) -> bool:
    n = min(len(ids), len(row))
    return list(row[:n]) == ids[:n]


def test_three_rows_are_one_short_window_and_a_notice(tiny_model: Path, write_rows: Any) -> None:
    events: list[Event] = []
    target = find_target(str(tiny_model))
    found = load_calibration(target, str(write_rows(n=3)), build_spec("awq", seq_len=256), events.append)
    assert found.n_rows == 3
    assert found.windows.shape == (1, found.n_tokens)
    assert next(event.text for event in events if isinstance(event, Notice)).startswith("rounding is fitted to")


def test_a_model_alone_has_no_rows_and_none_are_fetched(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
    target = find_target(str(tiny_model))
    with pytest.raises(UsageError, match="which rows") as caught:
        load_calibration(target, None, build_spec("gptq"), lambda event: None)
    assert "--calibration FILE" in caught.value.hint
    with pytest.raises(UsageError, match="do not fit the context of 512"):
        load_calibration(target, "rows.jsonl", build_spec("gptq", seq_len=2048), lambda event: None)


def test_a_recipe_names_its_training_rows(tiny_model: Path, write_recipe: Any, tmp_path: Path) -> None:
    recipe = write_recipe()
    target = find_target(str(tiny_model))
    found = load_calibration(target, str(recipe), build_spec("gptq", seq_len=32), lambda event: None)
    rows = load_documents(tiny_model, tmp_path / "train.jsonl")
    assert found.n_rows == len(rows)
    assert found.n_tokens == sum(len(row.ids) for row in rows)
    assert "recipe.yaml" in found.describe()


def test_broken_rows_are_told_by_line(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "x"}]}) + "\n{oops\n")
    with pytest.raises(ContentError) as caught:
        load_calibration(find_target(str(tiny_model)), str(path), build_spec("gptq", seq_len=64), lambda event: None)
    assert "broken.jsonl:2" in str(caught.value)
