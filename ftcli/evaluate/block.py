"""Which block of a model a change hurts: each gets what it got in the source, and what it adds is compared.

    source ─▶ hidden states before and after each block ─▶ result: block i on the source's input i ─▶ its own error

So an error is that of one block alone, whatever those before it do; how its weights are laid out does not matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ftcli.data.chat import Rendered
from ftcli.evaluate.loss import list_lengths
from ftcli.evaluate.subject import TorchBackend

_MOST_TOKENS = 512  # of documents whose hidden states are kept


@dataclass(frozen=True)
class BlockRecording:
    """What the blocks of a model made of ``documents``: ``states`` are (T, width) before the first, and after each."""

    documents: Sequence[Rendered]
    states: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class BlockError:
    """How far what a block adds is from what it added in the source, relative to that."""

    name: str
    error: float


def find_blocks(model: Any) -> list[tuple[str, nn.Module]]:
    """Name and module of each transformer block, in order; none where the model is built otherwise."""
    n_blocks = getattr(model.config, "num_hidden_layers", 0)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == n_blocks:
            return [(f"{name}.{i}", block) for i, block in enumerate(module)]
    return []


def record_blocks(backend: TorchBackend, documents: Sequence[Rendered]) -> BlockRecording | None:
    """What each block of the model makes of the first of ``documents``; None where it has no such blocks."""
    chosen = _choose(documents)
    blocks = find_blocks(backend.model)
    if not (blocks and chosen):
        return None
    states: list[torch.Tensor] = []

    def keep_input(_: nn.Module, args: Any, kwargs: Any) -> None:
        states.append(_find_hidden(args, kwargs).detach()[0].cpu())

    def keep_output(_: nn.Module, args: Any, output: Any) -> None:
        states.append(_unpack(output).detach()[0].cpu())

    hooks = [blocks[0][1].register_forward_pre_hook(keep_input, with_kwargs=True)]
    hooks += [block.register_forward_hook(keep_output) for _, block in blocks]
    _run(backend, chosen, hooks)
    return BlockRecording(chosen, tuple(states))


def compare_blocks(recording: BlockRecording, backend: TorchBackend) -> tuple[BlockError, ...]:
    """The error of each block of the model, the largest first."""
    errors: list[BlockError] = []
    blocks = find_blocks(backend.model)
    hooks = []
    for i, (name, block) in enumerate(blocks):
        before, after = recording.states[i], recording.states[i + 1]

        def give_input(_: nn.Module, args: Any, kwargs: Any, before: torch.Tensor = before) -> Any:
            hidden = _find_hidden(args, kwargs)
            given = before.to(hidden)[None]
            return ((given, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": given})

        def measure(
            _: nn.Module,
            args: Any,
            output: Any,
            name: str = name,
            before: torch.Tensor = before,
            after: torch.Tensor = after,
        ) -> None:
            found = _unpack(output)[0].double().cpu()
            wanted = after.double() - before.double()
            error = (found - after.double()).norm() / wanted.norm().clamp_min(1e-30)
            errors.append(BlockError(name, error.item()))

        hooks.append(block.register_forward_pre_hook(give_input, with_kwargs=True))
        hooks.append(block.register_forward_hook(measure))
    _run(backend, recording.documents, hooks)
    return tuple(sorted(errors, key=lambda found: found.error, reverse=True))


def _run(backend: TorchBackend, documents: Sequence[Rendered], hooks: Sequence[Any]) -> None:
    try:
        backend.compute_logits(documents)
    finally:
        for hook in hooks:
            hook.remove()


def _choose(documents: Sequence[Rendered]) -> list[Rendered]:
    """The first documents, of so many tokens together; one at least."""
    chosen: list[Rendered] = []
    n_tokens = 0
    for document, length in zip(documents, list_lengths(documents), strict=True):
        if chosen and n_tokens + length > _MOST_TOKENS:
            break
        chosen.append(document)
        n_tokens += length
    return chosen


def _find_hidden(args: Any, kwargs: Any) -> torch.Tensor:
    hidden: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def _unpack(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]
