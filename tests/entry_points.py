"""Runs entry points in processes forked from one that has already imported the libraries.

Arguments, exit code, output and folder are those of `python SCRIPT ...`; the imports' six seconds are spared.
What needs an interpreter of its own (environment variables, torchrun) does not come here.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "eval_vlm",
        "convert_to_hf",
        "inference.scoring.tables",
        "trainer.stage",
        "transformers.models.clip.modeling_clip",
    ]
)


def start_server() -> None:
    """Does nothing where it runs already; what is in the environment at first, every entry point finds."""
    kept = {name: os.environ.get(name) for name in ("PYTHONPATH", "OMP_NUM_THREADS")}
    os.environ.update(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    forkserver.ensure_running()
    for name, value in kept.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


class EntryPoint:
    """A running one, with the part of `subprocess.Popen` that the tests use.

    `command` begins with the script, relative to the repository's root, and runs in `folder`; `own_session`
    is that of a terminal.
    """

    def __init__(self, command: list[str], own_session: bool = False, folder: Path = ROOT):
        self.output = tempfile.TemporaryDirectory()
        self.streams = [Path(self.output.name) / name for name in ("stdout", "stderr")]
        self.process = CONTEXT.Process(target=_entry_point, args=(command, self.streams, own_session, folder))
        self.process.start()
        self.pid = self.process.pid
        self.terminate, self.kill = self.process.terminate, self.process.kill

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def communicate(self, timeout: float) -> tuple[str, str]:
        """stdout and stderr, once it has ended. subprocess.TimeoutExpired after `timeout` seconds."""
        self.process.join(timeout)
        if self.process.is_alive():
            raise subprocess.TimeoutExpired("", timeout)
        stdout, stderr = (path.read_text("utf-8") if path.exists() else "" for path in self.streams)
        return stdout, stderr


def _entry_point(command: list[str], streams: list[Path], own_session: bool, folder: Path) -> None:
    if own_session:
        os.setsid()
    for descriptor, stream in enumerate(streams, start=1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.environ.pop("PYTHONPATH")
    multiprocessing.set_start_method(None, force=True)  # the script's own processes start as they always do
    os.chdir(folder)
    sys.argv = command
    sys.path[0] = str((ROOT / command[0]).parent)
    script = command[0] if folder == ROOT else str(ROOT / command[0])
    runpy.run_path(script, run_name="__main__")
