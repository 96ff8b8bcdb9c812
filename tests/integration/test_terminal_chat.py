"""eval_vlm.py --chat: typed into a real terminal, and piped; on the small model that knows four colours."""

import io
import json
import os
import re
import sys

import pexpect
import pytest
import torch
from conftest import ROOT

import eval_vlm
from common.cli import run_main
from common.weights import save_weights
from dataset.rows import load_rows
from inference.terminal import chat as terminal_chat

RED_CELL = "38;2;255;0;0;48;2;255;0;0m▀"
PROMPT = "> $"
TOO_LONG = "a" * 300  # file systems take 255 bytes


@pytest.fixture
def terminal(world, weight):
    """Starts a chat in a terminal of 100 x 40 characters that has 24-bit colours."""
    started = []

    def start(*arguments, **env) -> pexpect.spawn:
        base = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
        base |= {"TERM": "xterm-256color", "COLORTERM": "truecolor", "OMP_NUM_THREADS": "1"}
        command = ["eval_vlm.py", "--weight", weight, "--chat", *arguments]
        started.append(
            pexpect.spawn(
                sys.executable,
                list(map(str, command)),
                cwd=str(ROOT),
                env={**base, **env},
                encoding="utf-8",
                timeout=120,
                dimensions=(40, 100),
            )
        )
        return started[-1]

    yield start
    for process in started:
        process.close(force=True)


def say(process: pexpect.spawn, keys: str) -> str:
    """Types a line; what the terminal showed until the next prompt."""
    process.sendline(keys)
    process.expect(PROMPT)
    return process.before


def test_conversation_in_a_terminal(world, terminal, tmp_path):
    images = world / "images"
    process = terminal("--image", images / "red.png", "--temperature", 0)
    process.expect(PROMPT)
    assert RED_CELL in process.before and "picture 1: red.png" in process.before
    assert "\r\nIt is red.\r\n" in say(process, "What colour is this?")
    assert "\r\nred\r\n" in say(process, "And in one word?"), "the turn before is known"
    assert "And in one word?\r\n" in say(process, "\x1b[A"), "arrow up"

    assert "forgotten" in say(process, "/reset")
    say(process, f"/image {images}/blue.png")
    say(process, f"/image {images}/red.png")
    assert "First blue, then red." in say(process, "Which colours?")
    assert "no such command" in say(process, "/frob")
    assert "It is blue." not in say(process, "/save " + str(tmp_path / "chat.md"))
    assert "**You:** Which colours?" in (tmp_path / "chat.md").read_text()
    process.sendeof()
    process.expect(pexpect.EOF)
    process.close()
    assert process.exitstatus == 0


def test_ctrl_c_stops_an_answer_then_ends_the_chat(world, terminal, tmp_path):
    endless = ["--temperature", 5, "--top_p", 1, "--max_new_tokens", 20_000]
    process = terminal("--image", world / "images/red.png", *endless, NO_COLOR="1")
    process.expect(PROMPT)
    assert "▀" not in process.before
    process.sendline("Hm?")
    process.expect(r"Hm\?\r\n.{200}")  # the answer grows
    process.sendintr()
    process.expect(r"\(stopped\)")
    process.expect(PROMPT)
    say(process, f"/save {tmp_path}/chat.json")
    (row,) = json.loads((tmp_path / "chat.json").read_text(encoding="utf-8"))
    assert len(row["conversations"][1]["content"]) >= 100, "what was said is kept"
    process.sendintr()
    process.expect(pexpect.EOF)
    process.close()
    assert process.exitstatus == 130
    assert "Traceback" not in process.before


@pytest.fixture
def chat(monkeypatch, capsys):
    """Pipes lines into a chat: exit code, stdout and stderr."""

    def chat(*lines: str, arguments=()) -> tuple[int, str, str]:
        typed = "".join(f"{line}\n" for line in lines).encode(errors="surrogateescape")
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed), "utf-8"))
        command = ["eval_vlm.py", "--chat", "--temperature", 0, *arguments]
        monkeypatch.setattr(sys, "argv", list(map(str, command)))
        with pytest.raises(SystemExit) as exit_:
            run_main(eval_vlm.main)
        return exit_.value.code, *capsys.readouterr()

    return chat


def test_piped_questions_are_answered(world, weight, chat):
    pictures = ["--image", world / "images/red.png", "--image", world / "images/blue.png"]
    code, out, _ = chat("Which colours?", "/quit", "Never asked", arguments=["--weight", weight, *pictures])
    assert code == 0
    assert out.splitlines() == ["picture 1: red.png", "picture 2: blue.png", "First red, then blue."]


