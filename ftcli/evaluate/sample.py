"""The rows on which an artifact is held against its source: those of its run, or of a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ftcli.data.chat import ChatRenderer, Rendered
from ftcli.data.loader import Reading, load_split
from ftcli.errors import ContentError, UsageError
from ftcli.recipe import Recipe, build_recipe

_NO_LIMIT = 1 << 40


def load_run_rows(
    recipe: Recipe, renderer: ChatRenderer, *, most_tokens: int, context: int | None
) -> dict[str, list[Rendered]]:
    """``train`` and ``held_out`` documents of a run's recipe, spread over its rows.

    Args:
        recipe: the run's.
        renderer: with tokenizer and template as they were trained.
        most_tokens: trained tokens of each set.
        context: of the model; longer documents are left out.

    Raises:
        FtcliError: the files are not there any more, or cannot be read.
    """
    held_out = recipe.eval.datasets if recipe.eval else ()
    split = load_split(recipe.datasets, recipe.data, held_out, Reading(renderer), seed=recipe.train.seed)
    sets = {
        "train": choose_documents(split.train.documents, most_tokens, context),
        "held_out": [
            document
            for part in split.held_out
            for document in choose_documents(part.documents, most_tokens // len(split.held_out), context)
        ],
    }
    return {name: documents for name, documents in sets.items() if documents}


def load_file_rows(
    path: str, renderer: ChatRenderer, *, most_tokens: int, context: int | None
) -> dict[str, list[Rendered]]:
    """The documents of ``path`` (a file, glob, folder or Hub id), spread over its rows, under the name ``data``.

    Raises:
        FtcliError: it is not there, or nothing in it is trained on.
    """
    if Path(path).suffix.lower() in (".yaml", ".yml"):
        raise UsageError("is a recipe, not a file of rows", where=path)
    recipe = build_recipe({"model": "none", "datasets": [{"path": path}]}, folder=Path(), name="data")
    data = recipe.data.model_copy(update={"max_length": _NO_LIMIT, "packing": False})
    split = load_split(recipe.datasets, data, (), Reading(renderer), seed=0)
    documents = choose_documents(split.train.documents, most_tokens, context)
    if not documents:
        raise ContentError("no row of it has a token that would be trained on, and fits the context", where=path)
    return {"data": documents}


def choose_documents(documents: Sequence[Rendered], most_tokens: int, context: int | None) -> list[Rendered]:
    """Documents evenly spread over all, of about ``most_tokens`` trained tokens together; one at least."""
    fitting = [i for i in range(len(documents)) if context is None or len(documents[i].ids) <= context]
    counts = {i: sum(documents[i].mask[1:]) for i in fitting}
    fitting = [i for i in fitting if counts[i]]
    total = sum(counts[i] for i in fitting)
    step = max(1.0, total / most_tokens)
    chosen: list[Rendered] = []
    taken = 0
    for position in range(int(len(fitting) / step) or min(1, len(fitting))):
        index = fitting[int(position * step)]
        if chosen and taken + counts[index] > most_tokens:
            continue
        chosen.append(documents[index])
        taken += counts[index]
    return chosen
