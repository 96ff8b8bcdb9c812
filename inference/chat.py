"""The next answer of a conversation about pictures, piece by piece while it is generated.

Terminal and browser share it; what they show and keep is their own.
Shapes: P tokens per image, W the encoder's width.
"""

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from common.distributed import autocast
from inference.answers import prepare
from model.model_vlm import MiniMindVLM
from model.processing_vlm import MiniMindVLMProcessor

SILENCE = 0.05  # seconds without text after which a piece is empty
GREEDY = 1e-6  # temperatures below it: logits divided by them may leave fp32's range and become NaN


@dataclass
class Sampling:
    """`temperature` 0 takes the likeliest token; defaults as published. ValueError for any out of range."""

    temperature: float = 0.65
    top_p: float = 0.85
    max_new_tokens: int = 512

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):  # NaN is neither
            raise ValueError(f"temperature must be finite and not negative, found {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, found {self.top_p}")
        if not 0 < self.max_new_tokens < float("inf"):
            raise ValueError(f"max_new_tokens must be above 0, found {self.max_new_tokens}")

    def arguments(self) -> dict:
        """What `generate` needs. Left alone, it keeps the 50 likeliest tokens only; the release does not."""
        if self.temperature < GREEDY:
            return {"do_sample": False, "max_new_tokens": self.max_new_tokens}
        drawn = {"do_sample": True, "temperature": float(self.temperature), "top_p": self.top_p, "top_k": 0}
        return {**drawn, "max_new_tokens": self.max_new_tokens}


def encode_picture(model: MiniMindVLM, processor: MiniMindVLMProcessor, picture: Image.Image) -> torch.Tensor:
    """The encoder's features of one picture, (P, W), on the model's device."""
    pixel_values = processor.pixel_values([picture]).to(model.device)  # (1, 3, H, W)
    return model.get_image_embeddings(pixel_values, model.vision_encoder)[0]


def stream_answer(
    model: MiniMindVLM,
    processor: MiniMindVLMProcessor,
    messages: Sequence[dict[str, str]],
    features: Sequence[torch.Tensor],
    sampling: Sampling,
    dtype: str = "auto",
    new_ids: list[int] | None = None,
) -> Iterator[str]:
    """Pieces of the next answer to `messages`; `features` are their pictures, each (P, W), in their order.

    Where nothing comes for a while, a piece is empty, so that whoever iterates may give up: `close()` stops
    the generation within a token. `new_ids` is given the answer's token ids when it ends, either way.

    Raises:
        ValueError: before the first piece, where `<image>` markers and pictures differ in number.
    """
    named = {str(number): tensor for number, tensor in enumerate(features)}
    prompt = processor.encode_prompt(messages, len(features))
    inputs = prepare(processor, [prompt], [list(named)], named).to(model.device)
    streamer = TextIteratorStreamer(
        processor.tokenizer, skip_prompt=True, timeout=SILENCE, skip_special_tokens=True
    )
    given_up = _GivenUp()
    failure: list[BaseException] = []

    def generate() -> None:
        try:
            with autocast(dtype, model.device):
                output = model.generate(
                    **inputs,
                    **sampling.arguments(),
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([given_up]),
                )  # (1, T + new)
            if new_ids is not None:
                new_ids.extend(output[0, inputs["input_ids"].shape[1] :].tolist())
        except BaseException as error:  # told to the one who iterates
            failure.append(error)
            streamer.end()

    thread = threading.Thread(target=generate)
    thread.start()
    try:
        yield from _pieces(streamer)
    finally:
        given_up.event.set()
        thread.join()
    if failure:
        raise failure[0]


def _pieces(streamer: TextIteratorStreamer) -> Iterator[str]:
    while True:
        try:
            yield next(streamer)
        except queue.Empty:
            yield ""
        except StopIteration:
            return


class _GivenUp(StoppingCriteria):
    def __init__(self) -> None:
        self.event = threading.Event()

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)
