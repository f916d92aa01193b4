"""Pickled weights as safetensors: transformers loads the same model, and nothing unsafe is run or copied."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import build_model
from fake_hub import COMMIT, FakeHub, make_safetensors, use_hub
from safetensors.torch import load_file, safe_open

from ftcli.errors import ContentError, DiskError, HubError, UsageError, VerificationFailed
from ftcli.events import Event, Notice, Progress, Saved
from ftcli.jobs import safetensors as job
from ftcli.jobs.safetensors import SafeExport, export_safetensors
from ftcli.store.weight import read_weight_table


def save_pickled(folder: Path, model: Any, tokenizer: Any = None, *, n_shards: int = 1, is_zip: bool = True) -> Path:
    """The model as transformers before safetensors saved it: the head too, where it is the embedding."""
    folder.mkdir()
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    state = dict(model.state_dict())
    names = list(state)
    parts = [names[i::n_shards] for i in range(n_shards)]
    files = [f"pytorch_model-{i:05d}-of-{n_shards:05d}.bin" for i in range(1, n_shards + 1)]
    for file, part in zip(files if n_shards > 1 else ["pytorch_model.bin"], parts, strict=True):
        torch.save({name: state[name] for name in part}, folder / file, _use_new_zipfile_serialization=is_zip)
    if n_shards > 1:
        weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def are_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    same = (first.dtype, first.shape) == (second.dtype, second.shape)
    return same and first.contiguous().numpy().tobytes() == second.contiguous().numpy().tobytes()


def load_checked(folder: Path) -> Any:
    """The model as transformers loads it, with nothing of it missing or left over."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype="auto")
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model


def export(target: Path | str, output: Path, **options: Any) -> tuple[SafeExport, list[str]]:
    events: list[Event] = []
    made = export_safetensors(str(target), output=output, on_event=events.append, **options)
    assert any(isinstance(event, Saved) for event in events)
    return made, [event.text for event in events if isinstance(event, Notice)]


@pytest.mark.parametrize(
    ("kind", "tied", "n_shards", "is_zip", "dtype"),
    [
        ("llama", True, 1, True, torch.float32),
        ("llama", True, 1, False, torch.bfloat16),
        ("llama", False, 3, True, torch.float16),
        ("gpt2", True, 1, True, torch.float32),
        ("gemma2", True, 1, True, torch.bfloat16),
        ("gemma3", True, 1, True, torch.float32),
        ("qwen2", True, 2, False, torch.float32),
        ("qwen3", True, 5, True, torch.float32),
    ],
)
def test_transformers_loads_the_same_model(
    tmp_path: Path, kind: str, tied: bool, n_shards: int, is_zip: bool, dtype: torch.dtype
) -> None:
    model = build_model(kind, tied=tied).to(dtype).eval()
    source = save_pickled(tmp_path / "model", model, n_shards=n_shards, is_zip=is_zip)
    made, notices = export(source, tmp_path / "out")
    is_one = any({"lm_head.weight", find_embedding(model)} <= list_names(path) for path in source.glob("*.bin"))
    assert is_one == (n_shards in (1, 2))  # in two files they are two tensors
    assert made.tied == ({"lm_head.weight": find_embedding(model)} if tied and is_one else {})
    assert any("is not written: config.json ties it" in text for text in notices) == bool(made.tied)
    expected = {name: value for name, value in model.state_dict().items() if name not in made.tied}
    found = load_all(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
        assert found[name].dtype == dtype
    loaded, before = load_checked(tmp_path / "out").eval(), load_checked(source).eval()
    ids = torch.tensor([[1, 5, 9, 200]])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, before(ids).logits)
    assert not read_weight_table(tmp_path / "out").findings


def list_names(path: Path) -> set[str]:
    return set(torch.load(path, weights_only=True))


def find_embedding(model: Any) -> str:
    return next(name for name in model.state_dict() if name.endswith(("embed_tokens.weight", "wte.weight")))


