"""Tokens per CPU second and memory of training on the CPU: ftcli against TRL and the Trainer of transformers.

    python -m venv PEERS && PEERS/bin/pip install -r benchmarks/peers.txt
    python benchmarks/cpu_train.py --peers PEERS/bin/python [--rounds 3] [--steps 10] [--output FILE]

A random Llama of 71 M parameters (hidden 576, FFN 1536, 12 layers, 9 heads and 3 for keys, tied) in bfloat16 gets LoRA
(r 16, all-linear) in four cells: 16-bit or NF4 weights, a vocabulary of 49,152 or 128,256. Documents have a log-normal
number of tokens, 197 on average and at most 512, of which the first 20 to 60 % are not learned. All contenders go once
through the same ids and labels, those of ``ftcli tokenize --show-labels``; a run whose model saw another number of
tokens or trained tokens is an error. A step has about 1,500 tokens: 8 rows, or 3 packs of 512.

Each run is a process of its own (``train_contender.py``) with two threads; contenders take turns, each round begins
with another one. Tokens are those of documents, never padding. CPU seconds are those of the whole process over all
steps but the first two. Memory is the peak of resident memory less what is resident when the model is loaded, the trial
of the largest batches that ftcli makes before its first step included.

A run that was stopped goes on where it was: what is in the output is not done again, if settings, machine and ftcli are
the same (``--fresh`` begins anew).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
VOCABULARIES = {"49k": 49_152, "128k": 128_256}
CELLS = [f"{method} {name}" for name in VOCABULARIES for method in ("lora", "qlora")]
MAX_LENGTH, MEAN_LENGTH, SPREAD, ROWS, PACKS = 512, 197, 0.6, 8, 3
SPECIAL = ["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CONTENDERS: dict[str, dict[str, Any]] = {  # settings of ftcli's recipe, arguments of a peer's trainer
    "ftcli": {"trainer": "ftcli", "checkpointing": True, "settings": {}},
    "ftcli no-checkpointing": {
        "trainer": "ftcli", "checkpointing": False, "settings": {"gradient_checkpointing": False},
    },
    "ftcli plain": {"trainer": "ftcli", "checkpointing": True, "settings": {"fused": False}},
    "ftcli plain no-checkpointing": {
        "trainer": "ftcli", "checkpointing": False, "settings": {"fused": False, "gradient_checkpointing": False},
    },
    "trl defaults": {"trainer": "trl", "checkpointing": True, "arguments": {}},
    # by default 8 packs would be one row of 4,096 tokens with a mask of 4,096², so a step has 3 as ftcli's has
    "trl packed": {
        "trainer": "trl", "checkpointing": True,
        "arguments": {"packing": True, "max_length": MAX_LENGTH, "per_device_train_batch_size": PACKS},
    },
    "trl packed 8": {
        "trainer": "trl", "checkpointing": True, "arguments": {"packing": True, "max_length": MAX_LENGTH},
    },
    "trl packed 1x3": {  # a mask for each pack
        "trainer": "trl", "checkpointing": True,
        "arguments": {
            "packing": True, "max_length": MAX_LENGTH,
            "per_device_train_batch_size": 1, "gradient_accumulation_steps": PACKS,
        },
    },
    "hf trainer": {"trainer": "hf", "checkpointing": False, "arguments": {"per_device_train_batch_size": ROWS}},
}  # fmt: skip
USUAL = ["ftcli", "ftcli no-checkpointing", "ftcli plain", "trl defaults", "trl packed", "hf trainer"]
MEASURES = ("tokens_per_cpu_second", "tokens_per_second", "peak_over_loaded_bytes")
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile")
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "2",
    "GOMP_SPINCOUNT": "1000",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}


def main() -> None:
    options = parse_options()
    check_peers(options)
    settings = describe_settings(options)
    result = load_result(options, settings)
    options.folder.mkdir(parents=True, exist_ok=True)
    result["data"] = write_inputs(options)
    for number in range(options.rounds):
        start = number % len(options.contenders)
        for cell in options.cells:
            for name in options.contenders[start:] + options.contenders[:start]:
                runs = result["runs"].setdefault(cell, {}).setdefault(name, [])
                if len(runs) > number:
                    continue
                runs.append(run_contender(cell, name, result, options))
                write_result(options.output, result)
                print(f"round {number + 1}  {cell:<11}{name:<29}{render_run(runs[-1])}", file=sys.stderr, flush=True)
    write_result(options.output, result)
    print("\n".join(render_table(result["summary"])))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, help="a Python that has what benchmarks/peers.txt lists")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps of 8 rows; the first two are not timed")
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=CELLS, metavar="CELL", help=f"of {CELLS}")
    parser.add_argument(
        "--contenders", nargs="+", choices=list(CONTENDERS), default=USUAL, metavar="NAME", help=f"of {[*CONTENDERS]}"
    )
    parser.add_argument("--fresh", action="store_true", help="do not go on from what the output holds")
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()) / "ftcli-cpu-train", help="where models and runs lie"
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "cpu-train.json")
    options = parser.parse_args()
    if options.steps < 4:
        parser.error("--steps: at least 4, as the first two are not timed")
    return options


def check_peers(options: argparse.Namespace) -> None:
    """None if every contender has a Python to run it; else the benchmark ends with what is missing."""
    if all(CONTENDERS[name]["trainer"] == "ftcli" for name in options.contenders):
        return
    recipe = "python -m venv PEERS && PEERS/bin/pip install -r benchmarks/peers.txt"
    if options.peers is None or not os.access(options.peers, os.X_OK):
        raise SystemExit(f"error: --peers names no Python ({options.peers}); make one that has TRL: {recipe}")
    probe = "import importlib.util as i, sys; sys.exit(' '.join(n for n in sys.argv[1:] if not i.find_spec(n)) or 0)"
    command = [str(options.peers), "-c", probe, "torch", "trl", "peft", "bitsandbytes"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"error: {options.peers} lacks {done.stderr.strip()[-200:]}; mend it: {recipe}")


# --- what is trained


def write_inputs(options: argparse.Namespace) -> dict[str, Any]:
    """What the rows hold; the models, the rows, and their ids and labels lie in the folder."""
    for name, n_rows in VOCABULARIES.items():
        if any(cell.endswith(f" {name}") for cell in options.cells):
            save_model(options.folder / f"model-{name}", n_rows)
    names = {cell.split()[1] for cell in options.cells}
    (options.folder / "train.jsonl").write_text("".join(make_rows(options.steps * ROWS)), encoding="utf-8")
    recipe = write_recipe(options.folder, f"lora {min(names)}", {})
    command = [sys.executable, "-m", "ftcli", "tokenize", str(recipe), "--set=data.packing=false", "--show-labels"]
    environment = ENVIRONMENT | {"HF_HOME": str(options.folder / "cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the rows cannot be tokenised:\n{done.stderr[-2000:]}")
    (options.folder / "documents.jsonl").write_text(done.stdout, encoding="utf-8")
    documents = [json.loads(line) for line in done.stdout.splitlines()]
    lengths = [len(document["input_ids"]) for document in documents]
    if lengths != list_lengths(options.steps * ROWS):
        raise SystemExit("a document has not the length that was asked for")
    return {
        "documents": len(lengths),
        "tokens": sum(lengths),
        "targets": sum(label != -100 for document in documents for label in document["labels"]),
        "mean_length": round(statistics.mean(lengths), 1),
        "longest": max(lengths),
        "sha256": hashlib.sha256(done.stdout.encode()).hexdigest(),
    }


def save_model(folder: Path, vocab_size: int) -> None:
    """Nothing; ``folder`` holds a random Llama, and a tokenizer that makes one token of each word."""
    if (folder / "tokenizer_config.json").exists():
        return
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=vocab_size, tie_word_embeddings=True, max_position_embeddings=2048,
        bos_token_id=None, eos_token_id=3, pad_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    words = [*SPECIAL, *(f"w{i}" for i in range(len(SPECIAL), VOCABULARIES["49k"]))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[-1]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(SPECIAL)
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=SPECIAL[0], eos_token=SPECIAL[3], chat_template=TEMPLATE
    ).save_pretrained(folder)


def list_lengths(n_rows: int) -> list[int]:
    """Log-normal lengths in tokens, cut at both ends, whose mean is right."""
    chosen = random.Random(0)
    draws = [chosen.lognormvariate(0, SPREAD) for _ in range(n_rows)]
    low, high = 1.0, 2.0 * MEAN_LENGTH
    while high - low > 1e-3:
        scale = (low + high) / 2
        lengths = [min(MAX_LENGTH, max(16, round(scale * draw))) for draw in draws]
        low, high = (scale, high) if sum(lengths) < MEAN_LENGTH * n_rows else (low, scale)
    return lengths


def make_rows(n_rows: int) -> Iterator[str]:
    """One line of JSON for each row: three tokens of the template and its words are the prompt, the rest is learned."""
    chosen = random.Random(1)
    for length in list_lengths(n_rows):
        n_prompt = max(4, round(length * chosen.uniform(0.2, 0.6)))
        words = [f"w{chosen.randrange(len(SPECIAL), VOCABULARIES['49k'] - 1)}" for _ in range(length - 4)]
        question, answer = " ".join(words[: n_prompt - 3]), " ".join(words[n_prompt - 3 :])
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        yield json.dumps({"messages": messages}) + "\n"


def write_recipe(folder: Path, cell: str, settings: dict[str, Any]) -> Path:
    """The recipe of a cell: defaults, but for what every contender is given and ``settings`` of ``train``."""
    method, name = cell.split()
    recipe = {
        "model": {"name_or_path": str(folder / f"model-{name}"), "dtype": "bfloat16"},
        "datasets": [{"path": "train.jsonl"}],
        "data": {"max_length": MAX_LENGTH, "packing": True},
        "peft": {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"},
        "quantization": {"load_in_4bit": True} if method == "qlora" else None,
        "train": {"learning_rate": 1e-4, "per_device_train_batch_size": PACKS, **settings},
        "checkpoint": {"save_steps": None},
        "output_dir": str(folder / "run"),
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return path


# --- a run, and what comes of all of them


def run_contender(cell: str, name: str, result: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The figures of one run; what else it told goes into ``result``."""
    folder, contender = options.folder, CONTENDERS[name]
    is_ours = contender["trainer"] == "ftcli"
    specification = {
        "trainer": contender["trainer"],
        "model": str(folder / f"model-{cell.split()[1]}"),
        "is_4bit": cell.startswith("qlora"),
        "documents": str(folder / "documents.jsonl"),
        "output": str(folder / "peer"),
        "result": str(folder / "result.json"),
        "recipe": str(write_recipe(folder, cell, contender["settings"])) if is_ours else None,
        "arguments": contender.get("arguments"),
    }
    path = folder / "specification.json"
    path.write_text(json.dumps(specification), encoding="utf-8")
    (folder / "result.json").unlink(missing_ok=True)
    command = [sys.executable if is_ours else str(options.peers), str(Path(__file__).with_name("train_contender.py"))]
    environment = ENVIRONMENT | {"HF_HOME": str(folder / "cache")}
    done = subprocess.run([*command, str(path)], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed in the cell {cell}:\n{done.stderr[-4000:]}")
    figures: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    data = result["data"]
    if (figures["all_tokens"], figures["all_targets"]) != (data["tokens"], data["targets"]):
        seen = f"{figures['all_tokens']} tokens, {figures['all_targets']} trained"
        raise SystemExit(f"{name} saw {seen}, and the rows have {data['tokens']} and {data['targets']}")
    result["versions"]["ftcli" if is_ours else "peers"] = figures.pop("versions")
    told = figures.pop("configuration", contender.get("settings"))
    result["configurations"].setdefault(cell, {})[name] = told | {"checkpointing": contender["checkpointing"]}
    figures["load_average"] = os.getloadavg()[0]
    return figures


def summarize(runs: dict[str, Any]) -> dict[str, Any]:
    """For each cell the medians of all contenders, and ftcli's ratios to peers: of each round, then the median."""
    summary = {}
    for cell, contenders in runs.items():
        medians = {
            name: {key: round(statistics.median(run[key] for run in found), 2) for key in MEASURES}
            for name, found in contenders.items()
        }
        own = [name for name in contenders if CONTENDERS[name]["trainer"] == "ftcli"]
        fastest = max(own, key=lambda name: medians[name][MEASURES[0]], default=None)
        pairs = []
        for ours, other in ((a, b) for a in contenders for b in contenders if is_pair(a, b)):
            both = list(zip(contenders[ours], contenders[other], strict=False))
            ratios = {key: [round(a[key] / b[key], 3) for a, b in both] for key in MEASURES}
            pairs.append(
                {
                    "of": ours,
                    "to": other,
                    "is_fastest": ours == fastest,
                    "same_checkpointing": CONTENDERS[ours]["checkpointing"] == CONTENDERS[other]["checkpointing"],
                    **{key: round(statistics.median(values), 3) for key, values in ratios.items()},
                    "rounds": ratios,
                }
            )
        summary[cell] = {"medians": medians, "pairs": pairs}
    return summary


def is_pair(ours: str, other: str) -> bool:
    """Whether a ratio is taken: of ftcli to each peer, and of ftcli to itself with the plain layers."""
    if not ours.startswith("ftcli") or "plain" in ours:
        return False
    return not other.startswith("ftcli") or other == ours.replace("ftcli", "ftcli plain")


def render_run(figures: dict[str, Any]) -> str:
    cpu, wall, peak = (figures[key] for key in MEASURES)
    return f"{cpu:8.1f} {wall:9.1f} {peak / 1e9:8.2f} GB"


def render_table(summary: dict[str, Any]) -> list[str]:
    lines = []
    for cell, entry in summary.items():
        lines += ["", f"{cell:<30}tokens/CPU s  tokens/s  peak over the loaded model"]
        lines += [f"  {name:<32}{render_run(figures)}" for name, figures in entry["medians"].items()]
        lines += [f"  {'ratios (= same checkpointing, * fastest)':<42}tokens/CPU s  peak  rounds"]
        for pair in entry["pairs"]:
            marks = ("=" if pair["same_checkpointing"] else " ") + ("*" if pair["is_fastest"] else " ")
            cpu, _, peak = (pair[key] for key in MEASURES)
            rounds = " ".join(f"{value:.2f}" for value in pair["rounds"][MEASURES[0]])
            lines.append(f"{marks}{pair['of'] + ' / ' + pair['to']:<44}{cpu:10.2f}  {peak:6.2f}  {rounds}")
    return lines


def describe_settings(options: argparse.Namespace) -> dict[str, Any]:
    """What must be equal for a stopped benchmark to go on: rows, machine, and every line that makes ftcli."""
    digest = hashlib.sha256()
    for path in sorted(
        [*(ROOT / "ftcli").rglob("*.py"), Path(__file__), Path(__file__).with_name("train_contender.py")]
    ):
        digest.update(path.read_bytes())
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    about = dict(reversed([[part.strip() for part in line.split(":", 1)] for line in lines if ":" in line]))
    flags = about.get("flags", "").split()
    return {
        "steps": options.steps,
        "rows_per_step": ROWS,
        "packs_per_step": PACKS,
        "threads": 2,
        "cpu": about.get("model name", "unknown"),
        "cores": os.cpu_count(),
        "flags": [flag for flag in FLAGS if flag in flags],
        "source_sha256": digest.hexdigest(),
    }


def load_result(options: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    """The result so far, or an empty one."""
    if options.output.exists() and not options.fresh:
        result: dict[str, Any] = json.loads(options.output.read_text(encoding="utf-8"))
        if changed := [key for key, value in settings.items() if result["settings"].get(key) != value]:
            raise SystemExit(f"error: {options.output} was made with another {', '.join(changed)}; --fresh begins anew")
        return result
    return {"settings": settings, "versions": {}, "configurations": {}, "runs": {}}


def write_result(path: Path, result: dict[str, Any]) -> None:
    result["date"] = datetime.now(UTC).date().isoformat()
    result["summary"] = summarize({c: {n: r for n, r in found.items() if r} for c, found in result["runs"].items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".part").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    path.with_suffix(".part").replace(path)


if __name__ == "__main__":
    main()
