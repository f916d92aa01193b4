"""An inspected model and a forecast as lines of text, legible at 80 columns and without colour."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ftcli.cli.outcome import format_bytes
from ftcli.cli.rows import wrap

if TYPE_CHECKING:
    from ftcli.jobs.inspect import AdapterFacts, Inspection
    from ftcli.jobs.plan import TrainingPlan
    from ftcli.model.anatomy import Anatomy, ModelFinding
    from ftcli.model.dimensions import Dimensions
    from ftcli.model.forecast import Component
    from ftcli.model.lora import Moved

_BAR = 24
_GGUF_SHOWN = ("q8_0", "q6_k", "q5_k_m", "q4_k_m", "q3_k_m", "q2_k")
_TITLES = {
    "embedding": "embedding",
    "position": "positions",
    "attention": "attention",
    "ffn": "FFN",
    "norm": "norms",
    "head": "head",
    "other": "other",
}
_SPECIAL_SHOWN = 8


def list_inspection(
    inspection: Inspection, width: int, *, with_layers: bool = False, with_tensors: bool = False
) -> Iterator[str]:
    """The lines of everything that is known of a target."""
    source, anatomy = inspection.source, inspection.anatomy
    yield from wrap("target     ", source.target, width)
    yield from wrap("source     ", source.origin, width)
    for notice in source.notices:
        yield from wrap("notice: ", notice, width)
    if inspection.adapter:
        yield ""
        yield from _list_adapter(inspection.adapter, width)
    if anatomy:
        yield ""
        yield from _list_shape(anatomy, width)
        yield ""
        yield from _list_shares(anatomy)
        if anatomy.dimensions.n_heads:
            yield ""
            yield from _list_block(anatomy)
        yield ""
        yield from _list_sizes(inspection, anatomy, width)
    yield from _list_words(inspection, width)
    if inspection.lora:
        yield ""
        yield from _list_lora(inspection)
    if anatomy and with_layers:
        yield ""
        yield from _list_layers(anatomy)
    if anatomy and with_tensors:
        yield ""
        yield from _list_tensors(anatomy)
    yield ""
    yield from list_model_findings(inspection.findings, width)


def _list_shape(anatomy: Anatomy, width: int) -> Iterator[str]:
    d, counts = anatomy.dimensions, anatomy.parameters
    total = f"{counts.total:,} parameters"
    if counts.active != counts.total:
        total += f", of which a token passes through {counts.active:,}"
    yield from wrap("size       ", total, width)
    family = anatomy.family.title
    yield from wrap("family     ", f"{family}: {d.n_layers} layers of width {d.hidden:,}", width)
    if not d.n_heads:
        yield from wrap("           ", "heads, context and positions are only told by a config.json", width)
        return
    heads = f"{d.attention_kind}, {d.n_heads} query and {d.n_kv_heads} key/value heads of {d.head_dim}"
    yield from wrap("attention  ", heads, width)
    gate = "gated" if anatomy.family.is_gated else "not gated"
    ffn = f"{gate}, {d.activation}, width {d.ffn:,}"
    if d.experts:
        ffn = f"{d.experts.count} experts of width {d.experts.ffn:,}, {d.experts.per_token} for a token; {gate}"
    yield from wrap("FFN        ", ffn, width)
    eps = f", epsilon {d.norm_eps:g}" if d.norm_eps else ""
    yield from wrap("norms      ", f"{anatomy.family.norm_kind}{eps}", width)
    tie = "tied to the embedding" if anatomy.is_tied else "a matrix of its own"
    yield from wrap("head       ", f"{tie}, {d.vocab:,} rows", width)
    yield from wrap("context    ", _explain_context(d), width)
    yield from wrap("KV cache   ", _explain_cache(d), width)


def _explain_context(d: Dimensions) -> str:
    words = f"{d.context:,} tokens" if d.context else "not stated"
    if d.rope:
        words += f"; RoPE {d.rope.kind}, base {d.rope.theta:,.0f}"
        if factor := d.rope.scaling.get("factor"):
            words += f", stretched {factor:g} times" if isinstance(factor, int | float) else ""
    else:
        words += "; positions are learned"
    windows = [window for window in d.windows if window]
    if windows:
        words += f"; {len(windows)} of {d.n_layers} layers see {windows[0]:,} positions only"
    return words


def _explain_cache(d: Dimensions) -> str:
    words = f"{d.count_kv_bytes():,} bytes a token in 16 bits"
    return words + (f", {format_bytes(d.count_kv_bytes_at(d.context))} at full context" if d.context else "")


def _list_shares(anatomy: Anatomy) -> Iterator[str]:
    counts = anatomy.parameters
    for part, title in _TITLES.items():
        n = getattr(counts, part)
        if not n:
            continue
        share = n / counts.total
        note = f"  ({counts.bias:,} biases)" if part == "other" and counts.bias else ""
        yield f"{title:<11}{n:>18,}  {share:>6.1%}  {_draw_bar(share)}{note}"
    if anatomy.is_tied:
        yield f"{'head':<11}{'(the embedding)':>18}"


def _draw_bar(share: float) -> str:
    return "█" * round(share * _BAR) or "▏"


def _list_block(anatomy: Anatomy) -> Iterator[str]:
    yield f"each layer{'':<25}shape{'':<15}parameters"
    for tensor in anatomy.block:
        shape = "×".join(f"{size}" for size in tensor.shape)
        name = tensor.name.split(".0.", 1)[-1]
        yield f"  {name[:32]:<33}{shape:<16}{tensor.n_elements:>14,}"


def _list_sizes(inspection: Inspection, anatomy: Anatomy, width: int) -> Iterator[str]:
    table = inspection.source.table
    if table and table.files:
        types = ", ".join(f"{dtype} {format_bytes(size)}" for dtype, (_, size) in inspection.dtypes.items())
        files = "1 file" if len(table.files) == 1 else f"{len(table.files)} files"
        size_bytes = sum(file.size_bytes for file in table.files)
        yield from wrap("on disk    ", f"{format_bytes(size_bytes)} in {files}: {types}", width)
    sizes = anatomy.weigh()
    names = {"fp32": "fp32", "bf16": "bf16", "int8": "int8", "nf4": "NF4", "nf4_double": "NF4, double quantised"}
    cells = [f"{names[name]} {format_bytes(size)}" for name, size in sizes.items()]
    yield from wrap("in memory  ", " · ".join(cells), width)
    gguf = anatomy.weigh_gguf()
    cells = [f"{name} {format_bytes(gguf[name])}" for name in _GGUF_SHOWN]
    yield from wrap("as GGUF    ", " · ".join(cells), width)


def _list_words(inspection: Inspection, width: int) -> Iterator[str]:
    vocabulary = inspection.source.vocabulary
    if vocabulary:
        yield ""
        entries = f"{vocabulary.entries:,} entries" if vocabulary.entries else "entries are in tokenizer.json"
        yield from wrap("tokenizer  ", f"{entries}, {len(vocabulary.special):,} special tokens", width)
        roles = [
            f"{role.removesuffix('_token')} {text}" + ("" if token is None else f" ({token})")
            for role, (text, token) in vocabulary.roles.items()
        ]
        yield from wrap("           ", " · ".join(roles), width)
        others = [text for text in vocabulary.special.values() if text not in {t for t, _ in vocabulary.roles.values()}]
        if others:
            more = f" and {len(others) - _SPECIAL_SHOWN:,} more" if len(others) > _SPECIAL_SHOWN else ""
            yield from wrap("           ", " ".join(others[:_SPECIAL_SHOWN]) + more, width)
    if inspection.template:
        facts = inspection.template
        tools = "reads tools" if facts.reads_tools else "no tools"
        words = f"{facts.style}; {tools}; thinking: {facts.thinking}; system: {facts.system}"
        yield from wrap("template   ", words, width)
    elif vocabulary:
        yield from wrap("template   ", "none: a base model; set tokenizer.chat_template to train chats", width)
    if generation := inspection.source.generation:
        keys = ("eos_token_id", "temperature", "top_p", "top_k", "max_length", "repetition_penalty")
        given = [f"{key} {generation[key]}" for key in keys if key in generation]
        yield from wrap("generation ", " · ".join(given) or "no defaults", width)


def _list_lora(inspection: Inspection) -> Iterator[str]:
    r = next(iter(inspection.lora.values())).r
    yield f"LoRA, r = {r:<10}{'modules':>10}{'parameters':>16}{'adapter':>12}"
    for name, cost in inspection.lora.items():
        yield f"  {name[:20]:<20}{cost.modules:>9,}{cost.parameters:>16,}{format_bytes(cost.size_bytes):>12}"


def _list_adapter(adapter: AdapterFacts, width: int) -> Iterator[str]:
    config = adapter.config
    kinds = [name for name, key in (("rsLoRA", "use_rslora"), ("DoRA", "use_dora")) if config.get(key)]
    words = f"r {config.get('r')}, alpha {config.get('lora_alpha')}" + "".join(f", {kind}" for kind in kinds)
    if adapter.parameters is not None and adapter.size_bytes is not None:
        words += f"; {adapter.parameters:,} parameters, {format_bytes(adapter.size_bytes)}"
    yield from wrap("adapter    ", words, width)
    yield from wrap("targets    ", _join_names(config.get("target_modules")), width)
    if adapter.layers:
        yield from wrap("layers     ", _join_ranges(adapter.layers), width)
    if saved := config.get("modules_to_save"):
        yield from wrap("trained    ", f"whole: {_join_names(saved)}", width)
    if adapter.moved:
        yield ""
        yield from _list_movement(adapter.moved)


def _join_names(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _join_ranges(numbers: Sequence[int]) -> str:
    """``0-3, 7, 9-11``."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)


