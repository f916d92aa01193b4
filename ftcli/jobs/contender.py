"""A target of an evaluation before it is loaded: that it is there and whole, how large it is, and its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass

from ftcli.data.chat import ChatRenderer
from ftcli.errors import ContentError
from ftcli.evaluate.target import Target, find_base, find_target
from ftcli.model.demand import describe_files
from ftcli.store.file import read_json
from ftcli.store.target import list_weight_files
from ftcli.store.weight import read_weight_table


@dataclass(frozen=True)
class Contender:
    """A target that is found, sized and not loaded; ``is_base`` is the base of the contender before it.

    ``bits_per_weight`` is of the model without the adapter.
    """

    target: Target
    renderer: ChatRenderer
    size_bytes: int
    bits_per_weight: float
    context: int | None
    is_base: bool = False

    @property
    def name(self) -> str:
        return self.target.name


def find_contender(reference: str, offered: ChatRenderer | None = None) -> Contender:
    """What ``reference`` means, from headers alone; what must come from the Hub is fetched.

    ``offered`` serves a GGUF file whose own tokenizer cannot be rebuilt; whether it is the same is seen when it opens.

    Raises:
        UsageError, ContentError, HubError: no such target, or one that is not whole.
    """
    target = find_target(reference)
    try:
        renderer = target.load_renderer()
    except ContentError:
        if offered is None or target.adapter or not target.files.gguf_file:
            raise
        renderer = offered
    return _describe(target, renderer)


def describe_base(contender: Contender) -> Contender:
    """The model from which the contender was made, as the contender itself reads rows.

    Raises:
        UsageError, ContentError: it is neither a run nor an adapter, or the base is not there as it was.
    """
    return _describe(find_base(contender.target), contender.renderer, is_base=True)


def _describe(target: Target, renderer: ChatRenderer, *, is_base: bool = False) -> Contender:
    files = target.files
    list_weight_files(files)  # refuses a folder without any
    table = read_weight_table(files.gguf_path or files.folder)
    if table.faults:
        raise ContentError(table.faults[0], where=files.reference, hint="download or copy the model again")
    config = None if files.gguf_file else read_json(files.folder / "config.json")
    anatomy = describe_files(config, table, where=files.reference)
    size_bytes = sum(file.size_bytes for file in table.files)
    if target.adapter:
        size_bytes += sum(path.stat().st_size for path in target.adapter.glob("adapter_model.*"))
    bits = 8 * table.size_bytes / max(1, anatomy.parameters.total)
    return Contender(target, renderer, size_bytes, bits, anatomy.dimensions.context, is_base)
