"""What each part of the fast path gives: tokens per CPU second and memory with that part alone taken away.

    python benchmarks/cpu_ablation.py [--rounds 2] [--steps 4] [--output results/cpu-ablation.json]

The model and the lengths of ``cpu_train.py`` (a random Llama of 71 M parameters in bfloat16, LoRA of rank 16 on every
linear layer, no checkpointing unless said), a batch of about 1,500 tokens a step, without recipe, files and optimizer.
Each case is a process of its own with two threads; cases take turns. Memory is the peak over what is resident with the
model loaded.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

CASES = {
    "fast path": "",
    "without grouped LoRA": "projection",
    "without the head's chunks": "head",
    "without attention per document": "attention",
    "without float32 attention": "wide",
    "without RMSNorm": "norm",
    "without gate": "gate",
    "without rotation": "rotation",
    "plain path": "all",
    "fast path, checkpointing": "checkpointing",
    "fast path, checkpointing the block whole": "checkpointing whole",
    "plain path, checkpointing": "all checkpointing",
}
VOCABULARY, WARM_UP = 49_152, 2


def build_model() -> Any:
    """A random Llama with LoRA, in training mode."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=VOCABULARY, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, lora).train()


def build_random_batch(source: random.Random) -> Any:
    """Documents side by side, log-normal around 197 tokens, the first 20 to 60 % of each not learned."""
    import torch

    from ftcli.data.batch import IGNORE_LABEL, Batch

    lengths: list[int] = []
    while sum(lengths) < 1400:
        lengths.append(max(16, min(512, round(source.lognormvariate(math.log(197) - 0.18, 0.6)))))
    ids = torch.tensor([[source.randrange(VOCABULARY) for _ in range(sum(lengths))]])
    labels, borders = ids.clone(), [0]
    for length in lengths:
        labels[0, borders[-1] : borders[-1] + max(1, round(length * source.uniform(0.2, 0.6)))] = IGNORE_LABEL
        borders.append(borders[-1] + length)
    return Batch(
        input_ids=ids,
        labels=labels,
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        cu_seqlens=torch.tensor(borders, dtype=torch.int32),
        n_targets=int((labels != IGNORE_LABEL).sum()),
        places=("",) * len(lengths),
    )


def take_away(model: Any, part: str) -> None:
    """Nothing; ``model`` takes the fast path but for ``part``."""
    import torch
    from torch.nn import functional

    from ftcli.fused import attention, layer

    if part == "all":
        return
    layer.fuse(model, with_attention=part != "attention")
    if part == "projection":
        layer.project = lambda x, modules: [module(x) for module in modules]
    elif part == "head":
        layer.compute_losses = lambda hidden, head, labels, softcap: functional.cross_entropy(
            head(hidden).float(), labels, reduction="none"
        )
    elif part == "wide":
        attention.is_faster_wide = lambda device: False
    elif part == "gate":
        layer.apply_gate = lambda gate, up, activation: functional.silu(gate) * up
    elif part == "rotation":
        layer.rotate = lambda x, cos, sin: (
            x * cos[:, None] + torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1) * sin[:, None]
        )
    elif part == "norm":
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                del module.forward


def run_case(name: str, n_steps: int) -> dict[str, float]:
    """Tokens per CPU second, and peak bytes over the loaded model, of one case in this process."""
    import torch

    from ftcli.evaluate.loss import compute_loss_sum
    from ftcli.fused.checkpoint import keep_attention
    from ftcli.model.build import enable_checkpointing
    from ftcli.train import memory

    words = CASES[name].split()
    memory.limit_heap()
    model = build_model()
    part = next((word for word in words if word not in ("checkpointing", "whole")), "")
    take_away(model, part)
    if "checkpointing" in words:
        is_selective = part != "all" and "whole" not in words
        enable_checkpointing(model.get_base_model(), keep_attention if is_selective else None)
    memory.release_between_blocks(model, growth=memory.PLAIN_GROWTH if part == "all" else memory.FUSED_GROWTH)
    source = random.Random(0)
    batches = [build_random_batch(source) for _ in range(WARM_UP + n_steps)]
    start = memory.start_measuring()
    for index, batch in enumerate(batches):
        if index == WARM_UP:
            began = time.process_time()
        loss = compute_loss_sum(model, batch)
        if part == "all":
            memory.release_free_memory()
        (loss / batch.n_targets).backward()
        model.zero_grad(set_to_none=True)
    seconds = time.process_time() - began
    tokens = sum(batch.n_tokens for batch in batches[WARM_UP:])
    assert torch.isfinite(loss)
    return {"tokens_per_cpu_second": tokens / seconds, "peak_bytes": memory.measure_peak().rss_bytes - start}


def start_case(name: str, n_steps: int) -> dict[str, float]:
    """The same in a process of its own."""
    command = [sys.executable, __file__, "--case", name, "--steps", str(n_steps)]
    environment = os.environ | {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "1000"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def summarise(rounds: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians of each case, and its speed as a share of the whole fast path's in the same round."""
    whole = [entry["tokens_per_cpu_second"] for entry in rounds["fast path"]]
    return {
        name: {
            "tokens_per_cpu_second": round(statistics.median(e["tokens_per_cpu_second"] for e in entries), 1),
            "share_of_fast_path": round(
                statistics.median(e["tokens_per_cpu_second"] / w for e, w in zip(entries, whole, strict=False)), 3
            ),
            "peak_bytes": round(statistics.median(e["peak_bytes"] for e in entries)),
            "rounds": [round(e["tokens_per_cpu_second"], 1) for e in entries],
        }
        for name, entries in rounds.items()
        if entries
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(run_case(options.case, options.steps)))
        return
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in CASES}
    for _ in range(options.rounds):
        for name in CASES:
            rounds[name].append(start_case(name, options.steps))
    cases = summarise(rounds)
    for name, entry in cases.items():
        numbers = f"{entry['tokens_per_cpu_second']:7.0f} {entry['share_of_fast_path']:6.2f}"
        print(f"{name:42} {numbers} {entry['peak_bytes'] / 1e6:8.0f} MB")
    if options.output:
        cpu = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
        report = {
            "date": datetime.now(UTC).date().isoformat(),
            "cpu": cpu.partition(": ")[2],
            "versions": {package: version(package) for package in ("torch", "transformers", "peft")},
            "steps": options.steps,
            "cases": cases,
        }
        options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
