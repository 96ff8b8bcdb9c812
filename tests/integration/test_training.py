"""The training scripts as users run them: stages, files, metrics, signals, ranks, and bad input."""

import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import COLOURS, ROOT, TINY, TINY_ENCODER, start, write_rows
from PIL import Image

METRICS = {
    *("step", "epoch", "loss", "aux_loss", "learning_rate", "grad_norm", "samples_per_second"),
    *("tokens_per_second", "supervised_tokens", "seconds", "peak_memory_bytes"),
}


def pretrain(data: Path, out: Path, *more) -> list:
    rows = ["--data_path", data / "captions.jsonl", "--images_path", data / "images"]
    return ["train_pretrain_vlm.py", *TINY, *rows, "--out_dir", out, "--from_weight", "none", *more]


def records(out: Path, run_name: str) -> list[dict]:
    return [json.loads(line) for line in (out / "runs" / run_name / "metrics.jsonl").read_text().splitlines()]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)


def changed(before: Path, after: Path) -> set[str]:
    old, new = weights(before), weights(after)
    assert old.keys() <= new.keys()
    return {key for key in old if not torch.equal(old[key], new[key])}


def error_line(result: subprocess.CompletedProcess) -> str:
    """The one line that tells the user what is wrong; nothing else may look like a crash."""
    assert "Traceback" not in result.stderr, result.stderr
    lines = [line for line in result.stderr.splitlines() if "error: " in line]
    assert len(lines) == 1, result.stderr
    return lines[0]


def test_three_stages_build_on_each_other(data, tmp_path, run):
    out = tmp_path / "out"
    sizes = [*TINY, "--out_dir", out]
    texts = [json.loads(line) for line in (data / "texts.jsonl").read_text().splitlines()]
    chat = {"conversations": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}
    write_rows(data / "texts.jsonl", [*texts, chat])
    language = [flag for flag in sizes if flag not in ("--vision_model_path", TINY_ENCODER)]
    run("scripts/train_lm.py", *language, "--data_path", data / "texts.jsonl", "--batch_size", 4)
    common = ["--images_path", data / "images", "--batch_size", 4, "--learning_rate", 1e-2]
    evaluation = ["--eval_data_path", data / "dialogues.jsonl", "--eval_interval", 2]
    run(
        "train_pretrain_vlm.py",
        *sizes,
        *common,
        *evaluation,
        "--data_path",
        data / "captions.jsonl",
        "--epochs",
        2,
    )
    run("train_sft_vlm.py", *sizes, *common, "--data_path", data / "dialogues.jsonl", "--max_steps", 1)

    # proj_last: of the language model, the last layer alone; and the projection
    moved = changed(out / "lm_64.pth", out / "pretrain_vlm_64.pth")
    assert moved == {key for key in weights(out / "lm_64.pth") if key.startswith("model.layers.1.")}
    again = [*common, "--out_dir", tmp_path / "again", "--data_path", data / "captions.jsonl"]
    base = out / "pretrain_vlm_64.pth"
    run("train_pretrain_vlm.py", *TINY, *again, "--from_weight", base, "--max_steps", 1)
    moved = changed(base, tmp_path / "again/pretrain_vlm_64.pth")
    learns = ("model.layers.1.", "vision_proj.")
    assert moved == {key for key in weights(base) if key.startswith(learns)}
    # proj_llm: everything
    moved = changed(out / "pretrain_vlm_64.pth", out / "sft_vlm_64.pth")
    assert moved == weights(out / "sft_vlm_64.pth").keys()
    assert not any("vision_encoder" in key for key in moved)

    lines = records(out, "pretrain_vlm_64")
    trained = [line for line in lines if "loss" in line]
    assert [line["step"] for line in trained] == [1, 2, 3, 4] and trained[0].keys() >= METRICS
    assert [line["epoch"] for line in trained] == [0, 0, 1, 1]
    assert trained[-1]["loss"] < trained[0]["loss"]
    assert [line["step"] for line in lines if "eval_loss" in line] == [2, 4]
    sidecar = json.loads((out / "sft_vlm_64.json").read_text())
    assert sidecar["config"]["hidden_size"] == 64 and sidecar["arguments"]["max_steps"] == 1


