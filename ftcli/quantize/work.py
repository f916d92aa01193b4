"""A quantisation under way: what is planned, what is read, what is written, how it is proven.

ModelStream ─▶ Plan ─▶ weights, config, tokenizer ─▶ verified ─▶ card, manifest
            └─ rows ─▶ Calibration
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ftcli.data.chat import Rendered
from ftcli.errors import MemoryExhausted, UsageError, is_lack_of_memory
from ftcli.evaluate.loss import count_targets
from ftcli.evaluate.sample import load_best_rows
from ftcli.evaluate.subject import load_plain, open_target
from ftcli.evaluate.target import Target
from ftcli.events import Notice, OnEvent, Stage
from ftcli.merge.folder import copy_texts
from ftcli.merge.output import describe_origin
from ftcli.merge.stream import ModelStream, open_model
from ftcli.merge.verify import MOST_TOKENS
from ftcli.model.base import build_skeleton, choose_device, choose_dtype
from ftcli.quantize.bnb import describe_tensor, pack_tensors, view_bytes
from ftcli.quantize.calibration import Calibration, choose_rows, load_calibration
from ftcli.quantize.card import build_card
from ftcli.quantize.layout import build_quantization_config, read_rounded
from ftcli.quantize.method import Spec
from ftcli.quantize.plan import USUAL_GROUPS, Plan, plan_quantization
from ftcli.quantize.verify import Expected, Verification, record_source, verify_folder
from ftcli.store.file import check_free, describe_files, disk_errors, read_json, write_json, write_text
from ftcli.store.output import MANIFEST
from ftcli.store.shard import save_tensors
from ftcli.store.target import ModelFiles
from ftcli.train.memory import explain_lack, release_models

_TEXTS_BYTES = 64 << 20  # tokenizer, config, card
_PACKED_RATIO = 3  # by which 4 bits, with what stays in 16, are less
SCRATCH = ".scratch"


@dataclass(frozen=True)
class Quantized:
    """What came of it: ``share`` of the parameters are packed, ``verification`` is None if none was made.

    ``from_4bit`` says that the source held its base in 4 bits, and the original weights were quantised.
    """

    source: str
    output: str
    spec: Spec
    group_size: int
    size_bytes: int
    bits_per_weight: float
    share: float
    n_layers: int
    calibration: Calibration | None
    verification: Verification | None
    from_4bit: bool = False

    @property
    def is_usable(self) -> bool:
        """Whether nothing is known against it."""
        return self.verification is None or self.verification.has_passed

    def to_json(self) -> dict[str, Any]:
        """The document of ``--json``."""
        found = self.calibration
        calibration = found and {
            "rows": found.n_rows,
            "windows": found.windows.shape[0],
            "seq_len": found.windows.shape[1],
            "text": found.describe(),
        }
        return {
            "source": self.source,
            "output": self.output,
            "method": self.spec.method.name,
            "bits": self.spec.bits,
            "group_size": self.group_size or None,
            "tune": self.spec.tune,
            "bytes": self.size_bytes,
            "bits_per_weight": self.bits_per_weight,
            "layers": self.n_layers,
            "share": self.share,
            "calibration": calibration,
            "verify": self.verification.to_json() if self.verification else None,
        }


class Quantizing:
    """A target of which quantised folders are made, as many as are asked for; texts of it lie in ``scratch``."""

    def __init__(self, target: Target, final: Path, scratch: Path, on_event: OnEvent) -> None:
        self.target, self.final, self.scratch, self.on_event = target, final, scratch, on_event
        self.stream: ModelStream = open_model(target, scratch / "model" / "source", final, on_event)
        self.dtype = _read_dtype(self.stream.folder)

    def plan(self, spec: Spec) -> Plan:
        """What is going to be made.

        Raises:
            ContentError: a layer that cannot be packed.
        """
        skeleton = build_skeleton(self.stream.files, self.target.section)
        plan = plan_quantization(self.stream, skeleton, spec, self.dtype)
        if plan.group_size and plan.group_size not in USUAL_GROUPS:
            usual = ", ".join(map(str, USUAL_GROUPS))
            self.on_event(Notice(f"vLLM reads groups of {usual}, and not of {plan.group_size}"))
        return plan

    def calibrate(self, spec: Spec, source: str | None) -> Calibration | None:
        """The rows that rounding is fitted to; None for a method that reads none.

        Raises:
            UsageError: rows are named for such a method, or there are none.
        """
        if spec.method.is_fitted:
            return load_calibration(self.target, source, spec, self.on_event)
        if source is not None:
            what = f"{spec.method.name} is fitted to no rows"
            raise UsageError(what, where="--calibration", hint="leave it out, or take --method gptq or awq")
        return None

    def load_rows(self, data: str | None, calibration: str | None) -> list[Rendered]:
        """The rows to compare on; for what is no run those of the calibration, where no others are named."""
        target, data = choose_rows(self.target, data, calibration, self.on_event)
        return load_best_rows(target, data, MOST_TOKENS, self.on_event, instead="only its files are checked")

    def check_room(self, plan: Plan, calibration: Calibration | None, documents: Sequence[Rendered]) -> None:
        """None if disk and memory suffice.

        Raises:
            DiskError, MemoryExhausted: with both numbers.
        """
        needed = plan.needed_bytes * (2 if calibration else 1) + _TEXTS_BYTES
        check_free(self.final, needed + 2 * sum(count_targets(documents)) * self._n_vocabulary)
        if calibration is None:
            return
        states = 3 * calibration.windows.numel() * self._width * self.compute_dtype.itemsize
        n_values = plan.n_parameters + states // self.compute_dtype.itemsize
        if lack := explain_lack(n_values, self.compute_dtype):
            what = "the model and what it makes of the rows do not fit in memory"
            hint = "fewer or shorter windows: --samples 32 --seq-len 512; or --method nf4, a weight at a time"
            raise MemoryExhausted(what, why=lack, hint=hint)

    def expect(self, documents: Sequence[Rendered]) -> Expected | str:
        """What results are held against; or why they cannot be: there are no rows, or too little memory."""
        if not documents:
            return "there are no rows to compare on"
        is_4bit = self.target.quantization is not None
        try:
            if lack := explain_lack(self.stream.n_parameters // (_PACKED_RATIO if is_4bit else 1), self.compute_dtype):
                raise MemoryExhausted(lack)
            return record_source(
                lambda: open_target(self.target, on_event=self.on_event),
                documents,
                self.scratch / "rows",
                self.on_event,
                is_4bit=is_4bit,
            )
        except Exception as error:
            if not is_lack_of_memory(error):
                raise
            self.on_event(Notice(f"the source does not fit in memory, so nothing is compared: {error}"))
            return f"the source does not fit in memory: {error}"
        finally:
            release_models()

    def make(self, plan: Plan, calibration: Calibration | None, folder: Path) -> None:
        """Nothing; weights, config and tokenizer of the result lie in ``folder``."""
        self.on_event(Stage("quantize", f"{len(plan.layers)} layers, {plan.spec.title}"))
        with disk_errors(folder):
            copy_texts(self.stream.folder, folder)
            if calibration is None:
                save_tensors(folder, pack_tensors(self.stream, plan, self.on_event))
            else:
                steps = f", {plan.spec.tune} steps a block" if plan.spec.tune else ""
                self.on_event(Stage("calibrate", f"{calibration.describe()}{steps}"))
                rounded = self._round(plan, calibration)
                parts = read_rounded(rounded, plan.dtype)
                save_tensors(folder, ((describe_tensor(name, part), view_bytes(part)) for name, part in parts))
                shutil.rmtree(self.scratch / "rounded")
            config = read_json(folder / "config.json") or {}
            config.pop("torch_dtype", None)
            config |= build_quantization_config(plan)
            write_json(folder / "config.json", config)

    def finish(
        self,
        plan: Plan,
        calibration: Calibration | None,
        expected: Expected | str,
        folder: Path,
        final: Path,
        *,
        verifies: bool = True,
    ) -> Quantized:
        """What came of it, verified; card and manifest lie in ``folder``, which is to be ``final``, and no scratch."""
        found = None
        if verifies:
            files = ModelFiles(str(final), folder)
            found = verify_folder(folder, plan, expected, lambda: load_plain(files, self.target.section), self.on_event)
        shutil.rmtree(folder / SCRATCH, ignore_errors=True)
        size_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        made = Quantized(
            source=self.target.name,
            output=str(final),
            spec=plan.spec,
            group_size=plan.group_size,
            size_bytes=size_bytes,
            bits_per_weight=8 * size_bytes / plan.n_parameters,
            share=plan.share,
            n_layers=len(plan.layers),
            calibration=calibration,
            verification=found,
            from_4bit=self.target.quantization is not None,
        )
        recipe = self.target.recipe
        manifest = {**describe_origin(self.target, "quantize"), **made.to_json()}
        if plan.spec.method.is_fitted:
            manifest["versions"]["auto-round"] = version("auto-round")
        datasets = [Path(section.path).name for section in recipe.datasets] if recipe else []
        card = build_card(self.target.title, manifest, plan.spec.method, found, datasets=datasets)
        write_text(folder / "README.md", card)
        write_json(folder / MANIFEST, {**manifest, "files": describe_files(folder)})
        return made

    @property
    def compute_dtype(self) -> torch.dtype:
        """What models are run in here."""
        return choose_dtype(self.target.section.dtype, choose_device())

    def _round(self, plan: Plan, calibration: Calibration) -> Path:
        """The folder in which auto-round's files lie."""
        from ftcli.quantize.rounding import build_model, round_weights

        model = build_model(self.stream, self.target.section, self.compute_dtype)
        made = round_weights(model, self.stream.tokenizer, calibration, plan, self.scratch / "rounded", self.on_event)
        del model
        release_models()
        return made

    @property
    def _n_vocabulary(self) -> int:
        return max(tensor.shape[0] for tensor in self.stream.tensors if tensor.shape)

    @property
    def _width(self) -> int:
        return min(tensor.shape[1] for tensor in self.stream.tensors if len(tensor.shape) == 2)


def _read_dtype(folder: Path) -> torch.dtype:
    """What the weights are that are not packed: float16 where the source is, else bfloat16."""
    config = read_json(folder / "config.json") or {}
    return torch.float16 if "float16" in (config.get("dtype"), config.get("torch_dtype")) else torch.bfloat16