def test_dropped_pictures_are_out_of_the_conversation(world, weight, chat, tmp_path):
    images, saved = world / "images", tmp_path / "chat.json"
    lines = [
        f"/image '{images}/green.png'",
        f"/image {images}/red.png",
        "/drop 1",
        "What colour is this?",
        f"/image {images}/yellow.png",
        "/images",
        "/drop",
        "And in one word?",
        "/drop 1",
        "/images",
        f"/save {saved}",
    ]
    code, out, _ = chat(*lines, arguments=["--weight", weight])
    assert code == 0
    shown = out.splitlines()
    assert shown[2:4] == ["dropped green.png", "It is red."]
    assert shown[5:7] == [f"1: {images}/red.png", f"2: {images}/yellow.png (for the next question)"]
    assert shown[7:9] == ["dropped yellow.png", "red"]
    assert shown[9:11] == ["dropped red.png", "no pictures"]
    (row,) = json.loads(saved.read_text(encoding="utf-8"))
    assert row == {
        "weight": str(weight),
        "image": [],
        "conversations": [
            {"role": "user", "content": "What colour is this?"},
            {"role": "assistant", "content": "It is red."},
            {"role": "user", "content": "And in one word?"},
            {"role": "assistant", "content": "red"},
        ],
    }


def test_a_saved_conversation_can_be_scored(world, weight, chat, monkeypatch, capsys, tmp_path):
    picture = world / "images/green.png"
    chat(
        "What colour is this?", f"/save {tmp_path}/c.json", arguments=["--weight", weight, "--image", picture]
    )
    arguments = ["--weight", weight, "--data_path", tmp_path / "c.json", "--score", "--no_blank_baseline"]
    monkeypatch.setattr(sys, "argv", ["eval_vlm.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        run_main(eval_vlm.main)
    assert exit_.value.code == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("all questions")]
    assert line.split()[2:4] == ["1", "1.000"]


def test_mistakes_are_one_line_and_the_chat_goes_on(world, weight, chat, tmp_path):
    (tmp_path / "broken.gif").write_bytes(b"no picture")
    mistakes = {
        "/image": "/image needs the path",
        "/image no.png": "/image: cannot read image no.png ([Errno 2] No such file",
        f"/image {tmp_path}/broken.gif": "/image: cannot read image",
        f"/image {TOO_LONG}.png": "File name too long",
        "/image ~nobody_at_all/x.png": "/image ~nobody_at_all/x.png: ",
        "/drop": "/drop : no such picture, there are 0",
        "/drop x": "/drop x: no such picture, there are 0",
        "/frob 1": "/frob: no such command, see /help",
        "/save notes.txt": "/save notes.txt: expected a file name that ends in .md or .json",
        f"/save {world}/eval.jsonl/chat.md": f"cannot write {world}/eval.jsonl/chat.md",
        f"/save {TOO_LONG}.md": "File name too long",
        "/save ~nobody_at_all/x.md": "/save ~nobody_at_all/x.md: ",
        "/save \0.md": "/save .md: embedded null",
    }
    code, out, error = chat(*mistakes, "/help", arguments=["--weight", weight])
    assert code == 0 and "/image PATH" in out
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == len(mistakes)
    for line, message in zip(lines, mistakes.values(), strict=True):
        assert message in line
    assert "Traceback" not in error


ODD = {
    "a space": ("my file.png", "{folder}/my file.png"),
    "a dropped space": ("my file.png", "{folder}/my\\ file.png"),
    "a quoted space": ("my file.png", "'{folder}/my file.png'"),
    "a quote in quotes": ("it's.png", "'{folder}/it'\\''s.png'"),
    "a lone quote": ("it's.png", "{folder}/it's.png"),
    "a URL": ("my file.png", "file://{folder}/my%20file.png"),
    "a quoted URL": ("my file.png", "'file://{folder}/my%20file.png'"),
    "a URL's own name": ("my%20file.png", "{folder}/my%20file.png"),
    "backslashes of its own": ("my\\ file.png", "{folder}/my\\ file.png"),
    "quotes of its own": ("'mine'.png", "{folder}/'mine'.png"),
    "bytes that are not UTF-8": ("caf\udce9.png", "{folder}/caf\udce9.png"),
    "such bytes in a URL": ("caf\udce9.png", "file://{folder}/caf%E9.png"),
}


@pytest.mark.parametrize(("name", "typed"), ODD.values(), ids=ODD)
def test_a_picture_is_found_as_terminals_paste_it(name, typed, world, weight, chat, tmp_path):
    (tmp_path / name).write_bytes((world / "images/red.png").read_bytes())
    lines = [f"/image {typed.format(folder=tmp_path)}", "What colour is this?", f"/save {tmp_path}/c.md"]
    code, out, error = chat(*lines, arguments=["--weight", weight])
    assert code == 0 and "error" not in error
    shown = name.encode(errors="backslashreplace").decode()
    assert out.splitlines()[:2] == [f"picture 1: {shown}", "It is red."]
    assert "It is red." in (tmp_path / "c.md").read_text(encoding="utf-8")


def test_names_and_questions_send_no_commands_to_the_terminal(world, weight, chat, tmp_path):
    evil = tmp_path / "\x1b[2J\x9bred.png"
    evil.write_bytes((world / "images/red.png").read_bytes())
    lines = [f"/image {evil}", "/images", "/drop", f"/image {evil}x", f"/\x1bfrob {evil}"]
    lines.append(f"/save {tmp_path}/\x1b.md")
    code, out, error = chat(*lines, arguments=["--weight", weight])
    assert code == 0
    assert not any(char in out + error for char in "\x1b\x9b")
    assert out.splitlines()[0] == "picture 1: [2Jred.png"


def test_a_chat_without_stdin_or_stdout_is_one_line(weight, monkeypatch, capsys):
    for stream in ("stdin", "stdout"):
        monkeypatch.setattr(sys, stream, None)
    monkeypatch.setattr(sys, "argv", ["eval_vlm.py", "--chat", "--weight", str(weight)])
    with pytest.raises(SystemExit) as exit_:
        run_main(eval_vlm.main)
    assert exit_.value.code == 1
    assert "error: --chat: stdin is closed, expected questions there" in capsys.readouterr().err


def test_a_question_that_is_not_text_is_one_line_and_the_chat_goes_on(world, weight, chat):
    arguments = ["--weight", weight, "--image", world / "images/red.png"]
    code, out, error = chat("What colour \udce9 is this?", "What colour is this?", arguments=arguments)
    assert code == 0 and "Traceback" not in error
    assert "error: the question is not text in UTF-8: " in error
    assert out.splitlines()[1:] == ["It is red."]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("no.png", "--image: cannot read image {world}/no.png ([Errno 2] No such file"),
        ("eval.jsonl", "cannot read image"),
    ],
)
def test_a_first_picture_that_is_not_usable_ends_it(image, message, world, weight, chat):
    code, _, error = chat("Hm?", arguments=["--weight", weight, "--image", world / image])
    assert code == 1
    assert message.replace("{world}", str(world)) in error and "Traceback" not in error


