"""web_demo.py as users meet it: the real server, a real browser, and several clients at once."""

import io
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import gradio as gr
import httpx
import pytest
import torch
from conftest import COLOURS, ROOT, TINY_ENCODER
from gradio.route_utils import delete_files_created_by_app
from gradio_client import Client, handle_file
from gradio_client.utils import Status
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from common.cli import UserError
from common.setup import build_vlm
from common.weights import half_state, save_weights
from inference.web.events import Demo, find_models
from inference.web.page import EXAMPLES, build_page
from web_demo import private_paths

sys.path.insert(0, str(ROOT / "scripts/bench"))
from screenshot_web_demo import find_browser

BROWSER = find_browser()
expect.set_options(timeout=30_000)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def start(folder: Path, port: int, *flags: str, **env: str) -> subprocess.Popen:
    """A server that answers already, working in `folder`."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "web_demo.py"), "--port", str(port), "--device", "cpu", *flags],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        stderr=subprocess.PIPE,
        text=True,
    )
    line = process.stderr.readline()
    assert f"open http://127.0.0.1:{port}" in line, line + process.stderr.read()
    return process


BABBLER = "out/babbler/sft_vlm_64.pth"


@pytest.fixture(scope="module")
def site(weight, tokenizer, tmp_path_factory) -> Path:
    """A working folder with three models in out/: two that know colours, and one that knows no end."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "dataset").symlink_to(ROOT / "dataset")
    for name in ("sft_vlm_512", "other/sft_vlm_64"):
        (folder / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        for suffix in (".pth", ".json"):
            shutil.copy(weight.with_suffix(suffix), folder / "out" / f"{name}{suffix}")
    torch.manual_seed(0)
    sidecar = json.loads(weight.with_suffix(".json").read_text())
    untrained, _ = build_vlm(sidecar["config"], str(TINY_ENCODER), tokenizer)
    save_weights(folder / BABBLER, half_state(untrained.state_dict()), sidecar)
    return folder


def choose(page: Page, weight: str) -> None:
    page.click("#model input")
    expect(page.locator("#model ul li")).to_have_count(3)
    page.locator("#model ul li").get_by_text(weight).click()
    expect(page.get_by_text(f"A new conversation with {weight}")).to_be_visible()


@pytest.fixture(scope="module")
def server(site) -> Iterator[tuple[str, subprocess.Popen]]:
    port = free_port()
    (site / "uploads").mkdir()
    process = start(site, port, GRADIO_TEMP_DIR=str(site / "uploads"))
    yield f"http://127.0.0.1:{port}", process
    process.terminate()
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 143 and "Traceback" not in errors
    assert not [path for path in (site / "uploads").rglob("*") if path.is_file()]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if BROWSER is None:
        (pytest.fail if "CI" in os.environ else pytest.skip)("no Chromium here (apt install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(server, browser) -> Iterator[Page]:
    yield from opened(browser, server[0])


def opened(browser: Browser, url: str, **options) -> Iterator[Page]:
    """The page as a new visitor sees it; it may ask nobody but its own server for anything."""
    context = browser.new_context(**options)
    page = context.new_page()
    asked: set[str] = set()
    page.on("request", lambda request: asked.add(request.url))
    page.goto(url)
    expect(page.locator("#question textarea")).to_be_visible()
    yield page
    context.close()
    strangers = [address for address in asked if not address.startswith((url, "data:", "blob:"))]
    assert strangers == []


def ask(page: Page, text: str, *pictures: Path | str) -> None:
    write(page, text, *pictures)
    page.press("#question textarea", "Enter")


def write(page: Page, text: str, *pictures: Path | str) -> None:
    for number, picture in enumerate(pictures, start=1):
        page.set_input_files("#question input[type=file]", str(picture))
        expect(page.locator("#question .thumbnail-item")).to_have_count(number)
    page.fill("#question textarea", text)


def answers(page: Page):
    return page.locator("#chat .bot.message")


def colour_of(page: Page, image) -> tuple[int, ...]:
    """The middle pixel of an <img>."""
    expect(image).to_be_visible()
    picture = Image.open(io.BytesIO(page.request.get(image.get_attribute("src")).body())).convert("RGB")
    return picture.getpixel((picture.width // 2, picture.height // 2))


def test_a_picture_is_asked_about_and_the_panel_shows_what_was_seen(world, page):
    ask(page, "What colour is this?", world / "images/red.png")
    expect(answers(page)).to_have_text(["It is red."])
    assert colour_of(page, page.locator("#saw img").first) == (255, 0, 0)

    page.click("#look")
    expect(page.locator("#attention img")).to_have_count(1)
    whole = page.locator("#attention img").get_attribute("src")
    assert colour_of(page, page.locator("#attention img")) != (255, 0, 0), "nothing is drawn over the picture"
    page.click("#token input")
    options = page.locator("#token ul li")
    expect(options.first).to_contain_text("whole answer (mean)")
    expect(options.nth(1)).to_contain_text("1. ")
    options.nth(1).click()
    expect(page.locator("#attention img")).not_to_have_attribute("src", whole)
    ask(page, "And in one word?")
    expect(answers(page)).to_have_text(["It is red.", "red"])
    expect(page.locator("#attention")).to_be_hidden()

    page.reload()
    expect(page.locator("#chat .example")).to_have_count(len(EXAMPLES))
    expect(answers(page)).to_have_count(0)
    ask(page, "Which colours?", world / "images/blue.png", world / "images/red.png")
    expect(answers(page)).to_have_text(["First blue, then red."])
    expect(page.locator("#saw img")).to_have_count(2)
    page.click("#new")
    expect(answers(page)).to_have_count(0)


def test_an_answer_grows_until_it_is_stopped(world, page):
    choose(page, BABBLER)
    page.get_by_text("Settings").first.click()
    longest = page.get_by_label("number input for Longest answer, in tokens")
    longest.fill("1024")
    longest.press("Tab")
    ask(page, "What colour is this?", world / "images/red.png")
    answer = answers(page).first
    lengths: list[int] = []
    deadline = time.monotonic() + 30
    while len(set(lengths)) < 3 and time.monotonic() < deadline:
        lengths.append(len(answer.text_content()))
    assert len(set(lengths)) == 3 and lengths == sorted(lengths)
    page.click("#question .stop-button")
    expect(page.locator("#question .submit-button")).to_be_visible()
    page.wait_for_timeout(500)  # what was on its way
    stopped = answer.text_content()
    page.wait_for_timeout(500)
    assert answer.text_content() == stopped
    choose(page, "out/sft_vlm_512.pth")
    ask(page, "What colour is this?", world / "images/green.png")
    expect(answers(page)).to_have_text(["It is green."])


def test_an_example_is_asked_with_a_click(page):
    page.locator("#chat .example").first.click()
    expect(answers(page)).to_have_count(1)
    expect(page.locator("#chat")).to_contain_text("What is this?")
    expect(page.locator("#saw img")).to_have_count(1)


def test_a_broken_file_is_told_and_the_server_goes_on(world, page, tmp_path):
    broken = tmp_path / "holiday.png"
    broken.write_bytes((world / "images/red.png").read_bytes()[:60])
    ask(page, "What colour is this?", broken)
    expect(page.get_by_text("holiday.png is not a picture that can be read")).to_be_visible()
    expect(answers(page)).to_have_count(0)
    expect(page.locator("#question textarea")).to_have_value("What colour is this?")
    page.reload()
    ask(page, "What colour is this?", world / "images/green.png")
    expect(answers(page)).to_have_text(["It is green."])
    ask(page, "<image> <image> what?")
    expect(page.get_by_text("3 <image> markers in the user's turns, but 1 images")).to_be_visible()
    expect(answers(page)).to_have_count(1)


def drop(page: Page, target: str, picture: Path) -> None:
    """Lets go of a file over the middle of what `target` finds, as from a file manager."""
    box = page.locator(target).bounding_box()
    middle = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
    data = {"items": [], "files": [str(picture)], "dragOperationsMask": 1}
    browser = page.context.new_cdp_session(page)
    for event in ("dragEnter", "dragOver", "drop"):
        browser.send("Input.dispatchDragEvent", {"type": event, **middle, "data": data})


@pytest.mark.parametrize("target", ["#question textarea", "#chat"])
def test_a_picture_is_dropped_on_the_question_or_beside_it(target, world, page):
    drop(page, target, world / "images/yellow.png")
    expect(page.locator("#question .thumbnail-item")).to_have_count(1)
    ask(page, "What colour is this?")
    expect(answers(page)).to_have_text(["It is yellow."])


def test_a_picture_is_pasted(world, page):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    picture = list((world / "images/blue.png").read_bytes())
    page.evaluate(
        """bytes => navigator.clipboard.write([
            new ClipboardItem({"image/png": new Blob([new Uint8Array(bytes)], {type: "image/png"})})
        ])""",
        picture,
    )
    page.press("#question textarea", "Control+v")
    expect(page.locator("#question .thumbnail-item")).to_have_count(1)
    ask(page, "What colour is this?")
    expect(answers(page)).to_have_text(["It is blue."])


def test_too_large_a_file_is_told_and_not_sent(world, page, tmp_path):
    large = tmp_path / "huge.png"
    large.write_bytes((world / "images/red.png").read_bytes().ljust(10_500_000, b"0"))
    page.set_input_files("#question input[type=file]", str(large))
    expect(page.get_by_text('exceed the maximum allowed size of 10.0 Mb: "huge.png"')).to_be_visible()
    expect(page.locator("#question .thumbnail-item")).to_have_count(0)
    ask(page, "What colour is this?", world / "images/green.png")
    expect(answers(page)).to_have_text(["It is green."])


@pytest.mark.slow
def test_a_full_queue_is_told(world, site, browser):
    port = free_port()
    process = start(site, port, "--max_queue", "1")
    try:
        url = f"http://127.0.0.1:{port}"
        answered, waiting = (Client(url, verbose=False) for _ in range(2))
        endless = dict(message={"text": "Hm", "files": []}, weight=BABBLER)
        endless |= dict(temperature=0, max_new_tokens=1024, api_name="/ask")
        for page in opened(browser, url):
            write(page, "What colour is this?", world / "images/green.png")
            next(iter(answered.submit(**endless)))
            job = waiting.submit(**endless)
            deadline = time.monotonic() + 30
            while job.status().code != Status.IN_QUEUE and time.monotonic() < deadline:
                time.sleep(0.01)
            page.press("#question textarea", "Enter")
            expect(page.get_by_text("busy")).to_be_visible()
            expect(page.locator("#question textarea")).to_have_value("What colour is this?")
            expect(page.locator("#question .submit-button")).to_be_visible()
            expect(answers(page)).to_have_count(0)
    finally:
        process.kill()


def test_another_model_starts_a_new_conversation(world, page):
    ask(page, "What colour is this?", world / "images/red.png")
    expect(answers(page)).to_have_text(["It is red."])
    choose(page, "out/other/sft_vlm_64.pth")
    expect(answers(page)).to_have_count(0)
    ask(page, "What colour is this?", world / "images/yellow.png")
    expect(answers(page)).to_have_text(["It is yellow."])


def test_chinese_and_dark_on_a_phone(server, browser):
    options = dict(locale="zh-CN", color_scheme="dark", viewport={"width": 360, "height": 740})
    for page in opened(browser, server[0], **options):
        expect(page.locator("#new")).to_have_text("新对话")
        expect(page.locator("#look")).to_have_text("上一个回答看了哪里？")
        assert page.get_attribute("#question textarea", "placeholder") == "就图片提问……"
        assert page.evaluate("document.body.classList.contains('dark')")
        page.click("#look")
        expect(page.get_by_text("还没有关于图片的回答。")).to_be_visible()
        ask(page, "你好吗？")
        expect(answers(page)).to_have_text(["我很好。"])
        page.click("#look")
        expect(page.get_by_text("还没有关于图片的回答。")).to_have_count(2)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360


def said(client: Client, text: str, *pictures: Path) -> str:
    message = {"text": text, "files": [handle_file(str(picture)) for picture in pictures]}
    chat = client.predict(message, temperature=0, api_name="/ask")[1]
    return chat[-1]["content"][0]["text"]


def test_two_users_do_not_mix(world, server):
    first, second = (Client(server[0], verbose=False) for _ in range(2))
    assert said(first, "What colour is this?", world / "images/red.png") == "It is red."
    assert said(second, "What colour is this?", world / "images/blue.png") == "It is blue."
    assert said(first, "And in one word?") == "red"
    assert said(second, "And in one word?") == "blue"


def test_ctrl_c_in_the_middle_of_an_answer_ends_it_with_130_whoever_is_connected(world, site):
    port = free_port()
    process = start(site, port)
    try:
        client = Client(f"http://127.0.0.1:{port}", verbose=False)
        message = {"text": "Hm", "files": []}
        job = client.submit(message, weight=BABBLER, max_new_tokens=1024, api_name="/ask")
        next(iter(job))
        begun = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert time.monotonic() - begun < 5  # Gradio alone waits for pages that are open


def test_a_port_in_use_is_one_clear_line(weight, run):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run("web_demo.py", "--weight", weight, "--port", port, expect=1)
    assert re.fullmatch(rf"error: --host 127.0.0.1 --port {port}: .*in use.*\n", result.stderr)


SECRET = "nobody else's business"
PRIVATE = ["out/private_notes.txt", "notes.png", ".git/config", "{tmp}/weights.pth"]


@pytest.fixture(scope="module")
def private(site) -> Iterator[dict[str, str]]:
    """Files that are not for visitors: below the working folder, and another program's in /tmp."""
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: name.format(tmp=folder) for name in PRIVATE}
        for path in paths.values():
            (site / path).parent.mkdir(exist_ok=True)
            (site / path).write_text(SECRET)
        yield paths


@pytest.fixture(scope="module")
def post(server) -> Iterator[Callable[..., str]]:
    """All that the server says to one who sends `data`, and `told` of the event, from no page of ours."""
    with httpx.Client(base_url=f"{server[0]}/gradio_api", timeout=60) as client:
        config = client.get(f"{server[0]}/config").json()
        names = {None: None} | {part["id"]: part["props"].get("elem_id") for part in config["components"]}

        def post(event: str, data: list, told: dict | None = None) -> str:
            (found, *_) = [
                found
                for found in config["dependencies"]
                if event
                in [found["api_name"], *(f"{names.get(part)}.{name}" for part, name in found["targets"])]
            ]
            visitor = uuid.uuid4().hex
            body = {"fn_index": found["id"], "data": data, "event_data": told, "session_hash": visitor}
            if not found["queue"]:
                return client.post("/run/predict", json=body).text
            content = json.dumps(body)  # which NaN may stand in
            client.post("/queue/join", content=content, headers={"content-type": "application/json"})
            said = ""
            with client.stream("GET", "/queue/data", params={"session_hash": visitor}) as stream:
                for line in stream.iter_lines():
                    said += line
                    if "process_completed" in line:
                        return said
            return said

        yield post


def chosen(path: str | dict) -> tuple:
    return "chat.example_select", [], {"index": 1, "value": {"text": "Forged", "files": [path]}}


def asked(file: dict, system: str | dict = "", sampling: tuple = (0, 1, 8)) -> tuple:
    message = {"text": "Hm?", "files": [file]}
    return "ask", [message, None, "out/sft_vlm_512.pth", system, *sampling]


def file_at(path: str, **more) -> dict:
    return {"path": path, "orig_name": "x.png", "meta": {"_type": "gradio.FileData"}, **more}


EXAMPLE = "dataset/eval_images/photo_cat.jpg"
SHIPPED = file_at(EXAMPLE)
FORGED = {
    "an example's file": chosen,
    "an example's upload": lambda path: chosen(file_at(path)),
    "an example's untyped file": lambda path: chosen([path]),
    "an upload": lambda path: asked(file_at(path)),
    "an upload's stream": lambda path: asked(file_at(path, is_stream=True)),
    "an upload's address": lambda path: asked({**SHIPPED, "url": path}),
    "an upload beside a good one": lambda path: (
        "ask",
        [{**SHIPPED, "text": "Hm?", "files": [file_at(path)]}, *asked({})[1][1:]],
    ),
    "an untyped upload": lambda path: asked({"path": path}),
    "a system prompt": lambda path: asked(SHIPPED, file_at(path)),
    "a conversation": lambda path: ("look", [{"shown": [file_at(path)]}]),
    "a model": lambda path: ("model.input", [path, None]),
    "a model's file": lambda path: ("model.input", [file_at(path), None]),
    "a token": lambda path: ("token.input", [{"seen": [path]}, file_at(path)]),
}


@pytest.mark.parametrize("name", PRIVATE)
@pytest.mark.parametrize("forged", FORGED)
def test_no_file_of_the_server_is_had_by_naming_it(forged, name, private, site, server, post):
    said = post(*FORGED[forged](private[name]))
    assert said
    addresses = {f"/gradio_api/file={private[name]}", *re.findall(r"/gradio_api/file=[^\"\\\s]+", said)}
    got = [httpx.get(f"{server[0]}{address}").text for address in addresses]
    assert not any(SECRET in text for text in (said, *got))
    kept = [path.read_bytes() for path in (site / "uploads").rglob("*") if path.is_file()]
    assert not any(SECRET.encode() in content for content in kept)


@pytest.mark.parametrize(
    "forged", ["an upload", "an upload beside a good one", "a system prompt", "an example's upload"]
)
@pytest.mark.parametrize("path", ["notes.png", "http://127.0.0.1:9/x.png", "x\0.png", "a" * 300, ".."])
def test_a_file_that_was_not_uploaded_is_refused_before_it_is_looked_for(forged, path, post):
    assert "This cannot be taken: " in post(*FORGED[forged](path))


@pytest.mark.parametrize("relay", ["file=http://127.0.0.1:{port}/x", "proxy=http://127.0.0.1:{port}/x"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_no_address_is_asked_because_a_visitor_names_it(method, relay, server):
    """The server's own one stands for all."""
    url = server[0]
    got = httpx.request(method, f"{url}/gradio_api/{relay.format(port=url.rsplit(':', 1)[1])}")
    assert got.status_code == 403
    assert method == "HEAD" or got.text == "not from here"


@pytest.mark.parametrize(
    "sampling",
    [(math.nan, 1, 8), (0, math.nan, 8), (0, 1, math.nan), (math.inf, 1, 8), ("hot", 1, 8), (0, 1, None)],
    ids=str,
)
def test_a_setting_that_is_none_is_refused_without_a_traceback(sampling, post):
    said = post(*asked(SHIPPED, sampling=sampling))
    assert "This cannot be taken" in said or "This cannot be answered" in said


def test_an_example_is_known_by_its_number(post):
    said = post(*chosen("x.png"))
    assert Path(list(EXAMPLES)[1]).name in said and "What is on the left?" in said and "Forged" not in said


@pytest.mark.parametrize("index", [99, -1])
def test_an_example_that_is_none_is_refused(index, post):
    said = post("chat.example_select", [], {"index": index, "value": {"text": "Forged", "files": []}})
    assert "no such example" in said and "Forged" not in said


def demo_of(weight: Path, *paths: str) -> Demo:
    return Demo(str(weight), torch.device("cpu"), ("auto", "auto"), *paths)


def test_examples_outlive_old_uploads(weight, monkeypatch):
    monkeypatch.chdir(ROOT)
    page = build_page(demo_of(weight))
    (chat,) = [block for block in page.blocks.values() if isinstance(block, gr.Chatbot)]
    files = [Path(example["files"][0]["path"]) for example in chat.examples]
    assert len(files) == len(EXAMPLES)
    delete_files_created_by_app(page, age=0)
    assert all(path.is_file() for path in files)


@pytest.mark.parametrize(("uploads", "private"), [("/tmp/x", True), ("out/tmp", False)])
def test_models_and_data_are_not_served_unless_uploads_lie_among_them(uploads, private, site, monkeypatch):
    monkeypatch.chdir(site)
    monkeypatch.setenv("GRADIO_TEMP_DIR", uploads)
    blocked = private_paths("elsewhere/sft.pth")
    assert (str(site / "out") in blocked) == private
    assert {str(site / ".git"), str(site / "elsewhere/sft.pth")} <= set(blocked)
    assert not any((site / EXAMPLE).is_relative_to(path) for path in blocked)


def test_a_model_that_is_trained_anew_is_loaded_anew(site, tmp_path):
    for suffix in (".pth", ".json"):
        shutil.copy(site / f"out/sft_vlm_512{suffix}", tmp_path / f"mine{suffix}")
    demo, weight = demo_of(tmp_path / "mine.pth"), str(tmp_path / "mine.pth")
    before, _ = demo.model(weight)
    assert demo.model(weight)[0] is before
    shutil.copy(site / BABBLER, weight)
    after, _ = demo.model(weight)
    assert not torch.equal(after.lm_head.weight, before.lm_head.weight)


def test_the_paths_given_are_the_first_models(site, tmp_path):
    other = str(site / "out/other/sft_vlm_64.pth")
    demo = demo_of(site / "out/sft_vlm_512.pth", str(tmp_path / "no encoder"))
    model, _ = demo.model(other)
    assert model.vision_encoder.config.hidden_size == 64
    with pytest.raises(UserError, match="no encoder"):
        demo.model(demo.first)


def test_models_are_found_where_they_are(site, tmp_path):
    exported = tmp_path / "out/hf"
    exported.mkdir(parents=True)
    (exported / "config.json").write_text('{"model_type": "minimind-v"}')
    (tmp_path / "out/llava").mkdir()
    (tmp_path / "out/llava/config.json").write_text('{"model_type": "llava"}')
    (tmp_path / "out/lm_64.pth").touch()
    (tmp_path / "out/lm_64.json").write_text('{"stage": "lm"}')
    (tmp_path / "out/bare.pth").touch()
    (tmp_path / "out/broken.pth").touch()
    (tmp_path / "out/broken.json").write_text("{")
    assert find_models(tmp_path / "out") == [str(exported)]
    assert find_models(tmp_path / "no") == []
    assert {Path(path).name for path in find_models(site / "out")} == {
        "sft_vlm_512.pth",
        "sft_vlm_64.pth",
    }


@pytest.mark.slow
def test_20_chats_at_once_are_answered_correctly_and_in_order(world, server, run):
    prompts = ["--prompt", "What colour is this?", "--prompt", "And in one word?"]
    result = run(
        "scripts/bench/load_web_demo.py",
        "--url",
        server[0],
        "--image_dir",
        world / "images",
        *prompts,
        PYTHONPATH="",
    )
    print(result.stdout)
    for number in range(20):
        colour = COLOURS[number % 4]
        line = f"chat {number + 1}, {colour}.png: ['It is {colour}.', '{colour}'], as alone"
        assert line in result.stdout
    assert "40 answers in" in result.stdout and " 0 chats differ" in result.stdout


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_memory_does_not_grow_over_500_requests(world, server):
    url, process = server

    def resident_mb() -> float:
        status = Path(f"/proc/{process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024

    def requests(count: int) -> None:
        for number in range(count):  # a new visitor every other request
            client = Client(url, verbose=False) if number % 2 == 0 else client  # noqa: F821
            colour = COLOURS[number % 4]
            assert said(client, "What colour is this?", world / f"images/{colour}.png")

    requests(240)  # so that as many conversations are there as are kept
    before = resident_mb()
    requests(500)
    grown = resident_mb() - before
    print(f"{before:.0f} MB before, {grown:+.1f} MB after 500 requests")
    assert grown < 60
