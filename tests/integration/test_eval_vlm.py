"""eval_vlm.py as users run it, on a small model that has learnt by heart what it is asked."""

import io
import json
import os
import signal
import subprocess
import sys

import pytest
from conftest import COLOURS, ROOT, row, write_rows
from PIL import Image
from transformers import PreTrainedTokenizerFast

import eval_vlm
from common.cli import run_main


def test_score_counts_what_the_model_gets_right(world, weight, run):
    wrong = row("colour", [("What colour is this?", "It is pink.")], "red.png")
    mixed = write_rows(world / "mixed.jsonl", [*map(json.loads, (world / "eval.jsonl").open()), wrong])
    where = ["--data_path", mixed, "--images_path", world / "images"]
    report_path = world / "reports/report.json"
    result = run(
        "eval_vlm.py", "--weight", weight, *where, "--score", "--report", report_path, "--batch_size", 4
    )

    report = json.loads(report_path.read_text(encoding="utf-8"))
    assert report["n"] == 12 and report["accuracy"] == 11 / 12
    assert report["by_kind"] == {
        "(none)": {"accuracy": 1.0, "n": 1},
        "colour": {"accuracy": 8 / 9, "n": 9},
        "two": {"accuracy": 1.0, "n": 2},
    }
    assert report["mean_over_kinds"] == pytest.approx((1 + 8 / 9 + 1) / 3)
    assert report["majority"]["accuracy"] == pytest.approx((1 + 1 + 1) / 12)
    assert report["majority"]["by_kind"]["two"]["accuracy"] == 0.5
    assert (report["blank_images"], report["weight"], report["data_path"]) == (False, str(weight), str(mixed))

    asked = report["questions"]
    assert all(question["correct"] == (question["answer"] == question["expected"]) for question in asked)
    assert sum(question["correct"] for question in asked) == 11
    assert [question["where"] for question in asked[:3]] == [
        "mixed.jsonl:1",
        "mixed.jsonl:1",
        "mixed.jsonl:2",
    ]
    assert asked[1] == {
        "where": "mixed.jsonl:1",
        "kind": "colour",
        "question": "And in one word?",
        "answer": "blue",
        "expected": "blue",
        "correct": True,
        "images": [str(world / "images/blue.png")],
    }
    assert (asked[-1]["answer"], asked[-1]["correct"]) == ("It is red.", False)

    blank = report["blank"]
    assert blank["by_kind"]["(none)"] == {"accuracy": 1.0, "n": 1}, "what needs no eyes"
    assert blank["by_kind"]["two"]["accuracy"] <= 0.5, "two equal questions with different answers"
    exact = report["metrics"]["by_kind"]["colour"]["exact"]
    assert exact["value"] == pytest.approx(8 / 9) and 0.5 < exact["low"] < 8 / 9 < exact["high"] == 1
    assert list(report["metrics"]["by_kind"]["two"]["bleu"].values()) == pytest.approx([100.0] * 3)

    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[1].split()[:9] == "kind n accuracy 95 % interval contains BLEU ROUGE-L".split()
    printed = [line.split() for line in lines]
    (colour,) = [line for line in printed if line[:1] == ["colour"]]
    ends = f"{exact['low']:.3f}", f"{exact['high']:.3f}"
    assert colour[1:6] == ["9", "0.889", ends[0], "to", ends[1]]
    assert colour[-2:] == ["0.111", f"{blank['by_kind']['colour']['accuracy']:.3f}"]
    (whole,) = [line for line in printed if line[:2] == ["all", "questions"]]
    assert whole[2:4] == ["12", "0.917"] and whole[-2] == "0.250"
    assert result.stderr.count("12/12") == 2, "once more with blank pictures"


