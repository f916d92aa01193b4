"""What a training run will need of memory and disk, component by component, before anything is loaded.

    weights, quantization constants, lora, gradients, optimizer + what comes and goes; the largest phase is the peak:
    head      loss and its gradient over the labelled positions; every activation is still held
    backward  the last block's backward: with checkpointing its activations are made anew
    update    the end of the backward pass, clipping and AdamW: every gradient is there

What transformers' eager modules, PEFT and autograd keep; tests hold it against autograd's saved tensors. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from ftcli.errors import UsageError
from ftcli.model.precision import count_nf4_bytes

_DEVICE_RESERVE = 600 << 20  # CUDA context, cuBLAS workspace, and what the driver keeps of a card
_CPU_RUNTIME = 28_000_000  # library code and threads that only training wakes; measured, the same for every model
_NOISE_BYTES = {"cpu": 4, "cuda": 1}  # ATen Dropout.cpp: float noise on CPUs, a fused bool mask on CUDA
HALVED_ROWS = "train.gradient_accumulation_steps"  # the key of the change that puts fewer rows side by side
_SHORTEST = 128  # tokens; fit() suggests no shorter sequence
_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


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


@dataclass(frozen=True)
class Training:
    """How a model is trained: a micro-batch is ``tokens`` flat tokens of ``n_documents`` documents side by side.

    ``n_rows`` are the rows that hold them: packs, or one for each document.
    ``unread_bytes`` are rows of an embedding that stays in its file of which the data hold no token.
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
    strategy: Literal["single", "ddp", "fsdp2"] = "single"
    n_documents: int = 1
    n_rows: int = 1
    unread_bytes: int = 0

    @property
    def dtype_bytes(self) -> int:
        return 4 if self.dtype == "float32" else 2

    @property
    def is_autocast(self) -> bool:
        """Whether float32 weights are computed with in 16 bits (train/engine.py, choose_mixed_precision)."""
        return self.method == "full" and self.dtype != "float32"


@dataclass(frozen=True)
class Component:
    """A part of the sum; ``formula`` says in words and numbers where it comes from."""

    name: str
    size_bytes: int
    formula: str


@dataclass(frozen=True)
class Forecast:
    """The components at the peak, their sum, the phase it falls in, and whether it was held against measurements."""

    components: tuple[Component, ...]
    total_bytes: int
    peak_phase: str
    is_calibrated: bool


@dataclass(frozen=True)
class Change:
    """One recipe setting that saves memory; ``keeps_result``: the trained weights are the same, but for rounding."""

    key: str
    value: str
    saved_bytes: int
    training: Training
    keeps_result: bool


def forecast_memory(shape: Shape, training: Training) -> Forecast:
    """The peak of a training run on one device, beyond what the process holds before the model is loaded.

    Gradients are counted as there in every phase, as from a step's second micro-batch on.
    """
    weighers = {"head": _weigh_head, "backward": _weigh_backward, "update": _weigh_update}
    phases = {name: weigh(shape, training) for name, weigh in weighers.items()}
    peak = max(phases, key=lambda name: sum(part.size_bytes for part in phases[name]))
    components = (*_list_resident(shape, training), *phases[peak])
    is_measured = (training.device, training.strategy) == ("cpu", "single") and training.dtype == "float32"
    return Forecast(components, sum(part.size_bytes for part in components), peak, is_measured and shape.is_gated)


def count_saved_bytes(shape: Shape, training: Training) -> int:
    """Bytes that autograd holds at the end of a forward pass, parameters not among them."""
    return _count_held(shape, training) + _count_logits(shape, training)