def _list_movement(moved: Sequence[Moved]) -> Iterator[str]:
    is_relative = all(entry.share is not None for entry in moved)
    title = "‖ΔW‖ / ‖W‖" if is_relative else "‖ΔW‖ (the base's weights are not here)"
    for label, groups in (("module", _group(moved, "module")), ("layer", _group(moved, "layer"))):
        values = {name: _combine(entries, is_relative=is_relative) for name, entries in groups.items()}
        largest = max((value for value in values.values() if math.isfinite(value)), default=0.0) or 1.0
        yield f"moved, by {label:<10}{title}"
        for name, value in values.items():
            shown = f"{value:.3%}" if is_relative else f"{value:.4g}"
            if math.isfinite(value):
                yield f"  {name:<22}{shown:>10}  {_draw_bar(value / largest)}"
            else:
                yield f"  {name:<22}{'not finite':>10}"


def _group(moved: Sequence[Moved], key: str) -> dict[str, list[Moved]]:
    groups: dict[str, list[Moved]] = {}
    for entry in sorted(moved, key=lambda entry: -1 if entry.layer is None else entry.layer):
        value = entry.layer if key == "layer" else entry.module.rpartition(".")[2]
        groups.setdefault("outside" if value is None else str(value), []).append(entry)
    return groups


