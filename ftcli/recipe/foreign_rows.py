"""The data sets that other tools' configs name, as entries of ours."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ftcli.recipe.foreign import Kind, Tool

_KNOWN = {
    "path", "type", "data_files", "ds_type", "field_messages", "split", "name", "roles_to_train", "train_on_eos",
}  # fmt: skip


def list_rows(
    left: dict[str, Any], tool: Tool, path: Path, note: Callable[[Kind, str, str], None]
) -> Iterator[dict[str, Any]]:
    """Yields an entry of ``datasets`` for each that the config at ``path`` names; its keys go out of ``left``."""
    take, name = left.pop, tool.name
    if name == "axolotl":
        trains_all = bool(take("train_on_inputs", False))
        for entry in take("datasets", None) or []:
            yield _translate_axolotl(entry, note, trains_all=trains_all)
    elif name == "LLaMA-Factory":
        trains_all, last = bool(take("train_on_prompt", False)), bool(take("mask_history", False))
        folders = [base / (take("dataset_dir", None) or "data") for base in (path.parent, Path())]
        for part in str(take("dataset", None) or "").split(","):
            if part.strip():
                yield _find_registered(part.strip(), folders, note, trains_all=trains_all, last=last)
    else:
        trains_answers = take("assistant_only_loss", False) or take("completion_only_loss", False)
        rows = take("dataset_name", None) or take("datasets", None)
        if isinstance(rows, str):
            split, config = take("dataset_train_split", "train"), take("dataset_config", None)
            more = ({"split": split} if split != "train" else {}) | ({"name": config} if config else {})
            yield {"path": rows, **more, "train_on": "assistant" if trains_answers else "all"}
        if not trains_answers:
            text = "TRL learns every token of a conversation unless it is set: train_on: all keeps that"
            note("default", "assistant_only_loss", f"{text}; assistant is what most people want")


def _translate_axolotl(entry: Any, note: Callable[[Kind, str, str], None], *, trains_all: bool) -> dict[str, Any]:
    if not isinstance(entry, dict):
        return {"path": str(entry)}
    rows: dict[str, Any] = {"path": entry.get("data_files") or entry.get("path")}
    if isinstance(rows["path"], list):
        rows["path"] = rows["path"][0]
        note("differs", "datasets.data_files", f"only {rows['path']} is taken; a glob or a folder takes more")
    kind = str(entry.get("type", "")).partition(".")[0].partition(":")[0]
    ours = {"alpaca": "alpaca", "chat_template": "messages", "sharegpt": "sharegpt", "completion": "text"}
    if kind in ours:
        rows["type"] = ours[kind]
    elif kind:
        note("differs", "datasets.type", f"{entry.get('type')}: the format is told from the rows")
    if entry.get("field_messages") and rows.get("type") == "messages":
        rows["columns"] = {"messages": entry["field_messages"]}
    for key in ("split", "name"):
        if entry.get(key):
            rows[key] = entry[key]
    roles = entry.get("roles_to_train")
    if trains_all:
        rows["train_on"] = "all"
    elif roles and list(roles) != ["assistant"]:
        rows["train_on"] = list(roles)
    if extra := sorted(set(entry) - _KNOWN):
        note("missing", "datasets", f"{', '.join(extra)}: see columns and roles in docs/data.md")
    return rows


def _find_registered(
    name: str, folders: Sequence[Path], note: Callable[[Kind, str, str], None], *, trains_all: bool, last: bool
) -> dict[str, Any]:
    """LLaMA-Factory's data sets are names in ``dataset_info.json``."""
    train_on = {"train_on": "all"} if trains_all else {"train_on": "last_assistant"} if last else {}
    for folder in folders:
        try:
            entry = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))[name]
            path = entry.get("hf_hub_url") or str(folder / entry["file_name"])
            kind = {"sharegpt": "sharegpt", "alpaca": "alpaca"}.get(entry.get("formatting", "alpaca"))
            return {"path": path, **({"type": kind} if kind else {}), **train_on}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    note("differs", "dataset", f"{name} is a name in dataset_info.json, which is not here: {name}.json stands for it")
    return {"path": f"{name}.json", **train_on}
