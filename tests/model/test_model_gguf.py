"""A GGUF file as a base: written here tensor by tensor, it must come back as the model and tokenizer it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_model, build_tokenizer, find_tokenizer
from gguf_writer import write_gguf

from ftcli.data.tokenizer import load_tokenizer
from ftcli.errors import ContentError
from ftcli.model.base import build_skeleton, load_model
from ftcli.model.stored import list_weights, open_stored
from ftcli.recipe import ModelSection, QuantizationSection
from ftcli.store.target import find_model

TEXTS = [
    "Hello, world! It's 12345 o'clock, isn't it?",
    "déjà vu — naïve café 😀👩‍👩‍👧 中文 字符",
    "  two  spaces\n\n\tand\ttabs\r\n  def f(x):\n    return x**2  # 3.14159",
    "Fine-tuning is powerful",
    "ANTIDISESTABLISHMENTARIANISM l'été 2026-11-24T10:00:00Z ...?!",
]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_weights_come_back_as_they_were(tmp_path: Path, tiny_tokenizer: Any, kind: str, tied: bool) -> None:
    n = len(tiny_tokenizer)
    shape = {"head_dim": 128} if kind == "qwen3" else {}  # of every dense Qwen 3; transformers reads no other
    model = build_model(kind, tied=tied, vocab_size=n, **shape)
    path = write_gguf(tmp_path / "tiny.gguf", tiny_tokenizer, model=model, kind=kind)
    files, section = find_model(str(path)), ModelSection(name_or_path=str(path))
    loaded = load_model(files, section, dtype=torch.float32, device=torch.device("cpu"))
    ids = torch.arange(40)[None] % n
    assert torch.equal(loaded(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    assert loaded.config.rms_norm_eps == model.config.rms_norm_eps
    assert type(build_skeleton(files, section)) is type(loaded)
    loaded.save_pretrained(tmp_path / "saved")  # transformers refuses that for a model straight from a GGUF file
    stored = open_stored(files, build_skeleton(files, section))
    weights = {name: stored.read(name).clone() for name in stored.entries}
    assert weights.keys() == list_weights(model).keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in weights.items())
    quantized = load_model(
        files, section, dtype=torch.float32, device=torch.device("cpu"), quantization=QuantizationSection()
    )
    difference = (quantized(ids, use_cache=False).logits - model(ids, use_cache=False).logits).abs().max()
    assert 0 < difference < 2.0


@pytest.mark.slow
@pytest.mark.parametrize(("name", "pre"), [("llama-3.1", "llama-bpe"), ("qwen3", "qwen2")])
def test_real_vocabularies_tokenise_as_the_original(tmp_path: Path, name: str, pre: str) -> None:
    from transformers import AutoTokenizer

    original = AutoTokenizer.from_pretrained(find_tokenizer(name))
    rebuilt = load_tokenizer(find_model(str(write_gguf(tmp_path / "v.gguf", original, pre=pre))))
    for text in TEXTS:
        assert rebuilt(text, add_special_tokens=False).input_ids == original(text, add_special_tokens=False).input_ids
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello 😀"}]
    assert rebuilt.apply_chat_template(messages) == original.apply_chat_template(messages)
    assert rebuilt.eos_token_id == original.eos_token_id


def test_smollm_splits_digits(tmp_path: Path) -> None:
    """With merges for digits in the vocabulary, only the pre-tokenizer keeps them apart."""
    from conftest import CORPUS
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = build_tokenizer()
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([*CORPUS, *["2026 1234 5678"] * 200], trainer)
    tokenizer._tokenizer = backend
    plain = load_tokenizer(find_model(str(write_gguf(tmp_path / "a.gguf", tokenizer, pre="gpt-2"))))
    split = load_tokenizer(find_model(str(write_gguf(tmp_path / "b.gguf", tokenizer, pre="smollm"))))
    assert len(plain("2026").input_ids) == 1
    assert split.convert_ids_to_tokens(split("2026").input_ids) == ["2", "0", "2", "6"]
    assert split.decode(split("it is 2026 now").input_ids) == "it is 2026 now"


def test_unknown_pre_tokenizer_family_and_scaling_are_refused(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = write_gguf(tmp_path / "a.gguf", tiny_tokenizer, pre="from-the-future")
    with pytest.raises(ContentError, match="pre-tokenizer 'from-the-future'"):
        load_tokenizer(find_model(str(path)))
    path = write_gguf(tmp_path / "b.gguf", tiny_tokenizer, kind="mamba")
    with pytest.raises(ContentError, match=r"family 'mamba' cannot be dequantised yet"):
        build_skeleton(find_model(str(path)), ModelSection(name_or_path=str(path)))
    path = write_gguf(tmp_path / "c.gguf", tiny_tokenizer, tensors=["rope_freqs.weight"])
    with pytest.raises(ContentError, match="rope_freqs"):
        build_skeleton(find_model(str(path)), ModelSection(name_or_path=str(path)))
