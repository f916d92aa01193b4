"""What a model is made of: every parameter counted and placed, from its config, its headers, or both.

    config ─▶ dimensions ─▶ planned tensors ─┐
                                             ├─▶ anatomy: parts, layers, sizes, findings
    weight files ─▶ headers ─▶ found tensors ┘

Where headers are there, they are what is counted, and what the config says of them is checked. No torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ftcli.errors import ContentError
from ftcli.model.dimensions import Dimensions
from ftcli.model.layout import (
    FAMILIES,
    Family,
    PlacedTensor,
    Shape,
    complete_name,
    find_family,
    locate_tensor,
    plan_tensors,
    translate_gguf_name,
)
from ftcli.model.precision import Ratios, shares_values, weigh, weigh_gguf
from ftcli.model.quantization import list_unpacked, parse_packing
from ftcli.store.tensor import TensorEntry

PARTS = ("embedding", "position", "attention", "ffn", "norm", "head", "other")
_SHOWN = 3


@dataclass(frozen=True)
class Parameters:
    """How many parameters each part has; ``active`` are those that one token passes through."""

    total: int
    embedding: int
    position: int
    attention: int
    ffn: int
    norm: int
    head: int
    other: int
    active: int
    bias: int


@dataclass(frozen=True)
class LayerRow:
    """One block: its parameters by part, and the positions that it sees (None: all)."""

    index: int
    attention: int
    ffn: int
    norm: int
    other: int
    window: int | None


@dataclass(frozen=True)
class ModelFinding:
    """Something that a person should know of the files: what it is, and what it means."""

    code: str
    what: str
    why: str = ""


@dataclass(frozen=True)
class Anatomy:
    """A model, taken apart."""

    dimensions: Dimensions
    parameters: Parameters
    tensors: tuple[PlacedTensor, ...]
    layers: tuple[LayerRow, ...]
    findings: tuple[ModelFinding, ...]

    @property
    def family(self) -> Family:
        return find_family(self.dimensions.family)

    @property
    def is_tied(self) -> bool:
        return self.dimensions.is_tied

    @property
    def block(self) -> tuple[PlacedTensor, ...]:
        """The tensors of the first block; of a mixture's experts, the first one."""
        first = [tensor for tensor in self.tensors if tensor.place.layer == 0]
        return tuple(tensor for tensor in first if ".experts." not in tensor.name or ".experts.0." in tensor.name)

    def weigh(self) -> dict[str, int]:
        """Precision → bytes of the whole model: fp32, bf16, int8, nf4, nf4_double."""
        return weigh(self.tensors)

    def weigh_gguf(self) -> dict[str, int]:
        """GGUF type → bytes of the tensors in such a file."""
        d = self.dimensions
        queries_per_kv = d.n_heads // max(1, d.n_kv_heads)
        ratios = Ratios(
            n_layers=d.n_layers,
            queries_per_kv=queries_per_kv,
            n_experts=d.experts.count if d.experts else 0,
            is_tied=self.is_tied,
            shares_values=shares_values(d.family, d.n_layers, queries_per_kv),
        )
        return weigh_gguf(self.tensors, ratios)


def describe_model(
    dimensions: Dimensions,
    entries: Sequence[TensorEntry] | None = None,
    *,
    config: Mapping[str, Any] | None = None,
    is_gguf: bool = False,
    where: str = "",
) -> Anatomy:
    """The anatomy of a model.

    Args:
        dimensions: what its config states.
        entries: the tensors that its files hold, None if they were not read.
        config: the ``config.json`` itself, for what contradicts it.
        is_gguf: whether names are GGUF's.
        where: the model's name, for errors.

    Raises:
        ContentError: a family that is not known, and no headers to count.
    """
    planned = plan_tensors(dimensions)
    findings = list_config_findings(config or {})
    packed = (config or {}).get("quantization_config") if not is_gguf else None
    if packed and entries and not planned:
        entries = _restore_entries(entries, packed)
    if entries and not (packed and planned):
        tensors = _place_entries(entries, dimensions, planned, is_gguf=is_gguf)
        findings += compare_tensors(tensors, planned, dimensions, is_gguf=is_gguf)
        if dimensions.is_tied:
            tensors = [t for t in tensors if t.place.part != "head" or t.name.endswith(".bias")]
    elif planned:
        tensors = [PlacedTensor(name, shape, locate_tensor(name)) for name, shape in planned.items()]
    else:
        raise ContentError(
            f"the family {dimensions.family or '(none)'!r} is not known, and no weights are there to count",
            where=where,
            hint=f"known: {', '.join(FAMILIES)}; with the headers of its weights any family is counted",
        )
    tensors = [tensor for tensor in tensors if tensor.place.part != "buffer"]
    return Anatomy(
        dimensions=dimensions,
        parameters=_count_parameters(tensors, dimensions),
        tensors=tuple(tensors),
        layers=_list_layers(tensors, dimensions),
        findings=tuple(findings),
    )


def _restore_entries(entries: Sequence[TensorEntry], section: Any) -> Sequence[TensorEntry]:
    """The weights that packed ones stand for; the entries as they are where that is not known."""
    try:
        packing = parse_packing(section, "")
    except ContentError:
        return entries
    return list_unpacked(entries, packing) if packing else entries


