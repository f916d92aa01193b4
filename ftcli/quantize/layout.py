"""What a quantised folder says of itself in config.json, and auto-round's files read back for it.

Keys are those of transformers' GPTQConfig, AwqConfig and BitsAndBytesConfig, which vLLM reads too.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ftcli.model.stored import TORCH_DTYPES, count_rows, read_rows
from ftcli.quantize.plan import Plan, build_config
from ftcli.store.weight import read_weight_table


def build_quantization_config(plan: Plan) -> dict[str, Any]:
    """The keys of config.json that say how the weights are packed, and what the model computes in."""
    spec, name = plan.spec, str(plan.dtype).removeprefix("torch.")
    if not spec.method.is_fitted:
        found = build_config(spec, plan.dtype).to_dict()
        public = {key: value for key, value in found.items() if not key.startswith("_")}
        return {"dtype": name, "quantization_config": public}
    packed: dict[str, Any] = {"quant_method": spec.method.name, "bits": spec.bits, "group_size": plan.group_size}
    if spec.method.name == "gptq":
        packed |= {"sym": True, "desc_act": False, "true_sequential": False, "damp_percent": 0.01, "lm_head": False}
        packed |= {"checkpoint_format": "gptq"}
    else:
        packed |= {"zero_point": True, "version": "gemm", "modules_to_not_convert": ["lm_head"]}
    return {"dtype": name, "quantization_config": packed | {"provider": "auto-round"}}


def read_rounded(folder: Path, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields name and value of each tensor that auto-round wrote; what it did not pack comes in ``dtype``."""
    for entry in read_weight_table(folder).tensors:
        value = read_rows(folder, entry, 0, count_rows(entry))
        is_packed = not value.is_floating_point() or entry.name.endswith(".scales")
        yield entry.name, value if is_packed or TORCH_DTYPES[entry.dtype] == dtype else value.to(dtype)
