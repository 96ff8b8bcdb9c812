"""Serves a page to chat with a trained model about pictures, on this machine; see --help for every flag.

The page follows the browser's language (English, Chinese) and colours (light, dark). Nothing it needs comes
from elsewhere, and it tells nobody. docs/web_demo.md says what it is for and how it is limited.
"""

import json
import logging
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from PIL import Image

from eval_vlm import SHIPPED_PICTURES, default_weight
from model.model_vlm import MiniMindVLM
from model.processing_vlm import MiniMindVLMProcessor
from trainer.arguments import DTYPES, flag, optional_flag
from trainer.chat import Sampling
from trainer.cli import UserError, parse_flags, run_main, user_errors
from trainer.distributed import resolve_dtype, runtime
from trainer.setup import find_weight, load_vlm
from trainer.web_chat import Conversation, Refused, draw_attention, enlarged
from trainer.web_texts import TEXTS, text

log = logging.getLogger(__name__)
OUT_DIR = Path("out")
LOADED_MODELS = 2  # kept in memory; the one used longest ago makes room
SESSIONS = 100  # conversations kept; the one used longest ago is forgotten
UPLOAD_SIZE = "10mb"
MAX_PIXELS = 32_000_000  # Pillow refuses pictures of twice as many
FILES_CHECKED, FILES_KEPT = 3600, 24 * 3600  # seconds between looks at uploaded files, and their age
FRAME = 0.05  # seconds between two updates of the page while an answer grows
EXAMPLES = {
    "drawing_tiger.png": "What is this?",
    "drawing_cat_pizza.png": "What is on the left?",
    "drawing_car_banana_owl.png": "How many things are there?",
    "drawing_sailboat.png": "这是什么？",
    "photo_cat.jpg": "Describe the picture.",
    "photo_coffee.jpg": "描述这张图片。",
}
I18N = gr.I18n(**{"en": TEXTS["en"], "zh": TEXTS["zh"], "zh-CN": TEXTS["zh"], "zh-TW": TEXTS["zh"]})
WHOLE = -1  # in place of a token of the answer
FONTS = [gr.themes.Font("system-ui"), gr.themes.Font("sans-serif")]  # the system's own
CSS = """
main { width: 100%; max-width: 1240px; margin: 0 auto; }
#about { opacity: 0.75; }
#chat .examples { display: grid; grid-template-columns: repeat(auto-fit, minmax(110px, 1fr)); gap: 8px; }
#chat .example { min-width: 0; padding: 8px; }
#saw .grid-wrap, #attention .grid-wrap { min-height: 0; max-height: none; }
@media (max-width: 640px) {
  main { padding: 8px !important; }
  #chat { height: 62vh !important; }
}
"""


@dataclass
class DemoFlags:
    """ValueError names a flag whose value makes no sense."""

    weight: str | None = optional_flag(
        "the model to begin with: a .pth, the name of one in out/, or an exported folder; if not given: what "
        "eval_vlm.py takes"
    )
    host: str = flag("127.0.0.1", "address to listen on; 0.0.0.0 lets other machines in")
    port: int = flag(7860, "port to listen on")
    share: bool = flag(False, "also offer a public address, by a tunnel through Gradio's servers")
    max_queue: int = flag(32, "questions that may wait; further ones are refused")
    device: str | None = optional_flag("cuda, cuda:1, mps or cpu; if not given: the best there is")
    dtype: str = flag(
        "auto", "precision of the forward pass; auto is bfloat16 where the hardware has it", DTYPES
    )
    vision_model_path: str | None = optional_flag(
        "folder of the image encoder of a .pth; if not given: what it was trained with"
    )
    tokenizer_path: str | None = optional_flag("folder of its tokenizer; if not given: likewise")

    def __post_init__(self) -> None:
        if not 0 < self.port < 65536:
            raise ValueError(f"--port must lie between 1 and 65535, found {self.port}")
        if self.max_queue <= 0:
            raise ValueError(f"--max_queue must be above 0, found {self.max_queue}")


def main() -> int:
    flags = parse_flags(DemoFlags, __doc__)
    weight = str(find_weight(flags.weight or default_weight()))
    check_port(flags.host, flags.port)
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    with runtime(flags.device, seed=int(time.time())) as run:
        demo = Demo(weight, run.device, flags)
        demo.model(weight)  # what is wrong with it is told here rather than in the page
        page = demo.page()
        page.queue(max_size=flags.max_queue)
        with user_errors(f"--host {flags.host} --port {flags.port}"):
            page.launch(
                server_name=flags.host,
                server_port=flags.port,
                share=flags.share,
                max_file_size=UPLOAD_SIZE,
                state_session_capacity=SESSIONS,
                i18n=I18N,
                css=CSS,
                theme=gr.themes.Default(primary_hue="blue", font=FONTS),
                footer_links=["settings"],
                run_history=False,
                ssr_mode=False,
                prevent_thread_lock=True,
                quiet=True,
            )
        dtype = str(resolve_dtype(flags.dtype, run.device)).removeprefix("torch.")
        log.info("%s on %s in %s: open %s (Ctrl-C ends it)", weight, run.device, dtype, page.local_url)
        if page.share_url:
            log.info("open to everybody who knows it: %s", page.share_url)
        try:
            threading.Event().wait()
        finally:
            demo.closing.set()
            page.close(verbose=False)
    return 0


