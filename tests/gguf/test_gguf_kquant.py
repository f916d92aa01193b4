"""Quantised rows against llama.cpp's own ``ggml_quantize_chunk``: not one bit may differ."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import SMOLLM2
from hypothesis import given, settings
from hypothesis import strategies as st

from ftcli.errors import ContentError, UsageError
from ftcli.evaluate.llama_library import load_library
from ftcli.gguf.kquant import quantize_rows
from ftcli.recipe import ModelSection
from ftcli.store.gguf_header import GGML_TYPES
from ftcli.store.target import find_model

K_TYPES = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
KINDS = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", *K_TYPES]
NUMBERS = {name: (number, block, size_bytes) for number, (name, block, size_bytes) in GGML_TYPES.items()}


@cache
def find_oracle() -> Any:
    """llama.cpp's function, or None where no package that is installed has it."""
    try:
        function = load_library().functions.ggml_quantize_chunk
    except (UsageError, AttributeError):
        return None
    function.restype = ctypes.c_size_t
    pointers, sizes = (ctypes.c_void_p, ctypes.c_void_p), (ctypes.c_int64,) * 3
    function.argtypes = (ctypes.c_int, *pointers, *sizes, ctypes.c_void_p)
    return function


needs_oracle = pytest.mark.skipif(find_oracle() is None, reason="no package here has ggml_quantize_chunk")


