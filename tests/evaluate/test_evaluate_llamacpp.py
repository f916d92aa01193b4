"""GGUF files through llama.cpp against transformers on the same weights; without llama.cpp; damaged and foreign."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMOLLM2, build_model, build_tokenizer
from gguf_writer import write_gguf
from torch.nn import functional

from ftcli.data.chat import ChatRenderer, Rendered
from ftcli.data.message import Example, Message
from ftcli.data.tokenizer import load_tokenizer
from ftcli.errors import ContentError, UsageError
from ftcli.evaluate import llama_library
from ftcli.evaluate.generate import Sampling
from ftcli.evaluate.llama_library import LlamaModel, load_library
from ftcli.evaluate.llamacpp import LlamaCppBackend, speaks_alike
from ftcli.evaluate.subject import TorchBackend, load_plain, open_subject
from ftcli.events import Event, Notice
from ftcli.jobs.environment import read_environment
from ftcli.recipe import ModelSection
from ftcli.store.target import find_model


def has_llama() -> bool:
    try:
        return bool(load_library())
    except UsageError:
        return False


needs_llama = pytest.mark.skipif(not has_llama(), reason="llama.cpp is not installed")


@pytest.fixture
def carriers(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The packages that are looked for, to be changed; what was loaded from them is forgotten before and after."""
    load_library.cache_clear()
    monkeypatch.setattr(llama_library, "_CARRIERS", dict(llama_library._CARRIERS))
    yield llama_library._CARRIERS
    load_library.cache_clear()


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    model = build_model(vocab_size=len(tiny_tokenizer))
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny_tokenizer, model=model)


@pytest.fixture
def twins(gguf_file: Path, tiny_tokenizer: Any) -> tuple[LlamaCppBackend, TorchBackend]:
    """One model in llama.cpp and in transformers."""
    renderer = ChatRenderer(tiny_tokenizer)
    model = build_model(vocab_size=len(tiny_tokenizer)).eval()
    return LlamaCppBackend(LlamaModel(gguf_file, n_threads=1), renderer), TorchBackend(model, renderer)


@needs_llama
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_transformers(tmp_path: Path, tiny_tokenizer: Any, kind: str, tied: bool) -> None:
    n = len(tiny_tokenizer)
    model = build_model(kind, tied=tied, vocab_size=n, **({"head_dim": 32} if kind == "qwen3" else {})).eval()
    subject = open_subject(str(write_gguf(tmp_path / "a.gguf", tiny_tokenizer, model=model, kind=kind)))
    assert isinstance(subject.backend, LlamaCppBackend)
    assert subject.backend.context == model.config.max_position_embeddings
    documents = [
        Rendered([3, 4, 5], [False] * 3, "f", 1),  # nothing is learned
        Rendered([i % n for i in range(7, 20)], [i > 5 for i in range(13)], "f", 2),
        Rendered([i * 7 % n for i in range(1100)], [i % 3 == 0 for i in range(1100)], "f", 3),  # three batches
        Rendered([9, 8], [True, True], "f", 4),
    ]
    logits, targets = subject.backend.compute_logits(documents)
    wanted, wanted_targets = TorchBackend(model, subject.renderer).compute_logits(documents)
    assert torch.equal(targets, wanted_targets)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, wanted, atol=1e-3, rtol=0)
    assert subject.backend.compute_logits(documents[:1])[0].shape == (0, n)


@needs_llama
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_new_tokens=24),
        Sampling(max_new_tokens=24, repetition_penalty=1.3),
        Sampling(max_new_tokens=24, temperature=1.0, seed=1),
        Sampling(max_new_tokens=24, temperature=1.6, top_p=0.9, top_k=60, min_p=0.02, repetition_penalty=1.2, seed=2),
    ],
)
def test_sampling_means_the_same_on_both(twins: Any, sampling: Sampling) -> None:
    ours, theirs = twins
    prompt = ours.renderer.render_prompt([Message("user", "the quick brown fox")])
    pieces: list[str] = []
    answers = ours.generate([prompt], sampling, on_text=pieces.append)
    assert answers == theirs.generate([prompt], sampling)
    assert "".join(pieces) == answers[0] != ""


@needs_llama
def test_prompts_do_not_see_each_other_and_each_token_may_stop(twins: Any) -> None:
    ours, theirs = twins
    prompts = [ours.renderer.render_prompt([Message("user", text)]) for text in ("fox", "9 8 7", "question " * 200)]
    sampling = Sampling(max_new_tokens=8)
    assert ours.generate(prompts, sampling) == [theirs.generate([prompt], sampling)[0] for prompt in prompts]
    calls = iter(range(3))

    def check_stop() -> None:
        if next(calls, None) is None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ours.generate(prompts, sampling, check_stop=check_stop)


