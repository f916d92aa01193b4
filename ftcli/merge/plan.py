"""Which tensors the merged model has, and what each is made from; names and shapes are checked before a byte is read.

    base's weights ─┐
                    ├▶ Part(tensor, source, whole?, lora?, rows?) for every tensor of the result
    adapter ────────┘

Head and embedding of a tied model stay one matrix where the adapter moves both alike, and part where it does not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn

from ftcli.errors import ContentError
from ftcli.merge.adapter import Adapter, Lora, Value
from ftcli.model.stored import DTYPE_NAMES, TORCH_DTYPES, are_equal, find_name, is_tied
from ftcli.store.shard import PlannedTensor
from ftcli.store.tensor import TensorEntry

_SHOWN = 5
Rows = tuple[list[int], torch.Tensor]


class Weights(Protocol):
    """The base: `StoredWeights`, or the same after 4 bits."""

    @property
    def entries(self) -> Mapping[str, TensorEntry]:
        """Every weight, by its name in the model."""

    def get_dtype(self, name: str) -> torch.dtype:
        """The type of a weight as it is read."""

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows of a weight."""


@dataclass(frozen=True)
class Part:
    """One tensor of the result: the base's ``source``, or ``whole`` in its place, with ``lora`` and ``rows`` on it."""

    tensor: PlannedTensor
    source: str
    whole: Value | None = None
    lora: Lora | None = None
    rows: Rows | None = None

    @property
    def name(self) -> str:
        return self.tensor.name

    @property
    def dtype(self) -> torch.dtype:
        """The type that it is rounded to."""
        return TORCH_DTYPES[self.tensor.dtype]

    @property
    def is_copy(self) -> bool:
        """Whether the adapter leaves it as it is."""
        return self.whole is None and self.lora is None and self.rows is None


@dataclass(frozen=True)
class MergePlan:
    """The tensors of the result in the order of the base's bytes, and what its config must say of them.

    ``splits_tie`` says that the base has one matrix for head and embedding, and the result two.
    """

    parts: tuple[Part, ...]
    splits_tie: bool
    vocab_size: int

    @property
    def size_bytes(self) -> int:
        """Of all tensors."""
        return sum(part.tensor.size_bytes for part in self.parts)

    @property
    def dtype(self) -> str:
        """The dtype of most bytes, as configs spell it."""
        sizes: dict[torch.dtype, int] = {}
        for part in self.parts:
            sizes[part.dtype] = sizes.get(part.dtype, 0) + part.tensor.size_bytes
        return str(max(sizes, key=lambda dtype: sizes[dtype])).removeprefix("torch.")


def plan_merge(
    adapter: Adapter, weights: Weights, skeleton: Any, *, dtype: torch.dtype | None, packed_dtype: torch.dtype
) -> MergePlan:
    """The merge of ``adapter`` into ``weights``.

    Args:
        adapter: as it was read.
        weights: the base's, of exactly the model ``skeleton``.
        skeleton: the base on the meta device; it may be changed.
        dtype: of the result; None keeps the type that each tensor has.
        packed_dtype: of the result where the base is packed (GGUF) and has no such type.

    Raises:
        ContentError: the adapter has tensors too many or too few for this base, or of other shapes.
    """
    embedding, head = find_name(skeleton, "input"), find_name(skeleton, "output")
    was_tied = is_tied(skeleton)
    adapter = _lay_out(adapter, skeleton)
    _check_shapes(adapter, weights, {embedding, head}, head if was_tied else "", embedding)
    n_base = weights.entries[embedding].shape[0]
    n_rows = _count_rows(adapter, (embedding, head), n_base)
    check_fit(adapter, skeleton, n_rows)
    splits_tie = was_tied and not _move_alike(adapter, embedding, head)
    names = {name: name for name in weights.entries}
    if splits_tie:
        names[head] = embedding
    parts = []
    for name, source in sorted(names.items(), key=lambda pair: _find_place(weights.entries[pair[1]], pair[0])):
        shape, kept = weights.entries[source].shape, weights.get_dtype(source)
        if name in (embedding, head):
            shape = (n_rows, *shape[1:])
        is_packed = kept == torch.float32 and not weights.entries[source].file.endswith((".safetensors", ".bin"))
        chosen = dtype or (packed_dtype if is_packed else kept)
        tensor = PlannedTensor(name, DTYPE_NAMES[chosen], shape)
        rows = adapter.rows.get(name) or (adapter.rows.get(embedding) if was_tied and name == head else None)
        whole = adapter.whole.get(name) or (_find_shared(adapter, name, (embedding, head)) if was_tied else None)
        parts.append(Part(tensor, source, whole, adapter.lora.get(name), rows))
        if name in (embedding, head):
            _check_rows(parts[-1], weights.entries[source].shape[0], adapter)
    return MergePlan(tuple(parts), splits_tie, n_rows)


