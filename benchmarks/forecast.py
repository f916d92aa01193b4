"""The memory forecast against what runs really take on the CPU, each in a process of its own.

    python benchmarks/forecast.py [--jobs 2] [--output results/forecast-cpu.json]

Random Llamas are trained for two steps of two micro-batches through ``ftcli.train.run.train``. Both figures are
those that the run's manifest holds: the forecast, made before the model was loaded, and the peak of resident memory
less what was resident then.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
N_BATCHES = 2  # a step
SIZES = {  # hidden, FFN, layers, heads, key heads, vocabulary, tied
    "18M": (256, 704, 8, 8, 2, 49152, True),
    "40M": (512, 1408, 12, 8, 4, 8192, True),
    "66M": (576, 1536, 8, 9, 3, 49152, True),
    "170M": (1024, 2816, 10, 16, 4, 32000, True),
    "30M": (384, 1024, 14, 6, 6, 16384, False),
    "110M": (640, 1728, 12, 10, 2, 65536, False),
    "240M": (768, 2048, 8, 12, 4, 128256, False),
}
POINTS: list[dict[str, Any]] = [
    {"size": "66M", "method": "lora", "dtype": "float32", "tokens": 512},
    {"size": "66M", "method": "lora", "dtype": "float32", "tokens": 1024, "rows": 4},
    {"size": "66M", "method": "lora", "dtype": "float32", "tokens": 1024, "checkpointing": True},
    {"size": "66M", "method": "lora", "dtype": "float32", "tokens": 512, "dropout": 0.1},
    {"size": "66M", "method": "qlora", "dtype": "float32", "tokens": 512},
    {"size": "170M", "method": "qlora", "dtype": "float32", "tokens": 1024, "rows": 2, "checkpointing": True},
    {"size": "170M", "method": "qlora", "dtype": "float32", "tokens": 256, "single_quant": True},
    {"size": "66M", "method": "full", "dtype": "float32", "tokens": 512},
    {"size": "170M", "method": "full", "dtype": "float32", "tokens": 256, "checkpointing": True},
    {"size": "240M", "method": "lora", "dtype": "float32", "tokens": 1024, "checkpointing": True},
    {"size": "40M", "method": "lora", "dtype": "float32", "tokens": 2048, "rows": 8},
    {"size": "40M", "method": "full", "dtype": "float32", "tokens": 1024, "rows": 2},
    # 16-bit products without AMX are slow: small models, few labels
    {"size": "18M", "method": "lora", "dtype": "bfloat16", "tokens": 1024, "answer": 64},
    {"size": "18M", "method": "lora", "dtype": "bfloat16", "tokens": 512, "answer": 64, "checkpointing": True},
    {"size": "18M", "method": "qlora", "dtype": "bfloat16", "tokens": 512, "answer": 64},
    {"size": "18M", "method": "full", "dtype": "bfloat16", "tokens": 512, "answer": 64},
    # looked at only after the formulas were as they are
    {"size": "110M", "method": "lora", "dtype": "float32", "tokens": 768, "rows": 3},
    {"size": "110M", "method": "qlora", "dtype": "float32", "tokens": 512, "checkpointing": True},
    {"size": "110M", "method": "full", "dtype": "float32", "tokens": 384, "checkpointing": True},
    {"size": "30M", "method": "lora", "dtype": "float32", "tokens": 3072, "rows": 2, "checkpointing": True},
    {"size": "30M", "method": "lora", "dtype": "float32", "tokens": 1536, "dropout": 0.05, "answer": 300},
]


def save_model(folder: Path, size: str, dtype: str) -> None:
    """Nothing; ``folder`` holds a random Llama and a tokenizer of single bytes and a few words."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    hidden, ffn, n_layers, n_heads, n_kv_heads, vocab, is_tied = SIZES[size]
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=n_layers, num_attention_heads=n_heads,
        num_key_value_heads=n_kv_heads, vocab_size=vocab, tie_word_embeddings=is_tied, max_position_embeddings=8192,
        bos_token_id=None, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype)).save_pretrained(folder)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 20, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    ).save_pretrained(folder)


