"""Which questions are asked while a model learns, and what it answers."""

import io
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import TINY_ENCODER, row, write_rows
from PIL import Image

from common.cli import UserError
from dataset.errors import DataError
from inference.answers import Question
from inference.samples import HEIGHT, MOST_TOKENS, chosen_questions, sample_answers, side_by_side
from inference.trained import load_vlm
from trainer.arguments import VLMTrainingFlags


def many_rows(folder, count=1000):
    """Eight kinds take turns, as in the tests of the demo; every fifth row asks nothing, the others twice."""
    rows = []
    for i in range(count):
        turns = [(f"first {i}?", "a"), (f"second {i}?", "b")]
        rows.append({"text": "plain"} if i % 5 == 4 else row(f"kind {i % 8}", turns))
    return str(write_rows(folder / "many.jsonl", rows))


@pytest.mark.parametrize(
    ("count", "expected"),
    [(1, [0]), (2, [0, 500]), (8, [0, 125, 250, 375, 500, 625, 750, 875])],
    ids=["one", "two", "eight"],
)
def test_rows_are_spread_evenly_over_those_that_ask(tmp_path, count, expected):
    found = chosen_questions([many_rows(tmp_path)], None, count)
    assert [question.text for question in found] == [f"first {i}?" for i in expected]
    assert len({question.kind for question in found}) == count


def test_a_small_file_is_asked_as_a_whole(tmp_path):
    found = chosen_questions([many_rows(tmp_path, 7)], None, 20)
    assert [question.where for question in found] == [f"many.jsonl:{n}" for n in (1, 2, 3, 4, 6, 7)]


def test_files_of_one_name_are_told_apart(tmp_path):
    paths = []
    for name in "ab":
        (tmp_path / name).mkdir()
        paths.append(str(write_rows(tmp_path / name / "x.jsonl", [row("", [(f"What is {name}?", "it")])])))
    assert [question.text for question in chosen_questions(paths, None, 8)] == ["What is a?", "What is b?"]


def test_pictures_inside_parquet_are_shown(tmp_path, world):
    stream = io.BytesIO()
    Image.new("RGB", (30, 20), "red").save(stream, "PNG")
    talk = [{"role": "user", "content": "What?\n<image>"}, {"role": "assistant", "content": "red"}]
    table = pa.table({"conversations": [json.dumps(talk)] * 3, "image_bytes": [[stream.getvalue()]] * 3})
    pq.write_table(table, tmp_path / "rows.parquet")
    found = chosen_questions([str(tmp_path / "rows.parquet")], None, 2)
    assert len(found) == 2
    assert (side_by_side(found[1]) == (255, 0, 0)).all()


def test_pictures_stand_side_by_side(world):
    images = [str(world / f"images/{colour}.png") for colour in ("red", "blue")]
    shown = side_by_side(Question("x", [], images))
    assert shown.shape == (HEIGHT, 2 * HEIGHT * 48 // 40, 3) and shown.dtype == np.uint8
    assert (shown[:, : shown.shape[1] // 2] == (255, 0, 0)).all()
    assert (shown[:, shown.shape[1] // 2 :] == (0, 0, 255)).all()
    assert side_by_side(Question("x", [], [])) is None


def flags_for(path, images="", **more) -> VLMTrainingFlags:
    return VLMTrainingFlags(
        data_path=["x"], sample_data_path=[str(path)], images_path=str(images), batch_size=1, **more
    )


@pytest.fixture
def trained(weight):
    return load_vlm(str(weight), str(TINY_ENCODER))


def never() -> int:
    return 0


def test_answers_are_those_of_the_model_as_it_is(trained, world):
    answers = sample_answers(flags_for(world / "eval.jsonl", world / "images", sample_rows=7), *trained)
    first = answers(never)
    assert [one["answer"] for one in first] == [one["expected"] for one in first]
    assert [one["where"] for one in first] == [f"eval.jsonl:{n}" for n in range(1, 8)]
    assert first[4]["question"] == "Which colours?" and first[4]["answer"] == "First red, then blue."
    assert first[4]["images"] == [str(world / f"images/{colour}.png") for colour in ("red", "blue")]
    assert first[6]["images"] == [] and first[6]["picture"] is None
    with torch.no_grad():
        trained[0].lm_head.weight.zero_()
    assert all(one["answer"] != one["expected"] for one in answers(never))


def test_pictures_are_read_once(trained, world, tmp_path):
    shutil.copytree(world / "images", tmp_path / "images")
    answers = sample_answers(flags_for(world / "eval.jsonl", tmp_path / "images"), *trained)
    first = answers(never)
    shutil.rmtree(tmp_path / "images")
    again = answers(never)
    assert [one["answer"] for one in again] == [one["answer"] for one in first]
    assert all(np.array_equal(one["picture"], two["picture"]) for one, two in zip(first, again, strict=True))


def test_long_answers_are_cut(trained, tmp_path):
    path = write_rows(tmp_path / "long.jsonl", [row("", [("你好吗？", "a long story " * 50)])])
    model, processor = trained
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every token is as likely: it never ends
    (one,) = sample_answers(flags_for(path), model, processor)(never)
    assert one["expected"] == ("a long story " * 50).strip()
    assert len(processor.tokenizer.encode(one["answer"])) <= MOST_TOKENS


def test_it_stops_after_the_batch_in_hand(trained, world):
    asked = []

    def stop() -> int:
        asked.append(1)
        return 143

    found = sample_answers(flags_for(world / "eval.jsonl", world / "images"), *trained)(stop)
    assert len(asked) == 1 and sum(one["answer"] != "" for one in found) == 1


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (
            '{"text": "plain"}\n',
            UserError,
            r"--sample_data_path .*x\.jsonl: no question, expected user turns",
        ),
        ('{"image": "gone.png"', DataError, r"x\.jsonl:1: not JSON"),
        (
            json.dumps(row("", [("Q", "A")], "gone.png")),
            DataError,
            r"x\.jsonl:1: image 'gone\.png' not found",
        ),
        (
            json.dumps(row("", [("Q", "A")], "broken.png")),
            DataError,
            r"x\.jsonl:1: cannot read image .*broken",
        ),
    ],
    ids=["no question", "not JSON", "missing", "broken"],
)
def test_what_is_not_usable_is_told_before_training(trained, tmp_path, content, kind, message):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(kind, match=message):
        sample_answers(flags_for(tmp_path / "x.jsonl", tmp_path), *trained)
