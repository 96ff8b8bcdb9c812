"""`transformers serve` on exported folders, asked by the official client: the answers are our own."""

import base64
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import openai
import pytest
import torch
from conftest import COLOURS, GOLDEN, ROOT, start, write_rows
from PIL import Image
from release3 import make_tokenizer

from common.cli import UserError
from common.setup import build_vlm
from common.tokenizer import load_tokenizer
from common.weights import describe, half_state, save_weights
from inference.answers import Question
from inference.ask import Speaker, ask
from inference.chat import Sampling
from inference.trained import load_vlm
from scripts.interop.serving import TRANSFORMERS, data_url, serving
from scripts.interop.serving import ask as ask_server

TOKENS = 12
ASKED = {
    "one picture": ("What colour is this?", ["red.png"]),
    "another picture": ("What colour is this?", ["blue.png"]),
    "two pictures": ("Which colours?", ["blue.png", "red.png"]),
    "noise, not square": ("What is this?", ["noise.jpg"]),
    "no picture": ("你好吗？", []),
}


@dataclass
class Served:
    """`folder` is served to `client`, `speaker` is the `.pth` that it was made of."""

    client: openai.OpenAI
    folder: Path
    speaker: Speaker


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for colour in COLOURS:
        Image.new("RGB", (48, 40), colour).save(folder / f"{colour}.png")
    noise = np.random.default_rng(0).integers(0, 256, (90, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "noise.jpg")
    return folder


@pytest.fixture(scope="module")
def release_3(tmp_path_factory) -> Path:
    """A random model of release 3, loud enough for pictures and questions to matter."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("release_3")
    make_tokenizer().save_pretrained(folder / "tokenizer")
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    config = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    config |= dict(qk_norm=True, projector="mlp", head_dim=16)
    model, _ = build_vlm(config, str(GOLDEN / "v3/siglip"), tokenizer)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if not key.startswith("vision_encoder.") and parameter.dim() > 1:
                parameter.mul_(5)
    arguments = {"vision_model_path": str(GOLDEN / "v3/siglip")}
    path = folder / "sft_vlm_64.pth"
    save_weights(path, half_state(model.state_dict()), describe(model, tokenizer, "sft_vlm", 1, arguments))
    return path


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Callable[[Path, str], Path]:
    """The folder of a `.pth` in a format, made once, as users make it."""

    @cache
    def export(weight: Path, kind: str) -> Path:
        folder = tmp_path_factory.mktemp("export") / kind
        process = start(["convert_to_hf.py", "--weight", weight, "--format", kind, "--out", folder])
        _, printed = process.communicate(timeout=200)
        assert process.returncode == 0, printed
        return folder

    return export


@pytest.fixture(scope="module", params=["minimind", "llava", "llava of release 3"])
def served(request, export) -> Iterator[Served]:
    """Nothing is read or written in the user's own cache."""
    kind = request.param.split()[0]
    weight = request.getfixturevalue("release_3" if "release" in request.param else "weight")
    folder = export(weight, kind)
    trust = ["--trust-remote-code"] if kind == "minimind" else []
    command = [*TRANSFORMERS, folder, "--device", "cpu", *trust]
    log, home = folder.parent / "server.log", str(folder.parent / "hf_home")
    with serving(command, log, HF_HOME=home, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1") as client:
        yield Served(client, folder, Speaker("ours", *load_vlm(str(weight))))


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED.keys())
def test_served_answers_are_ours(served, pictures, asked, stream):
    question, names = asked
    paths = [str(pictures / name) for name in names]
    messages = [{"role": "user", "content": question}]
    expected = ask(served.speaker, Question("", messages, paths), Sampling(0, max_new_tokens=TOKENS))

    found = ask_server(served.client, served.folder, question, paths, TOKENS, stream)

    assert found == expected.text.strip() != ""


def test_answers_depend_on_the_picture(served, pictures):
    def answer(colour: str) -> str:
        return ask_server(served.client, served.folder, "What colour is this?", [pictures / f"{colour}.png"])

    assert answer("red") != answer("blue")


def test_an_answer_comes_in_pieces_and_is_counted(served, pictures):
    url = {"url": data_url(pictures / "red.png")}
    content = [{"type": "image_url", "image_url": url}, {"type": "text", "text": "What colour is this?"}]
    asked = dict(model=str(served.folder), messages=[{"role": "user", "content": content}], temperature=0)
    processor = served.speaker.processor
    prompt = processor.encode_prompt([{"role": "user", "content": "What colour is this?"}], 1)

    pieces = list(served.client.chat.completions.create(**asked, max_tokens=3, stream=True))
    usage = served.client.chat.completions.create(**asked, max_tokens=3).usage

    assert len([piece for piece in pieces if piece.choices and piece.choices[0].delta.content]) > 1
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(prompt), 3)


