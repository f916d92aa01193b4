"""The optimizer steps of a run, on accelerate: what to compute, nothing of files or terminals.

    plan (documents → steps → micro-batches) ─▶ forward, backward for each ─▶ clip ─▶ AdamW ─▶ StepResult

The loss of a step is the sum over its batches divided by the number of trained tokens in all of them.
Everything that decides a step follows from the recipe and the step's number, so a run that resumes at a step
goes on as if it had never stopped.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch

from ftcli.data.batch import Batch, build_batch
from ftcli.data.documents import Documents
from ftcli.data.plan import Step, plan_epoch
from ftcli.errors import NumericError
from ftcli.evaluate.loss import compute_loss_sum
from ftcli.fused.layer import is_fused
from ftcli.recipe import Recipe
from ftcli.train.memory import release_free_memory
from ftcli.train.optim import compute_lr, list_trained, set_lr

_MOST_SKIPPED_STEPS = 20  # a float16 loss scale that is still too large after this many halvings is no accident


@dataclass(frozen=True)
class Plan:
    """How long a run is: the steps of each epoch that it enters, and what the first one looks like."""

    epoch_steps: tuple[int, ...]
    total_steps: int
    fill: float
    first_epoch: tuple[Step, ...]

    def locate(self, step: int) -> tuple[int, int]:
        """The epoch in which a step (from 1) lies, and its index there, both from 0."""
        ends = self._ends
        epoch = bisect_left(ends, step)
        return epoch, step - 1 - (ends[epoch - 1] if epoch else 0)

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(self.epoch_steps))


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


def plan_run(recipe: Recipe, documents: Documents) -> Plan:
    """The steps that ``recipe`` takes over ``documents``, and the fill of packs."""
    first = plan_steps(recipe, documents, epoch=0)
    # the number of packs follows from the lengths alone, and these differ only where a fraction is chosen
    varies = recipe.data.packing and bool((documents.weight % 1 != 0).any())
    epochs = recipe.train.num_train_epochs
    if recipe.train.max_steps is not None:
        epochs = math.inf
    epoch_steps: list[int] = []
    total_steps = 0
    while total_steps < (recipe.train.max_steps or math.inf) and len(epoch_steps) < epochs:
        n_steps = len(first)
        if varies and epoch_steps:
            n_steps = len(plan_steps(recipe, documents, epoch=len(epoch_steps)))
        share = min(1.0, epochs - len(epoch_steps))
        total_steps += math.ceil(round(share * n_steps, 6))
        epoch_steps.append(n_steps)
    total_steps = max(1, min(total_steps, recipe.train.max_steps or total_steps))
    capacity = recipe.data.max_length * recipe.train.per_device_train_batch_size
    batches = [batch for step in first for batch in step]
    lengths = documents.lengths
    n_tokens = sum(lengths[index] for batch in batches for index in batch)
    return Plan(tuple(epoch_steps), total_steps, n_tokens / (len(batches) * capacity), tuple(first))


def plan_steps(recipe: Recipe, documents: Documents, *, epoch: int) -> list[Step]:
    """The optimizer steps of one epoch, as ``plan_epoch`` makes them for this recipe."""
    return plan_epoch(
        documents.lengths,
        seed=recipe.train.seed,
        epoch=epoch,
        rows_per_batch=recipe.train.per_device_train_batch_size,
        batches_per_step=recipe.train.gradient_accumulation_steps,
        pack_tokens=recipe.data.max_length if recipe.data.packing else None,
        weights=None if (documents.weight == 1).all() else documents.weight.tolist(),
    )


def run_steps(
    recipe: Recipe,
    documents: Documents,
    plan: Plan,
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
    epoch, steps = 0, list(plan.first_epoch)
    n_skipped = 0
    for step in range(first_step, plan.total_steps + 1):
        if should_stop():
            return
        started = time.perf_counter()
        now, index = plan.locate(step)
        if now != epoch:
            epoch, steps = now, plan_steps(recipe, documents, epoch=now)
        batches = [build_batch([documents[i] for i in group]) for group in steps[index]]
        seed_step(recipe.train.seed, step)
        loss, grad_norm = accumulate_gradients(model, batches, accelerator, recipe.train.max_grad_norm)
        lr = compute_lr(recipe.train, step, plan.total_steps)
        result = StepResult(
            step=step,
            epoch=epoch + (index + 1) / len(steps),
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
        total += add_gradients(model, batch, accelerator, n_targets)
    trained = [parameter for _, parameter in list_trained(model)]
    limit = math.inf if max_grad_norm is None else max_grad_norm
    grad_norm = accelerator.clip_grad_norm_(trained, limit)
    return total.item() / n_targets, float(grad_norm)


def add_gradients(model: torch.nn.Module, batch: Batch, accelerator: Any, n_targets: int) -> torch.Tensor:
    """The sum of losses over ``batch``, after the gradient of its share of ``n_targets`` was added."""
    loss_sum = compute_loss_sum(model, batch.to(accelerator.device))
    if accelerator.device.type == "cpu" and not is_fused(model):
        release_free_memory()  # logits that are gone, where the heap had room for them
    accelerator.backward(loss_sum / n_targets)
    return loss_sum.detach()


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
        hint="lower train.learning_rate, or look at these rows"
        if result.step > 1
        else "look at these rows, and at the base model's weights and dtype",
    )
    error.result = result
    raise error


def seed_step(seed: int, step: int) -> None:
    """Nothing; randomness in step ``step`` (dropout) follows from these two numbers alone."""
    torch.manual_seed((seed * 1_000_003 + step) % (1 << 63))
