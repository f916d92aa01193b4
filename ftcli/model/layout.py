"""The tensors that a model of a known family has, by the names they have on disk, from its dimensions alone.

    embedding ─▶ [norm ─ attention (q k v o) ─ norm ─ FFN (gate up down)] × layers ─▶ norm ─▶ head

Each family is one entry of a table: what differs from Llama's block. Also the other way: what a tensor's name,
in transformers' or GGUF's spelling, says of its place. No torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ftcli.model.dimensions import Dimensions
from ftcli.store.tensor import TensorEntry

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Family:
    """How a family's block differs from Llama's; ``norms`` are those of a block, before q and k ones."""

    title: str
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    norm_kind: str = "RMSNorm"
    qk_norm: str = ""  # "head": one weight per head dimension; "full": per projection
    qkv_bias: bool = False
    fused: bool = False  # qkv_proj and gate_up_proj
    is_gated: bool = True
    is_known: bool = True


_SANDWICH = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
FAMILIES = {
    "llama": Family("Llama"),
    "mistral": Family("Mistral"),
    "ministral3": Family("Ministral"),
    "mixtral": Family("Mixtral"),
    "qwen2": Family("Qwen 2", qkv_bias=True),
    "qwen2_moe": Family("Qwen 2 MoE", qkv_bias=True),
    "qwen3": Family("Qwen 3", qk_norm="head"),
    "qwen3_moe": Family("Qwen 3 MoE", qk_norm="head"),
    "phi3": Family("Phi-3", fused=True),
    "phi": Family("Phi", ("input_layernorm",), "LayerNorm", is_gated=False),
    "gemma": Family("Gemma"),
    "gemma2": Family("Gemma 2", _SANDWICH),
    "gemma3_text": Family("Gemma 3", _SANDWICH, qk_norm="head"),
    "smollm3": Family("SmolLM3"),
    "granite": Family("Granite"),
    "olmo2": Family("OLMo 2", ("post_attention_layernorm", "post_feedforward_layernorm"), qk_norm="full"),
    "starcoder2": Family("StarCoder 2", norm_kind="LayerNorm", is_gated=False),
    "gpt2": Family("GPT-2", ("ln_1", "ln_2"), "LayerNorm", qkv_bias=True, is_gated=False),
}


def find_family(name: str) -> Family:
    """The family's entry; of one that is not known, an entry that says so."""
    return FAMILIES.get(name, Family(name or "unknown", is_known=False))


def plan_tensors(dimensions: Dimensions) -> dict[str, Shape]:
    """Name → shape of every tensor that the model has, tied heads left out; empty for an unknown family.

    Names are those of a checkpoint on disk, so experts stand one by one. Source of each family: transformers'
    ``modeling_FAMILY.py``.
    """
    if dimensions.family not in FAMILIES:
        return {}
    parts = _plan_gpt2(dimensions) if dimensions.family == "gpt2" else _plan_llama(dimensions)
    return dict(parts)


def _plan_gpt2(d: Dimensions) -> Iterator[tuple[str, Shape]]:
    yield "transformer.wte.weight", (d.vocab, d.hidden)
    yield "transformer.wpe.weight", (d.context or 0, d.hidden)
    for layer in range(d.n_layers):
        block = f"transformer.h.{layer}"
        for name in ("ln_1", "ln_2"):
            yield from _norm(f"{block}.{name}", d.hidden, has_bias=True)
        # Conv1D: the weight lies as (in, out)
        for name, shape in (
            ("attn.c_attn", (d.hidden, 3 * d.hidden)),
            ("attn.c_proj", (d.hidden, d.hidden)),
            ("mlp.c_fc", (d.hidden, d.ffn)),
            ("mlp.c_proj", (d.ffn, d.hidden)),
        ):
            yield f"{block}.{name}.weight", shape
            yield f"{block}.{name}.bias", shape[1:]
    yield from _norm("transformer.ln_f", d.hidden, has_bias=True)
    if not d.is_tied:
        yield "lm_head.weight", (d.vocab, d.hidden)