def test_what_is_no_picture_is_an_error_and_the_next_question_is_answered(served, pictures):
    url = {"url": f"data:image/png;base64,{base64.b64encode(b'no picture').decode()}"}
    content = [{"type": "image_url", "image_url": url}, {"type": "text", "text": "What is this?"}]

    with pytest.raises(openai.APIStatusError):
        served.client.with_options(max_retries=0).chat.completions.create(
            model=str(served.folder), messages=[{"role": "user", "content": content}]
        )

    assert ask_server(served.client, served.folder, "What is this?", [pictures / "red.png"]) != ""


def test_a_server_that_cannot_start_is_told_with_its_last_words(tmp_path):
    command = [sys.executable, "-c", "raise SystemExit('no such model')"]
    with (
        pytest.raises(UserError, match=r"ended with exit code 1, see .*log: no such model$"),
        serving(command, tmp_path / "log"),
    ):
        pass


STUB = """
import subprocess, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Up(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

print(subprocess.Popen(["sleep", "600"]).pid, flush=True)
HTTPServer(("127.0.0.1", int(sys.argv[-1])), Up).serve_forever()
"""


def test_nothing_of_a_server_is_left_whatever_happens(tmp_path):
    log = tmp_path / "log"
    with pytest.raises(KeyboardInterrupt), serving([sys.executable, "-c", STUB], log):
        worker = Path(f"/proc/{log.read_text().split()[0]}/stat")
        assert worker.exists()
        raise KeyboardInterrupt

    end = time.monotonic() + 10
    while worker.exists() and worker.read_text().split()[2] != "Z" and time.monotonic() < end:
        time.sleep(0.05)  # it dies a little later than the signal is sent
    assert not worker.exists() or worker.read_text().split()[2] == "Z"


# --- scripts/test_interop.sh: its parts that need nothing but what is installed anyway


@pytest.fixture(scope="module")
def report(weight, world, tmp_path_factory) -> Path:
    """Of our own answers to first questions."""
    folder = tmp_path_factory.mktemp("report")
    rows = [json.loads(line) for line in (world / "eval.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [row | {"conversations": row["conversations"][:2]} for row in rows]
    questions = write_rows(folder / "questions.jsonl", rows)
    asked = ["--data_path", questions, "--images_path", world / "images", "--device", "cpu"]
    asked += ["--score", "--no_blank_baseline", "--report", folder / "report.json"]
    process = start(["eval_vlm.py", "--weight", weight, *asked])
    _, printed = process.communicate(timeout=200)
    assert process.returncode == 0, printed
    return folder / "report.json"


def test_equal_answers_are_counted_and_others_told(weight, export, report, run, tmp_path):
    folder, other = export(weight, "llava"), tmp_path / "other.json"
    changed = json.loads(report.read_text(encoding="utf-8"))
    changed["questions"][1]["answer"] = "It is grey."
    other.write_text(json.dumps(changed), encoding="utf-8")

    asked = ["scripts/interop/same_answers.py", "--transformers", folder, "--logs", tmp_path, "--report"]
    same, differing = run(*asked, report), run(*asked, other, expect=1)

    cells = f"| transformers | {folder} | 7 |"
    assert same.stdout.splitlines()[2:] == [f"{cells} 7 | 7 |"]
    told = "questions.jsonl:2: What colour is this? 'It is green.', ours: 'It is grey.'"
    assert differing.stdout.splitlines()[2:] == [f"{cells} 6 | 7 |", told]


BAD = {
    "nobody": (2, "nobody to ask: give --transformers, --serve or --vllm", ["--report", "{report}"]),
    "no report": (2, "--report is missing", ["--serve", "{tmp}"]),
    "not a report": (1, "has no questions", ["--serve", "{tmp}", "--report", "{tmp}/empty.json"]),
    "no vLLM": (1, "'no/python'", ["--vllm", "{tmp}", "--vllm_python", "no/python", "--report", "{report}"]),
}


@pytest.mark.parametrize(("code", "message", "flags"), BAD.values(), ids=BAD.keys())
def test_what_cannot_be_asked_is_one_line(report, run, tmp_path, code, message, flags):
    (tmp_path / "empty.json").write_text("[]")
    flags = [flag.format(tmp=tmp_path, report=report) for flag in flags]

    told = run("scripts/interop/same_answers.py", *flags, "--logs", tmp_path, expect=code).stderr

    assert "error: " in told and message in told and "Traceback" not in told


def test_without_the_trained_demo_nothing_is_installed(tmp_path):
    for name in ("test_interop.sh", "install.sh"):
        (tmp_path / "scripts").mkdir(exist_ok=True)
        shutil.copy(ROOT / "scripts" / name, tmp_path / "scripts")
    shutil.copy(ROOT / "constraints.txt", tmp_path)

    command = ["bash", tmp_path / "scripts/test_interop.sh"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)

    expected = "error: no out/demo/sft_vlm_128.pth: bash scripts/quickstart.sh trains it\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["constraints.txt", "scripts"]
