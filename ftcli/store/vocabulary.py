"""What tokenizer files say of themselves: entries, special tokens, chat template; nothing is tokenised or compiled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftcli.errors import ContentError
from ftcli.store.file import read_json
from ftcli.store.gguf_header import GgufHeader, read_gguf_header

_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")
_CONTROL = 3  # llama.cpp: LLAMA_TOKEN_TYPE_CONTROL


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as its files describe it.

    ``entries`` is the number of ids (the highest and one); ``special`` are all control tokens by id; ``roles``
    name those that are bos, eos, pad and unk, each with its id or None where no file gives that.
    """

    entries: int | None
    special: Mapping[int, str]
    roles: Mapping[str, tuple[str, int | None]]
    template: str | None


def read_vocabulary(folder: Path, gguf_file: str | None = None) -> Vocabulary | None:
    """The vocabulary that lies in ``folder`` or in its GGUF file; None if none does.

    Raises:
        ContentError: a file that cannot be read.
    """
    if gguf_file:
        return _read_gguf(folder / gguf_file)
    config = read_json(folder / "tokenizer_config.json") or {}
    document = read_json(folder / "tokenizer.json") or {}
    if not config and not document:
        return None
    ids, special = _list_ids(document), _list_special(document, config)
    named = {text: token for token, text in special.items()}
    roles = {}
    extra = read_json(folder / "special_tokens_map.json") or {}
    for role in _ROLES:
        value = config.get(role, extra.get(role))
        text = value.get("content") if isinstance(value, Mapping) else value
        if isinstance(text, str):
            token = named.get(text, ids.get(text) if isinstance(ids, dict) else None)
            roles[role] = (text, token if isinstance(token, int) else None)
    highest = max([_count(ids) - 1, *special], default=-1)
    return Vocabulary(
        entries=highest + 1 if document else None,
        special=dict(sorted(special.items())),
        roles=roles,
        template=_read_template(folder, config),
    )


def _list_ids(document: Mapping[str, Any]) -> Any:
    model = document.get("model")
    return model.get("vocab") if isinstance(model, Mapping) else None


def _count(ids: Any) -> int:
    """Ids of a BPE vocabulary (token → id) or a Unigram one (list of [token, score])."""
    if isinstance(ids, dict):
        return 1 + max((token for token in ids.values() if isinstance(token, int)), default=-1)
    return len(ids) if isinstance(ids, list) else 0


def _list_special(document: Mapping[str, Any], config: Mapping[str, Any]) -> dict[int, str]:
    found: dict[int, str] = {}
    decoder = config.get("added_tokens_decoder")
    for key, entry in decoder.items() if isinstance(decoder, Mapping) else ():
        if isinstance(entry, Mapping) and str(key).isdigit() and len(str(key)) < 10:
            found[int(key)] = str(entry.get("content"))
    added = document.get("added_tokens")
    for entry in added if isinstance(added, list) else ():
        if isinstance(entry, Mapping) and isinstance(entry.get("id"), int):
            found[entry["id"]] = str(entry.get("content"))
    return found


def _read_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ContentError(f"cannot be read: {error}", where=str(path)) from error
    given = config.get("chat_template")
    if isinstance(given, list):  # several by name
        named = {str(e.get("name")): e.get("template") for e in given if isinstance(e, Mapping)}
        given = named.get("default") or next(iter(named.values()), None)
    return given if isinstance(given, str) else None


def read_gguf_vocabulary(path: Path) -> GgufHeader:
    """The header of the GGUF file at ``path`` with its whole vocabulary, but for the merges.

    Raises:
        ContentError, DiskError: as `read_gguf_header`.
    """
    return read_gguf_header(path, keep=1 << 21, skip=("tokenizer.ggml.merges",))


def _read_gguf(path: Path) -> Vocabulary | None:
    metadata = read_gguf_vocabulary(path).metadata
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        return None
    kinds = metadata.get("tokenizer.ggml.token_type")
    kinds = kinds if isinstance(kinds, list) else []
    special = {i: str(tokens[i]) for i, kind in enumerate(kinds[: len(tokens)]) if kind == _CONTROL}
    roles = {}
    names = dict(zip(_ROLES, ("bos", "eos", "padding", "unknown"), strict=True))
    for role, name in names.items():
        token = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if isinstance(token, int) and 0 <= token < len(tokens):
            roles[role] = (str(tokens[token]), token)
    template = metadata.get("tokenizer.chat_template")
    return Vocabulary(len(tokens), special, roles, template if isinstance(template, str) else None)
