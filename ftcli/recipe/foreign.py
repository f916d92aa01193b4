"""The keys of axolotl, LLaMA-Factory and TRL: what each is called here, and what these tools do where it is left out.

Sources: axolotl, ``utils/schemas``; LLaMA-Factory, ``hparams``; TRL 1.16, ``SFTConfig``, ``ModelConfig``;
transformers, ``TrainingArguments``. Nothing of them is imported.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

ToolName = Literal["axolotl", "LLaMA-Factory", "TRL"]
Kind = Literal["default", "differs", "missing", "unknown"]


@dataclass(frozen=True)
class Tool:
    """One tool.

    Attributes:
        name: of the tool.
        marks: keys by which its files are known, any of them.
        keys: its key → our dotted key, with the same meaning and value.
        defaults: our dotted key → what the tool takes where its file says nothing.
        silent: keys that say nothing of the result (logging, caching, where to upload), or that we need not.
        refused: keys with a value that ask for another kind of training, and what it is.
        missing: keys without an equivalent, and what is done instead.
    """

    name: ToolName
    marks: tuple[str, ...]
    keys: dict[str, str]
    defaults: dict[str, Any]
    silent: tuple[str, ...] = ()
    refused: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


_TRAINER = {  # what TrainingArguments calls as we do
    name: f"train.{name}"
    for name in (
        "learning_rate", "warmup_ratio", "warmup_steps", "weight_decay", "max_grad_norm", "num_train_epochs",
        "max_steps",
        "per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "seed", "adam_beta1",
        "adam_beta2", "adam_epsilon",
    )
}  # fmt: skip
_TRAINER |= {"save_steps": "checkpoint.save_steps", "save_total_limit": "checkpoint.save_total_limit"}
_TRAINER |= {"eval_steps": "eval.eval_steps", "load_best_model_at_end": "checkpoint.load_best_model_at_end"}
_TRAINER |= {"output_dir": "output_dir", "run_name": "logging.run_name"}
_TRAINER_SILENT = (
    "logging_steps", "logging_strategy", "logging_first_step", "save_strategy", "eval_strategy", "evaluation_strategy",
    "do_train", "do_eval", "overwrite_output_dir", "overwrite_cache", "ddp_timeout", "dataloader_num_workers",
    "dataloader_pin_memory", "preprocessing_num_workers", "dataset_num_proc", "plot_loss", "save_only_model", "tf32",
    "remove_unused_columns", "ddp_find_unused_parameters", "gradient_checkpointing_kwargs", "push_to_hub",
    "hub_model_id", "hub_strategy", "resume_from_checkpoint", "disable_tqdm", "include_num_input_tokens_seen",
    "per_device_eval_batch_size", "stage", "ddp_backend", "use_fast_tokenizer", "use_liger_kernel", "torch_compile",
)  # fmt: skip
_TRAINER_MISSING = {
    "trust_remote_code": "code that comes with a model runs only where model.trust_remote_code says so",
    "neftune_noise_alpha": "noise on embeddings is not added",
    "deepspeed": "use distributed.strategy: fsdp2",
}
_TRAINER_DEFAULTS = {
    "train.learning_rate": 5e-5, "train.lr_scheduler_type": "linear", "train.num_train_epochs": 3.0,
    "train.per_device_train_batch_size": 8, "train.gradient_checkpointing": False, "data.packing": False,
    "checkpoint.save_steps": 500,
}  # fmt: skip

_NAMED_OTHERWISE = ("num_train_epochs", "per_device_train_batch_size", "run_name")

AXOLOTL = Tool(
    "axolotl",
    ("base_model", "micro_batch_size", "sequence_len"),
    {
        "base_model": "model.name_or_path", "revision_of_model": "model.revision", "sequence_len": "data.max_length",
        "sample_packing": "data.packing", "val_set_size": "data.val_set_size",
        "lora_r": "peft.r", "lora_alpha": "peft.lora_alpha", "lora_dropout": "peft.lora_dropout",
        "lora_modules_to_save": "peft.modules_to_save", "peft_use_dora": "peft.use_dora",
        "peft_use_rslora": "peft.use_rslora", "lora_model_dir": "peft.adapter", "tokens": "tokenizer.add_tokens",
        "peft_layers_to_transform": "peft.layers_to_transform",
        "micro_batch_size": "train.per_device_train_batch_size", "num_epochs": "train.num_train_epochs",
        "early_stopping_patience": "eval.early_stopping_patience", "wandb_name": "logging.run_name",
        "wandb_project": "logging.project",
        **{k: v for k, v in _TRAINER.items() if k not in _NAMED_OTHERWISE},
    },
    {
        "data.packing": False, "train.gradient_checkpointing": False, "train.num_train_epochs": 1.0,
        "train.lr_scheduler_type": "cosine", "train.per_device_train_batch_size": 1, "peft.lora_dropout": 0.0,
    },
    (
        *_TRAINER_SILENT, "model_type", "tokenizer_type", "tokenizer_config", "dataset_prepared_path", "wandb_entity",
        "wandb_watch", "wandb_log_model", "wandb_run_id", "strict", "pad_to_sequence_len", "eval_sample_packing",
        "flash_attention", "sdp_attention", "xformers_attention", "eager_attention", "plugins", "liger_rope",
        "liger_rms_norm", "liger_glu_activation", "liger_fused_linear_cross_entropy", "liger_layer_norm",
        "cut_cross_entropy", "lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "debug", "is_llama_derived_model",
        "is_mistral_derived_model", "is_falcon_derived_model", "is_qwen_derived_model", "special_tokens", "eot_tokens",
        "save_first_step", "dataset_processes", "dataloader_prefetch_factor", "hub_strategy", "fan_in_fan_out",
        "lora_fan_in_fan_out", "group_by_length", "activation_offloading", "shuffle_merged_datasets",
    ),
    {"rl": "preference training", "pretraining_dataset": "pre-training on streamed text",
     "reward_model": "a reward model",
     "process_reward_model": "a reward model"},
    {
        "load_in_8bit": "weights in int8 are for deployment here: the base stays in 16 bits (or set quantization)",
        **_TRAINER_MISSING, "fsdp": "use distributed.strategy: fsdp2", "fsdp_config": "use distributed.strategy: fsdp2",
        "fsdp_version": "use distributed.strategy: fsdp2",
        "loss_watchdog_threshold": "a loss that is NaN or infinite ends the run; a high one does not",
        "loss_watchdog_patience": "a loss that is NaN or infinite ends the run; a high one does not",
        "unfrozen_parameters": "whole modules are trained with peft.modules_to_save",
        "sequence_parallel_degree": "long rows are not divided over devices",
        "context_parallel_size": "long rows are not divided over devices",
        "tensor_parallel_size": "layers are not divided over devices",
        "cosine_min_lr_ratio": "cosine goes down to 0", "relora_steps": "ReLoRA is not there",
        "quantize_moe_experts": "MoE models are not trained",
    },
)  # fmt: skip

LLAMA_FACTORY = Tool(
    "LLaMA-Factory",
    ("finetuning_type", "stage", "cutoff_len"),
    {
        **_TRAINER, "model_name_or_path": "model.name_or_path", "model_revision": "model.revision",
        "cutoff_len": "data.max_length", "packing": "data.packing",
        "val_size": "data.val_set_size", "lora_rank": "peft.r", "lora_alpha": "peft.lora_alpha",
        "lora_dropout": "peft.lora_dropout", "additional_target": "peft.modules_to_save", "use_dora": "peft.use_dora",
        "use_rslora": "peft.use_rslora", "adapter_name_or_path": "peft.adapter",
        "double_quantization": "quantization.bnb_4bit_use_double_quant",
        "quantization_type": "quantization.bnb_4bit_quant_type", "add_tokens": "tokenizer.add_tokens",
        "add_special_tokens": "tokenizer.add_tokens",
    },
    {
        **_TRAINER_DEFAULTS, "train.gradient_checkpointing": True, "data.max_length": 2048, "data.overflow": "truncate",
        "peft.r": 8, "peft.lora_dropout": 0.0,
    },
    (
        *_TRAINER_SILENT, "dataset_dir", "flash_attn", "enable_liger_kernel", "use_unsloth", "quantization_method",
        "cache_dir", "print_param_status", "include_effective_tokens_per_second", "infer_backend", "default_system",
        "neat_packing", "streaming", "image_max_pixels", "video_max_pixels", "upcast_layernorm", "shift_attn",
    ),
    {},
    {
        **_TRAINER_MISSING, "max_samples": "all rows are read: cut the file, or set train.max_steps",
        "mix_strategy": "rows of all data sets are read once an epoch; see datasets[].weight",
        "interleave_probs": "see datasets[].weight", "loraplus_lr_ratio": "LoRA+ is not there",
        "freeze_trainable_layers": "freezing layers is not there; LoRA on some of them is peft.layers_to_transform",
        "use_galore": "GaLore is not there", "use_badam": "BAdam is not there",
        "rope_scaling": "extend the context in the model's config.json",
    },
)  # fmt: skip

TRL = Tool(
    "TRL",
    ("dataset_name", "dataset_train_split", "use_peft", "completion_only_loss", "assistant_only_loss", "max_length"),
    {
        **_TRAINER, "model_name_or_path": "model.name_or_path", "model_revision": "model.revision",
        "max_length": "data.max_length", "packing": "data.packing",
        "lora_r": "peft.r", "lora_alpha": "peft.lora_alpha", "lora_dropout": "peft.lora_dropout",
        "lora_modules_to_save": "peft.modules_to_save", "use_rslora": "peft.use_rslora", "use_dora": "peft.use_dora",
        "lora_target_modules": "peft.target_modules", "bnb_4bit_quant_type": "quantization.bnb_4bit_quant_type",
        "use_bnb_nested_quant": "quantization.bnb_4bit_use_double_quant", "project": "logging.project",
    },
    {
        **_TRAINER_DEFAULTS, "train.learning_rate": 2e-5, "train.gradient_checkpointing": True, "data.max_length": 1024,
        "data.overflow": "truncate", "peft.r": 16, "peft.lora_dropout": 0.05,
        "peft.target_modules": ["q_proj", "v_proj"],
        "quantization.bnb_4bit_use_double_quant": False,
    },
    (
        *_TRAINER_SILENT, "dataset_test_split", "dataset_streaming", "ignore_bias_buffers", "padding_free", "pad_token",
        "eval_packing", "dataset_kwargs", "attn_implementation", "shuffle_dataset", "pad_to_multiple_of",
        "packing_strategy", "activation_offloading", "lora_task_type", "chat_template_path",
    ),
    {},
    {
        **_TRAINER_MISSING, "loss_type": "the loss is the cross entropy",
        "load_in_8bit": "weights in int8 are for deployment here: the base stays in 16 bits (or set quantization)",
        "eos_token": "turns end as the model's template says",
    },
)  # fmt: skip

TOOLS = (AXOLOTL, LLAMA_FACTORY, TRL)
