"""Trackers: what TensorBoard reads back, curves that go on, and trackers that are missing or break."""

import json
import logging
import signal
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.cli import UserError
from common.distributed import Runtime
from trainer.arguments import TrainingFlags
from trainer.metrics import Metrics
from trainer.trackers import Tracker, open_tracker


def flags(**values) -> TrainingFlags:
    return TrainingFlags(data_path=["x"], **values)


def opened(folder: Path, resumed_step: int = 0, rank: int = 0, **values) -> Tracker | None:
    runtime = Runtime(torch.device("cpu"), rank)
    return open_tracker(flags(**values), folder, "0a1b2c3d", resumed_step, runtime)


def curve(folder: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def log_steps(tracker: Tracker, steps: range, offset: float) -> None:
    for step in steps:
        tracker.log({"loss": step + offset, "grad_norm": None if step == 2 else 0.5}, step)


def test_training_sends_its_metrics_to_tensorboard(data, tmp_path, run):
    rows = ["--data_path", data / "captions.jsonl", "--images_path", data / "images", "--from_weight", "none"]
    evaluation = ["--eval_data_path", data / "captions.jsonl", "--eval_interval", 2]
    stage = ["train_pretrain_vlm.py", *TINY, *rows, *evaluation, "--batch_size", 2]
    run(*stage, "--out_dir", tmp_path / "out", "--tracker", "tensorboard")

    folder = tmp_path / "out/runs/pretrain_vlm_64"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for name in ("loss", "eval_loss", "learning_rate", "samples_per_second"):
        written = [(line["step"], line[name]) for line in lines if name in line]
        assert len(written) >= 2
        assert curve(folder, name) == [(step, pytest.approx(value, rel=1e-6)) for step, value in written]


def test_resumed_run_continues_the_curve(tmp_path):
    log_steps(opened(tmp_path, tracker="tensorboard"), range(1, 6), 0.0)  # killed: nobody calls finish
    resumed = opened(tmp_path, resumed_step=3, tracker="tensorboard")
    log_steps(resumed, range(4, 8), 0.25)
    resumed.finish()

    assert curve(tmp_path, "loss") == [(1, 1), (2, 2), (3, 3), (4, 4.25), (5, 5.25), (6, 6.25), (7, 7.25)]
    assert [step for step, _ in curve(tmp_path, "grad_norm")] == [1, 3, 4, 5, 6, 7]  # not finite at 2


def test_new_run_in_the_same_folder_replaces_the_curve(tmp_path):
    for offset, steps in ((0.0, range(1, 6)), (0.5, range(1, 3))):
        tracker = opened(tmp_path, tracker="tensorboard")
        log_steps(tracker, steps, offset)
        tracker.finish()

    assert curve(tmp_path, "loss") == [(1, 1.5), (2, 2.5)]


@pytest.mark.parametrize("values", [{}, {"tracker": "none"}, {"tracker": "tensorboard", "rank": 1}])
def test_nothing_is_opened(tmp_path, values):
    assert opened(tmp_path / "run", **values) is None
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "swanlab", "trackio"])
def test_missing_package_is_one_clear_line(tmp_path, monkeypatch, name):
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))

    with pytest.raises(UserError, match=f"^--tracker {name} needs the package {name}: pip install {name}$"):
        opened(tmp_path, tracker=name)


def test_tracker_that_cannot_start_ends_a_new_run_but_not_a_resumed_one(tmp_path, caplog):
    (tmp_path / "tensorboard").write_text("a file where the folder has to be")

    with pytest.raises(UserError, match=r"^--tracker tensorboard cannot start: "):
        opened(tmp_path, tracker="tensorboard")
    assert opened(tmp_path, resumed_step=3, tracker="tensorboard") is None
    assert "the run goes on without it" in caplog.text


def test_old_name_of_the_wandb_flag():
    assert flags(use_wandb=True).tracker == "wandb"
    assert flags(use_wandb=True, tracker="wandb").tracker == "wandb"
    assert flags().tracker == "none"


@pytest.mark.parametrize("name", ["tensorboard", "none"])
def test_contradicting_flags_are_a_usage_error(run, name):
    result = run("train_sft_vlm.py", "--use_wandb", "--tracker", name, expect=2)

    assert f"error: --use_wandb is --tracker wandb, but --tracker {name} is given" in result.stderr
    assert "Traceback" not in result.stderr


def test_unknown_tracker_is_a_usage_error(run):
    assert "invalid choice: 'mlflow'" in run("train_sft_vlm.py", "--tracker", "mlflow", expect=2).stderr


def test_tracker_that_fails_does_not_end_the_run(tmp_path, caplog):
    sent = []

    def log_figures(record: dict, step: int) -> None:
        if step == 2:
            raise ConnectionError("the network\nis gone")
        sent.append(step)

    def finish() -> None:
        raise ConnectionError("still gone")

    metrics = Metrics(tmp_path, 4, Runtime(torch.device("cpu")), "lm", Tracker("wandb", log_figures, finish))
    with caplog.at_level(logging.WARNING):
        for step in range(1, 5):
            metrics.write({"step": step, "loss": 1.0})
        metrics.close()

    assert sent == [1]
    assert [record.getMessage() for record in caplog.records] == [
        "warning: --tracker wandb failed: ConnectionError: the network is gone, the run goes on without it"
    ]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]


def test_swanlab_leaves_ctrl_c_to_the_run(tmp_path, monkeypatch):
    pytest.importorskip("swanlab")
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    before = signal.getsignal(signal.SIGINT)
    tracker = opened(tmp_path, tracker="swanlab")

    assert signal.getsignal(signal.SIGINT) is before
    tracker.finish()
    assert list((tmp_path / "swanlab").glob("run-*-0a1b2c3d"))
