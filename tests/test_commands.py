"""The two commands of the README, with stubs in place of Python, pip, training and the GPU: nothing is
installed or trained. Stubs log their arguments and leave the files that the real commands would leave."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from test_layout import LAYERS

from inference.answers import Question
from inference.scoring.accuracy import score

STAGES = ["lm", "pretrain", "sft", "seen", "unseen", "blank", "export"]
LAST = ["report", "page"]  # they always run, as data does
CODE = {path.relative_to(ROOT).parent for layer in LAYERS for path in (ROOT / layer).rglob("*.py")}
PARTS = {  # one small file stands for all those that a pattern of quickstart.sh names
    "code": ["a.py", *sorted(str(folder / "a.py") for folder in CODE)],
    "encoder": ["model/tokenizer/tokenizer.json", "model/vision_model/demo-encoder/model.safetensors"],
}
TORCH = re.search(r"^torch==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
UV = re.search(r"^uv_version=(.+)$", (ROOT / "scripts/install.sh").read_text(), re.MULTILINE)[1]
TWO_GPUS = "GPU 0: NVIDIA H100 (UUID: GPU-0)\nGPU 1: NVIDIA H100 (UUID: GPU-1)\n"
PIP = "python -m pip install --quiet"
NEW_VENV = "python3 -m venv --clear .venv"
CPU_TORCH = f"{PIP} torch=={TORCH}+cpu"
GPU_TORCH = f"{PIP} --force-reinstall torch=={TORCH}"
OTHERS = f"{PIP} -r requirements.txt -c constraints.txt"

# Every stub is this script, acting by the name it is called by. FAIL: exit with 7 where the command matches;
# HANG: wait there for Ctrl-C, then end with 1, as pip does.
STUB = r"""#!/usr/bin/env bash
name=${0##*/}
case $name in
    nvidia-smi) printf '%s' "$GPUS"; exit $((!${#GPUS})) ;;
    uname) echo "$MACHINE"; exit ;;
esac
[ "$1" = -c ] && exit # is it new enough, has it pip?
command="$name $*"
value() { [[ $command =~ " $1 "([^ ]+) ]] && echo "${BASH_REMATCH[1]}"; }

(IFS=$'\t'; echo "$name"$'\t'"$*" >>log)
if [[ $HANG && $command =~ $HANG ]]; then
    trap 'exit 1' INT
    touch hangs
    sleep 60
fi
[[ $FAIL && $command =~ $FAIL ]] && exit 7

leave() { mkdir -p "${1%/*}" && touch "$1"; }
case "$1 $2" in
    "-m venv")
        rm -rf .venv && mkdir -p .venv/bin
        for tool in python uv ruff; do cp "$0" .venv/bin/$tool; done
        ;;
    *make_demo_data.py*) made=$(value --out_dir)/manifest.json && leave "$made" && cp drawings "$made" ;;
    *train_*)
        stage=${1#*train_} && stage=${stage%.py} && out=$(value --out_dir)
        leave "$out/${stage}_128.pth" && leave "$out/runs/${stage}_128/metrics.jsonl"
        ;;
    eval_vlm.py*) leave "$(value --report)" ;;
    convert_to_hf.py*) leave "$(value --out)/model.safetensors" ;;
esac
"""


class Copy:
    """A copy of the commands in a folder of its own, with stubs first on the PATH."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {"GPUS": "", "MACHINE": "Linux x86_64", "FAIL": "", "HANG": ""}

    def path(self, name: str) -> Path:
        return self.folder / name

    def fill(self) -> None:
        scripts = ("install.sh", "quickstart.sh", "test.sh")
        for name in ("requirements.txt", "constraints.txt", *(f"scripts/{script}" for script in scripts)):
            self.write(name, (ROOT / name).read_text(encoding="utf-8"))
        for name in (*PARTS["code"], *PARTS["encoder"], "drawings"):
            self.write(name, "as it was\n")
        for name in ("python3", "nvidia-smi", "uname"):
            self.write(f"stubs/{name}", STUB)
            self.path(f"stubs/{name}").chmod(0o755)

    def write(self, name: str, text: str) -> None:
        self.path(name).parent.mkdir(parents=True, exist_ok=True)
        self.path(name).write_text(text, encoding="utf-8")

    def start(self, *command: str, **environment: str) -> subprocess.Popen:
        self.path("log").unlink(missing_ok=True)
        inherited = {name: text for name, text in os.environ.items() if name != "PYTHON"}
        path = f"{self.path('stubs')}:{os.environ['PATH']}"
        return subprocess.Popen(
            ["bash", *command],
            cwd=self.folder,
            env={**inherited, **self.environment, **environment, "PATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess:
        process = self.start(*command, **environment)
        stdout, stderr = process.communicate(timeout=60)
        return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)

    def interrupt(self, *command: str, **environment: str) -> subprocess.CompletedProcess:
        """Presses Ctrl-C as soon as the stub hangs."""
        process = self.start(*command, **environment)
        while not self.path("hangs").exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
        return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)

    def install(self, **environment: str) -> subprocess.CompletedProcess:
        return self.run(*INSTALL, **environment)

    def quickstart(self, **environment: str) -> subprocess.CompletedProcess:
        return self.run("scripts/quickstart.sh", **environment)

    @property
    def log(self) -> list[list[str]]:
        log = self.path("log")
        return [line.split("\t") for line in log.read_text().splitlines()] if log.exists() else []

    @property
    def commands(self) -> list[str]:
        return [" ".join(entry) for entry in self.log]


