"""What the documentation says is so: commands, flags, defaults, sizes, links, messages; in both languages."""

import argparse
import json
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from torch.distributed.run import parse_args as parse_torchrun
from transformers import HfArgumentParser

import convert_to_hf
import eval_vlm
import train_pretrain_vlm
import train_sft_vlm
import web_demo
from common.cli import make_parser
from dataset.errors import DataError
from dataset.layouts import our_row
from dataset.rows import normalise_row
from model.model_minimind import MiniMindForCausalLM
from model.model_vlm import MiniMindVLM, VLMConfig
from scripts.check_data import CheckFlags
from scripts.import_lm import ImportFlags

PAGES = ["README.md", "README_zh.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
OPEN = "TODO-FIGURE"
PREPARATION = ("python3 -m venv .venv", "source .venv/bin/activate")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def fences(page: str, language: str) -> list[str]:
    return [code for found, code in FENCE.findall(read(page)) if found == language]


def prose(page: str) -> str:
    return FENCE.sub("", read(page))


def spans(page: str) -> list[str]:
    """Code inside the text."""
    return re.findall(r"`([^`\n]+)`", prose(page))


def commands() -> list[str]:
    """Every command of every page once, those of fenced blocks and those inside the text."""
    found = [line for page in PAGES for block in fences(page, "bash") for line in block.splitlines()]
    starts = ("python ", "bash ", "torchrun ")
    found += [span for page in PAGES for span in spans(page) if span.startswith(starts) and OPEN not in span]
    return list(dict.fromkeys(line.strip() for line in found if line.strip()))


def tables(page: str) -> list[list[list[str]]]:
    """Cells of each table's rows, the header first, without the line of dashes."""
    blocks = re.findall(r"(?:^\|.*\|$\n?)+", prose(page), re.MULTILINE)
    return [
        [
            [cell.strip() for cell in line.strip("|").split(" | ")]
            for line in block.splitlines()
            if "---" not in line
        ]
        for block in blocks
    ]


def table(page: str, column: str) -> list[list[str]]:
    """The rows of the page's one table that has this column."""
    (found,) = [rows[1:] for rows in tables(page) if column in rows[0]]
    return found


class ParsedError(BaseException):
    """Raised once a script has accepted its arguments, before it does anything."""


@pytest.fixture
def only_parse(monkeypatch) -> None:
    def stop_after(method):
        def parse(self, *args, **kwargs):
            method(self, *args, **kwargs)
            raise ParsedError

        return parse

    for parser, name in (
        (argparse.ArgumentParser, "parse_args"),
        (HfArgumentParser, "parse_args_into_dataclasses"),
    ):
        monkeypatch.setattr(parser, name, stop_after(getattr(parser, name)))


@pytest.mark.parametrize("command", commands())
def test_scripts_accept_the_commands(command, monkeypatch, capsys, request):
    program, *arguments = (word for word in shlex.split(command) if not re.match("[A-Z_]+=", word))
    if command in PREPARATION or arguments[:1] == ["-c"]:
        return
    if program == "torchrun":
        parsed = parse_torchrun(arguments)
        arguments = [parsed.training_script, *parsed.training_script_args]
    elif (
        program == "bash"
        or (program, arguments[0]) == ("pip", "install")
        or arguments[:2] in (["-m", "pytest"], ["-m", "pip"])
    ):
        files = [argument for argument in arguments if "." in argument.replace("3.12", "") or "/" in argument]
        assert files and all((ROOT / name).exists() for name in files)
        return
    else:
        assert program == "python"
    request.getfixturevalue("only_parse")  # not before: torchrun has a parser too
    script = ROOT / arguments[0]
    monkeypatch.setattr(sys, "argv", [str(script), *arguments[1:]])
    monkeypatch.setattr(sys, "path", [str(script.parent), *sys.path])
    with pytest.raises((ParsedError, SystemExit)) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.type is ParsedError, capsys.readouterr().err


def test_flags_in_the_text_exist():
    known = {"help", "nproc_per_node"}
    programs = (train_sft_vlm.SFTFlags, eval_vlm.EvalFlags, convert_to_hf.ConvertFlags, web_demo.DemoFlags)
    for flags in (*programs, CheckFlags, ImportFlags):
        known |= flags.__dataclass_fields__.keys()
        known |= {f"no_{item.name}" for item in flags.__dataclass_fields__.values() if item.default is True}
    for script in (ROOT / "scripts").rglob("*.py"):
        known |= set(re.findall(r'"--(\w+)"', script.read_text(encoding="utf-8")))
    named = {flag for page in PAGES for span in spans(page) for flag in re.findall(r"--(\w+)", span)}
    assert named <= known


@pytest.mark.parametrize("page", PAGES[:2])
def test_defaults_are_those_of_the_scripts(page):
    stages = train_pretrain_vlm.PretrainFlags(), train_sft_vlm.SFTFlags()
    rows = table(page, "pretrain" if page == "README.md" else "预训练")
    assert len(rows) > 10
    for name, *stated, _ in rows:
        name = name.strip("`-")
        defaults = [{**vars(flags), **flags.defaults_of(2)}[name] for flags in stages]
        later = [{**vars(flags), **flags.defaults_of(3)}[name] for flags in stages]
        both = [f"`{a}`" if a == b else f"`{a}`, `{b}`" for a, b in zip(defaults, later, strict=True)]
        assert stated == both, name


@pytest.mark.parametrize("page", PAGES[:2])
def test_parameters_are_those_of_the_models(page):
    for name, flags, *stated in table(page, "active" if page == "README.md" else "激活"):
        demo = "quickstart" in flags
        arguments = demo_sizes() if demo else " ".join(re.findall(r"--\w+(?: \d+)?", flags)).split()
        assert stated == list(counts(arguments, vision_width=192 if demo else 768)), name


def demo_sizes() -> list[str]:
    script = read("scripts/quickstart.sh")
    hidden, model = (
        re.search(rf'^{name}="?(.*?)"?$', script, re.MULTILINE)[1] for name in ("hidden", "model")
    )
    return model.replace("$hidden", hidden).split()


def counts(arguments: list[str], vision_width: int) -> Iterator[str]:
    """Parameters in all, of the language model, active, learning in pretraining; the fp16 file's size."""
    parser = make_parser(train_pretrain_vlm.PretrainFlags)
    (flags,) = parser.parse_args_into_dataclasses(arguments)
    config = VLMConfig(**flags.model_config())
    with torch.device("meta"):
        parameters = dict(MiniMindVLM(config, None).named_parameters())
        language = sum(p.numel() for p in MiniMindForCausalLM(config).parameters())
    projection = (vision_width + 1) * config.hidden_size
    last = f"model.layers.{config.num_hidden_layers - 1}."
    idle = 0
    if config.use_moe:
        experts = config.n_routed_experts - config.num_experts_per_tok
        idle = config.num_hidden_layers * experts * 3 * config.hidden_size * config.intermediate_size
    total = language + projection
    learning = projection + sum(p.numel() for name, p in parameters.items() if name.startswith(last))
    for number in (total, language, total - idle, learning):
        yield f"{number:,}"
    yield f"{total * 2 / 1e6:.0f} MB"


def test_demo_weights_are_those_of_the_quickstart():
    named = set(re.findall(r"out/demo/sft_vlm_(\d+)", "".join(map(read, PAGES))))
    assert named == {demo_sizes()[1]}


def test_both_languages_have_the_same_headings():
    english, chinese = (re.findall(r"^#+ ", prose(page), re.MULTILINE) for page in PAGES[:2])
    assert english == chinese


@pytest.mark.parametrize("language", ["bash", "python", "json", "text"])
def test_both_languages_have_the_same_code(language):
    english, chinese = (fences(page, language) for page in PAGES[:2])
    assert english == chinese and english


def test_both_languages_have_the_same_figures():
    english, chinese = ([[figures(row) for row in rows] for rows in tables(page)] for page in PAGES[:2])
    assert english == chinese and len(english) > 4


def figures(row: list[str]) -> list[list[str]]:
    return [sorted(re.findall(r"\d[\d.,]*\d|\d", cell)) for cell in row]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not target.startswith("https://"):
            path, _, anchor = target.partition("#")
            file = (ROOT / page).parent / path if path else ROOT / page
            assert file.is_file(), target
            assert not anchor or anchor in slugs(file), target


def slugs(file: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


ROWS = [
    pytest.param(page, line, id=f"{page}-{number}")
    for page in ("README.md", "docs/data.md")
    for number, line in enumerate("".join(fences(page, "json")).splitlines())
]


@pytest.mark.parametrize(("page", "line"), ROWS)
def test_example_rows_are_good(page, line):
    row = normalise_row(our_row(json.loads(line), "example:1")[1], "example:1")
    assert len(row["contents"]) >= 1


@pytest.mark.parametrize(("row", "message"), table("docs/data.md", "row"))
def test_bad_rows_give_the_documented_message(row, message):
    with pytest.raises(DataError, match=f"^{re.escape('captions.jsonl:7: ' + message.strip('`'))}$"):
        normalise_row(our_row(json.loads(row.strip("`")), "captions.jsonl:7")[1], "captions.jsonl:7")


def test_no_figure_is_left_open():
    assert [page for page in PAGES if OPEN in read(page)] == []
