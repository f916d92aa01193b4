"""A target → the .bin files of its weights, and the small files that belong beside them; nothing is loaded.

What is in safetensors already, or in GGUF, is told so: there is nothing to make safe.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from ftcli.errors import ContentError, FtcliError, UsageError
from ftcli.store.file import read_json
from ftcli.store.output import MANIFEST
from ftcli.store.run import RunFolder
from ftcli.store.storage import quote
from ftcli.store.target import (
    PACKAGE_SCHEME,
    fetch_files,
    find_package_file,
    looks_like_path,
    path_exists,
    suggest_path,
)
from ftcli.store.tensor import explain_read_error, open_weights
from ftcli.store.weight import read_weight_table

ADAPTER_STEM = "adapter_model"
_SUFFIXES = (".bin", ".pt", ".pth")
_SHARD = re.compile(r".+-\d{5}-of-\d{5}\.\w+")
_TEMPLATES = "additional_chat_templates"
_MOST_TEXT_BYTES = 64 << 20  # the largest tokenizer.json is half of it
# what weights, states of a training and archives are called
_DATA_SUFFIXES = {
    *_SUFFIXES, ".ckpt", ".safetensors", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".onnx_data", ".ot", ".tflite",
    ".pkl", ".pickle", ".joblib", ".npy", ".npz", ".pdparams", ".mlmodel", ".pt2", ".distcp",
    ".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".parquet", ".arrow",
}  # fmt: skip
_CONFIGS = ("config.json", "tokenizer_config.json", "generation_config.json", "processor_config.json")
_HUB_TEXTS = ["*.json", "*.jinja", "*.txt", "*.model", "*.py", "*.md", "*.tiktoken", "LICENSE*", "NOTICE*"]
_HUB_WEIGHTS = ["pytorch_model*.bin", f"{ADAPTER_STEM}.bin"]


@dataclass(frozen=True)
class PickledWeights:
    """The weights ``files`` of one model or adapter.

    ``texts`` are the small files in ``folder`` that go with them, ``left`` names what does not; ``revision`` is the
    Hub commit, None for local files.
    """

    folder: Path
    files: tuple[Path, ...]
    is_adapter: bool
    texts: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()
    revision: str | None = None


def find_pickled(target: str) -> PickledWeights:
    """The .bin files that ``target`` means: a folder, one file, or a model on the Hub, which is fetched.

    Raises:
        UsageError: no such path, or there is nothing in .bin files to convert.
        ContentError: damaged or missing files, or such that ask to run code.
        HubError: the Hub refused, or could not be reached.
    """
    path = find_local(target)
    if path is not None:
        return _read_folder(path, target) if path.is_dir() else _read_file(path, target)
    folder = _fetch(target)
    return replace(_read_folder(folder, target), revision=folder.name)


def find_local(target: str) -> Path | None:
    """The path that ``target`` means; None for a model on the Hub.

    Raises:
        UsageError: it can only be a path, and is not there.
    """
    if target.startswith(PACKAGE_SCHEME):
        return find_package_file(target)
    path = Path(target).expanduser()
    if path_exists(path, target):
        return path
    if looks_like_path(target) or path.suffix in _SUFFIXES:
        raise UsageError("no such file or folder", where=target, hint=suggest_path(path))
    return None


def name_pickled(target: str) -> str:
    """What the weights of ``target`` are called, as a part of a folder's name."""
    path = find_local(target)
    if path is None:
        return target.rpartition("/")[2]
    return (path.resolve().name if path.is_dir() else path.stem) or "model"


def _read_file(path: Path, target: str) -> PickledWeights:
    with open_weights(path) as (stream, _):
        is_gguf = stream.read(4) == b"GGUF"
    if is_gguf or path.suffix == ".gguf":
        raise _refuse_gguf(target)
    if path.suffix == ".safetensors":
        raise _refuse_safe(target)
    if path.suffix not in _SUFFIXES:
        raise ContentError(f"is no file of weights ({', '.join(_SUFFIXES)})", where=target)
    if _SHARD.fullmatch(path.name):
        raise UsageError("is one of the files of a model", where=target, hint=f"name its folder: {path.parent}")
    is_adapter = path.stem == ADAPTER_STEM
    found = PickledWeights(path.parent, (path,), is_adapter)
    # a file elsewhere than in a model's folder lies among others that are not its own
    has_config = (path.parent / ("adapter_config.json" if is_adapter else "config.json")).is_file()
    return _add_texts(found, _list_names(path.parent)) if has_config else found