def check_fit(adapter: Adapter, skeleton: Any, n_rows: int) -> None:
    """None if the adapter's tensors are the ones that PEFT would load into this base, no more and no fewer.

    Raises:
        ContentError: naming those that are not.
    """
    from peft import LoraConfig, get_peft_model
    from peft.utils import get_peft_model_state_dict

    if n_rows != skeleton.get_input_embeddings().weight.shape[0]:
        skeleton.resize_token_embeddings(n_rows, mean_resizing=False)
    try:
        config = LoraConfig.from_pretrained(str(adapter.folder))
        # PEFT would warn where the base lies elsewhere than in training, which is the caller's to say
        config.inference_mode, config.base_model_name_or_path = True, None
        with torch.device("meta"):
            wrapped = get_peft_model(skeleton, config)
        state = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    except (ValueError, TypeError, KeyError, IndexError, RuntimeError, AttributeError, re.error) as error:
        why = (str(error).splitlines() or [""])[0]
        raise ContentError("the adapter does not fit this base", where=str(adapter.folder), why=why) from error
    wanted = {key: tuple(value.shape) for key, value in state.items()}
    tables = ("embed_tokens.weight", "lm_head.weight", "wte.weight")  # PEFT adds them where a vocabulary grew
    found = {key: shape for key, shape in adapter.shapes.items() if key in wanted or not _is_table(key, tables)}
    problems = [f"missing: {key}" for key in sorted(wanted.keys() - found.keys())]
    problems += [f"of no module of this base: {key}" for key in sorted(found.keys() - wanted.keys())]
    problems += [
        f"{key} is {found[key]}, and this base asks for {wanted[key]}"
        for key in sorted(found.keys() & wanted.keys())
        if found[key] != wanted[key]
    ]
    if problems:
        raise _explain(problems, adapter)


def _is_table(key: str, tables: tuple[str, ...]) -> bool:
    for wrapper in (".base_layer.", ".modules_to_save.", ".original_module."):
        key = key.replace(wrapper, ".")
    return key.endswith(tables)


def _explain(problems: list[str], adapter: Adapter) -> ContentError:
    more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
    return ContentError(
        f"the adapter does not fit this base: {len(problems)} tensors differ",
        where=str(adapter.folder),
        why="\n  ".join([*problems[:_SHOWN], *more]),
        hint="name the base that the adapter was trained on: --base MODEL",
    )


def _lay_out(adapter: Adapter, skeleton: nn.Module) -> Adapter:
    """The adapter with each LoRA laid out as its module's weight lies."""
    from transformers.pytorch_utils import Conv1D

    turned = {f"{n}.weight" for n, m in skeleton.named_modules() if isinstance(m, nn.Embedding | Conv1D)}
    return replace(adapter, lora={n: replace(lora, transposed=n in turned) for n, lora in adapter.lora.items()})


