"""Models on the Hub, asked of a server on this machine: what is read, what never is, and every way to be refused."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_hub import COMMIT, CONFIG, PARAMETERS, FakeHub, list_shapes, make_adapter, make_safetensors, use_hub

from ftcli.errors import ContentError, HubError
from ftcli.jobs.inspect import Inspection, inspect_target
from ftcli.store import hub as hub_module
from ftcli.store.hub import read_hub_model
from ftcli.store.target import find_model

NAME = "org/model"
WEIGHTS = make_safetensors(list_shapes())
HEAD = 1 << 16  # what is asked for of a file of weights
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    server = FakeHub()
    use_hub(monkeypatch, server.url, tmp_path)
    yield server
    server.close()


def describe(reference: str = NAME) -> Inspection:
    found = inspect_target(reference)
    assert found.anatomy
    assert found.anatomy.parameters.total == PARAMETERS
    return found


def split_weights() -> dict[str, Any]:
    """The files of the model in two shards with their index; each shard is larger than what may be read of it."""
    shapes = list(list_shapes().items())
    halves = (dict(shapes[:8]), dict(shapes[8:]))
    weight_map = {name: file for file, half in zip(SHARDS, halves, strict=True) for name in half}
    shards = {file: make_safetensors(half) for file, half in zip(SHARDS, halves, strict=True)}
    assert all(len(data) > 10 * HEAD for data in shards.values())
    return {"model.safetensors.index.json": {"metadata": {}, "weight_map": weight_map}, **shards}


def test_one_file_is_told_by_its_header_alone(hub: FakeHub) -> None:
    hub.add(NAME, {"config.json": CONFIG, "model.safetensors": WEIGHTS, "sub/config.json": b"{", "notes.md": b"x"})
    found = read_hub_model(NAME)
    assert found.table
    assert {entry.name: entry.shape for entry in found.table.tensors} == list_shapes()
    assert [(file.name, file.size_bytes) for file in found.table.files] == [("model.safetensors", len(WEIGHTS))]
    assert (found.revision, found.is_cached, found.notices) == (COMMIT, False, ())
    assert hub.count_bytes(".safetensors") == HEAD < len(WEIGHTS) / 50
    assert not [path for path in found.folder.rglob("*") if path.suffix == ".safetensors"]
    assert not [served for served in hub.log if served.path.endswith((".md", "sub/config.json"))]


def test_a_long_header_is_read_to_its_end_and_no_further(hub: FakeHub) -> None:
    names = {f"model.layers.{i}.mlp.{'x' * 200}.weight": (8, 64) for i in range(1000)}
    data = make_safetensors(names)
    (header_bytes,) = struct.unpack_from("<Q", data)
    hub.add(NAME, {"config.json": CONFIG, "model.safetensors": data})
    found = read_hub_model(NAME)
    assert found.table
    assert len(found.table.tensors) == 1000
    assert HEAD < hub.count_bytes(".safetensors") == 8 + header_bytes < len(data)
    hub.reads_ranges = False
    assert read_hub_model(NAME).table == found.table


def test_shards_are_told_by_their_headers_and_held_against_the_index(hub: FakeHub) -> None:
    files = split_weights()
    hub.add(NAME, {"config.json": CONFIG, **files, "pytorch_model.bin": b"x"})
    found = describe()
    assert found.source.table
    assert [file.name for file in found.source.table.files] == list(SHARDS)
    assert [finding.code for finding in found.source.table.findings] == ["both_formats"]
    assert found.source.notices == ()
    assert hub.count_bytes(".safetensors") == 2 * HEAD
    del hub.repositories[NAME][SHARDS[1]]
    table = read_hub_model(NAME).table
    assert table
    assert "missing_shard" in [finding.code for finding in table.findings]


def test_a_server_that_ignores_ranges_is_not_read_to_the_end(hub: FakeHub) -> None:
    hub.reads_ranges = False
    hub.add(NAME, {"config.json": CONFIG, "model.safetensors": WEIGHTS + bytes(1 << 25)})
    found = read_hub_model(NAME)
    assert found.notices == (
        "the headers of its weights were not read (model.safetensors: damaged: 33554432 bytes follow the last tensor): "
        "what is shown follows from the config",
    )
    hub.repositories[NAME]["model.safetensors"] = WEIGHTS
    assert read_hub_model(NAME).table
    assert hub.count_bytes(".safetensors") < len(WEIGHTS) + (1 << 24)


@pytest.mark.parametrize(
    ("files", "fault", "why"),
    [
        ({"pytorch_model.bin": b"x"}, 0, "the repository holds only .bin files, no .safetensors"),
        ({"model-q4.gguf": b"GGUF"}, 0, "the repository holds only .gguf files, no .safetensors"),
        ({}, 0, "the repository holds no weights, no .safetensors"),
        (
            {"model.safetensors": b"\x10" + bytes(7) + b"{" * 90},
            0,
            "model.safetensors: the safetensors header is damaged",
        ),
        ({"model.safetensors": WEIGHTS[:-5]}, 0, "model.safetensors: cut off: 5 of"),
        ({"model.safetensors": b"<html>"}, 0, "model.safetensors: is a web page, not weights"),
        ({"model.safetensors": WEIGHTS}, 503, "the Hub is busy: it asks to wait (status 503)"),
        ({"model.safetensors": WEIGHTS}, 429, "the Hub is busy: it asks to wait (status 429)"),
        (
            {"model.safetensors.index.json": b"{"},
            0,
            "model.safetensors.index.json: the index of the weights is damaged",
        ),
    ],
)
def test_without_headers_the_config_tells_and_why_is_said(
    hub: FakeHub, files: dict[str, bytes], fault: int, why: str
) -> None:
    hub.add(NAME, {"config.json": CONFIG, **files})
    if fault:
        hub.fail(fault, on="model.safetensors")
    found = describe()
    assert found.source.table is None
    assert "its config alone" in found.source.origin
    (notice,) = found.source.notices
    assert notice.startswith(f"the headers of its weights were not read ({why}")


GATED = {"X_Error_Code": "GatedRepo"}


@pytest.mark.parametrize(
    ("faults", "token", "what", "hint"),
    [
        (
            [(403, "/resolve/", GATED)],
            "hf_good",
            "is gated: its owner must grant",
            "ask for access on the page of org/model",
        ),
        ([(401, "/resolve/", GATED)], "", "is gated: its owner must grant", "then run: hf auth login"),
        ([], "hf_bad", "did not accept the token", "run: hf auth login"),
        ([(403, "", {})], "hf_good", "forbids it to this token (status 403)", "give the token the right"),
        (
            [(429, "", {"Retry_After": "120"})],
            "",
            "the Hub is busy: it asks to wait 120 s (status 429)",
            "again in 120 s",
        ),
        ([(429, "", {"RateLimit": '"api";r=0;t=55'})], "", "asks to wait 55 s (status 429)", "try again in 55 s"),
        ([(503, "", {})], "", "the Hub is busy: it asks to wait (status 503)", "try again in some minutes"),
        ([(500, "", {})], "", "the Hub is busy: it asks to wait (status 500)", "try again in some minutes"),
        ([(418, "", {})], "", "the Hub answered with status 418", "try again later"),
    ],
)
def test_each_refusal_has_its_own_words_and_remedy(
    hub: FakeHub,
    monkeypatch: pytest.MonkeyPatch,
    faults: list[tuple[int, str, dict[str, str]]],
    token: str,
    what: str,
    hint: str,
) -> None:
    hub.add(NAME, {"config.json": CONFIG, "model.safetensors": WEIGHTS})
    monkeypatch.setenv("HF_TOKEN", token)
    for status, on, headers in faults:
        hub.fail(status, on, **headers)
    with pytest.raises(HubError) as caught:
        inspect_target(NAME)
    error = caught.value
    assert what in error.what
    assert hint in error.hint
    assert (error.exit_code, error.where) == (4, NAME)
    assert "\n" not in error.what + error.hint
    with pytest.raises(HubError, match=r"[a-z]") as caught:  # a training that would fetch it is told the same
        find_model(NAME)
    assert caught.value.what == error.what


@pytest.mark.parametrize("token", ["", "hf_good"])
def test_what_does_not_exist_is_told_from_a_bad_token(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(HubError, match="neither a path here nor a model on the Hub") as caught:
        read_hub_model("org/nothing")
    assert [served.status for served in hub.log] == [404 if token else 401]
    assert "check the spelling" in caught.value.hint


def test_a_missing_revision_and_a_name_that_cannot_be(hub: FakeHub) -> None:
    hub.add(NAME, {"config.json": CONFIG})
    with pytest.raises(HubError, match="no such revision"):
        read_hub_model(NAME, "v2")
    assert read_hub_model(NAME, COMMIT).revision == COMMIT
    with pytest.raises(HubError, match="nor a name that a model on the Hub can have") as caught:
        read_hub_model("org/a--b")
    assert caught.value.hint == "write it as ORG/NAME"


def test_a_repository_without_a_model(hub: FakeHub) -> None:
    hub.add("org/data", {"README.md": b"x"})
    hub.add("org/gguf", {"model-q4.gguf": b"GGUF"})
    with pytest.raises(ContentError, match=r"holds no config\.json") as caught:
        inspect_target("org/data")
    assert caught.value.hint == "is it a language model?"
    with pytest.raises(ContentError, match=r"holds no config\.json") as caught:
        inspect_target("org/gguf")
    assert "name that" in caught.value.hint


def test_something_else_that_answers_is_no_hub(hub: FakeHub) -> None:
    hub.fail(200)
    with pytest.raises(HubError, match="what answered is not the Hub") as caught:
        read_hub_model(NAME)
    assert "HF_ENDPOINT" in caught.value.hint


def test_a_hub_that_hangs_is_not_waited_for(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(NAME, {"config.json": CONFIG, "model.safetensors": WEIGHTS})
    monkeypatch.setattr(hub_module, "_MOST_SECONDS", 0.4)
    hub.fail(0, on="model.safetensors")
    begin = time.monotonic()
    assert "busy or did not answer within 0.4 s" in describe().source.notices[0]
    hub.faults.clear()
    hub.fail(0)
    with pytest.raises(HubError, match=r"the Hub was busy or did not answer within 0\.4 s") as caught:
        read_hub_model("org/other")
    assert "try again later" in caught.value.hint
    assert time.monotonic() - begin < 3


def find_closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_offline_the_cache_answers_and_says_why(hub: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub.add(NAME, {"config.json": CONFIG, "tokenizer_config.json": {}, "model.safetensors": WEIGHTS})
    read_hub_model(NAME)
    hub.fail(429)
    notices = describe().source.notices
    assert notices[0].startswith(
        "the Hub was not read (the Hub is busy: it asks to wait (status 429)): this is the copy"
    )
    assert "no weights are in the cache" in notices[1]
    use_hub(monkeypatch, f"http://127.0.0.1:{find_closed_port()}", tmp_path)
    found = read_hub_model(NAME)
    assert (found.is_cached, found.revision) == (True, COMMIT)
    assert "cannot be reached" in found.notices[0]
    (found.folder / "model.safetensors").write_bytes(WEIGHTS)
    found = read_hub_model(NAME)
    assert found.table
    assert len(found.notices) == 1
    (found.folder / "model.safetensors").write_bytes(WEIGHTS[:-5])
    assert "model.safetensors: cut off" in read_hub_model(NAME).notices[1]


def test_an_older_copy_is_never_passed_off_as_the_newest(hub: FakeHub) -> None:
    hub.add(NAME, {"config.json": CONFIG, "tokenizer_config.json": {}, "model.safetensors": WEIGHTS})
    assert read_hub_model(NAME).revision == COMMIT
    hub.commit = "b" * 40
    hub.fail(403, "/resolve/", X_Error_Code="GatedRepo")
    found = read_hub_model(NAME)
    assert (found.revision, found.is_cached) == (COMMIT, True)
    assert "the model is gated" in found.notices[0]
    hub.faults.clear()
    found = read_hub_model(NAME)
    assert (found.revision, found.is_cached, found.folder.name) == ("b" * 40, False, "b" * 40)
    assert len(list(found.folder.iterdir())) == 2


def test_offline_without_a_copy(hub: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="cannot be reached") as caught:
        inspect_target(NAME)
    assert "unset HF_HUB_OFFLINE" in caught.value.hint
    assert hub.log == []
    use_hub(monkeypatch, f"http://127.0.0.1:{find_closed_port()}", tmp_path)
    with pytest.raises(HubError, match="cannot be reached") as caught:
        inspect_target(NAME)
    assert "check the network" in caught.value.hint


def test_an_adapter_is_told_by_its_header_on_its_base(hub: FakeHub) -> None:
    hub.add(NAME, {"config.json": CONFIG, "model.safetensors": WEIGHTS})
    hub.add("org/adapter", make_adapter(NAME))
    found = describe("org/adapter")
    assert found.adapter
    assert (found.adapter.base, found.adapter.config["r"], found.adapter.config["lora_alpha"]) == (NAME, 4, 8)
    assert (found.adapter.parameters, found.adapter.size_bytes) == (1024, 2048)
    assert (found.adapter.layers, found.adapter.moved) == ((0, 1), ())
    assert found.source.notices == (
        "how far each module moved is only told of weights that are here; run: hf download org/adapter",
    )
    assert hub.count_bytes("/model.safetensors") == HEAD
    (found.adapter.folder / "adapter_model.safetensors").write_bytes(
        hub.repositories["org/adapter"]["adapter_model.safetensors"]
    )
    found = describe("org/adapter")
    assert found.adapter
    assert len(found.adapter.moved) == 2
    assert found.source.notices == ()
    hub.fail(503)
    found = describe("org/adapter")
    assert found.adapter
    assert len(found.adapter.moved) == 2
    assert found.source.origin.startswith(f"the local Hub cache: an adapter on {NAME}: the local Hub cache, revision")
    assert [notice.startswith("the Hub was not read") for notice in found.source.notices] == [True, True, False]


def test_an_adapter_on_a_base_of_the_catalog(hub: FakeHub) -> None:
    hub.add("org/adapter", make_adapter("meta-llama/Llama-3.1-8B"))
    found = inspect_target("org/adapter")
    assert found.anatomy
    assert found.anatomy.parameters.total == 8_030_261_248
    assert "this is ftcli's catalog" in " ".join(found.source.notices)


@pytest.mark.parametrize(
    ("base", "words"),
    [
        ("org/adapter", "org/adapter: is an adapter itself"),
        ("org/nothing", "org/nothing: neither a path here nor a model on the Hub"),
        ("./absent", "./absent: no such file or folder"),
    ],
)
def test_an_adapter_whose_base_cannot_be_read(hub: FakeHub, base: str, words: str) -> None:
    hub.add("org/adapter", make_adapter(base))
    found = inspect_target("org/adapter")
    assert found.anatomy is None
    assert found.adapter
    assert found.adapter.parameters == 1024
    assert f"its base cannot be read: {words}" in found.source.notices[0]


def test_an_adapter_whose_header_is_not_read(hub: FakeHub) -> None:
    hub.add(NAME, {"config.json": CONFIG, "model.safetensors": WEIGHTS})
    files = make_adapter(NAME)
    hub.add("org/bin", {"adapter_config.json": files["adapter_config.json"], "adapter_model.bin": b"x"})
    hub.add("org/damaged", files | {"adapter_model.safetensors": b"\x10" + bytes(99)})
    for name, why in (("org/bin", "only .bin files"), ("org/damaged", "adapter_model.safetensors: the safetensors")):
        found = describe(name)
        assert found.adapter
        assert found.adapter.parameters is None
        assert f"were not read ({'' if 'model' in why else 'the repository holds '}{why}" in found.source.notices[0]