def test_one_seed_gives_one_result(data, tmp_path, run):
    for name in ("a", "b"):
        command = pretrain(data, tmp_path / name, "--batch_size", 3, "--use_moe", "--num_workers", 1)
        run(*command, PYTHONHASHSEED=str(ord(name)))
    run(*pretrain(data, tmp_path / "c", "--batch_size", 3, "--use_moe", "--seed", 1))
    a, b, c = ((tmp_path / name / "pretrain_vlm_64_moe.pth").read_bytes() for name in "abc")
    assert a == b != c
    losses = [[line["loss"] for line in records(tmp_path / name, "pretrain_vlm_64_moe")] for name in "ab"]
    assert losses[0] == losses[1] and len(losses[0]) == 12


def test_a_large_seed_is_a_seed(data, tmp_path, run):
    """Of the three libraries that are seeded, NumPy takes the smallest ones only."""
    run(*pretrain(data, tmp_path / "out", "--max_steps", 1, "--seed", 2**64 - 1))
    assert len(records(tmp_path / "out", "pretrain_vlm_64")) == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_two_ranks_have_the_gradient_of_one(data, tmp_path, run, kind):
    worker = "tests/integration/gradient_worker.py"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    run(*torchrun, 1, worker, data, 8, kind, tmp_path / "one.pt", PYTHONPATH=str(ROOT))
    run(*torchrun, 2, worker, data, 4, kind, tmp_path / "two.pt", PYTHONPATH=str(ROOT))
    one, two = weights(tmp_path / "one.pt"), weights(tmp_path / "two.pt")
    assert one.keys() == two.keys()
    assert max(float((one[key] - two[key]).abs().max()) for key in one) < 1e-5
    assert max(float(grad.abs().max()) for grad in one.values()) > 1e-2


