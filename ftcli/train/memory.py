"""Memory of this process, as the operating system and CUDA count it."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

_M_MMAP_THRESHOLD = -3  # malloc.h
_LARGE_BYTES = 4 << 20  # of 1, 2 and 4 MiB the one with the fewest page faults at the same peak


@dataclass(frozen=True)
class PeakMemory:
    """The most that this process has held; on CUDA what was reserved and, of that, allocated, 0 without it."""

    rss_bytes: int
    device_bytes: int
    allocated_device_bytes: int


def limit_heap() -> None:
    """Nothing; from now on tensors of 4 MiB and more leave the process as they are freed (glibc).

    A freed block cannot be had again at its own size and alignment (glibc bug 14581), so without this and
    ``release_between_blocks`` a run's peak lies 10 to 60 % above its live tensors. A lower limit would follow them
    as well without the releases, but page faults then cost up to half of the time.
    """
    with suppress(OSError, AttributeError):  # no glibc
        _open_libc().mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)


def release_between_blocks(model: nn.Module) -> None:
    """Nothing; while ``model`` trains, free heap is given back before the head, and before each block, both ways."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    def release(module: nn.Module, _: object) -> None:
        if module.training:
            release_free_memory()

    def release_backward(module: nn.Module, _: object, output: Any) -> None:
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        if module.training and hidden.requires_grad:
            hidden.register_hook(lambda _: release_free_memory())

    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.register_forward_pre_hook(release)
            module.register_forward_hook(release_backward)
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is not None:
        head.register_forward_pre_hook(release)


def release_free_memory() -> None:
    """Nothing; what the heap holds of freed memory belongs to the system again (glibc)."""
    with suppress(OSError, AttributeError):
        _open_libc().malloc_trim(0)


@cache
def _open_libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def start_measuring() -> int:
    """Bytes resident in host memory now; peaks are counted from here where the system permits it (Linux).

    Garbage and free heap are given back first.
    """
    gc.collect()
    release_free_memory()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    return measure_rss()


def measure_peak() -> PeakMemory:
    """The peaks since ``start_measuring``, or since the process began."""
    rss = _read_high_water()
    if not torch.cuda.is_available():
        return PeakMemory(rss, 0, 0)
    return PeakMemory(rss, torch.cuda.max_memory_reserved(), torch.cuda.max_memory_allocated())


def measure_rss() -> int:
    """Bytes resident in host memory now; the peak where the system does not say."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    return _read_high_water()


def measure_memory() -> int:
    """Bytes held now: allocated on the CUDA device where there is one, else resident in host memory."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else measure_rss()


def _read_high_water() -> int:
    with suppress(OSError):  # ru_maxrss also counts what the process was before exec
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
