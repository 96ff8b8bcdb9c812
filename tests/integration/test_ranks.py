"""Several ranks under torchrun: other numbers of them, ranks that die or hang, signals, two nodes."""

import json
import os
import re
import signal
import socket
import time
from pathlib import Path

import pytest
from test_faults import NAME, Training, assert_same_run, children, figures, long_run, steps_of
from test_training import pretrain, records, weights

TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node"]
TWO = [*TORCHRUN, 2, "--standalone"]


def workers(training: Training) -> list[int]:
    """Process numbers of the ranks, in their order."""
    found = {}
    for pid in children(training.process.pid):
        environment = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
        ranks = [entry for entry in environment if entry.startswith("RANK=")]
        if ranks:
            found[int(ranks[0].removeprefix("RANK="))] = pid
    return [found[rank] for rank in sorted(found)]


@pytest.mark.slow
def test_ranks_and_accumulation_may_change_in_the_middle(data, tmp_path, run):
    """1 rank x 2, then 2 x 1, then 1 x 2: each row once an epoch, the same losses."""
    out = tmp_path / "out"
    flags = ["--epochs", 24]
    one, two = ["--accumulation_steps", 2], ["--accumulation_steps", 1]
    run(*long_run(data, tmp_path / "whole", *flags, *one))
    for launcher, split, after in (([], one, 15), (TWO, two, 40)):
        training = Training([*launcher, *long_run(data, out, *flags, *split)])
        assert training.wait_for(lambda after=after: steps_of(out) > after)
        training.process.terminate()
        code, errors = training.end()
        assert code == (1 if launcher else 143), errors
    assert steps_of(out) < 96
    run(*long_run(data, out, *flags, *one))
    found, expected = figures(out), figures(tmp_path / "whole")
    assert [step for step, *_ in found] == [step for step, *_ in expected] == [*range(1, 97)]
    assert [loss for _, _, loss, _ in found] == pytest.approx([loss for _, _, loss, _ in expected], abs=1e-3)
    supervised = [
        [line["supervised_tokens"] for line in records(place, NAME)] for place in (out, tmp_path / "whole")
    ]
    assert supervised[0] == supervised[1]  # the rows of each step were the same


@pytest.mark.slow
def test_a_killed_rank_is_started_again_and_nothing_changes(data, tmp_path, run):
    flags = ["--epochs", 20]
    run(*TWO, *long_run(data, tmp_path / "whole", *flags))
    out = tmp_path / "out"
    training = Training([*TWO, "--max-restarts", 1, *long_run(data, out, *flags)])
    assert training.wait_for(lambda: steps_of(out) > 12)
    os.kill(workers(training)[1], signal.SIGKILL)
    code, errors = training.end(180)
    assert code == 0, errors
    assert_same_run(out, tmp_path / "whole")


@pytest.mark.slow
def test_a_hanging_rank_is_given_up_and_started_again(data, tmp_path):
    out = tmp_path / "out"
    command = long_run(data, out, "--epochs", 20, "--timeout_seconds", 5)
    training = Training([*TWO, "--max-restarts", 1, *command])
    assert training.wait_for(lambda: steps_of(out) > 12)
    os.kill(workers(training)[1], signal.SIGSTOP)
    code, errors = training.end(180)
    assert code == 0 and "has not answered within --timeout_seconds" in errors, errors
    assert [step for step, *_ in figures(out)] == [*range(1, 81)]


@pytest.mark.slow
def test_an_exception_on_one_rank_ends_all_and_is_shown_once(data, tmp_path, run):
    start = time.monotonic()
    command = long_run(data, tmp_path / "out", "--timeout_seconds", 20)[1:]
    result = run(*TWO, "tests/integration/fault_worker.py", *command, expect=1, timeout=120)
    assert result.stderr.count("LookupError: nobody foresaw this") == 1
    assert len(re.findall(r"^Traceback", result.stderr, re.MULTILINE)) <= 2  # torchrun adds its own
    assert time.monotonic() - start < 100


@pytest.mark.slow
def test_torchrun_passes_sigterm_on_and_sigusr1_goes_to_the_workers(data, tmp_path):
    out = tmp_path / "out"
    saves = out / "runs" / NAME / "checkpoints"
    training = Training([*TWO, *long_run(data, out, "--epochs", 100_000, "--save_interval", 10**6)])
    assert training.wait_for(lambda: steps_of(out) > 3)
    assert not saves.exists()
    os.kill(workers(training)[1], signal.SIGUSR1)  # one is enough
    assert training.wait_for(lambda: any(saves.glob("step-*")))
    done = steps_of(out)
    assert training.wait_for(lambda: steps_of(out) > done + 2)
    os.kill(training.process.pid, signal.SIGTERM)  # the agent alone
    code, errors = training.end()
    assert code == 1, errors  # the agent's own
    assert json.loads((saves.parent / "summary.json").read_text())["exit_code"] == 143
    sidecar = json.loads((out / f"{NAME}.json").read_text())
    assert sidecar["step"] == steps_of(out) and len(weights(out / f"{NAME}.pth")) > 10


