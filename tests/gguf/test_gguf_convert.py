"""GGUF files against llama.cpp's converter (pinned hashes), and against llama.cpp and transformers reading them."""

from __future__ import annotations

import ctypes
import hashlib
import json
import shutil
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CORPUS, SMOLLM2, build_model, build_tokenizer, find_tokenizer, save_model
from gguf_models import CASES, LLAMA3, LONGROPE, NAMES, TOLD, convert_model, write_model

from ftcli.data.chat import ChatRenderer, Rendered
from ftcli.data.tokenizer import load_tokenizer
from ftcli.errors import ContentError, NumericError, UsageError
from ftcli.evaluate.llama_library import LlamaModel, load_library
from ftcli.evaluate.parity import find_misread, list_probes
from ftcli.evaluate.subject import TorchBackend, load_plain, open_subject
from ftcli.events import Notice, Progress
from ftcli.gguf.convert import convert
from ftcli.gguf.draft import draft_model
from ftcli.gguf.piece_model import read_pieces
from ftcli.gguf.pre_tokenizer import find_pre_tokenizer
from ftcli.gguf.reader import VocabularyReader
from ftcli.gguf.vocabulary import Training
from ftcli.merge.adapter import read_adapter
from ftcli.merge.plan import plan_merge
from ftcli.merge.run import merge
from ftcli.merge.stream import ModelStream, StreamTensor, open_folder, open_merge
from ftcli.model.base import build_skeleton
from ftcli.model.stored import open_stored
from ftcli.recipe import ModelSection
from ftcli.store.gguf_header import check_gguf_data, read_gguf_header
from ftcli.store.target import ModelFiles, find_model
from ftcli.store.vocabulary import read_gguf_vocabulary

HASHES = json.loads(Path(__file__).with_name("hashes.json").read_text())
QUICK = {"mistral-v0.3", "mistral-nemo", "phi-3-long"}
_SWA = {"sliding_window": 16, "query_pre_attn_scalar": 16}
_LONG = {"max_position_embeddings": 4096, "original_max_position_embeddings": 16, "sliding_window": None}
_SHORT_LLAMA3 = LLAMA3 | {"original_max_position_embeddings": 16}
_SHORT_LONGROPE = LONGROPE | {"original_max_position_embeddings": 16}
_LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
_YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 128}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, untied": ("llama", {"tied": False}),
    "llama 3.1": ("llama", {"rope_parameters": _SHORT_LLAMA3}),
    "llama, biased": ("llama", {"attention_bias": True}),
    "llama, linear": ("llama", {"rope_parameters": _LINEAR}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral nemo": ("mistral", {"sliding_window": None, "head_dim": 32}),
    "qwen2": ("qwen2", {}),
    "qwen2, yarn": ("qwen2", {"rope_parameters": _YARN}),
    "qwen3": ("qwen3", {"head_dim": 32, "tied": False}),
    "phi3": ("phi3", {"sliding_window": None, "original_max_position_embeddings": 512}),
    "phi3, long": ("phi3", {"rope_parameters": _SHORT_LONGROPE, **_LONG}),
    "gemma2": ("gemma2", _SWA),
    "gemma3": ("gemma3", _SWA),
}
# none begins with a blank, before which SentencePiece and llama.cpp put another, and tokenizers' Metaspace does not
TEXTS = [
    "Hello, world! It's 12345 o'clock, isn't it?",
    "Then  two  spaces\n\n\tand\ttabs\n  def f(x):\n    return x**2  # 3.14159",
    "déjà vu, naïve café 😀 中文 字符 ANTIDISESTABLISHMENT",
    "".join("x" + " " * n for n in range(1, 20)) + "a\t\tb\t\t\tc\n\n\nd\n\n",
    "The train from Zürich to Łódź leaves at 7:45, and 1,234,567 people know it.",
]


def has_llama() -> bool:
    try:
        return bool(load_library())
    except UsageError:
        return False


needs_llama = pytest.mark.skipif(not has_llama(), reason="llama.cpp is not installed")