def _read_folder(folder: Path, target: str) -> PickledWeights:
    if RunFolder(folder).holds_run():
        raise _refuse_safe(target)
    names = _list_names(folder)
    is_adapter = _check_names(names, target)
    if is_adapter:
        return _add_texts(PickledWeights(folder, (folder / f"{ADAPTER_STEM}.bin",), True), names)
    table = read_weight_table(folder)
    if faults := table.faults:
        raise ContentError("; ".join(faults), where=target, hint="download or copy the model again")
    files = tuple(folder / file.name for file in table.files)
    notices = tuple(finding.text for finding in table.findings)
    return _add_texts(PickledWeights(folder, files, False, notices=notices), names)


def _check_names(names: Collection[str], target: str) -> bool:
    """Whether these files, among which are weights in .bin files, are an adapter's.

    Raises:
        UsageError: they are in safetensors already, or in GGUF.
        ContentError: there are no weights.
    """
    is_adapter = "adapter_config.json" in names and not any(fnmatchcase(name, _HUB_WEIGHTS[0]) for name in names)
    mine = {name for name in names if Path(name).stem == ADAPTER_STEM} if is_adapter else set(names)
    if not is_adapter and "config.json" in names:
        mine -= {f"{ADAPTER_STEM}.bin", f"{ADAPTER_STEM}.safetensors"}
    if any(name.endswith(".safetensors") for name in mine):
        bins = sorted(name for name in mine if fnmatchcase(name, "*.bin") and not _SHARD.fullmatch(name))
        raise _refuse_safe(target, f"to convert {bins[0]} beside it all the same, name that file" if bins else "")
    if any(name.endswith(".bin") for name in mine):
        return is_adapter
    if any(name.endswith(".gguf") for name in mine):
        raise _refuse_gguf(target)
    others = sorted(name for name in names if name.endswith(_SUFFIXES[1:]))
    hint = f"name the file itself: {others[0]}" if others else "such weights are pytorch_model.bin or adapter_model.bin"
    raise ContentError("holds no weights in .bin files", where=target, hint=hint)


def _refuse_safe(target: str, hint: str = "") -> UsageError:
    return UsageError("is in safetensors already: there is nothing to convert", where=target, hint=hint)


def _refuse_gguf(target: str) -> UsageError:
    return UsageError(
        "is in GGUF, which runs no code either: it is not turned into safetensors",
        where=target,
        hint="train on it, merge onto it or chat with it as it is",
    )


def _list_names(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise explain_read_error(error, folder) from error


def _add_texts(found: PickledWeights, names: Iterable[str]) -> PickledWeights:
    """``found`` with the small files of its folder; links that lead out of it, and all that is large, are left."""
    folder = found.folder
    has_code = any("auto_map" in (read_json(folder / name) or {}) for name in _CONFIGS)
    texts, left = [], []
    for name in names:
        path = folder / name
        if name.startswith(".") or name == MANIFEST or name.endswith(".index.json") or path in found.files:
            continue
        if name == _TEMPLATES and path.is_dir():
            texts += [f"{name}/{inner}" for inner in _list_names(path) if _is_text(folder, path / inner)]
        elif _is_text(folder, path) and (has_code or path.suffix != ".py"):
            texts.append(name)
        else:
            left.append(quote(name))
    return replace(found, texts=tuple(texts), left=tuple(left))


def _is_text(folder: Path, path: Path) -> bool:
    """Whether ``path`` is a small file that lies in ``folder``, or in the store of the Hub's cache."""
    roots = [folder.resolve()]
    if folder.parent.name == "snapshots":
        roots.append((folder.parent.parent / "blobs").resolve())
    try:
        real = path.resolve()
        if not any(real.is_relative_to(root) for root in roots) or path.suffix.lower() in _DATA_SUFFIXES:
            return False
        return real.is_file() and real.stat().st_size <= _MOST_TEXT_BYTES
    except (OSError, RuntimeError):  # a link in a circle
        return False


def _fetch(reference: str) -> Path:
    """The folder of a model's small files and .bin files, fetched once the Hub's list says that they are needed."""
    from huggingface_hub import HfApi

    try:
        listed = HfApi().model_info(reference).siblings or ()
        _check_names([entry.rfilename for entry in listed if "/" not in entry.rfilename], reference)
    except FtcliError:
        raise
    except Exception:
        pass  # what is in the cache may do; what is not is told below
    return fetch_files(reference, [*_HUB_TEXTS, *_HUB_WEIGHTS])