def test_torchrun_trains_on_two_ranks(data, tmp_path, run):
    """Text-only batches on one rank, an uneven last step, one set of files."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, "train_sft_vlm.py"]
    rows = ["--data_path", data / "dialogues.jsonl", "--images_path", data / "images"]
    out = tmp_path / "out"
    run(
        *torchrun,
        *TINY,
        *rows,
        "--out_dir",
        out,
        "--batch_size",
        1,
        "--accumulation_steps",
        3,
        "--from_weight",
        "none",
    )
    lines = records(out, "sft_vlm_64")
    assert [line["step"] for line in lines] == [*range(1, 5)]
    assert sorted(path.name for path in out.iterdir()) == ["runs", "sft_vlm_64.json", "sft_vlm_64.pth"]


def test_rows_without_an_answer_left_are_counted(data, tmp_path, run):
    rows = [json.loads(line) for line in (data / "captions.jsonl").read_text().splitlines()]
    rows[0]["conversations"].insert(0, {"role": "user", "content": "word " * 400})
    rows[0]["conversations"].insert(1, {"role": "assistant", "content": "ok"})
    rows[3]["conversations"][0]["content"] += " word" * 400
    write_rows(data / "captions.jsonl", rows)
    result = run(*pretrain(data, tmp_path / "out", "--batch_size", 8, "--max_seq_len", 250, "--epochs", 1))
    assert "skipped rows: 2, see" in result.stderr
    (line,) = records(tmp_path / "out", "pretrain_vlm_64")
    assert line["skipped_rows"] == 2
    flags = ["--batch_size", 8, "--max_seq_len", 250, "--epochs", 3]
    again = run(*pretrain(data, tmp_path / "thrice", *flags, "--eval_data_path", data / "captions.jsonl"))
    assert "skipped rows: 2, see" in again.stderr  # however often
    listed = (tmp_path / "out/runs/pretrain_vlm_64/bad_samples.jsonl").read_text()
    assert listed.count("\n") == listed.count("no supervised token within 250 tokens") == 2


def test_where_no_row_is_usable_the_first_ones_reason_is_told(data, tmp_path, run):
    rows = [json.loads(line) for line in (data / "captions.jsonl").read_text().splitlines()]
    rows[0]["image"] = "line\u2028separator.png"  # in a name, no end of a line of the list
    (data / "images" / rows[0]["image"]).touch()
    write_rows(data / "captions.jsonl", rows)
    for picture in (data / "images").iterdir():
        picture.write_bytes(b"broken")
    line = error_line(run(*pretrain(data, tmp_path / "out"), expect=1))
    listed = tmp_path / "out/runs/pretrain_vlm_64/bad_samples.jsonl"
    assert "no row is usable, the first because captions.jsonl:" in line and "cannot read image" in line
    assert str(listed) in line and listed.read_text().count("\n") == 8


def test_an_evaluation_without_a_counting_row_has_no_loss(data, tmp_path, run):
    rows = [json.loads(line) for line in (data / "captions.jsonl").read_text().splitlines()]
    for row in rows:
        row["conversations"][0]["content"] += " word" * 400
    write_rows(data / "long.jsonl", rows)
    flags = ["--max_seq_len", 250, "--max_steps", 1, "--eval_data_path", data / "long.jsonl"]
    result = run(*pretrain(data, tmp_path / "out", *flags))
    assert "none of 8 rows counts: eval_loss is null" in result.stderr
    evaluated = records(tmp_path / "out", "pretrain_vlm_64")[-1]
    assert evaluated["eval_loss"] is None and evaluated["eval_skipped_rows"] == 8


@pytest.mark.parametrize(
    "cached", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["pictures", "cached_features"]
)
def test_the_blank_loss_is_that_of_grey_pictures(data, tmp_path, run, cached):
    for i in range(8):
        Image.new("RGB", (50, 40), (128, 128, 128)).save(data / f"images/grey{i}.png")
    rows = (data / "captions.jsonl").read_text()
    (data / "grey.jsonl").write_text(rows.replace('"image": "', '"image": "grey'))
    flags = [
        "--max_steps",
        2,
        "--eval_interval",
        1,
        *(["--cache_features", tmp_path / "f"] if cached else []),
    ]
    run(*pretrain(data, tmp_path / "a", *flags, "--eval_data_path", data / "captions.jsonl", "--eval_blank"))
    run(*pretrain(data, tmp_path / "b", *flags, "--eval_data_path", data / "grey.jsonl"))
    blank = [line for line in records(tmp_path / "a", "pretrain_vlm_64") if "eval_loss" in line]
    grey = [line for line in records(tmp_path / "b", "pretrain_vlm_64") if "eval_loss" in line]
    assert len(blank) == len(grey) == 2
    for line, other in zip(blank, grey, strict=True):
        assert line["eval_loss_blank"] == pytest.approx(other["eval_loss"], abs=1e-4)
        assert abs(line["eval_loss_blank"] - line["eval_loss"]) > 1e-4


def test_rows_held_out_of_the_training_file_are_evaluated(data, tmp_path, run):
    result = run(*pretrain(data, tmp_path / "out", "--eval_share", 0.4, "--max_steps", 2))
    (train,) = re.findall(r"to train on: (\d) rows", result.stderr)
    (held,) = re.findall(r"to evaluate: (\d) rows", result.stderr)
    assert int(train) + int(held) == 8 and int(held) > 0
    assert records(tmp_path / "out", "pretrain_vlm_64")[-1]["eval_tokens"] > 0


@pytest.mark.parametrize(
    "flags",
    [("--eval_blank",), ("--eval_share", 1), ("--eval_share", 0.1, "--eval_data_path", "rows.jsonl")],
    ids=["blank_without_rows", "everything", "both"],
)
def test_evaluation_flags_that_make_no_sense_are_usage_errors(data, tmp_path, run, flags):
    line = error_line(run(*pretrain(data, tmp_path / "out", *flags), expect=2))
    assert flags[0] in line


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_with_saved_weights(data, tmp_path, number, code):
    """The signal goes to the whole process group, data workers included, as terminals do it."""
    out = tmp_path / "out"
    process = start(pretrain(data, out, "--epochs", 100_000, "--num_workers", 1), own_session=True)
    metrics = out / "runs/pretrain_vlm_64/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and metrics.read_text().count("\n") > 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in errors, errors
    steps = [line["step"] for line in records(out, "pretrain_vlm_64")]
    assert json.loads((out / "pretrain_vlm_64.json").read_text())["step"] == steps[-1]
    assert len(weights(out / "pretrain_vlm_64.pth")) > 10


def test_help_explains_every_flag_with_its_default(run):
    text = " ".join(run("train_pretrain_vlm.py", "--help").stdout.split())
    for flag in (
        "--batch_size",
        "--trainable",
        "--vision_model_path",
        "--max_steps",
        "--no_use_moe",
        "--eval_interval",
    ):
        assert flag in text
    assert "(default: 0.0004)" in text
    assert "if not given: proj_last, or proj with a base of release 3" in text
    assert text.count("(default:") >= 30


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch_size", 0], "--batch_size must be above 0, found 0"),
        (["--trainable", "all"], "invalid choice: 'all'"),
        (["--cache_dtype", "int4"], "invalid choice: 'int4'"),
        (["--unknown", 1], "--unknown"),
        (["--learning_rate", "nan"], "--learning_rate must be above 0, found nan"),
        (["--seed", 2**64], f"--seed must be from 0 to 2**64 - 1, found {2**64}"),
    ],
)
def test_wrong_usage_ends_with_two(run, flags, message):
    assert message in error_line(run("train_pretrain_vlm.py", *flags, expect=2))


def test_bad_rows_and_pictures_end_with_one(data, tmp_path, run):
    command = pretrain(data, tmp_path / "out", "--num_workers", 1, "--on_bad_sample", "error")
    good = (data / "captions.jsonl").read_text()
    (data / "captions.jsonl").write_text(good + "{broken\n")
    assert "captions.jsonl:9: not JSON" in error_line(run(*command, expect=1))
    (data / "captions.jsonl").write_text(good)
    (data / "images/5.png").write_bytes(b"no picture")
    line = error_line(run(*command, expect=1))
    assert "captions.jsonl:6: cannot read image" in line and "5.png" in line
    (data / "images/5.png").unlink()
    (data / "captions.jsonl").write_text(good + "\n")
    assert "captions.jsonl:6: image '5.png' not found" in error_line(run(*command, expect=1))


def test_what_is_missing_is_named_with_the_way_out(data, tmp_path, run):
    command = pretrain(data, tmp_path / "out")
    no_clip = [*command, "--vision_model_path", tmp_path / "clip"]
    assert "python scripts/download.py clip" in error_line(run(*no_clip, expect=1))
    in_the_way = tmp_path / "file"
    in_the_way.write_text("mine")
    line = error_line(run(*command, "--out_dir", in_the_way, expect=1))
    assert f"--out_dir {in_the_way}: cannot be written" in line and in_the_way.read_text() == "mine"
    no_base = [part for part in command if part not in ("--from_weight", "none")]
    assert "no lm_64.pth in" in error_line(run(*no_base, expect=1))


@pytest.mark.parametrize("device", ["meta", "cuda:99", "toaster"])
def test_a_device_that_cannot_run_is_refused(data, tmp_path, run, device):
    line = error_line(run(*pretrain(data, tmp_path / "out"), "--device", device, expect=1))
    assert f"--device {device}: not available here" in line


def test_a_full_disk_keeps_the_previous_weights(data, tmp_path):
    """A limit on file size stands for the full disk: the write fails in the middle."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "pretrain_vlm_64.pth").write_bytes(b"previous")
    command = [sys.executable, *map(str, pretrain(data, out, "--max_steps", 1))]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))  # noqa: E731
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, preexec_fn=limit, timeout=200)
    assert result.returncode == 1
    line = error_line(result)
    assert "cannot write" in line and "the previous pretrain_vlm_64.pth is intact" in line
    assert (out / "pretrain_vlm_64.pth").read_bytes() == b"previous"
    assert sorted(path.name for path in out.iterdir()) == ["pretrain_vlm_64.pth", "runs"]


