"""A model far larger than the allowance, exported by a process of its own that may not even map it."""

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

from ftcli.store.shard import PlannedTensor, plan_shards, write_shards

HIDDEN, FFN, LAYERS, VOCAB = 2048, 8192, 20, 32768
MODULES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN // 4, HIDDEN),
    "self_attn.v_proj": (HIDDEN // 4, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (FFN, HIDDEN),
    "mlp.up_proj": (FFN, HIDDEN),
    "mlp.down_proj": (HIDDEN, FFN),
}


def write_model(folder: Path) -> list[PlannedTensor]:
    """The tensors of a random Llama in bfloat16 in one file, written piece by piece."""
    build_tokenizer().save_pretrained(folder)
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

    write_shards(folder, plan_shards(tensors), make_pieces)
    return tensors


@pytest.mark.slow
def test_the_peak_is_that_of_tensors_not_of_the_model(tmp_path: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    tensors = write_model(model)
    code = (
        "from pathlib import Path; import ftcli.gguf.export; from transformers import AutoModelForCausalLM, "
        "LlamaForCausalLM\n"
        "def read_peak():\n"  # ru_maxrss would be pytest's own before exec
        "    lines = Path('/proc/self/status').read_text().splitlines()\n"
        "    return 1024 * int(next(line.split()[1] for line in lines if line.startswith('VmHWM')))\n"
        "bare = read_peak()\n"
        f"made, = ftcli.gguf.export.export({str(model)!r}, kinds=['q5_1'], output=Path({str(out)!r}), "
        "verifies=False)\n"
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
