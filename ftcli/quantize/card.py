"""The README.md of a quantised model: what it is, how it was measured, and who loads it with which packages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ftcli.quantize.method import Method
from ftcli.quantize.verify import Verification
from ftcli.store.card import build_front

_LOAD = (
    "from transformers import AutoModelForCausalLM, AutoTokenizer",
    "",
    'path = "."  # this folder',
    'model = AutoModelForCausalLM.from_pretrained(path, device_map="auto")',
    "tokenizer = AutoTokenizer.from_pretrained(path)",
)
_MEANING = (
    "KL is how far the next-token distribution of this model is from that of its source, in nats per trained token,",
    "and the bound is what the method may lose; top-1 is the share of tokens for which both find the same one the most",
    "probable. A block's error is that of what it adds, relative to that, given the source's input.",
)


def build_card(
    name: str, manifest: Mapping[str, Any], method: Method, found: Verification | None, *, datasets: Sequence[str]
) -> str:
    """Markdown with the front matter that the Hub reads."""
    base = (manifest.get("base") or {}).get("id", "")
    is_tuned = bool(manifest["data_sha256"])
    origin = f"`{base}`, fine-tuned with ftcli" if is_tuned else f"`{name}`"
    tags = ("ftcli", manifest["method"], f"{manifest['bits']}-bit")
    lines = [*build_front(base, tags=tags), f"# {name} ({method.title})", ""]
    group = f", groups of {manifest['group_size']}" if manifest["group_size"] else ""
    lines += [f"{origin}, with its linear layers in {manifest['bits']} bits{group}:"]
    lines += [f"{manifest['bytes'] / 1e6:,.1f} MB, {manifest['bits_per_weight']:.2f} bits per weight in all.", ""]
    if datasets:
        lines += [f"Trained on: {', '.join(f'`{path}`' for path in datasets)}.", ""]
    if calibration := manifest["calibration"]:
        tuned = f", {manifest['tune']} steps of learned rounding" if manifest["tune"] else ""
        lines += [f"Rounding was fitted to {calibration['text']}{tuned}.", ""]
    lines += ["## Verification", "", *_describe(found), "", "## Use", "", "| loads it | needs |", "|---|---|"]
    lines += [f"| {loader} | `{needs}` |" for loader, needs in method.loaders]
    lines += ["", "```python", *_LOAD, "```", "", "```console", "$ vllm serve .", "```"]
    lines += ["", "On a GPU without bfloat16 (before Ampere) add `--dtype half`."] if method.is_fitted else []
    return "\n".join([*lines, ""])


def _describe(found: Verification | None) -> list[str]:
    if found is None:
        return ["Not verified."]
    if found.problem:
        return [f"**Failed**: {found.problem}."]
    if found.verdict is None:
        return [f"Its files are sound; it was not compared with its source: {found.skipped}."]
    verdict = found.verdict
    kl = verdict.comparison
    cells = [str(kl.n_tokens), f"{kl.kl:.5f}", f"{verdict.most_kl:.3f}", f"{kl.top1:.2%}"]
    cells += [f"{kl.ppl_source:.4g}", f"{kl.ppl_result:.4g}"]
    lines = [
        "| tokens | KL (nats) | bound | top-1 | perplexity, source | perplexity, this |",
        "|---|---|---|---|---|---|",
    ]
    lines += [f"| {' | '.join(cells)} |", ""]
    if found.worst:
        lines += [f"Worst blocks: {list_worst(found)}.", ""]
    failed = [] if found.has_passed else ["**Failed**: this is not the model that was quantised any more.", ""]
    return [*lines, *failed, *_MEANING]


def list_worst(found: Verification, n: int = 3) -> str:
    """``model.layers.2 8.1%, model.layers.0 7.7%``, of at most ``n`` blocks."""
    return ", ".join(f"{block.name} {block.error:.1%}" for block in found.worst[:n])