def check_port(host: str, port: int) -> None:
    """UserError if nothing can listen there."""
    with user_errors(f"--host {host} --port {port}"), socket.create_server((host, port)):
        pass


def find_models(folder: Path) -> list[str]:
    """The `.pth` of vision-language models and the exported folders below `folder`, newest first."""
    weights = [
        path for path in folder.rglob("*.pth") if "vlm" in str(_read(path.with_suffix(".json")).get("stage"))
    ]
    exports = [
        path.parent for path in folder.rglob("config.json") if _read(path).get("model_type") == "minimind-v"
    ]
    newest = sorted([*weights, *exports], key=lambda path: path.stat().st_mtime, reverse=True)
    return [str(path) for path in newest]


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


class Demo:
    """The models in memory, and what the page's events do with them."""

    def __init__(self, first: str, device: torch.device, flags: DemoFlags) -> None:
        self.first, self.device, self.flags = first, device, flags
        self.loaded: OrderedDict[str, tuple[MiniMindVLM, MiniMindVLMProcessor]] = OrderedDict()
        self.closing = threading.Event()

    def names(self) -> list[str]:
        return list(dict.fromkeys([self.first, *find_models(OUT_DIR)]))

    def model(self, weight: str) -> tuple[MiniMindVLM, MiniMindVLMProcessor]:
        """From memory, or loaded (UserError). Only one event at a time comes here."""
        if weight not in self.loaded:
            own = Path(weight).is_dir() and weight != self.first  # an exported folder has all it needs
            paths = (None, None) if own else (self.flags.vision_model_path, self.flags.tokenizer_path)
            model, processor = load_vlm(weight, *paths)
            self.loaded[weight] = model.to(self.device), processor
        self.loaded.move_to_end(weight)
        while len(self.loaded) > LOADED_MODELS:
            self.loaded.popitem(last=False)
        return self.loaded[weight]

    def ask(
        self,
        message: dict[str, Any],
        conversation: Conversation,
        weight: str,
        system: str,
        temperature: float,
        top_p: float,
        max_new_tokens: int,
        request: gr.Request,
    ) -> Iterator[tuple]:
        """Textbox, chat, conversation, what the model saw, attention, its tokens; again while it answers."""
        say = speaker(request)
        if conversation.weight != weight:
            conversation = Conversation(weight)
        sampling = Sampling(temperature, top_p, int(max_new_tokens))
        try:
            model, processor = self.open_model(weight)
            pieces = conversation.answer(
                model, processor, message["text"], message["files"], system, sampling, self.flags.dtype
            )
            next(pieces, "")
        except Refused as refused:
            gr.Warning(say(refused.reason, **refused.details))
            yield (gr.skip(),) * 6
            return
        seen = [enlarged(picture) for picture in conversation.seen]
        hidden = gr.update(visible=False)
        yield gr.update(value=None), conversation.shown, conversation, seen, hidden, hidden
        last = time.monotonic()
        for _ in pieces:
            if self.closing.is_set():
                break
            if time.monotonic() - last > FRAME:
                yield gr.skip(), conversation.shown, *(gr.skip(),) * 4
                last = time.monotonic()
        pieces.close()
        yield gr.skip(), conversation.shown, *(gr.skip(),) * 4

    def open_model(self, weight: str) -> tuple[MiniMindVLM, MiniMindVLMProcessor]:
        """As `model`, for what a page asked for."""
        if weight not in self.names():
            raise Refused("unknown_model", weight=weight)
        try:
            return self.model(weight)
        except UserError as error:
            raise Refused("failed", error=error) from None

    def switch(self, weight: str, conversation: Conversation, request: gr.Request) -> tuple:
        """Picker, chat, conversation, what the model saw, attention, its tokens: of a new conversation."""
        if weight == (conversation.weight or self.first):  # the page may tell twice
            return (gr.skip(),) * 6
        say = speaker(request)
        try:
            self.open_model(weight)
        except Refused as refused:
            gr.Warning(say(refused.reason, **refused.details))
            return conversation.weight or self.first, *(gr.skip(),) * 5
        gr.Info(say("switched", weight=weight))
        return gr.skip(), *self.restart(weight)

    def restart(self, weight: str) -> tuple:
        hidden = gr.update(visible=False)
        return [], Conversation(weight), None, hidden, hidden

    def look(self, conversation: Conversation, request: gr.Request) -> tuple:
        """Attention and its tokens."""
        say = speaker(request)
        try:
            _, tokens = conversation.look(*self.open_model(conversation.weight), self.flags.dtype)
        except Refused as refused:
            gr.Warning(say(refused.reason, **refused.details))
            return gr.skip(), gr.skip()
        choices = [(say("whole"), WHOLE), *((f"{n + 1}. {token}", n) for n, token in enumerate(tokens))]
        drawn = gr.update(value=self.draw(conversation, WHOLE), visible=True)
        return drawn, gr.update(choices=choices, value=WHOLE, visible=True)

    @staticmethod
    def draw(conversation: Conversation, token: int) -> list[Image.Image]:
        """Every picture of the conversation under the attention of one token, or of all."""
        if conversation.attention is None:
            return []
        attention = conversation.attention  # (N, I, P)
        weights = attention.mean(0) if token == WHOLE else attention[token]  # (I, P)
        most = float(weights.max())
        pictures = zip(conversation.seen, weights, strict=True)
        return [draw_attention(picture, of_picture, most) for picture, of_picture in pictures]

    def page(self) -> gr.Blocks:
        say = I18N
        with gr.Blocks(
            title="MiniMind-V",
            analytics_enabled=False,
            fill_width=True,
            delete_cache=(FILES_CHECKED, FILES_KEPT),
        ) as page:
            conversation = gr.State(Conversation())
            with gr.Row(equal_height=False):
                with gr.Column(scale=5, min_width=320):
                    gr.Markdown(say("about"), elem_id="about")
                    chat = gr.Chatbot(
                        label=say("chat"),
                        elem_id="chat",
                        height="66vh",
                        placeholder=say("welcome"),
                        examples=examples(),
                        buttons=["copy", "copy_all"],
                        layout="bubble",
                        feedback_options=None,
                        allow_file_downloads=False,
                    )
                    question = gr.MultimodalTextbox(
                        placeholder=say("ask"),
                        show_label=False,
                        file_types=["image"],
                        file_count="multiple",
                        max_plain_text_length=100_000,
                        elem_id="question",
                        autofocus=True,
                    )
                with gr.Column(scale=3, min_width=320):
                    picker = gr.Dropdown(self.names(), value=self.first, label=say("model"), elem_id="model")
                    new = gr.Button(say("new"), size="md", elem_id="new")
                    with gr.Accordion(say("saw"), open=True):
                        pictures = dict(
                            columns=2, fit_columns=False, height="auto", format="png", buttons=["fullscreen"]
                        )
                        saw = gr.Gallery(show_label=False, elem_id="saw", **pictures)
                        gr.Markdown(say("saw_info"))
                        look = gr.Button(say("look"), size="md", elem_id="look")
                        token = gr.Dropdown([], label=say("token"), visible=False, elem_id="token")
                        attention = gr.Gallery(
                            show_label=False, visible=False, elem_id="attention", **pictures
                        )
                    with gr.Accordion(say("settings"), open=False):
                        system = gr.Textbox("", label=say("system"), lines=2, max_length=2000)
                        published = Sampling()
                        sampling = [
                            gr.Slider(
                                0,
                                2,
                                published.temperature,
                                step=0.05,
                                label=say("temperature"),
                                info=say("temperature_info"),
                            ),
                            gr.Slider(0.05, 1, published.top_p, step=0.05, label=say("top_p")),
                            gr.Slider(1, 1024, published.max_new_tokens, step=1, label=say("max_new_tokens")),
                        ]

            model_event = dict(concurrency_id="model", concurrency_limit=1)  # generation is one at a time
            at_once = dict(queue=False, show_progress="hidden", api_visibility="private")
            beside = [chat, conversation, saw, attention, token]
            asking = dict(
                fn=self.ask,
                inputs=[question, conversation, picker, system, *sampling],
                outputs=[question, *beside],
                show_progress_on=chat,
                show_progress="minimal",
                **model_event,
            )

            def busy(update: bool) -> dict[str, Any]:
                buttons = gr.update(submit_btn=not update, stop_btn=update)
                return dict(fn=lambda: buttons, outputs=question, **at_once)

            typed = question.submit(**busy(True)).then(**asking, api_name="ask")
            clicked = chat.example_select(fill_in, None, question, **at_once).then(**busy(True))
            clicked = clicked.then(**asking, api_visibility="private")
            for answered in (typed, clicked):
                answered.then(**busy(False))
            question.stop(None, None, None, cancels=[typed, clicked])
            gr.on([new.click, chat.clear], self.restart, picker, beside, cancels=[typed, clicked], **at_once)
            picker.input(
                self.switch,
                [picker, conversation],
                [picker, *beside],
                api_visibility="private",
                **model_event,
            )
            look.click(self.look, conversation, [attention, token], api_name="look", **model_event)
            token.input(self.draw, [conversation, token], attention, **at_once)
            page.load(lambda: gr.update(choices=self.names()), None, picker, **at_once)
        return page


def fill_in(selected: gr.SelectData) -> dict[str, Any]:
    """An example's text and pictures, as the textbox has them."""
    files = [file if isinstance(file, str) else file["path"] for file in selected.value.get("files", [])]
    return {"text": selected.value["text"], "files": files}


def examples() -> list[dict[str, Any]]:
    paths = {Path(SHIPPED_PICTURES) / name: question for name, question in EXAMPLES.items()}
    return [
        {"text": question, "files": [str(path)], "icon": str(path)}
        for path, question in paths.items()
        if path.is_file()
    ]


def speaker(request: gr.Request) -> Callable[..., str]:
    return partial(text, accept_language=request.headers.get("accept-language"))


if __name__ == "__main__":
    run_main(main)