def test_blank_pictures_leave_only_what_needs_no_eyes(world, weight, run):
    where = ["--data_path", world / "eval.jsonl", "--images_path", world / "images"]
    report_path = world / "blank.json"
    run("eval_vlm.py", "--weight", weight, *where, "--score", "--blank_images", "--report", report_path)
    report = json.loads(report_path.read_text(encoding="utf-8"))
    assert report["blank_images"] is True and report["blank"] is None
    assert report["by_kind"]["(none)"]["accuracy"] == 1.0
    assert report["by_kind"]["two"]["accuracy"] <= 0.5, "two equal questions with different answers"
    first = [question for question in report["questions"] if question["question"] == "What colour is this?"]
    assert len({question["answer"] for question in first}) == 1, "grey pictures are all alike"


def test_several_pictures_are_one_question(world, weight, run):
    red, blue = world / "images/red.png", world / "images/blue.png"
    asked = ["--prompt", "Which colours?", "--temperature", 0]
    result = run("eval_vlm.py", "--weight", weight, "--image", red, "--image", blue, *asked)
    assert (
        result.stdout
        == "image:  red.png, blue.png\nprompt: Which colours?\nanswer: First red, then blue.\n\n"
    )


def test_a_folder_is_asked_about_picture_by_picture_while_streaming(world, weight, run):
    asked = ["--prompt", "What colour is this?", "--temperature", 0, "--stream"]
    result = run("eval_vlm.py", "--weight", weight, "--image_dir", world / "images", *asked)
    assert result.stdout == "".join(
        f"image:  {colour}.png\nprompt: What colour is this?\nanswer: It is {colour}.\n\n"
        for colour in COLOURS
    )


def test_a_file_is_answered_in_chat_and_ctrl_c_ends_it_with_130(world, weight):
    rows = [json.loads(line) for line in (world / "eval.jsonl").open()] * 100
    where = ["--data_path", write_rows(world / "long.jsonl", rows), "--images_path", world / "images"]
    command = [sys.executable, "eval_vlm.py", "--weight", weight, *where, "--temperature", "1e-3"]
    process = subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        lines = [process.stdout.readline() for _ in range(8)]
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert lines[:3] == ["image:  blue.png\n", "prompt: What colour is this?\n", "answer: It is blue.\n"]
    assert lines[4:7] == ["image:  blue.png\n", "prompt: And in one word?\n", "answer: blue\n"]
    assert process.returncode == 130
    assert "Traceback" not in errors


@pytest.mark.parametrize("stream", [[], ["--stream"]], ids=["whole", "streaming"])
def test_an_answer_sends_no_commands_to_the_terminal(stream, world, weight, monkeypatch, capsys):
    decode = PreTrainedTokenizerFast.decode
    monkeypatch.setattr(
        PreTrainedTokenizerFast, "decode", lambda *a, **b: decode(*a, **b).replace("red", "\x1b[2J\rred\x9b")
    )
    asked = ["--image", world / "images/red.png", "--prompt", "What colour is this?", "--temperature", 0]
    _, out, _ = call(monkeypatch, capsys, "--weight", weight, *asked, *stream)
    assert out.splitlines()[2] == "answer: It is [2Jred."


def test_names_and_questions_send_no_commands_to_the_terminal(world, weight, tmp_path, monkeypatch, capsys):
    evil = tmp_path / "\x1b[2J\x9b\nanswer: red.png"
    evil.write_bytes((world / "images/red.png").read_bytes())
    named = evil.with_suffix(".pth")
    for suffix in (".pth", ".json"):
        named.with_suffix(suffix).write_bytes(weight.with_suffix(suffix).read_bytes())
    models = ["--weight", named, "--weight", weight]
    asked = ["--image", evil, "--prompt", "What\x1b[31m is this?", "--temperature", 0, "--max_new_tokens", 2]
    code, out, _ = call(monkeypatch, capsys, *models, *asked)
    assert code == 0 and not any(char in out for char in "\x1b\x9b")
    assert out.splitlines()[:2] == ["image:  [2J answer: red.png", "prompt: What[31m is this?"]
    row_ = {**row("\x1b[2J", [("What colour is this?", "It is red.")]), "image": str(evil)}
    scored = ["--data_path", write_rows(tmp_path / "\x1b.jsonl", [row_]), "--score"]
    code, out, error = call(monkeypatch, capsys, *models, *scored)
    assert code == 0, error
    assert not any(char in out for char in "\x1b\x9b")