INSTALL = ("-c", "set -euo pipefail; source scripts/install.sh; install")


@pytest.fixture
def fresh(tmp_path: Path) -> Copy:
    copy = Copy(tmp_path / "fresh")
    copy.fill()
    return copy


@pytest.fixture(scope="module")
def finished_once(tmp_path_factory: pytest.TempPathFactory) -> tuple[Copy, subprocess.CompletedProcess]:
    copy = Copy(tmp_path_factory.mktemp("finished") / "copy")
    copy.fill()
    return copy, copy.quickstart()


@pytest.fixture
def finished(finished_once, tmp_path: Path) -> Copy:
    """The quickstart has been run in it, once, to the end."""
    copy, result = finished_once
    assert result.returncode == 0, result.stderr
    shutil.copytree(copy.folder, tmp_path / "finished", symlinks=True)
    return Copy(tmp_path / "finished")


def started(result: subprocess.CompletedProcess) -> list[str]:
    return re.findall(r"^== (\w+)$", result.stdout, re.MULTILINE)


def skipped(result: subprocess.CompletedProcess) -> list[str]:
    return re.findall(r"^== (\w+): done before$", result.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("gpus", "machine", "torch"),
    [
        pytest.param("", "Linux x86_64", CPU_TORCH, id="no GPU"),
        pytest.param(TWO_GPUS, "Linux x86_64", GPU_TORCH, id="two GPUs"),
        pytest.param("", "Darwin arm64", GPU_TORCH, id="Mac"),
    ],
)
def test_installs_the_build_of_torch_that_the_machine_needs(fresh: Copy, gpus, machine, torch):
    result = fresh.install(GPUS=gpus, MACHINE=machine)

    assert result.returncode == 0, result.stderr
    assert fresh.commands == [NEW_VENV, torch, OTHERS]


def test_takes_the_cpu_build_from_where_uv_knows_it_to_be(fresh: Copy):
    result = fresh.install(FAIL=r"\+cpu")

    assert result.returncode == 0, result.stderr
    uv = f"uv pip install --quiet --python .venv/bin/python --torch-backend cpu torch=={TORCH}"
    assert fresh.commands == [NEW_VENV, CPU_TORCH, f"{PIP} uv=={UV}", uv, OTHERS]


def test_second_run_installs_nothing(fresh: Copy):
    fresh.install()
    result = fresh.install()

    assert result.stdout == "packages: already in .venv\n"
    assert fresh.commands == []


@pytest.mark.parametrize(
    ("fail", "message"),
    [
        ("-m venv", "error: cannot make .venv"),
        ("torch==", f"error: cannot install torch {TORCH} (cpu build)"),
        (r"\+cpu|uv==", f"error: cannot install torch {TORCH} (cpu build)"),
        ("-r requirements.txt", "== packages: failed with exit code 7"),
    ],
)
def test_failed_installation_ends_the_command_and_is_made_up_for(fresh: Copy, fail, message):
    failed = fresh.install(FAIL=fail)
    again = fresh.install()

    assert failed.returncode != 0
    assert failed.stderr.splitlines()[0].startswith(message)
    assert again.returncode == 0
    assert fresh.commands[-2:] == [CPU_TORCH, OTHERS]


def test_no_python_is_one_clear_line(fresh: Copy):
    result = fresh.install(PYTHON="/nowhere/python")

    assert result.returncode == 1
    assert result.stderr.splitlines()[0].startswith("error: no Python 3.11 or newer found")


def break_without_pip(venv: Path) -> None:
    shutil.rmtree(venv)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)


def break_with_dangling_link(venv: Path) -> None:
    (venv / "bin/python").unlink()
    (venv / "bin/python").symlink_to("/nowhere/python3.11")


def break_with_old_python(venv: Path) -> None:
    pretend = "import sys; sys.version_info = (3, 10); sys.modules['pip'] = sys; exec(sys.argv[1])"
    script = f'#!/bin/sh\n[ "$1" = -c ] && exec "{sys.executable}" -c "{pretend}" "$2"\nexit 9\n'
    (venv / "bin/python").write_text(script)


