"""Small models of every family, the same to the byte wherever they are made: config as JSON, weights by arithmetic."""

from __future__ import annotations

import json
import re
import shutil
import struct
from pathlib import Path
from typing import Any

from conftest import find_tokenizer

from ftcli.data.byte_level import list_byte_characters
from ftcli.events import Notice, OnEvent, ignore_event
from ftcli.gguf.convert import Converted, convert
from ftcli.gguf.draft import draft_model
from ftcli.merge.stream import ModelStream, open_folder

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
    "long_factor": [1.0, 2.0, 3.5, 5.0, 8.0, 16.0, 32.0, 60.0],
    "original_max_position_embeddings": 4096,
}
_GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
_SHORT = {"max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "sliding_window": 2047}
_LONG = {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096, "sliding_window": 262144}
_SOFTCAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window": 4096}
_GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 16, "bos_token_id": 2, "eos_token_id": 1}
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tokenizers that are made here: how they cut a text into words
_CUTS = {
    "tekken": {"type": "Split", "pattern": {"Regex": _TEKKEN}, "behavior": "Isolated", "invert": False},
    "smollm": {"type": "Digits", "individual_digits": True},
}
# name → tokenizer, architecture, what differs from the common config
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama-3.1": (
        "llama-3.1",
        "LlamaForCausalLM",
        {"vocab_size": 128256, "rope_parameters": LLAMA3, "max_position_embeddings": 131072, "bos_token_id": 128000},
    ),
    "llama-3.1-tied": ("llama-3.1", "LlamaForCausalLM", {"vocab_size": 128256, "tie_word_embeddings": True}),
    "mistral-v0.3": (
        "mistral-7b-v0.3",
        "MistralForCausalLM",
        {"vocab_size": 32768, "bos_token_id": 1, "sliding_window": None},
    ),
    "llama-2": ("mistral-7b-v0.3", "LlamaForCausalLM", {"vocab_size": 32776, "bos_token_id": 1, "head_dim": None}),
    "mistral-nemo": ("tekken", "MistralForCausalLM", {"vocab_size": 1000, "bos_token_id": 1, "head_dim": 32}),
    "smollm2": ("smollm", "LlamaForCausalLM", {"vocab_size": 49152, "tie_word_embeddings": True, "head_dim": None}),
    "qwen2": (
        "qwen3",
        "Qwen2ForCausalLM",
        {"vocab_size": 151936, "tie_word_embeddings": True, "bos_token_id": 151643, "head_dim": None},
    ),
    "qwen3": ("qwen3", "Qwen3ForCausalLM", {"vocab_size": 151936, "bos_token_id": 151643}),
    "phi-3": (
        "phi-3",
        "Phi3ForCausalLM",
        {"vocab_size": 32064, "head_dim": None, "pad_token_id": 32000, **_SHORT},
    ),
    "phi-3-long": (
        "phi-3",
        "Phi3ForCausalLM",
        {"vocab_size": 32064, "head_dim": None, "pad_token_id": 32000, "rope_parameters": LONGROPE, **_LONG},
    ),
    "gemma-2": (
        "gemma-3",
        "Gemma2ForCausalLM",
        {"vocab_size": 262144, "tie_word_embeddings": True, **_GEMMA, **_SOFTCAPS},
    ),
    "gemma-3": (
        "gemma-3",
        "Gemma3ForCausalLM",
        {"vocab_size": 262208, "tie_word_embeddings": True, "rope_parameters": _GEMMA3_ROPE, "sliding_window": 512}
        | _GEMMA,
    ),
}
# names that the converter must be told: by itself it writes "Phi 3", by which llama.cpp does not know the family
NAMES = {"phi-3": "Tiny Phi-3", "phi-3-long": "Tiny Phi-3"}
# a key of ours that the converter leaves out, so that llama.cpp would put a blank behind each control token of a chat
TOLD = dict.fromkeys(("mistral-v0.3", "llama-2"), "tokenizer.ggml.add_space_prefix")
_MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Phi3ForCausalLM": "phi3",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3_text",
}


