"""Training that is killed, interrupted or given bad data goes on, or says what happened; nothing is lost."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, TINY_ENCODER, start
from test_training import error_line, pretrain, records, weights

from trainer.state import newest_first

NAME = "pretrain_vlm_64"


def long_run(data: Path, out: Path, *more) -> list:
    """320 steps, a state every 5."""
    flags = ["--batch_size", 1, "--epochs", 40, "--learning_rate", 1e-3, "--save_interval", 5]
    return pretrain(data, out, *flags, *more)


class Training:
    """A training process, in a session of its own as a terminal would start it."""

    def __init__(self, command: list, **env: str):
        self.process = start(command, own_session=True, **env)

    def wait_for(self, happened, seconds: float = 120) -> bool:
        """Until `happened()`; False if the process has ended before."""
        deadline = time.monotonic() + seconds
        while not happened():
            if self.process.poll() is not None:
                return False
            assert time.monotonic() < deadline, "nothing happened"
            time.sleep(0.002)
        return True

    def end(self, seconds: float = 120) -> tuple[int, str]:
        """Exit code and stderr, once it ends."""
        _, errors = self.process.communicate(timeout=seconds)
        return self.process.returncode, errors

    def signal(self, number: int) -> None:
        os.killpg(self.process.pid, number)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def steps_of(out: Path, name: str = NAME) -> int:
    path = out / "runs" / name / "metrics.jsonl"
    return path.read_text().count("\n") if path.is_file() else 0


def figures(out: Path, name: str = NAME) -> list[tuple]:
    return [(line["step"], line["epoch"], line["loss"], line["grad_norm"]) for line in records(out, name)]


def assert_same_run(out: Path, reference: Path) -> None:
    assert figures(out) == figures(reference)
    assert (out / f"{NAME}.pth").read_bytes() == (reference / f"{NAME}.pth").read_bytes()


KILL, TERM = signal.SIGKILL, signal.SIGTERM
SLOW = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.parametrize(
    "signals",
    [
        pytest.param([KILL, TERM], id="few"),
        pytest.param([KILL] * 20, id="kill", marks=SLOW),
        pytest.param([TERM] * 20, id="term", marks=SLOW),
    ],
)
def test_a_run_stopped_at_random_moments_has_the_same_bits(data, tmp_path, run, signals):
    """Every third time while a state is being written."""
    epochs = ["--epochs", 10 + 5 * len(signals)]
    run(*long_run(data, tmp_path / "whole", *epochs))
    out = tmp_path / "out"
    saves = out / "runs" / NAME / "checkpoints"
    choice = random.Random(5)
    inside = 0
    for turn, number in enumerate(signals):
        training = Training(long_run(data, out, *epochs))
        before = steps_of(out)
        assert training.wait_for(lambda before=before: steps_of(out) > before), training.end()
        if turn % 3 == 0:
            assert training.wait_for(lambda: any(saves.glob(".step-*")))
        else:
            time.sleep(choice.uniform(0, 0.25))
        training.signal(number)
        code, errors = training.end()
        assert code == (-KILL if number == KILL else 143), errors
        inside += any(saves.glob(".step-*"))
        if number == TERM:
            about = json.loads((out / f"{NAME}.json").read_text())
            assert about["step"] == steps_of(out)  # nothing of what was done is done again
    assert inside or KILL not in signals, "no kill fell into a save"
    run(*long_run(data, out, *epochs))
    assert_same_run(out, tmp_path / "whole")
    assert not any(saves.glob(".step-*"))


def test_a_second_run_in_the_same_folder_is_told_who_is_there(data, tmp_path, run):
    out = tmp_path / "out"
    command = pretrain(data, out, "--epochs", 100_000, "--num_workers", 1, "--save_interval", 5)
    training = Training(command)
    assert training.wait_for(lambda: steps_of(out) > 6)
    line = error_line(run(*command, "--resume", "never", expect=1))
    assert f"{out / 'runs' / NAME} is in use by another run, process {training.process.pid} on " in line
    workers = children(training.process.pid)
    os.kill(training.process.pid, KILL)  # its data workers live on for some seconds, and hold nothing
    training.process.communicate(timeout=30)
    assert any(Path(f"/proc/{pid}").exists() for pid in workers)
    run(*command, "--max_steps", steps_of(out) + 2, "--resume_override")


def test_a_base_that_was_trained_anew_is_no_done_before(data, tmp_path, run):
    out = tmp_path / "out"
    first = pretrain(data, out, "--batch_size", 8, "--epochs", 1)
    second = ["train_sft_vlm.py", *first[1 : first.index("--from_weight")], "--batch_size", 8, "--epochs", 1]
    run(*first)
    run(*second)
    assert "done before" in run(*second).stderr
    run(*first, "--resume", "never", "--seed", 1)
    line = error_line(run(*second, expect=1))
    assert "was made with other flags: --from_weight (content) '" in line and "--resume never" in line
    run(*second, "--resume", "never")
    assert "done before" in run(*second).stderr


def test_a_finished_run_is_reported_and_changed_flags_are_refused(data, tmp_path, run):
    out = tmp_path / "out"
    command = pretrain(data, out, "--batch_size", 4, "--epochs", 2)
    run(*command)
    before = (out / f"{NAME}.pth").read_bytes()
    (out / f"{NAME}.pth").unlink()
    again = run(*command)
    assert "done before, after 4 steps" in again.stderr and (out / f"{NAME}.pth").read_bytes() == before
    line = error_line(run(*command, "--learning_rate", 0.1, "--trainable", "proj", expect=1))
    for part in ("--learning_rate 0.0004 (now 0.1)", "--trainable", "--resume never", "--resume_override"):
        assert part in line
    assert (out / f"{NAME}.pth").read_bytes() == before
    result = run(*command, "--epochs", 3, "--resume_override")
    assert "made with other flags: --epochs 2 (now 3)" in result.stderr
    assert [line["step"] for line in records(out, NAME)] == [*range(1, 7)]
    run(*command, "--learning_rate", 0.1, "--resume", "never")
    assert [line["step"] for line in records(out, NAME)] == [*range(1, 5)]
    summary = json.loads((out / "runs" / NAME / "summary.json").read_text())
    assert (summary["step"], summary["rows"], summary["exit_code"]) == (4, 16, 0)
    assert summary["loss"] == records(out, NAME)[-1]["loss"] and summary["arguments"]["learning_rate"] == 0.1


def test_what_keeps_a_new_run_from_starting_keeps_the_old_one(data, tmp_path, run):
    """--resume never removes nothing before base, model and data have been found good."""
    out = tmp_path / "out"
    command = pretrain(data, out, "--batch_size", 4, "--epochs", 2)
    run(*command)
    misspelt = [*command, "--resume", "never", "--data_path", tmp_path / "typo.jsonl"]
    assert "typo.jsonl" in error_line(run(*misspelt, expect=1))
    assert "done before, after 4 steps" in run(*command).stderr
    run(*command, "--resume", "never", "--learning_rate", 0.1)
    assert "done before, after 4 steps" in run(*command, "--learning_rate", 0.1).stderr
    kept = sorted(path.name for path in (out / "runs" / NAME).iterdir())
    assert kept == ["checkpoints", "metrics.jsonl", "summary.json"]
    assert [path.name for path in (out / "runs" / NAME / "checkpoints").iterdir()] == ["step-4"]


@pytest.mark.slow
def test_ranks_started_again_go_on_with_the_new_run_alone(data, tmp_path, run):
    """torchrun repeats `--resume never` with each start; what it replaces may not be gone at the first."""
    out = tmp_path / "out"
    command = pretrain(data, out, "--batch_size", 4, "--epochs", 2)
    run(*command)
    never = [*command, "--resume", "never", "--learning_rate", 0.1]
    error_line(run(*never, "--data_path", tmp_path / "not_yet.jsonl", expect=1))
    run(*never, TORCHELASTIC_RESTART_COUNT="1")
    assert records(out, NAME)[0]["learning_rate"] == pytest.approx(0.1)
    assert "done before, after 4 steps" in run(*never, TORCHELASTIC_RESTART_COUNT="2").stderr


def test_a_checkpoint_can_be_named(data, tmp_path, run):
    out = tmp_path / "out"
    command = pretrain(data, out, "--batch_size", 2, "--epochs", 1, "--save_interval", 1)
    run(*command)
    whole = figures(out), (out / f"{NAME}.pth").read_bytes()
    run(*command, "--resume", out / "runs" / NAME / "checkpoints/step-3")
    assert (figures(out), (out / f"{NAME}.pth").read_bytes()) == whole
    nowhere = out / "runs" / NAME / "checkpoints/step-1"  # only two are kept
    line = error_line(run(*command, "--resume", nowhere, expect=1))
    assert f"--resume {nowhere}: not the folder of an intact checkpoint" in line


def test_sigusr1_saves_and_goes_on(data, tmp_path):
    out = tmp_path / "out"
    training = Training(pretrain(data, out, "--epochs", 100_000, "--num_workers", 1))
    assert training.wait_for(lambda: steps_of(out) > 3)
    assert not (out / f"{NAME}.pth").exists()
    training.signal(signal.SIGUSR1)
    assert training.wait_for(lambda: any((out / "runs" / NAME / "checkpoints").glob("step-*")))
    done = steps_of(out)
    assert training.wait_for(lambda: steps_of(out) > done + 3)
    training.signal(signal.SIGINT)
    assert training.end()[0] == 130


@pytest.mark.slow
def test_a_full_disk_costs_the_oldest_state_then_ends_the_run(data, tmp_path):
    """A file system of its own: for two states of 7 MB and the weights, but not for three; then for one."""
    if subprocess.run(["unshare", "-Urm", "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a file system")
    disk = tmp_path / "disk"
    disk.mkdir()
    flags = ["--batch_size", 4, "--save_interval", 1, "--trainable", "proj_llm", "--epochs", 2]
    mounted = (
        'mount -t tmpfs -o size="$1" tmpfs "$2" && shift 3 && "$@"; code=$?; cp -a "$0" "$0.copy"; exit $code'
    )

    def train_on(size: str) -> tuple[int, str, list[str]]:
        command = [sys.executable, *pretrain(data, disk / "out", *flags)]
        shell = ["unshare", "-Urm", "sh", "-c", mounted, disk, size, disk, "--", *command]
        result = subprocess.run(list(map(str, shell)), cwd=ROOT, capture_output=True, text=True, timeout=200)
        shutil.rmtree(tmp_path / "kept", ignore_errors=True)
        (tmp_path / "disk.copy").rename(tmp_path / "kept")
        saves = newest_first(tmp_path / "kept/out/runs" / NAME / "checkpoints")
        return (
            result.returncode,
            result.stderr,
            [(save.folder.name, save.intact()) for save in saves],
        )

    code, errors, kept = train_on("17m")
    assert code == 0 and "removing the oldest checkpoint" in errors, errors
    assert kept == [("step-4", True), ("step-3", True)]
    code, errors, kept = train_on("10m")
    assert code == 1 and "cannot write" in error_line(subprocess.CompletedProcess([], code, "", errors))
    assert kept == [("step-1", True)] and len(weights(tmp_path / "kept/out" / f"{NAME}.pth")) > 10


def test_bad_pictures_are_skipped_counted_and_listed(data, tmp_path, run):
    (data / "images/5.png").write_bytes(b"no picture")
    result = run(*pretrain(data, tmp_path / "out", "--batch_size", 4, "--epochs", 2, "--num_workers", 1))
    assert "skipped rows: 1, see" in result.stderr
    lines = (tmp_path / "out/runs" / NAME / "bad_samples.jsonl").read_text().splitlines()
    (listed,) = map(json.loads, lines)
    assert "captions.jsonl:6: cannot read image" in listed["error"]
    assert sum(line["skipped_rows"] for line in records(tmp_path / "out", NAME)) == 2


def test_a_broken_picture_in_the_evaluation_does_not_cost_what_was_learnt(data, tmp_path, run):
    rows = (data / "captions.jsonl").read_text().splitlines()
    (data / "eval.jsonl").write_text(rows[5] + "\n")
    (data / "captions.jsonl").write_text("\n".join(rows[:5]) + "\n")
    (data / "images/5.png").write_bytes(b"no picture")
    flags = ["--batch_size", 2, "--eval_data_path", data / "eval.jsonl", "--eval_interval", 2]
    result = run(*pretrain(data, tmp_path / "out", *flags, "--on_bad_sample", "error"), expect=1)
    assert "eval.jsonl:1: cannot read image" in error_line(result)
    assert json.loads((tmp_path / "out" / f"{NAME}.json").read_text())["step"] == 2


def test_a_step_that_is_not_finite_changes_nothing_and_is_listed(data, tmp_path, run):
    """One picture's features are not numbers."""
    flags = ["--batch_size", 2, "--epochs", 2, "--cache_features", tmp_path / "features"]
    run(*pretrain(data, tmp_path / "good", *flags))
    (shard,) = (tmp_path / "features").glob("*/*.npy")
    features = np.load(shard)
    features[3] = np.nan
    np.save(shard, features)
    result = run(*pretrain(data, tmp_path / "out", *flags))
    assert result.stderr.count("is skipped: loss nan") == 2
    listed = [json.loads(line) for line in (tmp_path / "out/runs" / NAME / "bad_batches.jsonl").open()]
    assert len(listed) == 2 and all(len(line["rows"]) == 2 for line in listed)
    (bad,) = set(listed[0]["rows"]) & set(listed[1]["rows"])
    lines = records(tmp_path / "out", NAME)
    assert lines[-1]["bad_steps"] == 2 and sum(line["loss"] is None for line in lines) == 2
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path / "out" / f"{NAME}.pth").values())
    digests = json.loads(shard.with_suffix(".json").read_text())
    picture = data / "images" / f"{int(bad.split(':')[1]) - 1}.png"
    assert digests[3] == hashlib.sha256(picture.read_bytes()).hexdigest()