@needs_llama
def test_an_answer_ends_with_its_turn(twins: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = twins
    vocabulary = ours.renderer.tokenizer.get_vocab()
    planned = iter([*(vocabulary[c] for c in "Ãł"), vocabulary["a"], vocabulary["<|im_end|>"], vocabulary["b"]])
    monkeypatch.setattr("ftcli.evaluate.llamacpp.build_chooser", lambda _: lambda ids, logits: next(planned))
    pieces: list[str] = []
    prompt = ours.renderer.render_prompt([Message("user", "fox")])
    assert ours.generate([prompt], Sampling(), on_text=pieces.append) == ["àa"]
    assert "".join(pieces) == "àa"
    assert next(planned) == vocabulary["b"]


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_without_llama_cpp_transformers_serves_or_says_how(
    tmp_path: Path, tiny_tokenizer: Any, carriers: dict[str, Any], kind: str
) -> None:
    carriers.clear()
    model = build_model(kind, vocab_size=len(tiny_tokenizer))
    path = str(write_gguf(tmp_path / "a.gguf", tiny_tokenizer, model=model, kind=kind))
    events: list[Event] = []
    if kind == "llama":
        assert isinstance(open_subject(path, on_event=events.append).backend, TorchBackend)
        assert [type(event) for event in events] == [Notice]
        assert "pip install 'ftcli[llamacpp]'" in str(events[0])
    else:
        with pytest.raises(ContentError, match="family 'gemma2'") as caught:
            open_subject(path)
        assert "pip install 'ftcli[llamacpp]'" in caught.value.hint


def test_environment_names_llama_cpp_or_how_to_install_it(carriers: dict[str, Any]) -> None:
    carriers.clear()
    (ability,) = [a for a in read_environment().abilities if "llama.cpp" in a.name]
    assert not ability.works
    assert "pip install 'ftcli[llamacpp]'" in ability.hint


@needs_llama
def test_environment_names_the_package() -> None:
    (ability,) = [a for a in read_environment().abilities if "llama.cpp" in a.name]
    assert ability.works
    assert load_library().package in ability.detail


@needs_llama
def test_any_package_with_the_library_serves(
    tmp_path: Path, gguf_file: Path, carriers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, library = llama_library._find_carrier()
    folder = tmp_path / "llama_cpp" / "lib"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise RuntimeError('never imported')")
    (folder / "libllama.so").symlink_to(library)
    monkeypatch.syspath_prepend(tmp_path)
    carriers.pop("xllamacpp")
    assert load_library().package.startswith("llama-cpp-python")
    assert open_subject(str(gguf_file)).answer([Message("user", "fox")], Sampling(max_new_tokens=4))


def test_a_broken_library_is_told_and_transformers_serves(
    tmp_path: Path, gguf_file: Path, carriers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    carriers.pop("xllamacpp")
    folder = tmp_path / "llama_cpp" / "lib"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    (folder / "libllama.so").write_bytes(b"not a library")
    monkeypatch.syspath_prepend(tmp_path)
    events: list[Event] = []
    assert isinstance(open_subject(str(gguf_file), on_event=events.append).backend, TorchBackend)
    assert "llama.cpp of llama-cpp-python cannot be used" in str(events[0])


@needs_llama
def test_another_tokenizer_serves_where_the_files_own_cannot_be_rebuilt(tmp_path: Path, tiny_tokenizer: Any) -> None:
    model = build_model("gemma2", vocab_size=len(tiny_tokenizer), query_pre_attn_scalar=16).eval()
    path = str(write_gguf(tmp_path / "a.gguf", tiny_tokenizer, model=model, kind="gemma2"))
    with pytest.raises(ContentError, match="tokenizer of this GGUF file cannot be rebuilt"):
        open_subject(path)
    renderer = ChatRenderer(tiny_tokenizer)
    subject = open_subject(path, renderer=renderer)
    assert subject.renderer is renderer
    documents = [Rendered(list(range(9, 40)), [i > 5 for i in range(31)], "f", 1)]
    logits, wanted = (b.compute_logits(documents)[0] for b in (subject.backend, TorchBackend(model, renderer)))
    torch.testing.assert_close(logits, wanted, atol=1e-3, rtol=0)
    longer = build_tokenizer()
    longer.add_tokens(["domainword"])
    for other in (build_tokenizer(300), longer):
        with pytest.raises(ContentError, match="the one at hand is another"):
            open_subject(path, renderer=ChatRenderer(other))


@needs_llama
@pytest.mark.parametrize("n_more", [0, 3])
def test_rows_without_a_token_do_not_matter(tmp_path: Path, n_more: int) -> None:
    padded, tokenizer = build_tokenizer(), build_tokenizer()
    padded.add_tokens([f"[PAD{len(tokenizer) + i}]" for i in range(n_more)])
    model = build_model(vocab_size=len(padded))
    path = write_gguf(tmp_path / "a.gguf", padded, model=model)
    llama = LlamaModel(path, n_threads=1)
    assert speaks_alike(llama, ChatRenderer(tokenizer))
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<image{i}>" for i in range(n_more + 1)]})
    assert speaks_alike(llama, ChatRenderer(tokenizer))


def change(data: bytes, key: str, value: bytes) -> bytes:
    """``data`` of a GGUF file with another value of ``key``, or with the token after the token ``key`` changed."""
    at = (
        data.index(len(key).to_bytes(8, "little") + key.encode())
        + 8
        + len(key)
        + {"!": 8}.get(key, 0 if key.endswith(".weight") else 4)
    )
    return data[:at] + value + data[at + len(value) :]


@needs_llama
@pytest.mark.parametrize(
    ("key", "value", "match"),
    [  # each of these ends the process if llama.cpp gets to see it
        ("llama.block_count", bytes(4), "cannot have 0 blocks"),
        ("llama.block_count", b"\xff\xff\xff\x00", "cannot have 16777215 blocks"),
        ("llama.attention.layer_norm_rms_epsilon", b"\xff\xff\xff\xff", "epsilon cannot be nan"),
        ("llama.attention.head_count", bytes(4), "cannot have 0 heads"),
        ("llama.attention.head_count_kv", b"\x02\x00\x00\x20", "attn_k has 32 rows"),
        ("llama.attention.key_length", b"\x05\x00\x00\x00", "attn_q has 64 rows"),
        ("!", b"!", "stands twice"),
        ("output_norm.weight", (1).to_bytes(4, "little") + (64).to_bytes(8, "little") + b"\x08", "cannot be Q8_0"),
        ("output_norm.weight", (1).to_bytes(4, "little") + (64).to_bytes(8, "little") + b"\x01", "cannot be F16"),
        (
            "blk.1.ffn_down.weight",
            (2).to_bytes(4, "little") + bytes((128, *[0] * 7, 64, *[0] * 7, 26)),
            "cannot be I32",
        ),
    ],
)
def test_damage_that_would_end_the_process_is_found_first(
    tmp_path: Path, gguf_file: Path, key: str, value: bytes, match: str
) -> None:
    path = tmp_path / "damaged.gguf"
    path.write_bytes(change(gguf_file.read_bytes(), key, value))
    with pytest.raises(ContentError) as caught:
        open_subject(str(path))
    assert match in caught.value.why


@needs_llama
def test_what_llama_cpp_refuses_is_told_in_its_words(tmp_path: Path, gguf_file: Path) -> None:
    path = tmp_path / "damaged.gguf"
    path.write_bytes(gguf_file.read_bytes()[:-4096])
    with pytest.raises(ContentError, match="cut off"):
        open_subject(str(path))
    path.write_bytes(change(gguf_file.read_bytes(), "llama.feed_forward_length", b"\x05\x00\x00\x00"))
    with pytest.raises(ContentError, match=r"llama\.cpp cannot load the model") as caught:
        open_subject(str(path))
    assert "ffn_" in caught.value.why


@needs_llama
def test_llama_cpp_is_silent(gguf_file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    open_subject(str(gguf_file)).answer([Message("user", "fox")], Sampling(max_new_tokens=2))
    assert capfd.readouterr().err == ""


@needs_llama
@pytest.mark.real
def test_the_embedded_model_is_nearly_its_dequantised_twin() -> None:
    """llama.cpp multiplies Q4_1 weights with activations in 8 bits, so the two are not the same."""
    subject = open_subject(SMOLLM2)
    files, section = find_model(SMOLLM2), ModelSection(name_or_path=SMOLLM2, dtype="float32")
    twin = TorchBackend(load_plain(files, section), ChatRenderer(load_tokenizer(files)))
    turns = [("Tell me of dogs.", "Dogs are animals that bark. " * 40), ("Say hi", "Hi there! 😀")]
    rows = [Example((Message("user", q), Message("assistant", a)), None, None, "f", 1) for q, a in turns]
    documents = [document for row in rows for document in subject.renderer.render(row)]
    logits, targets = subject.backend.compute_logits(documents)
    wanted, _ = twin.compute_logits(documents)
    divergence = functional.kl_div(logits.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="none")
    assert divergence.sum(-1).mean() < 5e-3
    loss, wanted_loss = (functional.cross_entropy(values, targets).item() for values in (logits, wanted))
    assert loss == pytest.approx(wanted_loss, abs=0.02)
