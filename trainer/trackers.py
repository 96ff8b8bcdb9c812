"""Trackers take a run's figures and sample answers, each through its own library; only the main process has
one. The libraries are optional and imported when asked for; their files go into the run's folder.
"""

import dataclasses
import importlib
import logging
import os
import signal
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.cli import UserError
from common.distributed import Runtime
from trainer.arguments import TrainingFlags

log = logging.getLogger(__name__)
Log = Callable[[dict[str, Any], int], None]
Opened = tuple[Log, Callable[[], None]]  # and what ends the tracker's run


class Tracker:
    """An open tracker. One that fails says so once and is silent from then on: the training goes on."""

    def __init__(self, name: str, log: Log, finish: Callable[[], None]):
        self.name, self._log, self._finish = name, log, finish
        self.works = True

    def log(self, record: dict[str, Any], step: int) -> None:
        """Sends the figures of an optimizer step; those that are None (not finite) are left out. Or answers:
        each of `samples` has `question`, `expected`, `answer` and `picture`, (H, W, 3) uint8 or None."""
        if self.works:
            self._try(self._log, {name: value for name, value in record.items() if value is not None}, step)

    def finish(self) -> None:
        """Sends what is left and ends the tracker's run."""
        self._try(self._finish)

    def _try(self, action: Callable[..., None], *arguments: Any) -> None:
        try:
            action(*arguments)
        except Exception as error:  # whatever a library raises where its service or disk is gone
            if self.works:
                log.warning("warning: %s, the run goes on without it", failure(self.name, "failed", error))
            self.works = False


def open_tracker(
    flags: TrainingFlags, run_dir: Path, run_id: str, resumed_step: int, runtime: Runtime
) -> Tracker | None:
    """What --tracker asks for, or None; every rank must call it. A run resumed from `resumed_step` (0: new)
    continues the curve of its `run_id`. UserError without the package, or if a new run's does not start."""
    name = flags.tracker
    with runtime.together():
        if name == "none" or not runtime.is_main:
            return None
        try:
            opener = open_tensorboard if name == "tensorboard" else open_online
            return Tracker(name, *opener(flags, run_dir.resolve(), run_id, resumed_step))
        except Exception as error:
            if isinstance(error, ModuleNotFoundError) and error.name == name:
                raise UserError(f"--tracker {name} needs the package {name}: pip install {name}") from None
            message = failure(name, "cannot start", error)
            if not resumed_step:
                raise UserError(message) from error
            log.warning("warning: %s, the run goes on without it", message)
            return None


def failure(name: str, what: str, error: Exception) -> str:
    return f"--tracker {name} {what}: {type(error).__name__}: {' '.join(str(error).split())}"


def open_tensorboard(flags: TrainingFlags, run_dir: Path, run_id: str, resumed_step: int) -> Opened:
    """Event files; what the folder has of later steps, from before a crash or of an older run, is hidden."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(run_dir / "tensorboard", purge_step=resumed_step + 1)

    def log_figures(record: dict[str, Any], step: int) -> None:
        for number, one in enumerate(record.pop("samples", ())):
            writer.add_text(f"samples/{number}", textwrap.indent(told(one), " " * 4), step)  # no Markdown
            if one["picture"] is not None:
                writer.add_image(f"samples/{number}", one["picture"], step, dataformats="HWC")
        for figure, value in record.items():
            writer.add_scalar(figure, value, step)
        writer.flush()  # a run that is killed must not leave a gap

    return log_figures, writer.close


def open_online(flags: TrainingFlags, run_dir: Path, run_id: str, resumed_step: int) -> Opened:
    """Weights & Biases, SwanLab and Trackio are called alike, but for a few words of their own."""
    os.environ.setdefault("TRACKIO_DIR", str(run_dir / "trackio"))  # read on import
    own = {
        "wandb": {"name": run_dir.name, "id": run_id, "dir": run_dir},
        "swanlab": {"name": run_dir.name, "id": run_id, "log_dir": str(run_dir / "swanlab")},
        "trackio": {"name": f"{run_dir.name}-{run_id}"},  # it knows runs by their names alone
    }[flags.tracker]
    tracker = importlib.import_module(flags.tracker)
    handler = signal.getsignal(signal.SIGINT)
    config = dataclasses.asdict(flags)
    run = tracker.init(project=flags.wandb_project, config=config, resume="allow", **own)
    signal.signal(signal.SIGINT, handler)  # SwanLab's own would end it before the last step is logged

    def log_figures(record: dict[str, Any], step: int) -> None:
        rows = []
        for number, one in enumerate(record.pop("samples", ())):
            text = told(one) if flags.tracker == "swanlab" else None  # it has no tables
            image = None if one["picture"] is None else tracker.Image(one["picture"], caption=text)
            rows.append([one["question"], one["expected"], one["answer"], image])
            record |= {f"samples/{number}": image or tracker.Text(text)} if text else {}
        if rows and flags.tracker != "swanlab":
            record["samples"] = tracker.Table(["question", "expected", "answer", "picture"], rows)
        run.log(record, step)

    return log_figures, tracker.finish


def told(one: dict[str, Any]) -> str:
    return f"{one['question']}\nexpected: {one['expected']}\nanswer: {one['answer']}"
