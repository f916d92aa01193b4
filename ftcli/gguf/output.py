"""Where exported files go: a folder that more may be added to, each file whole from the moment it is there.

runs/NAME/gguf/  NAME-Q4_K_M.gguf  NAME-Q8_0.gguf  Modelfile  README.md  manifest.json
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftcli.errors import UsageError
from ftcli.evaluate.target import MANIFEST, Target
from ftcli.gguf.draft import KINDS
from ftcli.merge.output import check_outside, read_output
from ftcli.store.file import disk_errors, hash_file, read_json, sync_folder, write_json
from ftcli.store.run import MANIFEST_SCHEMA, find_owner, now_text
from ftcli.store.target import path_exists
from ftcli.train.record import list_versions

LORA = "lora"  # the kind of a file that holds an adapter and no model
_TEXTS = ("README.md", "Modelfile")  # which are written anew with each export
_MOST_NAME_BYTES = 160  # of the 255 that a file's name has; the names beside it are longer


@dataclass(frozen=True)
class Output:
    """The folder of the files, and the ``name`` that each begins with."""

    folder: Path
    name: str

    def name_file(self, kind: str) -> str:
        """The name of the file of a kind, by GGUF's own convention."""
        return f"{self.name}-{'F32-LoRA' if kind == LORA else kind.upper()}.gguf"

    def check(self, target: Target, kinds: Sequence[str], *, overwrite: bool) -> None:
        """None if files of these kinds may be written here.

        Raises:
            UsageError: one is there, what is read lies here, or the folder is of something else.
        """
        where, is_beside = str(self.folder), self._holds(target.files.gguf_path)
        if not is_beside:
            check_outside(self.folder, target, "exported")
        if (path_exists(self.folder, where) or self.folder.is_symlink()) and not self.folder.is_dir():
            raise UsageError("is no folder", where=where, hint="choose another --output")
        manifest = read_json(self.folder / MANIFEST) or {}
        if manifest and (manifest.get("command"), manifest.get("name")) != ("export", self.name):
            what = "holds something else: its manifest.json is not of this export"
            raise UsageError(what, where=where, hint="choose another --output")
        foreign = [name for name in _TEXTS if not manifest and path_exists(self.folder / name, where)]
        if foreign:
            raise UsageError(f"holds a {foreign[0]} of something else", where=where, hint="choose another --output")
        origin = manifest.get("origin")
        if origin and origin != find_origin(target) and not (is_beside or find_owner(target.run, self.folder)):
            what = f"holds files of another model of this name: {origin}"
            raise UsageError(what, where=where, hint="choose another --output")
        for path in (self.folder / self.name_file(kind) for kind in kinds):
            if not (path.exists() or path.is_symlink()):
                continue
            if path.is_dir():
                raise UsageError("is a folder", where=str(path), hint="choose another --output")
            if target.files.gguf_path and path.samefile(target.files.gguf_path):
                raise UsageError("is what is exported", where=str(path), hint="choose another --output")
            if not overwrite:
                raise UsageError(
                    "exists already", where=str(path), hint="replace it: --overwrite; or choose another --output"
                )

    def publish(self, path: Path, target: Target, kind: str, entry: Mapping[str, Any]) -> Path:
        """Where the finished file ``path`` lies now; the manifest tells of it, by ``entry``, and of those before."""
        final, is_beside = self.folder / self.name_file(kind), self._holds(target.files.gguf_path)
        with disk_errors(final):
            described = {"sha256": hash_file(path), "bytes": path.stat().st_size}
            self.folder.mkdir(parents=True, exist_ok=True)
            path.replace(final)
            sync_folder(self.folder)
            manifest = read_json(self.folder / MANIFEST) or {}
            files = {**manifest.get("files", {}), final.name: described}
            document = {
                "schema": MANIFEST_SCHEMA,
                "command": "export",
                "finished_at": now_text(),
                "versions": list_versions(),
                "name": self.name,
                "source": manifest.get("source", target.name) if is_beside else target.name,
                "origin": manifest.get("origin") if is_beside else find_origin(target),
                "base": manifest.get("base") if is_beside else target.manifest.get("base"),
                "files": {name: files[name] for name in sorted(files) if (self.folder / name).is_file()},
                "exports": self._list_exports({**manifest.get("exports", {}), kind: {"file": final.name, **entry}}),
            }
            write_json(self.folder / MANIFEST, document)
        return final

    def _holds(self, path: Path | None) -> bool:
        """Whether ``path`` is a file of this folder: smaller ones that are made of it may stand beside it."""
        return path is not None and path.parent.resolve() == self.folder.resolve()

    def _list_exports(self, exports: Mapping[str, Any]) -> dict[str, Any]:
        """Kind → what is known of its file, for those that are still there; the smallest model last."""
        there = {kind: exports[kind] for kind in (*KINDS, LORA) if kind in exports}
        return {kind: entry for kind, entry in there.items() if (self.folder / entry["file"]).is_file()}


def find_origin(target: Target) -> str:
    """Where the model lies, which tells it from another of its name."""
    if target.files.revision and not target.adapter:
        return f"{target.files.reference} at {target.files.revision}"
    return str((target.adapter or target.files.gguf_path or target.files.folder).resolve())


def find_output(target: Target, folder: Path | None) -> Output:
    """Where exports of ``target`` go: to ``folder``, else to ``gguf/`` of its run, or ``./NAME-gguf``.

    Raises:
        UsageError: the folder can have no such name.
    """
    name = name_target(target)
    if folder is not None:
        return Output(read_output(folder), name)
    return Output(target.run.path / "gguf" if target.run else Path(f"{name}-gguf"), name)


def name_target(target: Target) -> str:
    """What ``target`` is called, so that it can be a part of a file's name."""
    plain = re.sub(r"[^\w.+-]+", "-", target.title).encode()[:_MOST_NAME_BYTES].decode(errors="ignore")
    return plain.strip(".-") or "model"
