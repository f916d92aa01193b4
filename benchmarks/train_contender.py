"""One training run of one contender, in a process of its own: what ``cpu_train.py`` starts, with either Python.

    python train_contender.py SPECIFICATION.json

The specification names the contender, the model and the rows; the result is written to the file that it names.
Every contender is measured by the same few lines:

    load ─▶ mark_loaded ─▶ step 1, 2 (warm-up) ─▶ step 3 … last ─▶ result
            resident now   ╰──────────── peak of resident memory ───╯
                                         ╰─ CPU and wall seconds ───╯
"""

from __future__ import annotations

import ctypes
import gc
import json
import platform
import resource
import sys
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

WARM_UP = 2  # steps that are not timed
RANK, ALPHA, LEARNING_RATE = 16, 32, 1e-4
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PACKAGES = ("ftcli", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "trl")
_TOLD = (  # of a peer's arguments, what a default decides
    "per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "bf16", "optim",
    "max_length", "packing", "packing_strategy", "padding_free", "loss_type", "activation_offloading", "logging_steps",
)  # fmt: skip


class Meter:
    """What a run costs: ``mark_loaded`` once, ``mark_step`` after each optimizer step, then ``to_json``."""

    def __init__(self) -> None:
        self.loaded_bytes = self.peak_bytes = 0
        self.marks: list[tuple[float, float]] = []

    def mark_loaded(self) -> None:
        """Nothing; weights are resident, free heap has gone back, and peaks are counted from here."""
        gc.collect()
        touch_parameters()
        with suppress(AttributeError):  # no glibc
            ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        self.loaded_bytes = read_status("VmRSS")

    def mark_step(self) -> None:
        self.marks.append((read_cpu(), time.perf_counter()))
        self.peak_bytes = read_status("VmHWM")

    def to_json(self, steps: list[tuple[int, int]]) -> dict[str, Any]:
        """The figures; ``steps`` are tokens and trained tokens of each step."""
        if len(steps) != len(self.marks) or not self.loaded_bytes:
            raise SystemExit(f"{len(steps)} steps were seen and {len(self.marks)} timed")
        if len(steps) <= WARM_UP:
            raise SystemExit(f"{len(steps)} steps are too few, as the first {WARM_UP} are not timed: raise --steps")
        (cpu_first, first), (cpu_last, last) = self.marks[WARM_UP - 1], self.marks[-1]
        n_tokens = sum(tokens for tokens, _ in steps[WARM_UP:])
        return {
            "tokens_per_cpu_second": round(n_tokens / (cpu_last - cpu_first), 2),
            "tokens_per_second": round(n_tokens / (last - first), 2),
            "peak_over_loaded_bytes": self.peak_bytes - self.loaded_bytes,
            "loaded_bytes": self.loaded_bytes,
            "cpu_seconds": round(cpu_last - cpu_first, 3),
            "seconds": round(last - first, 3),
            "measured_tokens": n_tokens,
            "measured_steps": len(steps) - WARM_UP,
            "all_tokens": sum(tokens for tokens, _ in steps),
            "all_targets": sum(targets for _, targets in steps),
        }


def touch_parameters() -> None:
    """Nothing; every page of every parameter is resident, those of mapped files too."""
    import torch

    for entry in gc.get_objects():
        if issubclass(type(entry), torch.nn.Parameter) and entry.device.type == "cpu":
            entry.detach().reshape(-1).view(torch.uint8)[::1024].sum()


