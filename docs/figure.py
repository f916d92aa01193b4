"""The figures in docs/concepts: each is computed by ftcli from the bundled catalog, or from files that are here.

A page holds ``<!--=NAME ARGUMENT…-->value<!--/-->``; ``fill`` writes the value again, from ``FIGURES[NAME]``.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

from ftcli.cli.console import format_bytes
from ftcli.model.anatomy import Anatomy
from ftcli.model.catalog import find_entry
from ftcli.model.demand import build_training, describe_files, measure_shape
from ftcli.model.forecast import forecast_memory
from ftcli.model.lora import count_lora
from ftcli.recipe import PeftSection

MODELS = {
    "gpt2": "openai-community/gpt2",
    "llama2-7b": "meta-llama/Llama-2-7b-hf",
    "llama3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama3-70b": "meta-llama/Meta-Llama-3-70B",
    "llama3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama3.2-3b": "meta-llama/Llama-3.2-3B",
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
    "mixtral-8x7b": "mistralai/Mixtral-8x7B-v0.1",
    "phi3-mini": "microsoft/Phi-3-mini-4k-instruct",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "qwen3-30b-a3b": "Qwen/Qwen3-30B-A3B",
    "gemma2-9b": "google/gemma-2-9b",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
}
SENTENCE = "Fine-tuning is powerful"
_ROOT = Path(__file__).resolve().parents[1]
_MARK = re.compile(r"<!--=(?P<call>[^>]+?)-->(?P<value>.*?)<!--/-->", re.S)


def fill(text: str, *, where: str) -> str:
    """``text`` with every figure computed anew; one that cannot be computed here stands as it is."""

    def replace(mark: re.Match[str]) -> str:
        name, *arguments = shlex.split(mark["call"])
        if name not in FIGURES:
            raise SystemExit(f"{where}: no figure is called {name}")
        value = FIGURES[name](*arguments)
        if mark.start() and text[mark.start() - 1] == "\n" and value and not value.startswith("\n"):
            raise SystemExit(f"{where}: a line begins with the figure {name}: Markdown would take it for HTML")
        return f"<!--={mark['call']}-->{mark['value'] if value is None else value}<!--/-->"

    return _MARK.sub(replace, text)


@cache
def describe(model: str) -> Anatomy:
    """The anatomy of a model of ``MODELS``, from the catalog."""
    entry = find_entry(MODELS[model])
    assert entry is not None
    return describe_files(entry.config, None, where=entry.id)


def count(model: str, part: str = "total") -> str:
    return f"{getattr(describe(model).parameters, part):,}"


def count_layer(model: str, part: str) -> str:
    return f"{getattr(describe(model).layers[0], part):,}"


def layer_millions(model: str, part: str) -> str:
    return f"{getattr(describe(model).layers[0], part) / 1e6:,.1f} M"


def share(model: str, *parts: str) -> str:
    parameters = describe(model).parameters
    return f"{sum(getattr(parameters, part) for part in parts) / parameters.total:.1%}".replace("%", " %")


def dim(model: str, name: str) -> str:
    value = getattr(describe(model).dimensions, name)
    return f"{value:,}" if isinstance(value, int) else str(value)


def divide_ffn(model: str) -> str:
    layer = describe(model).layers[0]
    return f"{layer.ffn / layer.attention:.1f}"


def weigh(model: str, precision: str) -> str:
    return format_bytes(_weigh(model, precision))


def count_bits(model: str, precision: str) -> str:
    return f"{8 * _weigh(model, precision) / describe(model).parameters.total:.2f}"


def _weigh(model: str, precision: str) -> int:
    anatomy = describe(model)
    return {**anatomy.weigh_gguf(), **anatomy.weigh()}[precision]


def count_kv(model: str) -> str:
    return f"{describe(model).dimensions.count_kv_bytes():,}"


def weigh_kv(model: str, n_tokens: str) -> str:
    return format_bytes(describe(model).dimensions.count_kv_bytes_at(int(n_tokens)))


def count_adapter(model: str, targets: str = "all-linear", r: str = "16") -> str:
    return f"{count_lora(describe(model), PeftSection(r=int(r), target_modules=targets)).parameters:,}"


def weigh_adapter(model: str, targets: str = "all-linear", r: str = "16") -> str:
    return format_bytes(count_lora(describe(model), PeftSection(r=int(r), target_modules=targets)).size_bytes)


def forecast(model: str, method: str, tokens: str, part: str = "total") -> str:
    """Bytes of one micro-batch of ``tokens`` on CUDA with checkpointing; ``part`` is a component's name."""
    anatomy = describe(model)
    cost = None if method == "full" else count_lora(anatomy, PeftSection())
    plan = forecast_memory(measure_shape(anatomy), build_training(method, cost, sequence=int(tokens), batch=1))  # type: ignore[arg-type]
    sizes = {component.name: component.size_bytes for component in plan.components} | {"total": plan.total_bytes}
    return format_bytes(sizes[part])