def test_the_document_and_the_manifest_tell_what_was_made(tmp_path: Path, tiny_tokenizer: Any) -> None:
    source = save_pickled(tmp_path / "model", build_model(), tiny_tokenizer)
    made, _ = export(source, tmp_path / "out")
    weights = tmp_path / "out" / "model.safetensors"
    size = sum(value.nbytes for value in load_file(weights).values())
    document = made.to_json()
    assert document["source"] == str(source)
    assert document["output"] == str(tmp_path / "out")
    assert (document["bytes"], document["files"]) == (size, ["model.safetensors"])
    n_tensors = len(load_file(weights))
    assert document["verify"] == {"method": "bytes", "tensors": n_tensors, "bytes": size, "passed": True}
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["schema"], manifest["command"], manifest["format"]) == (1, "export", "safetensors")
    assert manifest["source"] == str(source)
    assert manifest["converted"] == {"pytorch_model.bin": {"bytes": (source / "pytorch_model.bin").stat().st_size}}
    assert manifest["verify"] == document["verify"]
    files = {path.name for path in (tmp_path / "out").iterdir()} - {"manifest.json"}
    assert manifest["files"].keys() == files
    assert manifest["files"]["model.safetensors"]["sha256"] == sha256(weights.read_bytes()).hexdigest()
    with safe_open(weights, "pt") as stream:
        assert stream.metadata() == {"format": "pt"}
    assert (weights.stat().st_mode & 0o777) == (tmp_path / "out" / "config.json").stat().st_mode & 0o777


def test_without_verification_there_is_none(tmp_path: Path) -> None:
    source = save_pickled(tmp_path / "model", build_model())
    made, _ = export(source, tmp_path / "out", verifies=False)
    assert made.to_json()["verify"] is None
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["verify"] is None


def test_small_files_go_along_and_nothing_else(tmp_path: Path, tiny_tokenizer: Any) -> None:
    source = save_pickled(tmp_path / "model", build_model(), tiny_tokenizer)
    (tmp_path / "secret.txt").write_text("secret")
    (source / "secret.txt").symlink_to(tmp_path / "secret.txt")
    (source / "alias.md").symlink_to("config.json")
    (source / "circle.txt").symlink_to("circle.txt")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "tf_model.h5", "flax.msgpack"):
        (source / name).write_bytes(b"x")
    for name in ("README.md", "LICENSE", "vocab.json", "code.py", ".gitattributes", "manifest.json"):
        (source / name).write_text("{}")
    (source / "pytorch_model.bin.index.json.bak").write_text("x")
    (source / "onnx").mkdir()
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("x")
    (source / "additional_chat_templates" / "x.bin").write_text("x")
    with (source / "large.txt").open("wb") as stream:
        stream.truncate(65 << 20)
    _, notices = export(source, tmp_path / "out")
    found = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    own = {"model.safetensors", "manifest.json", "config.json", "generation_config.json"}
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    extra = {"README.md", "LICENSE", "vocab.json", "alias.md", "additional_chat_templates/tools.jinja"}
    assert found == own | tokenizer | extra | {"pytorch_model.bin.index.json.bak"}
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["command"] == "export"
    assert (tmp_path / "out" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    (left,) = [text for text in notices if "not copied" in text]
    assert left.endswith("circle.txt, code.py, flax.msgpack, large.txt, onnx and 6 more")


def test_code_goes_along_where_the_config_asks_for_it(tmp_path: Path) -> None:
    source = save_pickled(tmp_path / "model", build_model())
    (source / "modeling.py").write_text("raise SystemExit")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "modeling.Model"}}))
    export(source, tmp_path / "out")
    assert (tmp_path / "out" / "modeling.py").read_text() == "raise SystemExit"


def test_aliases_that_no_config_ties_are_written_under_each_name(tmp_path: Path) -> None:
    model = build_model(tied=True)
    source = save_pickled(tmp_path / "model", model)
    config = json.loads((source / "config.json").read_text())
    for change in ({"model_type": "unheard_of"}, {"tie_word_embeddings": False}, {"hidden_size": None}):
        (source / "config.json").write_text(json.dumps(config | change))
        made, notices = export(source, tmp_path / "out", overwrite=True)
        assert made.tied == {}
        assert load_all(tmp_path / "out").keys() == model.state_dict().keys()
        assert any("under several names" in text and "lm_head.weight" in text for text in notices)
    # a head of other numbers is no alias, whatever the config says
    state = torch.load(source / "pytorch_model.bin")
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    torch.save(state, source / "pytorch_model.bin")
    (source / "config.json").write_text(json.dumps(config))
    made, _ = export(source, tmp_path / "out", overwrite=True)
    assert made.tied == {}
    assert torch.equal(load_all(tmp_path / "out")["lm_head.weight"], state["lm_head.weight"])


