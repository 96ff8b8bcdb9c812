"""Imports go one way, from scripts down to the model package, which needs torch and transformers alone."""

import ast
import sys
from pathlib import Path

import pytest
from conftest import ROOT

LAYERS = ["model", "dataset", "common", "trainer", "inference", "convert", "scripts"]
SIDE_BY_SIDE = ("inference", "convert")
FILES = [path.relative_to(ROOT) for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py"))]
MOST_LINES_ABOUT_TRAINING = 4800  # what one reads to understand it
MOST_LINES_ABOUT_CONVERSION = 900


def imported(path: Path) -> set[str]:
    """Top-level packages that a file imports; `.` for those relative to its own folder."""
    names: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level or node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_go_one_way(path):
    layer = path.parts[0]
    above = set(LAYERS[LAYERS.index(layer) + 1 :])
    above |= set(SIDE_BY_SIDE) - {layer} if layer in SIDE_BY_SIDE else set()
    entry_points = {path.stem for path in ROOT.glob("*.py")}
    assert not imported(path) & (above | entry_points)
    assert layer == "model" or not any(name.startswith(".") for name in imported(path))


@pytest.mark.parametrize("path", sorted((ROOT / "model").glob("*.py")), ids=lambda path: path.name)
def test_model_files_can_travel_with_an_export(path):
    # transformers itself opens pictures with PIL: no image processor works without
    assert imported(path) <= {".", "torch", "transformers", "PIL", *sys.stdlib_module_names}


def test_training_is_understood_in_an_evening():
    read = [path for path in FILES if path.parts[0] in ("model", "dataset", "common", "trainer")]
    assert sum(len((ROOT / path).read_text().splitlines()) for path in read) <= MOST_LINES_ABOUT_TRAINING


def test_conversion_is_read_in_an_hour():
    read = [path for path in FILES if path.parts[0] == "convert"]
    assert sum(len((ROOT / path).read_text().splitlines()) for path in read) <= MOST_LINES_ABOUT_CONVERSION


def test_tests_stand_where_what_they_test_stands():
    folders = {path.parent.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")}
    assert [
        folder for folder in folders - {Path("integration"), Path("gpu")} if not (ROOT / folder).is_dir()
    ] == []
