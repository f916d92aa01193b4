"""The sections of a recipe: their keys, types, defaults, and the checks between the keys of one section.

Leaf names are those of PEFT, BitsAndBytesConfig and TrainingArguments where these have one. Values are typed
strictly: a bool is no int, text is no number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, model_validator
from pydantic_core import PydanticCustomError

# The chat templates that come with ftcli, for base models, which have none.
BUNDLED_TEMPLATES = ("llama3", "chatml", "mistral")


@dataclass(frozen=True)
class Expected:
    """The words for a type that none can be derived for, as in ``expected WORDS, got 5``."""

    words: str


def build_error(text: str, *keys: str) -> PydanticCustomError:
    """An error with the user's words; ``keys`` are the keys involved, the one to blame first."""
    return PydanticCustomError("recipe", "{text}", {"text": text, "keys": keys})


def _check_distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    for index, value in enumerate(values):
        if value in values[:index]:
            raise build_error(f"{value} is given twice")
    return values


def _check_regex(text: str) -> str:
    import regex

    try:
        regex.compile(text)
    except regex.error as error:
        raise build_error(f"is no regular expression: {error}") from None
    return text


def _check_layers(text: str) -> str:
    first, _, last = text.partition("-")
    if last and int(first) > int(last):
        raise build_error(f"the range {text} is empty; write {last}-{first}")
    return text


STRATEGIES = ("auto", "ddp", "fsdp2")

Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
PositiveNumber = Annotated[int | float, Field(gt=0), Expected("a number greater than 0")]
Share = Annotated[float, Field(ge=0, lt=1)]
# strict=False lets a list stand for the tuple; the items stay strict.
Texts = Annotated[tuple[Text, ...], Field(strict=False, min_length=1), AfterValidator(_check_distinct)]
OptionalTexts = Annotated[tuple[Text, ...], Field(strict=False), AfterValidator(_check_distinct)]
Layers = Annotated[
    tuple[Annotated[int, Field(ge=0)], ...],
    Field(strict=False, min_length=1),
    AfterValidator(_check_distinct),
]
LayerRange = Annotated[
    str, Field(pattern="^(last:[1-9][0-9]*|[0-9]+-[0-9]+)$", max_length=40), AfterValidator(_check_layers)
]


