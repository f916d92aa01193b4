"""A model far larger than the allowance, merged by a process of its own that may not even map it."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import build_tokenizer
from large_model import FFN, HIDDEN, run_small, write_large_adapter, write_large_model

VOCAB = 4096


@pytest.mark.slow
def test_the_peak_is_that_of_tensors_not_of_the_model(tmp_path: Path) -> None:
    base, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    size = sum(tensor.size_bytes for tensor in write_large_model(base, VOCAB, shard_bytes=600_000_000))
    write_large_adapter(adapter, base)
    build_tokenizer().save_pretrained(base)
    try:
        peak, has_passed = run_small(
            "from ftcli.merge.run import merge\n"
            f"merged = merge({str(adapter)!r}, output=Path({str(out)!r}))\n"
            "print(read_peak(), merged.verification.has_passed)"
        )
    finally:
        for path in [*out.glob("*.safetensors"), *base.glob("*.safetensors")]:
            path.unlink()
    largest = 2 * FFN * HIDDEN
    assert size > (2 * largest + (1 << 30)) * 1.5
    assert int(peak) < 2 * largest + (1 << 30)
    assert has_passed == "True"
