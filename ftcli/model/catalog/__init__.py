"""Published model configs that ship with ftcli, so that a model can be described by its id, offline.

`catalog.json` is generated (see `make_catalog.py`): every value was read in a public file, which its entry names.
It holds configs and counts, never weights or tokenizers, and it imports nothing heavy.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

CATALOG_PATH = Path(__file__).with_name("catalog.json")


@dataclass(frozen=True)
class Source:
    """A public file: the GitHub repository (``owner/name``), its commit and the path in it."""

    repository: str
    commit: str
    path: str

    def __str__(self) -> str:
        return f"github.com/{self.repository} {self.path} at {self.commit[:12]}"


@dataclass(frozen=True)
class Published:
    """A total parameter count as the file states it: ``7241732096``, or rounded, ``8.03B``."""

    parameters: str
    source: Source


@dataclass(frozen=True)
class CatalogEntry:
    """A model's config as published, less the keys that only record who saved it.

    ``same_architecture_as`` is an id whose config stands in: the shapes are this model's too, but its context
    length, rotary base and token ids may differ. ``part`` is the part of a multimodal config that ``config`` is
    (``text_config``: the model without its vision tower), "" for a whole one.
    """

    id: str
    config: dict[str, Any]
    source: Source
    revision: str | None = None
    same_architecture_as: str | None = None
    part: str = ""
    published: Published | None = None


def find_entry(model_id: str) -> CatalogEntry | None:
    """The entry of ``model_id``, in any letter case, or None."""
    entries = _load_entries()
    return entries.get(model_id) or entries.get(_list_folded().get(model_id.casefold(), ""))


def list_entries() -> list[CatalogEntry]:
    """All entries, sorted by id."""
    return list(_load_entries().values())


@cache
def _load_entries() -> dict[str, CatalogEntry]:
    catalog = json.loads(CATALOG_PATH.read_text(encoding="utf-8"))
    sources = {key: Source(**value) for key, value in catalog["sources"].items()}
    return {
        model_id: CatalogEntry(
            id=model_id,
            config=catalog["configs"][model["config"]],
            source=sources[model["source"]],
            revision=model["revision"],
            same_architecture_as=model.get("same_architecture_as"),
            part=model.get("part", ""),
            published=_read_published(model["published"], sources),
        )
        for model_id, model in catalog["models"].items()
    }


def _read_published(value: dict[str, Any], sources: dict[str, Source]) -> Published | None:
    return Published(value["parameters"], sources[value["where"]]) if value["parameters"] else None


@cache
def _list_folded() -> dict[str, str]:
    return {model_id.casefold(): model_id for model_id in _load_entries()}
