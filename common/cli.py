"""What every entry point does alike: flags from a dataclass, one-line errors, exit codes, logging.

Exit codes: 0 done, 1 data or files not usable, stdout included (quietly, where its reader has gone), 2 wrong
usage, 130 and 143 stopped by SIGINT and SIGTERM.
"""

import argparse
import contextlib
import dataclasses
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from dataset.errors import DataError

Flags = TypeVar("Flags")
DTYPES = ("auto", "float32", "bfloat16", "float16")
# What files and models are called may be anything: a terminal would take control characters for commands.
CONTROLS = dict.fromkeys((*range(32), *range(127, 160))) | {ord("\t"): " ", ord("\n"): " "}


class UserError(Exception):
    """Something the user can mend. The message is one line and says what was found and what was expected."""

    exit_code = 1


class ToldElsewhere(UserError):
    """Nothing is left to say here: another rank says what happened, or nobody reads any more."""


class UsageError(UserError):
    """Flags that do not go together, found after they were parsed."""

    exit_code = 2


@contextlib.contextmanager
def user_errors(what: str = "") -> Iterator[None]:
    """Turns the errors by which libraries and the model report bad files and values into UserError."""
    try:
        yield
    except BrokenPipeError:  # not bad input, but a reader of stdout that has gone
        raise
    except (OSError, ValueError) as error:
        message = " ".join(str(error).split())
        raise UserError(f"{what}: {message}" if what else message) from error


def flag(default: Any, help_text: str, choices: tuple = (), resumable: bool = False, **settings) -> Any:
    """A field that is a flag; a `resumable` one may change on resume. `settings` are argparse's own, but for
    `by_release`: what it becomes where it is not given (None)."""
    settings |= {"choices": choices} if choices else {}
    value = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return dataclasses.field(**value, metadata={"help": help_text, "resumable": resumable, **settings})


@dataclasses.dataclass
class DeviceFlags:
    """Flags of everything that runs a model."""

    device: str | None = flag(None, "cuda, cuda:1, mps or cpu; if not given: the best", resumable=True)
    dtype: str = flag("auto", "precision of the forward pass; auto: bfloat16 where hardware has it", DTYPES)


@dataclasses.dataclass
class EncoderFlags:
    """A flag of everything that runs a frozen image encoder."""

    encoder_dtype: str = flag("auto", "precision of the image encoder; auto: that of --dtype", DTYPES)


def check_seed(seed: int) -> None:
    """ValueError for a --seed that torch does not take."""
    if not 0 <= seed < 2**64:
        raise ValueError(f"--seed must be from 0 to 2**64 - 1, found {seed}")


def parse_flags(flags: type[Flags], description: str) -> Flags:
    """Fills the dataclass `flags` from the command line; it may raise ValueError itself (exit code 2)."""
    parser = make_parser(flags, description=description, allow_abbrev=False)
    for item in dataclasses.fields(flags):  # the library does this only for flags that are on by default
        if item.default is False or item.type == bool | None:
            off = {"dest": item.name, "action": "store_false", "default": argparse.SUPPRESS}
            parser.add_argument(f"--no_{item.name}", help=f"switch --{item.name} off", **off)
    if not {"-h", "--help"} & set(sys.argv[1:]):
        parser.usage = "%(prog)s [flags], see --help"  # an error shows one line of usage instead of thirty
    try:
        (parsed,) = parser.parse_args_into_dataclasses()
    except ValueError as error:
        parser.error(str(error).translate(CONTROLS))
    return parsed


def make_parser(flags: type, **settings: Any) -> argparse.ArgumentParser:
    """transformers' parser for a dataclass of flags."""
    from transformers.hf_argparser import HfArgumentParser, string_to_bool

    class Parser(HfArgumentParser):
        def add_argument(self, *names: str, resumable=False, by_release=None, **settings) -> argparse.Action:
            if settings.get("type") is string_to_bool:  # needs no value, also where its default is None
                settings |= {"nargs": "?", "const": True}
            return super().add_argument(*names, **settings)

    return Parser(flags, **settings)


def run_main(main: Callable[[], int | None]) -> None:
    """Runs an entry point and ends the process with its exit code; a user's mistake is one line on stderr."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    logging.getLogger().handlers[0].addFilter(without_controls)
    for noisy in ("httpx", "httpx2", "datasets"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        try:
            code = main()
        except OSError:
            write_stdout("\n")  # fails too if it was stdout that failed
            raise
        finally:
            write_stdout("")
    except (UserError, DataError) as error:
        if not isinstance(error, ToldElsewhere):
            print(f"error: {error}".translate(CONTROLS), file=sys.stderr)
        code = getattr(error, "exit_code", 1)
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


def without_controls(record: logging.LogRecord) -> bool:
    record.msg, record.args = record.getMessage().translate(CONTROLS), ()
    return True


def write_stdout(text: str) -> None:
    """UserError where stdout cannot be written, ToldElsewhere where its reader has gone, as `head` does."""
    try:
        print(text, end="", flush=True)
    except OSError as error:
        unread = os.open(os.devnull, os.O_WRONLY)
        os.dup2(unread, sys.stdout.fileno())  # the interpreter flushes once more, and would raise again
        if isinstance(error, BrokenPipeError):
            raise ToldElsewhere from None
        raise UserError(f"cannot write to stdout: {error.strerror}") from None
