"""Ranks, device, precision, seeds and signals: nothing else knows about them.

A run is one process, or the processes that `torchrun` starts.
"""

import contextlib
import hashlib
import os
import random
import resource
import signal
import sys
from dataclasses import dataclass, field
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from common.cli import ToldElsewhere, UserError
from model.pictures import first_line

STOP_SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143}
SAVE_SIGNAL = signal.SIGUSR1  # what schedulers send some time before they end a job
SIGNALS = (*STOP_SIGNALS, SAVE_SIGNAL)
SETUP_TIMEOUT = timedelta(hours=2)  # the main process may read and tokenize a large file while others wait
# If DDP is the last to let go of a group, it joins the group's threads while it holds the interpreter's lock,
# which they need to end: a deadlock.
_kept_groups: list = []


@dataclass
class Runtime:
    """Where this process runs. `stop_code` is the exit code to end with once a signal has come, else 0;
    `save_asked` whether one has come that asks for a save."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    stop_code: int = field(default=0, init=False)
    save_asked: bool = field(default=False, init=False)
    group: dist.ProcessGroup | None = field(default=None, init=False)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Sums of each value over all ranks."""
        return self.gather(torch.tensor(values, dtype=torch.float64)).sum(0).tolist()

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """(n,) of each rank -> (R, n), on the same device: what is on the CPU stops no GPU."""
        if self.world_size == 1:
            return values[None]
        parts = [torch.empty_like(values) for _ in range(self.world_size)]
        dist.all_gather(parts, values, group=self.group)
        return torch.stack(parts)

    def agree(self, what: str, value: str) -> None:
        """UserError where `value`, which says what this rank found of `what`, differs from rank to rank."""
        digest = int.from_bytes(hashlib.sha256(value.encode()).digest()[:6])  # exact in a float64
        found = self.gather(torch.tensor([digest], dtype=torch.float64))
        if bool((found != found[0]).any()):
            if not self.is_main:
                raise ToldElsewhere
            raise UserError(f"the ranks do not see the same {what}: they must share a disk, and see it alike")

    def limit_waiting(self, seconds: float) -> None:
        """From now on a rank that has waited that long for another gives up."""
        if self.world_size > 1:
            self.group = dist.new_group(timeout=timedelta(seconds=seconds))
            _kept_groups.append(self.group)

    @contextlib.contextmanager
    def main_first(self):
        """The main process does what is inside first, the others find its files; if it fails, all end."""
        with self.together():
            if self.is_main:
                yield
        if not self.is_main:
            yield

    @contextlib.contextmanager
    def together(self):
        """What is inside is done on all ranks before any goes on; if it fails on one, the others end too."""
        failed = True
        try:
            yield
            failed = False
        finally:
            if self.sum(failed)[0] and not failed:
                raise ToldElsewhere

    def catch_signals(self) -> None:
        """The first SIGINT or SIGTERM is noted, so that the step ends and the state is saved; a second one
        kills. SIGUSR1 is noted as the wish for a save."""

        def note(signum: int, _frame) -> None:
            if signum == SAVE_SIGNAL:
                self.save_asked = True
            else:
                self.stop_code = STOP_SIGNALS[signum]
                signal.signal(signum, signal.SIG_DFL)

        for signum in SIGNALS:
            signal.signal(signum, note)


@contextlib.contextmanager
def runtime(device: str | None, seed: int):
    """Joins `torchrun`'s process group, seeds everything, and cleans up. UserError for a missing device."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    chosen = _device(device)
    if world_size > 1:
        a_gpu_each = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) <= torch.cuda.device_count()
        nccl = chosen.type == "cuda" and a_gpu_each  # which several ranks on one do not have
        backend, own = ("cpu:gloo,cuda:nccl", {"device_id": chosen}) if nccl else ("gloo", {})
        dist.init_process_group(backend, None, SETUP_TIMEOUT, world_size, rank, _store(), **own)
        _kept_groups.append(dist.group.WORLD)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  libraries draw from it
    torch.manual_seed(seed)
    try:
        yield Runtime(chosen, rank, world_size)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _store() -> dist.Store:
    """Where the ranks find each other. The agent keeps its store when it starts them again: without a name of
    its own for each start, they would find the addresses of the dead."""
    store, _, _ = next(dist.rendezvous("env://", timeout=SETUP_TIMEOUT))
    if os.environ.get("GROUP_WORLD_SIZE", "1") != "1":  # several agents count their restarts differently
        return store
    return dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _device(name: str | None) -> torch.device:
    if name is None:
        name = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            gpus = max(torch.cuda.device_count(), 1)
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % gpus)
        torch.empty(1, device=device)
        if not torch.amp.is_autocast_available(device.type):  # meta is there, but holds no numbers
            raise RuntimeError("nothing can be computed on it")
        if device.type == "cuda":
            torch.cuda.set_device(device)
            torch.backends.cuda.enable_cudnn_sdp(False)  # it plans for every new length: a third of the speed
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not available here ({first_line(error)})") from None
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of autocast; float32: none. `auto` is bfloat16 where matrix products are fast in it."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()):
        return torch.bfloat16
    return torch.float32


def autocast(name: str, device: torch.device) -> torch.autocast:
    """The context in which a model runs in what `resolve_dtype` says."""
    dtype = resolve_dtype(name, device)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def ignore_signals(_worker: int) -> None:
    """For data workers: a signal to the process group reaches them too, and only the training process is to
    act on it. They end when it does."""
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


@contextlib.contextmanager
def signals_held():
    """Signals wait until this is left: a data worker must not get one before it ignores them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def explained(error: RuntimeError) -> UserError | None:
    """What the user is told where a process of the run has gone; None for any other error."""
    text = " ".join(str(error).split())
    if "DataLoader worker" in text:
        killed = "a process that prepares batches was killed, probably for lack of memory"
        return UserError(f"{killed}: try a smaller --num_workers or --batch_size ({text})")
    if isinstance(error, dist.DistError) or "gloo" in text:
        return UserError("lost the other ranks: one has ended, or has not answered within --timeout_seconds")
    return None


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory so far: the device's where it counts its own, otherwise this process's resident one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