def _plan_llama(d: Dimensions) -> Iterator[tuple[str, Shape]]:
    family = FAMILIES[d.family]
    has_norm_bias = family.norm_kind == "LayerNorm"
    yield "model.embed_tokens.weight", (d.vocab, d.hidden)
    for layer in range(d.n_layers):
        block = f"model.layers.{layer}"
        for name in family.norms:
            yield from _norm(f"{block}.{name}", d.hidden, has_bias=has_norm_bias)
        yield from _plan_attention(d, family, f"{block}.self_attn")
        yield from _plan_experts(d, block) if d.experts else _plan_ffn(d, family, f"{block}.mlp", d.ffn)
    final = "final_layernorm" if d.family == "phi" else "norm"
    yield from _norm(f"model.{final}", d.hidden, has_bias=has_norm_bias)
    if not d.is_tied:
        yield "lm_head.weight", (d.vocab, d.hidden)
    if d.family == "phi":
        yield "lm_head.bias", (d.vocab,)


def _plan_attention(d: Dimensions, family: Family, block: str) -> Iterator[tuple[str, Shape]]:
    q, kv = d.n_heads * d.head_dim, d.n_kv_heads * d.head_dim
    everywhere = d.flags["attention_bias"] or d.flags["use_bias"] or d.family == "phi"
    if family.fused:
        yield from _linear(f"{block}.qkv_proj", q + 2 * kv, d.hidden)
    else:
        for name, rows in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
            yield from _linear(f"{block}.{name}", rows, d.hidden, has_bias=family.qkv_bias or everywhere)
    yield from _linear(f"{block}.{'dense' if d.family == 'phi' else 'o_proj'}", d.hidden, q, has_bias=everywhere)
    if family.qk_norm or d.flags["qk_layernorm"]:
        widths = (q, kv) if family.qk_norm == "full" else (d.head_dim, d.head_dim)
        for name, width in zip(("q_norm", "k_norm"), widths, strict=True):
            yield from _norm(f"{block}.{name}", width)


def _plan_ffn(d: Dimensions, family: Family, block: str, width: int) -> Iterator[tuple[str, Shape]]:
    has_bias = d.flags["mlp_bias"] or d.flags["use_bias"] or d.family == "phi"
    if family.fused:
        yield from _linear(f"{block}.gate_up_proj", 2 * width, d.hidden)
        yield from _linear(f"{block}.down_proj", d.hidden, width)
    elif family.is_gated:
        for name in ("gate_proj", "up_proj"):
            yield from _linear(f"{block}.{name}", width, d.hidden, has_bias=has_bias)
        yield from _linear(f"{block}.down_proj", d.hidden, width, has_bias=has_bias)
    else:
        up, down = ("fc1", "fc2") if d.family == "phi" else ("c_fc", "c_proj")
        yield from _linear(f"{block}.{up}", width, d.hidden, has_bias=has_bias)
        yield from _linear(f"{block}.{down}", d.hidden, width, has_bias=has_bias)


def _plan_experts(d: Dimensions, block: str) -> Iterator[tuple[str, Shape]]:
    assert d.experts is not None
    is_mixtral = d.family == "mixtral"
    moe = f"{block}.block_sparse_moe" if is_mixtral else f"{block}.mlp"
    gate, up, down = ("w1", "w3", "w2") if is_mixtral else ("gate_proj", "up_proj", "down_proj")
    yield f"{moe}.gate.weight", (d.experts.count, d.hidden)
    for expert in range(d.experts.count):
        for name in (gate, up):
            yield f"{moe}.experts.{expert}.{name}.weight", (d.experts.ffn, d.hidden)
        yield f"{moe}.experts.{expert}.{down}.weight", (d.hidden, d.experts.ffn)
    if d.experts.shared_ffn:
        yield from _plan_ffn(d, FAMILIES["llama"], f"{moe}.shared_expert", d.experts.shared_ffn)
        yield f"{moe}.shared_expert_gate.weight", (1, d.hidden)


def _linear(name: str, rows: int, columns: int, *, has_bias: bool = False) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (rows, columns)
    if has_bias:
        yield f"{name}.bias", (rows,)


