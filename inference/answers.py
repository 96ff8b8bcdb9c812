"""Questions about pictures -> a model's answers. How good they are is scoring/'s to say.

Chat and scoring share how a question becomes input.
Shapes: B questions, T tokens, I most images of a question, P tokens per image, W the encoder's width.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from datasets import Dataset
from PIL import Image
from transformers import BatchFeature

from dataset.errors import DataError
from dataset.pictures import MID_GREY, open_image
from dataset.rows import resolve_image, store_of
from inference.pictures import check_image
from model.model_vlm import MiniMindVLM
from model.processing_vlm import IMAGE_MARKER, MiniMindVLMProcessor, image_slots

WINDOW = 16  # batches that are sorted by length together, and whose pictures are encoded once
SPARE_TOKENS = 8  # beyond the expected answer's length: enough to see that an answer does not end there
NO_KIND = "(none)"

Features = dict[str, torch.Tensor]  # path of a picture -> (P, W)


@dataclass
class Question:
    """`messages` that the assistant is to continue, and their pictures; `where` is for errors and reports."""

    where: str
    messages: list[dict[str, str]]
    images: list[str]
    kind: str = NO_KIND
    expected: str = ""

    @property
    def text(self) -> str:
        asked = next(turn["content"] for turn in reversed(self.messages) if turn["role"] == "user")
        return asked.replace(IMAGE_MARKER, "").strip()


def questions_of(rows: Dataset, images_path: str) -> list[Question]:
    """Every assistant turn of every row is a question, asked after the row's own earlier turns."""
    questions, store = [], store_of(rows)
    for row in rows:
        if not row["roles"]:  # plain text
            continue
        turns = [
            {"role": role, "content": text} for role, text in zip(row["roles"], row["contents"], strict=True)
        ]
        images = [resolve_image(image, images_path, store) for image in row["images"]]
        marked = any(IMAGE_MARKER in turn["content"] for turn in turns if turn["role"] == "user")
        for number, turn in enumerate(turns):
            before = turns[:number]
            users = [earlier["content"] for earlier in before if earlier["role"] == "user"]
            if turn["role"] != "assistant" or not users:  # without a user it was not asked
                continue
            seen = sum(text.count(IMAGE_MARKER) for text in users) if marked else len(images)
            questions.append(
                Question(row["where"], before, images[:seen], row["kind"] or NO_KIND, turn["content"].strip())
            )
    return questions


def pictures_of(questions: Sequence[Question]) -> dict[str, str]:
    """Path of each picture, once -> where it is asked about."""
    return {image: question.where for question in questions for image in question.images}


def check_pictures(pictures: dict[str, str]) -> None:
    """DataError for the first of `pictures_of` that cannot be read: before the answers, not amid them."""
    for path, where in pictures.items():
        check_image(path, where)


def encode_pictures(
    model: MiniMindVLM,
    processor: MiniMindVLMProcessor,
    questions: Sequence[Question],
    batch_size: int = 1,
    blank: bool = False,
) -> Features:
    """The encoder's features of every picture of `questions`, each encoded once, on the model's device.

    With `blank`, a mid-grey picture of the same size takes the place of each. DataError for a picture that
    cannot be read.
    """
    where = pictures_of(questions)
    features: Features = {}
    for paths in chunks(list(where), batch_size):
        pictures = [open_image(path, where[path], processor.image_size) for path in paths]
        if blank:
            pictures = [Image.new("RGB", picture.size, MID_GREY) for picture in pictures]
        pixel_values = processor.pixel_values(pictures).to(model.device)  # (B, 3, H, W)
        features |= zip(paths, model.get_image_embeddings(pixel_values, model.vision_encoder), strict=True)
    return features


def encode_question(processor: MiniMindVLMProcessor, question: Question) -> list[int]:
    """Its prompt's token ids. DataError where `<image>` markers and pictures differ in number."""
    try:
        return processor.encode_prompt(question.messages, len(question.images))
    except ValueError as error:
        raise DataError(f"{question.where}: {error}") from None


def prepare(
    processor: MiniMindVLMProcessor, prompts: list[list[int]], images: list[list[str]], features: Features
) -> BatchFeature:
    """Arguments of `generate`: left-padded input_ids, attention_mask (B, T), image_features (B, I, P, W),
    image_counts (B,)."""
    inputs = processor.batch(prompts, [[] for _ in prompts])
    counts = torch.tensor([len(paths) for paths in images])
    if counts.any():
        flat = torch.stack([features[path] for paths in images for path in paths])  # (sum of counts, P, W)
        inputs |= {"image_features": image_slots(flat, counts), "image_counts": counts}
    return inputs


def greedy_answers(
    model: MiniMindVLM,
    processor: MiniMindVLMProcessor,
    questions: Sequence[Question],
    batch_size: int,
    blank: bool = False,
    features: Features | None = None,
    most_tokens: int | None = None,
) -> Iterator[tuple[int, tuple[str, int]]]:
    """`(index, (answer, tokens))` of every question, batch by batch, in an order of its own.

    An answer is cut SPARE_TOKENS after the expected one's length, or after `most_tokens`. It does not depend
    on `batch_size`. Its end is one of its `tokens`. Without `features` the pictures are encoded here.
    """
    tokenizer = processor.tokenizer
    prompts = [encode_question(processor, question) for question in questions]
    expected = [len(tokenizer.encode(question.expected, add_special_tokens=False)) for question in questions]
    limits = [min(tokens + SPARE_TOKENS, most_tokens or math.inf) for tokens in expected]
    for window in chunks(range(len(questions)), batch_size * WINDOW):
        window_questions = [questions[i] for i in window]
        known = features or encode_pictures(model, processor, window_questions, batch_size, blank)
        by_length = sorted(window, key=lambda i: (limits[i], len(prompts[i])))
        for batch in chunks(by_length, batch_size):
            inputs = prepare(
                processor, [prompts[i] for i in batch], [questions[i].images for i in batch], known
            ).to(model.device)
            output = model.generate(
                **inputs, do_sample=False, max_new_tokens=max(limits[i] for i in batch)
            )  # (B, T + new)
            new = output[:, inputs["input_ids"].shape[1] :].tolist()
            for i, ids in zip(batch, new, strict=True):
                ids = ids[: limits[i]]
                if tokenizer.eos_token_id in ids:
                    ids = ids[: ids.index(tokenizer.eos_token_id) + 1]
                yield i, (tokenizer.decode(ids, skip_special_tokens=True).strip(), len(ids))


def chunks(items: Sequence, size: int) -> Iterator[Sequence]:
    return (items[start : start + size] for start in range(0, len(items), size))
