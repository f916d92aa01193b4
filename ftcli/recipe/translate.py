"""Another tool's configuration as a recipe, with a word on every key: translated, done otherwise, or not there.

    axolotl | LLaMA-Factory | TRL (YAML, JSON) ─▶ flat keys ─▶ our keys and values ─▶ recipe + notes

What the file leaves out is taken as that tool would, and written out where our own default is another.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ftcli.errors import ContentError, UsageError
from ftcli.recipe.foreign import TOOLS, Kind, Tool
from ftcli.recipe.foreign_rows import list_rows
from ftcli.recipe.load import build_recipe
from ftcli.recipe.section import (
    BUNDLED_TEMPLATES,
    CheckpointSection,
    DataSection,
    PeftSection,
    QuantizationSection,
    Section,
    TrainSection,
)

_CURVES = ("linear", "cosine", "constant")
_EMPTY: tuple[Any, ...] = (None, "", [], {}, False)


@dataclass(frozen=True)
class Note:
    """What became of one key: ``default`` (left out, and the tool's own was taken), ``differs``, ``missing`` here, or
    ``unknown``."""

    kind: Kind
    key: str
    text: str


@dataclass(frozen=True)
class Translation:
    """A recipe's YAML, made from a file of ``tool``; every key of that file is in it or among the notes."""

    tool: str
    text: str
    notes: tuple[Note, ...]


def translate_file(path: Path, *, folder: Path | None = None) -> Translation:
    """The recipe that does what ``path`` asks of its tool.

    Args:
        path: the file.
        folder: where the recipe will lie; its own folder if None. Relative paths stay as they are written.

    Raises:
        UsageError: no such file.
        ContentError: it is of no tool that is known, or asks for another kind of training.
    """
    values = _read(path)
    tool = find_tool(values)
    if tool is None:
        names = ", ".join(tool.name for tool in TOOLS)
        raise ContentError("is no configuration of a tool that is known", where=str(path), hint=f"these are: {names}")
    _refuse(values, tool, path)
    translator = _Translator(values, tool, path)
    recipe = translator.translate()
    build_recipe(recipe, folder=folder or path.parent, name=path.stem)
    return Translation(tool.name, _write(recipe, tool, path), tuple(translator.notes))


def find_tool(values: Mapping[str, Any]) -> Tool | None:
    """The tool whose keys these are."""
    if "base_model" in values:
        return TOOLS[0]
    if "model_name_or_path" not in values:
        return None
    return next((tool for tool in TOOLS[1:] if any(mark in values for mark in tool.marks)), TOOLS[2])


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except FileNotFoundError as error:
        raise UsageError("no such file", where=str(path)) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError("cannot be read", where=str(path), why=str(error)) from error
    except (ValueError, yaml.YAMLError) as error:
        raise ContentError("is no YAML", where=str(path), why=str(error).replace("\n", " ")) from error
    if not isinstance(values, dict):
        raise ContentError("holds no keys", where=str(path))
    return {str(key): value for key, value in values.items()}


def _refuse(values: Mapping[str, Any], tool: Tool, path: Path) -> None:
    asked = {key: what for key, what in tool.refused.items() if values.get(key) not in _EMPTY}
    stage = values.get("stage", "sft")
    if tool.name == "LLaMA-Factory" and stage not in ("sft", "pt"):
        asked["stage"] = f"another stage than supervised fine-tuning ({stage})"
    if asked:
        key, what = next(iter(asked.items()))
        raise ContentError(f"{key} asks for {what}, which ftcli does not do", where=str(path))


class _Translator:
    def __init__(self, values: Mapping[str, Any], tool: Tool, path: Path) -> None:
        self.left = dict(values)
        self.tool = tool
        self.path = path
        self.recipe: dict[str, Any] = {}
        self.notes: list[Note] = []

    def translate(self) -> dict[str, Any]:
        """The recipe as nested values; what became of each key is in the notes."""
        self._translate_method()
        self._translate_template()
        self._translate_data()
        self._translate_run()
        for key, ours in self.tool.keys.items():
            value = self.left.pop(key, None)
            if value is not None and value not in ("", [], {}):  # 0 and false say something
                self._set(ours, _to_number(value))
        self._fill_defaults()
        self._drop_contradictions()
        for key, value in self.left.items():
            self._note_rest(key, value)
        return {key: self.recipe[key] for key in _ORDER if key in self.recipe}

    def _translate_method(self) -> None:
        """Full fine-tuning or LoRA, on which modules, in how many bits."""
        take, name = self.left.pop, self.tool.name
        method = take("adapter", None) if name == "axolotl" else take("finetuning_type", "lora")
        if name == "TRL":
            method = "lora" if take("use_peft", False) else None
        is_4bit = bool(take("load_in_4bit", False)) or method == "qlora" or take("quantization_bit", None) == 4
        if method in ("lora", "qlora"):
            self.recipe["peft"] = {}
            targets = take("lora_target_modules", None) or take("lora_target", None)
            if take("lora_target_linear", False) or targets in ("all", "all-linear", ["all"], ["all-linear"]):
                targets = "all-linear"
            elif isinstance(targets, str) and name == "LLaMA-Factory":
                targets = [part.strip() for part in targets.split(",")]
            if targets or name == "LLaMA-Factory":
                self._set("peft.target_modules", targets or "all-linear")
        else:
            if method not in (None, "full"):
                self._note("missing", "finetuning_type", f"{method} is not there: every weight is trained")
            self.recipe["peft"] = None
        if is_4bit and self.recipe["peft"] is not None:
            self._set("quantization.load_in_4bit", True)
        if name == "LLaMA-Factory" and "lora_alpha" not in self.left and self.recipe["peft"] is not None:
            rank = self.left.get("lora_rank", 8)
            self._set("peft.lora_alpha", 2 * rank)
            self._note("default", "lora_alpha", f"twice the rank, {2 * rank}, as {name} does where it is left out")

    def _translate_template(self) -> None:
        name = self.left.pop("chat_template", None) or self.left.pop("template", None)
        if name in BUNDLED_TEMPLATES or (isinstance(name, str) and name.endswith((".jinja", ".j2"))):
            self._set("tokenizer.chat_template", name)
        elif name not in (None, "tokenizer_default", "default"):
            text = f"{name}: rows are rendered by the template that comes with the model; for a base model without one "
            self._note(
                "differs", "chat_template", text + f"set tokenizer.chat_template: {', '.join(BUNDLED_TEMPLATES)}"
            )

    def _translate_data(self) -> None:
        entries = list(list_rows(self.left, self.tool, self.path, self._note))
        if not entries:
            entries = [{"path": "train.jsonl"}]
            self._note("missing", "datasets", "the file names no rows: train.jsonl stands in their place")
        self.recipe["datasets"] = entries
        strategy = self.left.pop("excess_length_strategy", "drop" if self.tool.name == "axolotl" else None)
        if strategy in ("drop", "truncate"):
            self._set("data.overflow", strategy)
            self._note("default", "overflow", f"rows that are too long: {strategy}; our own default is an error")

    def _translate_run(self) -> None:
        take = self.left.pop
        curve = take("lr_scheduler_type", None) or take("lr_scheduler", None)
        if curve == "constant_with_warmup":
            curve = "constant"
        if curve in _CURVES:
            self._set("train.lr_scheduler_type", curve)
        elif curve:
            self._note("differs", "lr_scheduler", f"{curve} is not there: cosine")
        optimizer = take("optimizer", None) or take("optim", None)
        if optimizer in ("adamw_torch", "adamw_torch_fused"):
            self._set("train.optim", optimizer)
        elif optimizer:
            self._note("differs", "optimizer", f"{optimizer}: AdamW with moments in 32 bits (adamw_torch_fused)")
        names = ("bf16", "fp16", "torch_dtype", "dtype", "pure_bf16", "bfloat16", "float16")
        asked = {key: take(key) for key in names if key in self.left}
        if any(asked.get(key) in (True, "float16") for key in ("fp16", "torch_dtype", "dtype", "float16")):
            self._set("model.dtype", "float16")
        elif any(value in (True, "bfloat16") for value in asked.values()):
            self._set("model.dtype", "bfloat16")
        attention = take("attn_implementation", None)
        if attention in ("sdpa", "eager"):
            self._note("differs", "attn_implementation", f"{attention}: left to ftcli, whose fast path has its own")
        trackers = take("report_to", None)
        trackers = [trackers] if isinstance(trackers, str) else list(trackers or ())
        if self.left.get("wandb_project"):
            trackers.append("wandb")
        known = [name for name in dict.fromkeys(trackers) if name in ("tensorboard", "wandb", "mlflow", "trackio")]
        if known:
            self._set("logging.report_to", known)
        for each, ours in (("saves_per_epoch", "checkpoint.save_steps"), ("evals_per_epoch", "eval.eval_steps")):
            if number := take(each, None):
                self._note("differs", each, f"{number} an epoch: here in steps, {ours}")
        if take("disable_gradient_checkpointing", False):
            self._set("train.gradient_checkpointing", False)

    def _fill_defaults(self) -> None:
        for key, value in self.tool.defaults.items():
            section, _, leaf = key.partition(".")
            if (section == "peft" and not isinstance(self.recipe.get("peft"), dict)) or (
                section == "quantization" and "quantization" not in self.recipe
            ):
                continue
            if self._get(key) is None and value != _find_default(section, leaf):
                self._set(key, value)
                self._note("default", leaf, f"{value}, as {self.tool.name} takes where it is left out")

    def _drop_contradictions(self) -> None:
        """What our recipe does not take together, as the other tool would decide it."""
        train = self.recipe.setdefault("train", {})
        if isinstance(train.get("warmup_steps"), float) and train["warmup_steps"] < 1:  # axolotl: then it is a share
            train["warmup_ratio"] = train.pop("warmup_steps")
        if isinstance(train.get("gradient_checkpointing"), str):
            self._note("differs", "gradient_checkpointing", f"{train['gradient_checkpointing']}: true, on the device")
            train["gradient_checkpointing"] = True
        if (train.get("max_steps") or -1) > 0:
            train.pop("num_train_epochs", None)
        else:
            train.pop("max_steps", None)
        if train.get("warmup_steps"):
            train.pop("warmup_ratio", None)
        else:
            train.pop("warmup_steps", None)
        if (self._get("data.val_set_size") or 0) <= 0:
            self.recipe.get("data", {}).pop("val_set_size", None)
            if self.recipe.pop("eval", None):
                self._note("missing", "eval", "nothing is held out: give eval.datasets or data.val_set_size")
        if self._get("eval.early_stopping_patience") and not self._get("eval.eval_steps"):
            self.recipe["eval"].pop("early_stopping_patience")
            self._note("missing", "early_stopping_patience", "set it with eval.eval_steps, in steps")
        if not self.recipe.get("eval", True):
            del self.recipe["eval"]
        if isinstance(self.recipe.get("peft"), dict) and self._get("peft.adapter"):
            self.recipe["peft"] = {"adapter": self._get("peft.adapter")}

    def _note_rest(self, key: str, value: Any) -> None:
        if value in _EMPTY or key in self.tool.silent:
            return
        why = self.tool.missing.get(key)
        self._note("missing" if why else "unknown", key, why or f"{_shorten(value)}: not translated")

    def _set(self, key: str, value: Any) -> None:
        section, _, leaf = key.partition(".")
        if not leaf:
            self.recipe[section] = value
        elif isinstance(self.recipe.setdefault(section, {}), dict):
            self.recipe[section][leaf] = value

    def _get(self, key: str) -> Any:
        section, _, leaf = key.partition(".")
        found = self.recipe.get(section)
        return found.get(leaf) if isinstance(found, dict) else None

    def _note(self, kind: Kind, key: str, text: str) -> None:
        self.notes.append(Note(kind, key, text))


_ORDER = (
    "model", "tokenizer", "quantization", "peft", "datasets", "data", "train", "eval", "checkpoint", "logging",
    "distributed", "output_dir",
)  # fmt: skip


def _find_default(section: str, leaf: str) -> Any:
    """What our own schema takes where the key is left out."""
    kinds: dict[str, type[Section]] = {
        "peft": PeftSection,
        "quantization": QuantizationSection,
        "data": DataSection,
        "train": TrainSection,
        "checkpoint": CheckpointSection,
    }
    return kinds[section].model_fields[leaf].default


def _to_number(value: Any) -> Any:
    """``1e-4`` as a number: YAML 1.1 reads it as text, and so these tools turn it themselves."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _shorten(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:58]} …"


def _write(recipe: Mapping[str, Any], tool: Tool, path: Path) -> str:
    text = yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True, width=100)
    return f"# Translated from {path.name} ({tool.name}).\n{text}"
