"""Packed folders of tiny models, written number by number as the layouts of GPTQ and AWQ are published."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the column that lies lowest in a word of eight, and the next ones


def pack_words(values: Any, bits: int) -> Any:
    """int32 words of a list of small numbers, the first one lowest."""
    words = [0] * -(-len(values) * bits // 32)
    for number, value in enumerate(values):
        words[number * bits // 32] |= int(value) << (number * bits % 32)
    return np.array(words, dtype=np.uint32).view(np.int32)


def order_awq(values: Any) -> list[int]:
    """The same numbers in the order in which AWQ writes them."""
    return [int(values[start + column]) for start in range(0, len(values), 8) for column in AWQ_ORDER]


def pack_gptq(codes: Any, zeros: Any, bits: int, *, adds_one: bool) -> tuple[Any, Any]:
    """qweight and qzeros of ``codes`` (out, in) and ``zeros`` (groups, out)."""
    stored = (zeros - 1) % (1 << bits) if adds_one else zeros
    qweight = np.stack([pack_words(row, bits) for row in codes], axis=1)
    return qweight, np.stack([pack_words(row, bits) for row in stored])


def pack_awq(codes: Any, zeros: Any) -> tuple[Any, Any]:
    """qweight and qzeros of ``codes`` (out, in) and ``zeros`` (groups, out)."""
    qweight = np.stack([pack_words(order_awq(row), 4) for row in codes.T])
    return qweight, np.stack([pack_words(order_awq(row), 4) for row in zeros])


def compute_weight(codes: Any, zeros: Any, scales: Any, groups: Any) -> Any:
    """scale · (code − zero), a number at a time: float32 (out, in)."""
    weight = np.empty(codes.shape, dtype=np.float32)
    for output in range(codes.shape[0]):
        for column in range(codes.shape[1]):
            group = groups[column]
            step = float(scales[group, output])
            weight[output, column] = step * (int(codes[output, column]) - int(zeros[group, output]))
    return weight


def draw_parts(
    seed: int, n_outputs: int, n_inputs: int, bits: int, group_size: int, *, is_shuffled: bool = False
) -> tuple[Any, Any, Any, Any]:
    """Codes (out, in), zeros and scales (groups, out), and the group of each input."""
    rng = np.random.default_rng(seed)
    size = n_inputs if group_size == -1 else group_size
    n_groups = -(-n_inputs // size)
    groups = np.arange(n_inputs) // size
    if is_shuffled:
        groups = rng.permutation(groups)
    codes = rng.integers(0, 1 << bits, (n_outputs, n_inputs))
    zeros = rng.integers(0, 1 << bits, (n_groups, n_outputs))
    scales = (rng.uniform(0.2, 1, (n_groups, n_outputs)) / (1 << bits) / 4).astype(np.float16)
    return codes, zeros, scales, groups.astype(np.int32)


def write_packed(
    source: Path,
    folder: Path,
    method: str = "gptq",
    *,
    bits: int = 4,
    group_size: int = 32,
    is_shuffled: bool = False,
    has_g_idx: bool = True,
    **config: Any,
) -> dict[str, Any]:
    """Name → tensor of the ordinary model that ``folder`` stands for now: ``source`` with its blocks packed."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, folder)
    weights = load_file(source / "model.safetensors")
    packed = {}
    for seed, (name, value) in enumerate(sorted(weights.items())):
        module = name.removesuffix(".weight")
        is_turned = ".c_" in name  # GPT-2's linear layers lie as (in, out)
        if value.dim() != 2 or not any(part in name for part in ("proj", ".c_")):
            packed[name] = value
            continue
        n_outputs, n_inputs = value.shape[::-1] if is_turned else value.shape
        parts = draw_parts(seed, n_outputs, n_inputs, bits, group_size, is_shuffled=is_shuffled)
        codes, zeros, scales, groups = parts
        adds_one = config.get("checkpoint_format") != "gptq_v2"
        words = pack_awq(codes, zeros) if method == "awq" else pack_gptq(codes, zeros, bits, adds_one=adds_one)
        stored = dict(zip(("qweight", "qzeros"), words, strict=True)) | {"scales": scales}
        if method == "gptq" and has_g_idx:
            stored["g_idx"] = groups
        packed |= {f"{module}.{part}": torch.from_numpy(array) for part, array in stored.items()}
        weight = torch.from_numpy(compute_weight(*parts))
        weights[name] = weight.T.contiguous() if is_turned else weight
    save_file(packed, folder / "model.safetensors", {"format": "pt"})
    section = {"quant_method": method, "bits": bits, "group_size": group_size, **config}
    change_config(folder, quantization_config=section)
    return weights


def change_config(folder: Path, **changes: Any) -> None:
    """Nothing; the config.json of ``folder`` says so."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def write_bitsandbytes(source: Path, folder: Path, tokenizer: Any, **options: Any) -> Path:
    """``folder``, in which transformers saved the model of ``source`` as bitsandbytes packed it."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(**options)
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=config, device_map={"": "cpu"}, dtype=torch.float32
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
