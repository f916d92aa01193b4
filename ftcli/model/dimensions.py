"""A model's config → the numbers that its size follows from, with the defaults of its family filled in.

Families name the same things differently, and a ``config.json`` leaves out what equals transformers' default, so
a missing key means what the family's own config class says. GGUF metadata are read into the same numbers. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ftcli.errors import ContentError

# What config.json leaves out: defaults of transformers' configuration_FAMILY.py, where they differ from the usual.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma": {"head_dim": 256, "num_key_value_heads": 16, "tie_word_embeddings": True,
              "hidden_act": "gelu_pytorch_tanh"},
    "gemma2": {"head_dim": 256, "num_key_value_heads": 4, "num_attention_heads": 8, "tie_word_embeddings": True,
               "hidden_act": "gelu_pytorch_tanh", "sliding_window": 4096, "max_position_embeddings": 8192},
    "gemma3_text": {"head_dim": 256, "num_key_value_heads": 4, "num_attention_heads": 8, "tie_word_embeddings": True,
                    "hidden_act": "gelu_pytorch_tanh", "sliding_window": 4096, "rope_theta": 1e6,
                    "max_position_embeddings": 131072, "vocab_size": 262208, "sliding_window_pattern": 6},
    "gpt2": {"tie_word_embeddings": True, "hidden_act": "gelu_new", "vocab_size": 50257,
             "max_position_embeddings": 1024},
    "mistral": {"num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 131072,
                "sliding_window": 4096},
    "mixtral": {"num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "rope_theta": 1e6},
    "phi": {"hidden_act": "gelu_new"},
    "qwen3": {"head_dim": 128},
    "qwen3_moe": {"num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
    "smollm3": {"num_key_value_heads": 4, "tie_word_embeddings": True, "rope_theta": 2e6},
    "starcoder2": {"num_key_value_heads": 2, "tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh",
                   "use_bias": True},
    "ministral3": {"head_dim": 128, "num_key_value_heads": 8},
}  # fmt: skip
_ALIASES = {
    "hidden_size": ("n_embd", "d_model"),
    "num_hidden_layers": ("n_layer", "n_layers"),
    "num_attention_heads": ("n_head", "n_heads"),
    "intermediate_size": ("n_inner", "ffn_dim"),
    "max_position_embeddings": ("n_positions", "n_ctx"),
    "hidden_act": ("hidden_activation", "activation_function"),
    "num_experts": ("num_local_experts", "n_routed_experts"),
    "rms_norm_eps": ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon", "norm_eps"),
}
_LARGEST = 1 << 31  # no dimension of a real model comes near
_MOST_LAYERS, _MOST_EXPERTS = 4096, 4096


@dataclass(frozen=True)
class Rope:
    """Rotary positions: ``kind`` is ``default``, ``llama3``, ``longrope``, ``yarn`` …; ``scaling`` its other keys."""

    theta: float
    kind: str
    scaling: dict[str, Any]


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: how many, how many a token passes through, and the width of each."""

    count: int
    per_token: int
    ffn: int
    shared_ffn: int = 0


@dataclass(frozen=True)
class Dimensions:
    """The shape of a model.

    ``windows`` holds for each layer the positions that it sees, None for all; ``context`` is the longest text.
    """

    family: str
    n_layers: int
    hidden: int
    ffn: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab: int
    is_tied: bool
    activation: str
    context: int | None
    rope: Rope | None
    windows: tuple[int | None, ...]
    experts: Experts | None
    norm_eps: float | None
    flags: Mapping[str, bool]

    @property
    def attention_kind(self) -> str:
        """``MHA``, ``GQA 4:1`` (query heads to a key/value head) or ``MQA``."""
        if self.n_heads == self.n_kv_heads:
            return "MHA"
        if self.n_kv_heads == 1:
            return "MQA"
        return f"GQA {self.n_heads / self.n_kv_heads:g}:1"

    def count_kv_bytes(self, *, bytes_per_value: int = 2) -> int:
        """Bytes of the key/value cache per token: keys and values of every layer."""
        return 2 * self.n_layers * self.n_kv_heads * self.head_dim * bytes_per_value

    def count_kv_bytes_at(self, n_tokens: int, *, bytes_per_value: int = 2) -> int:
        """Bytes of the cache after ``n_tokens``; a layer with a sliding window keeps no more than that."""
        kept = sum(min(n_tokens, window or n_tokens) for window in self.windows)
        return 2 * kept * self.n_kv_heads * self.head_dim * bytes_per_value


