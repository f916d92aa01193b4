"""What each form of one model loses of it, and what making it costs: the figures of docs/concepts/quantization.md.

    python benchmarks/quantize.py TARGET --calibration FILE --data FILE [--output results/quantize-cpu.json]

Each form is made by ``ftcli quantize`` or ``ftcli export``, a process each, and all of them stand side by side in one
``ftcli eval``. Times are ratios to NF4's, which reads every weight once and fits nothing. ``rtn`` is rounding to the
nearest in groups of 64 by this script, the baseline that a method must beat.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

FORMS: dict[str, list[str]] = {
    "nf4": ["quantize", "--method", "nf4"],
    "int8": ["quantize", "--method", "int8"],
    "gptq, tune 0": ["quantize", "--method", "gptq", "--tune", "0"],
    "gptq": ["quantize", "--method", "gptq"],
    "gptq, 8 bits": ["quantize", "--method", "gptq", "--bits", "8", "--tune", "0"],
    "awq, tune 0": ["quantize", "--method", "awq", "--tune", "0"],
    "awq": ["quantize", "--method", "awq"],
    "q4_k_m": ["export", "--gguf", "q4_k_m"],
    "q5_k_m": ["export", "--gguf", "q5_k_m"],
    "q6_k": ["export", "--gguf", "q6_k"],
    "q8_0": ["export", "--gguf", "q8_0"],
}
_ENVIRONMENT = os.environ | {"GOMP_SPINCOUNT": "1000", "TQDM_DISABLE": "1"}


def make(target: str, words: list[str], rows: list[str], out: Path) -> float:
    """The CPU seconds in which a form came to lie in ``out``."""
    is_fitted = "gptq" in words or "awq" in words
    command = [sys.executable, "-m", "ftcli", *words, target, *(rows if is_fitted else ())]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    options = ["--no-verify", "--quiet", "-o", str(out)]
    subprocess.run([*command, *options], env=_ENVIRONMENT, check=True, stdout=subprocess.DEVNULL)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime


def round_to_nearest(target: Path, out: Path) -> None:
    """Nothing; ``out`` holds the model with every linear layer rounded to 16 symmetric levels in groups of 64."""
    shutil.copytree(target, out)
    tensors = load_file(out / "model.safetensors")
    for name, weight in tensors.items():
        if name.endswith("_proj.weight"):
            groups = weight.float().view(weight.shape[0], -1, 64)
            scale = groups.abs().amax(dim=2, keepdim=True) / 7
            tensors[name] = ((groups / scale).round().clamp(-8, 7) * scale).view(weight.shape).to(weight.dtype)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", help="a model's folder with model.safetensors")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--limit", type=int, default=12, help="rows that are compared")
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()) / "ftcli-quantize", help="where the forms lie"
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "quantize-cpu.json")
    arguments = parser.parse_args()
    rows = ["--calibration", arguments.calibration]
    rows += ["--samples", str(arguments.samples), "--seq-len", str(arguments.seq_len)]
    arguments.folder.mkdir(parents=True, exist_ok=True)
    known = arguments.folder / "made.json"  # a form that lies there is not made again
    made: dict[str, dict[str, Any]] = json.loads(known.read_text()) if known.exists() else {}
    paths = []
    for i, (name, words) in enumerate(FORMS.items()):
        out = arguments.folder / str(i)
        if name not in made:
            shutil.rmtree(out, ignore_errors=True)
            made[name] = {"cpu_seconds": make(arguments.target, words, rows, out)}
            known.write_text(json.dumps(made, indent=2) + "\n")
        paths.append(str(next(out.glob("*.gguf"), out)))
        print(f"{name:<14} {made[name]['cpu_seconds']:8.1f} CPU s", file=sys.stderr, flush=True)
    if not (arguments.folder / "rtn").exists():
        round_to_nearest(Path(arguments.target), arguments.folder / "rtn")
    made["rtn"] = {}
    command = [sys.executable, "-m", "ftcli", "eval", arguments.target, *paths, str(arguments.folder / "rtn")]
    command += ["--data", arguments.data, "--limit", str(arguments.limit), "--max-length", "1024", "--json", "--quiet"]
    done = subprocess.run(command, env=_ENVIRONMENT, check=True, capture_output=True, text=True)
    board = json.loads(done.stdout)
    source, *others = board["targets"]
    for (name, entry), found in zip(made.items(), others, strict=True):
        entry |= {key: found[key] for key in ("bytes", "bits_per_weight", "perplexity", "kl", "top1")}
        if "cpu_seconds" in entry:
            entry["cpu_ratio"] = entry["cpu_seconds"] / made["nf4"]["cpu_seconds"]
        print(f"{name:<14} {entry['bits_per_weight']:6.2f} bits  KL {entry['kl']:.4f}  ppl {entry['perplexity']:.3f}")
    packages = ("torch", "transformers", "bitsandbytes", "auto-round")
    document = {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {name: version(name) for name in packages},
        "calibration": {"samples": arguments.samples, "seq_len": arguments.seq_len},
        "n_rows": board["n_rows"],
        "n_tokens": board["n_tokens"],
        "perplexity": source["perplexity"],
        "forms": made,
    }
    arguments.output.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
