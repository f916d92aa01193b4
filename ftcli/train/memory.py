"""Memory of this process, as the operating system and CUDA count it."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class PeakMemory:
    """The most that this process has held; on CUDA what was reserved and, of that, allocated, 0 without it."""

    rss_bytes: int
    device_bytes: int
    allocated_device_bytes: int


def start_measuring() -> int:
    """Bytes resident in host memory now; peaks are counted from here where the system permits it (Linux).

    Garbage and free heap are given back first. The allocator is left as it is: a fixed M_MMAP_THRESHOLD (64 KiB,
    1 MiB) would make the peak follow live tensors (469 and 490 MB instead of 570–620 in a float32 LoRA step), but
    costs 25–50 % more CPU in page faults.
    """
    gc.collect()
    with suppress(OSError, AttributeError):  # no glibc
        ctypes.CDLL(None).malloc_trim(0)
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
