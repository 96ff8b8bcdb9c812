"""The benchmarks: both ways of doing the same work have equal losses, and figures add up."""

import json
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from common.distributed import runtime
from trainer.stage import set_trainable

sys.path.insert(0, str(ROOT / "scripts/bench"))
import benchmark
import benchmark_chat
from flops import step_flops

TINY = "--hidden_size 64 --num_hidden_layers 2 --vision_layers 1 --batch_size 2 --dtype float32".split()


def measure(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts/bench/benchmark.py"), *TINY, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=800)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_published_and_default_training_have_the_same_losses_for_fifty_steps(tmp_path: Path):
    report = tmp_path / "report.json"
    done = measure(*"--stages pretrain sft moe --repeats 1 --steps 50 --rows 100 --json".split(), str(report))
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
    done = measure(*"--stages inference --repeats 2 --steps 2 --rows 8 --json".split(), str(report))
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
    command = [sys.executable, str(ROOT / "scripts/bench/benchmark_chat.py"), *sizes, str(report)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    figures = json.loads(report.read_text())
    assert all(len(values) == 3 for values in figures.values())
    assert all(0 < share < 1 for share in figures["encoder_share"])
    median = sorted(figures["tokens_per_second"])[1]
    assert f"{median:.3f}" in done.stdout


@pytest.mark.parametrize("stage", benchmark.TRAINABLE)
def test_operations_by_formula_are_those_that_torch_counts(stage):
    """Where it counts them: attention in steps, masked pairs included, encoders without a pooling head."""
    torch.manual_seed(0)
    options = Namespace(hidden_size=64, num_hidden_layers=2, vision_layers=1)
    model, processor = benchmark.random_vlm(options, stage)
    set_trainable(model.train(), benchmark.TRAINABLE[stage])
    encodes, patches = stage != "release3", processor.tokens_per_image
    ids = torch.tensor([[1, *[processor.placeholder_id] * patches, *range(300, 360)]] * 2)
    labels = ids.where(ids >= 340, -100)
    side = model.config.vision_config.image_size
    pictures = torch.randn(2, 3, side, side) if encodes else torch.randn(2, 1, patches, 768)
    given = {"pixel_values" if encodes else "image_features": pictures}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ids, labels=labels, skip_logits=True, **given).loss.backward()
    found = step_flops(model, 2, ids.numel(), int((labels > 0).sum()), encodes)
    masked = 6 * model.config.hidden_size * 2 * 2 * ids.shape[1] ** 2
    assert found + masked == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--device", "cuda:99"], 1, "--device cuda:99: not available here"),
        (["--dtype", "fp32"], 2, "invalid choice: 'fp32'"),
    ],
)
def test_what_cannot_be_measured_is_one_line(run, flags, code, message):
    done = run("scripts/bench/benchmark_chat.py", *flags, expect=code)
    assert message in done.stderr and "Traceback" not in done.stderr


def test_the_encoders_share_is_read_when_its_work_is_done(monkeypatch: pytest.MonkeyPatch):
    """On a GPU its call returns at once, and waiting for the device is what takes long."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "vision_layers": 1}
    model, processor = benchmark_chat.random_vlm(Namespace(**sizes))
    features = model.get_image_embeddings(torch.zeros(1, 3, 224, 224), model.vision_encoder)[0]
    monkeypatch.setattr(benchmark_chat, "encode_picture", lambda *_: features)
    monkeypatch.setattr(benchmark_chat, "synchronize", lambda _: time.sleep(0.2))
    found = benchmark_chat.measure(model, processor, 2)
    assert found["encoder_share"] * found["first_token_seconds"] >= 0.2


def test_a_repeat_trains_and_counts(tmp_path: Path):
    """In this process, for the mode that changes nothing."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "vision_layers": 1, "batch_size": 2}
    options = Namespace(**sizes, rows=8, steps=2, repeats=1, dtype="float32", compile=False)
    benchmark.write_rows(tmp_path, "sft", options)
    with runtime("cpu", 0) as run:
        found = benchmark.Bench("sft", "default", tmp_path, options, run).measure(0)
    assert len(found["losses"]) == 2 and all(8 < loss < 9.5 for loss in found["losses"])  # about ln 6400
    assert 0 <= found["padding"] < 0.2
    assert found["tokens_per_second"] > 200 * found["samples_per_second"]  # a picture alone has 196


def test_fewer_rows_than_the_steps_need_is_a_usage_error(run):
    done = run("scripts/bench/benchmark.py", "--rows", 3, "--steps", 2, expect=2)
    assert "--rows 3 is less than --steps x --batch_size" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_scaling_alone_measures_every_point_anew(tmp_path: Path):
    report = tmp_path / "report.json"
    done = measure(*"--stages --scaling --scaling_rows 100 200 --steps 2 --json".split(), str(report))
    assert done.returncode == 0, done.stderr
    sections = json.loads(report.read_text())["scaling"]
    assert [(point["rows"], point["start"]) for point in sections["rows"]] == [
        (rows, start) for rows in (100, 200) for start in ("first", "later")
    ]
    one, two = sections["ranks"]
    assert (one["ranks"], two["ranks"]) == (1, 2)
    assert one["samples_per_second"] != two["samples_per_second"]
    longest = sections["length"][-1]
    assert longest["tokens"] == 2048 and longest["seconds"] > sections["length"][0]["seconds"]
