"""Makes `catalog.json` from the public repositories named in its tables; nothing is typed in by hand.

    python -m ftcli.model.catalog.make_catalog FOLDER            writes catalog.json
    python -m ftcli.model.catalog.make_catalog FOLDER --check    fails if it would change

FOLDER holds one git directory, bare or not, for each repository: FOLDER/owner+name or FOLDER/owner+name/repo,
with the commit in it. A file of a repository too large to clone may lie there alone instead, as
FOLDER/owner+name/COMMIT/PATH. A config is a whole JSON file, or the first literal behind a marker in a text
(a Python file, a README); foreign code is parsed, never run.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ftcli.model.catalog import CATALOG_PATH, Source

# Keys that say who saved a config, how to run it elsewhere, or what a third party added.
DROPPED_KEYS = {
    "_name_or_path", "transformers_version", "use_cache", "auto_map", "task_specific_params", "name",
    "transformers.js_config", "_attn_implementation", "cache_implementation", "pretraining_tp",
    "context_window_size", "prefill_chunk_size", "sliding_window_size", "attention_sink_size",
}  # fmt: skip


@dataclass(frozen=True)
class Repository:
    """A repository at a commit; ``prefix`` begins the paths of all files used."""

    name: str
    commit: str
    prefix: str = ""

    def at(self, path: str) -> Source:
        return Source(self.name, self.commit, self.prefix + path)


@dataclass(frozen=True)
class Row:
    """The config of ``ids``: a file, ``after`` a marker in it; ``twins`` are ids that share its architecture only."""

    id: str
    source: Source
    after: str = ""
    part: str = ""
    twins: tuple[str, ...] = ()


AICONFIGURATOR = Repository(
    "ai-dynamo/aiconfigurator",
    "095f58a51c4ca8e61b66ec108d86f223f8d559ce",
    "aic-core/src/aiconfigurator_core/model_configs/",
)
AICONFIGURATOR_OLD = Repository(
    "ai-dynamo/aiconfigurator", "b5369e1fb89f7ad67b160c749227b415f4e7fe01", "src/aiconfigurator/model_configs/"
)
TPU_RECIPES = Repository(
    "AI-Hypercomputer/tpu-recipes", "c8cfe2f689081d36701a101cd73a70965d80926b", "training/archive/trillium/"
)
LLM_PROF = Repository("citsjtu2020/LLM-Prof", "8434c8d19c396b2f95d92a67845a7c0a0e0dd512", "sglang/")
LLM_PROJECTS = Repository("MatthewGoldsberry/LLM-Projects", "bf1733705e944f312bf5564d13932a9b6de21606")
FUSION_BENCH = Repository("tanganke/fusion_bench", "54c9e8c9d9621620c720452cd8533332a32d3689")
ONNX_TOOL = Repository("ThanatosShinji/onnx-tool", "00f5f0a04df5d0988b348c27abab245eedf36d9c", "onnx_tool/")

ROWS = (
    Row("meta-llama/Meta-Llama-3-8B", TPU_RECIPES.at("Llama3.0-8B-PyTorch/GCE/config.json")),
    Row("meta-llama/Meta-Llama-3-70B", TPU_RECIPES.at("Llama3.0-70B-PyTorch/GCE/config.json")),
    Row("meta-llama/Llama-3.1-8B", AICONFIGURATOR.at("meta-llama--Meta-Llama-3.1-8B_config.json")),
    Row("meta-llama/Llama-3.1-70B", AICONFIGURATOR.at("meta-llama--Meta-Llama-3.1-70B_config.json")),
    Row("meta-llama/Llama-3.1-405B", AICONFIGURATOR.at("meta-llama--Meta-Llama-3.1-405B_config.json")),
    Row("meta-llama/Llama-3.2-1B", LLM_PROJECTS.at("Llama-3.2-1B/config.json")),
    Row("meta-llama/Llama-3.2-3B", LLM_PROF.at("Model_Config.md"), "Llama-3.2-3B\n"),
    Row("mistralai/Mistral-7B-v0.1", FUSION_BENCH.at("tests/test_depth_upscaling.py"), "Mistral-7B-v0.1/resolve"),
    Row("microsoft/Phi-3-mini-4k-instruct", ONNX_TOOL.at("model_configs.py"), "phi3_mini = "),
    Row("Qwen/Qwen2.5-7B", AICONFIGURATOR_OLD.at("Qwen--Qwen2.5-7B_config.json")),
    Row("Qwen/Qwen2.5-72B", AICONFIGURATOR_OLD.at("Qwen--Qwen2.5-72B_config.json")),
    Row("Qwen/Qwen3-0.6B", AICONFIGURATOR.at("Qwen--Qwen3-0.6B_config.json")),
    Row("Qwen/Qwen3-8B", AICONFIGURATOR.at("Qwen--Qwen3-8B_config.json")),
    Row("openai-community/gpt2", ONNX_TOOL.at("model_configs.py"), "\ngpt2 = "),
)


def main() -> None:
    arguments = [argument for argument in sys.argv[1:] if argument != "--check"]
    if len(arguments) != 1:
        raise SystemExit(__doc__)
    text = write_catalog(Path(arguments[0]))
    if "--check" not in sys.argv:
        CATALOG_PATH.write_text(text, encoding="utf-8", newline="\n")
    elif text != CATALOG_PATH.read_text(encoding="utf-8"):
        raise SystemExit(f"{CATALOG_PATH.name} is not what the sources give")


def write_catalog(folder: Path) -> str:
    """The catalog as text: one config and one model a line, so that a change reads well."""
    sources: dict[str, Source] = {}
    configs: dict[str, dict[str, Any]] = {}
    models: dict[str, dict[str, Any]] = {}
    for row in sorted(ROWS, key=lambda row: row.id.casefold()):
        config = read_config(folder, row)
        key = next((key for key, known in configs.items() if known == config), row.id)
        configs[key] = config
        for model_id in (row.id, *row.twins):
            if model_id in models:
                raise SystemExit(f"{model_id} is in the table twice")
            model = {"config": key, "source": add_source(sources, row.source), "revision": None}
            if model_id != row.id:
                model["same_architecture_as"] = row.id
            if row.part:
                model["part"] = row.part
            models[model_id] = {**model, "published": {"parameters": None, "where": None}}
    parts = {"sources": {key: asdict(source) for key, source in sources.items()}, "configs": configs, "models": models}
    return render_catalog(parts)


def add_source(sources: dict[str, Source], source: Source) -> str:
    key = f"{source.repository}/{source.path.rpartition('/')[2]}"
    while sources.setdefault(key, source) != source:
        key += "'"
    return key


def render_catalog(parts: Mapping[str, Mapping[str, Any]]) -> str:
    lines = ['{"schema": 1']
    for name, values in parts.items():
        rows = (f"{json.dumps(key)}: {json.dumps(values[key])}" for key in sorted(values, key=str.casefold))
        lines.append(f'"{name}": {{\n' + ",\n".join(rows) + "\n}")
    return ",\n".join(lines) + "}\n"


def read_config(folder: Path, row: Row) -> dict[str, Any]:
    text = read_source(folder, row.source)
    if row.after:
        _, found, rest = text.partition(row.after)
        if not found:
            raise SystemExit(f"{row.source}: no {row.after!r}")
        value = parse_literal(rest, str(row.source))
    else:
        value = json.loads(text)
    config = value[row.part] if row.part else value
    return {key: config[key] for key in sorted(config) if key not in DROPPED_KEYS}


@cache
def read_source(folder: Path, source: Source) -> str:
    """The text of a file at its commit, from a git directory or a saved copy."""
    home = folder / source.repository.replace("/", "+")
    saved = home / source.commit / source.path
    if saved.is_file():
        return saved.read_text(encoding="utf-8")
    git = home / "repo" if (home / "repo").is_dir() else home
    command = ["git", "-C", str(git), "show", f"{source.commit}:{source.path}"]
    result = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    if result.returncode:
        raise SystemExit(f"{source}: {result.stderr.strip()}")
    return result.stdout


class _Spelling(ast.NodeTransformer):
    """JSON's words for Python's: a JSON object then is a Python literal too."""

    WORDS: Mapping[str, bool | None] = {"true": True, "false": False, "null": None}

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(self.WORDS[node.id]) if node.id in self.WORDS else node


def parse_literal(text: str, where: str) -> Any:
    """The first ``{…}`` of ``text`` that is a literal, in Python's or JSON's spelling."""
    start = text.index("{")
    for end in re.finditer("}", text[start:]):
        try:
            tree = ast.parse(text[start : start + end.end()], mode="eval")
        except SyntaxError:
            continue
        return ast.literal_eval(_Spelling().visit(tree))
    raise SystemExit(f"{where}: no literal")


if __name__ == "__main__":
    main()
