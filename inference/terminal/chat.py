"""A conversation about pictures in the terminal: what is typed, what belongs to it, what is shown.

Several models may answer, one after the other, each after its own answers. Generating is inference/chat.py's.
"""

import contextlib
import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from urllib.parse import unquote_to_bytes, urlsplit

import torch

from common.cli import CONTROLS, UserError, user_errors
from common.weights import write_file
from dataset.errors import DataError
from dataset.pictures import open_image
from inference.ask import IN_TEXT, Speaker
from inference.chat import Sampling, encode_picture, stream_answer
from inference.picture_report import escape_markdown
from inference.terminal.picture import draw
from model.processing_vlm import IMAGE_MARKER

log = logging.getLogger(__name__)

HELP = """\
/image PATH   add a picture to the next question; several times for several
/drop [N]     take back picture N of /images; without N the last one
/images       list the pictures
/reset        forget the conversation and its pictures
/save FILE    write the conversation, as Markdown (.md) or as a row of data (.json)
/help         show this
/quit         end, as Ctrl-D does
Ctrl-C stops an answer; where none is being given, it ends the chat."""


@dataclass
class Picture:
    """`features` are those of each model's encoder, (P, W)."""

    path: Path
    features: list[torch.Tensor]


@dataclass
class Turn:
    """`question` has an `<image>` for each of its pictures; `answers` are those of each model."""

    question: str
    answers: list[str]

    def messages(self, number: int) -> list[dict[str, str]]:
        """As the model of that number has had it."""
        answer = {"role": "assistant", "content": self.answers[number]}
        return [{"role": "user", "content": self.question}, answer]


