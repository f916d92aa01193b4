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
from safetensors.torch import save_file

from ftcli.store.shard import PlannedTensor, plan_shards, write_shards

HIDDEN, FFN, LAYERS, VOCAB = 2048, 8192, 20, 4096
MODULES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN // 4, HIDDEN),
    "self_attn.v_proj": (HIDDEN // 4, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (FFN, HIDDEN),
    "mlp.up_proj": (FFN, HIDDEN),
    "mlp.down_proj": (HIDDEN, FFN),
}


def write_base(folder: Path) -> int:
    """The bytes of a random sharded Llama in bfloat16, written piece by piece."""
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "vocab_size": VOCAB,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    tensors = [PlannedTensor(name, "BF16", (VOCAB, HIDDEN)) for name in ("model.embed_tokens.weight", "lm_head.weight")]
    for layer in range(LAYERS):
        for name, shape in MODULES.items():
            tensors.append(PlannedTensor(f"model.layers.{layer}.{name}.weight", "BF16", shape))
        norms = [f"model.layers.{layer}.{name}.weight" for name in ("input_layernorm", "post_attention_layernorm")]
        tensors += [PlannedTensor(name, "BF16", (HIDDEN,)) for name in norms]
    tensors.append(PlannedTensor("model.norm.weight", "BF16", (HIDDEN,)))
    piece = (torch.randn(1 << 20) * 0.02).bfloat16().view(torch.uint8).numpy()

    def make_pieces(tensor: PlannedTensor) -> list[object]:
        whole, rest = divmod(tensor.size_bytes, piece.nbytes)
        return [piece] * whole + ([piece[:rest]] if rest else [])

    write_shards(folder, plan_shards(tensors, 600_000_000), make_pieces)
    return sum(tensor.size_bytes for tensor in tensors)


@pytest.mark.slow
def test_the_peak_is_that_of_tensors_not_of_the_model(tmp_path: Path) -> None:
    base, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    size = write_base(base)
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
