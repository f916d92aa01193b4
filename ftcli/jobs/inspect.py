"""``ftcli inspect``: a model taken apart, what LoRA costs on it, what an adapter moved, and whether training fits."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ftcli.errors import ContentError, UsageError
from ftcli.events import OnEvent, Stage, ignore_event
from ftcli.jobs.source import ModelSource, describe_source, find_source, list_source_findings
from ftcli.model.anatomy import Anatomy, ModelFinding
from ftcli.model.lora import LoraCost, Moved, count_lora, list_adapted_layers, measure_movement, measure_norm
from ftcli.model.target import PRESETS
from ftcli.recipe import PeftSection
from ftcli.store.file import read_json
from ftcli.store.weight import WeightTable, read_weight_table

_STYLES = (
    ("Llama 3", "<|start_header_id|>"),
    ("ChatML", "<|im_start|>"),
    ("Gemma", "<start_of_turn>"),
    ("gpt-oss (harmony)", "<|channel|>"),
    ("Mistral", "[INST]"),
    ("Phi-3", "<|end|>"),
    ("Zephyr", "<|user|>"),
)


@dataclass(frozen=True)
class TemplateFacts:
    """What the text of a chat template gives away, without running it."""

    style: str
    reads_tools: bool
    thinking: str
    system: str


@dataclass(frozen=True)
class AdapterFacts:
    """An adapter: its settings, its size (None where its file was not read), and how far each module moved."""

    folder: Path
    base: str
    config: Mapping[str, Any]
    parameters: int | None
    size_bytes: int | None
    layers: tuple[int, ...]
    moved: tuple[Moved, ...]


@dataclass(frozen=True)
class Inspection:
    """Everything that ``inspect`` knows of a target; ``dtypes``: type on disk → tensors and bytes."""

    source: ModelSource
    anatomy: Anatomy | None
    template: TemplateFacts | None
    lora: Mapping[str, LoraCost]
    dtypes: Mapping[str, tuple[int, int]]
    adapter: AdapterFacts | None
    findings: tuple[ModelFinding, ...]


def inspect_target(
    target: str | None,
    *,
    peft: PeftSection | None = None,
    on_event: OnEvent = ignore_event,
) -> Inspection:
    """What the model, adapter or run that ``target`` names is made of; no weights are downloaded.

    Args:
        target: Hub id, folder, weight file, GGUF, adapter, run, ``package://``; None is the newest run.
        peft: rank, layers and targets whose cost is asked for beside the presets'.
        on_event: told of what takes time.

    Raises:
        FtcliError: there is no such target, or its files cannot be read.
    """
    source = find_source(target)
    anatomy = describe_source(source)
    adapter = _read_adapter(source, anatomy, on_event) if source.adapter else None
    if anatomy is None and adapter is None:
        raise ContentError("holds nothing that can be inspected", where=source.target)
    findings = [*(anatomy.findings if anatomy else ()), *list_source_findings(source, anatomy)]
    findings += _list_adapter_findings(adapter) if adapter else []
    template = source.vocabulary.template if source.vocabulary else None
    return Inspection(
        source=source,
        anatomy=anatomy,
        template=read_template_facts(template) if template else None,
        lora=_list_costs(anatomy, peft or PeftSection()) if anatomy else {},
        dtypes=_count_dtypes(source.table),
        adapter=adapter,
        findings=tuple(findings),
    )


def _list_costs(anatomy: Anatomy, peft: PeftSection) -> dict[str, LoraCost]:
    """Preset → cost, and that of the targets asked for; a family whose names say nothing has none."""
    costs = {}
    for preset in PRESETS:
        try:
            costs[preset] = count_lora(anatomy, peft.model_copy(update={"target_modules": preset}))
        except UsageError:
            if peft.layers_to_transform is not None:
                raise
    if peft.target_modules not in PRESETS:
        label = peft.target_modules if isinstance(peft.target_modules, str) else ", ".join(peft.target_modules)
        costs[label] = count_lora(anatomy, peft)
    return costs


def _count_dtypes(table: WeightTable | None) -> dict[str, tuple[int, int]]:
    tensors: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for entry in table.tensors if table else ():
        tensors[entry.dtype] += 1
        sizes[entry.dtype] += entry.size_bytes
    return {dtype: (tensors[dtype], size_bytes) for dtype, size_bytes in sizes.most_common()}


def read_template_facts(template: str) -> TemplateFacts:
    """What the Jinja text ``template`` writes and reads, as far as its words show."""
    style = next((name for name, mark in _STYLES if mark in template), "of its own")
    if "enable_thinking" in template:
        thinking = "switched by enable_thinking"
    else:
        thinking = "knows <think> blocks" if "<think>" in template or "reasoning" in template else "none"
    refusal = re.search(r"raise_exception\([^)]*[Ss]ystem", template)
    if refusal:
        system = "refused, or only in some places"
    else:
        is_named = "'system'" in template or '"system"' in template
        system = "has a rule of its own" if is_named else "written like any role"
    return TemplateFacts(style, bool(re.search(r"\btools\b", template)), thinking, system)


def _read_adapter(source: ModelSource, anatomy: Anatomy | None, on_event: OnEvent) -> AdapterFacts:
    folder = source.adapter
    assert folder is not None
    config = read_json(folder / "adapter_config.json") or {}
    names = [name for name in ("adapter_model.safetensors", "adapter_model.bin") if (folder / name).is_file()]
    if not names and not source.is_remote_adapter:
        raise ContentError("the adapter has no adapter_model.safetensors", where=str(folder))
    table = read_weight_table(folder / names[0]) if names else source.adapter_table
    moved: tuple[Moved, ...] = ()
    if table and names and names[0].endswith(".safetensors"):
        moved = measure_movement(table.tensors, folder, config, _measure_base(source, anatomy, on_event))
    entries = table.tensors if table else ()
    return AdapterFacts(
        folder=folder,
        base=str(config.get("base_model_name_or_path") or ""),
        config=config,
        parameters=sum(entry.n_elements for entry in entries) if table else None,
        size_bytes=table.size_bytes if table else None,
        layers=list_adapted_layers(entries),
        moved=moved,
    )


def _list_adapter_findings(adapter: AdapterFacts) -> list[ModelFinding]:
    broken = [entry.name for entry in adapter.moved if not math.isfinite(entry.delta_norm)]
    if not broken:
        return []
    what = f"NaN or infinity in {len(broken)} of {len(adapter.moved)} modules of the adapter, {broken[0]} first"
    return [ModelFinding("adapter_not_finite", what, "its training went wrong, or the file is damaged")]


def _measure_base(source: ModelSource, anatomy: Anatomy | None, on_event: OnEvent) -> Callable[[str], float | None]:
    """Full name of a module → ‖W‖ of the base, where its weights are here."""
    folder = source.folder
    if anatomy is None or source.table is None or folder is None:
        return lambda name: None
    entries = {tensor.name: tensor.entry for tensor in anatomy.tensors}
    on_event(Stage("norms", "of the weights that the adapter changes"))

    def measure(name: str) -> float | None:
        entry = entries.get(f"{name}.weight")
        return measure_norm(folder, entry) if entry and (folder / entry.file).is_file() else None

    return measure


def inspection_to_json(inspection: Inspection) -> dict[str, Any]:
    """The document of ``--json``, without the parts that belong to a forecast."""
    source, anatomy = inspection.source, inspection.anatomy
    document: dict[str, Any] = {"target": source.target, "origin": source.origin, "notices": list(source.notices)}
    if anatomy:
        d = anatomy.dimensions
        document |= {
            "family": anatomy.family.title,
            "parameters": asdict(anatomy.parameters),
            "tied": anatomy.is_tied,
            "layers": d.n_layers,
            "hidden_size": d.hidden,
            "intermediate_size": d.ffn,
            "attention": {
                "kind": d.attention_kind if d.n_heads else None,
                "heads": d.n_heads or None,
                "kv_heads": d.n_kv_heads or None,
                "head_dim": d.head_dim or None,
                "windows": sorted({w for w in d.windows if w}) or None,
            },
            "vocabulary": d.vocab,
            "context": d.context,
            "rope": asdict(d.rope) if d.rope else None,
            "experts": asdict(d.experts) if d.experts else None,
            "kv_cache": {
                "per_token_bytes": d.count_kv_bytes(),
                "full_context_bytes": d.count_kv_bytes_at(d.context) if d.context else None,
            },
            "lora": {name: asdict(cost) | {"size_bytes": cost.size_bytes} for name, cost in inspection.lora.items()},
            "memory": {
                **{f"{name}_bytes": size for name, size in anatomy.weigh().items()},
                **{f"gguf_{name}_bytes": size for name, size in anatomy.weigh_gguf().items()},
            },
        }
    document |= {
        "files": [asdict(entry) for entry in (source.table.files if source.table else ())],
        "dtypes": {name: {"tensors": n, "bytes": size} for name, (n, size) in inspection.dtypes.items()},
        "tokenizer": _vocabulary_to_json(inspection),
        "generation": dict(source.generation),
        "adapter": _adapter_to_json(inspection.adapter),
        "findings": [asdict(finding) for finding in inspection.findings],
    }
    return document


def _vocabulary_to_json(inspection: Inspection) -> dict[str, Any] | None:
    vocabulary = inspection.source.vocabulary
    if vocabulary is None:
        return None
    return {
        "entries": vocabulary.entries,
        "special": {str(token): text for token, text in vocabulary.special.items()},
        "roles": {role: {"token": text, "id": token} for role, (text, token) in vocabulary.roles.items()},
        "template": asdict(inspection.template) if inspection.template else None,
    }


def _adapter_to_json(adapter: AdapterFacts | None) -> dict[str, Any] | None:
    if adapter is None:
        return None
    keys = ("r", "lora_alpha", "target_modules", "use_rslora", "use_dora", "modules_to_save", "rank_pattern")
    return {
        "base": adapter.base,
        **{key: adapter.config.get(key) for key in keys},
        "parameters": adapter.parameters,
        "size_bytes": adapter.size_bytes,
        "layers": list(adapter.layers),
        "moved": [asdict(entry) | {"share": entry.share} for entry in adapter.moved],
    }