_WIDE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 320,
}
_NARROW = {"hidden_size": 64, "vocab_size": 272}
_80_LAYERS = {"vocab_size": 272, "num_hidden_layers": 80}
_PHI3 = {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "pad_token_id": 0, "head_dim": None}
# name → how a model to be quantised differs from the tied Llama "smollm2"
QUANTIZED: dict[str, dict[str, Any]] = {
    "wide": _WIDE,
    "wide, untied": _WIDE | {"tie_word_embeddings": False},
    "wide, two queries": _WIDE | {"num_key_value_heads": 4},
    "narrow": _NARROW,
    "narrow, odd": _NARROW | {"intermediate_size": 80},
    "19 layers": {"vocab_size": 272, "num_hidden_layers": 19},
    "80 layers": _80_LAYERS,
    "80 layers, single heads": _80_LAYERS | {"num_key_value_heads": 2},
    "80 layers, qwen2": _80_LAYERS
    | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_key_value_heads": 2},
    "llama-3.1": _WIDE | {"rope_parameters": LLAMA3, "max_position_embeddings": 131072},
    "qwen3": _WIDE | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
    "phi3": _WIDE | _PHI3,
    "gemma2": _WIDE | {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2"} | _SOFTCAPS | _GEMMA,
}
_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# name → how the base of an adapter differs from the tied Llama "smollm2", and the modules that have LoRA
ADAPTED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "llama": (_WIDE, _LINEAR),
    "llama, some modules": (_WIDE, ("v_proj", "k_proj")),
    "llama, untied": (_WIDE | {"tie_word_embeddings": False}, (*_LINEAR, "embed_tokens", "lm_head")),
    "mistral": (_WIDE | {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}, _LINEAR),
    "qwen2": (_WIDE | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}, _LINEAR),
    "qwen3": (QUANTIZED["qwen3"], _LINEAR),
    "phi3": (QUANTIZED["phi3"], ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
    "gemma2": (QUANTIZED["gemma2"], _LINEAR),
    "gemma3": (
        _WIDE | {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "sliding_window": 512} | _GEMMA,
        _LINEAR,
    ),
}


def convert_model(
    model: Path | ModelStream, output: Path, *, kind: str, name: str | None = None, on_event: OnEvent = ignore_event
) -> Converted:
    """The file of a model (a folder, or where its weights are made) that lies at ``output``, notices told."""
    draft = draft_model(open_folder(model) if isinstance(model, Path) else model, name=name)
    for text in draft.notices:
        on_event(Notice(text))
    return convert(draft, output, kind=kind, on_event=on_event)


def write_model(folder: Path, case: str, *, dtype: str = "BF16", has_pieces: bool = True, **changes: Any) -> Path:
    """The folder of a two-layer model with a real tokenizer's vocabulary.

    Args:
        folder: it is made.
        case: one of `CASES`.
        dtype: of the weights.
        has_pieces: whether a SentencePiece tokenizer brings its tokenizer.model, as transformers 4 left it.
        changes: further keys of the config.
    """
    tokenizer, architecture, own = CASES[case]
    config = {
        "architectures": [architecture],
        "model_type": _MODEL_TYPES[architecture],
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": _ROPE,
        "tie_word_embeddings": False,
        "eos_token_id": 2,
        "dtype": "bfloat16",
        **own,
        **changes,
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    sampling = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.05}
    (folder / "generation_config.json").write_text(json.dumps(sampling))
    if tokenizer in _CUTS:
        write_byte_level(folder, tokenizer)
    else:
        for path in find_tokenizer(tokenizer).iterdir():
            shutil.copyfile(path, folder / path.name)
    document = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    if document["model"].get("byte_fallback") and has_pieces:
        write_pieces(folder, document)
    write_weights(folder, dtype)
    return folder


