"""``ftcli merge`` against PEFT's way (load, ``merge_and_unload``, ``save_pretrained``), each in its own process.

    python benchmarks/merge.py [--layers 20] [--rounds 3] [--output results/merge-cpu.json]

The base is a random sharded Llama in bfloat16 (hidden 2048, FFN 8192), the adapter LoRA of rank 16 on all linear
layers. Both ways start from the same files; rounds alternate. ftcli's looks for NaN, measures what survives the
rounding and hashes what it wrote, which PEFT's does not; PEFT's sum is rounded twice, in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from large_model import HIDDEN, write_large_adapter, write_large_model

VOCAB = 32000
WAYS = {
    "ftcli": (
        "from ftcli.merge.run import merge\n"
        "merge({adapter!r}, output=Path({out!r}), verifies={verifies}, overwrite=True)"
    ),
    "peft": (
        "import torch; from transformers import AutoModelForCausalLM; from peft import PeftModel\n"
        "model = AutoModelForCausalLM.from_pretrained({base!r}, dtype=torch.bfloat16)\n"
        "model = PeftModel.from_pretrained(model, {adapter!r}).merge_and_unload()\n"
        "model.save_pretrained({out!r}, max_shard_size='5GB')"
    ),
}


def run(way: str, values: dict[str, Any]) -> dict[str, float]:
    """CPU seconds, wall seconds and peak bytes of one merge."""
    code = "import resource, time; from pathlib import Path; start = time.time()\n" + WAYS[way].format(**values)
    code += (
        "\nused = resource.getrusage(resource.RUSAGE_SELF)"
        "\nlines = Path('/proc/self/status').read_text().splitlines()"  # ru_maxrss may be this process's before exec
        "\npeak = 1024 * int(next(line.split()[1] for line in lines if line.startswith('VmHWM')))"
        "\nprint('\\nfound', used.ru_utime + used.ru_stime, time.time() - start, peak)"
    )
    environment = os.environ | {"GOMP_SPINCOUNT": "1000", "TQDM_DISABLE": "1"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    words = next(line for line in reversed(done.stdout.splitlines()) if line.startswith("found")).split()
    shutil.rmtree(values["out"])
    return {"cpu_seconds": float(words[1]), "seconds": float(words[2]), "peak_rss_bytes": int(words[3])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rounds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        tensors = write_large_model(root / "base", VOCAB, shard_bytes=1_000_000_000, layers=options.layers)
        size = sum(tensor.size_bytes for tensor in tensors)
        write_tokenizer(root / "base")
        write_large_adapter(root / "adapter", root / "base", layers=options.layers)
        values = {key: str(root / key) for key in ("base", "adapter", "out")}
        for _ in range(options.rounds):
            entry = {way: run(way, values | {"verifies": False}) for way in WAYS}
            entry["ftcli, verified"] = run("ftcli", values | {"verifies": True})
            rounds.append(entry)
            print(json.dumps(entry))
    ratios = {key: sorted(r["peft"][key] / r["ftcli"][key] for r in rounds) for key in rounds[0]["peft"]}
    document = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} threads",
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "safetensors")},
        "base_bytes": size,
        "largest_tensor_bytes": 2 * VOCAB * HIDDEN,
        "rounds": rounds,
        "peft_over_ftcli": ratios,
    }
    print(json.dumps(ratios, indent=2))
    if options.output:
        options.output.write_text(json.dumps(document, indent=2) + "\n")


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "<|end|>": 1}, merges=[]))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(str(folder))


if __name__ == "__main__":
    main()
