"""Which type each tensor has in a kind of file, and where it stands in a quantised one.

The mixtures are those of ``ftcli.model.precision``, which the forecasts count with. Source: src/llama-quant.cpp of
ggml-org/llama.cpp.
"""

from __future__ import annotations

import re

from ftcli.gguf.family import Config
from ftcli.model.layout import PlacedTensor, locate_tensor
from ftcli.model.precision import Ratios, choose_gguf_type, shares_values

_FITTING_ROW = 256  # of values: blocks of every type fit
_BLOCK = re.compile(r"blk\.(\d+)\.")


def read_ratios(config: Config, *, is_tied: bool) -> Ratios:
    """What the choice of types depends on besides the tensor, of a model without experts."""
    n_layers = config["num_hidden_layers"]
    queries_per_kv = config["num_attention_heads"] // config["num_key_value_heads"]
    return Ratios(
        n_layers=n_layers,
        queries_per_kv=queries_per_kv,
        n_experts=0,
        is_tied=is_tied,
        shares_values=shares_values(config["model_type"], n_layers, queries_per_kv),
    )


def choose_type(kind: str, name: str, shape: tuple[int, ...], ratios: Ratios) -> str:
    """The type in a file of ``kind`` (``q4_k_m``) of the tensor that llama.cpp calls ``name``."""
    return choose_gguf_type(PlacedTensor(name, shape, locate_tensor(name)), kind, ratios)


def is_fallback(kind: str, name: str, shape: tuple[int, ...], ratios: Ratios) -> bool:
    """Whether blocks of the type that the tensor should have do not fit its rows."""
    return choose_type(kind, name, (*shape[:-1], _FITTING_ROW), ratios) != choose_type(kind, name, shape, ratios)


def find_position(name: str) -> tuple[int, str]:
    """By what llama-quantize sorts tensors: those outside of blocks first, then block by block, by name."""
    found = _BLOCK.match(name)
    return int(found[1]) if found else -1, name