def test_an_adapter_is_loaded_by_peft(make_pickled_adapter: Any, tmp_path: Path) -> None:
    from peft import PeftModel

    base, adapter, state = make_pickled_adapter()
    made, _ = export(adapter, tmp_path / "out")
    assert made.files == ("adapter_model.safetensors",)
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert found.keys() == state.keys()
    assert all(are_bits(found[name], state[name]) for name in state)
    assert (tmp_path / "out" / "adapter_config.json").is_file()
    loaded = PeftModel.from_pretrained(build_from(base), tmp_path / "out")
    own = loaded.state_dict()
    assert all(torch.equal(own[name.replace(".weight", ".default.weight")], value) for name, value in state.items())


@pytest.fixture
def make_pickled_adapter(make_adapter: Any) -> Any:
    def make() -> tuple[Path, Path, dict[str, torch.Tensor]]:
        base, adapter = make_adapter()
        state = load_file(adapter / "adapter_model.safetensors")
        (adapter / "adapter_model.safetensors").unlink()
        torch.save(state, adapter / "adapter_model.bin")
        return base, adapter, state

    return make


def build_from(base: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base)


@pytest.mark.parametrize("name", ["weights.bin", "weights.pt", "weights.pth"])
def test_one_file_becomes_a_folder(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    matrix = torch.randn(300, 200)
    state = {"a": matrix.T, "b": matrix[:, 10:20], "c": torch.tensor(7), "d": torch.zeros(0, 3), "e": torch.ones(3) > 0}
    torch.save({"state_dict": state, "optimizer": {"lr": 1}}, name)
    (tmp_path / "notes.txt").write_text("of something else")
    events: list[Event] = []
    made = export_safetensors(name, on_event=events.append)
    assert made.output == "weights-safetensors"
    assert made.left_out == ("optimizer",)
    assert any("holds more than weights" in e.text for e in events if isinstance(e, Notice))
    last = [event for event in events if isinstance(event, Progress) and event.stage == "safetensors"][-1]
    assert (last.done, last.total, last.unit) == (made.size_bytes, made.size_bytes, "bytes")
    folder = tmp_path / "weights-safetensors"
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "manifest.json"}
    found = load_file(folder / "model.safetensors")
    assert found.keys() == state.keys()
    assert all(are_bits(found[name], state[name]) for name in state)


def test_one_file_of_a_model_s_folder_brings_the_small_files(tmp_path: Path) -> None:
    source = save_pickled(tmp_path / "model", build_model())
    made, _ = export(source / "pytorch_model.bin", tmp_path / "out")
    assert made.tied
    load_checked(tmp_path / "out")


