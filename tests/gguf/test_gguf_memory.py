"""A model far larger than the allowance, exported by a process of its own that may not even map it."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import build_tokenizer
from large_model import HIDDEN, write_large_model

VOCAB = 32768


@pytest.mark.slow
def test_the_peak_is_that_of_tensors_not_of_the_model(tmp_path: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    tensors = write_large_model(model, VOCAB)
    build_tokenizer().save_pretrained(model)
    code = (
        "from pathlib import Path; import ftcli.gguf.export; from transformers import AutoModelForCausalLM, "
        "LlamaForCausalLM\n"
        "def read_peak():\n"  # ru_maxrss would be pytest's own before exec
        "    lines = Path('/proc/self/status').read_text().splitlines()\n"
        "    return 1024 * int(next(line.split()[1] for line in lines if line.startswith('VmHWM')))\n"
        "bare = read_peak()\n"
        f"made, = ftcli.gguf.export.export({str(model)!r}, kinds=['q5_1'], output=Path({str(out)!r}), "
        "verifies=False).files\n"
        "print(bare, read_peak(), made.size_bytes)"
    )

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))

    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        preexec_fn=limit,
        capture_output=True,
        text=True,
        env=os.environ | {"GOMP_SPINCOUNT": "1000"},
        check=False,
    )
    for path in [*out.glob("*.gguf"), *model.glob("*.safetensors")]:
        path.unlink()
    assert done.returncode == 0, done.stderr
    bare, peak, size = map(int, done.stdout.split())
    n_values = sum(tensor.size_bytes for tensor in tensors) // 2
    largest = 2 * VOCAB * HIDDEN
    assert 2 * n_values > 2_400_000_000
    assert size > n_values * 0.75  # six bits each, for which no search makes this slow
    assert peak - bare < 2 * largest
