"""docs/tutorial.md and its Chinese page: their code runs from top to bottom and prints what they say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from PIL import Image

PAGES = {
    language: ROOT / "docs" / name for language, name in (("en", "tutorial.md"), ("zh", "tutorial_zh.md"))
}
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FIGURE = re.compile(r"!\[[^\]]+\]\(images/(tutorial_\w+\.png)\)")
BETWEEN = "\x1e"  # printed after each block


def read(language: str) -> str:
    return PAGES[language].read_text(encoding="utf-8")


def blocks(language: str) -> list[tuple[str, str]]:
    return BLOCK.findall(read(language))


def steps() -> list[tuple[str, str]]:
    """Each block of code, and the output that stands right under it or ""."""
    found = blocks("en")
    following = [*found[1:], ("", "")]
    return [
        (code, text if kind == "text" else "")
        for (language, code), (kind, text) in zip(found, following, strict=True)
        if language == "python"
    ]


@pytest.fixture(scope="module")
def tutorial(tmp_path_factory) -> tuple[Path, list[str]]:
    """The folder in which the pages' code was run, and what each block printed. No trained model is there."""
    folder = tmp_path_factory.mktemp("tutorial")
    for name in ("model", "dataset", "common", "trainer", "inference"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "docs/images").mkdir(parents=True)
    script = "".join(f"{code}\nprint({BETWEEN!r}, end='')\n" for code, _ in steps())
    (folder / "tutorial.py").write_text(script, encoding="utf-8")
    result = subprocess.run(
        [sys.executable, "tutorial.py"],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stderr
    return folder, result.stdout.split(BETWEEN)


def test_every_block_prints_what_the_page_says(tutorial):
    _, printed = tutorial

    claimed = [text.strip() for _, text in steps()]
    assert [text.strip() for text in printed] == [*claimed, ""]
    assert sum(map(bool, claimed)) == len([kind for kind, _ in blocks("en") if kind == "text"]) > 10


@pytest.mark.parametrize("language", PAGES)
def test_the_code_draws_every_figure_of_the_page(tutorial, language):
    folder, _ = tutorial

    drawn = {path.name for path in (folder / "docs/images").iterdir()}
    assert set(FIGURE.findall(read(language))) == drawn
    for name in drawn:
        shipped = ROOT / "docs/images" / name
        assert shipped.stat().st_size < 200_000
        with Image.open(shipped) as image, Image.open(folder / "docs/images" / name) as anew:
            assert image.format == anew.format == "PNG"


def test_both_languages_have_the_same_code_and_output():
    assert blocks("en") == blocks("zh") and len(blocks("en")) > 20


def test_both_languages_have_the_same_sections_and_figures():
    english, chinese = (
        re.findall(r"^#+ (?:\d+)?|^!\[|^- ", BLOCK.sub("", read(language)), re.MULTILINE)
        for language in PAGES
    )
    assert english == chinese
