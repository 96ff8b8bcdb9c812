"""scripts/benchmark.py measures both ways of doing the same work: equal losses, and figures that add up."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

TINY = "--hidden_size 64 --num_hidden_layers 2 --vision_layers 1 --batch_size 2 --dtype float32".split()


def benchmark(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts/benchmark.py"), *TINY, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=280)


@pytest.mark.slow
def test_published_and_default_training_have_the_same_losses_for_fifty_steps(tmp_path: Path):
    report = tmp_path / "report.json"
    done = benchmark(
        *"--stages pretrain sft moe --repeats 1 --steps 50 --rows 100 --json".split(), str(report)
    )
    assert done.returncode == 0, done.stderr
    stages = json.loads(report.read_text())["stages"]
    for stage in ("pretrain", "sft", "moe"):
        modes = stages[stage]
        assert len(modes["default"]["losses"][0]) == 50
        assert modes["default"]["loss_difference"] < 1e-3
        assert modes["cached"]["loss_difference"] < 1e-3
        assert modes["published"]["padding"][0] > 0.5  # as in the release's batches
        assert modes["default"]["padding"][0] < 0.05
        assert modes["published"]["losses"][0][-1] < modes["published"]["losses"][0][0]


@pytest.mark.slow
def test_inference_and_the_printed_table(tmp_path: Path):
    report = tmp_path / "report.json"
    done = benchmark(*"--stages inference --repeats 2 --steps 2 --rows 8 --json".split(), str(report))
    assert done.returncode == 0, done.stderr
    modes = json.loads(report.read_text())["stages"]["inference"]
    for mode in ("published", "default"):
        assert len(modes[mode]["tokens_per_second"]) == 2
        # Every answer has 32 tokens.
        assert modes[mode]["tokens_per_second"][0] == pytest.approx(32 * modes[mode]["samples_per_second"][0])
        assert f"{modes[mode]['peak_memory_bytes'] / 1e9:.2f} GB" in done.stdout


@pytest.mark.slow
def test_time_to_the_first_token_and_after_it(tmp_path: Path):
    report = tmp_path / "report.json"
    sizes = "--hidden_size 64 --num_hidden_layers 2 --vision_layers 1 --repeats 3 --tokens 5 --json".split()
    command = [sys.executable, str(ROOT / "scripts/benchmark_chat.py"), *sizes, str(report)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    figures = json.loads(report.read_text())
    assert all(len(values) == 3 for values in figures.values())
    assert all(0 < share < 1 for share in figures["encoder_share"])
    median = sorted(figures["tokens_per_second"])[1]
    assert f"{median:.3f}" in done.stdout


def test_fewer_rows_than_the_steps_need_is_a_usage_error():
    done = benchmark("--rows", "3", "--steps", "2")
    assert done.returncode == 2
    assert "--rows 3 is less than --steps x --batch_size" in done.stderr
    assert "Traceback" not in done.stderr