def _combine(entries: Sequence[Moved], *, is_relative: bool) -> float:
    """The norms of several matrices as that of one large one."""
    delta = math.hypot(*(entry.delta_norm for entry in entries))
    weight = math.hypot(*(entry.weight_norm or 0.0 for entry in entries)) if is_relative else 1.0
    return delta / weight if weight else 0.0


def _list_layers(anatomy: Anatomy) -> Iterator[str]:
    yield f"{'layer':<7}{'attention':>15}{'FFN':>17}{'norms':>11}{'window':>9}"
    for row in anatomy.layers:
        window = f"{row.window:,}" if row.window else "all"
        yield f"{row.index:<7}{row.attention:>15,}{row.ffn:>17,}{row.norm:>11,}{window:>9}"


def _list_tensors(anatomy: Anatomy) -> Iterator[str]:
    for tensor in anatomy.tensors:
        shape = "×".join(map(str, tensor.shape))
        dtype, size = (tensor.entry.dtype, format_bytes(tensor.entry.size_bytes)) if tensor.entry else ("", "")
        yield f"{tensor.name:<52} {shape:<14} {dtype:<6}{size:>9}".rstrip()


def list_model_findings(findings: Sequence[ModelFinding], width: int) -> Iterator[str]:
    """What contradicts or surprises, each with what it means."""
    if not findings:
        yield "checks     nothing found"
    for finding in findings:
        yield from wrap("found:   ", finding.what, width)
        if finding.why:
            yield from wrap("         ", finding.why, width)


def list_plan(plan: TrainingPlan, width: int) -> Iterator[str]:
    """The lines of a forecast: component by component, the verdict, and what would make it fit."""
    t = plan.training
    how = f"{t.method}, {t.dtype}, {t.tokens:,} tokens a micro-batch, "
    how += "checkpointing" if t.gradient_checkpointing else "no checkpointing"
    yield from wrap("training   ", f"{how}, on {t.device.upper()}", width)
    if plan.data:
        yield from wrap("data       ", f"{plan.data.steps:,} steps; {plan.data.tokens:,} tokens an epoch", width)
    for notice in plan.notices:
        yield from wrap("notice: ", notice, width)
    yield ""
    yield from _list_components(plan.forecast.components, width)
    yield f"{'total':<24}{format_bytes(plan.forecast.total_bytes):>11}  at the peak: {plan.forecast.peak_phase}"
    if not plan.forecast.is_calibrated:
        yield from wrap("notice: ", "these formulas were not held against measurements on such a device yet", width)
    yield ""
    yield "on disk"
    yield from _list_components(plan.disk, width)
    if plan.budget_bytes is not None:
        yield ""
        yield from _list_verdict(plan, width)


def _list_components(components: Sequence[Component], width: int) -> Iterator[str]:
    for part in components:
        lines = textwrap.wrap(part.formula, max(20, width - 38)) or [""]
        yield f"{part.name:<24}{format_bytes(part.size_bytes):>11}  {lines[0]}".rstrip()
        for line in lines[1:]:
            yield " " * 37 + line


def _list_verdict(plan: TrainingPlan, width: int) -> Iterator[str]:
    budget, total = plan.budget_bytes or 0, plan.forecast.total_bytes
    there = format_bytes(budget)
    if plan.fits:
        yield f"fits       {format_bytes(budget - total)} of {there} are left"
        return
    yield f"does not fit: {format_bytes(total - budget)} more than the {there} that are there"
    for change in plan.changes:
        note = "" if change.keeps_result else "; changes what is learned"
        words = f"{change.key}: {change.value}  saves {format_bytes(change.saved_bytes)}{note}"
        yield from wrap("  → ", words, width)
    if plan.can_fit is False:
        yield from wrap("  ", "even with all of these it does not fit", width)
    elif plan.can_fit is None:
        yield from wrap("  ", "--fit SIZE tells what to change", width)
