"""One question, one answer, and how long it took."""

import time
from dataclasses import dataclass

from transformers import TextStreamer
from transformers.generation.streamers import BaseStreamer

from common.cli import CONTROLS, user_errors
from inference.answers import Question, encode_pictures, encode_question, prepare
from inference.chat import Sampling
from model.model_vlm import MiniMindVLM
from model.processing_vlm import MiniMindVLMProcessor

IN_TEXT = CONTROLS | {ord(kept): kept for kept in "\n\t"}  # answers and questions have lines


@dataclass
class Speaker:
    """A model that answers; `name` is what the user called it."""

    name: str
    model: MiniMindVLM
    processor: MiniMindVLMProcessor


@dataclass
class Answer:
    text: str
    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def ask(
    speaker: Speaker, question: Question, sampling: Sampling, streamer: BaseStreamer | None = None
) -> Answer:
    """The answer to `question`; `seconds` are those of generating it, without encoding its pictures.

    DataError or UserError where a picture cannot be read, or the question is too long for the model.
    """
    model, processor = speaker.model, speaker.processor
    features = encode_pictures(model, processor, [question])
    inputs = prepare(processor, [encode_question(processor, question)], [question.images], features)
    start = time.perf_counter()
    with user_errors(question.where):
        output = model.generate(
            **inputs.to(model.device), **sampling.arguments(), streamer=streamer
        )  # (1, T + new)
    seconds = time.perf_counter() - start
    new = output[0, inputs["input_ids"].shape[1] :]  # (new,)
    return Answer(processor.tokenizer.decode(new, skip_special_tokens=True), len(new), seconds)


class TerminalStreamer(TextStreamer):
    """Prints an answer while it is generated."""

    def __init__(self, processor: MiniMindVLMProcessor):
        super().__init__(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        super().on_finalized_text(text.translate(IN_TEXT), stream_end)