def quantize_in_c(values: torch.Tensor, kind: str) -> torch.Tensor:
    number, block, size_bytes = NUMBERS[kind]
    n_rows, n = values.shape
    written = torch.zeros((n_rows, n // block * size_bytes), dtype=torch.uint8)
    assert find_oracle()(number, values.data_ptr(), written.data_ptr(), 0, n_rows, n, None) == written.numel()
    return written


def check_same(values: torch.Tensor, kind: str, what: str) -> None:
    size_bytes = NUMBERS[kind][2]
    ours, theirs = (f(values, kind).view(-1, size_bytes) for f in (quantize_rows, quantize_in_c))
    n_bad = int((ours != theirs).any(1).sum())
    assert n_bad == 0, f"{what} as {kind}: {n_bad} of {len(ours)} blocks differ"


def make_cases(seed: int, rows: int = 32, n: int = 1024) -> Iterator[tuple[str, torch.Tensor]]:
    """Finite float32 of many characters; ``groups`` repeat, or scale, 16 or 32 values at a time."""
    random = np.random.default_rng(seed)
    shape = (rows, n)
    normal = random.standard_normal(shape)
    signed_zero = np.copysign(0.0, random.standard_normal(shape))
    constant = random.standard_normal((rows, n // 32)).repeat(32, 1)
    groups = random.uniform(-1.0, 1.0, (rows, n // 16)).repeat(16, 1)
    bits = random.integers(0, 1 << 32, shape, dtype=np.uint32).view(np.float32)
    cases = {
        "normal": normal,
        "weights in 16 bits": torch.tensor(normal * 0.02).bfloat16().float().numpy(),
        "heavy tails": random.standard_t(1.5, shape),
        "zeros": np.zeros(shape),
        "zeros of both signs": signed_zero,
        "constant": constant,
        "constant, sixteen at a time": groups,
        "nearly constant": np.where(random.random(shape) < 0.02, constant * (1 + 1e-6), constant),
        "two neighbours": np.where(random.random(shape) < 0.5, -1.0, -0.9999999),
        "close to -1": -1 + normal * 2e-7,
        "positive": np.abs(normal),
        "negative": -np.abs(normal),
        "small integers": random.integers(-3, 4, shape),
        "halves": random.integers(-20, 21, shape) / 2,
        "single outliers": np.where(np.arange(n) % 37 == 0, normal, 0.0),
        "sparse": np.where(random.random(shape) < 0.03, normal, signed_zero),
        "groups of unlike size": normal * np.exp(4 * groups),
        "groups of very unlike size": normal * np.exp(40 * groups),
        "any finite bits": np.where(np.isfinite(bits), bits, np.float32(0)),
    }
    cases |= {f"normal times {scale}": normal * scale for scale in (1e-39, 1e-30, 1e-20, 1e-15, 3e-7, 1e6, 1e30, 5e37)}
    for name, values in cases.items():
        yield name, torch.from_numpy(values.astype(np.float32))


@needs_oracle
@pytest.mark.parametrize("kind", KINDS)
def test_every_block_is_that_of_llama_cpp(kind: str) -> None:
    n_blocks = 0
    for name, values in make_cases(0, rows=32 if kind in K_TYPES else 8):
        check_same(values, kind, name)
        n_blocks += values.numel() // NUMBERS[kind][1]
    assert n_blocks >= 2000


@needs_oracle
@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1 << 32), kind=st.sampled_from(KINDS), log_scale=st.floats(-44, 37), n_rows=st.integers(1, 5)
)
def test_blocks_of_any_size_and_shape(seed: int, kind: str, log_scale: float, n_rows: int) -> None:
    random = np.random.default_rng(seed)
    values = random.standard_t(random.uniform(1, 9), (n_rows, 256 * int(random.integers(1, 5)))) + random.normal()
    values = np.clip(values * 10.0**log_scale, -3.4e38, 3.4e38).astype(np.float32)
    check_same(torch.from_numpy(values), kind, f"seed {seed}, 10 ** {log_scale}")


@needs_oracle
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_hundred_thousand_blocks(kind: str) -> None:
    block = NUMBERS[kind][1]
    n_blocks, seed = 0, 0
    while n_blocks < 200_000:
        for name, values in make_cases(seed := seed + 1, rows=128 if block == 256 else 16):
            check_same(values, kind, f"{name}, seed {seed}")
            n_blocks += values.numel() // max(block, 32)


@needs_oracle
@pytest.mark.real
@pytest.mark.parametrize("kind", KINDS)
def test_real_weights(kind: str) -> None:
    for name, weight in list_real_weights():
        rows = weight.reshape(-1, 576 if NUMBERS[kind][1] < 256 else 256)
        check_same(rows, kind, name)


@cache
def list_real_weights() -> list[tuple[str, torch.Tensor]]:
    """The matrices of the first, a middle and the last block of the real model, and the first of its embeddings."""
    from ftcli.model.base import load_model

    section = ModelSection(name_or_path=SMOLLM2)
    model = load_model(find_model(SMOLLM2), section, dtype=torch.bfloat16, device=torch.device("cpu"))
    found = {name: weight.detach().float() for name, weight in model.named_parameters() if weight.dim() == 2}
    chosen = [(name, weight[:2048]) for name, weight in found.items() if {"0", "14", "29"} & {*name.split(".")}]
    assert len(chosen) == 3 * 7
    return [*chosen, ("embeddings", found["model.embed_tokens.weight"][:2048])]


@pytest.mark.parametrize("kind", KINDS)
def test_a_reader_gets_the_values_back(kind: str) -> None:
    values = torch.randn(16, 512, generator=torch.Generator().manual_seed(0))
    read = gguf.dequantize(quantize_rows(values, kind).numpy(), gguf.GGMLQuantizationType[kind])
    bits = 8 * NUMBERS[kind][2] / NUMBERS[kind][1]
    error = (torch.from_numpy(read) - values).pow(2).mean().sqrt().item()
    assert error < {"F32": 1e-9, "F16": 1e-3, "BF16": 5e-3}.get(kind, 6 * 2.0**-bits)


def test_nothing_depends_on_how_the_work_is_cut() -> None:
    values = torch.randn(600, 512, generator=torch.Generator().manual_seed(0))  # over one chunk of most types
    for kind in KINDS:
        whole = quantize_rows(values, kind)
        assert torch.equal(whole, torch.cat([quantize_rows(part, kind) for part in values.split(33)]))
        assert torch.equal(whole, quantize_rows(values.t().contiguous().t(), kind))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
@pytest.mark.parametrize("kind", KINDS[3:])
def test_little_memory_is_needed_beside_input_and_output(kind: str) -> None:
    values = torch.randn(8192, 2048, generator=torch.Generator().manual_seed(0))
    quantize_rows(values[:512], kind)
    Path("/proc/self/clear_refs").write_text("5")
    before = read_memory("VmRSS")
    written = quantize_rows(values, kind)
    assert read_memory("VmHWM") - before - written.numel() < 40 << 20 < values.numel() * 4


def read_memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def test_half_precision_parameters_and_no_rows_at_all() -> None:
    values = torch.randn(4, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    for kind in KINDS:
        assert torch.equal(quantize_rows(values, kind), quantize_rows(torch.nn.Parameter(values.float()), kind))
        assert quantize_rows(values[:0], kind).shape == (0, 256 // NUMBERS[kind][1] * NUMBERS[kind][2])


@pytest.mark.parametrize(("kind", "n"), [("Q8_0", 48), ("Q4_K", 576), ("Q6_K", 32)])
def test_a_row_that_does_not_hold_whole_blocks_is_refused(kind: str, n: int) -> None:
    with pytest.raises(ContentError, match=f"a row of {n} values cannot be {kind}"):
        quantize_rows(torch.zeros(2, n), kind)
