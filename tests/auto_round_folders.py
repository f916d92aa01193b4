"""A script that has auto-round write folders of a tiny model, and its own layers unpack them: BASE, then OUTPUT."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

# name → method, bits, group size, symmetric
FOLDERS = {
    "gptq-w4g32-sym": ("gptq", 4, 32, True),
    "gptq-w8g64-sym": ("gptq", 8, 64, True),
    "gptq-w4g32-asym": ("gptq", 4, 32, False),
    "gptq-w2g32-sym": ("gptq", 2, 32, True),
    "awq-w4g32-asym": ("awq", 4, 32, False),
    "awq-w4g64-sym": ("awq", 4, 64, True),
}


def write_folder(base: Path, folder: Path, method: str, bits: int, group_size: int, is_symmetric: bool) -> None:
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 300, (1, 32), generator=generator) for _ in range(4)]
    scheme = {"bits": bits, "group_size": group_size, "sym": is_symmetric, "data_type": "int"}
    options: dict[str, Any] = {"alg_configs": "awq"} if method == "awq" else {"iters": 0}
    rounder = AutoRound(
        model,
        tokenizer,
        scheme=scheme,
        dataset=rows,
        nsamples=4,
        seqlen=32,
        batch_size=2,
        device_map="cpu",
        enable_torch_compile=False,
        **options,
    )
    written = Path(rounder.quantize_and_save(str(folder), format=f"auto_{method}")[1])
    if written != folder:
        for path in written.iterdir():
            path.rename(folder / path.name)
        written.rmdir()


def unpack_folder(folder: Path, method: str, bits: int, group_size: int) -> dict[str, Any]:
    """Name → the weight (out, in), as auto-round's own layers compute it, in float32."""
    import torch
    from auto_round.export.export_to_awq.utils import dequantize_gemm
    from auto_round_extension.torch.qlinear_torch_zp import QuantLinear
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    weights = {}
    for name in [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]:
        parts = {p: tensors[f"{name}.{p}"] for p in ("qweight", "qzeros", "scales")}
        if method == "awq":
            unpacked = dequantize_gemm(parts["qweight"], parts["qzeros"], parts["scales"].float(), bits, group_size)
        else:
            n_inputs, n_outputs = parts["qweight"].shape[0] * 32 // bits, parts["qweight"].shape[1]
            layer = QuantLinear(bits, group_size, n_inputs, n_outputs, False)  # with g_idx it drops outputs
            layer.load_state_dict(parts)
            layer.scales = layer.scales.float()
            unpacked = layer(torch.eye(n_inputs))
        weights[f"{name}.weight"] = unpacked.T.contiguous()
    return weights


def main(base: Path, output: Path) -> None:
    from safetensors.torch import save_file

    for name, (method, bits, group_size, is_symmetric) in FOLDERS.items():
        write_folder(base, output / name, method, bits, group_size, is_symmetric)
        save_file(unpack_folder(output / name, method, bits, group_size), output / f"{name}.safetensors")
        config = json.loads((output / name / "config.json").read_text())
        assert config["quantization_config"]["quant_method"] == method


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