class TerminalChat:
    """`run` reads questions and commands from stdin until the end; answers go to stdout, errors to stderr."""

    def __init__(self, speakers: Sequence[Speaker], sampling: Sampling, dtype: str):
        self.speakers, self.sampling, self.dtype = speakers, sampling, dtype
        self.turns: list[Turn] = []
        self.pictures: list[Picture] = []  # in the order of their markers; the next question's come last
        self.commands = {
            "/image": self.add,
            "/drop": self.drop,
            "/images": self.list_pictures,
            "/reset": self.reset,
            "/save": self.save,
            "/help": lambda _: print(HELP),
        }

    def run(self, pictures: Sequence[str] = ()) -> None:
        """Begins with `pictures` for the first question. KeyboardInterrupt if Ctrl-C comes at the prompt."""
        with contextlib.suppress(ImportError):  # some builds of Python have no readline
            import readline  # noqa: F401  gives input() its arrow keys and history, of this session alone
        if sys.stdin is None:
            raise UserError("--chat: stdin is closed, expected questions there")
        sys.stdin.reconfigure(errors="surrogateescape")  # names of files need not be text
        for path in pictures:
            self.add(path)
        if sys.stdin.isatty():
            print("Ask, or /help.")
        while (line := read_line()) is not None and line != "/quit":
            try:
                self.handle(line)
            except (UserError, DataError) as error:
                print(f"error: {error}".translate(CONTROLS), file=sys.stderr, flush=True)

    def handle(self, line: str) -> None:
        name, _, argument = line.partition(" ")
        if name in self.commands:
            self.commands[name](argument.strip())
        elif line.startswith("/"):
            raise UserError(f"{name}: no such command, see /help")
        elif line:
            self.answer(line)

    def add(self, argument: str) -> None:
        if not argument:
            raise UserError("/image needs the path of a picture")
        path = typed_path("/image", argument)
        seen = [open_image(str(path), "/image", speaker.processor.image_size) for speaker in self.speakers]
        features = [
            encode_picture(speaker.model, speaker.processor, picture)
            for speaker, picture in zip(self.speakers, seen, strict=True)
        ]
        self.pictures.append(Picture(path, features))
        draw(seen[0])
        print(f"picture {len(self.pictures)}: {path.name}".translate(CONTROLS))

    def drop(self, argument: str) -> None:
        number = int(argument) if argument.isdecimal() else 0 if argument else len(self.pictures)
        if not 1 <= number <= len(self.pictures):
            raise UserError(f"/drop {argument}: no such picture, there are {len(self.pictures)}")
        picture = self.pictures.pop(number - 1)
        before = 0
        for turn in self.turns:
            pieces = turn.question.split(IMAGE_MARKER)
            place = number - before
            if place < len(pieces):
                rest = IMAGE_MARKER.join(pieces[place:]).removeprefix("\n")
                turn.question = IMAGE_MARKER.join(pieces[:place]) + rest
                break
            before += len(pieces) - 1
        print(f"dropped {picture.path.name}".translate(CONTROLS))

    def list_pictures(self, _: str) -> None:
        shown = self.shown()
        for number, picture in enumerate(self.pictures, start=1):
            when = "" if number <= shown else " (for the next question)"
            print(f"{number}: {picture.path}{when}".translate(CONTROLS))
        if not self.pictures:
            print("no pictures")

    def reset(self, _: str) -> None:
        self.turns, self.pictures = [], []
        print("forgotten")

    def shown(self) -> int:
        """How many pictures have been asked about."""
        return sum(turn.question.count(IMAGE_MARKER) for turn in self.turns)

    def answer(self, question: str) -> None:
        """Prints and keeps every model's answer. An answer stopped by Ctrl-C is kept as far as it went."""
        with user_errors("the question is not text in UTF-8"):
            question.encode()
        if IMAGE_MARKER not in question:
            question = f"{IMAGE_MARKER}\n" * (len(self.pictures) - self.shown()) + question
        prompts = [self.messages(number, question) for number in range(len(self.speakers))]
        room = [
            self.room(speaker, messages) for speaker, messages in zip(self.speakers, prompts, strict=True)
        ]
        answers = []
        for number, (speaker, messages) in enumerate(zip(self.speakers, prompts, strict=True)):
            if len(self.speakers) > 1:
                print(f"{speaker.name}: ".translate(CONTROLS), end="", flush=True)
            features = [picture.features[number] for picture in self.pictures]
            sampling = replace(self.sampling, max_new_tokens=min(room[number], self.sampling.max_new_tokens))
            answers.append(self.stream(speaker, messages, features, sampling))
        if any(answer.strip() for answer in answers):
            self.turns.append(Turn(question, answers))

    def stream(self, speaker: Speaker, messages: list, features: list, sampling: Sampling) -> str:
        """What was said, to the end or until Ctrl-C."""
        said, new_ids = "", []
        start = time.perf_counter()
        parts = speaker.model, speaker.processor, messages, features
        pieces = stream_answer(*parts, sampling, self.dtype, new_ids)
        try:
            for piece in pieces:
                said += piece
                print(piece.translate(IN_TEXT), end="", flush=True)
            print(flush=True)
        except KeyboardInterrupt:
            print(" (stopped)", flush=True)
        finally:
            pieces.close()
        seconds = time.perf_counter() - start
        log.info("%d tokens in %.2f s (%.1f tokens/s)", len(new_ids), seconds, len(new_ids) / seconds)
        return said

    def messages(self, number: int, question: str) -> list[dict[str, str]]:
        """The conversation as the model of that number has had it, and the next question."""
        found = [message for turn in self.turns for message in turn.messages(number)]
        return [*found, {"role": "user", "content": question}]

    def room(self, speaker: Speaker, messages: list[dict[str, str]]) -> int:
        """Tokens that an answer may have at most. UserError if that is none."""
        with user_errors():
            used = len(speaker.processor.encode_prompt(messages, len(self.pictures)))
        limit = speaker.model.config.max_position_embeddings
        if used >= limit:
            raise UserError(
                f"the conversation has {used} tokens, but {speaker.name} has room for {limit}: "
                "/drop a picture, or /reset"
            )
        return limit - used

    def save(self, argument: str) -> None:
        path = typed_path("/save", argument)
        writers = {".md": self.as_markdown, ".json": self.as_json}
        if path.suffix not in writers:
            raise UserError(f"/save {argument}: expected a file name that ends in .md or .json")
        text = writers[path.suffix]()
        with user_errors(f"/save {argument}"):
            write_file(path, lambda file: file.write(text.encode(errors="backslashreplace")))
        print(f"saved {path}".translate(CONTROLS))

    def as_markdown(self) -> str:
        pictures = iter(self.pictures)
        parts = []
        for turn in self.turns:
            asked = turn.question.replace(IMAGE_MARKER, "")
            parts.append(f"**You:** {escape_markdown(asked)}")
            for picture in islice(pictures, turn.question.count(IMAGE_MARKER)):
                parts.append(f"![{escape_markdown(picture.path.name)}](<{picture.path.resolve()}>)")
            for speaker, answer in zip(self.speakers, turn.answers, strict=True):
                parts.append(f"**{escape_markdown(speaker.name)}:** {escape_markdown(answer)}")
        return "\n\n".join(parts) + "\n"

    def as_json(self) -> str:
        """Rows as training and evaluation read them, one for each model, without the questions that it left
        unanswered and their pictures."""
        rows = []
        for number, speaker in enumerate(self.speakers):
            pictures = iter(self.pictures)
            shown, turns = [], []
            for turn in self.turns:
                asked_about = list(islice(pictures, turn.question.count(IMAGE_MARKER)))
                if turn.answers[number].strip():
                    shown += [str(picture.path.resolve()) for picture in asked_about]
                    turns += turn.messages(number)
            if turns:
                rows.append({"weight": speaker.name, "image": shown, "conversations": turns})
        return json.dumps(rows, indent=2, ensure_ascii=False) + "\n"


def typed_path(command: str, argument: str) -> Path:
    """The path typed after `command`, or dropped there, where terminals quote it or make a URL of it; a file
    that is called what stands there comes first. UserError where its `~user` is unknown."""
    path = Path(argument)
    with user_errors(f"{command} {argument}"):  # raises for a name that is too long
        if not path.exists():
            path = Path(undropped(argument))
    try:
        return path.expanduser()
    except RuntimeError:
        raise UserError(f"{command} {path}: no such home folder") from None


def undropped(argument: str) -> str:
    """`/a b.png` for `/a\\ b.png`, `'/a b.png'` and `file:///a%20b.png`."""
    with contextlib.suppress(ValueError):  # a lone quote
        words = shlex.split(argument)
        argument = words[0] if len(words) == 1 else argument
    if argument.startswith("file://"):
        return os.fsdecode(unquote_to_bytes(urlsplit(argument).path))
    return argument


def read_line() -> str | None:
    """The next line of stdin, None at its end; a prompt is shown where somebody types."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        if sys.stdin.isatty():
            print()
        return None
    except KeyboardInterrupt:
        print()
        raise