def count_logits(model: str, tokens: str) -> str:
    return format_bytes(4 * int(tokens) * describe(model).dimensions.vocab)


def measure_wave(model: str) -> str:
    """Tokens after which the slowest rotary pair comes round: 2π · base^((d − 2) / d), RoFormer §3.2.2."""
    d, rope = describe(model).dimensions.head_dim, describe(model).dimensions.rope
    assert rope is not None
    return f"{2 * math.pi * rope.theta ** ((d - 2) / d):,.0f}"


@cache
def list_ids(tokenizer: str) -> str | None:
    """Ids of ``SENTENCE``; None where the tokenizer's files are not here."""
    from tokenizers import Tokenizer

    for root in (os.environ.get("FTCLI_TEST_ASSETS"), _ROOT.parent / "shared" / "assets"):
        path = Path(root or "", "tokenizers", tokenizer, "tokenizer.json")
        if path.is_file():
            return f"`{Tokenizer.from_file(str(path)).encode(SENTENCE).ids}`"
    return None


def count_per_word() -> str | None:
    """Tokens per word of the quickstart's rows with the embedded model's tokenizer; None where that is not here."""
    from ftcli.errors import FtcliError
    from ftcli.jobs.tokenize import tokenize

    try:
        result = tokenize(str(_ROOT / "recipes/quickstart.yaml"))
    except FtcliError:
        return None
    return f"{result.report.parts[0].tokens_per_word:.2f}"


def tabulate(head: str, rows: Iterable[Iterable[str]]) -> str:
    names = head.split(" | ")
    lines = [names, ["---", *["---:"] * (len(names) - 1)], *rows]
    return "\n" + "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def tabulate_vocabularies() -> str:
    models = ("gpt2", "mistral-7b", "llama3-8b", "llama3.2-1b", "qwen2.5-7b", "qwen3-0.6b", "smollm2-135m")
    rows = ([MODELS[m], dim(m, "vocab"), count(m, "embedding"), share(m, "embedding")] for m in models)
    return tabulate("model | rows | parameters of the embedding | share", rows)


def tabulate_heads() -> str:
    models = ("llama2-7b", "mistral-7b", "llama3.1-8b", "qwen2.5-7b", "qwen3-8b", "smollm2-135m")
    rows = (
        [MODELS[m], describe(m).dimensions.attention_kind, f"{dim(m, 'n_heads')} / {dim(m, 'n_kv_heads')}",
         dim(m, "head_dim"), count_kv(m), weigh_kv(m, "4096")]
        for m in models
    )  # fmt: skip
    return tabulate("model | kind | query / KV heads | head size | cache, bytes a token | at 4,096 tokens", rows)


def tabulate_tied() -> str:
    models = ("gpt2", "llama3.2-1b", "llama3.2-3b", "llama3.1-8b", "llama3-70b", "qwen3-0.6b", "qwen3-8b", "gemma2-9b")
    rows = (
        [MODELS[m], "yes" if describe(m).is_tied else "no", count(m), share(m, "embedding", "head")] for m in models
    )
    return tabulate("model | tied | parameters | embedding and head", rows)