def test_large_models_are_written_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = job.plan_shards
    monkeypatch.setattr(job, "plan_shards", lambda tensors: plan(tensors, most_bytes=100_000))
    model = build_model(tied=False)
    made, _ = export(save_pickled(tmp_path / "model", model), tmp_path / "out")
    assert len(made.files) > 2
    assert not read_weight_table(tmp_path / "out").findings
    loaded = load_checked(tmp_path / "out")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_what_is_no_matter_of_pickle_is_told(tmp_path: Path, tiny_model: Path, make_adapter: Any) -> None:
    _, adapter = make_adapter()
    both = save_pickled(tmp_path / "both", build_model())
    shutil.copy(tiny_model / "model.safetensors", both)
    for target in (tiny_model, tiny_model / "model.safetensors", adapter, both):
        with pytest.raises(UsageError, match="is in safetensors already"):
            export_safetensors(str(target), output=tmp_path / "out")
    with pytest.raises(UsageError) as caught:
        export_safetensors(str(both), output=tmp_path / "out")
    assert "pytorch_model.bin" in caught.value.hint
    export(both / "pytorch_model.bin", tmp_path / "fine")
    gguf = tmp_path / "gguf"
    gguf.mkdir()
    (gguf / "model.gguf").write_bytes(b"GGUF" + bytes(99))
    (gguf / "wrong.pt").write_bytes(b"GGUF" + bytes(99))
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "x.gguf").write_bytes(b"GGUF")
    for target in (gguf / "model.gguf", gguf / "wrong.pt", tmp_path / "only"):
        with pytest.raises(UsageError, match="is in GGUF, which runs no code either"):
            export_safetensors(str(target), output=tmp_path / "out")
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text("model: x\n")
    (run / "manifest.json").write_text('{"schema": 1, "state": "finished"}')
    with pytest.raises(UsageError, match="is in safetensors already"):
        export_safetensors(str(run), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_converted_is_named(tmp_path: Path) -> None:
    sharded = save_pickled(tmp_path / "sharded", build_model(), n_shards=2)
    with pytest.raises(UsageError, match="is one of the files of a model"):
        export_safetensors(str(sharded / "pytorch_model-00001-of-00002.bin"))
    (sharded / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(ContentError, match=r"pytorch_model-00002-of-00002\.bin: missing"):
        export_safetensors(str(sharded), output=tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ContentError, match=r"holds no weights in \.bin files"):
        export_safetensors(str(tmp_path / "empty"), output=tmp_path / "out")
    torch.save({"w": torch.ones(1)}, tmp_path / "empty" / "consolidated.00.pth")
    with pytest.raises(ContentError) as caught:
        export_safetensors(str(tmp_path / "empty"), output=tmp_path / "out")
    assert "consolidated.00.pth" in caught.value.hint
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(ContentError, match=r"is no file of weights \(\.bin, \.pt, \.pth\)"):
        export_safetensors(str(tmp_path / "x.txt"))
    for missing in (tmp_path / "no.bin", "no.pt", "./no"):
        with pytest.raises(UsageError, match="no such file or folder"):
            export_safetensors(str(missing))


@pytest.mark.parametrize("is_zip", [True, False])
def test_code_in_the_weights_is_refused_by_name(tmp_path: Path, is_zip: bool) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
            return os.system, (f"touch {tmp_path}/ran",)

    source = save_pickled(tmp_path / "model", build_model())
    state = dict(torch.load(source / "pytorch_model.bin"))
    torch.save(state | {"x": Evil()}, source / "pytorch_model.bin", _use_new_zipfile_serialization=is_zip)
    for target in (source, source / "pytorch_model.bin"):
        with pytest.raises(ContentError, match=r"asks to run posix\.system"):
            export_safetensors(str(target), output=tmp_path / "out")
    assert not (tmp_path / "ran").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_only_its_own_folders_are_replaced(tmp_path: Path) -> None:
    source = save_pickled(tmp_path / "model", build_model())
    out = tmp_path / "out"
    out.mkdir()
    export(source, out)  # an empty folder is free
    before = (out / "manifest.json").read_text()
    with pytest.raises(UsageError, match="exists already"):
        export(source, out)
    assert (out / "manifest.json").read_text() == before
    (out / "mine.txt").write_text("x")
    export(source, out, overwrite=True)
    assert not (out / "mine.txt").exists()
    for manifest in ({"command": "merge"}, {"command": "export", "name": "model", "exports": {}}, None):
        (out / "manifest.json").write_text(json.dumps(manifest)) if manifest else (out / "manifest.json").unlink()
        with pytest.raises(UsageError, match="was not made by ftcli export --safetensors"):
            export(source, out, overwrite=True)
        assert (out / "model.safetensors").exists()
    for inside in (source, tmp_path):
        with pytest.raises(UsageError, match="what is converted lies in it"):
            export(source, inside, overwrite=True)
    link = tmp_path / "link"
    link.mkdir()
    export(source, source / "safe")  # inside the source there is nothing to lose
    load_checked(source / "safe")
    (source / "pytorch_model.bin").rename(source / "safe" / "pytorch_model.bin")
    (link / "pytorch_model.bin").symlink_to(source / "safe" / "pytorch_model.bin")
    with pytest.raises(UsageError, match="what is converted lies in it"):
        export(link, source / "safe", overwrite=True)


def test_a_full_disk_is_told_before_a_byte_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_pickled(tmp_path / "model", build_model())
    monkeypatch.setattr("ftcli.store.file.shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    monkeypatch.setattr(job, "_write_weights", lambda *_: pytest.fail("it wrote"))
    with pytest.raises(DiskError, match="the disk is full"):
        export(source, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_a_disk_that_fills_up_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("may not mount a tmpfs here")
    try:
        torch.save({"w": torch.ones(100)}, tmp_path / "w.bin")
        export(tmp_path / "w.bin", small / "out")
        torch.save({"w": torch.ones(2_000_000)}, tmp_path / "w.bin")
        monkeypatch.setattr("ftcli.store.file.check_free", lambda *_: None)  # the forecast is wrong: others write too
        with pytest.raises(DiskError, match="the disk is full"):
            export(tmp_path / "w.bin", small / "out", overwrite=True)
        assert {path.name for path in small.iterdir()} == {"out"}
        assert load_file(small / "out" / "model.safetensors")["w"].numel() == 100
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.parametrize("stage", ["safetensors", "verify"])
def test_an_interruption_leaves_nothing_or_what_was_there(tmp_path: Path, stage: str) -> None:
    source = save_pickled(tmp_path / "model", build_model())

    def interrupt(event: Event) -> None:
        if isinstance(event, Progress) and event.stage == stage and event.done > event.total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_safetensors(str(source), output=tmp_path / "out", on_event=interrupt)
    assert {path.name for path in tmp_path.iterdir()} == {"model"}
    export(source, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(KeyboardInterrupt):
        export_safetensors(str(source), output=tmp_path / "out", overwrite=True, on_event=interrupt)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out"}


def flip_last(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def rename_tensor(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b"model.norm.weight", b"model.nurm.weight"))


def change_dtype(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"I32"', 1))


def cut_off(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 1)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (flip_last, "has other bytes than in"),
        (rename_tensor, "other names"),
        (change_dtype, "is I32"),
        (cut_off, "cut off"),
    ],
)
def test_damage_to_what_was_written_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None], words: str
) -> None:
    source = save_pickled(tmp_path / "model", build_model())
    write = job._write_weights

    def write_badly(folder: Path, *rest: Any) -> None:
        write(folder, *rest)
        damage(folder)

    monkeypatch.setattr(job, "_write_weights", write_badly)
    with pytest.raises(VerificationFailed) as caught:
        export(source, tmp_path / "out")
    assert words in caught.value.why
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    server = FakeHub()
    use_hub(monkeypatch, server.url, tmp_path)
    yield server
    server.close()


def test_a_model_of_the_hub_is_fetched_and_converted(
    hub: FakeHub, tmp_path: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_pickled(tmp_path / "model", build_model(), tiny_tokenizer)
    files: dict[str, Any] = {path.name: path.read_bytes() for path in source.iterdir()}
    hub.add("org/old", files | {"tf_model.h5": b"large", "training_args.bin": b"x", "README.md": b"of it"})
    monkeypatch.chdir(tmp_path)
    made = export_safetensors("org/old")
    assert made.output == "old-safetensors"
    assert json.loads(Path("old-safetensors/manifest.json").read_text())["revision"] == COMMIT
    assert Path("old-safetensors/README.md").read_text() == "of it"
    load_checked(tmp_path / "old-safetensors")
    assert hub.count_bytes("pytorch_model.bin") >= len(files["pytorch_model.bin"])
    assert not hub.count_bytes("tf_model.h5")
    assert not hub.count_bytes("training_args.bin")


def test_a_model_of_the_hub_that_is_safe_is_not_fetched(hub: FakeHub, tmp_path: Path) -> None:
    weights = make_safetensors({"w": (2, 2)})
    hub.add("org/safe", {"config.json": {}, "model.safetensors": weights, "pytorch_model.bin": b"x" * 999})
    hub.add("org/gguf", {"config.json": {}, "x.gguf": b"GGUF"})
    with pytest.raises(UsageError, match="is in safetensors already"):
        export_safetensors("org/safe", output=tmp_path / "out")
    with pytest.raises(UsageError, match="is in GGUF"):
        export_safetensors("org/gguf", output=tmp_path / "out")
    assert not hub.count_bytes(".bin")
    assert not hub.count_bytes(".safetensors")
    with pytest.raises(HubError):
        export_safetensors("org/none", output=tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("is_zip", [True, False])
def test_memory_is_that_of_a_block(tmp_path: Path, is_zip: bool) -> None:
    """1.5 GB, most of it in one tensor; torch is never imported."""
    large = torch.arange(300_000_000, dtype=torch.int32).view(torch.float32).view(30_000, 10_000)
    state = {"large": large, **{f"layer.{i}": large[i] for i in range(50)}}
    state |= {f"own.{i}": torch.full((1_500_000,), float(i)) for i in range(50)}
    torch.save(state, tmp_path / "w.bin", _use_new_zipfile_serialization=is_zip)
    assert (tmp_path / "w.bin").stat().st_size > 1_490_000_000
    code = (
        "import sys; from pathlib import Path; from ftcli.jobs.safetensors import export_safetensors\n"
        "def peak(): return int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0]) * 1024\n"
        "before = peak()\n"
        f"made = export_safetensors({str(tmp_path / 'w.bin')!r}, output=Path({str(tmp_path / 'out')!r}))\n"
        "print(peak() - before, made.verification is not None, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    grown, is_verified, has_torch = done.stdout.split()
    assert int(grown) < 48 << 20
    assert (is_verified, has_torch) == ("True", "False")
    (tmp_path / "w.bin").unlink()
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as stream:
        assert torch.equal(stream.get_tensor("large").view(torch.int32), large.view(torch.int32))
        assert torch.equal(stream.get_tensor("own.7"), state["own.7"])
    shutil.rmtree(tmp_path / "out")
