"""Makes `catalog.json` from the public repositories named in `table.py`; nothing is typed in by hand.

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
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from ftcli.model.catalog import CATALOG_PATH, Source
from ftcli.model.catalog.table import CARDS, KERAS, KERAS_PRESETS, ROWS, Row

# Keys that say who saved a config, how to run it elsewhere, or what a third party added.
DROPPED_KEYS = {
    "_name_or_path", "transformers_version", "use_cache", "auto_map", "task_specific_params", "name",
    "transformers.js_config", "_attn_implementation", "cache_implementation", "pretraining_tp",
    "context_window_size", "prefill_chunk_size", "sliding_window_size", "attention_sink_size",
    "summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj",
    "output_past", "predict_special_tokens", "n_special",
}  # fmt: skip


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
    counts = read_counts(folder)
    for row in sorted(ROWS, key=lambda row: row.id.casefold()):
        config = read_config(folder, row)
        key = next((key for key, known in configs.items() if known == config), row.id)
        configs[key] = config
        for model_id in (row.id, *row.names, *row.twins):
            if model_id in models:
                raise SystemExit(f"{model_id} is in the table twice")
            model = {"config": key, "source": add_source(sources, row.source), "revision": None}
            if model_id in row.twins:
                model["same_architecture_as"] = row.id
            if row.part and model_id not in row.bare:
                model["part"] = row.part
            parameters, source = counts.get(row.id if model_id in row.names else model_id, (None, None))
            where = add_source(sources, source) if source else None
            models[model_id] = {**model, "published": {"parameters": parameters, "where": where}}
    if unknown := set(counts) - set(models):
        raise SystemExit(f"counts of models that are not in the table: {sorted(unknown)}")
    parts = {"sources": {key: asdict(source) for key, source in sources.items()}, "configs": configs, "models": models}
    return render_catalog(parts)


def read_counts(folder: Path) -> dict[str, tuple[str, Source]]:
    """For each id the parameter count that a file states, in its own words, and the file."""
    stated = {
        model_id: (KERAS.at(f"{file}/{file}_presets.py"), rf'"{re.escape(preset)}": {{.*?"params": (\d+)')
        for file, presets in KERAS_PRESETS.items()
        for preset, model_id in presets.items()
    }
    stated |= {model_id: (source, rf"{re.escape(label)}([\d.]+B)") for model_id, (source, label) in CARDS.items()}
    counts: dict[str, tuple[str, Source]] = {}
    for model_id, (source, pattern) in stated.items():
        found = re.search(pattern, read_source(folder, source), re.DOTALL)
        if not found:
            raise SystemExit(f"{source}: no {pattern!r}")
        counts[model_id] = found[1], source
    return counts


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
    """The first dictionary of ``text``, in Python's or JSON's spelling; braces of another kind are passed over."""
    for start in re.finditer("{", text):
        for end in re.finditer("}", text[start.start() :]):
            try:
                tree = ast.parse(text[start.start() : start.start() + end.end()], mode="eval")
            except SyntaxError:
                continue
            if isinstance(tree.body, ast.Dict):
                return ast.literal_eval(_Spelling().visit(tree))
            break
    raise SystemExit(f"{where}: no literal")


if __name__ == "__main__":
    main()
