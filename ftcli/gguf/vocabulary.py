"""The tokenizer as llama.cpp reads it: tokens with scores and kinds, merges, special ids, template.

The converter's output, except where that would not give the ids or the text that the model was trained on:

- The pre-tokenizer is told by tokenizer.json's own pattern. The converter goes by a hash of some encoded text, which
  changes with every token that is added, and then refuses.
- Without tokenizer.model, scores of a SentencePiece vocabulary are those that its order means. The converter writes
  −1000 for all of Llama 2's and Mistral's, so that nothing is ever joined, and refuses Phi-3 and Gemma.
- Added tokens come from tokenizer.json, which names them all; the converter looks for them where transformers 5 no
  longer writes them. Words that a recipe added stay visible, whatever they look like.
- Phi-3's name is written so that llama.cpp knows it by it (`fit_name`).
- A tokenizer.model of another vocabulary than tokenizer.json's is not heeded.
- Whether a text begins with BOS or a blank is told wherever llama.cpp would assume otherwise, and the token that ends a
  turn where it would not know it.
- llama.cpp puts a blank before a text and behind each control token, or never. A tokenizer that puts it before a text
  alone (Metaspace, first) has a chat, which begins with a control token, read as with never; where there is no chat
  template, as with always.
- A model that was trained on chats without BOS gets none before them, and its template is told what it was in training.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ftcli.data.chat import ChatRenderer
from ftcli.errors import ContentError
from ftcli.evaluate.target import Target
from ftcli.gguf.family import Family
from ftcli.gguf.piece_model import read_pieces
from ftcli.gguf.pre_tokenizer import find_pre_tokenizer, refuse_tokenizer
from ftcli.gguf.write import Value
from ftcli.store.file import read_json

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6  # enum llama_token_type in llama.h
_ADDED_SCORE, _UNUSED_SCORE, _LATE_SCORE = -1000.0, -10000.0, -1e9
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
_BLANK = "▁"
_BEGINS_WITH_BOS = {"llama-bpe", "tekken", "default"}  # what llama.cpp assumes unless told; default is SentencePiece
# what llama.cpp ends an answer at by itself
KNOWN_ENDS = {"<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<EOT>"}
_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask"}
_LOOKS_SPECIAL = re.compile(r"<\|.*\|>|<｜.*｜>|<unused.*>|<pad>|<mask>|<2mass>|\[@BOS@\]", re.DOTALL)
_PHI3, _PHI_3 = re.compile("phi-?3", re.IGNORECASE), re.compile("phi 3", re.IGNORECASE)
_PHI3_TOKENS = {"<s>", "</s>", "<unk>", "<|endoftext|>"}
_SMOLLM_SIZE = 49152


@dataclass(frozen=True)
class Token:
    """One id: what it spells, its kind (llama.cpp's number) and how early it is joined."""

    text: str
    kind: int
    score: float = 0.0


@dataclass(frozen=True)
class Training:
    """What is known of a model's training, on chats exactly as its template writes them.

    Args:
        added_tokens: words that were added, and must be seen in an answer whatever they look like.
        template_kwargs: what the template was told besides the messages.
    """

    added_tokens: Sequence[str] = ()
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)


def find_training(target: Target) -> Training | None:
    """What the target says of its training; None if ftcli did not train it."""
    return Training(target.added_tokens, target.template_kwargs) if target.is_trained else None


@dataclass(frozen=True)
class VocabularyKeys:
    """The keys, and what is to be said: ids past the embedding's last row, which are left out."""

    keys: dict[str, Value]
    left_out: tuple[str, ...]


