"""A model on the Hub as far as small files and headers tell of it; weights are never fetched.

The Hub is asked in a thread of its own with a limit, because huggingface_hub tries again for most of a minute.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftcli.errors import HubError
from ftcli.store.target import explain_hub_error
from ftcli.store.tensor import TensorEntry
from ftcli.store.weight import WeightFile, WeightTable, read_weight_table

_MOST_SECONDS = 20
_SMALL_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "adapter_config.json",
    "*.index.json",
]


@dataclass(frozen=True)
class HubModel:
    """Where the small files of a model lie, and the tensor table of its weights (None: no headers could be read).

    ``is_cached``: the Hub could not be asked, and this is what the local cache holds.
    """

    reference: str
    revision: str | None
    folder: Path
    table: WeightTable | None
    is_cached: bool


def read_hub_model(reference: str, revision: str | None = None) -> HubModel:
    """Config, tokenizer's config and weight headers of ``reference``, from the Hub or its local cache.

    Raises:
        HubError: gated, missing, busy or unreachable, each with its remedy, and not in the cache.
    """
    try:
        return _limit_time(lambda: _fetch(reference, revision), reference)
    except HubError:
        if cached := _find_cached(reference, revision):
            return cached
        raise


def _fetch(reference: str, revision: str | None) -> HubModel:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(reference, revision=revision, allow_patterns=_SMALL_FILES))
    except Exception as error:
        raise explain_hub_error(error, reference) from error
    return HubModel(reference, folder.name, folder, _read_headers(reference, folder.name), is_cached=False)


def _read_headers(reference: str, revision: str) -> WeightTable | None:
    """The tensor table, read by ranges of a few kB for each file; None where there are no safetensors."""
    from huggingface_hub import HfApi

    try:
        metadata = HfApi().get_safetensors_metadata(reference, revision=revision)
        infos: Any = HfApi().get_paths_info(reference, list(metadata.files_metadata), revision=revision)
    except Exception:  # a repository without safetensors, or one whose headers are damaged: its config still counts
        return None
    sizes = {info.path: int(info.size) for info in infos}
    files = tuple(WeightFile(name, sizes.get(name, 0), "safetensors") for name in metadata.files_metadata)
    tensors = tuple(
        TensorEntry(name, info.dtype, tuple(info.shape), info.data_offsets[1] - info.data_offsets[0], file, None)
        for file, header in metadata.files_metadata.items()
        for name, info in header.tensors.items()
    )
    return WeightTable(files, tensors)


def _find_cached(reference: str, revision: str | None) -> HubModel | None:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(reference, revision=revision, local_files_only=True))
    except Exception:
        return None
    if not (folder / "config.json").exists():
        return None
    table = read_weight_table(folder)
    return HubModel(reference, folder.name, folder, table if table.tensors else None, is_cached=True)


def _limit_time(work: Callable[[], HubModel], reference: str) -> HubModel:
    """What ``work`` returns or raises, unless that takes too long."""
    results: list[HubModel] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(_MOST_SECONDS)
    if results:
        return results[0]
    if errors:
        raise errors[0]
    raise HubError(
        f"the Hub did not answer within {_MOST_SECONDS} s",
        where=reference,
        hint="try again later, or name a local folder",
    )