def _check_shapes(adapter: Adapter, weights: Weights, tables: set[str], tied_head: str, embedding: str) -> None:
    """None if everything that the adapter changes is there, and as large as it takes it to be."""
    problems = []
    changes = {
        **{name: lora.shape for name, lora in adapter.lora.items()},
        **{name: value.shape for name, value in adapter.whole.items()},
    }
    for name, shape in changes.items():
        entry = weights.entries.get(embedding if name == tied_head else name)
        if entry is None:
            problems.append(f"of no module of this base: {name}")
        elif entry.shape != shape and (name not in tables or entry.shape[1:] != shape[1:]):
            problems.append(f"{name} is {entry.shape}, and the adapter takes it to be {shape}")
    for name, (_, value) in adapter.rows.items():
        entry = weights.entries.get(embedding if name == tied_head else name)
        if entry is None or entry.shape[1:] != tuple(value.shape[1:]):
            problems.append(f"trained rows of {name}, which this base has not like that")
        if name in adapter.lora:
            problems.append(f"{name} has both LoRA and trained rows, which is not merged")
    if problems:
        raise _explain(problems, adapter)


def _count_rows(adapter: Adapter, tables: tuple[str, str], n_base: int) -> int:
    """The rows of embedding and head in the result: the base's, and those that the adapter brings."""
    sizes = {adapter.whole[name].shape[0] for name in tables if name in adapter.whole}
    sizes |= {adapter.lora[name].shape[0] for name in tables if name in adapter.lora}
    n_rows = max(sizes) if sizes else n_base
    for name in tables:
        indices = adapter.rows[name][0] if name in adapter.rows else []
        new = {index for index in indices if index >= n_rows}
        if new and new != set(range(n_rows, max(new) + 1)):
            lost = min(set(range(n_rows, max(new) + 1)) - new)
            raise ContentError(
                f"the adapter brings row {max(new)} of {name}, and not row {lost}", where=str(adapter.folder)
            )
        n_rows = max([n_rows, *(index + 1 for index in new)])
    return n_rows


def _find_shared(adapter: Adapter, name: str, tables: tuple[str, str]) -> Value | None:
    """What stands in for one table of a tied model because the other is LoRA on it: both are one matrix below that."""
    other = tables[name == tables[0]]
    return adapter.whole.get(other) if name in tables and other in adapter.lora else None


def _check_rows(part: Part, n_base: int, adapter: Adapter) -> None:
    """None if every row of an embedding or head comes from the base or the adapter.

    Raises:
        ContentError: the vocabulary grew, and the adapter does not bring this matrix's new rows.
    """
    n_rows = part.tensor.shape[0]
    n_found = part.whole.shape[0] if part.whole else n_base
    missing = set(range(n_found, n_rows)) - set(part.rows[0] if part.rows else ())
    if missing or (part.whole and n_found > n_rows):
        raise ContentError(
            f"the adapter makes the vocabulary {n_rows} rows large, and {part.name} has {n_found} of them",
            where=str(adapter.folder),
            hint="save the adapter again with the embedding and the head that it was trained with",
        )


def _move_alike(adapter: Adapter, embedding: str, head: str) -> bool:
    """Whether an adapter of a tied model leaves head and embedding the same matrix."""
    first, second = adapter.lora.get(embedding), adapter.lora.get(head)
    if (first is None) != (second is None) or (embedding in adapter.whole) != (head in adapter.whole):
        return False
    if first and second:
        same = torch.equal(first.a, second.b.T) and torch.equal(first.b, second.a.T)
        if not same or first.scale != second.scale or first.magnitude is not None or second.magnitude is not None:
            return False
    if embedding in adapter.whole:
        first_table, second_table = adapter.whole[embedding], adapter.whole[head]
        n_rows = first_table.shape[0]
        return first_table.shape == second_table.shape and are_equal(
            first_table.read_rows, second_table.read_rows, n_rows
        )
    return True


def _find_place(entry: TensorEntry, name: str) -> tuple[str, int, str]:
    return entry.file, entry.offset or 0, name