def test_a_conversation_longer_than_the_model_is_one_line(world, weight, chat):
    """196 tokens of one picture fit into 250 positions, those of two do not."""
    sidecar = json.loads(weight.with_suffix(".json").read_text())
    sidecar["config"]["max_position_embeddings"] = 250
    short = weight.with_name("short_64.pth")
    save_weights(short, torch.load(weight, weights_only=True), sidecar)
    picture = f"/image {world}/images/red.png"
    lines = [picture, "What colour is this?", picture, "And now?", "/drop", "And in one word?"]
    code, out, error = chat(*lines, arguments=["--weight", short])
    assert code == 0
    shown = [line for line in out.splitlines() if not line.startswith(("picture", "dropped"))]
    assert shown == ["It is red.", "red"]
    assert re.search(r"error: the conversation has \d+ tokens, but \S+ has room for 250: /drop a", error)
    assert "Traceback" not in error


def test_several_models_answer_side_by_side_each_in_its_own_conversation(world, weight, chat, tmp_path):
    other = weight.with_name("mute_64.pth")
    state = {
        name: tensor * (0 if "vision_proj" in name else 1) for name, tensor in torch.load(weight).items()
    }
    save_weights(other, state, json.loads(weight.with_suffix(".json").read_text()))
    arguments = ["--weight", weight, other, "--image", world / "images/yellow.png", "--max_new_tokens", 9]
    code, out, _ = chat("What colour is this?", f"/save {tmp_path}/c.json", arguments=arguments)
    assert code == 0
    answers = [line for line in out.splitlines() if line.startswith(str(world))]
    assert answers[0] == f"{weight}: It is yellow." and answers[1].startswith(f"{other}: ")
    first, second = json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))
    assert (first["weight"], second["weight"]) == (str(weight), str(other))
    assert first["image"] == second["image"] == [str(world / "images/yellow.png")]
    assert first["conversations"][1] != second["conversations"][1]


def test_what_is_saved_is_read_though_a_model_was_silent(world, weight, chat, monkeypatch, tmp_path):
    """Two models, three questions, each about a picture of its own; the last one gets no answer at all."""
    answers = iter(["It is red.", " \n", "", "It is blue.", " ", "\n"])
    monkeypatch.setattr(terminal_chat, "stream_answer", lambda *_: (piece for piece in [next(answers)]))
    lines = []
    for colour in ("red", "blue", "green"):
        lines += [f"/image {world}/images/{colour}.png", f"{colour}?"]
    saved = tmp_path / "chat.json"
    code, _, _ = chat(*lines, f"/save {saved}", arguments=["--weight", weight, weight])
    assert code == 0
    found = [(row["images"], row["contents"]) for row in load_rows([saved])]
    assert found == [
        ([f"{world}/images/{colour}.png"], [f"<image>\n{colour}?", f"It is {colour}."])
        for colour in ("red", "blue")
    ]


def test_a_model_that_said_nothing_has_no_row(world, weight, chat, monkeypatch, tmp_path):
    answers = iter(["Yes.", ""])
    monkeypatch.setattr(terminal_chat, "stream_answer", lambda *_: (piece for piece in [next(answers)]))
    chat("Hm?", f"/save {tmp_path}/c.json", arguments=["--weight", weight, weight])
    (row,) = load_rows([tmp_path / "c.json"])
    assert row["contents"] == ["Hm?", "Yes."]
