"""Write the reference pages that follow from the code: ``python docs/generate.py [--check]``.

With ``--check`` nothing is written; the exit code is 1 if a page is not what the code says.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from figure import fill
from picture import draw_model
from pydantic_core import PydanticUndefined

from ftcli.recipe import Recipe, Section
from ftcli.recipe.field import Kind, describe_kind, find_section, list_fields, list_forms

_DOCS = Path(__file__).resolve().parent

_RECIPE_INTRODUCTION = """\
# The recipe

<!-- written by docs/generate.py from ftcli/recipe/section.py -->

A recipe is one YAML file. `model` and `datasets` must be given; every other key has a default.

```yaml
model: HuggingFaceTB/SmolLM2-135M-Instruct
datasets:
  - path: data/train.jsonl
```

- Unknown keys, keys given twice and values of another type are errors, all told at once with line and column.
- Only `true` and `false` are booleans; `2e-4` is a number; `010`, `1_000` and `12:30:45` are text.
- Paths of data and template are relative to the recipe's folder, all others to the current folder.
- `--set a.b=c` wins over the file. A section merges, `null` removes a key, `datasets.0.path=x` means the first
  entry, and a path is relative to the current folder.
"""


def render_recipe() -> str:
    """The page of the recipe: a table for each section, in the schema's order."""
    return "\n".join([_RECIPE_INTRODUCTION, *_render_section(Recipe, "")]).rstrip() + "\n"


def _render_section(section: type[Section], name: str) -> Iterator[str]:
    yield f"## `{name}`" if name else "## At the top"
    doc = "" if section is Recipe else " ".join((section.__doc__ or "").split())
    yield from ("", doc, "") if doc else ("",)
    yield from ("| key | type | default | meaning |", "|---|---|---|---|")
    inner: dict[str, type[Section]] = {}
    for key, field in list_fields(section).items():
        kind = Kind(field.annotation, tuple(field.metadata))
        cells = [f"`{key}`", describe_kind(kind), _render_default(key, field.default), field.description or ""]
        yield f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"
        if found := find_section(kind):
            inner[f"{name}.{key}".lstrip(".") + ("[]" if "list" in list_forms(kind) else "")] = found
    yield ""
    for dotted, found in inner.items():
        if dotted != "eval.datasets[]":  # the same keys as datasets[]
            yield from _render_section(found, dotted)


def _render_default(key: str, default: object) -> str:
    if default is PydanticUndefined:
        return "must be given"
    if key == "output_dir":
        return "`runs/` and the file's name"
    if isinstance(default, Section):
        return "its defaults"
    return f"`{json.dumps(default)}`"


def render_commands() -> str:
    """The page of the command line: what each command's ``--help`` says, at 80 columns."""
    os.environ["COLUMNS"] = "80"
    from typer.main import get_command

    from ftcli.cli.app import app

    lines = ["# The command line", "", "<!-- written by docs/generate.py from ftcli/cli -->", ""]
    lines += ["What each command's `--help` says. Exit codes and the JSON documents: see [the design](../design.md)."]
    for path, command in _walk_commands(get_command(app), "ftcli"):
        context = command.make_context(path, [], resilient_parsing=True)
        context.info_name = path
        lines += ["", f"## `{path}`", "", "```", command.get_help(context).rstrip(), "```"]
    return "\n".join(lines) + "\n"


def _walk_commands(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from _walk_commands(inner, f"{path} {name}")


def render_concept(name: str) -> Callable[[], str]:
    """The same page with its figures computed anew."""
    return lambda: fill((_DOCS / name).read_text(encoding="utf-8"), where=name)


CONCEPTS = sorted(str(path.relative_to(_DOCS)) for path in (_DOCS / "concepts").glob("*.md"))
PAGES: dict[str, Callable[[], str]] = {
    "reference/recipe.md": render_recipe,
    "reference/commands.md": render_commands,
    "concepts/model.svg": draw_model,
    **{name: render_concept(name) for name in CONCEPTS},
}


def main(arguments: list[str]) -> int:
    stale = 0
    for name, render in PAGES.items():
        path, text = _DOCS / name, render()
        is_current = path.exists() and path.read_text(encoding="utf-8") == text
        if "--check" in arguments:
            stale += not is_current
            print(f"{name}: {'as the code says' if is_current else 'stale; run python docs/generate.py'}")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(f"{name}: {'as before' if is_current else 'written'}")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