def _norm(name: str, width: int, *, has_bias: bool = False) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (width,)
    if has_bias:
        yield f"{name}.bias", (width,)


@dataclass(frozen=True)
class Place:
    """Where a tensor stands: its layer (None outside of blocks), its part, and its module's short name.

    ``part`` is embedding, position, attention, ffn, norm, head, buffer (no parameter) or other.
    """

    layer: int | None
    part: str
    module: str


@dataclass(frozen=True)
class PlacedTensor:
    """A tensor of the model by transformers' name; ``entry`` is it on disk, None where only the config was read."""

    name: str
    shape: Shape
    place: Place
    entry: TensorEntry | None = None

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def is_linear(self) -> bool:
        """Whether it is the weight of a linear layer in a block, which bitsandbytes would quantise."""
        return len(self.shape) >= 2 and self.place.layer is not None and self.place.part in ("attention", "ffn")

    @property
    def is_router(self) -> bool:
        return self.place.module.rpartition(".")[2] in _ROUTER and self.place.part == "ffn"


_ROUTER = ("gate", "ffn_gate_inp", "shared_expert_gate")
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blk|blocks)\.(\d{1,6})\.")
_BUFFER = re.compile(
    r"rotary_emb|inv_freq|rope_(freqs|factors)|(?:^|\.)attn\.(masked_)?bias$|quant_state|absmax|nested_"
)
_PATTERNS = (
    ("other", re.compile(r"vision|image|audio|multi_modal|visual")),
    ("head", re.compile(r"(^|\.)(lm_head|embed_out)\.|^output\.(weight|bias)$")),
    ("position", re.compile(r"(^|\.)(wpe|position_embd|embed_positions)\.")),
    ("embedding", re.compile(r"(^|\.)(embed_tokens|wte|token_embd|embed_in|word_embeddings)\.")),
    ("norm", re.compile(r"norm|(^|\.)ln_(1|2|f)\.")),
    ("attention", re.compile(r"attn|attention")),
    ("ffn", re.compile(r"mlp|ffn|feed_forward|block_sparse_moe|expert")),
)


def locate_tensor(name: str) -> Place:
    """The place that the tensor's name speaks of, in transformers' or GGUF's spelling."""
    found = _LAYER.search(name)
    layer = int(found.group(1)) if found else None
    module = name.removesuffix(".weight").removesuffix(".bias")
    module = module[found.end() :] if found else module
    if _BUFFER.search(name):
        return Place(layer, "buffer", module)
    for part, pattern in _PATTERNS:
        if pattern.search(name):
            return Place(layer, part, module)
    return Place(layer, "other", module)


GGUF_MODULES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
}
# norms of Llama's block; families with more of them name some otherwise
GGUF_NORMS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}


def complete_name(name: str, planned: Mapping[str, Shape]) -> str:
    """The name as the whole model has it: a base model alone, or one in a multimodal model, is named otherwise."""
    if name in planned:
        return name
    for prefix in ("transformer.", "model."):
        if prefix + name in planned:
            return prefix + name
    for prefix in ("language_model.", "model.language_model."):
        if name.startswith(prefix):
            rest = name.removeprefix(prefix)
            return rest if rest in planned else f"model.{rest}" if f"model.{rest}" in planned else name
    return name


def translate_gguf_name(name: str, *, is_fused: bool = False) -> str:
    """transformers' name of the linear layer, embedding or head that GGUF calls ``name``; else ``name`` itself."""
    if name in ("token_embd.weight", "output.weight"):
        return "model.embed_tokens.weight" if name.startswith("token") else "lm_head.weight"
    found = re.fullmatch(r"blk\.(\d+)\.([a-z_]+)\.(weight|bias)", name)
    if not found or found.group(2) not in GGUF_MODULES:
        return name
    module = GGUF_MODULES[found.group(2)]
    if is_fused and module == "mlp.up_proj":
        module = "mlp.gate_up_proj"
    return f"model.layers.{found.group(1)}.{module}.{found.group(3)}"
