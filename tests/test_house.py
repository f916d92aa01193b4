"""The walls: which room may import which, what start-up may import, and who may print."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "ftcli"
ROOMS = [
    "errors",
    "events",
    "recipe",
    "store",
    "data",
    "model",
    "fused",
    "evaluate",
    "train",
    "merge",
    "quantize",
    "gguf",
    "jobs",
    "cli",
]
STRANGERS = {frozenset({"recipe", "store"}), frozenset({"data", "model"}), frozenset({"data", "fused"})}
LIGHT = {"errors", "events", "recipe", "store", "cli"}
HEAVY = {
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "safetensors",
    "numpy",
    "rich",
    "datasets",
    "pyarrow",
}


def list_modules() -> list[Path]:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 40
    return files


def find_room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def list_imports(tree: ast.AST) -> list[str]:
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.append(node.module)
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return names


def test_rooms_import_only_from_their_left() -> None:
    n_arrows = 0
    for path in list_modules():
        room = find_room(path)
        if room in ("__init__", "__main__"):
            continue
        for name in list_imports(ast.parse(path.read_text(encoding="utf-8"))):
            parts = name.split(".")
            if parts[0] != "ftcli" or len(parts) < 2 or parts[1] == room:
                continue
            n_arrows += 1
            assert ROOMS.index(parts[1]) < ROOMS.index(room), f"{path.name} imports {name}"
            assert frozenset({room, parts[1]}) not in STRANGERS, f"{path.name} imports {name}"
    assert n_arrows > 60


def test_light_rooms_import_nothing_heavy_at_module_level() -> None:
    for path in list_modules():
        if find_room(path) not in LIGHT:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for statement in tree.body:
            if isinstance(statement, ast.Import | ast.ImportFrom):
                roots = {name.split(".")[0] for name in list_imports(statement)}
                assert not roots & HEAVY, f"{path}: {roots & HEAVY}"


def test_start_up_is_light() -> None:
    code = (
        "import sys, ftcli.cli.app; "
        "print(sorted({m.split('.')[0] for m in sys.modules} & "
        "{'torch', 'transformers', 'peft', 'pydantic', 'rich', 'numpy', 'yaml', 'huggingface_hub'}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_help_costs_little_cpu_time() -> None:
    import resource

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "ftcli", "--help"], capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert used < 0.6  # 0.15 on a quiet machine; importing torch alone costs 1.4


def test_only_the_console_prints() -> None:
    for path in list_modules():
        calls = [
            node
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
        ]
        assert not calls or path.name == "console.py", path


def test_functions_and_files_stay_readable() -> None:
    for path in list_modules():
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 380, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 80, f"{path}:{node.name}"
