"""A random Llama of several GB in bfloat16, written piece by piece: what is larger than a process may hold."""

from __future__ import annotations

import json
from pathlib import Path

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


def write_large_model(folder: Path, vocab_size: int, shard_bytes: int = 5_000_000_000) -> list[PlannedTensor]:
    """The tensors of the model that lies in ``folder`` now, without a tokenizer."""
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "vocab_size": vocab_size,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("model.embed_tokens", "lm_head"), (vocab_size, HIDDEN))
    for layer in range(LAYERS):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in MODULES.items()}
        norms = (f"model.layers.{layer}.{name}" for name in ("input_layernorm", "post_attention_layernorm"))
        shapes |= dict.fromkeys(norms, (HIDDEN,))
    shapes["model.norm"] = (HIDDEN,)
    tensors = [PlannedTensor(f"{name}.weight", "BF16", shape) for name, shape in shapes.items()]
    piece = (torch.randn(1 << 20) * 0.02).bfloat16().view(torch.uint8).numpy()

    def make_pieces(tensor: PlannedTensor) -> list[object]:
        whole, rest = divmod(tensor.size_bytes, piece.nbytes)
        return [piece] * whole + ([piece[:rest]] if rest else [])

    write_shards(folder, plan_shards(tensors, shard_bytes), make_pieces)
    return tensors