def test_too_many_bad_steps_end_the_run_with_good_weights(data, tmp_path, run):
    """With such a rate everything is lost after the first step."""
    flags = ["--batch_size", 2, "--learning_rate", 1e30, "--trainable", "proj_llm", "--max_bad_steps", 2]
    line = error_line(run(*pretrain(data, tmp_path / "out", *flags), expect=1))
    assert "3 steps in a row were bad" in line and "--max_bad_steps is 2" in line and "bad_batches" in line
    sidecar = json.loads((tmp_path / "out" / f"{NAME}.json").read_text())
    assert sidecar["step"] == records(tmp_path / "out", NAME)[-1]["step"]


def test_a_spike_is_skipped_if_asked_for(data, tmp_path, run):
    lines = [json.loads(line) for line in (data / "texts.jsonl").read_text().splitlines()] * 12
    lines.append({"text": " ".join("zqxj" for _ in range(60))})
    (data / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    language = [flag for flag in TINY if flag not in ("--vision_model_path", TINY_ENCODER)]
    common = ["scripts/train_lm.py", *language, "--data_path", data / "texts.jsonl", "--batch_size", 1]
    common += ["--learning_rate", 1e-2, "--epochs", 2]
    run(*common, "--out_dir", tmp_path / "plain")
    assert records(tmp_path / "plain", "lm_64")[-1]["bad_steps"] == 0
    run(*common, "--out_dir", tmp_path / "guarded", "--loss_spike", 2)
    listed = [json.loads(line) for line in (tmp_path / "guarded/runs/lm_64/bad_batches.jsonl").open()]
    assert [line["rows"] for line in listed][-1] == ["texts.jsonl:97"] and "times its mean" in listed[0][
        "reason"
    ]


def test_a_killed_data_worker_gives_a_message_not_a_hang(data, tmp_path):
    out = tmp_path / "out"
    training = Training(pretrain(data, out, "--epochs", 100_000, "--num_workers", 1, "--save_interval", 2))
    assert training.wait_for(lambda: steps_of(out) > 2)
    assert training.wait_for(lambda: children(training.process.pid))
    deadline = time.monotonic() + 60
    while training.process.poll() is None:  # one that has delivered its last batch is not missed
        assert time.monotonic() < deadline, "it hangs"
        for child in children(training.process.pid):
            os.kill(child, signal.SIGKILL)
        time.sleep(0.05)
    code, errors = training.end(10)
    line = error_line(subprocess.CompletedProcess([], code, "", errors))
    assert code == 1 and "a process that prepares batches was killed" in line and "--num_workers" in line
    assert any((out / "runs" / NAME / "checkpoints").glob("step-*"))