@pytest.fixture
def folder(tmp_path: Path, tiny_tokenizer: Any) -> Path:
    return save_model(tmp_path / "tiny", build_model(tied=False), tiny_tokenizer)


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        pytest.param(case, kind, marks=[] if case in QUICK and kind == "f16" else pytest.mark.slow)
        for case in CASES
        for kind in HASHES[case]
    ],
)
def test_file_is_the_one_that_the_converter_writes(tmp_path: Path, case: str, kind: str) -> None:
    folder = write_model(tmp_path / case, case)
    draft = draft_model(open_folder(folder), name=NAMES.get(case))
    if key := TOLD.get(case):  # without which llama.cpp reads chats otherwise, and which the converter leaves out
        assert draft.keys[key] is False
        draft = replace(draft, keys={name: value for name, value in draft.keys.items() if name != key})
    result = convert(draft, tmp_path / "a.gguf", kind=kind)
    assert hashlib.sha256(result.path.read_bytes()).hexdigest() == HASHES[case][kind]
    assert result.size_bytes == result.path.stat().st_size


@needs_llama
@pytest.mark.parametrize("name", FAMILIES)
def test_llama_cpp_computes_what_transformers_does(tmp_path: Path, tiny_tokenizer: Any, name: str) -> None:
    family, changes = FAMILIES[name]
    n = len(tiny_tokenizer)
    model = build_model(family, vocab_size=n + 3, **changes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            _ = parameter.mul_(4) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) / 10)
    folder = save_model(tmp_path / "model", model, tiny_tokenizer)
    convert_model(folder, tmp_path / "a.gguf", kind="f32")
    renderer = ChatRenderer(tiny_tokenizer)
    subject = open_subject(str(tmp_path / "a.gguf"), renderer=renderer)
    documents = [Rendered([i * 7 % n for i in range(40)], [i > 2 for i in range(40)], "f", 1)]
    logits, _ = subject.backend.compute_logits(documents)
    wanted, _ = TorchBackend(model, renderer).compute_logits(documents)
    assert (logits - wanted).abs().max() < 0.01 < wanted.abs().max() / 100  # llama.cpp's cache is in float16


@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("llama", False), ("qwen2", True), ("qwen3", False)])
def test_transformers_reads_the_weights_back(tmp_path: Path, tiny_tokenizer: Any, family: str, tied: bool) -> None:
    changes = {"head_dim": 128} if family == "qwen3" else {}  # which transformers takes a Qwen 3's to be
    model = build_model(family, tied=tied, **changes)
    folder = save_model(tmp_path / "model", model, tiny_tokenizer)
    convert_model(folder, tmp_path / "a.gguf", kind="f32")
    loaded = load_plain(find_model(str(tmp_path / "a.gguf")), ModelSection(name_or_path="a", dtype="float32"))
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


