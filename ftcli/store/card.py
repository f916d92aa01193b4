"""What the README.md of every model has: the front matter that the Hub reads, and the lines that load it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml


def build_front(
    base: str, *, library: str = "transformers", tags: Sequence[str] = ("ftcli", "lora", "merged")
) -> list[str]:
    """The lines of the front matter of a model that was made from ``base``."""
    front: dict[str, Any] = {"library_name": library, "pipeline_tag": "text-generation"}
    if base and not is_local(base):
        front["base_model"] = base
    front["tags"] = list(tags)
    return ["---", yaml.safe_dump(front, sort_keys=False).rstrip(), "---", ""]


def is_local(reference: str) -> bool:
    """Whether a model or data set is named by where it lies on this machine, which says nothing to others."""
    return "://" in reference or reference.startswith(("/", ".", "~"))


def list_use(path: str, *, adapter_on: str | None = None) -> list[str]:
    """Lines of Python that load the model in ``path`` and ask it; ``adapter_on``: the base of an adapter there."""
    load = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'path = "{path}"' + ("  # this folder" if path == "." else ""),
        'model, tokenizer = AutoModelForCausalLM.from_pretrained(path, dtype="auto"), '
        "AutoTokenizer.from_pretrained(path)",
    ]
    if adapter_on is not None:
        load = [
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f'path, base = "{path}", "{adapter_on}"',
            'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), path)',
            "tokenizer = AutoTokenizer.from_pretrained(path)",
        ]
    return [*load, *_ASK]


_ASK = (
    'messages = [{"role": "user", "content": "…"}]',
    'options = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}',
    "inputs = tokenizer.apply_chat_template(messages, **options)",
    "answer = model.generate(**inputs, max_new_tokens=256)[0, inputs.input_ids.shape[1] :]",
    "print(tokenizer.decode(answer, skip_special_tokens=True))",
)
