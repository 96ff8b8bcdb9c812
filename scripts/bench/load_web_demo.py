"""Chats with a running web demo from many clients at once, and prints how long each of them waited.

Every answer must be the one that the same question gets when nobody else asks (exit code 1 if not).
"""

import contextlib
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
from gradio_client import Client, handle_file
from gradio_client.client import Job
from gradio_client.utils import QueueError, TooManyRequestsError

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.cli import UserError, flag, parse_flags, run_main, user_errors
from inference.pictures import PICTURE_SUFFIXES, SHIPPED_PICTURES, pictures_in


@dataclass
class LoadFlags:
    """ValueError names a flag whose value makes no sense."""

    url: str = flag("http://127.0.0.1:7860", "address of the running web_demo.py")
    chats: int = flag(20, "clients that chat at once")
    image_dir: str = flag(SHIPPED_PICTURES, "folder of the pictures; each chat takes the next one")
    prompt: list[str] = flag([], "the turns of a chat; if not given: two", action="extend")

    def __post_init__(self) -> None:
        if self.chats <= 0:
            raise ValueError(f"--chats must be above 0, found {self.chats}")
        self.prompt = self.prompt or ["What is this?", "Describe the picture."]


@dataclass
class Turn:
    """Seconds are counted from the question on."""

    answer: str
    seconds_to_first: float
    seconds: float


def main() -> int:
    flags = parse_flags(LoadFlags, __doc__)
    folder = Path(flags.image_dir)
    pictures = pictures_in(folder)
    if not pictures:
        raise UserError(f"--image_dir {folder}: no picture, expected {', '.join(PICTURE_SUFFIXES)} files")
    with page_errors(flags):
        alone = {path: chat(connect(flags.url), path, flags.prompt) for path in pictures[: flags.chats]}
        clients = [connect(flags.url) for _ in range(flags.chats)]
    asked = [pictures[number % len(pictures)] for number in range(flags.chats)]
    start = time.perf_counter()
    with page_errors(flags), ThreadPoolExecutor(flags.chats) as pool:
        together = list(pool.map(chat, clients, asked, [flags.prompt] * flags.chats))
    seconds = time.perf_counter() - start

    wrong = 0
    for number, (path, turns) in enumerate(zip(asked, together, strict=True), start=1):
        answers, expected = [turn.answer for turn in turns], [turn.answer for turn in alone[path]]
        wrong += answers != expected
        verdict = "as alone" if answers == expected else f"differs from {expected}"
        print(f"chat {number}, {path.name}: {answers}, {verdict}")
    report("alone", [turn for turns in alone.values() for turn in turns])
    report(f"{flags.chats} at once", [turn for turns in together for turn in turns])
    print(f"{flags.chats * len(flags.prompt)} answers in {seconds:.1f} s, {wrong} chats differ")
    return int(wrong > 0)


@contextlib.contextmanager
def page_errors(flags: LoadFlags) -> Iterator[None]:
    """Turns what the client raises where the page is not there, or refuses a question, into UserError."""
    try:
        with user_errors(f"--url {flags.url}"):
            yield
    except QueueError:
        raise UserError(
            f"--chats {flags.chats}: the page's queue is full, see --max_queue of web_demo.py"
        ) from None
    except (httpx.HTTPError, httpx.InvalidURL, TooManyRequestsError) as error:
        raise UserError(f"--url {flags.url}: {error}") from error


def connect(url: str) -> Client:
    return Client(url, download_files=False, verbose=False, analytics_enabled=False)


def chat(client: Client, picture: Path, prompts: list[str]) -> list[Turn]:
    """One conversation about `picture`. UserError if the page shows other turns, or in another order."""
    turns = []
    for number, prompt in enumerate(prompts):
        message = {"text": prompt, "files": [] if number else [handle_file(str(picture))]}
        start = time.perf_counter()
        job = client.submit(message, temperature=0, api_name="/ask")
        # The page shows the question before its answer begins. Iterating over a refused job never ends.
        while not (job.done() or any(texts(job)[2 * number + 1 :])):
            time.sleep(0.005)
        first = time.perf_counter()
        job.result()
        shown = texts(job)
        expected = [text for text, turn in zip(prompts, turns, strict=False) for text in (text, turn.answer)]
        if shown[:-1] != [*expected, prompt]:
            raise UserError(f"{picture.name}: the chat shows {shown}, expected {[*expected, prompt, '...']}")
        turns.append(Turn(shown[-1], first - start, time.perf_counter() - start))
    return turns


def texts(job: Job) -> list[str]:
    """The chat's texts in their order, without its pictures; none where the page has not shown it anew."""
    outputs = job.outputs()
    messages = outputs[-1][1] if outputs else []
    if isinstance(messages, dict):  # an update that changes nothing
        return []
    parts = [part for message in messages for part in message["content"]]
    return [part["text"] for part in parts if part["type"] == "text"]


def report(name: str, turns: list[Turn]) -> None:
    for what in ("seconds_to_first", "seconds"):
        values = [getattr(turn, what) for turn in turns]
        p50, p95 = np.percentile(values, [50, 95])
        label = "first piece" if what == "seconds_to_first" else "whole answer"
        print(f"{name}, {label}: p50 {p50:.2f} s, p95 {p95:.2f} s, max {max(values):.2f} s")


if __name__ == "__main__":
    run_main(main)
