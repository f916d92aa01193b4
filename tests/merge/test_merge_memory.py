"""A model far larger than the allowance, merged by a process of its own that may not even map it."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import build_tokenizer
from large_model import FFN, HIDDEN, LAYERS, MODULES, write_large_model
from safetensors.torch import save_file

VOCAB = 4096


@pytest.mark.slow
def test_the_peak_is_that_of_tensors_not_of_the_model(tmp_path: Path) -> None:
    base, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    size = sum(tensor.size_bytes for tensor in write_large_model(base, VOCAB, 600_000_000))
    adapter.mkdir()
    weights = {}
    for layer in range(LAYERS):
        for name, (n_out, n_in) in MODULES.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            weights[f"{prefix}.lora_A.weight"] = torch.randn(16, n_in) * 0.01
            weights[f"{prefix}.lora_B.weight"] = torch.randn(n_out, 16) * 0.01
    save_file(weights, adapter / "adapter_model.safetensors")
    leaves = [name.rsplit(".", 1)[-1] for name in MODULES]
    config = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": leaves, "task_type": "CAUSAL_LM"}
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    build_tokenizer().save_pretrained(base)
    code = (
        "from pathlib import Path; from ftcli.merge.run import merge; "
        f"merged = merge({str(adapter)!r}, output=Path({str(out)!r})); "
        "lines = Path('/proc/self/status').read_text().splitlines(); "  # ru_maxrss would be pytest's own before exec
        "peak = next(line.split()[1] for line in lines if line.startswith('VmHWM')); "
        "print(int(peak) * 1024, merged.verification.has_passed)"
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
    assert done.returncode == 0, done.stderr
    peak, has_passed = done.stdout.split()
    largest = 2 * FFN * HIDDEN
    assert size > (2 * largest + (1 << 30)) * 1.5
    assert int(peak) < 2 * largest + (1 << 30)
    assert has_passed == "True"
    for path in [*out.glob("*.safetensors"), *base.glob("*.safetensors")]:
        path.unlink()
