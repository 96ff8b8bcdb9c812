"""What the web demo keeps of a conversation, and the pictures it shows beside it; no page, no server.

Shapes: P tokens per image, W the encoder's width, N new tokens, I images, H and W also a picture's size.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image

from common.distributed import autocast
from dataset.errors import DataError
from dataset.pictures import open_image
from inference.answers import prepare
from inference.attention_maps import attention_to_patches
from inference.chat import Sampling, stream_answer
from model.model_vlm import MiniMindVLM
from model.pictures import open_picture
from model.processing_vlm import IMAGE_MARKER, MiniMindVLMProcessor

MAX_IMAGES = 8  # of a conversation
MAX_TOKENS = 4096  # of a conversation with its next answer: beyond what any stage trains on
MAX_MEGAPIXELS = 40  # of one question's pictures together, as decoded: others wait for it
SHOWN_PIXELS = 384  # shorter side of the pictures beside the chat


class Refused(Exception):
    """The user's turn cannot be answered; `reason` is a key of texts.TEXTS and `details` fill it in."""

    def __init__(self, reason: str, **details) -> None:
        super().__init__(reason)
        self.reason, self.details = reason, details


@dataclass
class Conversation:
    """One browser tab's. `turns` are what the model reads, `shown` what the chat displays."""

    weight: str = ""
    turns: list[dict[str, str]] = field(default_factory=list)
    shown: list[dict] = field(default_factory=list)
    features: list[torch.Tensor] = field(default_factory=list)  # (P, W) each
    seen: list[Image.Image] = field(default_factory=list)
    asked: list[dict[str, str]] = field(default_factory=list)  # what the last answer's prompt was made of
    new_ids: list[int] = field(default_factory=list)  # of the last answer
    attention: torch.Tensor | None = None  # (N, I, P) of the last answer, once somebody wanted it

    def answer(
        self,
        model: MiniMindVLM,
        processor: MiniMindVLMProcessor,
        text: str,
        files: list[str],
        system: str,
        sampling: Sampling,
        dtype: str = "auto",
    ) -> Iterator[str]:
        """Pieces of the answer to the user's next turn. The first is empty: the turn is in `shown` now.

        The conversation stays as it was where the iteration is given up at that piece or an error ends it.
        Refused for a turn that has nothing in it, for files that are no pictures or too large, and for a
        conversation that would be too long.
        """
        if not text.strip() and not files:
            raise Refused("empty")
        if len(self.features) + len(files) > MAX_IMAGES:
            raise Refused("too_many", limit=MAX_IMAGES)
        if sum(_megapixels(path, processor.image_size) for path in files) > MAX_MEGAPIXELS:
            raise Refused("too_large", limit=MAX_MEGAPIXELS)
        marked = text if IMAGE_MARKER in text else f"{IMAGE_MARKER}\n" * len(files) + text
        user = {"role": "user", "content": marked}
        spoken = [{"role": "system", "content": system}] if system.strip() else []
        asked = [*spoken, *self.turns, user]
        limit = min(MAX_TOKENS, model.config.max_position_embeddings)
        longest = max(map(len, processor.tokenizer.get_vocab()))  # characters of a token, never fewer
        characters = sum(len(turn["content"]) for turn in asked)
        if characters > limit * longest:  # told without tokenizing, which would take seconds
            raise Refused("too_much_text", characters=characters, limit=limit * longest)
        try:
            length = len(processor.encode_prompt(asked, len(self.features) + len(files)))
        except ValueError as error:
            raise Refused("refused", error=error) from None
        if length >= limit:
            raise Refused("too_long", tokens=length, limit=limit)
        sampling.max_new_tokens = min(sampling.max_new_tokens, limit - length)

        pixel_values = [_preprocess(processor, path) for path in files]  # (1, 3, H, W) each
        return_freed_memory()
        features = [
            model.get_image_embeddings(values.to(model.device), model.vision_encoder)[0]
            for values in pixel_values
        ]
        seen = [what_the_encoder_sees(processor, values) for values in pixel_values]
        before = len(self.turns), len(self.shown), len(self.features)
        self.features += features
        self.seen += seen
        answer = {"role": "assistant", "content": ""}
        self.turns += [user, answer]
        self.shown += [{"role": "user", "content": {"path": path}} for path in files]
        if text.strip():
            self.shown.append({"role": "user", "content": text})
        self.shown.append(shown := {"role": "assistant", "content": ""})
        self.asked, self.new_ids, self.attention = asked, [], None
        pieces = stream_answer(model, processor, asked, self.features, sampling, dtype, self.new_ids)
        noticed = False
        try:
            yield ""
            noticed = True
            for piece in pieces:
                answer["content"] += piece
                shown["content"] = answer["content"]
                yield piece
        except BaseException as error:
            if not (noticed and isinstance(error, GeneratorExit)):
                self._take_back(*before)
            raise
        finally:
            pieces.close()

    def _take_back(self, turns: int, shown: int, pictures: int) -> None:
        """Leaves so many, as if what came after had not been asked."""
        del self.turns[turns:], self.shown[shown:], self.features[pictures:], self.seen[pictures:]
        self.asked, self.new_ids, self.attention = [], [], None

    def look(
        self, model: MiniMindVLM, processor: MiniMindVLMProcessor, dtype: str = "auto"
    ) -> tuple[torch.Tensor, list[str]]:
        """Attention of the last answer to its pictures (N, I, P), and the text of each of its N tokens.

        Refused where there is no answer about a picture.
        """
        ids = [token for token in self.new_ids if token not in processor.tokenizer.all_special_ids]
        if not ids or not self.features:
            raise Refused("no_answer")
        if self.attention is None:
            named = {str(number): tensor for number, tensor in enumerate(self.features)}
            prompt = processor.encode_prompt(self.asked, len(named))
            inputs = prepare(processor, [prompt], [list(named)], named).to(model.device)
            with autocast(dtype, model.device):
                self.attention = attention_to_patches(model, inputs, torch.tensor(ids)).cpu()
        return self.attention, [processor.tokenizer.decode([token]) for token in ids]


