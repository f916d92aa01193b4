"""SmolLM2-135M-Instruct in every method: measured, and still the model that answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import SMOLLM2

from ftcli.data.message import Message
from ftcli.data.tokenizer import load_tokenizer
from ftcli.evaluate.generate import Sampling
from ftcli.evaluate.subject import load_plain, open_subject
from ftcli.quantize.method import build_spec
from ftcli.quantize.run import quantize
from ftcli.recipe import ModelSection
from ftcli.store.target import find_model

pytestmark = pytest.mark.real

_ROWS = Path(__file__).parents[2] / "recipes" / "quickstart"


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as an ordinary folder in bfloat16."""
    import torch

    folder = tmp_path_factory.mktemp("real") / "smollm2"
    files = find_model(SMOLLM2)
    model = load_plain(files, ModelSection(name_or_path=SMOLLM2, dtype="bfloat16"))
    model.to(torch.bfloat16).save_pretrained(folder)
    load_tokenizer(files).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "options", "most_kl", "most_bits"),
    [
        ("int8", {}, 0.04, 9.8),
        ("nf4", {}, 0.35, 6.7),
        ("awq", {"samples": 4, "seq_len": 256, "tune": 0}, 0.3, 6.8),
        ("gptq", {"samples": 4, "seq_len": 256, "tune": 0}, 0.4, 6.9),
    ],
)
def test_what_each_method_loses(
    name: str, options: dict[str, Any], most_kl: float, most_bits: float, smollm2: Path, tmp_path: Path
) -> None:
    spec = build_spec(name, **options)
    rows = str(_ROWS / "train.jsonl") if spec.method.is_fitted else None
    held_out = str(_ROWS / "held_out.jsonl")
    made = quantize(str(smollm2), spec, calibration=rows, data=held_out, output=tmp_path / "out")
    assert made.verification
    assert made.verification.has_passed
    assert made.verification.verdict
    found = made.verification.verdict.comparison
    assert 0 < found.kl < most_kl
    assert found.ppl_result < 1.6 * found.ppl_source
    assert made.bits_per_weight < most_bits
    assert made.n_layers == 210
    assert made.group_size == (64 if spec.method.is_fitted else 0)
    subject = open_subject(str(tmp_path / "out"))
    answer = subject.answer([Message("user", "What is the capital of France?")], Sampling(max_new_tokens=16))
    assert "Paris" in answer
