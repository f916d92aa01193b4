"""The families that become GGUF files: one entry each, with what differs from Llama.

An entry says what llama.cpp calls the family, which of the config's numbers it wants to know and in which order, and
what must be done to the weights. Order and names are those of ``convert_hf_to_gguf.py`` in ggml-org/llama.cpp, so
that the files are the same to the byte; but for Gemma's norms in float16, to which the converter adds its 1 in float16
and transformers in float32.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ftcli.errors import ContentError
from ftcli.gguf.write import Value
from ftcli.model.layout import GGUF_MODULES, GGUF_NORMS

Config = Mapping[str, Any]
Keys = Iterator[tuple[str, Value]]
Extra = Iterator[tuple[str, torch.Tensor]]
CONVERTER = "llama.cpp's convert_hf_to_gguf.py"
FILE_TYPE = "general.file_type"  # stands among a family's keys, and gets its value from the kind of file

_MODULES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_BLOCK_MODULES = {ours: theirs for theirs, ours in (GGUF_MODULES | GGUF_NORMS).items()} | {"mlp.gate_up_proj": "ffn_up"}
_SANDWICH = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_ROPE_KINDS = (None, "default", "linear", "yarn", "llama3", "su", "longrope", "dynamic")
_BLOCK = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")


def _list_llama(config: Config) -> Keys:
    yield from _list_plain(config)
    yield "vocab_size", config["vocab_size"]
    yield "rope.dimension_count", _find_head_size(config)


def _list_plain(config: Config) -> Keys:
    """What llama.cpp wants to know of most families."""
    yield "block_count", config["num_hidden_layers"]
    yield "context_length", config["max_position_embeddings"]
    yield "embedding_length", config["hidden_size"]
    yield "feed_forward_length", config["intermediate_size"]
    yield "attention.head_count", config["num_attention_heads"]
    yield "attention.head_count_kv", config["num_key_value_heads"]
    yield from _list_rope(config)
    yield "attention.layer_norm_rms_epsilon", float(config["rms_norm_eps"])
    if config.get("head_dim") is not None:
        yield "attention.key_length", config["head_dim"]
        yield "attention.value_length", config["head_dim"]
    yield FILE_TYPE, 0


def _list_rope(config: Config) -> Keys:
    """Rotary embeddings; llama3's scaling is a tensor of its own, longrope's two."""
    rope = _read_rope(config)
    kind, factor = rope.get("rope_type"), rope.get("factor")
    if kind not in _ROPE_KINDS:
        raise ContentError(f"llama.cpp does not know rotary embeddings of the kind {kind}", hint=f"try {CONVERTER}")
    if kind in ("linear", "yarn") and factor is not None:
        yield "rope.scaling.type", kind
        yield "rope.scaling.factor", float(factor)
    if kind == "yarn" and factor is not None:
        yield "rope.scaling.original_context_length", rope["original_max_position_embeddings"]
        options = {
            "ext_factor": rope.get("extrapolation_factor"),
            "attn_factor": rope.get("attention_factor", rope.get("attn_factor")),
            "beta_fast": rope.get("beta_fast"),
            "beta_slow": rope.get("beta_slow"),
        }
        for name, value in options.items():
            if value is not None:
                yield f"rope.scaling.yarn_{name}", float(value)
    if kind in ("su", "longrope"):
        yield "rope.scaling.type", "longrope"
    yield "rope.freq_base", float(rope["rope_theta"])
    if local := _read_rope(config, "sliding_attention"):
        yield "rope.freq_base_swa", float(local["rope_theta"])


def _read_rope(config: Config, layers: str = "full_attention") -> Config:
    """The rotary parameters, of one kind of layers where the family has several kinds."""
    rope: Config = config.get("rope_parameters") or {}
    if "full_attention" in rope or "sliding_attention" in rope:
        return rope.get(layers) or {}
    return rope if layers == "full_attention" else {}


def _find_head_size(config: Config) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _make_rope_freqs(config: Config) -> Extra:
    """The divisors of llama3's rotary frequencies; transformers: ``_compute_llama3_parameters``."""
    rope = _read_rope(config)
    if rope.get("rope_type") != "llama3":
        return
    size, factor, context = _find_head_size(config), rope["factor"], rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    divisors = []
    for frequency in 1.0 / (rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size)):
        length = 2 * math.pi / frequency
        if length < context / high:
            divisors.append(1.0)
        elif length > context / low:
            divisors.append(float(factor))
        else:
            smooth = (context / length - low) / (high - low)
            divisors.append(float(1 / ((1 - smooth) / factor + smooth)))
    yield "rope_freqs.weight", torch.tensor(divisors, dtype=torch.float32)