class Section(BaseModel):
    """A mapping with known keys only."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class ModelSection(Section):
    """The model to start from. `model: NAME` is short for `model: {name_or_path: NAME}`."""

    name_or_path: Text = Field(
        description="Hub id, folder or .gguf file (relative to the current folder), or package://MODULE/FILE."
    )
    revision: Text | None = Field(default=None, description="Branch, tag or commit on the Hub; null is the newest.")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        default="auto", description="Type of the weights in memory; auto takes what the machine does well."
    )
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3"] | None = Field(
        default=None, description="Implementation of attention; null takes the best that the machine has."
    )
    trust_remote_code: bool = Field(default=False, description="Run Python code that comes with the model.")


class TokenizerSection(Section):
    """The template that renders conversations, and tokens to add."""

    chat_template: Annotated[
        str,
        Field(pattern=rf"^(auto|{'|'.join(BUNDLED_TEMPLATES)})$|\.(jinja|j2)$"),
        Expected(f"auto, {', '.join(BUNDLED_TEMPLATES)}, or a path to a .jinja file"),
    ] = Field(
        default="auto",
        description="The model's own template (auto), one that ftcli brings for base models (llama3, chatml, "
        "mistral), or a file (relative to the recipe's folder).",
    )
    chat_template_kwargs: Annotated[dict[str, JsonValue], Expected("a mapping of names to values")] = Field(
        default={}, description="Variables for the template, such as `enable_thinking: false`."
    )
    add_tokens: Annotated[
        OptionalTexts | dict[Text, Text], Expected("a list of tokens or a mapping of tokens to descriptions")
    ] = Field(default=(), description="New tokens; with a description, the embedding starts from its words.")


class QuantizationSection(Section):
    """Hold the frozen base weights in 4 bits (QLoRA)."""

    load_in_4bit: bool = Field(default=True, description="false is the same as no quantization.")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = Field(default="nf4", description="The 4-bit number format.")
    bnb_4bit_use_double_quant: bool = Field(
        default=True, description="Quantize the scales too, which saves about 0.4 bits per weight."
    )


class PeftSection(Section):
    """LoRA. `peft: null` is full fine-tuning."""

    r: Count = Field(default=16, description="Rank of the update.")
    lora_alpha: PositiveNumber = Field(default=32, description="The update is scaled by lora_alpha / r.")
    lora_dropout: Share = Field(default=0.0, description="Share of the inputs of LoRA that is zeroed in training.")
    target_modules: Annotated[Text | Texts, Expected("text or a list of distinct names")] = Field(
        default="all-linear", description="attn, attn+gate_up, all-linear, a list of module names, or a regex."
    )
    layers_to_transform: Annotated[
        Layers | LayerRange | None,
        Expected('a list of layer numbers from 0, text such as "last:8" or "8-23", or null'),
    ] = Field(default=None, description="Layers that get LoRA, counted from 0, both ends included; null is all.")
    modules_to_save: Texts | None = Field(
        default=None, description="Modules trained in full and saved with the adapter."
    )
    use_rslora: bool = Field(default=False, description="Scale by lora_alpha / sqrt(r) instead of lora_alpha / r.")
    use_dora: bool = Field(default=False, description="Train magnitude and direction apart (DoRA).")
    init_lora_weights: (
        bool
        | Literal["gaussian", "orthogonal", "pissa", "olora"]
        | Annotated[
            str,
            Field(pattern="^pissa_niter_[1-9][0-9]*$", max_length=40),
            Expected("pissa_niter_N with a number N"),
        ]
    ) = Field(default=True, description="How A and B start; pissa and olora also rewrite the base weights.")
    rank_pattern: Annotated[dict[Text, Count], Expected("a mapping of regexes to integers of at least 1")] = Field(
        default={}, description="Ranks for modules whose names match, instead of r."
    )
    alpha_pattern: Annotated[dict[Text, PositiveNumber], Expected("a mapping of regexes to numbers greater than 0")] = (
        Field(default={}, description="Alphas for modules whose names match, instead of lora_alpha.")
    )
    adapter: Text | None = Field(
        default=None,
        description="Go on from this adapter (relative to the current folder); excludes all other keys of peft.",
    )

    @model_validator(mode="after")
    def _check_adapter(self) -> Self:
        others = [name for name in type(self).model_fields if name in self.model_fields_set - {"adapter"}]
        if self.adapter is not None and others:
            raise build_error(
                f"the adapter brings its own {', '.join(others)}; drop these keys, or drop adapter",
                "adapter",
                *others,
            )
        return self


class RowsSection(Section):
    """One source of rows."""

    path: Text = Field(
        description="A file (.jsonl, .json, .parquet, .csv, .tsv), a folder of them, a glob (all relative to the "
        "recipe's folder), or a Hub id."
    )
    name: Text | None = Field(default=None, description="Configuration of a data set on the Hub.")
    split: Text = Field(default="train", description="Split of a data set on the Hub.")
    type: Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text"] = Field(
        default="auto", description="Format of the rows; auto tells it from the first one of each file."
    )
    columns: Annotated[dict[Text, Text], Expected("a mapping of the format's keys to the file's columns")] = Field(
        default={}, description="The file's names for the format's keys, such as `messages: dialogue`."
    )
    roles: Annotated[dict[Text, Text], Expected("a mapping of the file's roles to ours")] = Field(
        default={}, description="Roles for the file's own words, such as `bot: assistant`."
    )
    train_on: Annotated[
        Literal["assistant", "last_assistant", "all"] | Texts,
        Expected("one of assistant, last_assistant, all, or a list of roles"),
    ] = Field(default="assistant", description="Turns that are learned; `train` in a message wins over it.")


class DatasetSection(RowsSection):
    """One source of rows to train on."""

    weight: Annotated[float, Field(gt=0, le=1000)] = Field(
        default=1.0, description="How often an epoch sees each row: 2 is twice, 0.5 another half in each epoch."
    )


class DataSection(Section):
    """From rows to batches."""

    max_length: Annotated[int, Field(ge=8)] = Field(
        default=2048, description="Longest document in tokens; with packing, the size of a pack."
    )
    overflow: Literal["error", "drop", "truncate", "split"] = Field(
        default="error", description="What happens to rows longer than max_length."
    )
    packing: bool = Field(default=True, description="Put several documents side by side into one pack; they never mix.")
    val_set_size: Annotated[
        Annotated[float, Field(gt=0, lt=1)] | Count | None,
        Expected("a share between 0 and 1, a number of rows of at least 1, or null"),
    ] = Field(default=None, description="Rows held out for evaluation: a share of them, or how many.")


class TrainSection(Section):
    """The optimizer and its steps."""

    learning_rate: Positive = Field(
        default=2e-4, description="Peak learning rate; must be given with `peft: null` (1e-5 is usual there)."
    )
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = Field(
        default="cosine", description="Course of the learning rate after the warm-up."
    )
    warmup_ratio: Share = Field(default=0.0, description="Share of all steps in which the learning rate rises from 0.")
    warmup_steps: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="The same in optimizer steps; excludes warmup_ratio."
    )
    optim: Literal["adamw_torch", "adamw_torch_fused"] = Field(
        default="adamw_torch_fused", description="AdamW of torch; fused where the device has it."
    )
    adam_beta1: Share = Field(default=0.9, description="Decay of the mean of gradients.")
    adam_beta2: Share = Field(default=0.999, description="Decay of the mean of squared gradients.")
    adam_epsilon: Positive = Field(default=1e-8, description="Added to the root of the squared mean.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(default=0.0, description="Decoupled weight decay.")
    max_grad_norm: Positive | None = Field(
        default=1.0, description="Longer gradients are clipped to this norm; null: never."
    )
    num_train_epochs: Positive = Field(default=1.0, description="Passes over the data.")
    max_steps: Count | None = Field(default=None, description="Optimizer steps; excludes num_train_epochs.")
    per_device_train_batch_size: Count = Field(
        default=1, description="Rows per device and micro-step; with packing, packs of max_length tokens."
    )
    gradient_accumulation_steps: Count = Field(default=1, description="Micro-steps per optimizer step.")
    gradient_checkpointing: bool = Field(default=True, description="Compute activations twice to hold fewer of them.")
    fused: bool = Field(
        default=True,
        description="LoRA, attention, norms and loss by ftcli's own fast path, where it knows the model's family; "
        "the same result but for rounding.",
    )
    seed: Annotated[int, Field(ge=0)] = Field(
        default=42, description="Seed of order, split, dropout and initial weights."
    )

    @model_validator(mode="after")
    def _check_max_steps(self) -> Self:
        if self.max_steps is not None and "num_train_epochs" in self.model_fields_set:
            raise build_error("excludes num_train_epochs; give one of them", "max_steps", "num_train_epochs")
        return self

    @model_validator(mode="after")
    def _check_warmup(self) -> Self:
        if self.warmup_steps is not None and "warmup_ratio" in self.model_fields_set:
            raise build_error("excludes warmup_ratio; give one of them", "warmup_steps", "warmup_ratio")
        return self


class EvalSection(Section):
    """Evaluation, on held-out rows (`eval.datasets` or `data.val_set_size`) and on prompts."""

    datasets: Annotated[tuple[RowsSection, ...], Field(strict=False)] = Field(
        default=(), description="Held-out rows, with the keys of `datasets[]` but weight; excludes data.val_set_size."
    )
    eval_steps: Count | None = Field(
        default=None, description="Optimizer steps between evaluations; null: once before and once at the end."
    )
    score: Literal["exact_match", "json", "regex"] | None = Field(
        default=None, description="Score of generated answers against the rows' own; null: loss only."
    )
    regex: Annotated[Text, AfterValidator(_check_regex)] | None = Field(
        default=None,
        description="What `score: regex` compares: this expression's groups, or its whole match, in answer and "
        "reference; null: each reference is itself an expression, to be found in the answer.",
    )
    max_new_tokens: Count = Field(default=128, description="Longest answer generated, in tokens.")
    per_device_eval_batch_size: Count = Field(default=8, description="Answers generated at a time.")
    sample_prompts: Annotated[OptionalTexts, Expected("a list of distinct texts")] = Field(
        default=(), description="Questions answered at each evaluation, into samples/prompts.jsonl."
    )
    loss_by: Annotated[
        tuple[Literal["role", "source"], ...],
        Field(strict=False),
        AfterValidator(_check_distinct),
        Expected("a list of role, source or both"),
    ] = Field(default=(), description="Also the loss on each role's turns (role), or on each file's rows (source).")
    metric: Annotated[
        str, Field(pattern=r"^(.+\.)?(loss|score)$"), Expected("loss, score, NAME.loss or NAME.score")
    ] = Field(
        default="loss",
        description="What the best checkpoint is best in: loss or score, the mean over data sets, or of the one "
        "NAME (a file's name without its end; val for data.val_set_size).",
    )
    early_stopping_patience: Count | None = Field(
        default=None, description="Evaluations in a row without a better metric that end the run; null: never."
    )

    @model_validator(mode="after")
    def _check_metric(self) -> Self:
        if self.metric.endswith("score") and self.score is None:
            raise build_error("needs eval.score to be set", "metric", "score")
        if self.regex is not None and self.score != "regex":
            raise build_error("needs score: regex", "regex", "score")
        return self

    @model_validator(mode="after")
    def _check_patience(self) -> Self:
        if self.early_stopping_patience is not None and self.eval_steps is None:
            raise build_error("needs eval_steps: without it nothing is measured on the way", "early_stopping_patience")
        return self


class LoggingSection(Section):
    """Trackers that are told of a run, besides its own files."""

    report_to: Annotated[
        tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...],
        Field(strict=False),
        AfterValidator(_check_distinct),
        Expected("a list of tensorboard, wandb, mlflow or trackio"),
    ] = Field(default=(), description="Trackers; each needs its package.")
    project: Text = Field(default="ftcli", description="The trackers' name for what belongs together.")
    run_name: Text | None = Field(default=None, description="Their name for this run; null: that of its folder.")


class DistributedSection(Section):
    """How several processes share a run."""

    strategy: Annotated[
        str,
        Field(pattern=rf"^({'|'.join(STRATEGIES)})$|\.(yaml|yml|json)$"),
        Expected(f"{', '.join(STRATEGIES)}, or a path to a config of accelerate (.yaml)"),
    ] = Field(
        default="auto",
        description="ddp: every process has the whole model; fsdp2: each has a part of every weight; auto: ddp, or "
        "what accelerate's launcher asks for; or a config of accelerate (relative to the recipe's folder), which "
        "says how many processes there are, and where.",
    )

    @property
    def config(self) -> str | None:
        """The path of accelerate's config, if the strategy is one."""
        return None if self.strategy in STRATEGIES else self.strategy


class CheckpointSection(Section):
    """What a run can be resumed from."""

    save_steps: Count | None = Field(
        default=200, description="Optimizer steps between checkpoints; null: at the end only."
    )
    save_total_limit: Count = Field(
        default=2, description="Newest checkpoints that are kept; the best one is kept beside them."
    )
    load_best_model_at_end: bool | None = Field(
        default=None,
        description="The artifact is the checkpoint that is best in `eval.metric`, not the last; null: where "
        "`eval.early_stopping_patience` is set.",
    )
