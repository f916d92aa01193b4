"""The README.md beside GGUF files: what they are, what they were made from, and what each of them lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ftcli.gguf.modelfile import name_model
from ftcli.gguf.output import LORA
from ftcli.recipe import Recipe
from ftcli.store.card import build_front
from ftcli.store.file import disk_errors, read_json, write_text
from ftcli.store.output import MANIFEST

_MEANING = (
    "KL is how far the next-token distribution of the file as it runs is from that of its source, in nats per trained",
    "token, and the bound is what its type may lose; top-1 is the share of tokens for which both find the same one the",
    "most probable.",
)
_KEPT_TYPES = 4  # of a file's mixture; the others are named together


def write_card(folder: Path, recipe: Recipe | None, *, first: str = "") -> None:
    """Nothing; README.md lies in ``folder``, of an export of which ``first``, or else any, is the file to run.

    Raises:
        DiskError: the disk is full, or may not be written.
    """
    datasets = [Path(section.path).name for section in recipe.datasets] if recipe else []
    has_modelfile = (folder / "Modelfile").is_file()
    card = build_card(read_json(folder / MANIFEST) or {}, first=first, datasets=datasets, has_modelfile=has_modelfile)
    with disk_errors(folder):
        write_text(folder / "README.md", card)


def build_card(manifest: Mapping[str, Any], *, first: str, datasets: Sequence[str], has_modelfile: bool) -> str:
    """Markdown with the front matter that the Hub reads, from the manifest of an export."""
    name, adapter = manifest["name"], manifest["exports"].get(LORA)
    exports = {kind: entry for kind, entry in manifest["exports"].items() if kind != LORA}
    base = (manifest.get("base") or {}).get("id", "")
    origin = f"`{base}`, fine-tuned with ftcli" if base else f"`{manifest['source']}`"
    lines = [*build_front(base, library="gguf", tags=("ftcli", "gguf")), f"# {name} (GGUF)", ""]
    lines += [f"{origin}, as GGUF for llama.cpp, Ollama, LM Studio and what is built on them.", ""]
    if datasets:
        lines += [f"Trained on: {', '.join(f'`{path}`' for path in datasets)}.", ""]
    lines += _describe_adapter(adapter, base) if adapter else []
    if not exports:
        return "\n".join(lines)
    lines += ["## Files", "", "| file | MB | bits per weight | KL (nats) | bound | top-1 | perplexity |"]
    lines.append("|---|---|---|---|---|---|---|")
    lines += [_describe_file(entry, manifest["files"]) for entry in exports.values()]
    is_compared = any((entry["verify"] or {}).get("kl") is not None for entry in exports.values())
    lines += ["", *(_MEANING if is_compared else ["They are not compared with their source."])]
    lines += ["", "Their types, by share of the weights:", ""]
    lines += [f"- {kind}: {list_types(entry['types'])}" for kind, entry in exports.items()]
    shown = first or next(iter(exports.values()))["file"]
    lines += ["", "## Use", "", "```console", f"$ llama-cli -m {shown} -cnv"]
    lines += [f"$ ollama create {name_model(name)} -f Modelfile"] if has_modelfile else []
    return "\n".join([*lines, "```", ""])


def _describe_adapter(entry: Mapping[str, Any], base: str) -> list[str]:
    found, ranks = entry["verify"] or {}, ", ".join(map(str, entry["ranks"]))
    lines = ["## Adapter", ""]
    lines += [f"`{entry['file']}` is a LoRA of rank {ranks} on {entry['modules']} matrices, in 32 bits."]
    lines += [f"It is used beside a GGUF file of its base{f', `{base}`' if base else ''}:", ""]
    lines += ["```console", f"$ llama-cli -m BASE.gguf --lora {entry['file']} -cnv", "```", ""]
    if found.get("problem"):
        lines += [f"**{found['problem']}**", ""]
    elif found.get("kl") is not None:
        state = "" if found["passed"] else " **failed**"
        figures = f"KL {found['kl']:.4f}{state} (bound {found['most_kl']:.3g}), top-1 {found['top1']:.2%}"
        lines += [f"Run by llama.cpp on that base, against the adapter as it was trained: {figures}.", ""]
    return lines


def list_types(types: Mapping[str, float]) -> str:
    """The mixture of a file: GGUF's types with their shares of the weights, the largest first."""
    shown = [f"{name} {share:.0%}" for name, share in types.items() if share >= 0.005]
    return ", ".join(shown[:_KEPT_TYPES])


def _describe_file(entry: Mapping[str, Any], files: Mapping[str, Any]) -> str:
    size_bytes, found = files[entry["file"]]["bytes"], entry["verify"] or {}
    cells = [f"`{entry['file']}`", f"{size_bytes / 1e6:,.1f}", f"{entry['bits_per_weight']:.2f}"]
    if found.get("kl") is None:
        problem = found.get("problem")
        return f"| {' | '.join([*cells, f'**{problem}**' if problem else 'not compared', '', '', ''])} |"
    state = "" if found["passed"] else " **failed**"
    cells += [f"{found['kl']:.4f}{state}", f"{found['most_kl']:.3g}", f"{found['top1']:.2%}"]
    cells.append(f"{found['ppl_source']:.4g} → {found['ppl_result']:.4g}")
    return f"| {' | '.join(cells)} |"
