"""scripts/bench/load_web_demo.py against a page that answers as web_demo.py does, without a model."""

import sys
import time
from collections.abc import Iterator

import gradio as gr
import pytest
from conftest import ROOT
from PIL import Image
from test_training import error_line

sys.path.insert(0, str(ROOT / "scripts/bench"))
from load_web_demo import chat, connect

PAUSE = 0.4


def ask(message: dict, shown: list, temperature: float) -> Iterator[tuple]:
    """The question as soon as it is there, a first word, the whole answer; "?" is refused."""
    if message["text"] == "?":
        yield (gr.skip(),) * 3
        return
    files = [{"role": "user", "content": {"path": path}} for path in message["files"]]
    answer = {"role": "assistant", "content": ""}
    shown = [*shown, *files, {"role": "user", "content": message["text"]}, answer]
    yield None, shown, shown
    for answer["content"] in ("It", "It is so."):
        time.sleep(PAUSE)
        yield None, shown, shown


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Of a page that answers one question at a time; one more may wait."""
    with gr.Blocks(analytics_enabled=False) as page:
        question, shown, temperature = gr.MultimodalTextbox(), gr.Chatbot(), gr.Number(0, label="temperature")
        state = gr.State([])
        question.submit(ask, [question, state, temperature], [question, shown, state], api_name="ask")
    page.queue(max_size=1)
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True)
    yield address
    page.close(verbose=False)


def test_the_first_piece_is_the_first_that_has_text(world, url):
    turns = chat(connect(url), world / "images/red.png", ["What is this?", "Really?"])
    assert [turn.answer for turn in turns] == ["It is so."] * 2
    for turn in turns:
        assert 0.5 * PAUSE < turn.seconds - turn.seconds_to_first < 1.5 * PAUSE < turn.seconds


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--url", "http://127.0.0.1:9"], "--url http://127.0.0.1:9: "),
        (["--chats", 4], "--chats 4: the page's queue is full"),
        (
            ["--prompt", "?"],
            "the chat shows [], expected ['What is this?', 'It is so.', '?', '...']",
        ),
    ],
    ids=["no_server", "queue", "refused"],
)
def test_what_gets_no_answer_is_one_line(tmp_path, url, run, flags, message):
    Image.new("RGB", (48, 40), "red").save(tmp_path / "red.png")
    flags = ["--url", url, "--image_dir", tmp_path, "--prompt", "What is this?", *flags]
    assert message in error_line(run("scripts/bench/load_web_demo.py", *flags, expect=1, timeout=60))
