"""What may go wrong around a merge: files that say two things at once, outputs that are no plain folder."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ftcli.errors import ContentError, UsageError
from ftcli.merge.run import merge

Make = Callable[..., tuple[Path, Path]]


def edit_base(base: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    weights = load_file(base / "model.safetensors")
    save_file({**weights, **change(weights)}, base / "model.safetensors", {"format": "pt"})


def add_head(base: Path, adapter: Path) -> None:
    edit_base(base, lambda weights: {"lm_head.weight": weights["model.embed_tokens.weight"] * 2})


def add_small_head(base: Path, adapter: Path) -> None:
    edit_base(base, lambda weights: {"lm_head.weight": torch.zeros(3, 64)})


def double_names(base: Path, adapter: Path) -> None:
    edit_base(base, lambda weights: {name.removeprefix("model."): value * 2 for name, value in weights.items()})


def add_older_layout(base: Path, adapter: Path) -> None:
    weights = load_file(base / "model.safetensors")
    save_file(weights, base / "model-00001-of-00001.safetensors", {"format": "pt"})
    index = {"weight_map": dict.fromkeys(weights, "model-00001-of-00001.safetensors")}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))


def edit_json(name: str, **changes: Any) -> Callable[[Path, Path], None]:
    def edit(base: Path, adapter: Path) -> None:
        path = (adapter if name == "adapter_config.json" else base) / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def save_bin(value: Any) -> Callable[[Path, Path], None]:
    def save(base: Path, adapter: Path) -> None:
        (adapter / "adapter_model.safetensors").unlink()
        torch.save(value, adapter / "adapter_model.bin")

    return save


FAULTS: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "a tied model's file has a head of its own": (add_head, "lm_head.weight is not model.embed_tokens.weight"),
    "a tied model's file has another's head": (add_small_head, "lm_head.weight is not model.embed_tokens.weight"),
    "names with and without prefix": (double_names, "are both model."),
    "two layouts": (add_older_layout, "transformers would read model.safetensors"),
    "a config without heads": (edit_json("config.json", num_attention_heads=0), "cannot be loaded"),
    "a config of text": (edit_json("config.json", hidden_size="x"), "cannot be loaded"),
    "a negative size": (edit_json("config.json", vocab_size=-3), "cannot be loaded"),
    "no expression": (edit_json("adapter_config.json", target_modules="("), "does not fit this base"),
    "no pattern": (edit_json("adapter_config.json", rank_pattern={"(": 2}), "does not fit this base"),
    "a list": (save_bin([1]), "more than tensors"),
    "nested": (save_bin({"state": {"x": torch.zeros(2)}}), "more than tensors"),
    "a number": (save_bin({"epoch": 3}), "more than tensors"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_says_two_things_or_none_is_refused(make_adapter: Make, tmp_path: Path, fault: str) -> None:
    base, adapter = make_adapter()
    spoil, words = FAULTS[fault]
    spoil(base, adapter)
    with pytest.raises(ContentError) as caught:
        merge(str(adapter), output=tmp_path / "out")
    assert words in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_tied_model_whose_file_repeats_the_embedding_is_merged(make_adapter: Make, tmp_path: Path) -> None:
    base, adapter = make_adapter()
    edit_base(base, lambda weights: {"lm_head.weight": weights["model.embed_tokens.weight"].clone()})
    merge(str(adapter), output=tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")


def test_a_base_without_tokenizer_is_told_before_its_weights_are_read(make_adapter: Make, tmp_path: Path) -> None:
    base, adapter = make_adapter()
    for path in base.glob("tokenizer*"):
        path.unlink()
    seen: list[Any] = []
    with pytest.raises(ContentError, match="tokenizer"):
        merge(str(adapter), output=tmp_path / "out", on_event=seen.append)
    assert "Progress" not in {type(event).__name__ for event in seen}


@pytest.mark.parametrize("name", [".", "", "..", "/", "a/..", "a\udcffb", "n" * 256])
def test_an_output_that_can_be_no_new_folder_is_refused_first(
    make_adapter: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    _, adapter = make_adapter()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match=r"no name|name of a file"):
            merge(str(adapter), output=Path(name), overwrite=overwrite)
    assert not list((tmp_path / "here").iterdir())


def test_a_link_is_followed_to_the_folder_that_it_names(make_adapter: Make, tmp_path: Path) -> None:
    _, adapter = make_adapter()
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    merge(str(adapter), output=tmp_path / "out")
    merge(str(adapter), output=tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "model.safetensors").exists()
    for target in ("out2", "nowhere"):  # itself, and nothing
        (tmp_path / "out2").unlink(missing_ok=True)
        (tmp_path / "out2").symlink_to(target)
        with pytest.raises(UsageError, match="exists already"):
            merge(str(adapter), output=tmp_path / "out2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "disk", "out", "out2"]


def test_what_came_there_meanwhile_is_not_replaced(make_adapter: Make, tmp_path: Path) -> None:
    _, adapter = make_adapter()
    out = tmp_path / "out"

    def meddle(event: Any) -> None:
        if type(event).__name__ == "Progress":
            out.mkdir(exist_ok=True)
            (out / "model.safetensors").write_text("of another merge")

    with pytest.raises(UsageError, match="exists already"):
        merge(str(adapter), output=out, on_event=meddle)
    assert (out / "model.safetensors").read_text() == "of another merge"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "out"]


def test_what_a_killed_merge_had_set_aside_comes_back_or_goes(make_adapter: Make, tmp_path: Path) -> None:
    _, adapter = make_adapter()
    out = tmp_path / "out"
    gone = tmp_path / f".out.old-{platform.node()}-{2**22 + 1}"  # above the greatest process number
    merge(str(adapter), output=out)
    out.rename(gone)
    with pytest.raises(UsageError, match="exists already"):
        merge(str(adapter), output=out)
    assert (out / "manifest.json").exists()
    gone.mkdir()
    merge(str(adapter), output=out, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base", "out"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [True, False])
def test_lora_on_an_embedding_that_grew(make_adapter: Make, tmp_path: Path, tied: bool) -> None:
    """A tied head takes the new rows from below the LoRA; of a head of its own PEFT saves none."""
    from transformers import AutoModelForCausalLM

    _, adapter = make_adapter(tied=tied, target_modules=["q_proj", "embed_tokens"], n_new=3)
    path, key = adapter / "adapter_model.safetensors", "base_model.model.model.embed_tokens.base_layer.weight"
    weights = load_file(path)
    weights[key] = torch.randn(387, 64)
    save_file(weights, path)
    if not tied:
        with pytest.raises(ContentError, match=r"vocabulary 387 rows large, and lm_head.weight has 384"):
            merge(str(adapter), output=tmp_path / "out")
        return
    merge(str(adapter), output=tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(model.lm_head.weight, weights[key])
    prefix = "base_model.model.model.embed_tokens.lora_embedding_"
    update = 2 * (weights[f"{prefix}B"] @ weights[f"{prefix}A"]).T
    torch.testing.assert_close(model.model.embed_tokens.weight.detach(), weights[key] + update)


def test_tables_of_different_lengths_are_refused(make_adapter: Make, tmp_path: Path) -> None:
    _, adapter = make_adapter(target_modules=["q_proj"], tied=False)
    path = adapter / "adapter_model.safetensors"
    tables = {"model.embed_tokens": torch.randn(387, 64), "lm_head": torch.randn(384, 64)}
    save_file({**load_file(path), **{f"base_model.model.{n}.weight": v for n, v in tables.items()}}, path)
    with pytest.raises(ContentError, match=r"lm_head.weight has 384"):
        merge(str(adapter), output=tmp_path / "out")


@pytest.mark.filterwarnings("ignore")
def test_what_peft_writes_of_saved_tables_that_grew(make_adapter: Make, tmp_path: Path) -> None:
    """Its default for a grown vocabulary: the trained tables twice, and those that they replace."""
    _, adapter = make_adapter(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"], n_new=2)
    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    for name in ("base_model.model.model.embed_tokens", "base_model.model.lm_head"):
        weights[f"{name}.modules_to_save.weight"] = weights[f"{name}.weight"].clone()
        weights[f"{name}.original_module.weight"] = torch.zeros(386, 64)
    save_file(weights, path)
    merge(str(adapter), output=tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name in ("model.embed_tokens", "lm_head"):
        assert torch.equal(merged[f"{name}.weight"], weights[f"base_model.model.{name}.weight"])
