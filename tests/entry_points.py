"""Runs entry points in processes forked from one that has already imported the libraries.

Arguments, exit code, output and folder are those of `python SCRIPT ...`; the imports' six seconds are spared.
What needs an interpreter of its own (environment variables, torchrun) does not come here.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
from multiprocessing import forkserver
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "eval_vlm",
        "convert_to_hf",
        "trainer.scoring",
        "trainer.stage",
        "transformers.models.clip.modeling_clip",
    ]
)


def start_server() -> None:
    """Once per test session; what is in the environment now, every entry point finds."""
    kept = {name: os.environ.get(name) for name in ("PYTHONPATH", "OMP_NUM_THREADS")}
    os.environ.update(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    forkserver.ensure_running()
    for name, value in kept.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


def run_entry_point(command: list[str], output: Path, timeout: float) -> subprocess.CompletedProcess:
    """`command` begins with the script, relative to the repository's root; its output is kept in `output`.

    Raises:
        subprocess.TimeoutExpired: it was killed, after `timeout` seconds.
    """
    streams = [output / "stdout", output / "stderr"]
    process = CONTEXT.Process(target=_entry_point, args=(command, streams))
    process.start()
    process.join(timeout)
    if process.is_alive():
        process.kill()
        raise subprocess.TimeoutExpired(command, timeout)
    return subprocess.CompletedProcess(
        command, process.exitcode, *(stream.read_text(encoding="utf-8") for stream in streams)
    )


def _entry_point(command: list[str], streams: list[Path]) -> None:
    for descriptor, stream in enumerate(streams, start=1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.environ.pop("PYTHONPATH")
    multiprocessing.set_start_method(None, force=True)  # the script's own processes start as they always do
    os.chdir(ROOT)
    sys.argv = command
    sys.path[0] = str((ROOT / command[0]).parent)
    runpy.run_path(command[0], run_name="__main__")
