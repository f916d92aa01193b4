"""Memory of this process, as the operating system and CUDA count it."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class PeakMemory:
    """The most that this process has held so far; ``device_bytes`` is what CUDA reserved, 0 without it."""

    rss_bytes: int
    device_bytes: int


def measure_peak() -> PeakMemory:
    """The peaks since the process began."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return PeakMemory(rss, torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0)


def measure_memory() -> int:
    """Bytes held now: allocated on the CUDA device where there is one, else resident in host memory."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    return measure_peak().rss_bytes
