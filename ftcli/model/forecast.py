"""What a training run will need of memory and disk, component by component, before anything is loaded.

    weights, quantization constants, lora, gradients, optimizer + what comes and goes; the largest phase is the peak:
    head      loss and its gradient over the labelled positions; every activation is still held
    backward  the last block's backward: with checkpointing its activations are made anew
    update    the end of the backward pass, clipping and AdamW: every gradient is there

What autograd keeps is counted in model/activation.py. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ftcli.errors import UsageError
from ftcli.model.activation import Shape, Training, count_block, count_held, count_logits, explain_held
from ftcli.model.precision import count_nf4_bytes

_DEVICE_RESERVE = 600 << 20  # CUDA context, cuBLAS workspace, and what the driver keeps of a card
_CPU_RUNTIME = 28_000_000  # library code and threads that only training wakes; measured, the same for every model
_HELD_HEAP, _FREED_HEAP = 0.08, 0.13  # shares of free heap while activations pile up, and while they go; measured
HEAD_ROWS = 512  # labelled rows whose logits the fast path has at a time: enough to fill a product
HEAD_BLOCK_BYTES = 4 << 20  # of float32 logits that a CPU works on at a time there: they stay in its cache
HALVED_ROWS = "train.gradient_accumulation_steps"  # the key of the change that puts fewer rows side by side
_SHORTEST = 128  # tokens; fit() suggests no shorter sequence
_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


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
    resident = tuple(_list_resident(shape, training))
    phases = {name: weigh(shape, training) for name, weigh in weighers.items()}
    if training.is_fused and training.device == "cpu":
        held_bytes = sum(part.size_bytes for part in resident)
        phases = {name: (*parts, _weigh_heap(name, parts, held_bytes, training)) for name, parts in phases.items()}
    peak = max(phases, key=lambda name: sum(part.size_bytes for part in phases[name]))
    components = (*resident, *phases[peak])
    is_measured = (training.device, training.strategy) == ("cpu", "single") and training.dtype == "float32"
    return Forecast(components, sum(part.size_bytes for part in components), peak, is_measured and shape.is_gated)


def count_saved_bytes(shape: Shape, training: Training) -> int:
    """Bytes that autograd holds at the end of a forward pass, parameters not among them."""
    return count_held(shape, training) + count_logits(shape, training)


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
    held = count_held(shape, training), explain_held(shape, training)
    if training.is_fused and training.method != "full":
        return _name_parts(held, _weigh_chunk(shape, training), (0, "counted with the logits"))
    logits = 3 * count_logits(shape, training)
    words = f"{training.target_tokens:,} labelled positions × {shape.vocab:,} rows × 3 float32 (softmax, two gradients)"
    return _name_parts(held, (logits, words), (0, "the loss's own are counted with the logits"))


def _weigh_heap(phase: str, parts: tuple[Component, ...], resident_bytes: int, training: Training) -> Component:
    """What a CPU's heap holds besides: on the fast path free blocks go back seldom (train/memory.py)."""
    if phase == "head" or training.lora_dropout:  # with dropout it is looked at more often
        held = parts[0].size_bytes
        return Component("free heap", round(_HELD_HEAP * held), f"{_HELD_HEAP:.0%} of the activations, measured")
    size = resident_bytes + sum(part.size_bytes for part in parts)
    return Component("free heap", round(_FREED_HEAP * size), f"{_FREED_HEAP:.0%} of all else, measured")


def _weigh_chunk(shape: Shape, training: Training) -> tuple[int, str]:
    """The logits that are there at a time (fused/head.py), and what they are worked on in."""
    rows = min(training.target_tokens, HEAD_ROWS)
    block = HEAD_BLOCK_BYTES if training.device == "cpu" else 4 * rows * shape.vocab
    words = f"{rows:,} labelled positions × {shape.vocab:,} rows × {training.dtype_bytes} bytes at a time"
    words += f" + 2 × {block:,} in float32"
    packed = 0
    if training.device == "cpu" and training.dtype_bytes == 2:  # oneDNN lays the weight out for its 16-bit products
        packed = 2 * shape.vocab * shape.hidden
        words += f" + the head in the layout of its product, {packed:,} bytes"
    return training.dtype_bytes * rows * shape.vocab + 2 * block + packed, words


def _weigh_backward(shape: Shape, training: Training) -> tuple[Component, ...]:
    held, formula = count_held(shape, training), explain_held(shape, training)
    if training.gradient_checkpointing:
        cast = 2 * shape.linear_parameters // max(1, shape.n_layers) if training.is_autocast else 0
        again = count_block(shape, training) + cast
        held, formula = held + again, f"{formula} + {again:,} bytes of the block that is made anew"
    work = 8 * training.tokens * shape.ffn  # gradient and its sum with LoRA's, both float32: measured by profiler
    words = f"{training.tokens:,} tokens × {shape.ffn:,} (FFN) × 2 float32"
    if training.is_fused and training.method != "full":  # fused/gate.py: gradients of product, up and gate
        work = 3 * training.dtype_bytes * training.tokens * shape.ffn
        words = f"{training.tokens:,} tokens × {shape.ffn:,} (FFN) × 3 × {training.dtype_bytes} bytes"
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
