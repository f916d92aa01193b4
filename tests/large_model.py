"""A random Llama of several GB in bfloat16, written piece by piece, and a process that may not hold it."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from ftcli.store.shard import PlannedTensor, plan_shards, write_shards

HIDDEN, FFN, LAYERS = 2048, 8192, 20
MODULES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN // 4, HIDDEN),
    "self_attn.v_proj": (HIDDEN // 4, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (FFN, HIDDEN),
    "mlp.up_proj": (FFN, HIDDEN),
    "mlp.down_proj": (HIDDEN, FFN),
}
_MOST_ADDRESSES = 4 << 30
_READ_PEAK = """
from pathlib import Path
def read_peak():  # ru_maxrss would be that of the process before exec
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
"""


def write_large_model(
    folder: Path, vocab_size: int, *, shard_bytes: int = 5_000_000_000, layers: int = LAYERS, **changes: Any
) -> list[PlannedTensor]:
    """The tensors of the model that lies in ``folder`` now, without a tokenizer; ``changes`` are those of its config.

    Four queries share a key, whatever the number of heads.
    """
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "vocab_size": vocab_size,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        **changes,
    }
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tables = ["model.embed_tokens"] if config["tie_word_embeddings"] else ["model.embed_tokens", "lm_head"]
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(tables, (vocab_size, HIDDEN))
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in MODULES.items()}
        norms = (f"model.layers.{layer}.{name}" for name in ("input_layernorm", "post_attention_layernorm"))
        shapes |= dict.fromkeys(norms, (HIDDEN,))
    shapes["model.norm"] = (HIDDEN,)
    tensors = [PlannedTensor(f"{name}.weight", "BF16", shape) for name, shape in shapes.items()]
    generator = torch.Generator().manual_seed(0)
    piece = (torch.randn(1 << 20, generator=generator) * 0.02).bfloat16().view(torch.uint8).numpy()

    def make_pieces(tensor: PlannedTensor) -> list[object]:
        whole, rest = divmod(tensor.size_bytes, piece.nbytes)
        return [piece] * whole + ([piece[:rest]] if rest else [])

    write_shards(folder, plan_shards(tensors, shard_bytes), make_pieces)
    return tensors


def write_large_adapter(folder: Path, base: Path, *, layers: int = LAYERS) -> None:
    """Nothing; ``folder`` holds a random LoRA of rank 16 on every matrix of the model in ``base``."""
    from safetensors.torch import save_file

    folder.mkdir()
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for layer in range(layers):
        for name, (n_out, n_in) in MODULES.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            weights[f"{prefix}.lora_A.weight"] = torch.randn(16, n_in, generator=generator) * 0.01
            weights[f"{prefix}.lora_B.weight"] = torch.randn(n_out, 16, generator=generator) * 0.01
    save_file(weights, folder / "adapter_model.safetensors")
    leaves = [name.rsplit(".", 1)[-1] for name in MODULES]
    config = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": leaves, "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))


def run_small(code: str) -> list[str]:
    """The words that ``code`` prints in a process of 4 GiB of addresses; it may call ``read_peak()`` for its bytes."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (_MOST_ADDRESSES, _MOST_ADDRESSES))

    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _READ_PEAK + code],
        preexec_fn=limit,
        capture_output=True,
        text=True,
        env=os.environ | {"GOMP_SPINCOUNT": "1000"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()
