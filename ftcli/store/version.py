"""The versions of what made a result, for its manifest; nothing of it is imported."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from ftcli import __version__


def list_versions() -> dict[str, str]:
    """Name → version of what decides a run's numbers."""
    versions = {"ftcli": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "safetensors", "tokenizers"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions
