"""Asks other tools the questions of a report of `eval_vlm.py --score`, and counts the answers that are equal.

Servers are asked by the official client, with pictures as data URLs, each question twice: once for a whole
answer and once for a streamed one. Exit code 1 if any answer differs.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from openai import OpenAI, OpenAIError
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging as transformers_logging

from common.cli import UserError, flag, parse_flags, run_main, user_errors
from common.tokenizer import load_tokenizer
from inference.answers import SPARE_TOKENS
from scripts.interop.serving import TRANSFORMERS, ask, serving

VLLM = "-m vllm.entrypoints.openai.api_server --dtype float32 --enforce-eager --max-model-len 512".split()
# It would take most of the memory for its cache; on the CPU this flag means it too.
VLLM += ["--gpu-memory-utilization", "0.1"]

UNFINISHED = "\ufffd"  # a character that the last token begins: vLLM leaves it out
Row = dict[str, Any]  # of the report: a question, its pictures and both answers


@dataclass
class AskFlags:
    report: str = flag("", "JSON of eval_vlm.py --score --report; no question has turns before it")
    transformers: list[str] = flag(
        [], "folders to ask in this process, without code of ours", action="extend"
    )
    serve: list[str] = flag([], "folders to ask through `transformers serve`", action="extend")
    vllm: list[str] = flag([], "folders to ask through vLLM's server", action="extend")
    vllm_python: str = flag("out/interop/vllm/bin/python", "interpreter of the environment that has vLLM")
    logs: str = flag("out/interop", "folder for what the servers print")

    def __post_init__(self) -> None:
        if not self.report:
            raise ValueError("--report is missing")
        if not self.transformers + self.serve + self.vllm:
            raise ValueError("nobody to ask: give --transformers, --serve or --vllm")


def main() -> int:
    flags = parse_flags(AskFlags, __doc__)
    transformers_logging.disable_progress_bar()
    logs, rows = Path(flags.logs), read_report(Path(flags.report))
    logs.mkdir(parents=True, exist_ok=True)
    print(f"| tool | folder | questions | same answers | right |\n{'| --- ' * 5}|", flush=True)
    is_same = [report("transformers", folder, rows, ask_here) for folder in map(Path, flags.transformers)]
    for folder in map(Path, flags.serve):
        trust = ["--trust-remote-code"] if (folder / "model_vlm.py").exists() else []
        command = [*TRANSFORMERS, folder, "--device", "cpu", *trust]
        is_same += report_server("transformers serve", command, folder, rows, logs)
    for folder in map(Path, flags.vllm):
        command = [flags.vllm_python, *VLLM, "--model", folder]
        is_same += report_server("vLLM", command, folder, rows, logs)
    return 0 if all(is_same) else 1


def report_server(
    tool: str, command: list[str | Path], folder: Path, rows: list[Row], logs: Path
) -> list[bool]:
    log = logs / f"{tool.split()[-1]}.log"
    home = {"HF_HUB_OFFLINE": "1", "HF_HOME": os.fspath(logs / "hf")}
    with user_errors(tool), serving(command, log, **home) as client:
        return [
            report(f"{tool}{how}", folder, rows, partial(ask_server, client, stream=bool(how)))
            for how in ("", ", streamed")
        ]


def report(
    tool: str, folder: Path, rows: list[Row], answers_of: Callable[[Path, list[Row]], Iterator[str]]
) -> bool:
    """Prints a line of the table, and after it the answers that differ, if any."""
    rows = with_limits(rows, folder)
    answers = [answer.strip().rstrip(UNFINISHED) for answer in answers_of(folder, rows)]
    pairs = list(zip(rows, answers, strict=True))
    differing = [pair for pair in pairs if pair[1] != pair[0]["answer"].rstrip(UNFINISHED)]
    right = sum(answer == row["expected"] for row, answer in pairs)
    cells = tool, folder, len(rows), len(rows) - len(differing), right
    print(f"| {' | '.join(map(str, cells))} |", flush=True)
    for row, answer in differing:
        print(f"{row['where']}: {row['question']} {answer!r}, ours: {row['answer']!r}")
    return not differing


def read_report(path: Path) -> list[Row]:
    with user_errors(f"--report {path}"):
        report = json.loads(path.read_text(encoding="utf-8"))
    if not (isinstance(report, dict) and report.get("questions")):
        expected = "expected the JSON of eval_vlm.py --score --report"
        raise UserError(f"--report {path} has no questions: {expected}")
    return report["questions"]


def with_limits(rows: list[Row], folder: Path) -> list[Row]:
    """The rows with `max_tokens`, which an answer had in the report."""
    with user_errors(str(folder)):
        encode = load_tokenizer(str(folder)).encode
    limits = (len(encode(row["expected"], add_special_tokens=False)) + SPARE_TOKENS for row in rows)
    return [row | {"max_tokens": limit} for row, limit in zip(rows, limits, strict=True)]


@torch.no_grad()
def ask_here(folder: Path, rows: list[Row]) -> Iterator[str]:
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    for row in rows:
        parts = [{"type": "image", "path": path} for path in row["images"]]
        content = [*parts, {"type": "text", "text": row["question"]}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=True,
            return_dict=True,
            add_generation_prompt=True,
            return_tensors="pt",
        )
        output = model.generate(**inputs, do_sample=False, max_new_tokens=row["max_tokens"])  # (1, T + new)
        yield processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def ask_server(client: OpenAI, folder: Path, rows: list[Row], stream: bool) -> Iterator[str]:
    for row in rows:
        text, limit = row["question"], row["max_tokens"]
        try:
            yield ask(client, folder, text, row["images"], limit, stream)
        except OpenAIError as error:
            raise UserError(f"{folder}: {row['where']}: {error}") from error


if __name__ == "__main__":
    run_main(main)