def read_dimensions(config: Mapping[str, Any], *, where: str = "config.json") -> Dimensions:
    """The dimensions that ``config`` (a ``config.json``) states; of a multimodal model, those of its text part.

    Raises:
        ContentError: a number that decides the size is missing or cannot be.
    """
    values, family = _choose_text(config)
    reader = _Reader(values, {**_DEFAULTS.get(family, {})}, where)
    hidden, n_heads = reader.size("hidden_size"), reader.size("num_attention_heads")
    n_layers = reader.size("num_hidden_layers", most=_MOST_LAYERS)
    head_dim = reader.size("head_dim", default=max(1, hidden // n_heads))
    experts = _read_experts(reader)
    return Dimensions(
        family=family,
        n_layers=n_layers,
        hidden=hidden,
        ffn=reader.size("intermediate_size", default=4 * hidden),
        n_heads=n_heads,
        n_kv_heads=reader.size("num_key_value_heads", default=n_heads),
        head_dim=head_dim,
        vocab=reader.size("vocab_size"),
        is_tied=bool(reader.get("tie_word_embeddings", config.get("tie_word_embeddings", False))),
        activation=str(reader.get("hidden_act", "silu")),
        context=reader.optional("max_position_embeddings"),
        rope=None if family == "gpt2" else _read_rope(reader),
        windows=_read_windows(reader, n_layers, family),
        experts=experts,
        norm_eps=_as_float(reader.get("rms_norm_eps")),
        flags={key: bool(reader.get(key, False)) for key in ("attention_bias", "mlp_bias", "use_bias", "qk_layernorm")},
    )


def read_gguf_dimensions(metadata: Mapping[str, Any], rows: int, *, is_tied: bool, where: str) -> Dimensions:
    """The dimensions that a GGUF file's metadata state, ``rows`` being those of its embedding.

    Raises:
        ContentError: a number that decides the size is missing or cannot be.
    """
    family = str(metadata.get("general.architecture", ""))
    own = {key.removeprefix(f"{family}."): value for key, value in metadata.items() if key.startswith(f"{family}.")}
    names = {
        "hidden_size": "embedding_length",
        "num_hidden_layers": "block_count",
        "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv",
        "intermediate_size": "feed_forward_length",
        "head_dim": "attention.key_length",
        "max_position_embeddings": "context_length",
        "rope_theta": "rope.freq_base",
        "sliding_window": "attention.sliding_window",
        "rms_norm_eps": "attention.layer_norm_rms_epsilon",
        "num_experts": "expert_count",
        "num_experts_per_tok": "expert_used_count",
        "moe_intermediate_size": "expert_feed_forward_length",
    }
    config: dict[str, Any] = {key: own[name] for key, name in names.items() if own.get(name)}
    for key in ("num_key_value_heads", "intermediate_size", "num_attention_heads"):
        if isinstance(config.get(key), list):  # one number a layer; the largest is what memory must hold
            config[key] = max((v for v in config[key] if isinstance(v, int)), default=0)
    if kind := own.get("rope.scaling.type"):
        config["rope_scaling"] = {"rope_type": kind, "factor": own.get("rope.scaling.factor")}
    config |= {"model_type": GGUF_NAMES.get(family, family), "vocab_size": rows, "tie_word_embeddings": is_tied}
    return read_dimensions(config, where=where)


# GGUF's name of a family → transformers'
GGUF_NAMES = {"qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe", "gemma3": "gemma3_text", "phi2": "phi"}


def _choose_text(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    text = config.get("text_config")
    values = text if isinstance(text, Mapping) else config
    family = str(values.get("model_type") or config.get("model_type") or "")
    return values, {"gemma3": "gemma3_text"}.get(family, family)


def _read_experts(reader: _Reader) -> Experts | None:
    count = reader.optional("num_experts", most=_MOST_EXPERTS)
    if not count:
        return None
    ffn = reader.size("moe_intermediate_size", default=reader.size("intermediate_size"))
    per_token = reader.size("num_experts_per_tok", default=count)
    return Experts(count, min(count, per_token), ffn, reader.optional("shared_expert_intermediate_size") or 0)


def _read_rope(reader: _Reader) -> Rope:
    """Both spellings: ``rope_parameters`` of transformers 5, and ``rope_theta`` with ``rope_scaling``."""
    found = reader.get("rope_parameters") or reader.get("rope_scaling") or {}
    values = dict(found) if isinstance(found, Mapping) else {}
    if isinstance(values.get("full_attention"), Mapping):
        values = dict(values["full_attention"])
    kind = values.pop("rope_type", None) or values.pop("type", None) or "default"
    theta = values.pop("rope_theta", None) or reader.get("rope_theta") or 10000.0
    values.pop("type", None)
    return Rope(
        _as_float(theta) or 10000.0, str(kind), {key: value for key, value in values.items() if value is not None}
    )


def _read_windows(reader: _Reader, n_layers: int, family: str) -> tuple[int | None, ...]:
    window = reader.optional("sliding_window")
    if not window or reader.get("use_sliding_window") is False:
        return (None,) * n_layers
    kinds = reader.get("layer_types")
    if isinstance(kinds, Sequence) and not isinstance(kinds, str) and len(kinds) == n_layers:
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    every = {"gemma2": 2}.get(family) or (reader.optional("sliding_window_pattern") if family == "gemma3_text" else 0)
    if every:  # each last one of a group sees everything
        return tuple(None if (layer + 1) % every == 0 else window for layer in range(n_layers))
    if family.startswith("qwen"):
        first = reader.optional("max_window_layers") or 0
        return tuple(window if layer >= first else None for layer in range(n_layers))
    return (window,) * n_layers


def _as_float(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30
    return float(value) if is_number else None


class _Reader:
    """Values by their usual names; a config's own spelling, then the family's default."""

    def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> None:
        self.values, self.defaults, self.where = values, defaults, where

    def get(self, key: str, default: Any = None) -> Any:
        for name in (key, *_ALIASES.get(key, ())):
            if name in self.values and (self.values[name] is not None or key == "sliding_window"):
                return self.values[name]
        return self.defaults.get(key, self.defaults.get((_ALIASES.get(key) or (key,))[0], default))

    def optional(self, key: str, *, most: int = _LARGEST) -> int | None:
        value = self.get(key)
        if value is None or value is False:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < most:
            raise ContentError(f"{key} is {str(value)[:40]!r}, which cannot be", where=self.where)
        return value

    def size(self, key: str, *, default: int | None = None, most: int = _LARGEST) -> int:
        value = self.optional(key, most=most)
        if value is None:
            value = default
        if not value:
            raise ContentError(f"{key} is missing", where=self.where, hint="is this the config of a language model?")
        return value