def test_a_token_budget_trains_and_says_if_a_row_does_not_fit(data, tmp_path, run):
    out = tmp_path / "out"
    run(*pretrain(data, out, "--tokens_per_batch", 750, "--epochs", 2))
    trained = records(out, "pretrain_vlm_64")
    assert [line["step"] for line in trained] == [*range(1, 7)]  # three rows of about 245 tokens each
    last = 4e-4 * (0.1 + 0.45 * (1 + math.cos(math.pi * 5 / 6)))  # the schedule knows the number of steps
    assert trained[-1]["learning_rate"] == pytest.approx(last) and trained[-1]["epoch"] == 1
    line = error_line(run(*pretrain(data, out, "--tokens_per_batch", 200), expect=1))
    assert "--tokens_per_batch 200: a row of" in line and "captions.jsonl" in line and "--max_seq_len" in line


def test_packing_trains_the_same(data, tmp_path, run):
    for name, flags in (("plain", []), ("packed", ["--pack"])):
        command = pretrain(data, tmp_path / name, "--batch_size", 8, "--epochs", 3, *flags)
        run(*command, "--data_path", data / "dialogues.jsonl")
    plain, packed = (records(tmp_path / name, "pretrain_vlm_64") for name in ("plain", "packed"))
    for name in ("loss", "grad_norm", "supervised_tokens"):
        assert [x[name] for x in packed] == pytest.approx([x[name] for x in plain], rel=1e-3)
    assert [x["loss"] for x in packed] != [x["loss"] for x in plain]  # the same by another way


