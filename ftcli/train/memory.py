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

_SPARE_BYTES = 1 << 30  # beside the weights of a model that answers: logits, activations, libraries
_M_MMAP_THRESHOLD = -3  # malloc.h
PLAIN_GROWTH = 0.03  # of the memory held: what goes back is faulted in again, so not every block gives back
FUSED_GROWTH = 0.2  # the fast path holds less, and its time would show the faults more
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


def release_between_blocks(model: nn.Module, *, growth: float = PLAIN_GROWTH) -> None:
    """Nothing; while ``model`` trains, free heap goes back before the head, and between blocks where it has grown.

    Each page that goes back is faulted in again, at a cost that is seen in a step's time; so on the way through the
    blocks, forward and back, it is given back only when memory has grown by the share ``growth``, which a forecast
    has to bear.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    heap = _Heap(growth)

    def before_block(module: nn.Module, _: object) -> None:
        if module.training:
            heap.trim_grown()

    def after_block(module: nn.Module, _: object, output: Any) -> None:
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        if module.training and hidden.requires_grad:
            hidden.register_hook(lambda _: heap.trim_grown())

    def before_head(module: nn.Module, _: object, output: object) -> None:
        if module.training and torch.is_grad_enabled():
            heap.trim()

    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for module in blocks:
        module.register_forward_pre_hook(before_block)
        module.register_forward_hook(after_block)
    if blocks:
        blocks[-1].register_forward_hook(before_head)


class _Heap:
    """The heap of this process: what was held when free memory last went back, and the most that was ever held."""

    def __init__(self, growth: float) -> None:
        self.growth = growth
        self.trimmed_bytes = self.most_bytes = 0

    def trim(self) -> None:
        release_free_memory()
        self.trimmed_bytes = measure_rss()

    def trim_grown(self) -> None:
        held = measure_rss()
        self.most_bytes = max(self.most_bytes, held)
        self.trimmed_bytes = min(self.trimmed_bytes, held)
        if held - self.trimmed_bytes > self.growth * self.most_bytes:
            self.trim()


def release_free_memory() -> None:
    """Nothing; what the heap holds of freed memory belongs to the system again (glibc)."""
    with suppress(OSError, AttributeError):
        _open_libc().malloc_trim(0)


def release_models() -> None:
    """Nothing; models that nobody refers to any more have left memory, the device's too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    release_free_memory()


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


def measure_available() -> int:
    """Bytes that this process can still take: of the CUDA device, else of host memory, swap and what limits it."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    limits = [sys.maxsize, _read_cgroup_room()]
    with suppress(OSError, ValueError, IndexError):
        sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in _read_lines("/proc/meminfo")}
        limits.append(sizes["MemAvailable"] + sizes["SwapFree"])
    with suppress(OSError, ValueError, IndexError):
        address_space = resource.getrlimit(resource.RLIMIT_AS)[0]
        if address_space != resource.RLIM_INFINITY:
            used = int(_read_lines("/proc/self/statm")[0].split()[0]) * resource.getpagesize()
            limits.append(max(0, address_space - used))
    return min(limits)


def explain_lack(n_parameters: int, dtype: torch.dtype) -> str:
    """Why a model of so many parameters cannot be run in ``dtype``, with both sizes; empty where it can."""
    needed, available = n_parameters * dtype.itemsize + _SPARE_BYTES, measure_available()
    if needed <= available:
        return ""
    return f"it takes {needed / 1e9:.1f} GB in memory, and {available / 1e9:.1f} are free"


def _read_cgroup_room() -> int:
    """What the process's control groups leave it (cgroup v2 and v1); file pages are given up before anything else."""
    room = sys.maxsize
    for line in _read_lines("/proc/self/cgroup"):
        _, controllers, name = line.split(":", 2)
        is_v2 = not controllers
        if not is_v2 and "memory" not in controllers.split(","):
            continue
        root = Path("/sys/fs/cgroup" if is_v2 else "/sys/fs/cgroup/memory")
        files = ("memory.max", "memory.current") if is_v2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        inner = root / name.lstrip("/")
        for folder in (inner, *inner.parents):
            if folder.is_relative_to(root):
                with suppress(OSError, ValueError):  # "max" is no limit
                    limit, used = (int((folder / file).read_text()) for file in files)
                    stat = dict(line.split() for line in _read_lines(str(folder / "memory.stat")))
                    used -= int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))
                    room = min(room, max(0, limit - used))
    return room


def _read_lines(path: str) -> list[str]:
    with suppress(OSError):
        return Path(path).read_text(encoding="utf-8").splitlines()
    return []


def _read_high_water() -> int:
    with suppress(OSError):  # ru_maxrss also counts what the process was before exec
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
