"""GPTQ and AWQ through auto-round: a model in memory ─▶ packed layers in a folder of auto-round's own.

gptq is its rounding (to the nearest, with scales chosen by how large activations are; learned with ``tune`` steps,
SignRound, arXiv 2309.05516) in GPTQ's layout; awq scales channels first (arXiv 2306.00978), in AutoAWQ's layout.

What its caller must not leave to it: rows (it would fetch a set of the Hub's, and drops those shorter than asked for),
the padding token (whose id it leaves out of what it fits, though a chat ends with it), the model's name (which it
looks up at the Hub), the group size (it dies half way), ``sys.exit`` for an error.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ftcli.errors import ContentError, is_memory_error
from ftcli.evaluate.block import find_blocks
from ftcli.events import OnEvent, Pace
from ftcli.merge.stream import ModelStream
from ftcli.model.base import build_skeleton, choose_device
from ftcli.model.packed import build_empty
from ftcli.quantize.calibration import Calibration
from ftcli.quantize.plan import Plan
from ftcli.recipe import ModelSection

_FORMATS = {"gptq": "auto_gptq", "awq": "auto_awq"}
_STEP_TOKENS = {"cuda": 16384, "cpu": 2048}  # of one step of learning; auto-round's own are 8 rows of 2048
_SEED = 42  # auto-round's own default


def round_weights(
    model: Any, tokenizer: Any, calibration: Calibration, plan: Plan, folder: Path, on_event: OnEvent
) -> Path:
    """The folder below ``folder`` in which auto-round's files of the quantised ``model`` lie; the model is spent.

    Raises:
        ContentError: auto-round gave up, in its own words.
        MemoryError, OSError: as they came.
    """
    from auto_round import AutoRound
    from auto_round.logger import logger

    logger.setLevel(logging.getLogger("transformers").getEffectiveLevel())  # it has one of its own
    spec, windows, device = plan.spec, calibration.windows, choose_device()
    scheme = {
        "bits": spec.bits,
        "group_size": plan.group_size,
        "sym": spec.method.name == "gptq",  # which the kernels of vLLM ask for
        "data_type": "int",
    }
    options: dict[str, Any] = {"iters": spec.tune} if spec.tune or spec.method.name == "gptq" else {}
    if spec.method.name == "awq":
        options["alg_configs"] = ["awq", "signround"] if spec.tune else "awq"
    _name_model(model, folder)
    stop_counting = _count_blocks(model, on_event)
    try:
        rounder = AutoRound(
            model,
            _without_padding(tokenizer),
            scheme=scheme,
            dataset=[{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in windows],
            nsamples=len(windows),
            seqlen=windows.shape[1],
            batch_size=min(max(1, _STEP_TOKENS[device.type] // windows.shape[1]), len(windows)),
            device_map=str(device),
            enable_torch_compile=False,
            seed=_SEED,
            **options,
        )
        _, made = rounder.quantize_and_save(str(folder), format=_FORMATS[spec.method.name])
    except (Exception, SystemExit) as error:
        if isinstance(error, OSError) or (isinstance(error, Exception) and is_memory_error(error)):
            raise
        raise _explain(error, plan) from error
    finally:
        stop_counting()
    return Path(made[0] if isinstance(made, list) else made)


def build_model(stream: ModelStream, section: ModelSection, dtype: torch.dtype) -> Any:
    """The model of ``stream`` in host memory, as transformers builds it.

    Raises:
        ContentError: a weight holds NaN or infinity.
        NumericError: one is too large for ``dtype``.
    """
    config = build_skeleton(stream.files, section).config
    model = build_empty(stream.folder, config, {"dtype": dtype, "trust_remote_code": section.trust_remote_code})
    weights = {tensor.name: tensor.read(dtype) for tensor in stream.tensors}
    model.load_state_dict(weights, strict=False, assign=True)  # a tied head is not among them
    model.tie_weights()
    return model


def _count_blocks(model: Any, on_event: OnEvent) -> Callable[[], None]:
    """What ends the reports of how many blocks are done, which begin with this call."""
    blocks = find_blocks(model)
    pace = Pace("quantize", len(blocks))
    furthest = 0

    def begin(index: int) -> None:
        nonlocal furthest
        if index > furthest:
            on_event(pace.advance(index - furthest))
            furthest = index

    hooks = [
        block.register_forward_pre_hook(lambda _module, _args, index=i: begin(index))
        for i, (_, block) in enumerate(blocks)
    ]

    def end() -> None:
        for hook in hooks:
            hook.remove()

    return end


def _name_model(model: Any, folder: Path) -> None:
    """Nothing; the model is said to come from an empty folder: auto-round looks up other names at the Hub."""
    empty = folder.resolve() / "model"
    empty.mkdir(parents=True)
    model.config._name_or_path = model.name_or_path = str(empty)


def _without_padding(tokenizer: Any) -> Any:
    """A tokenizer whose padding is no token: where that is what ends a turn, auto-round would leave it out."""
    changed = copy.deepcopy(tokenizer)
    changed.pad_token = None
    return changed


def _explain(error: BaseException, plan: Plan) -> ContentError:
    why = (str(error).strip().splitlines() or [type(error).__name__])[0]
    title = plan.spec.title
    return ContentError(f"{title}: auto-round gave up", why=why, hint="see its own log: -v; or take --method nf4")
