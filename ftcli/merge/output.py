"""Where the result goes: a folder's name that is free, or an earlier merge's that may be replaced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ftcli.evaluate.target import Target
from ftcli.merge.source import Source
from ftcli.store.output import check_outside, check_replaceable
from ftcli.store.run import MANIFEST_SCHEMA, now_text
from ftcli.store.target import fingerprint_model
from ftcli.store.version import list_versions


def name_output(source: Source) -> Path:
    """The folder that the result becomes where none is asked for: ``merged/`` of the run, or beside."""
    return source.run.path / "merged" if source.run else Path(f"{source.title}-merged")


def check_output(final: Path, source: Source, *, overwrite: bool) -> None:
    """None if the result may be written to ``final``.

    Raises:
        UsageError: something is there, or what is read lies in it.
    """
    check_outside(final, (source.adapter, source.files.folder), "merged")
    check_replaceable(
        final,
        overwrite=overwrite,
        is_own=lambda manifest: manifest.get("command") == "merge",
        otherwise="is no merged model of ftcli",
    )


def describe_origin(target: Target, command: str) -> dict[str, Any]:
    """What the manifest of a model that ``command`` made says of where it came from, and of how it was trained."""
    files, known = target.files, target.manifest
    base = known.get("base")
    if base is None:
        base = {"id": files.reference, "revision": files.revision, "fingerprint": fingerprint_model(files)}
    return {
        "schema": MANIFEST_SCHEMA,
        "command": command,
        "finished_at": now_text(),
        "versions": list_versions(),
        "base": base,
        "parent": target.name,
        **{key: known.get(key) for key in ("tokenizer_sha256", "template_sha256", "data_sha256", "template_date")},
        "chat_template_kwargs": target.template_kwargs,
        "added_tokens": list(target.added_tokens),
    }