def _list_phi3(config: Config) -> Keys:
    yield "context_length", config["max_position_embeddings"]
    yield "rope.scaling.original_context_length", _find_phi3_context(config)
    yield "embedding_length", config["hidden_size"]
    yield "feed_forward_length", config["intermediate_size"]
    yield "block_count", config["num_hidden_layers"]
    yield "attention.head_count", config["num_attention_heads"]
    yield "attention.head_count_kv", config["num_key_value_heads"]
    yield "attention.layer_norm_rms_epsilon", float(config["rms_norm_eps"])
    share = _read_rope(config).get("partial_rotary_factor", 1.0)
    yield "rope.dimension_count", int(share * config["hidden_size"]) // config["num_attention_heads"]
    yield "rope.freq_base", float(_read_rope(config)["rope_theta"])
    yield FILE_TYPE, 0
    yield "attention.sliding_window", config.get("sliding_window") or 0


def _find_phi3_context(config: Config) -> int:
    """The context before it was made longer."""
    found = _read_rope(config).get("original_max_position_embeddings", config.get("original_max_position_embeddings"))
    return int(found or config["max_position_embeddings"])


def _list_phi3_first(config: Config) -> Keys:
    """What a longer context does to attention."""
    if not _read_rope(config).get("long_factor"):
        return
    before = _find_phi3_context(config)
    scale = config["max_position_embeddings"] / before
    if _read_rope(config)["rope_type"] == "yarn":
        yield "rope.scaling.attn_factor", 0.1 * math.log(scale) + 1.0 if scale > 1.0 else 1.0
    else:
        yield "rope.scaling.attn_factor", math.sqrt(1 + math.log(scale) / math.log(before)) if scale > 1.0 else 1.0


def _make_rope_factors(config: Config) -> Extra:
    for side in ("long", "short"):
        if factors := _read_rope(config).get(f"{side}_factor"):
            yield f"rope_factors_{side}.weight", torch.tensor(factors, dtype=torch.float32)


def _list_gemma2(config: Config) -> Keys:
    yield "context_length", config["max_position_embeddings"]
    yield "embedding_length", config["hidden_size"]
    yield "block_count", config["num_hidden_layers"]
    yield "feed_forward_length", config["intermediate_size"]
    yield "attention.head_count", config["num_attention_heads"]
    yield "attention.head_count_kv", config["num_key_value_heads"]
    yield "attention.layer_norm_rms_epsilon", float(config["rms_norm_eps"])
    yield "attention.key_length", config["head_dim"]
    yield "attention.value_length", config["head_dim"]
    yield FILE_TYPE, 0
    yield "attn_logit_softcapping", float(config["attn_logit_softcapping"])
    yield "final_logit_softcapping", float(config["final_logit_softcapping"])
    yield "attention.sliding_window", config["sliding_window"]


def _list_gemma3(config: Config) -> Keys:
    yield from _list_plain(config)
    if config.get("final_logit_softcapping"):
        yield "final_logit_softcapping", float(config["final_logit_softcapping"])
    yield "attention.sliding_window", config["sliding_window"]


def _list_nothing(config: Config) -> Iterator[Any]:
    yield from ()


