"""A model far larger than the allowance, exported by a process of its own that may not even map it."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import build_tokenizer
from large_model import HIDDEN, run_small, write_large_model

VOCAB = 32768


@pytest.mark.slow
def test_the_peak_is_that_of_tensors_not_of_the_model(tmp_path: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    tensors = write_large_model(model, VOCAB)
    build_tokenizer().save_pretrained(model)
    try:
        words = run_small(
            "import ftcli.gguf.export; from transformers import AutoModelForCausalLM, LlamaForCausalLM\n"
            "bare = read_peak()\n"
            f"made, = ftcli.gguf.export.export({str(model)!r}, kinds=['q5_1'], output=Path({str(out)!r}), "
            "verifies=False).files\n"
            "print(bare, read_peak(), made.size_bytes)"
        )
    finally:
        for path in [*out.glob("*.gguf"), *model.glob("*.safetensors")]:
            path.unlink()
    bare, peak, size = map(int, words)
    n_values = sum(tensor.size_bytes for tensor in tensors) // 2
    largest = 2 * VOCAB * HIDDEN
    assert 2 * n_values > 2_400_000_000
    assert size > n_values * 0.75  # six bits each, for which no search makes this slow
    assert peak - bare < 2 * largest
