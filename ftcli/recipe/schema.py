"""What a recipe may say: all of its sections, and the checks between their keys.

    Recipe ── model · tokenizer · quantization · peft · datasets[] · data · train · eval · checkpoint
              logging · distributed · output_dir

Where a value came from, and in what words an error is told, is no matter of this module (`load`, `problem`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from ftcli.recipe.section import (
    CheckpointSection,
    DataSection,
    DatasetSection,
    DistributedSection,
    EvalSection,
    Expected,
    LoggingSection,
    ModelSection,
    PeftSection,
    QuantizationSection,
    Section,
    Text,
    TokenizerSection,
    TrainSection,
    build_error,
)

SCHEMA_VERSION: Literal[1] = 1

# The first key, when it has a value, takes the place of the second, which then may not be given.
EXCLUSIVE = {"train.max_steps": "train.num_train_epochs", "train.warmup_steps": "train.warmup_ratio"}

# These initialisations write into the base weights, which 4-bit weights do not allow.
_REWRITES_BASE = ("pissa", "olora")


def _name_to_section(value: Any) -> Any:
    return {"name_or_path": value} if isinstance(value, str) else value


class Recipe(Section):
    """Everything that a run is asked to do."""

    schema_version: Literal[1] = Field(default=SCHEMA_VERSION, alias="schema", description="Number of this format.")
    model: Annotated[
        ModelSection,
        BeforeValidator(_name_to_section, json_schema_input_type=str | ModelSection),
        Expected("a model's name or a section"),
    ] = Field(description="The model to start from.")
    tokenizer: TokenizerSection = Field(default=TokenizerSection(), description="Template and new tokens.")
    quantization: QuantizationSection | None = Field(default=None, description="4-bit base weights; null: 16-bit.")
    peft: PeftSection | None = Field(default=PeftSection(), description="LoRA; null: full fine-tuning.")
    datasets: Annotated[tuple[DatasetSection, ...], Field(strict=False, min_length=1)] = Field(
        description="Rows to train on."
    )
    data: DataSection = Field(default=DataSection(), description="From rows to batches.")
    train: TrainSection = Field(default=TrainSection(), description="The optimizer and its steps.")
    eval: EvalSection | None = Field(default=None, description="Evaluation on held-out rows; null: none.")
    checkpoint: CheckpointSection = Field(default=CheckpointSection(), description="What a run can be resumed from.")
    logging: LoggingSection = Field(default=LoggingSection(), description="Trackers that are told of the run.")
    distributed: DistributedSection = Field(
        default=DistributedSection(), description="How several processes share a run."
    )
    output_dir: Text = Field(
        default="runs/recipe",
        description="Folder of the run (relative to the current folder); left out: runs/ and the recipe's name.",
    )

    @property
    def is_4bit(self) -> bool:
        """Whether the base weights are held in 4 bits."""
        return self.quantization is not None and self.quantization.load_in_4bit

    @property
    def takes_best(self) -> bool:
        """Whether the artifact is the best checkpoint, not the last."""
        if self.checkpoint.load_best_model_at_end is None:
            return self.eval is not None and self.eval.early_stopping_patience is not None
        return self.checkpoint.load_best_model_at_end

    @property
    def puts_documents_together(self) -> bool:
        """Whether a forward pass may hold more than one document."""
        return self.data.packing or self.train.per_device_train_batch_size > 1

    @model_validator(mode="after")
    def _check_quantization(self) -> Self:
        if self.is_4bit and self.peft is None:
            raise build_error("4-bit weights cannot be trained; use peft or drop quantization", "quantization", "peft")
        return self

    @model_validator(mode="after")
    def _check_initialisation(self) -> Self:
        init = self.peft.init_lora_weights if self.peft else True
        if self.is_4bit and isinstance(init, str) and init.startswith(_REWRITES_BASE):
            raise build_error(
                f"{init} rewrites the base weights, which 4-bit weights do not allow; drop it, or drop quantization",
                "peft.init_lora_weights",
                "quantization",
            )
        return self

    @model_validator(mode="after")
    def _check_learning_rate(self) -> Self:
        if self.peft is None and "learning_rate" not in self.train.model_fields_set:
            raise build_error(
                "full fine-tuning has no safe default learning rate; 1e-5 is usual", "train.learning_rate", "peft"
            )
        return self

    @model_validator(mode="after")
    def _check_held_out(self) -> Self:
        if self.eval is None:
            return self
        if self.eval.datasets and self.data.val_set_size is not None:
            raise build_error("excludes eval.datasets; give one of them", "data.val_set_size", "eval.datasets")
        has_rows = bool(self.eval.datasets) or self.data.val_set_size is not None
        if not has_rows and not self.eval.sample_prompts:
            raise build_error(
                "nothing to evaluate on; give eval.datasets, data.val_set_size or eval.sample_prompts",
                "eval",
                "eval.datasets",
                "data.val_set_size",
            )
        if not has_rows and self.eval.early_stopping_patience is not None:
            raise build_error("needs held-out rows", "eval.early_stopping_patience", "eval.datasets")
        return self

    @model_validator(mode="after")
    def _check_best(self) -> Self:
        has_rows = self.eval is not None and (bool(self.eval.datasets) or self.data.val_set_size is not None)
        if self.checkpoint.load_best_model_at_end and not (has_rows and self.eval and self.eval.eval_steps):
            raise build_error(
                "needs held-out rows and eval.eval_steps, or there is no best", "checkpoint.load_best_model_at_end"
            )
        return self
