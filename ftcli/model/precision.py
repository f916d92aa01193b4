"""What a model weighs in each precision, tensor by tensor, to the byte.

    fp32, bf16   4 and 2 bytes a parameter
    int8         linear layers of the blocks in 1 byte and a float32 a row (LLM.int8, arXiv 2208.07339); rest 16-bit
    nf4          the same layers in 4 bits and a float32 for 64 of them; nf4_double: QLoRA, arXiv 2305.14314 §3
    q4_k_m …     the mixture of types that llama.cpp chooses (src/llama-quant.cpp), file header left out

No torch. Also the place where a GGUF export learns which type a tensor gets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ftcli.model.layout import Place, PlacedTensor
from ftcli.store.gguf_header import GGML_TYPES

BLOCK, NESTED_BLOCK = 64, 256  # bitsandbytes: 4-bit blocksize, and that of double quantisation

# name → type of most tensors
GGUF_MIXTURES = {
    "f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0", "q6_k": "Q6_K", "q5_k_m": "Q5_K", "q5_k_s": "Q5_K",
    "q5_1": "Q5_1", "q5_0": "Q5_0", "q4_k_m": "Q4_K", "q4_k_s": "Q4_K", "q4_1": "Q4_1", "q4_0": "Q4_0",
    "q3_k_l": "Q3_K", "q3_k_m": "Q3_K", "q3_k_s": "Q3_K", "q2_k": "Q2_K",
}  # fmt: skip
# a type whose blocks of 256 do not fit a row → the type of 32 that takes its place
_FALLBACKS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_ALIGNMENT = 32
_SIZES = {name: (block, size_bytes) for name, block, size_bytes in GGML_TYPES.values()}
_VALUE = ("v_proj", "attn_v", "qkv_proj", "attn_qkv", "c_attn", "query_key_value")
_DOWN = ("down_proj", "ffn_down", "ffn_down_exps", "w2", "fc2", "mlp.c_proj", "dense_4h_to_h")
_OUT = ("o_proj", "attn_output", "attn.c_proj", "self_attn.dense", "attention.dense")
_KEY = ("k_proj", "attn_k")
_LLAMAS = ("llama", "mistral", "mixtral")


@dataclass(frozen=True)
class Ratios:
    """What the choice of GGUF types depends on besides the tensor."""

    n_layers: int
    queries_per_kv: int
    n_experts: int
    is_tied: bool
    shares_values: bool = False


def shares_values(family: str, n_layers: int, queries_per_kv: int) -> bool:
    """Whether llama.cpp takes the model for one of 70B, in which eight heads share each value projection.

    Source: ``load_arch_hparams`` in llama.cpp's src/models/llama.cpp and qwen2.cpp.
    """
    return n_layers == 80 and (family == "qwen2" or (family in _LLAMAS and queries_per_kv > 1))


def weigh(tensors: Sequence[PlacedTensor]) -> dict[str, int]:
    """Precision → bytes of all ``tensors``: fp32, bf16, int8, nf4, nf4_double."""
    total = sum(tensor.n_elements for tensor in tensors)
    sizes = {"fp32": 4 * total, "bf16": 2 * total}
    sizes["int8"] = sum(_weigh_int8(tensor) for tensor in tensors)
    for name, is_double in (("nf4", False), ("nf4_double", True)):
        sizes[name] = sum(
            count_nf4_bytes(tensor.n_elements, is_double=is_double) if tensor.is_linear else 2 * tensor.n_elements
            for tensor in tensors
        )
    return sizes


def weigh_gguf(tensors: Sequence[PlacedTensor], ratios: Ratios) -> dict[str, int]:
    """GGUF type → bytes of the data of all ``tensors`` in a file of that type, without its header."""
    return {name: sum(_weigh_gguf(tensor, name, ratios) for tensor in tensors) for name in GGUF_MIXTURES}


def count_nf4_bytes(n_elements: int, *, is_double: bool) -> int:
    """Bytes of a weight in NF4 with its scales: 4.5 bits each, or 4.127 with double quantisation."""
    blocks = -(-n_elements // BLOCK)
    packed = -(-n_elements // 2)
    if not is_double:
        return packed + 4 * blocks
    return packed + blocks + 4 * -(-blocks // NESTED_BLOCK) + 4  # 8-bit scales, their scales, one offset


def _weigh_int8(tensor: PlacedTensor) -> int:
    if not tensor.is_linear or tensor.is_router:
        return 2 * tensor.n_elements
    return tensor.n_elements + 4 * (tensor.n_elements // tensor.shape[-1])


def _weigh_gguf(tensor: PlacedTensor, mixture: str, ratios: Ratios) -> int:
    block, block_bytes = _SIZES[choose_gguf_type(tensor, mixture, ratios)]
    size_bytes = tensor.n_elements // block * block_bytes
    return -(-size_bytes // _ALIGNMENT) * _ALIGNMENT


def choose_gguf_type(tensor: PlacedTensor, mixture: str, ratios: Ratios) -> str:
    """GGUF's name of the type that ``tensor`` gets in ``mixture`` (``q4_k_m``), as llama.cpp chooses it.

    Source: ``llama_tensor_get_type`` in llama.cpp's src/llama-quant.cpp.
    """
    default = GGUF_MIXTURES[mixture]
    if default == "F32" or len(tensor.shape) < 2 or tensor.is_router or tensor.place.part in ("norm", "position"):
        return "F32"
    if default in ("F16", "BF16"):
        return default
    row = _measure_row(tensor)
    if tensor.place.part == "head" or (ratios.is_tied and tensor.place.part == "embedding"):
        block = _SIZES[default][0]
        chosen = "Q8_0" if row % block or default == "Q8_0" else "Q6_K"
    else:
        chosen = _choose_mixed(tensor.place, mixture, default, ratios)
    if row % _SIZES[chosen][0]:
        chosen = _FALLBACKS.get(chosen, "F16")
    return chosen if row % _SIZES[chosen][0] == 0 else "F16"


def _measure_row(tensor: PlacedTensor) -> int:
    """The length of a row as GGUF stores it; GPT-2's Conv1D weights are turned round."""
    is_turned = tensor.place.module in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    return tensor.shape[-2 if is_turned and len(tensor.shape) == 2 else -1]


