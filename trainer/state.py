"""The full training state on disk, from which `--resume` goes on.

`checkpoints/step-{n}/` holds `state.pt` (weights in fp32, optimizer, scaler, position in the data, generators
of every rank) and `state.json` (step, settings, checksum). It is written under a temporary name by a thread,
while training goes on, flushed and renamed. R ranks.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from common.cli import UserError, user_errors
from common.distributed import Runtime
from common.weights import write_file, write_json
from dataset.files import flush_folder, sha256_of
from dataset.vlm_dataset import VLMDataset
from trainer.arguments import TrainingFlags

log = logging.getLogger(__name__)
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


@dataclass
class Progress:
    """Where a run stands."""

    step: int = 0
    epoch: int = 0
    epoch_step: int = 0  # steps done of this epoch
    evaluated_step: int = 0
    learnt_tokens: int = 0
    bad_steps: int = 0
    bad_in_a_row: int = 0
    mean_loss: float | None = None  # running, of good steps


@dataclass
class Checkpoint:
    """A checkpoint on disk; `about` is its `state.json`."""

    folder: Path
    about: dict[str, Any]

    def intact(self) -> bool:
        with contextlib.suppress(OSError):
            return sha256_of(self.folder / "state.pt") == self.about["sha256"]
        return False

    def load(self) -> dict[str, Any]:
        return torch.load(self.folder / "state.pt", map_location="cpu", weights_only=True)


@dataclass(eq=False)
class Checkpoints:
    """A run's checkpoints and weights. The main process alone writes, in a thread, while training goes on.
    `about` goes into every `state.json`; `write_weights(state_dict, step)` writes the `.pth`."""

    folder: Path
    keep: int
    is_main: bool
    about: dict[str, Any] | None = None
    write_weights: Callable[[dict[str, torch.Tensor], int], None] | None = None

    def __post_init__(self):
        self.thread = futures.ThreadPoolExecutor(1)
        self.saves: list[futures.Future] = []
        for unfinished in self.folder.glob(".step-*") if self.is_main else ():  # of a process that was killed
            shutil.rmtree(unfinished, ignore_errors=True)

    def clear(self) -> None:
        """Removes the checkpoints of a run that is started over, the newest last, should it be killed."""
        if self.is_main:
            for old in reversed(newest_first(self.folder)):
                remove(old.folder)
            shutil.rmtree(self.folder, ignore_errors=True)

    def save(self, state: dict[str, Any], finished: bool) -> None:
        """Starts to write a state, whose tensors must not change any more, after the one before."""
        if self.is_main:
            failed = [save for save in self.saves if save.exception()]  # it waits for the one before
            self.saves = [*failed, self.thread.submit(self._write, state, finished)]

    def wait(self) -> None:
        """Returns when nothing is being written."""
        futures.wait(self.saves)

    @property
    def failure(self) -> BaseException | None:
        """What went wrong with a save that has ended."""
        failures = (save.exception() for save in self.saves if save.done())
        return next(filter(None, failures), None)

    def close(self) -> None:
        """Ends the thread after what it has begun. UserError if something could not be written."""
        self.thread.shutdown()
        if self.failure:
            raise self.failure

    def _write(self, state: dict[str, Any], finished: bool) -> None:
        step = state["progress"]["step"]
        about = {**self.about, "step": step, "finished": finished}
        # In this order: a checkpoint says that the run is finished.
        for write, *what in ((self.write_weights, state["model"], step), (self._write_state, state, about)):
            try:
                write(*what)
            except UserError as error:
                old = newest_first(self.folder)[1:]  # the only one stays
                if not (is_full(error) and old):
                    raise
                log.warning("warning: the disk is full; removing the oldest checkpoint, %s", old[-1].folder)
                remove(old[-1].folder)
                write(*what)
        for old in newest_first(self.folder)[self.keep :]:
            remove(old.folder)

    def _write_state(self, state: dict[str, Any], about: dict[str, Any]) -> None:
        target = self.folder / f"step-{about['step']}"
        temporary = target.with_name(f".{target.name}")
        with contextlib.ExitStack() as cleaning, user_errors(f"cannot write {target}"):
            cleaning.callback(shutil.rmtree, temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            write_file(temporary / "state.pt", lambda file: torch.save(state, file))
            numbers = [old.about["number"] for old in newest_first(self.folder)]  # clocks may be set back
            own = {"sha256": sha256_of(temporary / "state.pt"), "number": max(numbers, default=0) + 1}
            write_json(temporary / "state.json", about | own)
            if target.exists():  # of a run that went on from an earlier step
                remove(target)
            temporary.rename(target)
            flush_folder(self.folder)


@contextlib.contextmanager
def run_lock(run_dir: Path, run: Runtime) -> Iterator[None]:
    """One run at a time in `run_dir`: UserError that names the process of another one. The lock is gone with
    the main process that holds it, however that ends."""
    with contextlib.ExitStack() as held:
        with run.together(), user_errors(f"--out_dir {run_dir.parents[1]}: cannot be written"):
            if run.is_main:
                run_dir.mkdir(parents=True, exist_ok=True)
                file = held.enter_context(run_dir.with_name(f".{run_dir.name}.lock").open("a+"))
                try:  # not flock(), whose locks data workers would inherit and keep
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except (BlockingIOError, PermissionError):
                    file.seek(0)
                    raise UserError(f"{run_dir} is in use by another run, {file.read()}") from None
                except OSError as error:  # a file system without locks
                    log.warning("warning: %s cannot be locked (%s): let no other run in", run_dir, error)
                file.truncate(0)
                print(f"process {os.getpid()} on {socket.gethostname()}", end="", file=file, flush=True)
        yield


def newest_first(folder: Path) -> list[Checkpoint]:
    """The checkpoints in a run's folder that have a readable `state.json`."""
    readable = filter(None, map(read_checkpoint, folder.glob("step-*")))
    return sorted(readable, key=lambda checkpoint: checkpoint.about["number"], reverse=True)


