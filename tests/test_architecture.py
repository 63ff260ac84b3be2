"""Imports point one way: cli, pipeline, (connectors, storage, models), vocabulary; always through ``recur``."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "vocabulary": set[str](),
    "models": {"vocabulary"},
    "storage": {"vocabulary"},
    "connectors": {"vocabulary"},
    "pipeline": {"vocabulary", "models", "storage", "connectors"},
    "cli": {"vocabulary", "models", "storage", "connectors", "pipeline"},
}
FILES = [ROOT / "cli.py", ROOT / "vocabulary.py"] + [
    file
    for layer in ("pipeline", "connectors", "storage", "models")
    for file in sorted((ROOT / layer).rglob("*.py"))
]


def imported(source: str) -> Iterator[str]:
    """Dotted names of all imports, also those inside functions; relative ones start with a dot."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ([f"recur.{alias.name}" for alias in node.names] if module == "recur" else [module])


def faults(layer: str, source: str) -> list[str]:
    found = []
    for name in imported(source):
        parts = name.split(".")
        if name.startswith("."):
            found.append(f"relative import {name}")
        elif parts[0] in MAY_IMPORT:
            found.append(f"{name} instead of recur.{name}")
        elif name == "recur" or (parts[0] == "recur" and parts[1] not in MAY_IMPORT[layer] | {layer}):
            found.append(f"{layer} imports {name}")
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_one_way(file: Path) -> None:
    layer = file.relative_to(ROOT).parts[0].removesuffix(".py")
    assert faults(layer, file.read_text("utf-8")) == []


def test_the_check_sees_every_kind_of_fault() -> None:
    assert faults("models", "def f():\n    from recur.storage.store import Store") == [
        "models imports recur.storage.store"
    ]
    assert faults("storage", "from recur import cli") == ["storage imports recur.cli"]
    assert faults("pipeline", "import connectors.bybit") == [
        "connectors.bybit instead of recur.connectors.bybit"
    ]
    assert faults("pipeline", "from . import fetch") == ["relative import ."]
    assert faults("pipeline", "from recur.pipeline.plan import x\nimport numpy") == []
