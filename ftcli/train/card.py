"""The README.md of a run: what was trained from what, what came of it, and how to load it; fit to be published.

Paths of this machine are not in it: of a local file it tells the name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ftcli.recipe import Recipe, load_recipe
from ftcli.store.card import build_front, is_local, list_use
from ftcli.store.file import write_text
from ftcli.store.run import RunFolder, read_manifest
from ftcli.train.summary import RunSummary, summarize_run


def write_card(run: RunFolder) -> None:
    """Nothing; ``README.md`` tells what the run has made.

    Raises:
        DiskError: it cannot be written.
    """
    write_text(run.card, build_card(run))


def build_card(run: RunFolder, *, repository: str | None = None) -> str:
    """Markdown with the front matter that the Hub reads.

    ``repository``: on the Hub, where what was trained will lie by itself; None: beside the card, in the run folder.

    Raises:
        ContentError: it is no run folder.
    """
    manifest, summary, recipe = read_manifest(run), summarize_run(run), load_recipe(run.recipe).recipe
    name, is_full = run.path.resolve().name, recipe.peft is None
    base = name_source(summary.base)
    tags = ("ftcli", "full") if is_full else ("ftcli", "qlora" if recipe.is_4bit else "lora")
    what = "fine-tuned" if is_full else "a LoRA adapter"
    lines = [
        *build_front(summary.base, library="transformers" if is_full else "peft", tags=tags),
        f"# {name}",
        "",
        f"`{base}`, {what if is_full else f'with {what}'}: {summary.n_trained_tokens:,} trained tokens in "
        f"{summary.steps:,} steps, by ftcli {manifest.get('versions', {}).get('ftcli', '')}.",
        "",
        *_describe_results(summary),
        *_describe_data(recipe, manifest),
        *_describe_training(recipe, manifest, summary),
        *([] if repository else ["The whole recipe is in `recipe.yaml`, hashes and versions in `manifest.json`.", ""]),
        *_describe_use(base, repository or ("model" if is_full else "adapter"), is_full=is_full),
    ]
    return "\n".join(lines)


def name_source(reference: str) -> str:
    """A Hub id as it is; of a path its last part, as the rest says nothing to others."""
    return Path(reference).name if is_local(reference) else reference


def _describe_results(summary: RunSummary) -> Iterator[str]:
    yield from ("## Results", "", "| rows | before | after |", "|---|---|---|")
    if summary.loss_first is not None and summary.loss_last is not None:
        yield f"| training, loss | {summary.loss_first:.4f} (first step) | {summary.loss_last:.4f} (last step) |"
    for entry in summary.evals:
        yield f"| {entry.dataset}, loss | {_format(entry.loss_before, '.4f')} | {_format(entry.loss_after, '.4f')} |"
        if entry.score_after is not None:
            before, after = _format(entry.score_before, ".1%"), _format(entry.score_after, ".1%")
            yield f"| {entry.dataset}, {entry.metric} of {entry.n_rows} | {before} | {after} |"
    yield from ("", "Losses are in nats a trained token.")
    if summary.artifact_step not in (None, summary.steps):
        yield f"The weights are those of step {summary.artifact_step}, the best in {summary.best_metric}."
    yield ""


def _format(value: float | None, pattern: str) -> str:
    return "" if value is None else format(value, pattern)


def _describe_data(recipe: Recipe, manifest: Mapping[str, Any]) -> Iterator[str]:
    yield from ("## Data", "", "| set | rows | trained tokens |", "|---|---|---|")
    for name, report in (manifest.get("data") or {}).items():
        yield f"| {name} | {report.get('n_rows', 0):,} | {report.get('n_target_tokens', 0):,} |"
    files = ", ".join(f"`{name_source(section.path)}`" for section in recipe.datasets)
    template = "the base model's own" if recipe.tokenizer.chat_template == "auto" else None
    template = template or f"`{name_source(recipe.tokenizer.chat_template)}`"
    yield from ("", f"From {files}; chat template: {template}.")
    if recipe.tokenizer.add_tokens:
        yield f"New tokens: {', '.join(f'`{token}`' for token in recipe.tokenizer.add_tokens)}."
    yield ""


def _describe_training(recipe: Recipe, manifest: Mapping[str, Any], summary: RunSummary) -> Iterator[str]:
    train, n_processes = recipe.train, int(manifest.get("processes", 1))
    rows = train.per_device_train_batch_size * train.gradient_accumulation_steps * n_processes
    method = "full fine-tuning"
    if recipe.peft:
        targets = recipe.peft.target_modules
        named = targets if isinstance(targets, str) else ", ".join(targets)
        method = f"LoRA on {named}: r {recipe.peft.r}, alpha {recipe.peft.lora_alpha:g}"
        method += f", dropout {recipe.peft.lora_dropout:g}" if recipe.peft.lora_dropout else ""
    facts = {
        "method": method + (", 4-bit base (NF4)" if recipe.is_4bit else ""),
        "learning rate": f"{train.learning_rate:g}, {train.lr_scheduler_type}",
        "step": f"{rows} {'packs' if recipe.data.packing else 'rows'} of up to {recipe.data.max_length:,} tokens",
        "steps": f"{summary.steps:,} ({summary.epochs:.4g} epochs)",
        "seed": str(train.seed),
        "precision": str(manifest.get("dtype")),
        "trained parameters": f"{summary.trainable_parameters or 0:,}",
    }
    yield from ("## Training", "", "| | |", "|---|---|")
    yield from (f"| {label} | {text} |" for label, text in facts.items())
    yield ""


def _describe_use(base: str, path: str, *, is_full: bool) -> Iterator[str]:
    code = list_use(path) if is_full else list_use(path, adapter_on=base)
    yield from ("## Use", "", "```python", *code, "```", "")
    yield from ("As a GGUF file, for llama.cpp and Ollama:", "", "```console")
    yield f"$ ftcli export {'.' if path in ('model', 'adapter') else path} --gguf q4_k_m"
    yield "$ llama-cli -m gguf/*.gguf -cnv"
    yield from ("$ ollama create mine -f gguf/Modelfile && ollama run mine", "```", "")
