"""Trackers: what TensorBoard reads back, curves that go on, and trackers that are missing or break."""

import io
import json
import logging
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import (
    EventAccumulator as PluginEventAccumulator,
)

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
            metrics.show(step, SAMPLES)
        metrics.close()

    assert sent == [1, 1]
    assert [record.getMessage() for record in caplog.records] == [
        "warning: --tracker wandb failed: ConnectionError: the network is gone, the run goes on without it"
    ]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    lines = (tmp_path / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]


RED = np.full((4, 6, 3), (255, 0, 0), dtype=np.uint8)
SAMPLES = [
    {"where": "a:1", "question": "What?\n*this*", "images": ["a.png"], "expected": "cat", "answer": "<b>dog"},
    {"where": "a:2", "question": "Hi", "images": [], "expected": "Hello.", "answer": ""},
]
SAMPLES = [one | {"picture": picture} for one, picture in zip(SAMPLES, (RED, None), strict=True)]


def texts(folder: Path, number: int) -> list[tuple[int, str]]:
    board = PluginEventAccumulator(
        str(folder / "tensorboard")
    ).Reload()  # as the pages of TensorBoard read it
    events = board.Tensors(f"samples/{number}/text_summary")
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in events]


def test_tensorboard_shows_answers_with_their_pictures(tmp_path):
    tracker = opened(tmp_path, tracker="tensorboard")
    tracker.log({"samples": SAMPLES}, 3)  # killed: nobody calls finish

    # A block of code, which shows text as it is
    assert texts(tmp_path, 0) == [(3, "    What?\n    *this*\n    expected: cat\n    answer: <b>dog")]
    assert texts(tmp_path, 1) == [(3, "    Hi\n    expected: Hello.\n    answer: ")]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (event,) = events.Images("samples/0")
    assert events.Tags()["images"] == ["samples/0"] and event.step == 3
    with Image.open(io.BytesIO(event.encoded_image_string)) as shown:
        assert np.array_equal(np.asarray(shown), RED)


def test_a_resumed_run_goes_on_with_its_answers_in_tensorboard(tmp_path):
    tracker = opened(tmp_path, tracker="tensorboard")
    for step in (3, 6):
        tracker.log({"samples": SAMPLES}, step)
    resumed = opened(tmp_path, resumed_step=3, tracker="tensorboard")
    resumed.log({"samples": [one | {"answer": "new"} for one in SAMPLES]}, 6)
    resumed.finish()

    assert [(step, text.splitlines()[-1].strip()) for step, text in texts(tmp_path, 0)] == [
        (3, "answer: <b>dog"),
        (6, "answer: new"),
    ]


@pytest.mark.parametrize("name", ["wandb", "trackio", "swanlab"])
def test_online_trackers_show_answers_by_their_own_classes(tmp_path, monkeypatch, name):
    logged = []
    library = SimpleNamespace(
        init=lambda **settings: SimpleNamespace(log=lambda record, step: logged.append((record, step))),
        finish=lambda: None,
        Image=lambda picture, caption=None: ("image", picture.shape, caption),
        Text=lambda text: ("text", text),
    )
    if name != "swanlab":
        library.Table = lambda columns, data: ("table", columns, data)
    monkeypatch.setitem(sys.modules, name, library)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    tracker = opened(tmp_path, tracker=name)
    tracker.log({"loss": 1.0, "grad_norm": None}, 2)
    tracker.log({"samples": SAMPLES}, 3)

    told = "What?\n*this*\nexpected: cat\nanswer: <b>dog"
    lists = {"samples/0": ("image", (4, 6, 3), told), "samples/1": ("text", "Hi\nexpected: Hello.\nanswer: ")}
    columns = ["question", "expected", "answer", "picture"]
    rows = [["What?\n*this*", "cat", "<b>dog", ("image", (4, 6, 3), None)], ["Hi", "Hello.", "", None]]
    shown = lists if name == "swanlab" else {"samples": ("table", columns, rows)}
    assert logged == [({"loss": 1.0}, 2), (shown, 3)]


@pytest.mark.parametrize("name", ["wandb", "trackio", "swanlab"])
def test_the_real_libraries_take_answers(tmp_path, monkeypatch, caplog, name):
    for switch in ("WANDB_MODE", "SWANLAB_MODE"):
        monkeypatch.setenv(switch, "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read on import
    pytest.importorskip(name)
    tracker = opened(tmp_path, tracker=name)
    for step in (3, 6):
        tracker.log({"loss": 1.0}, step)
        tracker.log({"samples": SAMPLES}, step)
    tracker.finish()

    assert tracker.works and not caplog.records
    suffix = "*.table.json" if name == "wandb" else "*.png"
    assert len(list(tmp_path.rglob(suffix))) == 2


def test_swanlab_leaves_ctrl_c_to_the_run(tmp_path, monkeypatch):
    pytest.importorskip("swanlab")
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    before = signal.getsignal(signal.SIGINT)
    tracker = opened(tmp_path, tracker="swanlab")

    assert signal.getsignal(signal.SIGINT) is before
    tracker.finish()
    assert list((tmp_path / "swanlab").glob("run-*-0a1b2c3d"))