@pytest.mark.parametrize("damage", [break_without_pip, break_with_dangling_link, break_with_old_python])
def test_broken_environment_is_made_anew(fresh: Copy, damage):
    fresh.install()
    mark = fresh.path(".venv/installed").read_text()
    damage(fresh.path(".venv"))
    fresh.write(".venv/installed", mark)
    result = fresh.install()

    assert result.returncode == 0, result.stderr
    assert fresh.commands == [NEW_VENV, CPU_TORCH, OTHERS]


def test_a_later_gpu_gets_its_build(fresh: Copy):
    fresh.install()
    fresh.install(GPUS=TWO_GPUS)

    assert fresh.commands == [GPU_TORCH, OTHERS]


def test_newer_pins_are_installed(fresh: Copy):
    fresh.install()
    fresh.write("constraints.txt", f"torch=={TORCH}\nnumpy==9\n")
    fresh.install()

    assert fresh.commands == [CPU_TORCH, OTHERS]


def test_ctrl_c_ends_the_installation(fresh: Copy):
    stopped = fresh.interrupt(*INSTALL, HANG="torch==")
    during = fresh.commands
    again = fresh.install()

    assert stopped.returncode == 130
    assert "run the same command again" in stopped.stderr
    assert during == [NEW_VENV, CPU_TORCH]
    assert again.returncode == 0
    assert fresh.commands == [CPU_TORCH, OTHERS]


def test_quickstart_runs_every_stage_in_order(finished_once):
    copy, result = finished_once

    assert result.returncode == 0, result.stderr
    assert started(result) == ["packages", "data", *STAGES, *LAST]
    assert [args[0] for name, *args in copy.log if name == "python" and args[0] != "-m"] == [
        "scripts/demo/make_demo_data.py",
        "scripts/train_lm.py",
        "scripts/demo/loss_bands.py",
        "train_pretrain_vlm.py",
        "scripts/demo/loss_bands.py",
        "train_sft_vlm.py",
        "scripts/demo/loss_bands.py",
        *["eval_vlm.py"] * 3,
        "convert_to_hf.py",
        "scripts/demo/demo_report.py",
        "scripts/report.py",
    ]
    assert f"in a browser: {copy.path('out/demo/report.html')}\n" in result.stdout


def test_quickstart_runs_nothing_twice(finished: Copy):
    seconds = finished.path("out/demo/done/data").read_text()
    result = finished.quickstart()

    assert result.returncode == 0, result.stderr
    assert started(result) == ["data", *LAST]
    assert skipped(result) == STAGES
    assert finished.path("out/demo/done/data").read_text() == seconds


@pytest.mark.parametrize(
    ("stage", "fail"), [("data", "make_demo_data"), ("sft", "train_sft"), ("blank", "--blank_images")]
)
def test_quickstart_goes_on_from_the_stage_that_failed(fresh: Copy, stage, fail):
    stages = ["data", *STAGES, *LAST]
    failed = fresh.quickstart(FAIL=fail)
    again = fresh.quickstart()

    assert failed.returncode == 7
    assert failed.stderr == f"== {stage}: failed with exit code 7\n"
    assert started(failed) == ["packages", *stages[: stages.index(stage) + 1]]
    assert again.returncode == 0, again.stderr
    assert started(again) == list(dict.fromkeys(["data", *stages[stages.index(stage) :]]))


def test_quickstart_goes_on_after_ctrl_c(fresh: Copy):
    stopped = fresh.interrupt("scripts/quickstart.sh", HANG="train_sft")
    again = fresh.quickstart()

    assert stopped.returncode == 130
    assert started(again) == ["data", *STAGES[STAGES.index("sft") :], *LAST]


@pytest.mark.parametrize("name", [*PARTS["code"], *PARTS["encoder"], "drawings"])
def test_quickstart_redoes_what_another_code_encoder_or_data_made(finished: Copy, name):
    finished.write(name, "changed\n")

    assert started(finished.quickstart()) == ["data", *STAGES, *LAST]


@pytest.mark.parametrize(
    ("output", "stage"),
    [
        ("lm_*.pth", "lm"),
        ("pretrain_vlm_*.pth", "pretrain"),
        ("sft_vlm_*.pth", "sft"),
        ("report_seen.json", "seen"),
        ("report_blank.json", "blank"),
        ("hf/model.safetensors", "export"),
    ],
)
def test_quickstart_redoes_a_missing_output_and_what_follows(finished: Copy, output, stage):
    (found,) = finished.path("out/demo").glob(output)
    found.unlink()

    assert started(finished.quickstart()) == ["data", *STAGES[STAGES.index(stage) :], *LAST]


