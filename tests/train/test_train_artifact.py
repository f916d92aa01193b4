"""What a run leaves: tokens that stop it, and a template and tokens as they were trained."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import build_model, build_tokenizer, save_model
from safetensors.torch import load_file

from ftcli.errors import ContentError
from ftcli.events import Notice
from ftcli.model.build import load_adapter
from ftcli.train.run import train


def test_what_is_saved_stops_where_trained_turns_end(write_recipe: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = build_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"  # as base models have it; the template ends a turn with <|im_end|>
    model = build_model(eos_token_id=0)
    model.generation_config.update(temperature=0.7, do_sample=False)  # which transformers would refuse to save
    folder = tmp_path / "base"
    model.generation_config, config = GenerationConfig(eos_token_id=0), model.generation_config
    save_model(folder, model, tokenizer)
    config.to_json_file(folder / "generation_config.json", use_diff=False)
    events: list[Any] = []
    sections = {"model": {"name_or_path": str(folder), "dtype": "float32"}}
    run = train(write_recipe(**sections), overrides=("train.max_steps=1",), on_event=events.append)
    saved = AutoTokenizer.from_pretrained(run.adapter)
    assert saved.eos_token == "<|im_end|>"
    assert GenerationConfig.from_pretrained(run.adapter).eos_token_id == [0, 2]
    notices = [event.text for event in events if isinstance(event, Notice)]
    assert any("ends a turn with <|im_end|>, the tokenizer's end of sequence is <|endoftext|>" in n for n in notices)
    full = train(
        write_recipe(**sections, peft=None, output_dir=str(tmp_path / "full")), overrides=("train.max_steps=1",)
    )
    assert AutoTokenizer.from_pretrained(full.model).eos_token == "<|im_end|>"
    assert GenerationConfig.from_pretrained(full.model).eos_token_id == [0, 2]


def test_raw_text_keeps_the_tokenizers_own_end(write_recipe: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = build_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    folder = save_model(tmp_path / "base", build_model(eos_token_id=0), tokenizer)
    path = write_recipe(model={"name_or_path": str(folder), "dtype": "float32"}, datasets=[{"path": "raw.jsonl"}])
    (path.parent / "raw.jsonl").write_text('{"text": "the quick brown fox"}\n{"text": "the lazy dog"}\n')
    run = train(path, overrides=("train.max_steps=1",))
    assert AutoTokenizer.from_pretrained(run.adapter).eos_token == "<|endoftext|>"


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_with_new_tokens_is_refused_on_the_base_without_them(
    write_recipe: Any, tmp_path: Path, tiny_tokenizer: Any, tied: bool
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = save_model(tmp_path / "base", build_model(tied=tied, vocab_size=len(tiny_tokenizer)), tiny_tokenizer)
    model = {"name_or_path": str(folder), "dtype": "float32"}
    run = train(write_recipe(model=model, tokenizer={"add_tokens": ["zulu"]}), overrides=("train.max_steps=1",))
    base = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ContentError, match="the adapter does not fit this base model"):
        load_adapter(base, run.adapter)
    with pytest.raises((IndexError, RuntimeError)):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), str(run.adapter))


@pytest.mark.slow
def test_new_tokens_are_saved_for_a_base_of_the_hub_while_offline(
    write_recipe: Any, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    """PEFT would ask the Hub whether the embedding was resized, and take no answer for a no."""
    snapshot = tmp_path / "hf" / "hub" / "models--org--tiny" / "snapshots" / ("0" * 40)
    save_model(snapshot, build_model(vocab_size=len(tiny_tokenizer)), tiny_tokenizer)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    path = write_recipe(model={"name_or_path": "org/tiny", "dtype": "float32"}, tokenizer={"add_tokens": ["zulu"]})
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "ftcli", "train", str(path), "--set", "train.max_steps=1", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    adapter = Path(json.loads(done.stdout)["adapter"])
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/tiny"
    rows = load_file(adapter / "adapter_model.safetensors")
    assert [tuple(value.shape) for name, value in rows.items() if "embed_tokens" in name] == [(1, 64)]
    assert "zulu" in (adapter / "tokenizer.json").read_text()
