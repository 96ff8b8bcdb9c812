"""What a run shows while it goes on: answers below the progress bar, on a terminal alone."""

import io
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tqdm.utils import disp_len

from common.distributed import Runtime
from trainer.metrics import Metrics
from trainer.state import Progress

ANSWERS = [
    {"question": "What is\nthis?", "expected": "a cat", "answer": "a \x1b[2Jdog", "picture": None},
    {"question": "这是什么？", "expected": "一只猫", "answer": "一" * 60, "picture": None},
]


class Terminal(io.StringIO):
    """Takes what a program writes, as a terminal does, and knows what is then to be seen."""

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        return -1

    def screen(self) -> list[str]:
        lines: list[list[str]] = [[]]  # of cells, two for a wide character
        row = column = 0
        for piece in self.getvalue().replace("\x1b[A", "\v"):
            if piece in "\r\n\v":
                row, column = row + {"\n": 1, "\v": -1}.get(piece, 0), column if piece == "\v" else 0
                lines += [[] for _ in range(row + 1 - len(lines))]
            else:
                cells = [piece, ""][: disp_len(piece)]
                lines[row] += [" "] * (column - len(lines[row]))
                lines[row][column : column + len(cells)] = cells
                column += len(cells)
        return ["".join(line).rstrip() for line in lines]


def metrics_of(run_dir: Path) -> Metrics:
    return Metrics(run_dir, 9, Runtime(torch.device("cpu")), "sft_vlm")


@pytest.mark.parametrize("name", ["metrics", "samples", "bad_samples", "bad_batches"])
def test_a_resumed_run_goes_on_with_the_files_of_its_step(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_dir = Path("out/runs/sft_vlm")  # as --out_dir is by default: relative
    run_dir.mkdir(parents=True)
    path = run_dir / f"{name}.jsonl"
    lines = [f'{{"step": {step}, "error": "row {step}"}}\n' for step in (1, 2, 3)]
    path.write_text("".join(lines) + '{"step": 4')
    Metrics(run_dir, 9, Runtime(torch.device("cpu")), "sft_vlm", resumed_step=2).close()
    assert path.read_text() == "".join(lines[:2])


@pytest.fixture
def on_terminal(tmp_path, monkeypatch) -> Callable[[], tuple[Metrics, Terminal]]:
    """To be called in the test: pytest sets stderr anew after the fixtures."""

    def on_terminal() -> tuple[Metrics, Terminal]:
        terminal = Terminal()
        monkeypatch.setattr("sys.stderr", terminal)
        monkeypatch.setattr(logging.getLogger(), "handlers", [logging.StreamHandler(terminal)])
        monkeypatch.setattr("os.get_terminal_size", lambda number: os.terminal_size((61, 24)))
        return metrics_of(tmp_path), terminal

    return on_terminal


def report(metrics: Metrics, step: int) -> None:
    metrics.report(Progress(step=step), 1e-3)


def test_each_report_shows_the_next_answer_below_the_bar(on_terminal):
    metrics, terminal = on_terminal()
    report(metrics, 1)
    (bar,) = terminal.screen()
    metrics.show(2, ANSWERS)
    assert terminal.screen() == [bar, "What is this? (expected: a cat)", "answer: a [2Jdog"]
    report(metrics, 3)
    cut = "answer: " + "一" * 26  # two columns each
    assert terminal.screen()[1:] == ["这是什么？ (expected: 一只猫)", cut]
    report(metrics, 4)
    assert terminal.screen()[1:] == ["What is this? (expected: a cat)", "answer: a [2Jdog"]
    metrics.close()


def test_messages_stand_above_the_bar_and_nothing_is_left_below(on_terminal):
    metrics, terminal = on_terminal()
    metrics.show(2, ANSWERS)
    logging.getLogger("trainer").warning("warning: step 3 is skipped")
    told, bar, *below = terminal.screen()
    assert told == "warning: step 3 is skipped" and bar.startswith("sft_vlm:")
    assert below == ["What is this? (expected: a cat)", "answer: a [2Jdog"]
    metrics.close()
    assert [line for line in terminal.screen() if line] == [told, bar]


def test_nothing_is_shown_where_there_is_no_terminal(tmp_path, capsys):
    metrics = metrics_of(tmp_path)
    metrics.show(2, ANSWERS)
    report(metrics, 3)
    metrics.close()
    assert "expected" not in capsys.readouterr().err


def test_pictures_stay_out_of_the_file(tmp_path):
    metrics = metrics_of(tmp_path)
    metrics.show(2, ANSWERS)
    metrics.show(4, ANSWERS)
    written = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text("utf-8").splitlines()]
    bare = [{name: one[name] for name in ("question", "expected", "answer")} for one in ANSWERS]
    assert written == [{"step": 2, "answers": bare}, {"step": 4, "answers": bare}]


def test_a_full_disk_is_told_as_it_is_for_metrics(tmp_path):
    metrics = metrics_of(tmp_path)
    (tmp_path / "samples.jsonl").mkdir()
    metrics.show(2, ANSWERS)
    assert str(metrics.failure).startswith(f"cannot write {tmp_path / 'samples.jsonl'}: ")
