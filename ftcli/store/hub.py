"""A model on the Hub as far as small files and headers tell of it; weights are never fetched.

    list of files ─▶ config.json, tokenizer_config.json, *.index.json, … ─▶ the header of each .safetensors file

One limit of seconds holds for all of it. The Hub is asked in daemon threads: huggingface_hub tries again for most of a
minute, or sleeps as long as the Hub tells it to, and a pool's threads would keep the process from ending.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

from ftcli.errors import ContentError, FtcliError, HubError
from ftcli.store.safetensors_header import LENGTH_BYTES, measure_header, parse_header
from ftcli.store.target import explain_hub_error
from ftcli.store.tensor import TensorEntry
from ftcli.store.weight import WeightChoice, WeightTable, build_table, choose_weights, read_weight_table

_MOST_SECONDS = 20.0
_THREADS = 8
_HEAD_BYTES = 1 << 16  # what is asked for first; most headers are shorter
_SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "adapter_config.json",
    "*.index.json",
)
_ADAPTER_WEIGHTS = "adapter_model.safetensors"
_COUNTED = "what is shown follows from the config"

T = TypeVar("T")


@dataclass(frozen=True)
class HubModel:
    """Where the small files of a model lie, and the tensor table of its weights (None: no headers could be read).

    ``is_adapter``: it is an adapter, and the table its own; ``is_cached``: the Hub could not be asked, and this is
    what the local cache holds; ``notices`` say why either is so.
    """

    reference: str
    revision: str
    folder: Path
    table: WeightTable | None
    is_adapter: bool = False
    is_cached: bool = False
    notices: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Listing:
    """The small files of a repository at one commit, and the names of all that lie at its top."""

    reference: str
    commit: str
    names: tuple[str, ...]
    folder: Path

    @property
    def is_adapter(self) -> bool:
        return "config.json" not in self.names


def read_hub_model(reference: str, revision: str | None = None) -> HubModel:
    """Config, tokenizer's config and weight headers of ``reference``, from the Hub or its local cache.

    Raises:
        HubError: gated, missing, busy or unreachable, each with its remedy, and not in the cache.
        ContentError: the repository holds neither a config.json nor an adapter.
    """
    deadline = time.monotonic() + _MOST_SECONDS
    try:
        listing = _run_until(deadline, reference, lambda: _fetch_small_files(reference, revision))
    except HubError as error:
        if cached := _find_cached(reference, revision, error):
            return cached
        raise
    table, why = None, ""
    try:
        choice = _choose_remote(listing)
        table = _run_until(deadline, reference, lambda: _read_headers(listing, choice))
    except FtcliError as error:
        why = _explain(error, reference)
    notices = (f"the headers of its weights were not read ({why}): {_COUNTED}",) if why else ()
    return HubModel(reference, listing.commit, listing.folder, table, listing.is_adapter, notices=notices)


def _fetch_small_files(reference: str, revision: str | None) -> _Listing:
    from huggingface_hub import HfApi, hf_hub_download

    # its words on trying again would be written over the answer, by threads that are no longer waited for
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    with _hub_errors(reference):
        info = HfApi().model_info(reference, revision=revision)
        names = tuple(entry.rfilename for entry in info.siblings or () if "/" not in entry.rfilename)
    main = next((name for name in ("config.json", "adapter_config.json") if name in names), None)
    if main is None:
        is_gguf = any(name.endswith(".gguf") for name in names)
        hint = "download one of its .gguf files and name that" if is_gguf else "is it a language model?"
        raise ContentError("the repository holds no config.json", where=reference, hint=hint)
    small = [name for name in names if any(fnmatchcase(name, pattern) for pattern in _SMALL_FILES)]
    with _hub_errors(reference):
        # by its branch, so that the cache knows later which commit that was; then all of that very commit, as the
        # first may be an older one from the cache where the Hub refuses it
        first = Path(hf_hub_download(reference, main, revision=revision))
        commit = info.sha or first.parent.name
        paths = _work_through(small, lambda name: hf_hub_download(reference, name, revision=commit))
    return _Listing(reference, commit, names, Path(paths[main]).parent)


def _choose_remote(listing: _Listing) -> WeightChoice:
    """The .safetensors files that hold the weights.

    Raises:
        ContentError: there are none, or their index is damaged.
    """
    if listing.is_adapter:
        choice = WeightChoice((_ADAPTER_WEIGHTS,) if _ADAPTER_WEIGHTS in listing.names else (), None, ())
    else:
        choice = choose_weights(listing.names, listing.folder)
    if any(name.endswith(".safetensors") for name in choice.names):
        return choice
    formats = sorted({suffix for name in listing.names if (suffix := Path(name).suffix) in (".bin", ".gguf", ".pt")})
    found = f"only {' and '.join(formats)} files" if formats else "no weights"
    raise ContentError(f"the repository holds {found}, no .safetensors")


def _read_headers(listing: _Listing, choice: WeightChoice) -> WeightTable:
    """The tensor table, read by ranges of a few kB for each file."""
    present = [name for name in choice.names if name in listing.names]
    with _hub_errors(listing.reference):
        return build_table(_work_through(present, lambda name: _read_header(listing, name)), choice)


def _read_header(listing: _Listing, name: str) -> tuple[int, list[TensorEntry], dict[str, Any]]:
    head, size_bytes = _fetch_range(listing, name, 0, _HEAD_BYTES)
    end = LENGTH_BYTES + measure_header(head, size_bytes, name)
    if end > len(head):
        head += _fetch_range(listing, name, len(head), end)[0]
    return size_bytes, *parse_header(head[LENGTH_BYTES:end], size_bytes, file=name, where=name)


def _fetch_range(listing: _Listing, name: str, begin: int, end: int) -> tuple[bytes, int]:
    """The bytes from ``begin`` to ``end`` of a file on the Hub, and the size of the whole file.

    No more is read where a server sends the whole file instead.
    """
    import huggingface_hub.utils

    utils: Any = huggingface_hub.utils  # documented, but not typed as exported
    url = huggingface_hub.hf_hub_url(listing.reference, name, revision=listing.commit)
    headers = {**utils.build_hf_headers(), "Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
    with utils.get_session().stream("GET", url, headers=headers, timeout=_MOST_SECONDS) as response:
        utils.hf_raise_for_status(response)
        first = begin if response.status_code == 206 else 0
        data = bytearray()
        for chunk in response.iter_bytes():
            data += chunk
            if first + len(data) >= end:
                break
        size = re.search(r"/(\d+)$", response.headers.get("Content-Range", ""))
        size_bytes = int(size[1] if size else response.headers.get("Content-Length", len(data)))
    return bytes(data[begin - first : end - first]), size_bytes


def _find_cached(reference: str, revision: str | None, error: HubError) -> HubModel | None:
    """What the local cache holds of the model; None if that is not even a config."""
    from huggingface_hub import try_to_load_from_cache

    try:
        paths = [try_to_load_from_cache(reference, name, revision=revision) for name in _SMALL_FILES if "*" not in name]
    except Exception:  # an id that no model can have
        return None
    known = {Path(path).name: Path(path).parent for path in paths if isinstance(path, str)}
    folder = known.get("config.json") or known.get("adapter_config.json")
    if folder is None:
        return None
    notices = [f"the Hub was not read ({error.what}): this is the copy in its local cache"]
    table, why = None, "no weights are in the cache"
    try:
        table = read_weight_table(folder)
    except FtcliError as damage:
        why = _explain(damage, reference)
    if table is None or not table.tensors:
        table = None
        notices.append(f"the headers of its weights were not read ({why}): {_COUNTED}")
    is_adapter = "config.json" not in known
    return HubModel(reference, folder.name, folder, table, is_adapter, is_cached=True, notices=tuple(notices))


def _explain(error: FtcliError, reference: str) -> str:
    """What happened, and in which file unless it is the repository itself that ``error`` speaks of."""
    return error.what if error.where in ("", reference) else f"{Path(error.where).name}: {error.what}"


@contextmanager
def _hub_errors(reference: str) -> Iterator[None]:
    """A block in which whatever huggingface_hub raises becomes a ``HubError`` about ``reference``."""
    try:
        yield
    except FtcliError:
        raise
    except Exception as error:
        raise explain_hub_error(error, reference) from error


def _run_until(deadline: float, reference: str, work: Callable[[], T]) -> T:
    """What ``work`` returns or raises, unless that takes too long."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(max(0.0, deadline - time.monotonic()))
    if results:
        return results[0]
    if errors:
        raise errors[0]
    raise HubError(
        f"the Hub was busy or did not answer within {_MOST_SECONDS:g} s",
        where=reference,
        hint="try again later, or name a local folder",
    )


def _work_through(names: Sequence[str], work: Callable[[str], T]) -> dict[str, T]:
    """Name → what ``work`` returns for it, several at a time; the first error ends it and is raised."""
    rest = iter(names)
    lock = threading.Lock()
    results: dict[str, T] = {}
    errors: list[BaseException] = []

    def run() -> None:
        while not errors:
            with lock:
                name = next(rest, None)
            if name is None:
                return
            try:
                results[name] = work(name)
            except BaseException as error:
                errors.append(error)

    threads = [threading.Thread(target=run, daemon=True) for _ in range(min(_THREADS, len(names)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return {name: results[name] for name in names}