def newest_intact(folder: Path) -> Checkpoint | None:
    """The one to go on from, or None; damaged newer ones are set aside, UserError if there are no others."""
    damaged = [one for one in folder.glob("step-*") if read_checkpoint(one) is None]
    found = newest_first(folder)
    while found and not found[0].intact():
        damaged.append(found.pop(0).folder)
    if damaged and not found:
        raise UserError(f"{folder}: no checkpoint is intact; --resume never starts over")
    for one in damaged:
        aside = one.with_name(f"damaged-{one.name}")
        shutil.rmtree(aside, ignore_errors=True)
        one.rename(aside)
        log.warning("warning: %s is damaged: it is now %s, and the one before it is used", one, aside.name)
    return found[0] if found else None


def named_checkpoint(resume: str) -> Checkpoint | None:
    """What --resume names, unchecked; if it has gone since (torchrun starts ranks again), a newer one."""
    if resume in ("auto", "never"):
        return None
    return read_checkpoint(Path(resume)) or next(iter(newest_first(Path(resume).parent)), None)


def find_checkpoint(resume: str, folder: Path, run: Runtime) -> Checkpoint | None:
    """What --resume names; every rank gets the same one. Ranks that torchrun has started again go on with
    what this run has done, whatever --resume says."""
    (restarts,) = run.sum(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")))  # agents count differently
    if resume == "never":
        old = folder / ".resume-never"  # there as long as the folder is that of the run before
        with run.together(), user_errors("--resume never"):
            if run.is_main and not restarts and folder.exists():
                old.touch()
        (is_old,) = run.sum(run.is_main and old.exists())
        if is_old or not restarts:
            return None
    checkpoint = None
    with run.together():
        if run.is_main:  # it chooses for all
            if resume in ("auto", "never") or (restarts and newest_first(folder)):
                checkpoint = newest_intact(folder)
            elif not ((checkpoint := read_checkpoint(Path(resume))) and checkpoint.intact()):
                wanted = f"the folder of an intact checkpoint, such as {folder}/step-1000"
                raise UserError(f"--resume {resume}: not {wanted}")
    chosen = (1, checkpoint.about["step"], checkpoint.folder == Path(resume)) if checkpoint else (0, 0, 0)
    found, step, named = run.sum(*chosen)
    return read_checkpoint(Path(resume) if named else folder / f"step-{step:.0f}") if found else None


def read_checkpoint(folder: Path) -> Checkpoint | None:
    """None where there is no `state.json` with the fields that resuming needs."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        about = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if {"step", "finished", "settings", "run_id", "sha256", "number"} <= about.keys():
            return Checkpoint(folder, about)
    return None


def remove(folder: Path) -> None:
    """Removes a checkpoint; killed in between, half of it is not taken for a whole one."""
    doomed = folder.with_name(f".{folder.name}.old")
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def is_full(error: BaseException | None) -> bool:
    """Whether an error comes from a full disk, however deep."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            return True
        error = error.__cause__ or error.__context__
    return False


def settings_of(
    flags: TrainingFlags, samples: VLMDataset, world_size: int, base_digest: str | None = None
) -> dict[str, Any]:
    """What a resumed run must have in common with the run before, by the name of the flag that says it: all
    that decides what is learnt. Batch size, ranks and accumulation count as one number, and of the data the
    rows count, not the place."""
    names = [item.name for item in fields(flags) if not item.metadata["resumable"]]
    settings = {name: getattr(flags, name) for name in names}
    if not getattr(flags, "cache_features", None):
        settings.pop("cache_dtype", None)
    if flags.tokens_per_batch:  # how rows are grouped depends on each of the three
        settings["accumulation_steps x ranks"] = f"{flags.accumulation_steps} x {world_size}"
    else:
        rows = flags.batch_size * flags.accumulation_steps * world_size
        settings["batch_size x accumulation_steps x ranks"] = rows
    if base_digest:
        settings["from_weight (content)"] = base_digest[:16]
    settings["data_path (rows)"] = hashlib.sha256(samples.lengths().tobytes()).hexdigest()[:16]
    return settings


def check_settings(checkpoint: Checkpoint, settings: dict[str, Any], override: bool) -> None:
    """UserError that names what has changed; with `override`, a warning."""
    before = {"pixel_shuffle": 1} | checkpoint.about["settings"]  # older ones do not say it
    names = sorted(name for name in before.keys() & settings if before[name] != settings[name])
    changed = [f"--{name} {before[name]!r} (now {settings[name]!r})" for name in names]
    what = f"{checkpoint.folder} was made with other flags: {', '.join(changed)}"
    if names and not override:
        raise UserError(f"{what}; --resume never starts over, --resume_override goes on with the new ones")
    if names:
        log.warning("warning: %s", what)


def generator_states(device: torch.device) -> torch.Tensor:
    """This process's generators as bytes (n,) uint8: the CPU's and, on a GPU, the device's."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return torch.cat(states)


def set_generator_states(states: torch.Tensor, device: torch.device) -> None:
    size = len(torch.get_rng_state())
    torch.set_rng_state(states[:size].clone())  # it crashes on a view into the middle of a tensor
    if device.type == "cuda" and len(states) > size:
        torch.cuda.set_rng_state(states[size:].clone(), device)
