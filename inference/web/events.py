"""The models that the web demo keeps in memory, and what the events of its page do with them."""

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from PIL import Image

from common.cli import UserError
from common.setup import place
from inference.chat import Sampling
from inference.trained import load_vlm
from inference.web.conversation import Conversation, Refused, draw_attention, enlarged
from inference.web.texts import text
from model.model_vlm import MiniMindVLM
from model.processing_vlm import MiniMindVLMProcessor

OUT_DIR = Path("out")
LOADED_MODELS = 2  # kept in memory; the one used longest ago makes room
FRAME = 0.05  # seconds between two updates of the page while an answer grows
WHOLE = -1  # in place of a token of the answer


class Demo:
    """The models in memory, and what the page's events do with them."""

    def __init__(self, first: str, device: torch.device, dtypes: tuple[str, str], *model_flags: Any) -> None:
        """`dtypes` are --dtype and --encoder_dtype, `model_flags` what `load_vlm` takes besides the first
        model's name."""
        self.first, self.device, self.dtypes, self.model_flags = first, device, dtypes, model_flags
        self.loaded: OrderedDict[tuple[str, int], tuple[MiniMindVLM, MiniMindVLMProcessor]] = OrderedDict()
        self.answering = threading.Lock()  # the page lets go of an answer before it has really ended

    def names(self) -> list[str]:
        return list(dict.fromkeys([self.first, *find_models(OUT_DIR)]))

    def model(self, weight: str) -> tuple[MiniMindVLM, MiniMindVLMProcessor]:
        """From memory, or loaded (UserError). Only one event at a time comes here."""
        path = Path(weight)
        key = weight, path.stat().st_mtime_ns if path.exists() else 0  # trained anew, it is loaded anew
        if key not in self.loaded:
            model, processor = load_vlm(weight, *(self.model_flags if weight == self.first else ()))
            place(model, self.device, *self.dtypes)
            self.loaded[key] = model, processor
        self.loaded.move_to_end(key)
        while len(self.loaded) > LOADED_MODELS:
            self.loaded.popitem(last=False)
        return self.loaded[key]

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
        yield (gr.skip(),) * 6  # from here on the stop button ends this
        if conversation.weight != weight:
            conversation = Conversation(weight)
        with self.answering:
            try:
                try:
                    sampling = Sampling(temperature, top_p, int(max_new_tokens))
                except ValueError as error:  # NaN: the sliders' own bounds let it pass
                    raise Refused("refused", error=error) from None
                model, processor = self.open_model(weight)
                pieces = conversation.answer(
                    model, processor, message["text"], message["files"], system, sampling, self.dtypes[0]
                )
                next(pieces)
            except Refused as refused:
                gr.Warning(say(refused.reason, **refused.details))
                return
            with closing(pieces):
                seen = [enlarged(picture) for picture in conversation.seen]
                hidden = gr.update(visible=False)
                yield gr.update(value=None), conversation.shown, conversation, seen, hidden, hidden
                last = time.monotonic()
                for _ in pieces:
                    if time.monotonic() - last > FRAME:
                        yield gr.skip(), conversation.shown, *(gr.skip(),) * 4
                        last = time.monotonic()
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
            _, tokens = conversation.look(*self.open_model(conversation.weight or self.first), self.dtypes[0])
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


def speaker(request: gr.Request) -> Callable[..., str]:
    return partial(text, accept_language=request.headers.get("accept-language"))
