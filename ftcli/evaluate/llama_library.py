"""llama.cpp through its C interface, taken from the shared library of whichever installed package carries it.

    package ─▶ shared library ─▶ LlamaModel(path) ─▶ clear(room), decode(ids, wanted) ─▶ logits

Structures of llama.h gain fields from release to release. What is relied on here has kept its place since 2024: the
sizes that a context's parameters begin with, and the batch; all else stays as llama.cpp's own defaults have it (every
layer on a GPU where the build has one). The package itself is never imported.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import math
import os
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from ctypes import (
    POINTER,
    Structure,
    c_bool,
    c_char_p,
    c_float,
    c_int8,
    c_int32,
    c_size_t,
    c_uint32,
    c_uint64,
    c_void_p,
)
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from ftcli.errors import ContentError, MemoryExhausted, UsageError, is_memory_error
from ftcli.store.gguf_header import GgufHeader
from ftcli.store.tensor import COPY_AGAIN

INSTALL_COMMAND = "pip install 'ftcli[llamacpp]'"
# package → module, and the names that its shared library has on the various systems
_CARRIERS = {
    "xllamacpp": ("xllamacpp", ("xllamacpp*.so",)),
    "llama-cpp-python": ("llama_cpp", ("lib/libllama.so", "lib/libllama.dylib", "lib/llama.dll")),
}
_DEFAULT_SIZES = (512, 2048, 512, 1)  # llama_context_default_params in llama-context.cpp
_BATCH_TOKENS = 512
_ROOM_STEP = 256  # llama.cpp pads the cache to a multiple of this
_MOST_BLOCKS = 512  # LLAMA_MAX_LAYERS in llama-hparams.h
_PLAIN_FAMILIES = {"llama", "qwen2", "qwen3"}
_NO_WEIGHTS = {"I8", "I16", "I32", "I64", "F64"}
_WARNING, _ERROR = 3, 4  # enum ggml_log_level in ggml.h
_LogCallback = ctypes.CFUNCTYPE(None, ctypes.c_int, c_char_p, c_void_p)
_log = logging.getLogger("llama.cpp")


class _ModelParams(Structure):
    """Larger than any release's: the callee fills, and reads, what it knows of it."""

    _fields_ = (("opaque", c_uint64 * 128),)


class _ContextParams(Structure):
    _fields_ = (
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("n_seq_max", c_uint32),
        ("opaque", c_uint64 * 126),
    )


class _Batch(Structure):
    """Null for positions and sequences: the tokens follow those in the cache, all in one sequence."""

    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", c_void_p),
        ("pos", c_void_p),
        ("n_seq_id", c_void_p),
        ("seq_id", c_void_p),
        ("logits", POINTER(c_int8)),
    )


_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {  # name → result, arguments
    "llama_backend_init": (None, ()),
    "llama_supports_gpu_offload": (c_bool, ()),
    "llama_log_set": (None, (_LogCallback, c_void_p)),
    "llama_model_default_params": (_ModelParams, ()),
    "llama_model_load_from_file": (c_void_p, (c_char_p, _ModelParams)),
    "llama_model_free": (None, (c_void_p,)),
    "llama_model_has_encoder": (c_bool, (c_void_p,)),
    "llama_model_n_ctx_train": (c_int32, (c_void_p,)),
    "llama_model_get_vocab": (c_void_p, (c_void_p,)),
    "llama_vocab_n_tokens": (c_int32, (c_void_p,)),
    "llama_vocab_get_text": (c_char_p, (c_void_p, c_int32)),
    "llama_tokenize": (c_int32, (c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool)),
    "llama_context_default_params": (_ContextParams, ()),
    "llama_init_from_model": (c_void_p, (c_void_p, _ContextParams)),
    "llama_free": (None, (c_void_p,)),
    "llama_set_n_threads": (None, (c_void_p, c_int32, c_int32)),
    "llama_get_memory": (c_void_p, (c_void_p,)),
    "llama_memory_clear": (None, (c_void_p, c_bool)),
    "llama_decode": (c_int32, (c_void_p, _Batch)),
    "llama_get_logits_ith": (POINTER(c_float), (c_void_p, c_int32)),
}
_ADAPTER_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {  # younger, so asked for only where there is an adapter
    "llama_adapter_lora_init": (c_void_p, (c_void_p, c_char_p)),
    "llama_set_adapters_lora": (c_int32, (c_void_p, POINTER(c_void_p), c_size_t, POINTER(c_float))),
}


@dataclass(frozen=True)
class LlamaLibrary:
    """llama.cpp's functions, the ``package`` they come from with its version, and its complaints of what runs now."""

    package: str
    functions: Any
    complaints: deque[str]
    on_log: Callable[..., None]  # held as long as the library may call it

    def explain(self) -> str:
        """What llama.cpp said first of what went wrong, which is the cause of the rest."""
        return self.complaints[0] if self.complaints else "llama.cpp gives no reason"


