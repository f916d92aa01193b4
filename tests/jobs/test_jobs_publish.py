"""A run or a folder on the Hub: private, with its card, and nothing secret; against a Hub on this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_hub import FakeHub, use_hub

from ftcli.errors import ContentError, HubError, UsageError
from ftcli.jobs.publish import push
from ftcli.store.run import RunFolder
from ftcli.train.run import train


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    server = FakeHub()
    use_hub(monkeypatch, server.url, tmp_path, token="hf_good")
    yield server
    server.close()


@pytest.fixture
def run(write_recipe: Any) -> RunFolder:
    """A finished run, on a base that is said to be on the Hub."""
    made = train(write_recipe())
    manifest = json.loads(made.manifest.read_text())
    manifest["base"]["id"] = "acme/llama"
    config = made.adapter / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "acme/llama"}))
    from ftcli.store.file import describe_files

    manifest["files"] = {f"adapter/{name}": entry for name, entry in describe_files(made.adapter).items()}
    made.manifest.write_text(json.dumps(manifest))
    return made


def test_a_run_goes_into_a_private_repository(hub: FakeHub, run: RunFolder) -> None:
    found = push(run.path, "me/fox")
    assert found.is_private
    assert hub.private["me/fox"]
    files = hub.repositories["me/fox"]
    assert files["adapter_model.safetensors"] == (run.adapter / "adapter_model.safetensors").read_bytes()
    assert set(found.files) == set(files)
    card = files["README.md"].decode()
    assert "base_model: acme/llama" in card
    assert 'path, base = "me/fox", "acme/llama"' in card
    assert "recipe.yaml" not in card
    assert "recipe.yaml" not in files  # it holds paths of this machine
    assert not any(str(run.path).encode() in content for content in files.values())
    push(run.path, "me/fox", message="again")
    assert hub.messages == ["run, by ftcli", "again"]


def test_a_repository_is_public_only_where_that_is_said(hub: FakeHub, run: RunFolder) -> None:
    assert not push(run.path, "me/open", public=True).is_private
    assert not hub.private["me/open"]


def test_a_folder_needs_a_card(hub: FakeHub, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for card, words in (
        (None, "has no README.md"),
        ("# A model\n", "no front matter"),
        ("---\na: [\n---\nwords\n", "no YAML"),
        ("---\nlibrary_name: peft\n---\n \n", "says nothing"),
    ):
        if card is not None:
            (folder / "README.md").write_text(card)
        with pytest.raises((UsageError, ContentError), match=words):
            push(folder, "me/model")
    (folder / "README.md").write_text("---\nlibrary_name: peft\n---\nwords\n")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x").write_text("x")
    push(folder, "me/model")
    assert set(hub.repositories["me/model"]) == {"README.md", "config.json"}


def test_what_looks_like_a_secret_stays_here(hub: FakeHub, run: RunFolder, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    secret = "hf_" + "aB3" * 12
    (folder / "README.md").write_text("---\nlibrary_name: peft\n---\nwords\n")
    (folder / "notes.txt").write_text(f"first\ntoken: {secret}\n")
    with pytest.raises(ContentError) as caught:
        push(folder, "me/model")
    assert "notes.txt:2: a token of the Hub" in str(caught.value)
    assert secret not in str(caught.value)
    assert hub.repositories == {}


def test_an_adapter_on_a_local_base_is_refused(hub: FakeHub, write_recipe: Any) -> None:
    made = train(write_recipe())
    with pytest.raises(ContentError, match="which others do not have") as caught:
        push(made.path, "me/fox")
    assert "ftcli merge" in caught.value.hint
    assert hub.log == []


def test_a_run_that_is_not_finished_is_refused(hub: FakeHub, run: RunFolder) -> None:
    manifest = json.loads(run.manifest.read_text())
    run.manifest.write_text(json.dumps(manifest | {"state": "interrupted"}))
    with pytest.raises(UsageError, match="interrupted, not finished"):
        push(run.path, "me/fox")
    run.manifest.write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match="no name of a repository"):
        push(run.path, "fox")
    with pytest.raises(UsageError, match="no such folder"):
        push(run.path / "nothing", "me/fox")
    (run.adapter / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(ContentError, match="differs from what the run wrote"):
        push(run.path, "me/fox")


@pytest.mark.parametrize(
    ("status", "words"), [(403, "does not let this token write"), (500, "busy"), (401, "who you are")]
)
def test_what_the_hub_refuses_has_a_remedy(hub: FakeHub, run: RunFolder, status: int, words: str) -> None:
    hub.fail(status, on="/api/repos/create")
    with pytest.raises(HubError, match=words) as caught:
        push(run.path, "me/fox")
    assert caught.value.exit_code == 4
    assert caught.value.hint