def _choose_mixed(place: Place, mixture: str, default: str, ratios: Ratios) -> str:
    layer, n, module = place.layer or 0, ratios.n_layers, place.module
    if module.endswith(_VALUE):
        chosen = _choose_value(layer, n, mixture, default, ratios.queries_per_kv)
        if ratios.shares_values and chosen in ("Q3_K", "Q4_K"):  # where bits are cheap
            chosen = "Q5_K"
        return "Q8_0" if ratios.n_experts == 8 else chosen
    if module.endswith(_KEY) and ratios.n_experts == 8:
        return "Q8_0"
    if module.endswith(_DOWN):
        return _choose_down(layer, n, mixture, default)
    if module.endswith(_OUT):
        if ratios.n_experts == 8 and mixture in ("q2_k", "q3_k_s", "q3_k_m", "q4_k_s", "q4_k_m"):
            return "Q5_K"
        return {"q2_k": "Q3_K", "q3_k_m": "Q4_K", "q3_k_l": "Q5_K"}.get(mixture, default)
    return default


def _choose_value(layer: int, n_layers: int, mixture: str, default: str, queries_per_kv: int) -> str:
    if mixture == "q2_k":
        return "Q4_K" if queries_per_kv >= 4 else "Q3_K"
    if mixture == "q3_k_m":
        return "Q5_K" if layer < 2 else "Q4_K"
    if mixture == "q3_k_l" or (mixture == "q4_k_s" and layer < 4):
        return "Q5_K"
    return "Q6_K" if mixture in ("q4_k_m", "q5_k_m") and _gets_more_bits(layer, n_layers) else default


def _choose_down(layer: int, n_layers: int, mixture: str, default: str) -> str:
    if mixture == "q2_k":
        return "Q3_K"
    if mixture == "q3_k_m":
        return "Q5_K" if layer < n_layers // 16 else "Q4_K"
    if mixture == "q3_k_l" or (mixture == "q4_k_s" and layer < n_layers // 8):
        return "Q5_K"
    return "Q6_K" if mixture in ("q4_k_m", "q5_k_m") and _gets_more_bits(layer, n_layers) else default


def _gets_more_bits(layer: int, n_layers: int) -> bool:
    return layer < n_layers // 8 or layer >= 7 * n_layers // 8 or (layer - n_layers // 8) % 3 == 2
