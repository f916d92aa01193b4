"""What autograd holds of a forward pass, on the plain path and on the fast one, counted from shapes alone.

What transformers' eager modules, PEFT and ftcli/fused keep; tests hold it against autograd's saved tensors. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

_NOISE_BYTES = {"cpu": 4, "cuda": 1}  # ATen Dropout.cpp: float noise on CPUs, a fused bool mask on CUDA


@dataclass(frozen=True)
class Shape:
    """What memory follows from; ``linear_parameters`` are what NF4 quantises, ``largest_linear`` one layer's most."""

    n_layers: int
    hidden: int
    ffn: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab: int
    is_tied: bool
    is_gated: bool
    linear_parameters: int
    embedding_parameters: int
    head_parameters: int
    other_parameters: int
    largest_linear: int

    @property
    def parameters(self) -> int:
        return self.linear_parameters + self.embedding_parameters + self.head_parameters + self.other_parameters

    @property
    def queries(self) -> int:
        return self.n_heads * self.head_dim

    @property
    def keys(self) -> int:
        return self.n_kv_heads * self.head_dim


Strategy = Literal["single", "ddp", "fsdp2"]


@dataclass(frozen=True)
class Training:
    """How a model is trained: a micro-batch is ``tokens`` flat tokens of ``n_documents`` documents side by side.

    ``n_rows`` are the rows that hold them: packs, or one for each document.
    ``unread_bytes`` are rows of an embedding that stays in its file of which the data hold no token. ``is_fused``:
    by the fast path (ftcli/fused); ``attends_wide``: its attention is in float32 (see ``has_matrix_unit``).
    """

    method: Literal["qlora", "lora", "full"]
    dtype: Literal["bfloat16", "float16", "float32"]
    double_quant: bool
    tokens: int
    longest_document: int
    target_tokens: int
    gradient_checkpointing: bool
    lora_parameters: int
    lora_modules: int
    r: int
    lora_dropout: float
    device: Literal["cpu", "cuda"]
    world_size: int = 1
    strategy: Strategy = "single"
    n_documents: int = 1
    n_rows: int = 1
    unread_bytes: int = 0
    is_fused: bool = False
    attends_wide: bool = False

    @property
    def dtype_bytes(self) -> int:
        return 4 if self.dtype == "float32" else 2

    @property
    def is_autocast(self) -> bool:
        """Whether float32 weights are computed with in 16 bits (train/engine.py, choose_mixed_precision)."""
        return self.method == "full" and self.dtype != "float32"


def count_held(shape: Shape, training: Training) -> int:
    """Bytes that autograd holds of blocks and what lies around them at the end of a forward pass, logits left out."""
    return shape.n_layers * _count_kept(shape, training) + _count_around_blocks(shape, training)


def explain_held(shape: Shape, training: Training) -> str:
    """The sum that ``count_held`` is, in words and numbers."""
    kept = "hidden state" if training.gradient_checkpointing else "saved tensors"
    around = _count_around_blocks(shape, training)
    return f"{shape.n_layers} blocks × {_count_kept(shape, training):,} bytes ({kept}) + {around:,} around them"


def _count_kept(shape: Shape, training: Training) -> int:
    if not training.gradient_checkpointing:
        return count_block(shape, training)
    size = 4 if training.is_autocast else training.dtype_bytes
    kept = 0
    if training.is_fused and training.device == "cpu":  # fused/checkpoint.py: attention's output, log-sum-exp
        kept = (4 if training.attends_wide else size) * shape.queries + 4 * shape.n_heads
    return training.tokens * (size * shape.hidden + kept)  # torch.utils.checkpoint, non-reentrant: the hidden state


def count_block(shape: Shape, training: Training) -> int:
    """Bytes that autograd keeps of one block without checkpointing."""
    if training.is_fused:
        return _count_fused_block(shape, training)
    size, tokens = training.dtype_bytes, training.tokens
    h, q, f, n_wide = shape.hidden, shape.queries, shape.ffn, 3 if shape.is_gated else 2
    k = q if training.n_documents > 1 else shape.keys  # sdpa_attention.py: repeated for every query head with a mask
    width = size * (2 * q + 2 * k) + 4 * shape.n_heads  # sdpa: q, k, v, output (which is o's input), log-sum-exp
    width += 4 * 2 * (h + 1)  # LlamaRMSNorm, twice: hidden states in float32, rsqrt
    width += size * n_wide * f  # LlamaMLP: gate, silu(gate), up
    if training.method == "full":
        width += 4 * 2 * h + size * f  # RMSNorm's weight is trained: its normed input; input of down
        width += 2 * 5 * h if training.is_autocast else 4 * 2 * h  # inputs of q, k, v, gate, up: cast one by one
    else:
        width += _count_lora_width(shape, training)
    mask = size * tokens * tokens if training.n_documents > 1 else 0  # sdpa makes a float mask of the bool one
    return tokens * width + mask