def build_vocabulary(
    tokenizer: Any,
    folder: Path,
    family: Family,
    n_rows: int,
    training: Training | None = None,
) -> VocabularyKeys:
    """The keys of ``tokenizer`` in the converter's order.

    Args:
        tokenizer: a fast transformers tokenizer, as it was trained with.
        folder: of its files and the model's config.
        family: the model's.
        n_rows: rows of the embedding; ids that no token has are filled up to there.
        training: what is known of it; None is a model of which the converter's choices are the best guess.

    Raises:
        ContentError: a kind of tokenizer that llama.cpp does not read, or one that is larger than the embedding and
            uses what is beyond.
    """
    document = json.loads(tokenizer.backend_tokenizer.to_str())
    settings = read_json(folder / "tokenizer_config.json") or {}
    if document["model"].get("type") != "BPE":
        raise refuse_tokenizer(f"a tokenizer of the kind {document['model'].get('type')}", folder)
    is_pieces = bool(document["model"].get("byte_fallback"))
    pre = "default" if is_pieces else find_pre_tokenizer(document, str(folder))
    visible = training.added_tokens if training else ()
    tokens = _list_tokens(document, folder, family, visible, is_pieces)
    left_out = tuple(tokens[i].text for i in sorted(tokens) if i >= n_rows)
    _check_left_out(left_out, tokenizer, folder)
    first = _find_first_token(tokenizer)
    prepends = _prepends_blank(document, is_chat=first is not None)

    keys: dict[str, Value] = {}
    prefix = settings.get("add_prefix_space")
    if family.writes_prefix and prefix is not None:
        keys["tokenizer.ggml.add_space_prefix"] = prepends if is_pieces else bool(prefix)
    keys["tokenizer.ggml.model"] = "llama" if is_pieces else "gpt2"
    keys["tokenizer.ggml.pre"] = pre
    keys |= _write_tokens([tokens.get(i, Token(f"[PAD{i}]", _UNUSED, _UNUSED_SCORE)) for i in range(n_rows)], is_pieces)
    if not is_pieces:
        keys["tokenizer.ggml.merges"] = [_join_merge(merge) for merge in document["model"]["merges"]]
    keys |= _list_special_ids(tokenizer, folder, settings, n_rows)
    keys |= _list_added_ends(tokenizer, document, settings, pre)
    keys["tokenizer.chat_template"] = _read_template(tokenizer, training)
    if is_pieces and not prepends:
        keys["tokenizer.ggml.add_space_prefix"] = False
    if family.writes_prefix and n_rows == _SMOLLM_SIZE:
        keys["tokenizer.ggml.add_bos_token"] = _adds(tokenizer, tokenizer.bos_token_id, 0)
    if training and first not in (None, tokenizer.bos_token) and _adds(tokenizer, tokenizer.bos_token_id, 0):
        keys["tokenizer.ggml.add_bos_token"] = False
    return VocabularyKeys({key: value for key, value in keys.items() if value not in ("", [])}, left_out)


def _write_tokens(tokens: Sequence[Token], is_pieces: bool) -> dict[str, Value]:
    keys: dict[str, Value] = {"tokenizer.ggml.tokens": [token.text for token in tokens]}
    if is_pieces:
        keys["tokenizer.ggml.scores"] = [token.score for token in tokens]
    return keys | {"tokenizer.ggml.token_type": [token.kind for token in tokens]}


def adds_bos(metadata: Mapping[str, Any]) -> bool:
    """Whether llama.cpp begins a text with BOS by itself."""
    assumed = metadata.get("tokenizer.ggml.pre", "default") in _BEGINS_WITH_BOS
    return bool(metadata.get("tokenizer.ggml.add_bos_token", assumed))


def fit_name(name: str, tokenizer: Any, family: Family) -> str:
    """The model's name, from which llama.cpp learns that blanks after Phi-3's control tokens vanish.

    It does so wherever "phi-3" or "phi3" stands in the name, and then ends the process if Phi-3's tokens are not there.
    The converter writes "Phi 3", so that the blanks stay.
    """
    strips = family.trusts_special and any(token.rstrip for token in tokenizer.added_tokens_decoder.values())
    if strips and not _PHI3.search(name):
        named = _PHI_3.sub("Phi-3", name, count=1)
        return named if named != name else f"Phi-3 {name}"
    is_foreign = not _PHI3_TOKENS.issubset(tokenizer.get_vocab())
    return _PHI3.sub("Phi", name) if is_foreign else name


