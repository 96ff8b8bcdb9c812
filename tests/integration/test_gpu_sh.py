"""scripts/bench/gpu.sh on the CPU: every part runs, figures fit together, and what is missing is said."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from common.distributed import Runtime

sys.path.insert(0, str(ROOT / "scripts/bench"))
import gpu
import gpu_parts

PARTS = {"about", "tests", "peak", "stages", "compiled", "graphs", "allocator", "batch", "loader", "answers"}
PARTS |= {"recipe"}


def ask(out: Path, *arguments: str, timeout: float = 280, **environment: str) -> subprocess.CompletedProcess:
    command = ["bash", "scripts/bench/gpu.sh", "--device", "cpu", "--tiny", "--out_dir", str(out), *arguments]
    environment = os.environ | {"PYTHON": sys.executable} | environment
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_part_runs_and_its_figures_fit_together(tmp_path):
    done = ask(tmp_path, "--minutes", "20", timeout=880)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report.keys() == PARTS | {"flags"}
    assert report["tests"]["failed"] == [] and report["tests"]["passed"] > 25
    for stage in ("pretrain", "sft", "moe", "release3"):
        modes = report["stages"][stage]
        graphs = {"graphs"} if stage in ("pretrain", "sft") else set()
        assert modes.keys() == {"published", "default", "cached", "compiled"} | graphs
        for mode in modes.values():
            assert mode["ratio"] == pytest.approx(
                mode["samples_per_second"] / modes["published"]["samples_per_second"]
            )
            assert 0 < mode["utilization"] < 1
        parts = modes["default"]["parts"]
        step = report["stages"][stage]["default"]["rows_a_step"] / modes["default"]["samples_per_second"]
        assert sum(parts.values()) == pytest.approx(step) and min(parts.values()) >= 0
        assert f"| {stage}, compiled | {modes['compiled']['samples_per_second']:.1f} |" in done.stdout
    assert report["batch"]["sft"]["rows"] == 4  # the most that it tries at this size
    assert report["loader"]["1 workers"] > 1 and report["answers"]["tokens_per_second"] > 1
    hours = report["recipe"]["hours on a 3090 (estimate)"]
    assert hours["both"] == pytest.approx(hours["pretrain"] + hours["sft"]) and hours["both"] > 0
    assert (tmp_path / "gpu.md").read_text() in done.stdout


@pytest.mark.slow
def test_tests_that_take_too_long_are_told_as_far_as_they_came(tmp_path):
    done = ask(tmp_path, "--parts", "tests", "--minutes", "0.4")  # of which they get a part
    assert done.returncode == 1 and "error: failed: tests; " in done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())["tests"]
    assert re.fullmatch(r"not through in \d+ s", found["error"]) and found["failed"] == []


@pytest.mark.slow
def test_single_parts_and_the_end_of_the_time(tmp_path):
    done = ask(tmp_path, "--parts", "about", "peak", "--minutes", "1")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["about"]["torch"] in done.stdout and report["peak"]["flops"] > 1e9
    done = ask(tmp_path, "--parts", "peak", "--minutes", "0")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "gpu.json").read_text())["peak"]["skipped"] == "the 0 minutes were over"


def test_a_cut_leaves_the_table_of_the_parts_before(tmp_path):
    command = [
        sys.executable,
        "scripts/bench/gpu.py",
        "--device",
        "cpu",
        "--tiny",
        "--out_dir",
        str(tmp_path),
    ]
    with subprocess.Popen(
        [*command, "--parts", "about", "tests"], cwd=ROOT, start_new_session=True
    ) as process:
        while not (table := tmp_path / "gpu.md").exists() and process.poll() is None:
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)
    assert json.loads((tmp_path / "gpu.json").read_text()).keys() == {"flags", "about"}
    assert f"torch {torch.__version__}" in table.read_text()


def test_a_mode_that_fails_is_named_and_the_next_one_runs(tmp_path, monkeypatch, capsys):
    def refuse(stage: str, mode: str, *_):
        raise torch.OutOfMemoryError("2 GiB more") if mode == "default" else ValueError("no")

    monkeypatch.setattr(gpu_parts, "Bench", refuse)
    report = {"stages": {"sft": (modes := {})}}
    context = gpu_parts.Context(Runtime(torch.device("cpu")), gpu_parts.sizes(True), tmp_path, report, int)
    context.until = time.monotonic() + 60
    for mode in ("default", "cached"):
        gpu_parts.measure_mode(context, modes, "sft", mode)
    assert "sft, default: OutOfMemoryError: 2 GiB more" in capsys.readouterr().err
    assert gpu.failures(report) == ["stages sft default", "stages sft cached"]
    assert "| sft, cached | ValueError: no |" in gpu.table(report)


def test_a_mode_without_time_is_skipped_and_no_failure(tmp_path):
    report = {"stages": {"sft": (modes := {})}}
    context = gpu_parts.Context(Runtime(torch.device("cpu")), gpu_parts.sizes(True), tmp_path, report, int)
    context.until = time.monotonic() - 1
    gpu_parts.measure_mode(context, modes, "sft", "default", name="compiled")
    assert modes == {"compiled": {"skipped": "no time was left"}} and gpu.failures(report) == []


def test_wheels_that_are_brought_come_first_and_are_needed_in_the_right_version(tmp_path):
    with zipfile.ZipFile(tmp_path / "datasets-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(
            "datasets-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: datasets\nVersion: 1.0\n"
        )
        wheel.writestr("../outside.py", "")
    done = ask(tmp_path / "out", "--parts", "about", GPU_WHEELS=str(tmp_path))
    assert done.returncode == 1 and not (tmp_path / "out").exists()
    pin = next(
        line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("datasets=")
    )
    assert "error: datasets 1.0, expected >=5: bring wheels of " in done.stderr and pin in done.stderr
    assert not list(tmp_path.parent.glob("outside.py")) and "Traceback" not in done.stderr


def test_a_folder_without_wheels_is_one_line(tmp_path):
    done = ask(tmp_path / "out", GPU_WHEELS=str(tmp_path))
    assert done.returncode == 1 and done.stderr == f"error: GPU_WHEELS: no wheel in {tmp_path}\n"