def test_features_and_half_precision_train_as_well(data, tmp_path, run):
    flags = ["--batch_size", 4, "--epochs", 2]
    run(*pretrain(data, tmp_path / "plain", *flags, "--dtype", "float32"))
    cached = ["--dtype", "float32", "--cache_features", tmp_path / "features"]
    run(*pretrain(data, tmp_path / "cached", *flags, *cached))
    run(*pretrain(data, tmp_path / "bf16", *flags, "--dtype", "bfloat16"))
    losses = {
        name: [line["loss"] for line in records(tmp_path / name, "pretrain_vlm_64")]
        for name in ("plain", "cached", "bf16")
    }
    assert losses["cached"] == pytest.approx(losses["plain"], abs=1e-3)
    assert losses["bf16"] == pytest.approx(losses["plain"], abs=0.05) and losses["bf16"] != losses["plain"]
    assert len(list((tmp_path / "features").glob("*/*.npy"))) == 1


def test_a_row_that_breaks_later_does_not_cost_what_was_learnt(data, tmp_path, run):
    """Two ranks; only one meets the broken picture. Both end, one tells, weights are saved."""
    out = tmp_path / "out"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    (data / "images/5.png").write_bytes(b"no picture")
    command = pretrain(data, out, "--batch_size", 1, "--epochs", 1, "--on_bad_sample", "error")
    result = run(*torchrun, *command, expect=1, timeout=120)
    told = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and "captions.jsonl:6: cannot read image" in told[0]
    trained = [line["step"] for line in records(out, "pretrain_vlm_64")]
    assert trained  # with this seed the broken row does not come first
    assert json.loads((out / "pretrain_vlm_64.json").read_text())["step"] == trained[-1]


def test_nothing_to_learn_from_is_an_error(data, tmp_path, run):
    out = tmp_path / "out"
    line = error_line(run(*pretrain(data, out, "--max_seq_len", 100, "--epochs", 2), expect=1))
    assert re.search(
        r"no row is usable, the first because captions.jsonl:\d: no supervised token within 100", line
    )
    assert line.endswith(f"all are in {out}/runs/pretrain_vlm_64/bad_samples.jsonl")
    assert not (out / "pretrain_vlm_64.pth").exists()


def test_weights_that_do_not_fit_are_refused(data, tmp_path, run):
    out = tmp_path / "out"
    run(*pretrain(data, out, "--max_steps", 1))
    base = ["--from_weight", out / "pretrain_vlm_64.pth"]
    command = [*pretrain(data, tmp_path / "two"), *base]
    line = error_line(run(*command, "--num_hidden_layers", 3, expect=1))
    assert "does not fit the flags: it has num_hidden_layers 2 (flag: 3)" in line
    sidecar = json.loads((out / "pretrain_vlm_64.json").read_text())
    sidecar["tokenizer"]["fingerprint"] = "0" * 64
    (out / "pretrain_vlm_64.json").write_text(json.dumps(sidecar))
    assert "was trained with another tokenizer" in error_line(run(*command, expect=1))
    no_encoder = [*pretrain(data, tmp_path / "two"), "--vision_model_path", ROOT / "model/tokenizer"]
    assert "is not a usable vision encoder" in error_line(run(*no_encoder, expect=1))


