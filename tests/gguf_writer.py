"""A GGUF file of a small model and its tokenizer, written tensor by tensor with the package ``gguf``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
}


def permute(weight: Any, n_heads: int) -> Any:
    """llama.cpp interleaves the halves of each head that rotary embedding turns (convert_hf_to_gguf.py)."""
    shape = weight.shape
    return weight.reshape(n_heads, 2, shape[0] // n_heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def write_gguf(
    path: Path, tokenizer: Any, *, model: Any = None, kind: str = "llama", pre: str = "gpt-2", tensors: Any = ()
) -> Path:
    writer = gguf.GGUFWriter(path, kind)
    writer.add_name("tiny")
    if model is not None:
        config = model.config
        writer.add_block_count(config.num_hidden_layers)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_vocab_size(config.vocab_size)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        names = gguf.get_tensor_name_map(ARCHITECTURES[kind], config.num_hidden_layers)
        for name, value in model.state_dict().items():
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue
            array = value.float().numpy()
            if kind == "llama" and ("q_proj" in name or "k_proj" in name):
                heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
                array = permute(array, heads)
            if kind == "gemma2" and "norm" in name:
                array = array + 1  # transformers adds it at run time
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), array)
    for name in tensors:
        writer.add_tensor(name, np.zeros(4, dtype=np.float32))
    write_vocabulary(writer, tokenizer, pre)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_vocabulary(writer: Any, tokenizer: Any, pre: str) -> None:
    import json

    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = tokenizer.get_vocab()
    added = {token["id"]: token for token in definition["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    types = [3 if i in added and added[i]["special"] else 4 if i in added else 1 for i in range(len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(merge) for merge in definition["model"]["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_chat_template(tokenizer.chat_template)
