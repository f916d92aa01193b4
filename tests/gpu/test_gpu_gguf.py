"""Rows are quantised to the same bytes on a CUDA device as on the CPU."""

from __future__ import annotations

import pytest
import torch

from ftcli.gguf.kquant import quantize_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("scale", [1e-39, 1e-15, 0.02, 1e30, 5e37])
@pytest.mark.parametrize(
    "kind", ["BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
)
def test_the_device_writes_the_same_bytes(kind: str, scale: float) -> None:
    values = torch.randn(512, 2048, generator=torch.Generator().manual_seed(0)) * scale
    values[:, ::5] = values[:, ::5].bfloat16().float()
    values[3:9, 64:900] = 0
    assert torch.equal(quantize_rows(values.cuda(), kind).cpu(), quantize_rows(values, kind))
