"""Imports go one way: scripts -> trainer -> dataset -> model -> (torch, transformers)."""

import ast
import sys
from pathlib import Path

import pytest
from conftest import ROOT

LAYERS = ["model", "dataset", "trainer", "scripts"]
FILES = [path for layer in LAYERS for path in sorted((ROOT / layer).glob("*.py"))]


def imported(path: Path) -> set[str]:
    """Top-level packages that a file imports absolutely."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_imports_go_one_way(path):
    above = LAYERS[LAYERS.index(path.parent.name) + 1 :]
    assert not imported(path) & set(above)


@pytest.mark.parametrize("path", sorted((ROOT / "model").glob("*.py")), ids=lambda path: path.name)
def test_model_files_can_travel_with_an_export(path):
    assert imported(path) <= {"torch", "transformers", *sys.stdlib_module_names}