def _count_fused_block(shape: Shape, training: Training) -> int:
    """The same on the fast path (ftcli/fused): each input once, gate and up, and attention's own."""
    size, h, q, f = training.dtype_bytes, shape.hidden, shape.queries, shape.ffn
    wide = 4 if training.attends_wide else size
    width = wide * (2 * q + 2 * shape.keys) + 4 * shape.n_heads  # flash attention: q, k, v, output, log-sum-exp
    if training.n_documents > 1 or wide > size:
        width += size * q  # side by side again, o's input
    inputs, has = _list_inputs(shape, training), training.lora_modules / max(1, shape.n_layers)
    stream = 4 if training.is_autocast else size
    width += 2 * (stream * h + 4)  # the norms' inputs, and a number each
    width += size * 2 * f  # gate, up
    if training.method == "full":
        return training.tokens * (width + size * ((5 if training.is_autocast else 2) * h + f))  # autocast: one each
    width += size * (h if has else 0) + size * (h if has > 4 else 0) + size * (f if has > 6 else 0)  # shared inputs
    width += round(size * training.r * has)  # A(x)
    if training.lora_dropout:
        width += sum(inputs)  # a mask of a byte each
    return training.tokens * width


def _list_inputs(shape: Shape, training: Training) -> tuple[int, ...]:
    """Widths of the inputs of one block's LoRA layers, in the order of the presets."""
    h, q, f = shape.hidden, shape.queries, shape.ffn
    order = (h, h, h, q, h, h, f) if shape.is_gated else (h, h, h, q, h, f)
    return order[: round(training.lora_modules / max(1, shape.n_layers))]


def _count_lora_width(shape: Shape, training: Training) -> int:
    """Bytes a token that PEFT's LoRA layers of one block keep (peft/tuners/lora/layer.py, Linear.forward)."""
    h, f = shape.hidden, shape.ffn
    per_block = training.lora_modules / max(1, shape.n_layers)
    inputs = _list_inputs(shape, training)
    width = round(4 * training.r * per_block)  # A(x), the input of B
    if training.lora_dropout:
        return width + (4 + _NOISE_BYTES[training.device]) * sum(inputs)
    if training.dtype_bytes == 2:
        return width + 4 * sum(inputs)  # x cast to float32, by each layer for itself
    shared = (h if len(inputs) > 0 else 0) + (h if len(inputs) > 4 else 0) + (f if len(inputs) > 6 else 0)
    return width + 4 * shared  # x itself, which layers share; o's is sdpa's output


def _count_around_blocks(shape: Shape, training: Training) -> int:  # embedding, rotary tables, last norm, head
    size, tokens, targets = training.dtype_bytes, training.tokens, training.target_tokens
    if training.is_fused and training.method != "full":
        total = (size * shape.hidden + 4) * tokens + (size * shape.hidden + 8) * targets  # last norm; loss's gradient
        if not training.gradient_checkpointing:
            total += 2 * size * tokens * shape.head_dim  # cos, sin
            total -= (size * shape.hidden + 4) * tokens  # nothing before the first projection is trained
        return total
    total = 8 * 2 * targets + 4 * tokens  # labels; the last norm's rsqrt
    if training.method == "full":
        total -= 4 * tokens * shape.hidden if training.is_fused else 0  # the last norm keeps its input alone
        total += 8 * tokens + 4 * 2 * tokens * shape.hidden + size * targets * shape.hidden
    elif training.gradient_checkpointing:
        total += 4 * tokens * shape.hidden
    if training.is_autocast:  # one for each weight that the backward pass needs
        total += 2 * (shape.vocab * shape.hidden + (0 if training.gradient_checkpointing else shape.linear_parameters))
    if not training.gradient_checkpointing:
        if training.lora_dropout and training.method != "full":  # nothing before the first q, k, v is trained
            n_first = min(3, training.lora_modules // max(1, shape.n_layers))
            total -= _NOISE_BYTES[training.device] * n_first * tokens * shape.hidden
        total += 2 * (4 if training.is_autocast else size) * tokens * shape.head_dim  # cos, sin
    return total


def count_logits(shape: Shape, training: Training) -> int:
    """Bytes of logits that autograd holds at the end of a forward pass."""
    if training.is_fused and training.method != "full":
        return 0  # fused/head.py: none outlives the forward pass
    return 4 * training.target_tokens * shape.vocab  # evaluate/loss.py: log-softmax in float32, labelled rows only


@cache
def has_matrix_unit() -> bool:
    """Whether this CPU multiplies matrices of 16-bit numbers in a unit of its own (AMX)."""
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
