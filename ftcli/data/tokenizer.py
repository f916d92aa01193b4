"""The model's own tokenizer, complete: also from a GGUF file, and with the chat template that the recipe names.

Not here: how a conversation becomes ids (``chat``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, normalizers, pre_tokenizers

from ftcli.data.template import ChatTemplate, read_template
from ftcli.errors import ContentError, UsageError
from ftcli.store.file import read_json, write_json
from ftcli.store.gguf_header import read_gguf_header
from ftcli.store.target import ModelFiles

# `tokenizer.ggml.pre` of byte-level vocabularies that are rebuilt whole; llama.cpp: src/llama-vocab.cpp
_PLAIN_PRE = {"default", "gpt-2"}
_DIGIT_PRE = {"smollm"}  # Digits(individual) before the GPT-2 split
_NFC_PRE = {"qwen2", "deepseek-r1-qwen"}
_WHOLE_WORD_PRE = {"llama-bpe", "llama3", "llama-v3", "tekken"}  # a word in the vocabulary is never merged
_KNOWN_PRE = _PLAIN_PRE | _DIGIT_PRE | _NFC_PRE | _WHOLE_WORD_PRE


def load_tokenizer(files: ModelFiles, *, chat_template: str = "auto", trust_remote_code: bool = False) -> Any:
    """The fast transformers tokenizer of the model in ``files``, padding on the right.

    Args:
        files: the base model.
        chat_template: ``auto`` for the model's own template, the name of a bundled one, or the path of a Jinja file.
        trust_remote_code: whether Python code beside the tokenizer may run.

    Raises:
        ContentError: the tokenizer cannot be read, or has no offsets.
        UsageError: the template file cannot be read.
    """
    from transformers import AutoTokenizer

    options = {"gguf_file": files.gguf_file} if files.gguf_file else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(files.folder), trust_remote_code=trust_remote_code, local_files_only=True, **options
        )
    except Exception as error:  # damaged files fail in as many ways as there are libraries that read them
        reason = (str(error).splitlines() or [""])[0]
        raise ContentError(
            "the tokenizer cannot be loaded", where=files.reference, why=f"{type(error).__name__}: {reason}"
        ) from error
    if not tokenizer.is_fast:
        raise ContentError(
            "the tokenizer has no fast version, so its tokens cannot be traced back to the text",
            where=files.reference,
            hint="use a model folder with a tokenizer.json",
        )
    if files.gguf_path:
        _complete_gguf_tokenizer(tokenizer, files.gguf_path)
    if chat_template != "auto":
        tokenizer.chat_template = read_template(chat_template)
    tokenizer.padding_side = "right"
    return tokenizer


# id of a token that the recipe adds → ids that describe it, whose embeddings it starts from; empty: the mean
NewTokens = dict[int, list[int]]


def add_tokens(tokenizer: Any, tokens: Sequence[str] | Mapping[str, str]) -> NewTokens:
    """The ids of ``tokens``, which ``tokenizer`` now has, each with the ids of its description.

    They are added as ordinary text, not as special tokens: those would vanish from what a runtime prints. Only
    control tokens that the chat template writes are special, so that a message cannot spell them.

    Raises:
        UsageError: a token is in the vocabulary already, or no word.
    """
    described = dict(tokens) if isinstance(tokens, Mapping) else dict.fromkeys(tokens, "")
    for token in described:
        if token != token.strip() or not token.isprintable():
            raise UsageError(
                f"{token!r} has blanks around it or control characters in it",
                where="tokenizer.add_tokens",
                why="such a token would be cut out of every text that holds it",
                hint="name the word alone",
            )
    vocabulary = tokenizer.get_vocab()
    if known := [token for token in described if token in vocabulary]:
        raise UsageError(
            f"already in the vocabulary: {', '.join(known)}",
            where="tokenizer.add_tokens",
            hint="remove it from the list",
        )
    sources = {token: tokenizer(text, add_special_tokens=False).input_ids for token, text in described.items()}
    written = ChatTemplate(tokenizer.chat_template).list_control_tokens(strict=True)
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=token in written) for token in described])
    return {tokenizer.convert_tokens_to_ids(token): sources[token] for token in described}


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Nothing; tokenizer and template lie in ``folder``, as transformers 4 and 5 and what builds on them read them.

    transformers 5 also writes how the tokenizer was loaded here, and a class that transformers 4 does not know.
    """
    tokenizer.save_pretrained(str(folder))
    path = folder / "tokenizer_config.json"
    config = read_json(path) or {}
    for key in ("is_local", "local_files_only"):
        config.pop(key, None)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_json(path, config)


def hash_tokenizer(tokenizer: Any) -> str:
    """The sha256 of the tokenizer's whole definition, in hex."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def hash_template(tokenizer: Any) -> str:
    """The sha256 of the chat template in use, in hex."""
    return hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()


def _complete_gguf_tokenizer(tokenizer: Any, path: Path) -> None:
    """Set what transformers leaves out when it rebuilds a tokenizer from GGUF metadata."""
    metadata = read_gguf_header(path).metadata
    tokenizer.init_kwargs.pop("gguf_file", None)
    if context := metadata.get(f"{metadata.get('general.architecture')}.context_length"):
        tokenizer.model_max_length = int(context)
    if metadata.get("tokenizer.ggml.model") != "gpt2":
        return
    pre = str(metadata.get("tokenizer.ggml.pre", "default"))
    if pre not in _KNOWN_PRE:
        raise ContentError(
            f"the pre-tokenizer {pre!r} of this GGUF file is not supported",
            where=str(path),
            why="the text would be split in another way than the model was trained with",
            hint="use the model's original transformers folder instead of the GGUF file",
        )
    backend = tokenizer.backend_tokenizer
    if pre in _DIGIT_PRE:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    if pre in _NFC_PRE:
        backend.normalizer = normalizers.NFC()
    if pre in _WHOLE_WORD_PRE:
        backend.model.ignore_merges = True
