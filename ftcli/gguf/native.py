"""K types packed by llama.cpp's own C code, where it is installed: the same bytes as `kquant`'s, sooner.

type ─▶ probe packed both ways ─▶ the same bytes? ─▶ ggml_quantize_chunk, else None
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_int, c_int64, c_size_t, c_void_p
from functools import cache

import torch

from ftcli.errors import UsageError
from ftcli.evaluate.llama_library import load_library
from ftcli.gguf.kquant import quantize_rows
from ftcli.store.gguf_header import GGML_TYPES

_K_TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")  # the others take no longer in torch
_TYPE_IDS = {name: number for number, (name, _, _) in GGML_TYPES.items()}
_PROBE_SHAPE = (48, 512)

Pack = Callable[[torch.Tensor], torch.Tensor]


@cache
def find_packer(kind: str) -> Pack | None:
    """A function (rows, n) → bytes (rows, size) as `quantize_rows` makes them of the type ``kind``.

    None where a GPU packs, llama.cpp is not installed, packs otherwise than ftcli, or is not called for this type.
    """
    if kind not in _K_TYPES or torch.cuda.is_available():
        return None
    try:
        function = load_library().functions.ggml_quantize_chunk
    except (UsageError, AttributeError):
        return None
    function.restype = c_size_t
    function.argtypes = (c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p)
    block, block_bytes = GGML_TYPES[_TYPE_IDS[kind]][1:]

    def pack(values: torch.Tensor) -> torch.Tensor:
        n_rows, n = values.shape
        source = values.float().contiguous()
        written = torch.empty((n_rows, n // block * block_bytes), dtype=torch.uint8)
        function(_TYPE_IDS[kind], source.data_ptr(), written.data_ptr(), 0, n_rows, n, None)
        return written

    probe = _make_probe()
    return pack if torch.equal(pack(probe), quantize_rows(probe, kind)) else None


def _make_probe() -> torch.Tensor:
    """Rows of all sizes: common ones, tiny and large ones, outliers, zeros, equal values and one sign."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(_PROBE_SHAPE, generator=generator)
    values *= 10.0 ** torch.linspace(-9, 3, len(values))[:, None]
    values[3::7, ::37] *= 50
    values[5] = 0
    values[6] = 0.25
    values[7::9] = values[7::9].abs()
    return values
