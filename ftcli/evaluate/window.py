"""Long documents as windows, so that a model with a shorter context can be measured on them.

    length 8, stride 3    ########......        what is new in each window is counted there, and nowhere else;
                          ···.....###...        the rest of it is what the model sees before
                          ......·····###

As in transformers' guide to the perplexity of fixed-length models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ftcli.data.chat import Rendered
from ftcli.errors import UsageError
from ftcli.evaluate.loss import list_lengths


def cut_windows(documents: Sequence[Rendered], length: int, stride: int) -> Sequence[Rendered]:
    """``documents`` with every one that is longer than ``length`` tokens as windows that advance by ``stride``.

    Each trained token is counted once, and sees at least ``length - stride`` tokens before it, if there are so many.
    Windows in which nothing is counted are left out.

    Raises:
        UsageError: a stride of ``length`` or more, with which some tokens would see nothing before them.
    """
    if not 0 < stride < length:
        raise UsageError(f"a stride of {stride} in windows of {length} tokens", hint=f"choose 1 to {length - 1}")
    if max(list_lengths(documents), default=0) <= length:
        return documents
    return [window for document in documents for window in _cut(document, length, stride)]


def _cut(document: Rendered, length: int, stride: int) -> Iterator[Rendered]:
    if len(document.ids) <= length:
        yield document
        return
    counted = 0
    for begin in range(0, len(document.ids) - length + stride, stride):
        end = min(begin + length, len(document.ids))
        mask = [False] * (counted - begin) + document.mask[counted:end]
        if any(mask[1:]):
            yield replace(document, ids=document.ids[begin:end], mask=mask)
        counted = end