def write_weights(folder: Path, dtype: str = "BF16") -> None:
    """Nothing; ``model.safetensors`` holds weights of the config in ``folder`` that no random generator makes."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    kinds = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    tensors = {}
    for number, (name, shape) in enumerate(sorted(shapes.items())):
        values = _make_values(number, shape)
        tensors[name] = (1 + values / 4 if name.endswith("norm.weight") else values / 8).to(kinds[dtype])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def write_adapter(folder: Path, base: Path, targets: tuple[str, ...], *, rank: int = 4) -> Path:
    """The folder of a LoRA whose alpha is its rank, of all modules of ``base`` that are called like ``targets``."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    tensors = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] not in targets:
            continue
        weight: Any = module.weight
        is_table = isinstance(module, torch.nn.Embedding)
        n_outputs, n_inputs = weight.shape[::-1] if is_table else weight.shape
        for part, shape in (("A", (rank, n_inputs)), ("B", (n_outputs, rank))):
            key = f"lora_embedding_{part}" if is_table else f"lora_{part}.weight"
            tensors[f"base_model.model.{name}.{key}"] = _make_values(len(tensors), torch.Size(shape)) / 8
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank}
    config |= {"target_modules": list(targets), "base_model_name_or_path": "someone/Tiny-1B-v0.2"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 0.6, "top_k": 20}))
    front = "---\nbase_model: someone/Tiny-1B-v0.2\nlicense: mit\nlanguage: [en]\ntags: [lora]\n---\n"
    (folder / "README.md").write_text(front)
    return folder


def _make_values(number: int, shape: Any) -> Any:
    """Float32 values from -1 to 1 in this shape, other ones for each ``number``."""
    import numpy as np
    import torch

    steps = np.arange(shape.numel(), dtype=np.uint64) + np.uint64(number << 32)
    mixed = (steps * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)
    return torch.from_numpy((mixed.astype(np.float32) / (1 << 23) - 1).reshape(shape))


def write_byte_level(folder: Path, cut: str) -> None:
    """Nothing; ``folder`` has a byte-level tokenizer that joins a few words, and begins with BOS if it is Mistral's."""
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("Ġ", "in"), ("e", "r"), ("Ġ", "a"), ("Ã", "¤")]
    words = [*special, *list_byte_characters().values(), *("".join(pair) for pair in merges)]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": cut == "smollm"}
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    halves = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    template = {
        "type": "TemplateProcessing",
        "single": [bos, halves[0]],
        "pair": [bos, halves[0], bos, halves[1]],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    document = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": text, **flags} for i, text in enumerate(special)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [_CUTS[cut], level]},
        "post_processor": template if cut == "tekken" else None,
        "decoder": {**level, "use_regex": True},
        "model": {"type": "BPE", "vocab": {word: i for i, word in enumerate(words)}, "merges": merges},
    }
    (folder / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **roles}))


def write_pieces(folder: Path, document: dict[str, Any]) -> None:
    """Nothing; ``folder`` has the tokenizer.model of its tokenizer.json, and its config names the added tokens."""
    vocabulary = {number: text for text, number in document["model"]["vocab"].items()}
    added = {entry["id"]: entry for entry in document["added_tokens"]}
    data, first = b"", None
    for number, text in sorted(vocabulary.items()):
        score, kind = 0.0, 1
        if re.fullmatch(r"<0x[0-9A-F]{2}>", text):
            kind = 6
        elif text == "<unk>":
            kind = 2
        elif number in added:
            kind = 3 if added[number]["special"] else 4
        else:
            first = number if first is None else first
            score = -1e9 if not text.strip("▁") and len(text) > 1 else -float(number - first)  # as in Llama's own
        raw = text.encode()
        piece = b"\x0a" + _varint(len(raw)) + raw + b"\x15" + struct.pack("<f", score) + b"\x18" + _varint(kind)
        data += b"\x0a" + _varint(len(piece)) + piece
    trainer = b"\x18\x02\x98\x02\x01"  # model_type: BPE, byte_fallback: true
    data += b"\x12" + _varint(len(trainer)) + trainer
    (folder / "tokenizer.model").write_bytes(data)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["added_tokens_decoder"] = {
        str(number): {key: value for key, value in entry.items() if key != "id"} for number, entry in added.items()
    }
    if document["post_processor"] is None:  # as Phi-3's own config says
        config["add_bos_token"] = False
    path.write_text(json.dumps(config))


def _varint(number: int) -> bytes:
    out = b""
    while number > 127:
        out += bytes([number & 127 | 128])
        number >>= 7
    return out + bytes([number])
