"""scripts/demo/loss_bands.py: the losses of a run beside those of five others."""

import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, write_rows
from test_readme import demo_sizes

from scripts.demo.loss_bands import BANDS, band, losses

SCRIPT = "scripts/demo/loss_bands.py"
KIND = "pretrain_vlm, 750 steps"


@pytest.fixture
def bands() -> dict[str, dict[str, list[float]]]:
    return json.loads(BANDS.read_text(encoding="utf-8"))


def write_run(folder: Path, by_step: dict[int, float]) -> Path:
    folder.mkdir(parents=True)
    lines = [{"step": step, "loss": loss, "supervised_tokens": 7} for step, loss in by_step.items()]
    write_rows(folder / "metrics.jsonl", [*lines, {"step": lines[-1]["step"], "eval_loss": 0.5}])
    return folder


def middle(measured: dict[str, list[float]]) -> dict[int, float]:
    return {int(step): sum(values) / len(values) for step, values in measured.items()}


def test_a_loss_is_the_mean_over_tokens_of_a_tenth_of_the_steps_so_far(tmp_path):
    run, steps = tmp_path / "sft_vlm_64", range(10, 2010, 10)
    run.mkdir()
    lines = [{"step": step, "loss": step, "supervised_tokens": 3 if step % 20 else 1} for step in steps]
    write_rows(run / "metrics.jsonl", lines)
    # Of each two lines the first counts three times: 10 x 3 and 20, ...
    assert losses(run) == ("sft_vlm, 2000 steps", {20: 12.5, 200: 192.5, 1000: 952.5, 2000: 1902.5})


def test_a_run_within_the_bands_is_passed_in_silence(bands, run, tmp_path):
    inside = run(SCRIPT, write_run(tmp_path / "pretrain_vlm_128", middle(bands[KIND])))
    assert inside.stdout == ""


def test_each_loss_outside_its_band_is_told(bands, run, tmp_path):
    by_step = middle(bands[KIND])
    low, high = band(bands[KIND]["375"])
    folder = write_run(tmp_path / "pretrain_vlm_128", by_step | {375: high + 0.1})
    told = run(SCRIPT, folder, expect=1).stdout
    expected = f"expected {low:.3f} to {high:.3f}, as with other seeds: see docs/recipes.md"
    assert told == f"{folder}: loss {high + 0.1:.3f} at step 375, {expected}\n"


@pytest.mark.parametrize(
    ("by_step", "message"),
    [
        ({2: 1.0, 4: 1.0}, "no other runs of its stage and length to compare with"),
        ({100: 1.0, 750: 1.0}, "no loss of the steps 1 to 10: lower --log_interval"),
    ],
    ids=["other length", "too few lines"],
)
def test_a_run_that_cannot_be_compared_is_named(by_step, message, run, tmp_path):
    folder = write_run(tmp_path / "pretrain_vlm_128", by_step)
    result = run(SCRIPT, folder, expect=1)
    assert f"{folder}: {message}\n" in result.stdout + result.stderr


def test_measured_runs_become_what_is_normal(run, tmp_path):
    script = tmp_path / "scripts/demo/loss_bands.py"
    for name in ("common", "scripts", "model", "dataset"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("vision_model", "*.zip"))
    runs = [write_run(tmp_path / f"{i}/lm_128", {10: 2.0 + i, 20: 1.0}) for i in range(3)]
    run(script, "--measured", *runs)
    written = json.loads(script.with_suffix(".json").read_text(encoding="utf-8"))
    assert written["lm, 20 steps"] == {"10": [2.0, 3.0, 4.0], "20": [1.0, 1.0, 1.0]}
    assert KIND in written


def test_the_recipes_tell_what_was_measured(bands):
    text = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
    for kind in ("lm, 1500 steps", "pretrain_vlm, 750 steps", "sft_vlm, 6000 steps"):
        for step, measured in bands[kind].items():
            low, high = band(measured)
            told = f"{min(measured):.3f} to {max(measured):.3f} | {low:.3f} to {high:.3f} |"
            assert re.search(rf"\| {step} \| {re.escape(told)}", text), (kind, step, told)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_shortened_quickstart_keeps_within_its_bands(run, tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    run("scripts/demo/make_demo_data.py", "--out_dir", data, "--pictures", 2000)
    common = ["--out_dir", out, "--batch_size", 16, "--warmup_iters", 50, "--num_workers", 1]
    common += ["--epochs", 100, "--dtype", "float32", "--log_interval", 5]
    sees = [*common, "--images_path", data, "--cache_features", out / "features", "--learning_rate", 1e-3]
    encoder = ["--vision_model_path", "model/vision_model/demo-encoder"]
    lm = ["--data_path", data / "lm.jsonl", "--learning_rate", 2e-3, "--max_steps", 200]
    pretrain = ["--data_path", data / "pretrain.jsonl", "--max_steps", 100]
    sft = ["--data_path", data / "sft.jsonl", "--max_steps", 300]
    run("scripts/train_lm.py", *demo_sizes(), *common, *lm, timeout=900)
    run("train_pretrain_vlm.py", *sees, *encoder, *pretrain, timeout=900)
    run("train_sft_vlm.py", *sees, *sft, timeout=900)
    runs = [out / f"runs/{stage}_128" for stage in ("lm", "pretrain_vlm", "sft_vlm")]
    assert run(SCRIPT, *runs).stdout == ""
