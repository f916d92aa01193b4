"""Held-out rows once more for each role, with the turns of that role alone as what is learned."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ftcli.data.chat import ChatRenderer
from ftcli.data.documents import Documents, build_table
from ftcli.data.loader import DocumentSet, Part, build_set, find_section, read_section
from ftcli.data.message import ROLES, Example
from ftcli.errors import ContentError
from ftcli.recipe import DataSection


def load_roles(part: DocumentSet, renderer: ChatRenderer, data: DataSection) -> tuple[dict[str, Documents], list[str]]:
    """Role → the documents of ``part``'s rows that have it, and a sentence for each role whose turns cannot be marked.

    Turns that the row itself keeps from being learned (``train: false``) belong to no role.
    """
    every = [example for section in part.sections for example in read_section(section, find_section(section))]
    examples = [example for example, is_chosen in zip(every, part.rows, strict=True) if is_chosen]
    found: dict[str, Documents] = {}
    refused: list[str] = []
    for role in ROLES:
        marked = [_mark(example, role) for example in examples]
        marked = [example for example in marked if any(message.train for message in example.messages)]
        if not marked:
            continue
        try:
            table = build_table(marked, renderer, "assistant")
            every_row = np.ones(table.n_rows, dtype=bool)
            found[role] = build_set(Part(part.name, table, every_row, every_row, part.sections), data).documents
        except ContentError as error:
            refused.append(f"no loss on the turns of {role} in {part.name}: {error.what}")
    return found, refused


def _mark(example: Example, role: str) -> Example:
    turns = (replace(m, train=m.role == role and m.train is not False) for m in example.messages)
    return replace(example, messages=tuple(turns))
