"""What a run reports: the progress bar, `metrics.jsonl` and the tracker; only the main process writes."""

import contextlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from trainer.cli import UserError, user_errors
from trainer.distributed import Runtime, peak_memory_bytes

SUMMED = ("loss", "aux_loss", "supervised_tokens", "tokens", "rows", "skipped_rows")


class Metrics:
    """Collects what each step did on this rank and reports all ranks together at intervals.

    A line of `metrics.jsonl` covers the steps since the line before: `loss` is the mean over their supervised
    tokens, `aux_loss` over their rows; rates are per second of all ranks together; `seconds` counts from the
    first step; `peak_memory_bytes` is the main process's.
    """

    def __init__(
        self, run_dir: Path, total_steps: int, runtime: Runtime, description: str, tracker: Any = None
    ):
        self.runtime, self.tracker = runtime, tracker
        self.file = None
        if runtime.is_main:
            with user_errors(f"--out_dir: cannot write {run_dir}"):
                run_dir.mkdir(parents=True, exist_ok=True)
                self.file = (run_dir / "metrics.jsonl").open("w", encoding="utf-8")
        self.bar = tqdm(
            total=total_steps, desc=description, unit="step", disable=not runtime.is_main, mininterval=0.5
        )
        self.redirect = logging_redirect_tqdm()
        self.redirect.__enter__()
        self.start = self.interval_start = time.perf_counter()
        self.sums = dict.fromkeys(SUMMED, 0.0)
        self.skipped_rows = 0

    def step(self, **sums: float | torch.Tensor) -> None:
        """Adds this rank's part of a step: `loss` summed over supervised tokens, `aux_loss` over rows,
        counts."""
        for name in SUMMED:
            self.sums[name] += sums[name]
        self.bar.update()

    def report(self, step: int, epoch: int, learning_rate: float, grad_norm: float) -> None:
        """Writes a line; every rank must call it at the same step."""
        now = time.perf_counter()
        seconds = now - self.interval_start
        sums = dict(zip(SUMMED, self.runtime.sum(*map(float, self.sums.values())), strict=True))
        record = {
            "step": step,
            "epoch": epoch,
            "loss": sums["loss"] / max(sums["supervised_tokens"], 1),
            "aux_loss": sums["aux_loss"] / max(sums["rows"], 1),
            "learning_rate": learning_rate,
            "grad_norm": grad_norm,
            "samples_per_second": sums["rows"] / seconds,
            "tokens_per_second": sums["tokens"] / seconds,
            "supervised_tokens": int(sums["supervised_tokens"]),
            "skipped_rows": int(sums["skipped_rows"]),
            "seconds": now - self.start,
            "peak_memory_bytes": peak_memory_bytes(self.runtime.device),
        }
        self.skipped_rows += record["skipped_rows"]
        self.write(record)
        self.bar.set_postfix_str(
            f"loss {record['loss']:.3f}, lr {learning_rate:.2e}, {record['samples_per_second']:.1f} samples/s"
        )
        self.interval_start = now
        self.sums = dict.fromkeys(SUMMED, 0.0)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside (evaluation, saving) does not count in the rates."""
        start = time.perf_counter()
        yield
        self.interval_start += time.perf_counter() - start

    def write(self, record: dict[str, Any]) -> None:
        """Appends a line and sends it to the tracker."""
        record = {k: v if math.isfinite(v) else None for k, v in record.items()}  # JSON has no infinity
        if self.file:
            with user_errors(f"cannot write {self.file.name}"):
                self.file.write(json.dumps(record) + "\n")
                self.file.flush()
        if self.tracker:
            self.tracker.log({k: v for k, v in record.items() if k != "step"}, step=record["step"])

    def close(self) -> None:
        self.bar.close()
        self.redirect.__exit__(None, None, None)
        if self.file:
            with contextlib.suppress(OSError):  # on a full disk `write` has told
                self.file.close()
        if self.tracker:
            self.tracker.finish()


def open_tracker(
    use_wandb: bool, project: str, name: str, arguments: dict[str, Any], runtime: Runtime
) -> Any:
    """A Weights & Biases run on the main process, or None. UserError if the package is missing."""
    if not use_wandb or not runtime.is_main:
        return None
    try:
        import wandb
    except ImportError:
        raise UserError("--use_wandb needs the package wandb: pip install wandb") from None
    return wandb.init(project=project, name=name, config=arguments)
