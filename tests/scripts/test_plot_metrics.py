"""scripts/plot_metrics.py as users run it: what it draws and what it says about files it cannot use."""

from pathlib import Path

import numpy as np
import pytest
from conftest import write_rows
from PIL import Image

SCRIPT = "scripts/plot_metrics.py"


def metrics(folder: Path, aux_loss: float = 0.0, slope: float = 1.0) -> Path:
    """A run of ten lines, two of them of an evaluation; one loss is not a number."""
    rows = []
    for step in range(1, 9):
        rate, loss = 1e-3 / step, None if step == 3 else slope / step
        row = {"step": step, "epoch": 0, "loss": loss, "aux_loss": aux_loss, "learning_rate": rate}
        rows.append({**row, "samples_per_second": 10.0 + step})
        if step % 4 == 0:
            rows.append({"step": step, "epoch": 0, "eval_loss": 2 / step, "eval_tokens": 5})
    folder.mkdir(parents=True)
    write_rows(folder / "metrics.jsonl", rows)
    return folder


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def test_draws_one_run(tmp_path, run):
    folder = metrics(tmp_path / "lm_64")
    result = run(SCRIPT, folder / "metrics.jsonl", "--out", tmp_path / "one.png")

    picture = pixels(tmp_path / "one.png")
    assert result.stdout == f"{tmp_path / 'one.png'}: lm_64\n"
    assert picture.shape == (1080, 1080, 3)  # three panels
    assert (np.ptp(picture.astype(int), axis=-1) > 60).sum() > 1000  # coloured curves


def test_auxiliary_loss_has_a_panel_where_there_is_one(tmp_path, run):
    dense, moe = metrics(tmp_path / "lm_64"), metrics(tmp_path / "lm_64_moe", aux_loss=0.1, slope=2.0)
    result = run(SCRIPT, dense, moe, "--out", tmp_path / "two.png")

    assert result.stdout.endswith(": lm_64, lm_64_moe\n")
    assert pixels(tmp_path / "two.png").shape == (1440, 1080, 3)


def test_equal_names_are_told_apart(tmp_path, run):
    first, second = metrics(tmp_path / "a/lm_64"), metrics(tmp_path / "b/lm_64")
    result = run(SCRIPT, first, second, "--out", tmp_path / "m.png")

    assert result.stdout.endswith(f": {first}, {second}\n")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(None, "metrics.jsonl: no such file", id="missing"),
        pytest.param('{"step": 1, "loss": 1.0}\n{"step": 2, "lo', "metrics.jsonl:2: not JSON", id="cut"),
        pytest.param("[1]\n", "metrics.jsonl:1: expected an object with a step", id="list"),
        pytest.param('{"step": 1, "eval_loss": 1.0}\n', "none of its 1 lines has a loss", id="no loss"),
        pytest.param("", "none of its 0 lines has a loss", id="empty"),
    ],
)
def test_files_that_cannot_be_drawn_are_one_clear_line(tmp_path, run, content, message):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    result = run(SCRIPT, tmp_path, "--out", tmp_path / "m.png", expect=1)

    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {tmp_path / 'metrics.jsonl'}") and message in line
    assert not (tmp_path / "m.png").exists()


def test_place_that_cannot_be_written_is_one_clear_line(tmp_path, run):
    result = run(SCRIPT, metrics(tmp_path / "lm_64"), "--out", tmp_path / "nowhere/m.png", expect=1)

    assert result.stderr.splitlines()[-1].startswith(f"error: --out {tmp_path / 'nowhere/m.png'}: cannot be")


def test_missing_matplotlib_is_one_clear_line(tmp_path, run):
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "matplotlib.py").write_text("raise ModuleNotFoundError('gone', name='matplotlib')\n")
    folder = metrics(tmp_path / "lm_64")
    result = run(SCRIPT, folder, "--out", tmp_path / "m.png", expect=1, PYTHONPATH=str(hidden))

    assert result.stderr == "error: plotting needs the package matplotlib: pip install matplotlib\n"


def test_no_run_is_a_usage_error(run):
    assert "RUN" in run(SCRIPT, expect=2).stderr
