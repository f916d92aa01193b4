"""``ftcli recipe init``: a first recipe for a model and rows, with a reason beside each choice.

rows ─▶ lengths ─▶ max_length, packing, epochs ─┐
model ─▶ anatomy ─▶ forecasts ─▶ method, batch ─┴▶ YAML that fits the device
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from ftcli.errors import ContentError, UsageError
from ftcli.events import OnEvent, ignore_event
from ftcli.fused.family import FAMILIES
from ftcli.jobs.report import LengthCost, PartReport, report_rows
from ftcli.jobs.rows import open_target
from ftcli.jobs.source import describe_source, find_source
from ftcli.model.anatomy import Anatomy
from ftcli.model.demand import Device, Method, build_training, measure_shape
from ftcli.model.forecast import Forecast, forecast_memory
from ftcli.model.lora import count_lora
from ftcli.recipe import PeftSection, load_recipe
from ftcli.store.file import check_new, write_new

_SPARE = 1.1  # forecasts are right within a tenth
_ROWS_A_STEP = 16
_STEPS_AN_EPOCH = 20  # at the least: a small data set takes fewer rows a step
_FULL_PACKS = 0.6  # rows that fill less than this of max_length are packed
_LARGE = 20e9  # parameters; larger models learn with half the rate


@dataclass(frozen=True)
class Choice:
    """How the run fits: method, rows (or packs) side by side, checkpointing."""

    method: Method
    batch: int
    is_checkpointed: bool
    forecast: Forecast
    fits: bool


@dataclass(frozen=True)
class Draft:
    """A recipe that was written; ``choice`` says what it will take of ``budget_bytes``."""

    path: str
    text: str
    choice: Choice
    budget_bytes: int
    device: str


def init_recipe(
    model: str,
    data: str,
    path: Path,
    *,
    budget_bytes: int | None = None,
    overwrite: bool = False,
    on_event: OnEvent = ignore_event,
) -> Draft:
    """The recipe that was written to ``path``, for training ``model`` on the rows of ``data`` on this machine.

    Args:
        model: Hub id, folder, GGUF file or ``package://``.
        data: a file, glob, folder or Hub id of rows.
        path: the YAML file.
        budget_bytes: memory of a CUDA device to plan for, instead of this machine's device.
        overwrite: replace ``path``.
        on_event: told of stages.

    Raises:
        FtcliError: model or rows cannot be used, or the file cannot be written.
    """
    if path.suffix.lower() not in (".yaml", ".yml"):
        raise UsageError("a recipe is a .yaml file", where=str(path))
    check_new(path, overwrite=overwrite)
    anatomy = describe_source(find_source(model, is_base=True))
    if anatomy is None:
        raise ContentError("holds no model", where=model)
    report = report_rows(open_target(data, model, on_event=on_event))
    errors = [finding.what for finding in report.findings if finding.severity == "error" and finding.code != "overflow"]
    if errors:
        raise ContentError(errors[0], where=data, hint=f"see ftcli tokenize {data} -m {model}")
    device, dtype, budget = _look_around()
    if budget_bytes is not None:
        device, dtype, budget = "cuda", "bfloat16", budget_bytes
    length = next(cost for cost in report.costs if cost.is_recommended)
    is_packed = length.n_packs < _FULL_PACKS * report.parts[0].n_documents
    choice = choose_fit(anatomy, length.max_length, device, dtype, budget)
    folder = path.resolve().parent
    named = data if not Path(data).exists() else os.path.relpath(Path(data).resolve(), folder)
    text = "\n".join(_write_recipe(model, named, path.stem, anatomy, report.parts[0], length, choice, is_packed)) + "\n"
    write_new(path, text, overwrite=overwrite)
    load_recipe(path)
    return Draft(str(path), text, choice, budget, device)


def choose_fit(anatomy: Anatomy, length: int, device: Device, dtype: str, budget_bytes: int) -> Choice:
    """The first that fits: 16-bit before 4-bit weights, without checkpointing before with, more rows before fewer."""
    shape, cost = measure_shape(anatomy), count_lora(anatomy, PeftSection())
    is_fused = anatomy.dimensions.family in FAMILIES
    most_tokens = 16_384 if device == "cuda" else 2_048
    batches = [size for size in (8, 4, 2, 1) if size * length <= most_tokens] or [1]
    methods: tuple[Method, ...] = ("lora", "qlora")
    for method, is_checkpointed, batch in product(methods, (False, True), batches):
        training = build_training(
            method, cost, sequence=length, batch=batch, is_checkpointed=is_checkpointed, dtype=dtype, device=device,
            is_fused=is_fused,
        )  # fmt: skip
        forecast = forecast_memory(shape, training)
        if _SPARE * forecast.total_bytes <= budget_bytes:
            return Choice(method, batch, is_checkpointed, forecast, fits=True)
    return Choice(method, batch, is_checkpointed, forecast, fits=False)


def _look_around() -> tuple[Device, str, int]:
    """The device of this machine, the dtype that it trains in, and the bytes that are free there."""
    from ftcli.model.base import choose_device, choose_dtype
    from ftcli.train.memory import measure_available

    device = choose_device()
    dtype = str(choose_dtype("auto", device)).removeprefix("torch.")
    return ("cuda" if device.type == "cuda" else "cpu"), dtype, measure_available()


def _write_recipe(
    model: str, data: str, name: str, anatomy: Anatomy, part: PartReport, length: LengthCost, choice: Choice,
    is_packed: bool,
) -> Iterator[str]:  # fmt: skip
    """Yields the lines of the recipe."""
    units = length.n_packs if is_packed else part.n_documents
    rows_a_step = max(1, min(_ROWS_A_STEP, units // _STEPS_AN_EPOCH))
    batch = min(choice.batch, rows_a_step)
    times = max(1, math.ceil(rows_a_step / batch))
    epochs = 3 if part.n_rows < 1000 else 2 if part.n_rows < 10_000 else 1
    steps = epochs * math.ceil(units / (batch * times))
    total = choice.forecast.total_bytes / 1e9
    yield f"# What it takes, before a byte is downloaded: ftcli inspect {name}.yaml"
    yield f"# What is learned of the rows, token by token: ftcli tokenize {name}.yaml --show 3"
    yield f"model: {_quote(model)}"
    if choice.method == "qlora":
        yield f"quantization: {{load_in_4bit: true}}{_explain('the 16-bit weights do not fit' if choice.fits else '')}"
    yield f"peft: {{r: 16, lora_alpha: 32, target_modules: all-linear}}{_explain('LoRA on every linear layer')}"
    yield ""
    yield "datasets:"
    formats = ", ".join(dict.fromkeys(str(file["format"]) for file in part.files))
    yield f"  - path: {_quote(data)}{_explain(f'{part.n_rows:,} rows, {formats}; relative to this file')}"
    yield f"    train_on: assistant{_explain(f'{part.n_target_tokens:,} of {part.n_tokens:,} tokens are learned')}"
    yield ""
    lost = f"; {length.rows_lost:,} are longer than the context" if length.rows_lost else ""
    lengths = f"the longest row has {part.longest:,} tokens, half have up to {part.percentiles['p50']:,}{lost}"
    yield f"data:{_explain(lengths)}"
    yield f"  max_length: {length.max_length}"
    if length.rows_lost:
        yield f"  overflow: drop{_explain('error, truncate and split are the others')}"
    why = f"{length.n_packs:,} packs of {length.fill:.0%}" if is_packed else "rows are about as long as max_length"
    yield f"  packing: {str(is_packed).lower()}{_explain(why)}"
    if part.n_rows >= 100:
        yield f"  val_set_size: 0.05{_explain('held out, to see when it stops getting better')}"
    yield ""
    yield "train:"
    rate = "1e-4" if anatomy.parameters.total >= _LARGE else "2e-4"
    yield f"  learning_rate: {rate}{_explain('usual for LoRA on a model of this size')}"
    yield "  lr_scheduler_type: cosine"
    yield "  warmup_ratio: 0.03"
    yield f"  num_train_epochs: {epochs}{_explain(f'about {steps:,} steps')}"
    unit = "packs" if is_packed else "rows"
    yield f"  per_device_train_batch_size: {batch}{_explain(f'{unit} side by side; a step has {batch * times}')}"
    yield f"  gradient_accumulation_steps: {times}"
    memory = f"forecast {total:.2f} GB" + ("" if choice.fits else ", more than there is")
    yield f"  gradient_checkpointing: {str(choice.is_checkpointed).lower()}{_explain(memory)}"
    yield "  seed: 42"
    yield ""
    if part.n_rows >= 100:
        yield f"eval: {{eval_steps: {max(10, steps // 10)}}}"
    yield f"checkpoint: {{save_steps: {max(10, min(200, steps // 5))}}}"
    yield f"output_dir: runs/{name}"


def _explain(text: str) -> str:
    return f"   # {text}" if text else ""


def _quote(text: str) -> str:
    """``text`` as YAML reads it back."""
    import yaml

    return yaml.safe_dump(text, allow_unicode=True, width=1 << 20).strip().removesuffix("...").strip()