def tabulate_precisions(model: str) -> str:
    names = {
        "fp32": "float32", "bf16": "bfloat16, float16", "int8": "int8 (bitsandbytes)", "nf4": "NF4",
        "nf4_double": "NF4, double quantised", "q8_0": "GGUF Q8_0", "q6_k": "GGUF Q6_K", "q5_k_m": "GGUF Q5_K_M",
        "q4_k_m": "GGUF Q4_K_M", "q3_k_m": "GGUF Q3_K_M", "q2_k": "GGUF Q2_K",
    }  # fmt: skip
    rows = ([name, weigh(model, key), count_bits(model, key)] for key, name in names.items())
    return tabulate("precision | bytes | bits a parameter", rows)


def tabulate_training(model: str, tokens: str) -> str:
    parts = ("weights", "quantization constants", "lora", "gradients", "optimizer", "activations", "logits", "total")
    methods = ("qlora", "lora", "full")
    rows = ([part, *(forecast(model, method, tokens, part) for method in methods)] for part in parts)
    return tabulate("part | QLoRA | LoRA | full", rows)


def tabulate_adapters() -> str:
    models = ("llama3-8b", "llama3-70b", "llama3.2-1b", "mistral-7b", "phi3-mini", "qwen2.5-7b")
    presets = ("attn", "attn+gate_up", "all-linear")
    rows = ([MODELS[m], *(count_adapter(m, preset) for preset in presets)] for m in models)
    return tabulate("model | attn | attn+gate_up | all-linear", rows)


def tabulate_quantization() -> str | None:
    """What benchmarks/quantize.py found last."""
    path = _ROOT / "benchmarks" / "results" / "quantize-cpu.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    head = "form | MB | bits/weight | KL | top-1 | perplexity"
    rows = [["16 bits", "", "16.00", "", "", f"{found['perplexity']:.2f}"]]
    for name, form in sorted(found["forms"].items(), key=lambda pair: pair[1]["kl"]):
        size = [f"{form['bytes'] / 1e6:.1f}", f"{form['bits_per_weight']:.2f}"] if name != "rtn" else ["", ""]
        kl = [f"{form['kl']:.4f}", f"{form['top1']:.1%}", f"{form['perplexity']:.2f}"]
        rows.append([_FORMS.get(name, name), *size, *kl])
    date, n_tokens = found["date"], found["n_tokens"]
    return tabulate(head, rows) + f"\n{n_tokens:,} trained tokens, {date}.\n"


def render_template(name: str) -> str:
    """A conversation in a bundled template; what is trained is between ``⟦`` and ``⟧``."""
    from ftcli.data.template import ChatTemplate, read_template

    begin, end = {
        "llama3": ("<|begin_of_text|>", "<|eot_id|>"),
        "chatml": ("", "<|im_end|>"),
        "mistral": ("<s>", "</s>"),
    }[name]
    template = ChatTemplate(read_template(name), {"bos_token": begin, "eos_token": end})
    question = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Capital of France?"}]
    prompt = template.render(question, prompt=True)
    answer, rest = template.render([*question, {"role": "assistant", "content": "Paris."}])[len(prompt) :].split(end, 1)
    return f"\n```\n{prompt}⟦{answer}{end}⟧{rest.rstrip()}\n```\n"


_FORMS = {"rtn": "round to nearest, 4 bits", "gptq": "GPTQ", "awq": "AWQ", "nf4": "NF4", "int8": "int8"}
_FORMS |= {"gptq, tune 0": "GPTQ, nothing learned", "gptq, 8 bits": "GPTQ in 8 bits"}
_FORMS |= {"awq, tune 0": "AWQ, nothing learned"}
FIGURES: dict[str, Callable[..., str | None]] = {
    "quantization": tabulate_quantization,
    "count": count,
    "count-layer": count_layer,
    "layer-millions": layer_millions,
    "share": share,
    "dim": dim,
    "ffn-over-attention": divide_ffn,
    "weight": weigh,
    "bits": count_bits,
    "kv-at": weigh_kv,
    "lora-size": weigh_adapter,
    "logits": count_logits,
    "wave": measure_wave,
    "ids": list_ids,
    "tokens-per-word": count_per_word,
    "vocabularies": tabulate_vocabularies,
    "heads": tabulate_heads,
    "tied": tabulate_tied,
    "precisions": tabulate_precisions,
    "training": tabulate_training,
    "adapters": tabulate_adapters,
    "template": render_template,
}
