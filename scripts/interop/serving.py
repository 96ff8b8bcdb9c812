"""A server of the OpenAI kind, started and stopped for certain, and questions about pictures to it by the
official client. What is served, and by which tool, is the caller's to say."""

import base64
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
from openai import OpenAI

from common.cli import UserError

TRANSFORMERS = [sys.executable, "-m", "transformers.cli.transformers", "serve"]
PATIENCE = 300  # seconds: vLLM on two busy cores takes more than a minute
GRACE = 20


@contextlib.contextmanager
def serving(command: Sequence[str | Path], log: Path, **env: str) -> Iterator[OpenAI]:
    """A client of the server that `command --host H --port P` starts; its output goes to `log`.

    UserError, with the last line of `log`, if it ends or is not up within PATIENCE seconds. However the block
    ends, the server and its processes do too.
    """
    port = free_port()
    command = [*map(str, command), "--host", "127.0.0.1", "--port", str(port)]
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env={**os.environ, **env}, start_new_session=True
        )
    try:
        wait_until_up(process, port, log)
        yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=PATIENCE)
    finally:
        stop(process)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def wait_until_up(process: subprocess.Popen, port: int, log: Path) -> None:
    url, end = f"http://127.0.0.1:{port}/health", time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < end:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(url).is_success:
                return
        time.sleep(0.2)
    last = "".join(log.read_text(errors="replace").strip().splitlines()[-1:])
    state = "does not answer" if process.poll() is None else f"ended with exit code {process.returncode}"
    raise UserError(f"{' '.join(process.args)}: {state}, see {log}: {last}")


def stop(process: subprocess.Popen) -> None:
    """Asks, then kills; then whatever of its session is left, which it has to itself."""
    process.terminate()
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def ask(
    client: OpenAI,
    model: str | Path,
    question: str,
    pictures: Sequence[str | Path] = (),
    max_tokens: int = 32,
    stream: bool = False,
) -> str:
    """The greedy answer to a question about pictures, which travel as data URLs."""
    parts = [{"type": "image_url", "image_url": {"url": data_url(Path(path))}} for path in pictures]
    content = [*parts, {"type": "text", "text": question}] if pictures else question
    answer = client.chat.completions.create(
        model=str(model),
        messages=[{"role": "user", "content": content}],
        max_tokens=max_tokens,
        temperature=0,
        stream=stream,
    )
    if not stream:
        return answer.choices[0].message.content.strip()
    pieces = [choice.delta.content or "" for chunk in answer for choice in chunk.choices]
    return "".join(pieces).strip()


def data_url(picture: Path) -> str:
    kind = {".jpg": "jpeg"}.get(picture.suffix.lower(), picture.suffix.lower().removeprefix("."))
    return f"data:image/{kind};base64,{base64.b64encode(picture.read_bytes()).decode()}"