@cache
def load_library() -> LlamaLibrary:
    """llama.cpp of the first installed package that carries it.

    Raises:
        UsageError: none does, or what it carries cannot be used.
    """
    package, path = _find_carrier()
    try:
        functions = ctypes.CDLL(str(path))
        _bind(functions, _FUNCTIONS)
    except (OSError, AttributeError) as error:  # a library that is missing in turn; a function that is gone
        raise _refuse(package, str(error)) from error
    complaints: deque[str] = deque(maxlen=8)
    library = LlamaLibrary(package, functions, complaints, _LogCallback(_build_log(complaints)))
    functions.llama_log_set(library.on_log, None)
    functions.llama_backend_init()
    default = functions.llama_context_default_params()
    if (default.n_ctx, default.n_batch, default.n_ubatch, default.n_seq_max) != _DEFAULT_SIZES:
        raise _refuse(package, "its parameters lie otherwise than those that ftcli knows")
    return library


def _bind(functions: Any, wanted: Mapping[str, tuple[Any, tuple[Any, ...]]]) -> None:
    """Nothing; the library ``functions`` has these, and knows their types.

    Raises:
        AttributeError: it has not.
    """
    for name, (result, arguments) in wanted.items():
        function = getattr(functions, name)
        function.restype, function.argtypes = result, arguments


def _find_carrier() -> tuple[str, Path]:
    """The name and version of a package with llama.cpp, and the path of its shared library."""
    for package, (module, names) in _CARRIERS.items():
        spec = importlib.util.find_spec(module)
        for folder in (spec and spec.submodule_search_locations) or ():
            if found := [path for name in names for path in sorted(Path(folder).glob(name))]:
                try:
                    return f"{package} {version(package)}", found[0]
                except PackageNotFoundError:
                    return package, found[0]
    raise UsageError("llama.cpp is not installed", hint=INSTALL_COMMAND)


def _refuse(package: str, why: str) -> UsageError:
    return UsageError(f"llama.cpp of {package} cannot be used", why=why, hint=f"{INSTALL_COMMAND} -U")


def _build_log(complaints: deque[str]) -> Callable[[int, bytes, Any], None]:
    """A callback that hands llama.cpp's lines to ``logging`` and keeps those that complain."""

    def write(level: int, text: bytes, _: Any) -> None:
        line = text.decode(errors="replace").strip()
        if level == _ERROR and line:
            complaints.append(line)
        _log.log(logging.WARNING if level in (_WARNING, _ERROR) else logging.DEBUG, "%s", line)

    return write


def check_runnable(header: GgufHeader, where: str) -> None:
    """Nothing; ``header`` (with its whole vocabulary) holds nothing at which llama.cpp ends the process.

    Whatever else may be wrong, llama.cpp refuses with a word. Its assertions: llama-vocab.cpp, llama-model.cpp, ggml.c.

    Raises:
        ContentError: a vocabulary, number of blocks or heads, epsilon or type that cannot be.
    """
    metadata, why = header.metadata, ""
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise ContentError("this GGUF file has no vocabulary", where=where)
    if len(set(tokens)) < len(tokens):
        why = "a token stands twice in its vocabulary"
    for name in ("token_type", "scores"):
        values = metadata.get(f"tokenizer.ggml.{name}", tokens)
        if not isinstance(values, list) or len(values) != len(tokens):
            why = f"its {len(tokens)} tokens have another number of {name}"
    n_blocks = metadata.get(f"{header.architecture}.block_count")
    if not isinstance(n_blocks, int) or not 0 < n_blocks <= _MOST_BLOCKS:
        why = f"it cannot have {n_blocks} blocks"
    for key, value in metadata.items():
        if key.endswith("epsilon") and not (isinstance(value, float) and 0 <= value < math.inf):
            why = f"{key} cannot be {value}"
    for tensor in header.tensors:
        if len(tensor.shape) == 1 and tensor.dtype != "F32":
            why = f"the vector {tensor.name} cannot be {tensor.dtype}"
    if why := why or _find_misfit(header):
        raise ContentError("the GGUF header is damaged", where=where, why=why, hint=COPY_AGAIN)