def _list_tokens(
    document: Mapping[str, Any], folder: Path, family: Family, visible: Collection[str], is_pieces: bool
) -> dict[int, Token]:
    """Id → token, as far as there are any."""
    texts = {number: text for text, number in document["model"]["vocab"].items()}
    added = _list_added(document, family, visible, is_pieces)
    if not is_pieces:
        return {number: Token(text, _NORMAL) for number, text in texts.items()} | added
    path = folder / "tokenizer.model"
    pieces = read_pieces(path) if path.is_file() else []
    if pieces and all(texts.get(i) == text for i, (text, _, _) in enumerate(pieces) if i not in added):
        kinds = {_USER_DEFINED: _NORMAL}
        return {i: Token(text, kinds.get(kind, kind), score) for i, (text, score, kind) in enumerate(pieces)} | added
    return _score_pieces(texts, document["model"], set(added)) | added


def _score_pieces(texts: Mapping[int, str], model: Mapping[str, Any], added: set[int]) -> dict[int, Token]:
    """SentencePiece's tokens without its own file, or with one of another vocabulary.

    Its trainer numbers pieces in the order in which they were joined, and scores each with minus its number; Llama and
    its heirs then put runs of blanks behind all others.
    """
    late = _find_late_blanks(model)
    tokens: dict[int, Token] = {}
    first: int | None = None
    for number, text in sorted(texts.items()):
        if _BYTE_PIECE.fullmatch(text):
            tokens[number] = Token(text, _BYTE)
        elif text == model.get("unk_token"):
            tokens[number] = Token(text, _UNKNOWN)
        elif number not in added:
            first = number if first is None else first
            tokens[number] = Token(text, _NORMAL, _LATE_SCORE if text in late else -float(number - first))
    return tokens


def _find_late_blanks(model: Mapping[str, Any]) -> set[str]:
    """Runs of blanks that are joined after all else, as Llama's are, though they were found early."""
    late = set()
    for merge in reversed(model.get("merges") or []):
        text = "".join(merge.split(" ") if isinstance(merge, str) else merge)
        if text.strip(_BLANK):
            break
        late.add(text)
    return late


def _list_added(
    document: Mapping[str, Any], family: Family, visible: Collection[str], is_pieces: bool
) -> dict[int, Token]:
    """Tokens that are matched whole before a text is cut."""
    tokens = {}
    for entry in document["added_tokens"]:
        text: str = entry["content"]
        looks_special = not family.trusts_special and text not in visible and bool(_LOOKS_SPECIAL.fullmatch(text))
        kind = _CONTROL if entry["special"] or looks_special else _USER_DEFINED
        if kind == _USER_DEFINED and not (is_pieces and family.trusts_special):
            text = text.replace(_BLANK, " ")
        tokens[entry["id"]] = Token(text, kind, _ADDED_SCORE)
    return tokens


def _check_left_out(left_out: Sequence[str], tokenizer: Any, folder: Path) -> None:
    """None if no token without a row is one that the template or the tokenizer itself needs."""
    needed = [
        t for t in left_out if t in (tokenizer.chat_template or "") or t in (tokenizer.bos_token, tokenizer.eos_token)
    ]
    if needed:
        raise ContentError(
            f"the embedding has no row for {needed[0]}, which the template writes",
            where=str(folder),
            hint="the tokenizer belongs to another model",
        )


def _join_merge(merge: str | Sequence[str]) -> str:
    return merge if isinstance(merge, str) else " ".join(part.replace(" ", "\u0120") for part in merge)


def _list_special_ids(tokenizer: Any, folder: Path, settings: Mapping[str, Any], n_rows: int) -> dict[str, Value]:
    """The ids of special tokens: those of tokenizer_config.json, then of the config; and of the end of a turn.

    What transformers itself makes up for a family's tokenizer, such as Qwen's unknown token, is not among them.
    """
    config = read_json(folder / "config.json") or {}
    added = tokenizer.get_added_vocab()
    ids: dict[str, int] = {}
    for role, number in [(role, added.get(_read_text(settings, role))) for role in _ROLES] + [
        (role, config.get(f"{role}_token_id")) for role in _ROLES
    ]:
        if isinstance(number, int) and 0 <= number < n_rows:
            ids.setdefault(role, number)
    keys: dict[str, Value] = {f"tokenizer.ggml.{_ROLES[role]}_token_id": number for role, number in ids.items()}
    end = _find_turn_end(tokenizer)
    if end not in (None, ids.get("eos")) and tokenizer.convert_ids_to_tokens(end) not in KNOWN_ENDS:
        keys["tokenizer.ggml.eot_token_id"] = end
    return keys


