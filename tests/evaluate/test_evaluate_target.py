"""What a reference means, and what of it is refused before anything is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import build_model, save_model

from ftcli.errors import ContentError, FtcliError, UsageError
from ftcli.evaluate.target import find_base, find_target
from ftcli.train.run import train

NAMED = '{"schema": 1, "state": "finished", "base": {"revision": null}}'


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """An adapter that lies alone."""
    folder = tmp_path_factory.mktemp("adapted")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tiny_model)}))
    return folder


def test_run_adapter_and_model(
    write_recipe: Any, tiny_model: Path, adapted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(write_recipe(output_dir=str(tmp_path / "runs" / "a")))
    monkeypatch.chdir(tmp_path)
    for reference in (str(run.path), str(run.adapter), None):
        target = find_target(reference)
        assert target.name == (reference or "runs/a")
        assert (target.adapter or Path()).resolve() == run.adapter.resolve()
        assert target.files.folder == tiny_model
        assert target.manifest["state"] == "finished"
        assert target.recipe is not None
        assert find_base(target).files == target.files
    target = find_target(str(adapted))
    assert (target.adapter, target.files.folder, target.run) == (adapted, tiny_model, None)
    assert find_base(target).name == str(tiny_model)
    target = find_target(str(tiny_model))
    assert (target.adapter, target.files.folder, target.run) == (None, tiny_model, None)
    with pytest.raises(UsageError, match="no base to compare with"):
        find_base(target)


def test_the_base_of_a_full_run_is_the_one_it_was_trained_from(
    write_recipe: Any, tiny_model: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    run = train(write_recipe(model={"name_or_path": str(base), "dtype": "float32"}, peft=None))
    target = find_target(str(run.path))
    assert (target.adapter, target.files.folder) == (None, run.model)
    assert find_base(target).files.folder == base
    shutil.rmtree(base)
    save_model(base, build_model(seed=3), tiny_tokenizer)
    with pytest.raises(ContentError, match="another one than in training"):
        find_base(target)


@pytest.mark.parametrize(
    ("name", "text", "kind", "words"),
    [
        ("manifest.json", '{"schema": 1, "state": "running"}', ContentError, "running, not finished"),
        ("manifest.json", '{"schema": 1, "state": "finished"}', ContentError, "does not say what the base is"),
        ("manifest.json", NAMED, ContentError, "does not say what the base is"),
        ("adapter_config.json", "[]", ContentError, "no JSON object"),
        ("adapter_config.json", '{"base_model_name_or_path": null}', ContentError, "does not name its base"),
        ("adapter_config.json", '{"base_model_name_or_path": "./gone"}', UsageError, "--base MODEL"),
        ("notes.txt", "", ContentError, "holds no config.json"),
    ],
)
def test_what_is_no_target(tmp_path: Path, name: str, text: str, kind: type[FtcliError], words: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(kind, match=words):
        find_target(str(tmp_path))


@pytest.mark.parametrize("reference", ["recipe.yaml", "./absent", "x" * 300 + "/y", "\0"])
def test_what_is_no_name_of_one(reference: str) -> None:
    with pytest.raises(UsageError):
        find_target(reference)


def test_a_base_may_be_named(adapted: Path, tiny_model: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(tiny_model, moved)
    assert find_target(str(adapted), base=str(moved)).files.folder == moved