def test_what_is_logged_sends_no_commands_to_the_terminal(world, weight, tmp_path, run):
    for suffix in (".pth", ".json"):
        (tmp_path / f"\x1b[2J{suffix}").write_bytes(weight.with_suffix(suffix).read_bytes())
    asked = ["--image", world / "images/red.png", "--max_new_tokens", 1]
    result = run("eval_vlm.py", "--weight", tmp_path / "\x1b[2J.pth", *asked)
    assert f"{tmp_path}/[2J.pth on " in result.stderr and "\x1b" not in result.stderr


@pytest.mark.parametrize("buffered", [True, False], ids=["buffered", "PYTHONUNBUFFERED"])
@pytest.mark.parametrize("stream", [[], ["--stream"]], ids=["whole", "streaming"])
def test_a_reader_that_has_gone_ends_it_quietly(stream, buffered, world, weight, monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)  # as `| head -1` does, once it has its line
    asked = ["--weight", weight, "--image_dir", world / "images", "--temperature", 0, *stream]
    with text_stream(writer, buffered) as stdout:  # closing it flushes once more, as the interpreter does
        monkeypatch.setattr(sys, "stdout", stdout)
        code, _, error = call(monkeypatch, capsys, *asked)
    assert code == 1
    assert "rror" not in error and "Traceback" not in error


@pytest.mark.parametrize("buffered", [True, False], ids=["buffered", "PYTHONUNBUFFERED"])
def test_a_full_disk_behind_stdout_is_one_line(buffered, world, weight, monkeypatch, capsys):
    asked = ["--weight", weight, "--image", world / "images/red.png", "--temperature", 0]
    with text_stream(os.open("/dev/full", os.O_WRONLY), buffered) as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        code, _, error = call(monkeypatch, capsys, *asked)
    assert code == 1
    lines = [line for line in error.splitlines() if "rror" in line]
    assert lines == ["error: cannot write to stdout: No space left on device"]


def text_stream(descriptor: int, buffered: bool) -> io.TextIOWrapper:
    binary = os.fdopen(descriptor, "wb", -1 if buffered else 0)
    return io.TextIOWrapper(binary, "utf-8", write_through=not buffered)