def read_status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def read_cpu() -> float:
    """CPU seconds of this process so far, all threads and ended children with it."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(entry.ru_utime + entry.ru_stime for entry in used)


def list_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


# --- ftcli


def run_ftcli(specification: dict[str, Any], meter: Meter) -> dict[str, Any]:
    from ftcli.events import Event, Stage, StepDone
    from ftcli.train.run import train

    def on_event(event: Event) -> None:
        if isinstance(event, Stage) and event.name == "try":  # after the model, before the largest batches are tried
            meter.mark_loaded()
        if isinstance(event, StepDone):
            meter.mark_step()

    run = train(Path(specification["recipe"]), overwrite=True, on_event=on_event)
    lines = [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()]
    figures = meter.to_json([(line["n_tokens"], line["n_target_tokens"]) for line in lines])
    return figures | {"mean_loss": sum(line["loss"] for line in lines) / len(lines)}


# --- the peers


def run_trainer(specification: dict[str, Any], meter: Meter) -> dict[str, Any]:
    """The figures of TRL's or transformers' own trainer, with its defaults but for what the specification sets."""
    trainer = build_trl(specification) if specification["trainer"] == "trl" else build_hf(specification)
    forwards: list[tuple[int, int]] = []
    steps: list[tuple[int, int]] = []
    masks: list[Any] = []
    watch_inputs(trainer.model, forwards, masks)
    trainer.add_callback(build_callback(meter, forwards, steps))
    output = trainer.train()
    lora = next(p for name, p in trainer.model.named_parameters() if "lora_A" in name)
    told = {name: getattr(trainer.args, name) for name in _TOLD if hasattr(trainer.args, name)}
    told["optim"] = str(getattr(told["optim"], "value", told["optim"]))
    told |= {
        "collator_padding_free": getattr(trainer, "padding_free", False),
        "attention": trainer.model.config._attn_implementation,
        "attention_mask": masks[0],
        "base_dtype": str(trainer.model.get_base_model().model.norm.weight.dtype),
        "lora_dtype": str(lora.dtype),
    }
    return meter.to_json(steps) | {"mean_loss": output.training_loss, "configuration": told}


def build_trl(specification: dict[str, Any]) -> Any:
    from trl import SFTConfig, SFTTrainer

    dtype = {"model_init_kwargs": {"dtype": "bfloat16"}}
    return SFTTrainer(
        model=specification["model"],
        args=SFTConfig(**list_arguments(specification), **dtype),
        train_dataset=load_rows(specification),
        processing_class=load_tokenizer(specification),
        quantization_config=build_quantization(specification),
        peft_config=build_lora(),
    )


def build_hf(specification: dict[str, Any]) -> Any:
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    packing = build_quantization(specification)
    options = {} if packing is None else {"quantization_config": packing}
    model = AutoModelForCausalLM.from_pretrained(specification["model"], dtype=torch.bfloat16, **options)
    return Trainer(
        model=get_peft_model(model, build_lora()),
        args=TrainingArguments(**list_arguments(specification)),
        train_dataset=load_rows(specification),
        data_collator=DataCollatorForSeq2Seq(load_tokenizer(specification)),
    )


def list_arguments(specification: dict[str, Any]) -> dict[str, Any]:
    """What is set for a peer beside its defaults: where it runs, how long, and nothing saved on the way."""
    return {
        "output_dir": specification["output"],
        "use_cpu": True,
        "learning_rate": LEARNING_RATE,
        "num_train_epochs": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **specification["arguments"],
    }


def build_lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=PROJECTIONS, task_type="CAUSAL_LM"
    )  # fmt: skip


def build_quantization(specification: dict[str, Any]) -> Any:
    if not specification["is_4bit"]:
        return None
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def load_tokenizer(specification: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(specification["model"])


def load_rows(specification: dict[str, Any]) -> Any:
    from datasets import Dataset

    lines = Path(specification["documents"]).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return Dataset.from_list([{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows])


def watch_inputs(model: Any, forwards: list[tuple[int, int]], masks: list[Any]) -> None:
    """Nothing; each forward adds its tokens and trained tokens, the first one the shape of the attention mask."""

    def before_model(module: Any, _: Any, inputs: dict[str, Any]) -> None:
        mask = inputs.get("attention_mask")
        n_tokens = inputs["input_ids"].numel() if mask is None else int(mask.sum())
        forwards.append((n_tokens, int((inputs["labels"][:, 1:] != -100).sum())))

    def before_block(module: Any, _: Any, inputs: dict[str, Any]) -> None:
        mask = inputs.get("attention_mask")
        masks.append(None if mask is None else [str(mask.dtype), *mask.shape])
        handle.remove()

    model.register_forward_pre_hook(before_model, with_kwargs=True)
    block = model.get_base_model().model.layers[0]
    handle = block.register_forward_pre_hook(before_block, with_kwargs=True)


def build_callback(meter: Meter, forwards: list[tuple[int, int]], steps: list[tuple[int, int]]) -> Any:
    """What marks the trainer's steps, and adds up the forwards of each."""
    from transformers import TrainerCallback

    class Marks(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            meter.mark_loaded()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            meter.mark_step()
            steps.append((sum(tokens for tokens, _ in forwards), sum(targets for _, targets in forwards)))
            forwards.clear()

    return Marks()


def main() -> None:
    specification = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    run = run_ftcli if specification["trainer"] == "ftcli" else run_trainer
    result = run(specification, Meter()) | {"versions": list_versions()}
    Path(specification["result"]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
