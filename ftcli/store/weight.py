"""The tensor table of a model's weight files, from their headers alone.

    model.safetensors.index.json ─┐
    *.safetensors ────────────────┤
    pytorch_model.bin.index.json ─┼→ WeightTable(files, tensors, findings, metadata)
    *.bin ────────────────────────┤
    *.gguf ───────────────────────┘

A damaged file is an error; what an index and its shards say against each other are findings, so that the rest
can still be shown. No weight is read, and nothing that a file asks for is run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ftcli.errors import ContentError
from ftcli.store.gguf_header import check_gguf_data, read_gguf_header
from ftcli.store.pickle_table import read_bin_tensors
from ftcli.store.safetensors_header import read_safetensors_header
from ftcli.store.tensor import TensorEntry as TensorEntry
from ftcli.store.tensor import check_name, explain_read_error, open_weights

_INDEX_SUFFIX = ".index.json"
_MOST_INDEX_BYTES, _MOST_SHARDS = 1 << 26, 10_000
_MOST_TEXT, _MOST_METADATA = 4096, 200
# .bin files that lie beside weights and are none
_OTHER_BIN = re.compile(r"(training_args|optimizer|scheduler|scaler|random_states|rng_state|openvino_|trainer_state).*")
_FAULTS = {
    "missing_shard",
    "missing_tensor",
    "double_tensor",
    "misplaced_tensor",
    "outside",
    "incomplete",
    "two_layouts",
}
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.(safetensors|bin|gguf)")


@dataclass(frozen=True)
class WeightFile:
    """One file of weights: its name in the folder, its size, and ``safetensors``, ``bin`` or ``gguf``."""

    name: str
    size_bytes: int
    format: str


@dataclass(frozen=True)
class WeightFinding:
    """Something that is not as it should be, though the rest can be read.

    Codes: missing_shard, outside, missing_tensor, unnamed_tensor, double_tensor, misplaced_tensor, incomplete,
    both_formats, two_layouts, unread_file, gguf_only.
    """

    code: str
    text: str


@dataclass(frozen=True)
class WeightTable:
    """The weights of one model: files by name, tensors in the order of files and bytes.

    A tensor that two files hold stands once. ``metadata`` is safetensors' ``__metadata__`` or GGUF's keys, without
    long texts and long lists.
    """

    files: tuple[WeightFile, ...]
    tensors: tuple[TensorEntry, ...]
    findings: tuple[WeightFinding, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def is_gguf(self) -> bool:
        return bool(self.files) and self.files[0].format == "gguf"

    @property
    def faults(self) -> list[str]:
        """The findings with which a model cannot be what it was saved as."""
        return [finding.text for finding in self.findings if finding.code in _FAULTS]

    @property
    def size_bytes(self) -> int:
        """The bytes of all tensors as they lie on disk."""
        return sum(tensor.size_bytes for tensor in self.tensors)


@dataclass(frozen=True)
class WeightChoice:
    """Which files of a folder are its weights; ``weight_map`` (tensor → file) is None where no index says so."""

    names: tuple[str, ...]
    weight_map: dict[str, str] | None
    findings: tuple[WeightFinding, ...]


def read_weight_table(path: Path) -> WeightTable:
    """The tensors of the folder or of the one file (.safetensors, .bin, .gguf or an index) at ``path``.

    A folder without weights gives an empty table. Cost: the headers, whatever the files' size.

    Raises:
        ContentError: a file is damaged, cut off, not what its name says, or asks to run code.
        DiskError: a file cannot be read.
    """
    try:
        names = [entry.name for entry in path.iterdir()] if path.is_dir() else None
    except OSError as error:
        raise explain_read_error(error, path) from error
    except ValueError as error:
        raise ContentError(f"cannot be the name of a file: {error}", where=str(path)) from error
    if names is not None:
        return _read_choice(path, choose_weights(names, path), _find_incomplete(path, names))
    if path.name.endswith(_INDEX_SUFFIX):
        return _read_choice(path.parent, read_index(path), [])
    with open_weights(path):  # a set of GGUF files may have holes, but this one was asked for
        parts = _list_parts(path.name) if path.suffix == ".gguf" else [path.name]
    return _read_choice(path.parent, WeightChoice(tuple(parts), None, ()), [])


def choose_weights(names: Iterable[str], folder: Path) -> WeightChoice:
    """The weights among the files ``names`` of ``folder``: safetensors before .bin, an index before a pattern."""
    present = set(names)
    safetensors = {name for name in present if name.endswith(".safetensors")}
    if "config.json" in present:
        safetensors -= {"adapter_model.safetensors"}
    bins = {name for name in present if name.endswith(".bin") and not _OTHER_BIN.fullmatch(name)}
    if "config.json" in present:
        bins -= {"adapter_model.bin"}
    findings = []
    if safetensors and bins:
        findings.append(WeightFinding("both_formats", f"{_some(bins)}: not read, the .safetensors files are"))
    for single, found in (("model.safetensors", safetensors), ("pytorch_model.bin", bins)):
        if (index := f"{single}{_INDEX_SUFFIX}") in present:
            choice = read_index(folder / index)
            if single in found and single not in choice.names:
                text = f"{single} and {index} are both here; the index is followed, transformers would read {single}"
                findings.append(WeightFinding("two_layouts", text))
                found -= {single}
        elif found:
            shards = {name for name in found if name.startswith(f"{Path(single).stem}-")}
            main = {single} if single in found else shards or found
            choice = WeightChoice(tuple(sorted({part for name in main for part in _list_parts(name)})), None, ())
        else:
            continue
        if unread := found - set(choice.names):
            findings.append(WeightFinding("unread_file", f"{_some(unread)}: not part of the model, and not read"))
        return WeightChoice(choice.names, choice.weight_map, (*findings, *choice.findings))
    if ggufs := [name for name in present if name.endswith(".gguf")]:
        findings.append(WeightFinding("gguf_only", f"{_some(ggufs)}: name the file itself to read it"))
    return WeightChoice((), None, tuple(findings))


def read_index(path: Path) -> WeightChoice:
    """The shards that the index at ``path`` names, and what it says lies in them.

    A name that leaves the folder is a finding, and never followed.

    Raises:
        ContentError: it is no index.
    """
    with open_weights(path) as (stream, _):
        text = stream.read(_MOST_INDEX_BYTES + 1)
    try:
        if len(text) > _MOST_INDEX_BYTES:
            raise ValueError(f"it is longer than {_MOST_INDEX_BYTES >> 20} MiB")
        value = json.loads(text.decode("utf-8"))
        weight_map = value.get("weight_map") if type(value) is dict else None
        if type(weight_map) is not dict or any(type(name) is not str for name in weight_map.values()):
            raise ValueError("it holds no weight_map of names")
        for name in (*weight_map, *weight_map.values()):
            check_name(name)
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ContentError("the index of the weights is damaged", where=str(path), why=why) from error
    suffix = Path(path.name.removesuffix(_INDEX_SUFFIX)).suffix
    names = dict.fromkeys(weight_map.values())
    outside = [name for name in names if not _is_plain(name, suffix)]
    findings = [WeightFinding("outside", f"{path.name} names {_some(outside)}: not followed")] if outside else []
    inside = {tensor: name for tensor, name in weight_map.items() if _is_plain(name, suffix)}
    shards = sorted(set(inside.values()))
    if len(shards) > _MOST_SHARDS:
        raise ContentError(f"the index names {len(shards)} files", where=str(path))
    return WeightChoice(tuple(shards), inside, tuple(findings))


def build_table(found: dict[str, tuple[int, list[TensorEntry], dict[str, Any]]], choice: WeightChoice) -> WeightTable:
    """The table of the files ``found`` (name → size, tensors, metadata), held against what ``choice`` names."""
    findings = list(choice.findings)
    if missing := [name for name in choice.names if name not in found]:
        findings.append(WeightFinding("missing_shard", f"{_some(missing)}: missing"))
    tensors: dict[str, TensorEntry] = {}
    doubles = []
    weight_map = choice.weight_map or {}
    for _, entries, _ in found.values():
        for entry in entries:
            if entry.name in tensors:
                doubles.append(f"{entry.name} ({tensors[entry.name].file}, {entry.file})")
                if weight_map.get(entry.name) != entry.file:
                    continue
            tensors[entry.name] = entry
    if doubles:
        findings.append(WeightFinding("double_tensor", f"{_some(doubles)}: in two files"))
    if choice.weight_map is not None:
        findings += _compare_index(choice.weight_map, tensors, set(found))
    metadata: dict[str, Any] = {}
    for _, _, values in found.values():
        metadata = _keep_small(values) | metadata
    files = tuple(WeightFile(name, size, Path(name).suffix[1:]) for name, (size, _, _) in found.items())
    return WeightTable(files, tuple(tensors.values()), tuple(findings), metadata)


def _compare_index(weight_map: dict[str, str], tensors: dict[str, TensorEntry], found: set[str]) -> list[WeightFinding]:
    absent = [f"{name} ({file})" for name, file in weight_map.items() if name not in tensors and file in found]
    unnamed = [f"{name} ({entry.file})" for name, entry in tensors.items() if name not in weight_map]
    misplaced = [
        f"{name} ({entry.file}, not {weight_map[name]})"
        for name, entry in tensors.items()
        if weight_map.get(name, entry.file) != entry.file
    ]
    kinds = (
        ("missing_tensor", absent, "named by the index, but not in its file"),
        ("unnamed_tensor", unnamed, "in a file, but not named by the index"),
        ("misplaced_tensor", misplaced, "not in the file that the index names"),
    )
    return [WeightFinding(code, f"{_some(names)}: {text}") for code, names, text in kinds if names]


def _read_choice(folder: Path, choice: WeightChoice, findings: list[WeightFinding]) -> WeightTable:
    found = {}
    for name in choice.names:
        path = folder / name
        # a link whose target is gone is a missing shard too; a single file that was asked for is an error
        if len(choice.names) > 1 or choice.weight_map is not None:
            try:
                if not path.exists():
                    continue
            except OSError as error:
                raise explain_read_error(error, path) from error
        found[name] = _read_file(path)
    table = build_table(found, choice)
    return WeightTable(table.files, table.tensors, (*findings, *table.findings), table.metadata)


def _read_file(path: Path) -> tuple[int, list[TensorEntry], dict[str, Any]]:
    with open_weights(path) as (_, size_bytes):
        pass
    if path.suffix == ".safetensors":
        return size_bytes, *read_safetensors_header(path)
    if path.suffix == ".bin":
        return size_bytes, *read_bin_tensors(path)
    if path.suffix == ".gguf":
        header = read_gguf_header(path)
        check_gguf_data(header, size_bytes, str(path))
        tensors = [
            TensorEntry(t.name, t.dtype, t.shape, t.size_bytes, path.name, header.data_offset + t.offset)
            for t in header.tensors
        ]
        return size_bytes, tensors, header.metadata
    raise ContentError("is no file of weights (.safetensors, .bin or .gguf)", where=str(path))


def _list_parts(name: str) -> list[str]:
    """``name``, or the names of all files of the set of which it is one (NAME-00002-of-00003.gguf)."""
    shard = _SHARD.fullmatch(name)
    if not shard or not 0 < int(shard[2]) <= int(shard[3]) <= _MOST_SHARDS:
        return [name]
    return [f"{shard[1]}-{i:05d}-of-{shard[3]}.{shard[4]}" for i in range(1, int(shard[3]) + 1)]


def _is_plain(name: str, suffix: str) -> bool:
    return name.endswith(suffix) and not re.search(r"[/\\\x00:]", name)


def _find_incomplete(folder: Path, names: Iterable[str]) -> list[WeightFinding]:
    """What huggingface_hub leaves of a download that did not end: here, in .cache, or among a snapshot's blobs."""
    partial = [name for name in names if name.endswith(".incomplete")]
    places = [folder / ".cache" / "huggingface" / "download"]
    if folder.parent.name == "snapshots":
        places.append(folder.parent.parent / "blobs")
    for place in places:
        partial += [entry.name for entry in place.glob("*.incomplete")]
    if not partial:
        return []
    return [WeightFinding("incomplete", f"{_some(partial)}: a download that did not end; fetch the model again")]


def _keep_small(values: dict[str, Any]) -> dict[str, Any]:
    small = {k: v for k, v in values.items() if len(k) + len(str(v)) <= _MOST_TEXT}
    return dict(list(small.items())[:_MOST_METADATA])


def _some(names: Iterable[str]) -> str:
    """Up to three of ``names`` and how many more there are."""
    ordered = [name if len(name) <= 120 else f"{name[:117]}..." for name in sorted(names)]
    return ", ".join(ordered[:3]) + (f" and {len(ordered) - 3} more" if len(ordered) > 3 else "")
