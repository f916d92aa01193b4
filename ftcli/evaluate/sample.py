"""The rows on which models are judged: those of a run, or of a file; all of them, or documents spread over them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ftcli.data.chat import ChatRenderer, Rendered
from ftcli.data.limits import read_limits
from ftcli.data.loader import DataSplit, DocumentSet, Part, Reading, build_set, find_section, load_split, read_section
from ftcli.errors import ContentError, FtcliError, UsageError
from ftcli.evaluate.loss import count_targets, list_lengths
from ftcli.evaluate.target import Target
from ftcli.events import Notice, OnEvent
from ftcli.recipe import DataSection, DatasetSection, Recipe

_NO_LIMIT = 1 << 40


def load_run_split(recipe: Recipe, reading: Reading) -> DataSplit:
    """All documents of a run's recipe.

    Where too long rows were an error the run had none; that another tokenizer makes more tokens of them is none.

    Raises:
        FtcliError: the files are not there any more, or cannot be read.
    """
    held_out, data = recipe.eval.datasets if recipe.eval else (), recipe.data
    if data.overflow == "error":
        data = data.model_copy(update={"max_length": _NO_LIMIT})
    return load_split(recipe.datasets, data, held_out, reading, seed=recipe.train.seed)


def load_file_set(path: str, reading: Reading) -> DocumentSet:
    """All documents of ``path`` (a file, glob, folder or Hub id), whole.

    Raises:
        FtcliError: it is not there, or nothing in it is trained on.
    """
    if Path(path).suffix.lower() in (".yaml", ".yml"):
        raise UsageError("is a recipe, not a file of rows", where=path)
    section = DatasetSection(path=path)
    table = reading.load(section)
    part = Part(Path(path).name, table, np.ones(table.n_rows, dtype=bool), np.ones(table.n_rows), (section,))
    return build_set(part, DataSection(max_length=_NO_LIMIT))


def load_target_rows(target: Target, data: str | None, most_tokens: int) -> dict[str, list[Rendered]]:
    """Name → documents to compare models on: of the file ``data``, else of the run; none for what is no run.

    Raises:
        FtcliError: as `load_file_rows` and `load_run_rows`.
    """
    context = read_limits(target.files).context
    if data is not None:
        return load_file_rows(data, target.renderer, most_tokens=most_tokens, context=context)
    if target.recipe is None:
        return {}
    return load_run_rows(target.recipe, target.renderer, most_tokens=most_tokens, context=context)


def load_known_rows(
    target: Target, data: str | None, most_tokens: int, on_event: OnEvent, *, instead: str
) -> dict[str, list[Rendered]]:
    """As `load_target_rows`; without ``data`` what cannot be read is told, and ``instead`` what is done without rows.

    Raises:
        FtcliError: ``data`` cannot be read.
    """
    try:
        sets = load_target_rows(target, data, most_tokens)
    except (UsageError, ContentError) as error:
        if data is not None:
            raise
        on_event(Notice(f"the run's rows cannot be read ({error.where or error.what}): {error.what}"))
        sets = {}
    if not sets:
        on_event(Notice(f"there are no rows to compare on: {instead} (or name --data FILE)"))
    return sets


def load_best_rows(
    target: Target, data: str | None, most_tokens: int, on_event: OnEvent, *, instead: str
) -> list[Rendered]:
    """Of `load_known_rows` the one set that says most: of ``data``, else held out, else trained on; empty without any.

    Raises:
        FtcliError: ``data`` cannot be read.
    """
    sets = load_known_rows(target, data, most_tokens, on_event, instead=instead)
    return next((sets[name] for name in ("data", "held_out", "train") if name in sets), [])


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
        FtcliError: as `load_run_split`.
    """
    split = load_run_split(recipe, Reading(renderer))
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
    """The documents of ``path``, spread over its rows, under the name ``data``.

    Raises:
        FtcliError: as `load_file_set`; or nothing in it fits the context.
    """
    documents = choose_documents(load_file_set(path, Reading(renderer)).documents, most_tokens, context)
    if not documents:
        what = "no row of it has a token that would be trained on, and fits the context"
        raise ContentError(what, where=path, hint="name other rows to compare on: --data FILE; or --no-verify")
    return {"data": documents}


def find_common_system(recipe: Recipe) -> str:
    """The system text with which every conversation of a run began; empty where they differ, or cannot be read."""
    texts: set[str] = set()
    try:
        for section in recipe.datasets:
            for example in read_section(section, find_section(section)):
                first = example.messages[0] if example.messages else None
                texts.add(first.content or "" if first and first.role == "system" else "")
                if len(texts) > 1:
                    return ""
    except FtcliError:
        return ""
    return texts.pop() if texts else ""


def choose_documents(documents: Sequence[Rendered], most_tokens: int, context: int | None) -> list[Rendered]:
    """Documents evenly spread over all, of about ``most_tokens`` trained tokens together; one at least."""
    counts, lengths = count_targets(documents), list_lengths(documents)
    fitting = [i for i, n in enumerate(counts) if n and (context is None or lengths[i] <= context)]
    step = max(1.0, sum(counts[i] for i in fitting) / most_tokens)
    chosen: list[Rendered] = []
    taken = 0
    for position in range(int(len(fitting) / step) or min(1, len(fitting))):
        index = fitting[int(position * step)]
        if chosen and taken + counts[index] > most_tokens:
            continue
        chosen.append(documents[index])
        taken += counts[index]
    return chosen