def _place_entries(
    entries: Sequence[TensorEntry], dimensions: Dimensions, planned: Mapping[str, Shape], *, is_gguf: bool
) -> list[PlacedTensor]:
    is_fused = find_family(dimensions.family).fused
    placed = []
    for entry in entries:
        if entry.shares:
            continue
        place = locate_tensor(entry.name)
        name = translate_gguf_name(entry.name, is_fused=is_fused) if is_gguf else complete_name(entry.name, planned)
        placed.append(PlacedTensor(name, entry.shape, place, entry))
    return placed


def _count_parameters(tensors: Sequence[PlacedTensor], d: Dimensions) -> Parameters:
    counts: Counter[str] = Counter()
    expert = 0
    for tensor in tensors:
        counts[tensor.place.part] += tensor.n_elements
        if _is_expert(tensor):
            expert += tensor.n_elements
    total = sum(counts.values())
    idle = expert - expert * d.experts.per_token // d.experts.count if d.experts else 0
    bias = sum(tensor.n_elements for tensor in tensors if tensor.name.endswith(".bias"))
    return Parameters(total=total, **{part: counts[part] for part in PARTS}, active=total - idle, bias=bias)


def _is_expert(tensor: PlacedTensor) -> bool:
    """Whether the tensor belongs to the experts of which a token sees some, not to a shared one or the router."""
    name = tensor.name
    return ".experts." in name or "_exps" in name


def _list_layers(tensors: Sequence[PlacedTensor], d: Dimensions) -> tuple[LayerRow, ...]:
    layers: dict[int, Counter[str]] = {}
    for tensor in tensors:
        if tensor.place.layer is not None:
            layers.setdefault(tensor.place.layer, Counter())[tensor.place.part] += tensor.n_elements
    return tuple(
        LayerRow(
            index=layer,
            attention=counts["attention"],
            ffn=counts["ffn"],
            norm=counts["norm"],
            other=sum(counts.values()) - counts["attention"] - counts["ffn"] - counts["norm"],
            window=d.windows[layer] if layer < len(d.windows) else None,
        )
        for layer, counts in sorted(layers.items())
    )


def list_config_findings(config: Mapping[str, Any]) -> list[ModelFinding]:
    """What the config itself gives away: Python code of its own, weights that are packed."""
    findings = []
    if config.get("auto_map"):
        findings.append(
            ModelFinding(
                "custom_code",
                "the model brings Python code of its own (auto_map)",
                "loading it runs that code; ftcli does so only with model.trust_remote_code: true",
            )
        )
    packed = config.get("quantization_config")
    if isinstance(packed, Mapping):
        method = packed.get("quant_method") or "unknown"
        findings.append(
            ModelFinding(
                "quantized",
                f"the weights on disk are quantised already ({str(method)[:40]})",
                "parameters are counted as those that they stand for; fine-tune the original 16-bit model instead",
            )
        )
    return findings


def compare_tensors(
    tensors: Sequence[PlacedTensor], planned: Mapping[str, Shape], d: Dimensions, *, is_gguf: bool
) -> list[ModelFinding]:
    """Where the files contradict the config: a head that is or is not there, missing, unknown, misshapen tensors."""
    found = {tensor.name: tensor for tensor in tensors}
    findings = _compare_head(found, d)
    if not planned:
        return findings
    wrong = [
        f"{name} is {_join(found[name].shape)}, config.json says {_join(shape)}"
        for name, shape in planned.items()
        if name in found and found[name].shape != shape
    ]
    if wrong:
        what = f"{len(wrong):,} tensors have another shape than the config says: {_some(wrong)}"
        findings.append(ModelFinding("shape", what, "the model cannot be loaded"))
    if is_gguf or any(tensor.name.endswith(("experts.gate_up_proj", "experts.down_proj")) for tensor in tensors):
        return findings
    if missing := [name for name in planned if name not in found and not name.startswith("lm_head.")]:
        what = f"{len(missing):,} tensors of the model are in no file: {_some(missing)}"
        findings.append(ModelFinding("missing", what, "transformers would fill them with random numbers"))
    known = {"embedding", "position", "attention", "ffn", "norm"}
    unknown = [name for name, t in found.items() if name not in planned and t.place.part in known]
    if unknown:
        what = f"{len(unknown):,} tensors are not part of what the config describes: {_some(unknown)}"
        findings.append(ModelFinding("unexpected", what, "transformers would leave them out"))
    return findings


def _compare_head(found: Mapping[str, PlacedTensor], d: Dimensions) -> list[ModelFinding]:
    has_head = any(t.place.part == "head" and t.name.endswith(".weight") for t in found.values())
    has_embedding = any(tensor.place.part == "embedding" for tensor in found.values())
    if d.is_tied and has_head:
        return [
            ModelFinding(
                "tied_head",
                "the config ties the head to the embedding, but the files hold a head of its own",
                "transformers uses the embedding as head; if the two differ, the file's head is lost",
            )
        ]
    if not d.is_tied and has_embedding and not has_head:
        return [
            ModelFinding(
                "missing_head",
                "the config says that the head is not tied to the embedding, but the files hold no head",
                "loaded like this the head is random numbers",
            )
        ]
    return []


def _join(shape: Shape) -> str:
    return "×".join(str(size) for size in shape) or "a scalar"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
