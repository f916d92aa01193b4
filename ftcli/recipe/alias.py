"""What other tools call a key, for the words ``did you mean``; no recipe is ever read through these names."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from ftcli.recipe.field import list_keys

# axolotl, LLaMA-Factory, TRL, torchtune, litgpt, mlx-lm and transformers
ALIASES = {
    **dict.fromkeys(("base_model", "model_name_or_path"), "model.name_or_path"),
    **dict.fromkeys(("sequence_len", "cutoff_len", "max_seq_length", "max_seq_len"), "data.max_length"),
    **dict.fromkeys(("lora_r", "lora_rank", "rank"), "peft.r"),
    **dict.fromkeys(("lora_target", "lora_target_modules", "lora_target_linear"), "peft.target_modules"),
    "quantization_bit": "quantization",
    **dict.fromkeys(("micro_batch_size", "batch_size"), "train.per_device_train_batch_size"),
    **dict.fromkeys(("num_epochs", "epochs"), "train.num_train_epochs"),
    "lr": "train.learning_rate",
    "optimizer": "train.optim",
    "lr_scheduler": "train.lr_scheduler_type",
    **dict.fromkeys(("sample_packing", "packed"), "data.packing"),
    **dict.fromkeys(("template", "prompt_style"), "tokenizer.chat_template"),
    **dict.fromkeys(
        ("train_on_inputs", "train_on_prompt", "mask_prompt", "assistant_only_loss"), "datasets[].train_on"
    ),
    **dict.fromkeys(("val_size", "test_split_size"), "data.val_set_size"),
    "tokens": "tokenizer.add_tokens",
    "iters": "train.max_steps",
}


def suggest_key(section: Sequence[str | int], key: str) -> str | None:
    """The dotted key that ``key``, found in ``section``, may have been meant for.

    Another tool's name is the best evidence, then the same name in another section, then a slip of the pen.
    """
    if key in ALIASES:
        return ALIASES[key]
    keys = list_keys()
    if elsewhere := next((dotted for dotted in keys if dotted.rpartition(".")[2] == key), None):
        return elsewhere
    pattern = "".join("[]" if isinstance(part, int) else f".{part}" for part in section).removeprefix(".")
    prefix = f"{pattern}." if pattern else ""
    here = {d.removeprefix(prefix): d for d in keys if d.startswith(prefix) and "." not in d[len(prefix) :]}
    if near := difflib.get_close_matches(key, here, n=1):
        return here[near[0]]
    leaves = {dotted.rpartition(".")[2]: dotted for dotted in reversed(keys)}
    near = difflib.get_close_matches(key, leaves, n=1, cutoff=0.8)
    return leaves[near[0]] if near else None