def call(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of eval_vlm.py, without the seconds that a process of its own takes."""
    monkeypatch.setattr(sys, "argv", ["eval_vlm.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        run_main(eval_vlm.main)
    captured = capsys.readouterr()
    return exit_.value.code, captured.out, captured.err


def test_sampling_follows_the_seed(world, weight, monkeypatch, capsys):
    asked = [
        "--image",
        world / "images/red.png",
        "--prompt",
        "Hm",
        "--temperature",
        5,
        "--max_new_tokens",
        20,
    ]
    answers = [
        call(monkeypatch, capsys, "--weight", weight, *asked, "--top_p", 1, "--seed", seed)[1]
        for seed in (1, 1, 2)
    ]
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.parametrize(
    "sampling",
    [["--temperature", "1e-7"], ["--temperature", "1e-40"], ["--temperature", "5", "--top_p", "1e-40"]],
    ids=" ".join,
)
def test_what_leaves_no_choice_answers_as_greedy_does(sampling, world, weight, monkeypatch, capsys):
    asked = ["--image", world / "images/red.png", "--prompt", "What colour is this?"]
    code, out, error = call(monkeypatch, capsys, "--weight", weight, *asked, *sampling)
    assert code == 0 and "Traceback" not in error
    assert out.splitlines()[2] == "answer: It is red."


def test_without_weights_both_ways_to_get_some_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, _, error = call(monkeypatch, capsys)
    assert code == 1
    assert "scripts/quickstart.sh" in error and "scripts/download.py encoder vlm" in error


def test_default_weight_is_the_published_name_then_the_newest_of_the_demo(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    demo = tmp_path / "out/demo"
    demo.mkdir(parents=True)
    for age, name in enumerate(("sft_vlm_96.pth", "sft_vlm_128.pth", "sft_vlm_64.pth")):
        (demo / name).touch()
        os.utime(demo / name, (1e9 - age, 1e9 - age))
    assert eval_vlm.default_weight() == "out/demo/sft_vlm_96.pth"
    (tmp_path / "out/sft_vlm_512.pth").touch()
    assert eval_vlm.default_weight() == "out/sft_vlm_512.pth"


def test_default_pictures_are_the_shipped_ones(tmp_path, monkeypatch, capsys, weight):
    pictures = tmp_path / "dataset/eval_images"
    pictures.mkdir(parents=True)
    for name in ("b.webp", "a.JPG", "c.png"):
        Image.new("RGBA", (30, 30)).convert("RGB").save(pictures / name)
    (pictures / "CREDITS.md").write_text("credits")
    monkeypatch.chdir(tmp_path)
    files = ["--weight", weight, "--tokenizer_path", ROOT / "model/tokenizer"]
    code, out, _ = call(monkeypatch, capsys, *files, "--max_new_tokens", 2)
    assert code == 0
    assert [line for line in out.splitlines() if line.startswith("image:")] == [
        f"image:  {name}" for name in ("a.JPG", "b.webp", "c.png")
    ]
    assert out.count("prompt: Describe the picture.\n") == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--score"], "--score needs --data_path"),
        (["--data_path", "x.jsonl", "--blank_images"], "--blank_images needs --score"),
        (["--data_path", "x.jsonl", "--report", "r.json"], "--report r.json: expected a .html or .md file"),
        (["--data_path", "x.jsonl", "--score", "--report", "r.md"], "--report r.md: expected JSON"),
        (["--perplexity"], "--perplexity needs --data_path"),
        (["--data_path", "x", "--perplexity", "--score"], "--score and --perplexity exclude each other"),
        (["--chat", "--image_dir", "."], "--chat and --image_dir exclude each other"),
        (["--chat", "--prompt", "Hm?"], "--prompt is not for --chat"),
        (["--images_path", "images"], "--images_path needs --data_path"),
        (["--image", "a.png", "--data_path", "x.jsonl"], "--image and --data_path exclude each other"),
        (["--image", "a.png", "--image_dir", "."], "--image and --image_dir exclude each other"),
        (["--data_path", "x.jsonl", "--score", "--stream"], "--stream shows answers"),
        (["--temperature", "-0.1"], "--temperature must be finite and not negative, found -0.1"),
        (["--temperature", "nan"], "--temperature must be finite and not negative, found nan"),
        (["--temperature", "inf"], "--temperature must be finite and not negative, found inf"),
        (["--top_p", "0"], "--top_p must be above 0 and at most 1, found 0.0"),
        (["--top_p", "nan"], "--top_p must be above 0 and at most 1, found nan"),
        (["--top_p", "inf"], "--top_p must be above 0 and at most 1, found inf"),
        (["--batch_size", "0"], "--batch_size must be above 0, found 0"),
        (["--prompt", "caf\udce9"], "--prompt: not text in UTF-8"),
        (["--max_new_tokens", "0"], "--max_new_tokens must be above 0, found 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_flags_that_make_no_sense_are_wrong_usage(arguments, message, monkeypatch, capsys):
    code, _, error = call(monkeypatch, capsys, *arguments)
    assert (code, message in error) == (2, True), error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--weight", "no_such_weights", "--image", "{world}/images/red.png"],
            "no_such_weights: no such weights",
        ),
        (["--image", "{world}/no.png"], "--image: cannot read image {world}/no.png ([Errno 2] No such file"),
        (["--image", "{world}/eval.jsonl"], "--image: cannot read image {world}/eval.jsonl"),
        (["--image", "{too_long}"], "--image: cannot read image {too_long} ([Errno 36] File name too long"),
        (["--image_dir", "{world}/no"], "--image_dir {world}/no: no such folder"),
        (["--image_dir", "{too_long}"], "--image_dir {too_long}: [Errno 36] File name too long"),
        (["--image_dir", "{world}"], "--image_dir {world}: no picture, expected .png"),
        (["--image", "{world}/images/red.png", "--prompt", "<image> <image>"], "2 <image> markers"),
        (["--data_path", "{world}/no.jsonl"], "{world}/no.jsonl does not exist, expected a JSONL"),
        (["--data_path", "{too_long}"], "{too_long} cannot be read (File name too long), expected a JSONL"),
        (["--data_path", "{world}/name.jsonl"], "name.jsonl:1: image '{too_long}' not found"),
        (["--data_path", "{world}/eval.jsonl"], "eval.jsonl:5: image 'red.png' not found"),
        (["--data_path", "{world}/broken.jsonl"], "broken.jsonl:2: not JSON"),
        (["--data_path", "{world}/texts.jsonl"], "{world}/texts.jsonl: no question"),
        (
            ["--data_path", "{world}/text.jsonl", "--score", "--report", "{world}"],
            "--report {world}: is a folder",
        ),
        (["--data_path", "{world}/text.jsonl", "--score", "--report", "{world}/text.jsonl/r"], "--report"),
        (
            ["--data_path", "{world}/text.jsonl", "--score", "--report", "/proc/r.json"],
            "--report /proc/r.json",
        ),
        (["--data_path", "{world}/text.jsonl", "--score", "--report", "{too_long}"], "--report {too_long}: "),
        (
            ["--image", "{world}/images/red.png", "--vision_model_path", "{world}"],
            "is not a usable vision encoder",
        ),
        (
            ["--image", "{world}/images/red.png", "--vision_model_path", "{world}/no"],
            "scripts/download.py clip",
        ),
        (
            ["--image", "{world}/images/red.png", "--tokenizer_path", "{world}/no"],
            "--tokenizer_path {world}/no",
        ),
        (["--image", "{world}/images/red.png", "--device", "cuda:99"], "--device cuda:99"),
        (
            ["--image", "{world}/images/red.png", "--weight", "{too_long}"],
            "--weight: [Errno 36] File name too",
        ),
        (
            ["--image", "{world}/images/red.png", "--weight", "{world}/{too_long}.pth"],
            "--weight: [Errno 36] File name too",
        ),
        (
            ["--image", "{world}/images/red.png", "--tokenizer_path", "{too_long}"],
            "--tokenizer_path {too_long}: ",
        ),
        (["--image", "{world}/images/red.png", "--vision_model_path", "{too_long}"], "too long"),
        (["--image", "{world}/\x1b[2J.png"], "--image: cannot read image {world}/[2J.png ("),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_clear_line(arguments, message, world, weight, monkeypatch, capsys):
    text = row("", [("Hm?", "Ah.")])
    write_rows(world / "text.jsonl", [text])
    write_rows(world / "texts.jsonl", [{"text": "Nobody asks."}])
    (world / "broken.jsonl").write_text(json.dumps(text) + "\n{'single': 'quotes'}\n")
    write_rows(world / "name.jsonl", [row("", [("Hm?", "Ah.")], "a" * 300)])
    places = {"{world}": str(world), "{too_long}": "a" * 300}
    given = [filled(argument, places) for argument in arguments]
    if "--weight" not in given:
        given += ["--weight", str(weight)]
    code, _, error = call(monkeypatch, capsys, *given)
    assert code == 1
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    assert filled(message, places) in line
    assert "Traceback" not in error


def test_a_name_that_is_not_text_is_escaped_in_an_error(world, weight, run):
    result = run("eval_vlm.py", "--weight", weight, "--image", world / "caf\udce9.png", expect=1)
    assert f"error: --image: cannot read image {world}/caf\\udce9.png ([Errno 2]" in result.stderr


def filled(text: str, places: dict[str, str]) -> str:
    for name, value in places.items():
        text = text.replace(name, value)
    return text