def write_recipe(folder: Path, model: Path, point: dict[str, Any]) -> Path:
    """A recipe for ``point`` with its data; rows fill the micro-batch but for a few tokens."""
    rows = point.get("rows", 1)
    n_words = point["tokens"] // rows - 24
    n_answered = point.get("answer", n_words)
    question, answer = "the" + " fox" * (n_words - n_answered), "dog" + " fox" * n_answered
    message = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    (folder / "train.jsonl").write_text(
        "".join(json.dumps({"messages": message}) + "\n" for _ in range(2 * N_BATCHES * rows))
    )
    is_full = point["method"] == "full"
    recipe: dict[str, Any] = {
        "model": {"name_or_path": str(model), "dtype": point["dtype"]},
        "datasets": [{"path": "train.jsonl"}],
        "data": {"max_length": point["tokens"], "packing": False},
        "train": {
            "max_steps": 2,
            "per_device_train_batch_size": rows,
            "gradient_accumulation_steps": N_BATCHES,
            "learning_rate": 1e-5,
            "gradient_checkpointing": point.get("checkpointing", False),
        },
        "output_dir": str(folder / "run"),
        "peft": None if is_full else {"r": 16, "lora_alpha": 32, "lora_dropout": point.get("dropout", 0.0)},
    }
    if point["method"] == "qlora":
        double = not point.get("single_quant", False)
        recipe["quantization"] = {"load_in_4bit": True, "bnb_4bit_use_double_quant": double}
    path = folder / "recipe.json"
    path.write_text(json.dumps(recipe))
    return path


def run_point(folder: Path, point: dict[str, Any]) -> dict[str, Any]:
    """The forecast and the measured bytes of one run, in this process."""
    from ftcli.train.run import train

    run = train(write_recipe(folder, Path(folder, "model").resolve(), point))
    manifest = json.loads((run.path / "manifest.json").read_text())
    forecast, measured = manifest["forecast"], manifest["measured"]
    return {
        "forecast_bytes": forecast["total_bytes"],
        "phase": forecast["peak_phase"],
        "measured_bytes": measured["peak_rss_bytes"] - measured["start_rss_bytes"],
        "components": {key: size for key, size in forecast.items() if key.endswith("_bytes") and key != "total_bytes"},
    }


def start_point(models: Path, point: dict[str, Any]) -> dict[str, Any]:
    """The row of ``point``, run in a process of its own and printed as it comes."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment["HF_HOME"] = str(folder / "cache")
        (folder / "model").symlink_to(models / f"{point['size']}-{point['dtype']}")
        command = [sys.executable, __file__, "--point", json.dumps(point), "--folder", name]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=400)
    if done.returncode:
        raise RuntimeError(f"{point}\n{done.stderr[-3000:]}")
    row = point | json.loads(done.stdout.splitlines()[-1])
    row["error"] = row["forecast_bytes"] / row["measured_bytes"] - 1
    words = " ".join(f"{key}={value}" for key, value in point.items())
    sizes = f"{row['forecast_bytes'] / 1e6:9.1f} {row['measured_bytes'] / 1e6:9.1f}"
    print(f"{sizes} {row['error']:+7.1%}  {row['phase']:8} {words}", flush=True)
    return row


def summarise(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Median and worst of the errors' sizes."""
    errors = sorted(abs(row["error"]) for row in rows)
    return {"median": round(statistics.median(errors), 4), "worst": round(errors[-1], 4)}


def report(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What is written: errors of ``rows``, and what they were measured with."""
    packages = ("torch", "transformers", "peft", "accelerate", "bitsandbytes")
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": platform.platform(),
        "versions": {package: version(package) for package in packages},
        "error": summarise(rows),
        "points": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--only", help="numbers of points, with commas")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point:
        print(json.dumps(run_point(options.folder, json.loads(options.point))))
        return
    points = [POINTS[int(number)] for number in options.only.split(",")] if options.only else POINTS
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(options.jobs) as pool:
        for size, dtype in sorted({(point["size"], point["dtype"]) for point in points}):
            save_model(Path(name) / f"{size}-{dtype}", size, dtype)
        print(" forecast  measured   error  phase    point (MB)")
        rows: list[dict[str, Any]] = []
        for row in pool.map(lambda point: start_point(Path(name), point), points):
            rows.append(row)
            if options.output:
                options.output.write_text(json.dumps(report(rows), indent=1) + "\n")
    print(json.dumps(report(rows)["error"]))


if __name__ == "__main__":
    main()