def test_quickstart_redoes_a_stage_with_other_flags_and_what_follows(finished: Copy):
    script = finished.path("scripts/quickstart.sh").read_text(encoding="utf-8")
    finished.write("scripts/quickstart.sh", script.replace("train_sft_vlm.py ", "train_sft_vlm.py --seed 1 "))

    assert started(finished.quickstart()) == ["data", *STAGES[STAGES.index("sft") :], *LAST]


def test_quickstart_compares_the_losses_of_each_training_and_goes_on_whatever_they_are(fresh: Copy):
    result = fresh.quickstart(FAIL="loss_bands")

    runs = [f"out/demo/runs/{stage}_128" for stage in ("lm", "pretrain_vlm", "sft_vlm")]
    compared = [f"python scripts/demo/loss_bands.py {run}" for run in runs]
    assert [command for command in fresh.commands if "loss_bands" in command] == compared
    assert started(result) == ["packages", "data", *STAGES, *LAST]


def test_quickstart_lets_a_stopped_training_go_on_unless_its_flags_change(fresh: Copy):
    state = fresh.path("out/demo/runs/sft_vlm_128/checkpoints/step-1/state.pt")
    fresh.interrupt("scripts/quickstart.sh", HANG="train_sft")
    state.parent.mkdir(parents=True)
    state.write_bytes(b"state")
    fresh.interrupt("scripts/quickstart.sh", HANG="train_sft")
    assert state.exists()
    script = fresh.path("scripts/quickstart.sh").read_text(encoding="utf-8")
    fresh.write("scripts/quickstart.sh", script.replace("train_sft_vlm.py ", "train_sft_vlm.py --seed 1 "))
    fresh.quickstart()
    assert not state.exists()


def test_tests_command_lints_and_passes_its_arguments_on(fresh: Copy):
    result = fresh.run("scripts/test.sh", "-k", "two words")

    assert result.returncode == 0, result.stderr
    assert fresh.log[-3:] == [
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
        ["python", "-m", "pytest", "-n", "2", "--dist", "loadfile", "-k", "two words"],
    ]


def test_tests_command_ends_with_the_code_of_pytest(fresh: Copy):
    assert fresh.run("scripts/test.sh", FAIL="-m pytest").returncode == 7


@pytest.mark.parametrize("page", ["README.md", "README_zh.md"])
def test_ci_runs_the_tests_as_the_readme_says(page):
    command = "bash scripts/test.sh"

    assert (ROOT / ".ci/run").read_text().splitlines()[-1] == command
    assert f"```bash\n{command}\n```" in (ROOT / page).read_text(encoding="utf-8")


def test_report_puts_the_figures_together(tmp_path: Path):
    kinds = ["this", "kindof", "either", "what", "where", "count", "which", "kind"]

    def write_report(name: str, right: dict[str, int]) -> None:
        """Of 8 questions of each kind; the first 3 answers of a kind are "yes", the others differ."""
        questions, answers = [], []
        for number in range(8):
            for kind in kinds:
                expected = "yes" if number < 3 else f"{kind} {number}"
                asked = [{"role": "user", "content": f"<image>{kind}?"}]
                questions.append(Question("row", asked, ["a.png"], kind, expected))
                answers.append(expected if number < right[kind] else "wrong")
        (tmp_path / f"report_{name}.json").write_text(json.dumps(score(questions, answers)))

    write_report("seen", dict.fromkeys(kinds, 6))
    write_report("unseen", {**dict.fromkeys(kinds, 4), "this": 8})
    write_report("blank", dict.fromkeys(kinds, 2))
    (tmp_path / "done").mkdir()
    (tmp_path / "done/lm").write_text("12\n123 456 train_lm.py --flags\n")
    (tmp_path / "done/data").write_text('30\n{"pictures": 12000}\n')
    command = [sys.executable, ROOT / "scripts/demo/demo_report.py", "--out_dir", tmp_path]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout

    report = json.loads((tmp_path / "report.json").read_text())
    training = json.loads((ROOT / "model/vision_model/demo-encoder/training.json").read_text())
    assert report["accuracy"] == (7 * 4 + 8) / 64
    assert report["accuracy_seen"] == 0.75
    assert report["by_kind"] == {**dict.fromkeys(kinds, 0.5), "this": 1.0}
    assert report["majority"] == 3 / 8
    assert report["blank"] == 0.25
    assert report["encoder"] == training["scores"]["held_out"]["all"]
    assert report["seconds"] == {"data": 30, "lm": 12}
    rows = [line.split() for line in printed.splitlines()]
    assert ["this", "0.75", "1.00", "0.25", "0.38"] in rows
    assert ["count", "0.75", "0.50", "0.25", "0.38"] in rows
    assert ["mean", "0.75", "0.56", "0.25", "0.38"] in rows
    assert "42 seconds in all" in printed
