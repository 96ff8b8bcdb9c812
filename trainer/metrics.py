"""What a run reports: progress bar, `metrics.jsonl`, `samples.jsonl`, tracker, lists of rows in trouble.

Only the main process writes; each rank appends to the lists what it met itself.
"""

import contextlib
import itertools
import json
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from common.cli import CONTROLS, ToldElsewhere, UserError, user_errors
from common.distributed import Runtime, peak_memory_bytes
from dataset.errors import DataError
from dataset.files import write_atomically
from trainer.state import Progress
from trainer.trackers import Tracker

log = logging.getLogger(__name__)

SUMMED = ("loss", "aux_loss", "supervised_tokens", "tokens", "rows", "learnt_rows", "skipped_rows")


class Metrics:
    """Collects what each step did on this rank and reports all ranks together at intervals.

    A line of `metrics.jsonl` covers the steps since the line before: `loss` is the mean over their supervised
    tokens, `aux_loss` over their rows; rates are per second of all ranks together; `seconds` counts from the
    first step, without the time between a stop and its resumption; `peak_memory_bytes` is the main process's.
    A run resumed from `resumed_step` goes on with the files as they were at that step."""

    def __init__(
        self,
        run_dir: Path,
        total_steps: int,
        runtime: Runtime,
        description: str,
        tracker: Tracker | None = None,
        resumed_step: int = 0,
    ):
        self.run_dir, self.runtime, self.tracker = run_dir, runtime, tracker
        self.bad_samples, self.bad_batches = run_dir / "bad_samples.jsonl", run_dir / "bad_batches.jsonl"
        with runtime.together(), user_errors(f"--out_dir: cannot write {run_dir}"):
            if runtime.is_main:
                for name in ("metrics", "samples", "bad_samples", "bad_batches"):
                    keep_steps(run_dir / f"{name}.jsonl", resumed_step)
        where = {"total": total_steps, "initial": resumed_step, "disable": not runtime.is_main}
        self.bar = tqdm(**where, desc=description, unit="step", mininterval=0.5)
        self.redirect = logging_redirect_tqdm()
        self.redirect.__enter__()
        self.below: list[tqdm] = []  # two lines of text
        self.shown: Iterator[dict[str, str]] = iter(())
        self.start = self.interval_start = time.perf_counter()
        self.sums = dict.fromkeys(SUMMED, 0.0)
        self.totals = dict.fromkeys(SUMMED, 0.0)  # of the whole run and all ranks, up to the last line
        self.last: dict[str, Any] = {}
        self.paused_at: float | None = None
        self.failure: UserError | None = None  # to write, kept until all ranks can act on it together
        self.listed = set(self.skipped())
        self.grad_norm, self.bad = math.nan, ""  # of the last step

    def state(self) -> dict[str, Any]:
        """What `restore` needs to go on with the next line; every rank must call it."""
        now = self.paused_at or time.perf_counter()
        times = {"seconds": now - self.start, "interval_seconds": now - self.interval_start}
        sums = self.runtime.gather(torch.tensor([*self.sums.values()], dtype=torch.float64))  # (R, numbers)
        return {"sums": sums, "totals": self.totals, "last": dict(self.last)} | times

    def restore(self, state: dict[str, Any]) -> None:
        sums, run = state["sums"], self.runtime
        own = sums[run.rank] if len(sums) == run.world_size else sums.sum(0) * run.is_main
        self.sums = dict(zip(SUMMED, own.tolist(), strict=True))
        self.totals, self.last = state["totals"], state["last"]
        now = time.perf_counter()
        self.start, self.interval_start = now - state["seconds"], now - state["interval_seconds"]

    def step(
        self, step: int, skipped: list[str], where: list[str], grad_norm: float, bad: str, **sums: float
    ) -> None:
        """Adds this rank's part of a step: `loss` summed over supervised tokens, `aux_loss` over rows, and
        counts. Lists `skipped` rows, and those `where` a step is `bad`, which says why it changed nothing."""
        for name in SUMMED:
            self.sums[name] += len(skipped) if name == "skipped_rows" else sums[name]
        for message in skipped:
            if message not in self.listed:  # once, whatever the number of epochs
                self.listed.add(message)
                self._append(self.bad_samples, {"step": step, "error": message})
        self.grad_norm, self.bad = grad_norm, bad
        if bad:
            record = {"step": step, "rank": self.runtime.rank, "reason": bad, "rows": where}
            self._append(self.bad_batches, record)
            log.warning("warning: step %d is skipped: %s", step, bad)
        self.bar.update()

    def report(self, progress: Progress, learning_rate: float) -> None:
        """Writes a line; every rank must call it at the same step."""
        now = time.perf_counter()
        seconds = now - self.interval_start
        sums = dict(zip(SUMMED, self.runtime.sum(*map(float, self.sums.values())), strict=True))
        record = {
            "step": progress.step,
            "epoch": progress.epoch,
            "loss": sums["loss"] / sums["supervised_tokens"] if sums["supervised_tokens"] else math.nan,
            "aux_loss": sums["aux_loss"] / max(sums["learnt_rows"], 1),
            "learning_rate": learning_rate,
            "grad_norm": self.grad_norm,
            "samples_per_second": sums["rows"] / seconds,
            "tokens_per_second": sums["tokens"] / seconds,
            "supervised_tokens": int(sums["supervised_tokens"]),
            "skipped_rows": int(sums["skipped_rows"]),
            "bad_steps": progress.bad_steps,
            "seconds": now - self.start,
            "peak_memory_bytes": peak_memory_bytes(self.runtime.device),
        }
        self.totals = {name: self.totals[name] + sums[name] for name in SUMMED}
        self.write(record)
        loss, speed = record["loss"], record["samples_per_second"]
        self.bar.set_postfix_str(f"loss {loss:.3f}, lr {learning_rate:.2e}, {speed:.1f} samples/s")
        self._show_next()
        self.interval_start = now
        self.sums = dict.fromkeys(SUMMED, 0.0)

    def show(self, step: int, answers: list[dict[str, Any]]) -> None:
        """Appends a line of `samples.jsonl`, for the tracker too; `report` goes through it below the bar."""
        told = [{name: value for name, value in one.items() if name != "picture"} for one in answers]
        self._append(self.run_dir / "samples.jsonl", {"step": step, "answers": told})
        if self.tracker:
            self.tracker.log({"samples": answers}, step)
        text = {"bar_format": "{desc}", "leave": False, "disable": None}  # None: unless on a terminal
        self.below = self.below or [tqdm(position=line, **text) for line in (1, 2)]
        self.shown = itertools.cycle(told)
        self._show_next()

    def _show_next(self) -> None:
        for one in itertools.islice(self.shown, 1):
            lines = f"{one['question']} (expected: {one['expected']})", f"answer: {one['answer']}"
            for bar, line in zip(self.below, lines, strict=True):
                bar.set_description_str(line.translate(CONTROLS))

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside (evaluation, saving) does not count in the rates."""
        self.paused_at = time.perf_counter()
        yield
        self.interval_start += time.perf_counter() - self.paused_at
        self.paused_at = None

    def write(self, record: dict[str, Any]) -> None:
        """Appends a line and sends it to the tracker."""
        record = {k: v if math.isfinite(v) else None for k, v in record.items()}  # JSON has no infinity
        self.last |= record
        if self.runtime.is_main:
            self._append(self.run_dir / "metrics.jsonl", record)
        if self.tracker:
            self.tracker.log({k: v for k, v in record.items() if k != "step"}, step=record["step"])

    def _append(self, path: Path, record: dict[str, Any]) -> None:
        try:
            with user_errors(f"cannot write {path}"), path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        except UserError as error:
            self.failure = error

    def skipped(self) -> list[str]:
        """Why rows were skipped, each once, of all ranks that share the disk."""
        if not self.bad_samples.exists():
            return []
        with self.bad_samples.open(encoding="utf-8") as lines:
            return list(dict.fromkeys(json.loads(line)["error"] for line in lines))

    def no_usable_row(self) -> Exception:
        """What to raise on this rank where a whole epoch had nothing to learn from."""
        if not self.runtime.is_main:
            return ToldElsewhere()
        reasons = self.skipped() or ["there is no supervised token"]
        return DataError(f"no row is usable, the first because {reasons[0]}; all are in {self.bad_samples}")

    def summary(self) -> dict[str, Any]:
        """The run in a few numbers: the last value of each figure, and totals."""
        names = ("step", "epoch", "loss", "aux_loss", "eval_loss", "learning_rate", "bad_steps", "seconds")
        counts = ("rows", "tokens", "supervised_tokens", "skipped_rows")
        figures = {name: self.last[name] for name in (*names, "peak_memory_bytes") if name in self.last}
        totals = {name: int(self.totals[name]) for name in counts}
        rate = totals["rows"] / max(figures.get("seconds", 0.0), 1e-9)
        return figures | totals | {"samples_per_second": rate}

    def close(self) -> None:
        for bar in (*self.below, self.bar):
            bar.close()
        self.redirect.__exit__(None, None, None)
        if self.tracker:
            self.tracker.finish()


def keep_steps(path: Path, last: int) -> None:
    """Drops the lines of a JSONL file that are of steps after `last`, and half a line at its end."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").split("\n"):  # not at what else ends a line in Unicode
        with contextlib.suppress(ValueError):
            if json.loads(line)["step"] <= last:
                kept.append(line + "\n")
    write_atomically(path, lambda file: file.write("".join(kept).encode()))
