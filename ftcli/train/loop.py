"""The optimizer steps of a run, on accelerate: what to compute, nothing of files or terminals.

    plan (documents → steps → micro-batches) ─▶ forward, backward for each ─▶ clip ─▶ AdamW ─▶ StepResult

The loss of a step is the sum over its batches divided by the number of trained tokens in all of them.
Everything that decides a step follows from the recipe and the step's number, so a run that resumes at a step
goes on as if it had never stopped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ftcli.data.chat import Rendered
from ftcli.data.loader import Batch, Step, build_batch, plan_epoch
from ftcli.errors import NumericError
from ftcli.evaluate.loss import compute_loss_sum
from ftcli.recipe import Recipe
from ftcli.train.optim import compute_lr, list_trained, set_lr

_MOST_SKIPPED_STEPS = 20  # a float16 loss scale that is still too large after this many halvings is no accident


@dataclass(frozen=True)
class Plan:
    """How long a run is; ``first_epoch`` shows what one epoch looks like."""

    steps_per_epoch: int
    total_steps: int
    fill: float
    first_epoch: tuple[Step, ...]


@dataclass(frozen=True)
class StepResult:
    """One optimizer step: ``loss`` is before the update, ``grad_norm`` before clipping, ``lr`` as applied."""

    step: int
    epoch: float
    loss: float
    grad_norm: float
    lr: float
    n_target_tokens: int
    n_tokens: int
    n_rows: int
    seconds: float = 0.0


def plan_run(recipe: Recipe, lengths: Sequence[int]) -> Plan:
    """The number of steps that ``recipe`` takes over documents of ``lengths`` tokens, and the fill of packs."""
    steps = plan_steps(recipe, lengths, epoch=0)
    total_steps = recipe.train.max_steps or math.ceil(round(recipe.train.num_train_epochs * len(steps), 6))
    capacity = recipe.data.max_length * recipe.train.per_device_train_batch_size
    n_batches = sum(len(step) for step in steps)
    return Plan(len(steps), max(1, total_steps), sum(lengths) / (n_batches * capacity), tuple(steps))


def plan_steps(recipe: Recipe, lengths: Sequence[int], *, epoch: int) -> list[Step]:
    """The optimizer steps of one epoch, as ``plan_epoch`` makes them for this recipe."""
    return plan_epoch(
        lengths,
        seed=recipe.train.seed,
        epoch=epoch,
        rows_per_batch=recipe.train.per_device_train_batch_size,
        batches_per_step=recipe.train.gradient_accumulation_steps,
        pack_tokens=recipe.data.max_length if recipe.data.packing else None,
    )


def run_steps(
    recipe: Recipe,
    documents: Sequence[Rendered],
    model: torch.nn.Module,
    optimizer: Any,
    accelerator: Any,
    *,
    first_step: int = 1,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[StepResult]:
    """Yields after each optimizer step from ``first_step`` on; ends early when ``should_stop`` says so.

    Raises:
        NumericError: NaN or infinity in loss or gradient; the weights are those before the step.
    """
    lengths = [len(document.ids) for document in documents]
    plan = plan_run(recipe, lengths)
    epoch, steps = -1, []
    n_skipped = 0
    for step in range(first_step, plan.total_steps + 1):
        if should_stop():
            return
        started = time.perf_counter()
        if (step - 1) // plan.steps_per_epoch != epoch:
            epoch = (step - 1) // plan.steps_per_epoch
            steps = plan_steps(recipe, lengths, epoch=epoch)
        batches = [build_batch([documents[i] for i in group]) for group in steps[(step - 1) % len(steps)]]
        seed_step(recipe.train.seed, step)
        loss, grad_norm = accumulate_gradients(model, batches, accelerator, recipe.train.max_grad_norm)
        lr = compute_lr(recipe.train, step, plan.total_steps)
        result = StepResult(
            step=step,
            epoch=step / plan.steps_per_epoch,
            loss=loss,
            grad_norm=grad_norm,
            lr=lr,
            n_target_tokens=sum(batch.n_targets for batch in batches),
            n_tokens=sum(batch.n_tokens for batch in batches),
            n_rows=sum(len(batch.places) for batch in batches),
        )
        n_skipped = check_finite(result, batches, n_skipped, has_scaler=accelerator.scaler is not None)
        set_lr(optimizer, lr)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield replace(result, seconds=time.perf_counter() - started)


def accumulate_gradients(
    model: torch.nn.Module, batches: Sequence[Batch], accelerator: Any, max_grad_norm: float | None
) -> tuple[float, float]:
    """The loss per trained token over ``batches`` and the norm of its gradient, which is left clipped.

    accelerate is told of no accumulation (it would divide by it again); the division is by tokens, here.
    """
    n_targets = sum(batch.n_targets for batch in batches)
    total = torch.zeros((), device=accelerator.device)
    for batch in batches:
        loss_sum = compute_loss_sum(model, batch.to(accelerator.device))
        accelerator.backward(loss_sum / n_targets)
        total += loss_sum.detach()
    trained = [parameter for _, parameter in list_trained(model)]
    limit = math.inf if max_grad_norm is None else max_grad_norm
    grad_norm = accelerator.clip_grad_norm_(trained, limit)
    return total.item() / n_targets, float(grad_norm)


def check_finite(result: StepResult, batches: Sequence[Batch], n_skipped: int, *, has_scaler: bool) -> int:
    """How many steps in a row were skipped by the float16 loss scaler, which expects infinite gradients.

    Raises:
        NumericError: a loss that is not finite; a gradient that is not, where no scaler deals with it.
    """
    if math.isfinite(result.loss) and math.isfinite(result.grad_norm):
        return 0
    if math.isfinite(result.loss) and has_scaler and n_skipped < _MOST_SKIPPED_STEPS:
        return n_skipped + 1
    places = [place for batch in batches for place in batch.places]
    shown = ", ".join(places[:8]) + (f" and {len(places) - 8} more" if len(places) > 8 else "")
    error = NumericError(
        f"loss {result.loss}, gradient norm {result.grad_norm} in step {result.step}",
        why=f"rows of this step: {shown}",
        hint="lower train.learning_rate, or look at these rows",
    )
    error.result = result
    raise error


def seed_step(seed: int, step: int) -> None:
    """Nothing; randomness in step ``step`` (dropout) follows from these two numbers alone."""
    torch.manual_seed((seed * 1_000_003 + step) % (1 << 63))