@dataclass(frozen=True)
class Family:
    """How one family becomes a GGUF file.

    Args:
        architecture: llama.cpp's name of it.
        list_keys: config → its numbers, in order, as (key behind the architecture, value).
        list_first: those that stand before all else.
        make_extra: tensors that transformers computes and llama.cpp reads.
        has_sandwich: whether attention and FFN stand between two norms each.
        permutes: whether q and k lie as Meta had them, pairs of a rotation side by side.
        must_tie: whether llama.cpp takes the embedding for the head, whatever the file says.
        norm_offset: what a norm's weight is added to when it is used.
        writes_prefix: whether a tokenizer_config.json that has ``add_prefix_space`` is heeded.
        trusts_special: whether only tokens marked special are control tokens, whatever they look like.
    """

    architecture: str
    list_keys: Callable[[Config], Keys] = _list_plain
    list_first: Callable[[Config], Keys] = _list_nothing
    make_extra: Callable[[Config], Extra] = _list_nothing
    has_sandwich: bool = False
    permutes: bool = False
    must_tie: bool = False
    norm_offset: float = 0.0
    writes_prefix: bool = False
    trusts_special: bool = False

    def translate(self, name: str) -> str:
        """llama.cpp's name of the tensor that transformers calls ``name``.

        Raises:
            ContentError: the family has no such tensor.
        """
        module, _, part = name.rpartition(".")
        if module == "lm_head" and self.must_tie:
            raise ContentError(
                f"llama.cpp's {self.architecture} has no head beside the embedding, and here they differ",
                hint="train head and embedding alike, or neither",
            )
        if module in _MODULES:
            return f"{_MODULES[module]}.{part}"
        found = _BLOCK.fullmatch(name)
        modules = _BLOCK_MODULES | _SANDWICH if self.has_sandwich else _BLOCK_MODULES
        if not found or found[2] not in modules:
            raise ContentError(f"llama.cpp's {self.architecture} has no tensor for {name}", hint=f"try {CONVERTER}")
        return f"blk.{found[1]}.{modules[found[2]]}.{found[3]}"

    def adapt(self, name: str, values: torch.Tensor, config: Config) -> torch.Tensor:
        """A tensor (a whole one where `reorders`) as llama.cpp wants it, in its type or float32."""
        if self.norm_offset and name.endswith("norm.weight"):
            return values.float() + self.norm_offset
        if self.reorders(name):
            key = "num_attention_heads" if ".q_proj." in name else "num_key_value_heads"
            n_heads = config[key]
            return values.view(n_heads, 2, len(values) // n_heads // 2, *values.shape[1:]).swapaxes(1, 2).flatten(0, 2)
        return values

    def reorders(self, name: str) -> bool:
        """Whether `adapt` moves rows of the tensor, and so must see all of it."""
        return self.permutes and ".self_attn." in name and (".q_proj." in name or ".k_proj." in name)


_LLAMA = Family("llama", _list_llama, make_extra=_make_rope_freqs, permutes=True, writes_prefix=True)
FAMILIES = {
    "llama": _LLAMA,  # SmolLM2 too
    "mistral": _LLAMA,
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "phi3": Family("phi3", _list_phi3, _list_phi3_first, _make_rope_factors, trusts_special=True),
    "gemma2": Family("gemma2", _list_gemma2, has_sandwich=True, norm_offset=1.0, must_tie=True),
    "gemma3_text": Family("gemma3", _list_gemma3, has_sandwich=True, norm_offset=1.0),
}


def find_family(name: str, where: str) -> Family:
    """The entry of the family that ``config.json`` calls ``name``.

    Raises:
        ContentError: there is none.
    """
    if name in FAMILIES:
        return FAMILIES[name]
    raise ContentError(
        f"ftcli does not know how {name or 'this model'} is written as GGUF",
        where=where,
        why=f"known are {', '.join(sorted(FAMILIES))}",
        hint=f"export it as safetensors (ftcli merge) and run {CONVERTER} on that",
    )