@needs_llama
@pytest.mark.parametrize("case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CASES])
def test_ids_are_those_of_the_tokenizer_without_its_sentencepiece_model(tmp_path: Path, case: str) -> None:
    folder = write_model(tmp_path / "model", case, has_pieces=False)
    model = LlamaModel(convert_model(folder, tmp_path / "a.gguf", kind="f16").path, n_threads=1)
    tokenizer, reader = load_tokenizer(ModelFiles("model", folder)), VocabularyReader(model.path)
    renderer = ChatRenderer(tokenizer)
    chats = list_probes(renderer) if tokenizer.chat_template else []
    if tokenizer.chat_template:
        chats += [renderer.template.render([{"role": "user", "content": t}], None, prompt=True) for t in TEXTS]
    assert not find_misread(model, tokenizer, chats)
    assert not find_misread(reader, tokenizer, chats)
    assert [model.tokenize(text) for text in TEXTS] == [reader.tokenize(text) for text in TEXTS]
    if case not in TOLD:
        assert not find_misread(model, tokenizer, TEXTS)


@needs_llama
@pytest.mark.slow
def test_scores_are_those_of_the_sentencepiece_model(tmp_path: Path) -> None:
    with_pieces = write_model(tmp_path / "model", "llama-2")
    convert_model(with_pieces, tmp_path / "a.gguf", kind="f16")
    (with_pieces / "tokenizer.model").unlink()
    convert_model(with_pieces, tmp_path / "b.gguf", kind="f16")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_sentencepiece_model_of_another_vocabulary_is_not_heeded(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "mistral-v0.3")
    wanted = convert_model(folder, tmp_path / "a.gguf", kind="f16").path.read_bytes()
    path = folder / "tokenizer.model"
    path.write_bytes(path.read_bytes().replace("▁the".encode(), "▁eht".encode()))
    assert convert_model(folder, tmp_path / "a.gguf", kind="f16").path.read_bytes() == wanted


def test_added_words_stay_visible_and_do_not_hide_the_pre_tokenizer(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["<|gene|>", "kinase"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|call|>"]})
    folder = save_model(tmp_path / "model", build_model(vocab_size=len(tokenizer) + 2), tokenizer)
    draft = draft_model(open_folder(folder), training=Training(["<|gene|>"]))
    metadata = read_gguf_vocabulary(convert(draft, tmp_path / "a.gguf", kind="f16").path).metadata
    kinds = dict(zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"], strict=True))
    n = len(tokenizer)
    assert {kinds["<|gene|>"], kinds["kinase"]} == {4}
    assert {kinds["<|call|>"], kinds["<|im_end|>"]} == {3}
    assert (kinds[f"[PAD{n}]"], kinds[f"[PAD{n + 1}]"]) == (5, 5)
    assert metadata["tokenizer.ggml.pre"] == "gpt-2"
    assert metadata["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert metadata["tokenizer.chat_template"] == tokenizer.chat_template


@needs_llama
def test_added_words_are_in_the_text_that_llama_cpp_prints(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    words = ["<|gene|>", "kinase", "β-Lactamase"]
    tokenizer.add_tokens(words)
    tokenizer.add_tokens(["<|call|>"], special_tokens=True)
    folder = save_model(tmp_path / "model", build_model(vocab_size=len(tokenizer)), tokenizer)
    draft = draft_model(open_folder(folder), training=Training(words))
    model = LlamaModel(convert(draft, tmp_path / "a.gguf", kind="f16").path, n_threads=1)

    def print_piece(token: str) -> str:  # as its tools print answers: without special tokens
        data = ctypes.create_string_buffer(64)
        function = model._api.llama_token_to_piece
        function.argtypes = (
            ctypes.c_void_p,
            ctypes.c_int32,
            ctypes.c_char_p,
            ctypes.c_int32,
            ctypes.c_int32,
            ctypes.c_bool,
        )
        n = function(model._vocabulary, tokenizer.convert_tokens_to_ids(token), data, 64, 0, False)
        return data.raw[:n].decode()

    assert [print_piece(word) for word in words] == words
    assert print_piece("<|call|>") == ""
    text = "the kinase of <|gene|> and β-Lactamase"
    assert model.tokenize(text) == tokenizer(text).input_ids


def test_turn_end_that_llama_cpp_does_not_know_is_told(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<over>"]})
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<over>")
    folder = save_model(tmp_path / "model", build_model(vocab_size=len(tokenizer)), tokenizer)
    metadata = read_gguf_header(convert_model(folder, tmp_path / "a.gguf", kind="f16").path).metadata
    assert metadata["tokenizer.ggml.eot_token_id"] == tokenizer.convert_tokens_to_ids("<over>")


def test_tokens_beyond_the_embedding_are_left_out_and_said(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    n = len(tokenizer)
    tokenizer.add_tokens(["<image>"])
    folder = save_model(tmp_path / "model", build_model(vocab_size=n), tokenizer)
    events: list[Any] = []
    convert_model(folder, tmp_path / "a.gguf", kind="f16", on_event=events.append)
    assert [event.text for event in events if isinstance(event, Notice)] == [
        "1 tokens have no row in the model and are left out: <image>"
    ]
    progress = [event for event in events if isinstance(event, Progress)]
    assert progress[-1].done == progress[-1].total
    tokenizer.chat_template += "<image>"
    tokenizer.save_pretrained(folder)
    with pytest.raises(ContentError, match="no row for <image>"):
        convert_model(folder, tmp_path / "a.gguf", kind="f16")


def test_header_is_one_that_holds(folder: Path, tmp_path: Path) -> None:
    result = convert_model(folder, tmp_path / "a.gguf", kind="bf16", name="My Model")
    header = read_gguf_header(result.path)
    check_gguf_data(header, result.size_bytes, "a")
    types = {tensor.name: tensor.dtype for tensor in header.tensors}
    assert {types["token_embd.weight"], types["output.weight"], types["blk.1.ffn_down.weight"]} == {"BF16"}
    assert {types["output_norm.weight"], types["blk.0.attn_norm.weight"]} == {"F32"}
    assert header.metadata["general.name"] == "My Model"
    assert result.n_parameters == sum(value.numel() for value in build_model(tied=False).state_dict().values())


def test_merge_on_the_fly_gives_the_file_of_the_merged_folder(tmp_path: Path, make_adapter: Any) -> None:
    base, adapter = make_adapter(tied=False, dtype="bfloat16")
    merge(str(adapter), output=tmp_path / "merged", verifies=False)
    files, section = find_model(str(base)), ModelSection(name_or_path=str(base))
    weights = open_stored(files, build_skeleton(files, section))
    skeleton = build_skeleton(files, section)
    plan = plan_merge(read_adapter(adapter), weights, skeleton, dtype=None, packed_dtype=torch.bfloat16)
    source = open_merge(tmp_path / "merged", plan, weights)
    for kind in ("bf16", "q4_k_m"):
        convert_model(tmp_path / "merged", tmp_path / "a.gguf", kind=kind, name="x")
        result = convert_model(source, tmp_path / "b.gguf", kind=kind, name="x")
        assert result.path.read_bytes() == (tmp_path / "a.gguf").read_bytes()


def test_few_blocks_are_held(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = open_folder(folder)
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def watch(tensor: StreamTensor) -> StreamTensor:
        def make_blocks() -> Iterator[torch.Tensor]:
            nonlocal most
            for block in tensor.make_blocks():
                copy = block.clone()
                alive.append(weakref.ref(copy))
                del block
                most = max(most, sum(reference() is not None for reference in alive))
                yield copy
                del copy

        return replace(tensor, make_blocks=make_blocks)

    source = ModelStream(folder, tuple(watch(tensor) for tensor in whole.tensors))
    monkeypatch.setattr("ftcli.gguf.convert.count_threads", lambda: 1)
    convert_model(source, tmp_path / "a.gguf", kind="f16")
    assert len(alive) == len(whole.tensors)
    assert most <= 3  # one that is read, one that is encoded, one whose bytes are written


def test_what_cannot_be_written_is_refused_and_nothing_is_left(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    output = tmp_path / "out" / "a.gguf"
    output.parent.mkdir()
    with pytest.raises(UsageError, match="no kind of GGUF file called q9"):
        convert_model(folder, output, kind="q9")
    weights = load_file(folder / "model.safetensors")
    for value, kind, error in ((1e6, "f16", NumericError), (float("nan"), "f32", ContentError)):
        weights["model.layers.0.mlp.up_proj.weight"][0, 0] = value
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(error, match=r"blk\.0\.ffn_up\.weight"):
            convert_model(folder, output, kind=kind)
    assert not list(output.parent.iterdir())


def test_unknown_family_is_named_with_the_converter(tmp_path: Path, tiny_tokenizer: Any) -> None:
    folder = save_model(tmp_path / "gpt2", build_model("gpt2"), tiny_tokenizer)
    with pytest.raises(ContentError, match="how gpt2 is written") as caught:
        convert_model(folder, tmp_path / "a.gguf", kind="f16")
    assert "convert_hf_to_gguf.py" in caught.value.hint


def test_untied_head_that_llama_cpp_would_not_read_is_refused(tmp_path: Path, tiny_tokenizer: Any) -> None:
    folder = save_model(tmp_path / "model", build_model("gemma2", tied=False), tiny_tokenizer)
    with pytest.raises(ContentError, match="no head beside the embedding"):
        convert_model(folder, tmp_path / "a.gguf", kind="f16")


def test_shorter_sliding_window_is_said(tmp_path: Path, tiny_tokenizer: Any) -> None:
    folder = save_model(tmp_path / "model", build_model("mistral", sliding_window=64), tiny_tokenizer)
    events: list[Any] = []
    convert_model(folder, tmp_path / "a.gguf", kind="f16", on_event=events.append)
    assert any("this model at 64 tokens" in event.text for event in events if isinstance(event, Notice))


def test_name_with_phi3_in_it_does_not_end_llama_cpp(folder: Path, tmp_path: Path) -> None:
    path = convert_model(folder, tmp_path / "a.gguf", kind="f16", name="my phi3 run").path
    assert read_gguf_header(path).metadata["general.name"] == "my Phi run"


@needs_llama
def test_blanks_after_phi_3s_control_tokens_vanish_as_in_transformers(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "phi-3-mini", "phi-3", has_pieces=False)
    model = LlamaModel(convert_model(folder, tmp_path / "a.gguf", kind="f16").path, n_threads=1)
    assert read_gguf_header(model.path).metadata["general.name"] == "Phi-3 Mini"
    text = "<|user|>\nWhere is it?<|end|>\n<|assistant|>\n"
    ids = (ctypes.c_int32 * 64)()
    data = text.encode()
    n_ids = model._api.llama_tokenize(model._vocabulary, data, len(data), ids, 64, False, True)
    assert list(ids[:n_ids]) == load_tokenizer(ModelFiles("model", folder))(text).input_ids


def test_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ContentError, match=r"no config\.json"):
        convert_model(tmp_path, tmp_path / "a.gguf", kind="f16")


@pytest.mark.parametrize(("name", "pre"), [("llama-3.1", "llama-bpe"), ("qwen3", "qwen2")])
def test_pre_tokenizer_is_known_by_its_pattern(name: str, pre: str) -> None:
    document = json.loads((find_tokenizer(name) / "tokenizer.json").read_text(encoding="utf-8"))
    assert find_pre_tokenizer(document, name) == pre


def test_unknown_pre_tokenizer_is_refused() -> None:
    split = {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated"}
    steps = [split, {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]
    with pytest.raises(ContentError, match="cutting a text into words"):
        find_pre_tokenizer({"model": {}, "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}, "x")


def test_damaged_piece_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    good = b"\x0a\x0a\x0a\x01a\x15\x00\x00\x80\xbf\x18\x01"
    path.write_bytes(good)
    assert read_pieces(path) == [("a", -1.0, 1)]
    for bad in (b"", good[:-3], good[:5], b"\x0a\xff", b"\x0b", b"\x80" * 20, b"\x0a\x03\x0a\x01\xff"):
        path.write_bytes(bad)
        with pytest.raises(ContentError, match="damaged"):
            read_pieces(path)


@needs_llama
@pytest.mark.real
def test_smollm2_speaks_as_in_transformers(tmp_path: Path) -> None:
    files = find_model(SMOLLM2)
    section = ModelSection(name_or_path=SMOLLM2, dtype="float32")
    model = load_plain(files, section)
    tokenizer = load_tokenizer(files)
    folder = save_model(tmp_path / "SmolLM2", model, tokenizer)
    convert_model(folder, tmp_path / "a.gguf", kind="f32")
    shutil.rmtree(folder)
    subject = open_subject(str(tmp_path / "a.gguf"))
    ids = tokenizer(" ".join(CORPUS[:3])).input_ids
    document = [Rendered(ids, [i > 0 for i in range(len(ids))], "f", 1)]
    logits, _ = subject.backend.compute_logits(document)
    wanted, _ = TorchBackend(model, subject.renderer).compute_logits(document)
    assert torch.equal(logits.argmax(-1), wanted.argmax(-1))
    assert (logits - wanted).abs().max() < 0.1