@pytest.mark.slow
def test_two_nodes_train_as_one_and_start_again_together(data, tmp_path, run):
    """Two agents on loopback addresses, one rank each, as on two machines with a shared folder."""
    flags = ["--epochs", 10]
    run(*TWO, *long_run(data, tmp_path / "whole", *flags))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = tmp_path / "out"
    meeting = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}", "--rdzv_id", "test"]
    command = [*TORCHRUN, 1, "--nnodes", 2, "--max-restarts", 1, *meeting]
    agents = [
        Training(
            [*command, "--local_addr", f"127.0.0.{node}", *long_run(data, out, *flags)],
            TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
        )
        for node in (1, 2)
    ]
    assert agents[0].wait_for(lambda: steps_of(out) > 12)
    os.kill(workers(agents[1])[0], signal.SIGKILL)
    ends = [agent.end(180) for agent in agents]
    assert [code for code, _ in ends] == [0, 0], ends
    assert_same_run(out, tmp_path / "whole")


def two_hosts(commands: list[list]) -> list[tuple[int, str]]:
    """Exit code and stderr of a rank each, started as on hosts that share no disk."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [Training(command, RANK=str(rank), **meeting) for rank, command in enumerate(commands)]
    return [rank.end() for rank in ranks]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["rows", "checkpoint", "named checkpoint", "base"])
def test_ranks_that_see_other_files_end_in_one_line(data, tmp_path, run, what):
    here, there = tmp_path / "here", tmp_path / "there"
    command = pretrain(data, here, "--batch_size", 2, "--epochs", 1)
    own: list = []
    if "checkpoint" in what:
        run(*command)
        before = (here / f"{NAME}.pth").read_bytes()
        (saved,) = (here / f"runs/{NAME}/checkpoints").iterdir()
        if "named" in what:
            command, own = [*command, "--resume", saved], ["--resume", saved.name]
    elif what == "base":
        run(*pretrain(data, tmp_path / "base", "--batch_size", 8, "--epochs", 1))
        own = ["--from_weight", tmp_path / "base" / f"{NAME}.pth"]
    else:
        rows = (data / "captions.jsonl").read_text().splitlines(keepends=True)
        (data / "fewer.jsonl").write_text("".join(rows[1:]))
        own = ["--data_path", data / "fewer.jsonl"]
    other = [there if part == here else part for part in command]
    (code, errors), (other_code, other_errors) = two_hosts([command, [*other, *own]])
    assert (code, other_code) == (1, 1), errors + other_errors
    expected = "rows" if what == "rows" else "checkpoint and weights to start from"
    assert f"error: the ranks do not see the same {expected}: " in errors
    assert "Traceback" not in errors + other_errors and "error: " not in other_errors
    if "checkpoint" in what:
        assert (here / f"{NAME}.pth").read_bytes() == before


@pytest.mark.slow
def test_answers_are_given_once_whatever_the_ranks(data, tmp_path, run):
    flags = ["--epochs", 2, "--dtype", "float32", "--learning_rate", 1e-2, "--trainable", "proj_llm"]
    samples = ["--sample_data_path", data / "captions.jsonl", "--sample_rows", 3, "--eval_interval", 2]
    one = pretrain(data, tmp_path / "one", *flags, "--batch_size", 4)
    two = pretrain(data, tmp_path / "two", *flags, "--batch_size", 2)
    plain = [tmp_path / "plain" if part == tmp_path / "two" else part for part in two]
    run(*one, *samples)
    run(*TWO, *two, *samples)
    run(*TWO, *plain)
    found = [(tmp_path / name / "runs" / NAME / "samples.jsonl").read_text() for name in ("one", "two")]
    assert found[0] == found[1] and found[0].count("\n") == 2
    assert [one["where"] for one in json.loads(found[0].splitlines()[0])["answers"]] == [
        f"captions.jsonl:{number}" for number in (1, 3, 6)
    ]
    assert (tmp_path / f"two/{NAME}.pth").read_bytes() == (tmp_path / f"plain/{NAME}.pth").read_bytes()


@pytest.mark.slow
def test_all_ranks_end_where_the_pictures_to_ask_about_cannot_be_read(data, tmp_path, run):
    (data / "images/broken.png").write_bytes(b"no picture")
    rows = json.loads((data / "captions.jsonl").read_text().splitlines()[0]) | {"image": "broken.png"}
    (data / "samples.jsonl").write_text(json.dumps(rows))
    command = pretrain(data, tmp_path / "out", "--sample_data_path", data / "samples.jsonl")
    result = run(*TWO, *command, expect=1)
    told = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and "samples.jsonl:1: cannot read image" in told[0]
