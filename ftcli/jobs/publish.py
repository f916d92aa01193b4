"""``ftcli push``: a run or a model folder to a repository on the Hub, private unless it is said to be public.

    folder ─▶ files ─▶ card, base, secrets checked ─▶ one commit

Nothing is sent before everything is checked.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ftcli.errors import ContentError, HubError, Problem, UsageError
from ftcli.events import OnEvent, Stage, ignore_event
from ftcli.store.run import RunFolder, check_files, read_manifest
from ftcli.store.target import explain_hub_error
from ftcli.train.card import build_card

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_TEXT_SUFFIXES = (".json", ".jsonl", ".yaml", ".yml", ".md", ".txt", ".jinja", ".py", "")
_MOST_BYTES = 20 << 20  # larger texts are vocabularies
_SECRETS = {  # how keys look that people leave in files
    "a token of the Hub": re.compile(r"\bhf_[A-Za-z0-9]{30,}"),
    "a key of OpenAI or Anthropic": re.compile(r"\bsk-[A-Za-z0-9_-]{20,}"),
    "a key of AWS": re.compile(r"\bAKIA[0-9A-Z]{16}\b"),
    "a token of GitHub": re.compile(r"\bgh[pousr]_[A-Za-z0-9]{36,}"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
}


@dataclass(frozen=True)
class Pushed:
    """What lies on the Hub now."""

    repository: str
    url: str
    is_private: bool
    files: tuple[str, ...]
    size_bytes: int


def push(
    target: Path, repository: str, *, public: bool = False, message: str = "", on_event: OnEvent = ignore_event
) -> Pushed:
    """The commit that put ``target`` into ``repository``, which is made if there is none.

    Args:
        target: a finished run (its adapter or model goes, with a card made for it), or a folder with a README.md.
        repository: ``ORG/NAME``.
        public: a repository that is made is for all to see; one that is there stays as it is.
        message: of the commit.
        on_event: told of stages.

    Raises:
        UsageError: no such folder, no card, or no name of a repository.
        ContentError: the card is none, the base is a folder of this machine, or a file holds a secret.
        HubError: the Hub cannot be reached, or does not allow it.
    """
    if not _NAME.fullmatch(repository):
        raise UsageError("is no name of a repository", where=repository, hint="write it as ORG/NAME")
    folder, card = _find_content(target, repository)
    check_card(card, str(target))
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and not _is_hidden(path, folder))
    contents: dict[str, Path | bytes] = {path.relative_to(folder).as_posix(): path for path in paths}
    contents["README.md"] = card.encode("utf-8")
    check_base(folder)
    check_secrets(contents)
    size = sum(len(content) if isinstance(content, bytes) else content.stat().st_size for content in contents.values())
    on_event(Stage("push", f"{len(contents)} files, {size / 1e6:,.1f} MB to {repository}"))
    url, is_private = _commit(repository, contents, message or f"{target.resolve().name}, by ftcli", public=public)
    return Pushed(repository, url, is_private, tuple(sorted(contents)), size)


def _find_content(target: Path, repository: str) -> tuple[Path, str]:
    """The folder whose files go, and the card."""
    run = RunFolder(target)
    if run.holds_run():
        state = read_manifest(run).get("state")
        if state != "finished":
            raise UsageError(f"the run is {state}, not finished", where=str(target), hint="go on with it: --resume")
        check_files(run)
        return run.artifact, build_card(run, repository=repository)
    if not target.is_dir():
        raise UsageError("no such folder", where=str(target), hint="name a run, or a folder that merge, quantize or "
                         "export made")  # fmt: skip
    try:
        return target, (target / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            "has no README.md", where=str(target), hint="write a model card; merge, quantize and export make one"
        ) from error


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def check_card(card: str, where: str) -> None:
    """None if the card is one: front matter that the Hub reads, and words.

    Raises:
        ContentError: saying what it lacks.
    """
    parts = card.split("---\n", 2)
    try:
        front: Any = yaml.safe_load(parts[1]) if card.startswith("---\n") and len(parts) == 3 else None
    except yaml.YAMLError as error:
        raise ContentError("the front matter of README.md is no YAML", where=where) from error
    if not isinstance(front, dict):
        hint = "begin it with ---, library_name: …, base_model: …, ---"
        raise ContentError("README.md has no front matter", where=where, hint=hint)
    if not parts[2].strip():
        raise ContentError("README.md says nothing but its front matter", where=where)


def check_base(folder: Path) -> None:
    """None if others can load what lies there: an adapter's base is on the Hub.

    Raises:
        ContentError: it is a folder of this machine.
    """
    config = folder / "adapter_config.json"
    if not config.is_file():
        return
    base = str(json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path"))
    if not _NAME.fullmatch(base):
        raise ContentError(
            f"the adapter's base is {base}, which others do not have",
            where=str(config),
            hint="merge it and push the model (ftcli merge), or name the base's id on the Hub in adapter_config.json",
        )


def check_secrets(contents: dict[str, Path | bytes]) -> None:
    """None if no text file among ``contents`` holds what looks like a key.

    Raises:
        ContentError: naming every place, not what stands there.
    """
    problems = []
    for name, content in contents.items():
        if isinstance(content, Path) and (
            content.suffix.lower() not in _TEXT_SUFFIXES or content.stat().st_size > _MOST_BYTES
        ):
            continue
        raw = content if isinstance(content, bytes) else content.read_bytes()
        for number, line in enumerate(raw.decode("utf-8", "replace").splitlines(), 1):
            problems += [Problem(what, f"{name}:{number}") for what, look in _SECRETS.items() if look.search(line)]
    if problems:
        places = "\n".join(f"  {problem}" for problem in problems[:10])
        raise ContentError(f"nothing was sent: files hold what looks like secrets:\n{places}", hint="take them out")


def _commit(repository: str, contents: dict[str, Path | bytes], message: str, *, public: bool) -> tuple[str, bool]:
    """The address of the repository after the commit, and whether it is private."""
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    operations = [
        CommitOperationAdd(name, str(content) if isinstance(content, Path) else content)
        for name, content in contents.items()
    ]
    try:
        url = api.create_repo(repository, private=not public, exist_ok=True)
        api.create_commit(repository, operations, commit_message=message)
        is_private = bool(api.model_info(repository).private)
    except Exception as error:
        raise _explain(error, repository) from error
    return str(url), is_private


def _explain(error: Exception, repository: str) -> Exception:
    """The error in words, if it is the Hub's."""
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        what = "the Hub does not let this token write there" if status == 403 else "the Hub does not know who you are"
        hint = "make a token that may write, then run: hf auth login"
        return HubError(what, where=repository, hint=hint)
    if isinstance(error, errors.HfHubHTTPError | errors.OfflineModeIsEnabled | OSError) or status:
        return explain_hub_error(error, repository)
    return error