def _list_resident(shape: Shape, training: Training) -> Iterator[Component]:
    parts = training.world_size if training.strategy == "fsdp2" else 1
    size = 4 if training.method == "full" else training.dtype_bytes  # model/build.py: full training keeps float32
    rest = shape.parameters - shape.linear_parameters
    linear = -(-shape.linear_parameters // 2) if training.method == "qlora" else shape.linear_parameters * size
    weights = (linear + rest * size) // parts
    formula = f"{shape.linear_parameters:,} linear weights of {linear:,} bytes + {rest:,} others × {size} bytes"
    if parts > 1:
        unsharded = size * (rest + shape.linear_parameters // max(1, shape.n_layers))
        weights += unsharded
        formula = f"({formula}) / {parts} + {unsharded:,} bytes of one block, embedding and head unsharded"
    if training.unread_bytes:
        weights -= training.unread_bytes
        formula += f" - {training.unread_bytes:,} bytes of embedding rows that the data never read"
    yield Component("weights", weights, formula)
    nf4 = count_nf4_bytes(shape.linear_parameters, is_double=training.double_quant)
    constants = nf4 - linear if training.method == "qlora" else 0
    width = "8 bits + their own scales" if training.double_quant else "32 bits"
    yield Component("quantization constants", constants // parts, f"a scale of {width} for each 64 NF4 weights")
    trained = _count_trained(shape, training)
    lora = 0 if training.method == "full" else trained
    yield Component("lora", 4 * lora // parts, f"{lora:,} parameters × 4 bytes")
    gradients = 4 * trained // parts
    formula = f"{trained:,} trained parameters × 4 bytes" + (f" / {parts}" if parts > 1 else "")
    if training.strategy == "ddp":
        gradients, formula = 2 * gradients, formula + ", and once more in DDP's buckets"
    yield Component("gradients", gradients, formula)
    yield Component("optimizer", 8 * trained // parts, f"{trained:,} × 2 AdamW moments × 4 bytes")  # torch.optim.AdamW
    if training.device == "cpu":
        pages = training.dtype_bytes * shape.linear_parameters if training.method == "qlora" else 0
        words = "the model's file as read for NF4 stays mapped (safetensors); clean pages, the kernel may drop them"
        yield Component("source pages", pages, words)
        yield Component("runtime", _CPU_RUNTIME, "library code and threads that only training wakes")


def _name_parts(activations: tuple[int, str], logits: tuple[int, str], work: tuple[int, str]) -> tuple[Component, ...]:
    return Component("activations", *activations), Component("logits", *logits), Component("workspace", *work)


def _weigh_head(shape: Shape, training: Training) -> tuple[Component, ...]:
    # log_softmax's output, nll_loss' gradient and log_softmax's gradient: ATen LossNLL, SoftMaxBackward
    logits = 3 * _count_logits(shape, training)
    words = f"{training.target_tokens:,} labelled positions × {shape.vocab:,} rows × 3 float32 (softmax, two gradients)"
    held = _count_held(shape, training), _explain_held(shape, training)
    return _name_parts(held, (logits, words), (0, "the loss's own are counted with the logits"))


def _weigh_backward(shape: Shape, training: Training) -> tuple[Component, ...]:
    held, formula = _count_held(shape, training), _explain_held(shape, training)
    if training.gradient_checkpointing:
        cast = 2 * shape.linear_parameters // max(1, shape.n_layers) if training.is_autocast else 0
        again = _count_block(shape, training) + cast
        held, formula = held + again, f"{formula} + {again:,} bytes of the block that is made anew"
    work = 8 * training.tokens * shape.ffn  # gradient and its sum with LoRA's, both float32: measured by profiler
    words = f"{training.tokens:,} tokens × {shape.ffn:,} (FFN) × 2 float32"
    if training.method == "qlora":  # bitsandbytes MatMul4Bit.backward
        dequantized = training.dtype_bytes * shape.largest_linear
        work, words = work + dequantized, f"{words} + {dequantized:,} bytes of the largest linear layer, dequantised"
    if training.method == "full" and shape.is_tied:
        head = 4 * shape.vocab * shape.hidden
        work, words = work + head, f"{words} + {head:,} bytes of the tied head's gradient"
    return _name_parts((held, formula), (0, "freed"), (work, words))


def _weigh_update(shape: Shape, training: Training) -> tuple[Component, ...]:
    # aten embedding_dense_backward makes the whole table before it is added to the gradient, a tied head's to it
    table = 4 * shape.vocab * shape.hidden * (2 if shape.is_tied else 1) if training.method == "full" else 0
    words = f"{table:,} bytes of the embedding's gradient before it is added"
    return _name_parts((0, "freed"), (0, "freed"), (table, words))


def _count_held(shape: Shape, training: Training) -> int:
    return shape.n_layers * _count_kept(shape, training) + _count_around_blocks(shape, training)


def _explain_held(shape: Shape, training: Training) -> str:
    kept = "hidden state" if training.gradient_checkpointing else "saved tensors"
    around = _count_around_blocks(shape, training)
    return f"{shape.n_layers} blocks × {_count_kept(shape, training):,} bytes ({kept}) + {around:,} around them"


def _count_kept(shape: Shape, training: Training) -> int:
    if not training.gradient_checkpointing:
        return _count_block(shape, training)
    size = 4 if training.is_autocast else training.dtype_bytes
    return size * training.tokens * shape.hidden  # torch.utils.checkpoint, non-reentrant: the hidden state


def _count_block(shape: Shape, training: Training) -> int:
    """Bytes that autograd keeps of one block without checkpointing."""
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


def _count_lora_width(shape: Shape, training: Training) -> int:
    """Bytes a token that PEFT's LoRA layers of one block keep (peft/tuners/lora/layer.py, Linear.forward)."""
    h, q, f = shape.hidden, shape.queries, shape.ffn
    per_block = training.lora_modules / max(1, shape.n_layers)
    order = (h, h, h, q, h, h, f) if shape.is_gated else (h, h, h, q, h, f)
    inputs = order[: round(per_block)]
    width = round(4 * training.r * per_block)  # A(x), the input of B
    if training.lora_dropout:
        return width + (4 + _NOISE_BYTES[training.device]) * sum(inputs)
    if training.dtype_bytes == 2:
        return width + 4 * sum(inputs)  # x cast to float32, by each layer for itself
    shared = (h if len(inputs) > 0 else 0) + (h if len(inputs) > 4 else 0) + (f if len(inputs) > 6 else 0)
    return width + 4 * shared  # x itself, which layers share; o's is sdpa's output


def _count_around_blocks(shape: Shape, training: Training) -> int:  # embedding, rotary tables, last norm, head
    size, tokens, targets = training.dtype_bytes, training.tokens, training.target_tokens
    total = 8 * 2 * targets + 4 * tokens  # labels; the last norm's rsqrt
    if training.method == "full":
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


def _count_logits(shape: Shape, training: Training) -> int:
    return 4 * training.target_tokens * shape.vocab  # evaluate/loss.py: log-softmax in float32, labelled rows only


def _count_trained(shape: Shape, training: Training) -> int:
    return shape.parameters if training.method == "full" else training.lora_parameters


def forecast_disk(shape: Shape, training: Training, *, save_total_limit: int) -> tuple[Component, ...]:
    """What a run leaves on the disk at most, and the merged model that may follow."""
    trained = _count_trained(shape, training)
    checkpoint = 12 * trained  # train/checkpoint.py: weights and two moments, float32
    words = f"{save_total_limit} × {trained:,} parameters × 12 bytes"
    return (
        Component("checkpoints", save_total_limit * checkpoint, words),
        Component("staging copy", checkpoint, "the next checkpoint is whole before the oldest goes"),
        Component("artifact", 4 * trained, f"{trained:,} trained parameters × 4 bytes"),
        Component("merged model", 2 * shape.parameters, f"{shape.parameters:,} parameters × 2 bytes"),
    )


def fit(shape: Shape, training: Training, budget_bytes: int) -> tuple[tuple[Change, ...], bool]:
    """The changes, in their order, after which the run fits into ``budget_bytes``; and whether it does."""
    changes: list[Change] = []
    size = forecast_memory(shape, training).total_bytes
    while size > budget_bytes:
        for key, value, changed, keeps_result in _list_options(shape, training):
            smaller = forecast_memory(shape, changed).total_bytes
            if smaller < size:
                changes.append(Change(key, value, size - smaller, changed, keeps_result))
                size, training = smaller, changed
                break
        else:
            return tuple(changes), False
    return tuple(changes), True


def _list_options(shape: Shape, training: Training) -> Iterator[tuple[str, str, Training, bool]]:
    """Key, value, what it makes of the training, and whether the result stays; the mildest first."""
    if not training.gradient_checkpointing:
        yield "train.gradient_checkpointing", "true", replace(training, gradient_checkpointing=True), True
    half, targets = -(-training.tokens // 2), -(-training.target_tokens // 2)
    if training.n_rows > 1 and half >= training.longest_document:
        n_rows, n_documents = -(-training.n_rows // 2), -(-training.n_documents // 2)
        smaller = replace(training, tokens=half, target_tokens=targets, n_documents=n_documents, n_rows=n_rows)
        yield HALVED_ROWS, "doubled, with half the rows in a micro-batch", smaller, True
    if training.method == "lora":
        yield "quantization.load_in_4bit", "true", replace(training, method="qlora"), False
    if training.method == "full":
        yield "peft", "r: 16, target_modules: all-linear", _turn_to_lora(shape, training), False
    if training.method == "qlora" and not training.double_quant:
        yield "quantization.bnb_4bit_use_double_quant", "true", replace(training, double_quant=True), False
    if training.n_rows == 1 and training.n_documents > 1 and half >= max(_SHORTEST, training.longest_document):
        smaller = replace(training, tokens=half, target_tokens=targets, n_documents=-(-training.n_documents // 2))
        yield "data.max_length", str(half), smaller, False
    length = training.longest_document // 2
    if length >= _SHORTEST:
        tokens = training.tokens * length // training.longest_document
        targets = -(-training.target_tokens * length // training.longest_document)
        shorter = replace(training, tokens=tokens, target_tokens=targets, longest_document=length)
        yield "data.max_length", str(length), shorter, False


def _turn_to_lora(shape: Shape, training: Training) -> Training:
    """LoRA of rank 16 on every linear layer of the blocks: r × (inputs + outputs) parameters each."""
    h, q, k, f, n_wide = shape.hidden, shape.queries, shape.keys, shape.ffn, 3 if shape.is_gated else 2
    n, r, width = shape.n_layers, 16, 2 * (h + q) + 2 * (h + k) + n_wide * (h + f)
    return replace(training, method="lora", r=r, lora_modules=n * (4 + n_wide), lora_parameters=r * width * n)


def parse_memory(text: str) -> int:
    """Bytes that a run may use of a card of ``text`` (``24GB``: 24 GiB, as vendors count), its reserve taken off.

    Raises:
        UsageError: no size, or one below the reserve.
    """
    match = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,6})?)\s*([kmgt]?)i?(b?)\s*", text, flags=re.I | re.A)
    size = int(float(match[1]) * _UNITS[match[2].lower()]) if match else 0
    if size <= _DEVICE_RESERVE:
        hint = f"write it like 24GB; {_DEVICE_RESERVE >> 20} MiB of it are the driver's"
        raise UsageError(f"{text!r} is no amount of memory to train in", hint=hint)
    return size - _DEVICE_RESERVE
