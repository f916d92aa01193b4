"""Where exported files go: a folder that more may be added to, each file whole from the moment it is there.

runs/NAME/gguf/  NAME-Q4_K_M.gguf  NAME-Q8_0.gguf  Modelfile  README.md  manifest.json
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftcli.errors import UsageError
from ftcli.evaluate.target import Target
from ftcli.gguf.draft import KINDS
from ftcli.store.file import disk_errors, hash_file, read_json, scratch_folder, sync_folder, write_json
from ftcli.store.output import MANIFEST, OTHER_OUTPUT, check_outside, read_output
from ftcli.store.run import MANIFEST_SCHEMA, RunFolder, find_owner, locked, now_text, read_manifest, update_manifest
from ftcli.store.target import path_exists
from ftcli.store.version import list_versions

LORA = "lora"  # the kind of a file that holds an adapter and no model
_TEXTS = ("README.md", "Modelfile")  # which are written anew with each export
_MOST_NAME_BYTES = 160  # of the 255 that a file's name has; the names beside it are longer


@dataclass(frozen=True)
class Output:
    """The ``folder`` into which files of ``target`` are written, the ``name`` that each begins with, and whether it
    ``overwrites`` those that are there.
    """

    target: Target
    folder: Path
    name: str
    overwrites: bool = False

    @property
    def run(self) -> RunFolder | None:
        """The run into whose folder they are written."""
        return find_owner(self.target.run, self.folder)

    def name_file(self, kind: str) -> str:
        """The name of the file of a kind, by GGUF's own convention."""
        return f"{self.name}-{'F32-LoRA' if kind == LORA else kind.upper()}.gguf"

    def check(self, kinds: Sequence[str]) -> None:
        """None if files of these kinds may be written here.

        Raises:
            UsageError: one is there, what is read lies here, or the folder is of something else.
        """
        where, target = str(self.folder), self.target
        if not self._is_beside:
            check_outside(self.folder, filter(None, (target.adapter, target.files.folder)), "exported")
        if (path_exists(self.folder, where) or self.folder.is_symlink()) and not self.folder.is_dir():
            raise UsageError("is no folder", where=where, hint=OTHER_OUTPUT)
        manifest = read_json(self.folder / MANIFEST) or {}
        if problem := self._find_stranger(manifest):
            raise UsageError(problem, where=where, hint=OTHER_OUTPUT)
        for path in (self.folder / self.name_file(kind) for kind in kinds):
            if not (path.exists() or path.is_symlink()):
                continue
            if path.is_dir():
                raise UsageError("is a folder", where=str(path), hint=OTHER_OUTPUT)
            if target.files.gguf_path and path.samefile(target.files.gguf_path):
                raise UsageError("is what is exported", where=str(path), hint=OTHER_OUTPUT)
            if not self.overwrites:
                hint = f"replace it: --overwrite; or {OTHER_OUTPUT}"
                raise UsageError("exists already", where=str(path), hint=hint)

    def _find_stranger(self, manifest: Mapping[str, Any]) -> str:
        """What the folder, which has this manifest, holds that is not of this export; empty for nothing."""
        if not manifest:
            foreign = [name for name in _TEXTS if path_exists(self.folder / name, str(self.folder))]
            return f"holds a {foreign[0]} of something else" if foreign else ""
        if (manifest.get("command"), manifest.get("name")) != ("export", self.name):
            return "holds something else: its manifest.json is not of this export"
        origin = manifest.get("origin")
        if origin and origin != self._origin and not (self._is_beside or self.run):
            return f"holds files of another model of this name: {origin}"
        return ""

    @contextmanager
    def open_scratch(self) -> Iterator[Path]:
        """A folder beside this one for what is not finished; a run into which files are written is locked meanwhile."""
        run = self.run
        with locked(run) if run else nullcontext(), scratch_folder(self.folder) as scratch:
            yield scratch

    def publish(self, path: Path, kind: str, entry: Mapping[str, Any]) -> Path:
        """Where the finished file ``path`` lies now; the manifest tells of it, by ``entry``, and of those before.

        Raises:
            UsageError: something came there meanwhile.
        """
        self.check([kind])
        final = self.folder / self.name_file(kind)
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
                **self._describe_source(manifest),
                "files": {name: files[name] for name in sorted(files) if (self.folder / name).is_file()},
                "exports": self._list_exports({**manifest.get("exports", {}), kind: {"file": final.name, **entry}}),
            }
            write_json(self.folder / MANIFEST, document)
        if self.run:
            name = str(final.resolve().relative_to(self.run.path.resolve()))
            found = read_manifest(self.run).get("verify") or {}
            update_manifest(self.run, verify={**found, name: entry["verify"]})
        return final

    @property
    def _is_beside(self) -> bool:
        """Whether a GGUF file of this very folder is exported: smaller ones that are made of it may stand beside it."""
        path = self.target.files.gguf_path
        return path is not None and path.parent.resolve() == self.folder.resolve()

    @property
    def _origin(self) -> str:
        """Where the model lies, which tells it from another of its name."""
        files, adapter = self.target.files, self.target.adapter
        if files.revision and not adapter:
            return f"{files.reference} at {files.revision}"
        return str((adapter or files.gguf_path or files.folder).resolve())

    def _describe_source(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        """What the files are made of, which stays what it was where one of them is."""
        keys = ("source", "origin", "base")
        if self._is_beside and manifest:
            return {key: manifest.get(key) for key in keys}
        return dict(zip(keys, (self.target.name, self._origin, self.target.manifest.get("base")), strict=True))

    def _list_exports(self, exports: Mapping[str, Any]) -> dict[str, Any]:
        """Kind → what is known of its file, for those that are still there; the smallest model last."""
        there = {kind: exports[kind] for kind in (*KINDS, LORA) if kind in exports}
        return {kind: entry for kind, entry in there.items() if (self.folder / entry["file"]).is_file()}


def find_output(target: Target, folder: Path | None, *, overwrites: bool) -> Output:
    """Where exports of ``target`` go: to ``folder``, else to ``gguf/`` of its run, or ``./NAME-gguf``.

    Raises:
        UsageError: the folder can have no such name.
    """
    name = name_target(target)
    if folder is not None:
        return Output(target, read_output(folder), name, overwrites)
    return Output(target, target.run.path / "gguf" if target.run else Path(f"{name}-gguf"), name, overwrites)


def name_target(target: Target) -> str:
    """What ``target`` is called, so that it can be a part of a file's name."""
    plain = re.sub(r"[^\w.+-]+", "-", target.title).encode()[:_MOST_NAME_BYTES].decode(errors="ignore")
    return plain.strip(".-") or "model"
