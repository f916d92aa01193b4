"""What a run leaves: tokens that stop it, and a template and tokens as they were trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conftest import build_model, build_tokenizer, save_model

from ftcli.events import Notice
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
