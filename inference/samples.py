"""A few fixed questions that a model answers while it learns, beside the expected answers.

`trainer/` asks them: it is handed `sample_answers`, and knows nothing of what stands here.
H, W: height and width of a picture that shows those of a question side by side.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset

from common.cli import UserError
from dataset.pictures import open_image
from dataset.rows import load_rows
from inference.answers import (
    Features,
    Question,
    encode_pictures,
    encode_question,
    greedy_answers,
    questions_of,
)
from model.model_vlm import MiniMindVLM
from model.processing_vlm import MiniMindVLMProcessor
from trainer.arguments import VLMTrainingFlags
from trainer.loop import Answers

MOST_TOKENS = 24  # of an answer: it shows what it is about, and little time is lost
HEIGHT = 192  # pixels of the pictures that are shown


def sample_answers(flags: VLMTrainingFlags, model: MiniMindVLM, processor: MiniMindVLMProcessor) -> Answers:
    """What answers the questions of --sample_data_path with `model` as it is at the time, greedily.

    It is given a function that says whether to stop, which is asked after each batch, and returns for each
    question `where`, `question`, `images`, `expected`, `answer`, and `picture`, (H, W, 3) uint8, or None
    where it has no image. UserError or DataError now if a file, row or picture is not usable.
    """
    questions = chosen_questions(flags.sample_data_path, flags.images_path, flags.sample_rows)
    for question in questions:
        encode_question(processor, question)
    pictures = [side_by_side(question) for question in questions]
    features: Features = {}

    def answers(stop: Callable[[], int]) -> list[dict[str, Any]]:
        if not features:  # once: the encoder never changes
            features.update(encode_pictures(model, processor, questions, flags.batch_size))
        found = [""] * len(questions)
        size = 2 * flags.batch_size  # without gradients there is room for that
        settings = {"features": features, "most_tokens": MOST_TOKENS}
        for i, (answer, _) in greedy_answers(model, processor, questions, size, **settings):
            found[i] = answer
            if stop():
                break
        return [
            {
                "where": question.where,
                "question": question.text,
                "images": question.images,
                "expected": question.expected,
                "answer": answer,
                "picture": picture,
            }
            for question, answer, picture in zip(questions, found, pictures, strict=True)
        ]

    return answers


def chosen_questions(paths: list[str], images_path: str | None, count: int) -> list[Question]:
    """The first question of each of `count` rows, spread evenly over those of all files that have turns: all
    of them where there are fewer. UserError where none asks anything."""
    images = images_path or ""
    rows = load_rows([Path(path) for path in paths], Path(images) if images else None)
    asked = [questions_of(rows.select([i]), images)[:1] for i in spread(rows, count)]
    questions = [question for first in asked for question in first]
    if not questions:
        wanted = "no question, expected user turns with an assistant's answer"
        raise UserError(f"--sample_data_path {' '.join(paths)}: {wanted}")
    return questions


def spread(rows: Dataset, count: int) -> list[int]:
    turns = pc.list_value_length(rows.data.table.column("roles")).to_numpy()
    asking = np.flatnonzero(turns > 1)
    count = min(count, len(asking))
    return [int(asking[i * len(asking) // count]) for i in range(count)]


def side_by_side(question: Question) -> np.ndarray | None:
    """Its pictures in one, (HEIGHT, W, 3) uint8."""
    shown = [open_image(path, question.where, HEIGHT) for path in question.images]
    scaled = [picture.resize((max(1, HEIGHT * picture.width // picture.height), HEIGHT)) for picture in shown]
    return np.concatenate(scaled, axis=1) if scaled else None