def _find_misfit(header: GgufHeader) -> str:
    """What cannot be in a family whose tensors are all weights, and its projections exactly as wide as its heads."""
    if header.architecture not in _PLAIN_FAMILIES:
        return ""
    if odd := next((tensor for tensor in header.tensors if tensor.dtype in _NO_WEIGHTS), None):
        return f"the weights {odd.name} cannot be {odd.dtype}"
    rows = {tensor.name: tensor.shape[0] for tensor in header.tensors if tensor.shape}
    attention = f"{header.architecture}.attention"
    n_heads = header.metadata.get(f"{attention}.head_count")
    if not isinstance(n_heads, int) or n_heads < 1:
        return f"it cannot have {n_heads} heads"
    width = header.metadata.get(f"{attention}.key_length", rows.get("blk.0.attn_q.weight", 0) // n_heads)
    for name, n in (("q", n_heads), ("k", header.metadata.get(f"{attention}.head_count_kv", n_heads))):
        if (found := rows.get(f"blk.0.attn_{name}.weight")) is not None and found != n * width:
            return f"its attn_{name} has {found} rows, not {n} heads of {width}"
    return ""


class LlamaModel:
    """The model of a GGUF file in llama.cpp's memory, with a cache of one sequence; freed with this object.

    The file must have passed `check_gguf_data` and `check_runnable`: what llama.cpp does not expect ends the process.

    Args:
        path: the file.
        n_threads: threads that compute on the CPU.
        adapter: a LoRA in a GGUF file of its own, which is added to the model.

    Raises:
        UsageError: there is no llama.cpp, or one that is too old for an adapter.
        ContentError: llama.cpp refuses a file.
        MemoryExhausted: it does not fit.
    """

    def __init__(self, path: Path, *, n_threads: int, adapter: Path | None = None) -> None:
        self.path = path
        self.n_threads = n_threads
        self._library = load_library()
        self._api = self._library.functions
        self._library.complaints.clear()
        self._model = self._api.llama_model_load_from_file(os.fsencode(path), self._api.llama_model_default_params())
        if not self._model:
            raise self._explain("llama.cpp cannot load the model")
        weakref.finalize(self, self._api.llama_model_free, self._model)
        self._adapter = self._load_adapter(adapter) if adapter else None  # before a context: it makes room for this too
        if self._api.llama_model_has_encoder(self._model):
            raise ContentError("the model has an encoder, so it does not continue a text", where=str(path))
        self.context = int(self._api.llama_model_n_ctx_train(self._model))
        self._vocabulary = self._api.llama_model_get_vocab(self._model)
        self.n_vocabulary = int(self._api.llama_vocab_n_tokens(self._vocabulary))
        self._context: Any = None
        self._room = 0
        self._free: Callable[[], object] = lambda: None

    def tokenize(self, text: str, *, is_chat: bool = False) -> list[int]:
        """The ids of ``text`` in the file's vocabulary, nothing put around it; in a chat control tokens are read."""
        data = text.encode()
        ids = (c_int32 * (len(data) + 8))()
        n_ids = self._api.llama_tokenize(self._vocabulary, data, len(data), ids, len(ids), False, is_chat)
        return list(ids[: max(0, n_ids)])

    def spell(self, token: int) -> str:
        """What the id ``token`` is called in the file."""
        return (self._api.llama_vocab_get_text(self._vocabulary, token) or b"").decode(errors="replace")

    def clear(self, room: int) -> None:
        """Nothing; the cache is empty and holds ``room`` tokens at least."""
        self._library.complaints.clear()
        if room > self._room:
            self._free()
            params = self._api.llama_context_default_params()
            params.n_ctx = -(-room // _ROOM_STEP) * _ROOM_STEP
            params.n_batch = params.n_ubatch = _BATCH_TOKENS
            self._context, self._room = self._api.llama_init_from_model(self._model, params), 0
            if not self._context:
                raise self._explain(f"llama.cpp cannot make room for {room} tokens")
            self._free, self._room = weakref.finalize(self, self._api.llama_free, self._context), params.n_ctx
            self._api.llama_set_n_threads(self._context, self.n_threads, self.n_threads)
            if self._adapter:
                adapters, scales = (c_void_p * 1)(self._adapter), (c_float * 1)(1.0)
                if self._api.llama_set_adapters_lora(self._context, adapters, 1, scales):
                    raise self._explain("llama.cpp cannot use the adapter")
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), False)

    def decode(self, ids: Sequence[int], wanted: Sequence[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Logits (wanted, vocabulary) behind the ``wanted`` (ascending) of ``ids``, which follow those in the cache."""
        logits = np.empty((len(wanted), self.n_vocabulary), dtype=np.float32)
        n_done = 0
        for start in range(0, len(ids), _BATCH_TOKENS):
            part = ids[start : start + _BATCH_TOKENS]
            places = [i - start for i in wanted if start <= i < start + len(part)]
            flags = (c_int8 * len(part))()
            for place in places:
                flags[place] = 1
            batch = _Batch(n_tokens=len(part), token=(c_int32 * len(part))(*part), logits=flags)
            if code := self._api.llama_decode(self._context, batch):
                raise self._explain(f"llama.cpp stopped with code {code}")
            for place in places:
                row = self._api.llama_get_logits_ith(self._context, place)
                if not row:
                    raise ContentError("the model gives no logits", where=str(self.path))
                logits[n_done] = np.ctypeslib.as_array(row, (self.n_vocabulary,))
                n_done += 1
        return logits

    def _load_adapter(self, path: Path) -> Any:
        """llama.cpp's handle of the adapter at ``path``, which is freed with the model."""
        try:
            _bind(self._api, _ADAPTER_FUNCTIONS)
        except AttributeError as error:
            raise _refuse(self._library.package, f"it is too old for an adapter: {error}") from error
        adapter = self._api.llama_adapter_lora_init(self._model, os.fsencode(path))
        if not adapter:
            raise self._explain(f"llama.cpp cannot use the adapter {path.name}")
        return adapter

    def _explain(self, what: str) -> ContentError | MemoryExhausted:
        why = "; ".join(self._library.complaints)
        if is_memory_error(RuntimeError(why)) or "failed to allocate" in why:
            return MemoryExhausted(what, where=str(self.path), why=self._library.explain())
        return ContentError(what, where=str(self.path), why=self._library.explain())