@contextmanager
def _readable(path: str) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise Refused("no_picture", name=path.replace("\\", "/").rsplit("/", 1)[-1]) from None


def _megapixels(path: str, image_size: int | None) -> float:
    """Of what will be decoded, by the file's header alone; a JPEG shrinks while it is decoded."""
    with _readable(path), open_picture(path, "upload", image_size, DataError) as image:
        return image.width * image.height / 1e6


def _preprocess(processor: MiniMindVLMProcessor, path: str) -> torch.Tensor:
    with _readable(path):
        return processor.pixel_values([open_image(path, "upload", processor.image_size)])  # (1, 3, H, W)


def return_freed_memory() -> None:
    """To the system: glibc keeps 300 MB of what large pictures took. Does nothing where libc is another."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def what_the_encoder_sees(processor: MiniMindVLMProcessor, pixel_values: torch.Tensor) -> Image.Image:
    """A preprocessed picture (1, 3, H, W) turned back into colours."""
    values = pixel_values[0].permute(1, 2, 0).numpy()  # (H, W, 3)
    settings = processor.image_processor
    if settings.do_normalize:
        values = values * np.array(settings.image_std) + np.array(settings.image_mean)
    return Image.fromarray((values * 255).round().clip(0, 255).astype(np.uint8))


def enlarged(picture: Image.Image) -> Image.Image:
    """With its pixels to be seen as squares, at least SHOWN_PIXELS on the shorter side."""
    factor = -(-SHOWN_PIXELS // min(picture.size))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def draw_attention(picture: Image.Image, weights: torch.Tensor, most: float) -> Image.Image:
    """`weights` (P,) drawn over the preprocessed picture, warm where they are near `most`."""
    picture = enlarged(picture)
    rows = round((len(weights) * picture.height / picture.width) ** 0.5)
    grid = (weights / max(most, 1e-12)).clamp(0, 1).view(rows, -1).numpy()
    heat = Image.fromarray((grid * 255).astype(np.uint8)).resize(picture.size, Image.Resampling.BICUBIC)
    strength = np.asarray(heat, dtype=np.float32)[..., None] / 255  # (H, W, 1)
    colours = colormaps["inferno"](strength[..., 0])[..., :3] * 255  # (H, W, 3)
    grey = np.asarray(picture.convert("L"), dtype=np.float32)[..., None]
    mixed = grey * (0.75 - 0.6 * strength) + colours * (0.25 + 0.6 * strength)
    return Image.fromarray(mixed.clip(0, 255).astype(np.uint8))
