"""``ftcli tokenize --text``: one text, token by token, as the tokenizer writes it into a plain document."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ftcli.data.piece import Piece, PieceReader
from ftcli.data.tokenizer import add_tokens, load_tokenizer
from ftcli.errors import UsageError
from ftcli.recipe import load_recipe
from ftcli.store.target import find_tokenizer


@dataclass(frozen=True)
class TextReport:
    """The tokens of a text; ``ids`` begin with BOS where the tokenizer puts one."""

    model: str
    text: str
    n_tokens: int
    n_characters: int
    n_bytes: int
    ids: tuple[int, ...]
    pieces: tuple[Piece, ...]


def tokenize_text(
    text: str, *, model: str | None = None, recipe: str | None = None, overrides: tuple[str, ...] = ()
) -> TextReport:
    """The tokens of ``text`` by the tokenizer of a model, or of a recipe's model with its new tokens.

    Raises:
        FtcliError: neither is named, or the tokenizer cannot be loaded.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError("--text is not UTF-8", hint="give it in the encoding of the terminal") from error
    if recipe is not None and Path(recipe).suffix.lower() not in (".yaml", ".yml"):
        raise UsageError("--text takes the place of the data", where=recipe, hint="leave it out, or name a recipe")
    loaded = load_recipe(Path(recipe), overrides=overrides).recipe if recipe else None
    name = model or (loaded.model.name_or_path if loaded else None)
    if name is None:
        raise UsageError("which model's tokenizer?", hint="name one with -m MODEL, or give a recipe")
    tokenizer = load_tokenizer(
        find_tokenizer(name, revision=None if model or not loaded else loaded.model.revision),
        trust_remote_code=loaded.model.trust_remote_code if loaded else False,
    )
    if loaded:
        add_tokens(tokenizer, loaded.tokenizer.add_tokens)
    ids = tokenizer(text).input_ids
    reader = PieceReader(tokenizer)
    return TextReport(
        model=name,
        text=text,
        n_tokens=len(ids),
        n_characters=len(text),
        n_bytes=len(text.encode()),
        ids=tuple(ids),
        pieces=tuple(reader.read(id) for id in ids),  # noqa: A001
    )
