"""``ftcli export --safetensors``: weights that torch pickled as safetensors, which cannot run anything.

    .bin files ─▶ their tables, followed without running them ─▶ each tensor's bytes, by offset ─▶ shards ─▶ compared

No pickle is executed and torch is not imported. Memory is that of a block, whatever the weights' size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from ftcli.errors import ContentError, VerificationFailed
from ftcli.events import Notice, OnEvent, Pace, Saved, Stage, ignore_event
from ftcli.jobs.pickled import ADAPTER_STEM, PickledWeights, find_local, find_pickled, name_pickled
from ftcli.model.dimensions import read_dimensions
from ftcli.model.layout import FAMILIES
from ftcli.store.file import bring_back, describe_files, read_json, staged_folder, write_json
from ftcli.store.output import MANIFEST, check_outside, check_replaceable, read_output
from ftcli.store.run import MANIFEST_SCHEMA, now_text
from ftcli.store.shard import PlannedTensor, measure_shards, plan_shards, write_shards
from ftcli.store.storage import BinTensor, pick_pieces, quote, read_bin_state, read_pieces
from ftcli.store.tensor import TensorEntry, explain_read_error, open_weights
from ftcli.store.version import list_versions
from ftcli.store.weight import read_weight_table

_FORMAT = "safetensors"
_HEAD = "lm_head.weight"
_EMBEDDINGS = ("model.embed_tokens.weight", "transformer.wte.weight")
_MANIFEST_BYTES = 1 << 20
_MOST_NAMED = 5


@dataclass(frozen=True)
class SafeVerification:
    """Every tensor that was written is the one in the .bin file, to the bit: else there would be no folder."""

    n_tensors: int
    size_bytes: int

    def to_json(self) -> dict[str, Any]:
        """The object under ``verify``."""
        return {"method": "bytes", "tensors": self.n_tensors, "bytes": self.size_bytes, "passed": True}


@dataclass(frozen=True)
class SafeExport:
    """What came of it; ``files`` are those of the weights, ``tied`` the names left out because the config ties them.

    ``left_out`` is what else lay in the .bin files, such as an optimizer's state.
    """

    source: str
    output: str
    size_bytes: int
    n_tensors: int
    files: tuple[str, ...]
    tied: Mapping[str, str]
    left_out: tuple[str, ...]
    verification: SafeVerification | None

    def to_json(self) -> dict[str, Any]:
        """The document of ``--json``."""
        return {
            "source": self.source,
            "output": self.output,
            "bytes": self.size_bytes,
            "tensors": self.n_tensors,
            "files": list(self.files),
            "tied": dict(self.tied),
            "left_out": list(self.left_out),
            "verify": self.verification.to_json() if self.verification else None,
        }


def export_safetensors(
    target: str,
    *,
    output: Path | None = None,
    verifies: bool = True,
    overwrite: bool = False,
    on_event: OnEvent = ignore_event,
) -> SafeExport:
    """The weights of ``target`` as safetensors in a new folder, with the small files that lie beside them.

    Args:
        target: a folder with pytorch_model.bin (or shards) or adapter_model.bin, one .bin, .pt or .pth file, or a
            Hub id.
        output: the folder; by default ``./NAME-safetensors``.
        verifies: whether what was written is read again and compared, byte by byte.
        overwrite: replace what an earlier such export left there.
        on_event: told of stages and progress.

    Raises:
        FtcliError: with the exit code of what happened; nothing stands under the final name then, or what stood there.
    """
    final = read_output(output) if output else Path(f"{name_pickled(target)}-safetensors")
    bring_back(final)
    named = find_local(target)
    _check_output(final, [named] if named else [], overwrite=overwrite)
    on_event(Stage("check", target))
    source = find_pickled(target)
    _check_output(final, source.files, overwrite=overwrite)
    plan = _plan(source, on_event)
    with staged_folder(final, plan.needed_bytes) as folder:
        for name in source.texts:
            _copy_text(source.folder / name, folder / name)
        on_event(Stage(_FORMAT, f"{len(plan.tensors)} tensors"))
        _write_weights(folder, plan, on_event)
        verification = _verify(folder, plan, on_event) if verifies else None
        made = SafeExport(
            source=target,
            output=str(final),
            size_bytes=sum(tensor.size_bytes for tensor in plan.tensors.values()),
            n_tensors=len(plan.tensors),
            files=tuple(plan.shards),
            tied=plan.tied,
            left_out=plan.left_out,
            verification=verification,
        )
        _write_manifest(folder, made, plan)
        _check_output(final, source.files, overwrite=overwrite)
    on_event(Saved(str(final)))
    return made


@dataclass(frozen=True)
class _Plan:
    """What is going to be written: the tensors by name, and the file of each in ``shards``."""

    source: PickledWeights
    tensors: Mapping[str, BinTensor]
    shards: dict[str, tuple[PlannedTensor, ...]]
    tied: Mapping[str, str]
    left_out: tuple[str, ...]
    needed_bytes: int


def _plan(source: PickledWeights, on_event: OnEvent) -> _Plan:
    """What becomes of ``source``, whose small surprises are told."""
    states = {path: read_bin_state(path) for path in source.files}
    tensors: dict[str, BinTensor] = {}
    for tensor in chain.from_iterable(state.tensors for state in states.values()):
        if tensor.name in tensors:
            raise ContentError(f"{quote(tensor.name)} is in two files", where=str(tensor.path))
        tensors[tensor.name] = tensor
    left_out = tuple(dict.fromkeys(key for state in states.values() for key in state.left_out))
    tied = _find_tied(source, tensors)
    kept = {name: tensor for name, tensor in tensors.items() if name not in tied}
    planned = [PlannedTensor(tensor.name, tensor.dtype, tensor.shape) for tensor in kept.values()]
    if source.is_adapter:  # PEFT reads one file
        (group,) = plan_shards(planned, most_bytes=1 + sum(tensor.size_bytes for tensor in planned)).values()
        shards = {f"{ADAPTER_STEM}.safetensors": group}
    else:
        shards = plan_shards(planned)
    _tell(source, kept, tied, left_out, on_event)
    needed = measure_shards(planned) + _MANIFEST_BYTES + sum(_measure(source.folder / name) for name in source.texts)
    return _Plan(source, kept, shards, tied, left_out, needed)


def _find_tied(source: PickledWeights, tensors: Mapping[str, BinTensor]) -> dict[str, str]:
    """The head → the embedding, if they are one tensor and the config says so; transformers does not save it either.

    In an unknown family both are written, which is right in any.
    """
    has_config = not source.is_adapter and "config.json" in source.texts
    config = read_json(source.folder / "config.json") if has_config else None
    embedding = next((name for name in _EMBEDDINGS if name in tensors), None)
    if not config or embedding is None or _HEAD not in tensors or "text_config" in config:
        return {}
    if config.get("model_type") not in FAMILIES or tensors[_HEAD].view != tensors[embedding].view:
        return {}
    try:
        is_tied = read_dimensions(config, where="config.json").is_tied
    except ContentError:  # a config that says too little is no reason to keep the weights pickled
        return {}
    return {_HEAD: embedding} if is_tied else {}


def _tell(
    source: PickledWeights,
    tensors: Mapping[str, BinTensor],
    tied: Mapping[str, str],
    left_out: Sequence[str],
    on_event: OnEvent,
) -> None:
    for text in source.notices:
        on_event(Notice(text))
    if left_out:
        on_event(Notice(f"the .bin file holds more than weights, which is left out: {_some(left_out)}"))
    if source.left:
        on_event(Notice(f"not copied, as it is no small file of the model: {_some(source.left)}"))
    for name, owner in tied.items():
        on_event(Notice(f"{name} is not written: config.json ties it to {owner}, with which it is one tensor"))
    owners: dict[object, str] = {}
    doubled = [t for t in tensors.values() if t.size_bytes and owners.setdefault(t.view, t.name) != t.name]
    if doubled:
        more = sum(tensor.size_bytes for tensor in doubled)
        names = _some([quote(tensor.name) for tensor in doubled])
        on_event(Notice(f"one tensor under several names is written under each, {more:,} bytes more: {names}"))


def _some(names: Sequence[str]) -> str:
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def _write_weights(folder: Path, plan: _Plan, on_event: OnEvent) -> None:
    pace = Pace(_FORMAT, sum(tensor.size_bytes for tensor in plan.tensors.values()), unit="bytes")

    def make_pieces(tensor: PlannedTensor) -> Iterator[bytes]:
        for piece in read_pieces(plan.tensors[tensor.name]):
            yield piece
            on_event(pace.advance(len(piece)))

    write_shards(folder, plan.shards, make_pieces)


def _verify(folder: Path, plan: _Plan, on_event: OnEvent) -> SafeVerification:
    """That what lies in ``folder`` is what lies in the .bin files: names, shapes, dtypes, and every byte.

    Raises:
        VerificationFailed: naming the first tensor that is another.
    """
    total = sum(tensor.size_bytes for tensor in plan.tensors.values())
    on_event(Stage("verify", f"{len(plan.tensors)} tensors"))
    pace = Pace("verify", total, unit="bytes")
    name = next(iter(plan.shards)) if len(plan.shards) == 1 else "model.safetensors.index.json"
    try:
        table = read_weight_table(folder / name)
    except ContentError as error:
        raise _explain_difference(f"{error.what} {error.why}".strip(), folder) from error
    written = {entry.name: entry for entry in table.tensors}
    if table.findings or written.keys() != plan.tensors.keys():
        raise _explain_difference("; ".join(finding.text for finding in table.findings) or "other names", folder)
    for tensor in plan.tensors.values():
        entry = written[tensor.name]
        if (entry.dtype, entry.shape) != (tensor.dtype, tensor.shape):
            raise _explain_difference(f"{quote(tensor.name)} is {entry.dtype} {entry.shape}", folder)
        _compare(folder, entry, tensor, pace, on_event)
    return SafeVerification(len(plan.tensors), total)


def _compare(folder: Path, entry: TensorEntry, tensor: BinTensor, pace: Pace, on_event: OnEvent) -> None:
    with open_weights(folder / entry.file) as (stream, _):
        stream.seek(entry.offset or 0)
        for piece in pick_pieces(tensor):
            if stream.read(len(piece)) != piece:
                raise _explain_difference(f"{quote(tensor.name)} has other bytes than in {tensor.path}", folder)
            on_event(pace.advance(len(piece)))


def _explain_difference(why: str, folder: Path) -> VerificationFailed:
    return VerificationFailed(
        "what was written is not what the .bin file holds; it is not kept",
        where=str(folder),
        why=why,
        hint="export again; if that fails too, look at the disk, and whether the .bin file is being changed",
    )


def _copy_text(source: Path, final: Path) -> None:
    try:
        data = source.read_bytes()
    except OSError as error:
        raise explain_read_error(error, source) from error
    final.parent.mkdir(exist_ok=True)
    final.write_bytes(data)


def _measure(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise explain_read_error(error, path) from error


def _write_manifest(folder: Path, made: SafeExport, plan: _Plan) -> None:
    document = made.to_json()
    manifest = {
        "schema": MANIFEST_SCHEMA,
        "command": "export",
        "format": _FORMAT,
        "finished_at": now_text(),
        "versions": list_versions(),
        "source": made.source,
        "revision": plan.source.revision,
        "converted": {path.name: {"bytes": _measure(path)} for path in plan.source.files},
        **{key: document[key] for key in ("bytes", "tensors", "tied", "left_out", "verify")},
        "files": describe_files(folder),
    }
    write_json(folder / MANIFEST, manifest)


def _check_output(final: Path, sources: Iterable[Path], *, overwrite: bool) -> None:
    """None if the result may be written to ``final``, in which none of ``sources`` may lie.

    Raises:
        UsageError: something is there, or what is read lies in it.
    """
    check_outside(final, sources, "converted")
    check_replaceable(
        final,
        overwrite=overwrite,
        is_own=lambda manifest: (manifest.get("command"), manifest.get("format")) == ("export", _FORMAT),
        otherwise="was not made by ftcli export --safetensors",
    )
