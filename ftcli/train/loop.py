"""The optimizer steps of a run, on accelerate: what to compute, nothing of files or terminals.

    plan (documents → steps → micro-batches) ─▶ forward, backward for each ─▶ clip ─▶ AdamW ─▶ StepResult

The loss of a step is the sum over its batches divided by the number of trained tokens in all of them, over all
processes: each process takes every n-th of a step's micro-batches, so the step is the same however many there are.
Everything that decides a step follows from the recipe and the step's number, so a run that resumes at a step
goes on as if it had never stopped.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
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
from ftcli.train.shard import gather_tensor
from ftcli.train.world import ALONE, World

_MOST_SKIPPED_STEPS = 20  # a float16 loss scale that is still too large after this many halvings is no accident


@dataclass(frozen=True)
class Plan:
    """How long a run is: the steps of each epoch that it enters, and what the first one looks like.

    ``n_processes`` share the micro-batches of a step.
    """

    epoch_steps: tuple[int, ...]
    total_steps: int
    fill: float
    first_epoch: tuple[Step, ...]
    n_processes: int = 1

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


def plan_run(recipe: Recipe, documents: Documents, n_processes: int = 1) -> Plan:
    """The steps that ``recipe`` takes over ``documents`` with so many processes, and the fill of packs."""
    first = plan_steps(recipe, documents, epoch=0, n_processes=n_processes)
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
            n_steps = len(plan_steps(recipe, documents, epoch=len(epoch_steps), n_processes=n_processes))
        share = min(1.0, epochs - len(epoch_steps))
        total_steps += math.ceil(round(share * n_steps, 6))
        epoch_steps.append(n_steps)
    total_steps = max(1, min(total_steps, recipe.train.max_steps or total_steps))
    capacity = recipe.data.max_length * recipe.train.per_device_train_batch_size
    batches = [batch for step in first for batch in step]
    lengths = documents.lengths
    n_tokens = sum(lengths[index] for batch in batches for index in batch)
    return Plan(tuple(epoch_steps), total_steps, n_tokens / (len(batches) * capacity), tuple(first), n_processes)


def plan_steps(recipe: Recipe, documents: Documents, *, epoch: int, n_processes: int = 1) -> list[Step]:
    """The optimizer steps of one epoch, as ``plan_epoch`` makes them for this recipe."""
    return plan_epoch(
        documents.lengths,
        seed=recipe.train.seed,
        epoch=epoch,
        rows_per_batch=recipe.train.per_device_train_batch_size,
        batches_per_step=recipe.train.gradient_accumulation_steps * n_processes,
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
    world: World = ALONE,
    first_step: int = 1,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[StepResult]:
    """Yields after each optimizer step from ``first_step`` on; ends early when ``should_stop`` says so.

    Raises:
        NumericError: NaN or infinity in loss or gradient; the weights are those before the step.
    """
    epoch, steps = 0, list(plan.first_epoch)
    lengths, targets = documents.lengths, documents.count_targets().tolist()
    n_skipped = 0
    for step in range(first_step, plan.total_steps + 1):
        if should_stop():
            return
        started = time.perf_counter()
        now, index = plan.locate(step)
        if now != epoch:
            epoch, steps = now, plan_steps(recipe, documents, epoch=now, n_processes=plan.n_processes)
        members = [member for group in steps[index] for member in group]
        n_targets = sum(targets[i] for i in members)
        seed = recipe.train.seed, step
        shares = build_shares(steps[index], documents, world)
        loss, grad_norm = accumulate_gradients(
            model, shares, accelerator, recipe.train.max_grad_norm, n_targets=n_targets, world=world, seed=seed
        )
        lr = compute_lr(recipe.train, step, plan.total_steps)
        result = StepResult(
            step=step,
            epoch=epoch + (index + 1) / len(steps),
            loss=loss,
            grad_norm=grad_norm,
            lr=lr,
            n_target_tokens=n_targets,
            n_tokens=sum(lengths[i] for i in members),
            n_rows=len(members),
        )
        places = (f"{documents[i].file}:{documents[i].line}" for i in members)
        n_skipped = check_finite(result, places, n_skipped, has_scaler=accelerator.scaler is not None)
        set_lr(optimizer, lr)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield replace(result, seconds=time.perf_counter() - started)


@dataclass(frozen=True)
class Share:
    """One micro-batch of this process: its place among those of the step; ``weight`` is 0 if it fills a gap."""

    place: int
    batch: Batch
    weight: int


def build_shares(step: Step, documents: Documents, world: World) -> list[Share]:
    """The micro-batches of ``step`` that this process computes, as many as every other does.

    Processes wait for each other in every backward pass. Where a step does not divide evenly, those that would have
    one less compute another one, which counts nothing.
    """
    n_each = math.ceil(len(step) / world.size)
    places = [place * world.size + world.rank for place in range(n_each)]
    shares = []
    for place in places:
        group = step[place] if place < len(step) else step[0]
        shares.append(Share(place, build_batch([documents[i] for i in group]), int(place < len(step))))
    return shares


def accumulate_gradients(
    model: torch.nn.Module,
    shares: Sequence[Share],
    accelerator: Any,
    max_grad_norm: float | None,
    *,
    n_targets: int,
    world: World = ALONE,
    seed: tuple[int, int] = (0, 0),
) -> tuple[float, float]:
    """The loss per trained token over the step and the norm of its gradient, which is left clipped.

    accelerate is told of no accumulation (it would divide by it again); the division is by tokens, here. Processes
    average their gradients, so each one's is multiplied by how many they are.

    Args:
        model: as it is trained, wrapped.
        shares: this process's micro-batches.
        accelerator: for device, precision and clipping.
        max_grad_norm: the norm that the gradient is cut to; None leaves it.
        n_targets: trained tokens of the step, over all processes.
        world: the processes.
        seed: the run's, and the step.
    """
    total = torch.zeros((), device=accelerator.device)
    for number, share in enumerate(shares, start=1):
        seed_batch(*seed, share.place)
        scale = share.weight * world.size / n_targets
        with accelerator.no_sync(model) if number < len(shares) else nullcontext():
            total += share.weight * add_gradients(model, share.batch, accelerator, scale)
    (loss_sum,) = world.add([total.item()])
    trained = [parameter for _, parameter in list_trained(model)]
    limit = math.inf if max_grad_norm is None else max_grad_norm
    grad_norm = accelerator.clip_grad_norm_(trained, limit)
    return loss_sum / n_targets, gather_tensor(grad_norm).item()


def add_gradients(model: torch.nn.Module, batch: Batch, accelerator: Any, scale: float) -> torch.Tensor:
    """The sum of losses over ``batch``, after ``scale`` times its gradient was added."""
    with accelerator.autocast():
        loss_sum = compute_loss_sum(model, batch.to(accelerator.device))
    if accelerator.device.type == "cpu" and not is_fused(model):
        release_free_memory()  # logits that are gone, where the heap had room for them
    accelerator.backward(loss_sum * scale)
    return loss_sum.detach()


def check_finite(result: StepResult, places: Iterable[str], n_skipped: int, *, has_scaler: bool) -> int:
    """How many steps in a row were skipped by the float16 loss scaler, which expects infinite gradients.

    Raises:
        NumericError: a loss that is not finite; a gradient that is not, where no scaler deals with it.
    """
    if math.isfinite(result.loss) and math.isfinite(result.grad_norm):
        return 0
    if math.isfinite(result.loss) and has_scaler and n_skipped < _MOST_SKIPPED_STEPS:
        return n_skipped + 1
    rows = list(places)
    shown = ", ".join(rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
    error = NumericError(
        f"loss {result.loss}, gradient norm {result.grad_norm} in step {result.step}",
        why=f"rows of this step: {shown}",
        hint="lower train.learning_rate, or look at these rows"
        if result.step > 1
        else "look at these rows, and at the base model's weights and dtype",
    )
    error.result = result
    raise error


def seed_batch(seed: int, step: int, place: int) -> None:
    """Nothing; randomness (dropout) in the micro-batch at ``place`` of ``step`` follows from these numbers alone."""
    torch.manual_seed(((seed * 1_000_003 + step) * 1_000_003 + place) % (1 << 63))