def test_weights_are_saved_on_the_way(data, tmp_path):
    """Killed without a chance to save, a run leaves the weights of its last --save_interval."""
    out = tmp_path / "out"
    process = start(pretrain(data, out, "--epochs", 100_000, "--save_interval", 2))
    deadline = time.monotonic() + 120
    while not (out / "pretrain_vlm_64.json").is_file():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.communicate(timeout=60)
    assert json.loads((out / "pretrain_vlm_64.json").read_text())["step"] % 2 == 0
    assert len(weights(out / "pretrain_vlm_64.pth")) > 10


def test_encoder_files_are_never_written(data, tmp_path, run):
    before = {path.name: path.read_bytes() for path in TINY_ENCODER.iterdir()}
    run(*pretrain(data, tmp_path / "out", "--trainable", "proj_llm", "--max_steps", 1))
    assert {path.name: path.read_bytes() for path in TINY_ENCODER.iterdir()} == before


def asked(out: Path, run_name: str) -> list[dict]:
    return [json.loads(line) for line in (out / "runs" / run_name / "samples.jsonl").read_text().splitlines()]


def test_answers_are_right_once_it_has_learnt(world, tmp_path, run):
    rows, images = world / "eval.jsonl", world / "images"
    flags = ["--data_path", rows, "--images_path", images, "--cache_features", tmp_path / "features"]
    flags += ["--batch_size", 7, "--epochs", 90, "--learning_rate", 8e-3, "--dtype", "float32"]
    flags += ["--sample_data_path", rows, "--eval_interval", 45, "--from_weight", "none"]
    run("train_sft_vlm.py", *TINY, *flags, "--out_dir", tmp_path / "out")

    first, last = asked(tmp_path / "out", "sft_vlm_64")
    assert (first["step"], last["step"]) == (45, 90)
    expected = [f"It is {colour}." for colour in COLOURS]
    expected += ["First red, then blue.", "First blue, then red.", "我很好。"]
    assert (
        [one["answer"] for one in last["answers"]] == [one["expected"] for one in last["answers"]] == expected
    )
    assert [one["answer"] for one in first["answers"]] != expected
    assert [line for line in records(tmp_path / "out", "sft_vlm_64") if "loss" not in line] == []


@pytest.mark.parametrize(
    "more",
    [
        pytest.param(["--compile"], id="compiled", marks=pytest.mark.slow),
        pytest.param(["--activation_checkpointing", "--pack"], id="checkpointing"),
    ],
)
def test_answers_do_not_depend_on_how_it_trains(data, weight, world, tmp_path, run, more):
    rows = ["--sample_data_path", world / "eval.jsonl", "--images_path", world / "images"]
    rows += ["--data_path", world / "eval.jsonl", "--from_weight", weight, "--dtype", "float32"]
    flags = [*rows, "--learning_rate", 1e-9, "--max_steps", 2, "--eval_interval", 1, "--sample_rows", 3]
    run("train_sft_vlm.py", *TINY, *flags, *more, "--out_dir", tmp_path / "out")
    found = [[one["answer"] for one in line["answers"]] for line in asked(tmp_path / "out", "sft_vlm_64")]
    assert found == [["It is blue.", "It is red.", "First red, then blue."]] * 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sample_data_path", "gone.jsonl"], "gone.jsonl"),
        (["--sample_data_path", "{data}/texts.jsonl"], "texts.jsonl: no question, expected user turns with"),
    ],
    ids=["missing", "no question"],
)
def test_samples_that_cannot_be_asked_end_it_before_the_first_step(data, tmp_path, run, flags, message):
    flags = [flag.format(data=data) for flag in flags]
    line = error_line(run(*pretrain(data, tmp_path / "out"), *flags, expect=1))
    assert message in line
    assert not (tmp_path / "out/runs/pretrain_vlm_64/metrics.jsonl").exists()


def test_no_sample_row_is_wrong_usage(run):
    line = error_line(run("train_sft_vlm.py", "--sample_rows", 0, expect=2))
    assert "--sample_rows must be above 0, found 0" in line