def _read_template(tokenizer: Any, training: Training | None) -> str:
    """The chat template, of several the one for plain conversations; it knows what it was told in training."""
    template = tokenizer.chat_template
    text = str(template.get("default", "") if isinstance(template, Mapping) else template or "")
    told = training.template_kwargs if training and text else {}
    known = "".join(f"{{%- set {name} = {_write_literal(value)} %}}" for name, value in told.items())
    # Jinja takes a newline away behind a block
    return f"{known}\n{text}" if known and text.startswith("\n") else known + text


def _write_literal(value: Any) -> str:
    """A value of a recipe in Jinja."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_write_literal(key)}: {_write_literal(item)}' for key, item in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_write_literal, value))}]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def _find_turn_end(tokenizer: Any) -> Any:
    """The id that ends a turn, None where the template has none or cannot be read."""
    if not isinstance(tokenizer.chat_template, str):
        return None
    try:
        return ChatRenderer(tokenizer).end_of_turn_ids[0]
    except ContentError:
        return None


def _read_text(settings: Mapping[str, Any], role: str) -> str:
    """What tokenizer_config.json calls the token of a role."""
    value = settings.get(f"{role}_token")
    return str(value.get("content", "")) if isinstance(value, Mapping) else str(value or "")


def _list_added_ends(
    tokenizer: Any, document: Mapping[str, Any], settings: Mapping[str, Any], pre: str
) -> dict[str, Value]:
    """Whether a text is begun with BOS, ended with EOS, or its halves parted; told where the tokenizer's files do."""
    adds = {"bos": _adds(tokenizer, tokenizer.bos_token_id, 0), "eos": _adds(tokenizer, tokenizer.eos_token_id, -1)}
    post = document.get("post_processor") or {}
    steps = post.get("processors") or [post]
    told: dict[str, bool] = {}
    if any(step.get("type") == "ByteLevel" for step in steps):
        told |= adds
    for step in steps:
        if step.get("type") == "TemplateProcessing":
            single, pair = step["single"], step["pair"]
            first, last = ("SpecialToken" in single[place] for place in (0, -1))
            if len(single) > 1:
                told |= {"bos": adds["bos"]} if first else {}
                told |= {"eos": adds["eos"]} if last else {}
            inner = pair[1 if first else 0 : -1 if last else None][1:-1]
            if inner:
                told["sep"] = _parts_halves(inner, tokenizer)
    for role in ("bos", "eos", "sep"):
        if isinstance(settings.get(f"add_{role}_token"), bool):
            told.setdefault(role, adds.get(role, settings[f"add_{role}_token"]))
    if adds["bos"] != (pre in _BEGINS_WITH_BOS):
        told.setdefault("bos", adds["bos"])
    return {f"tokenizer.ggml.add_{role}_token": value for role, value in told.items()}


def _parts_halves(inner: Sequence[Mapping[str, Any]], tokenizer: Any) -> bool:
    names = [entry.get("SpecialToken", {}).get("id") for entry in inner]
    return any(name is not None and name in (tokenizer.sep_token, tokenizer.eos_token) for name in names[:2])


def _adds(tokenizer: Any, token: int | None, place: int) -> bool:
    """Whether the tokenizer puts ``token`` at that end of a text."""
    ids = tokenizer("a").input_ids
    return token is not None and ids[place] == token


def _find_first_token(tokenizer: Any) -> str | None:
    """The added token with which a chat begins; None where it begins with none, or there is no template."""
    if not isinstance(tokenizer.chat_template, str):
        return None
    renderer = ChatRenderer(tokenizer)
    found = renderer.encoder.added.match(renderer.template.render_question() or "")
    return found.group() if found else None


def _prepends_blank(document: Mapping[str, Any], *, is_chat: bool) -> bool:
    """Whether a text is read as if a blank stood before it, and before what follows a control token."""
    schemes = ("never", "first") if is_chat else ("never",)
    parts = [document.get("normalizer") or {}, document.get("pre_tokenizer") or {}]
    parts += [step for part in parts for key in ("normalizers", "pretokenizers") for step in part.get(key, [])]
    return any(
        part.get("type") == "Prepend" or (part.get("type") == "Metaspace" and part.get("prepend_scheme") not in schemes)
        for part in parts
    )
