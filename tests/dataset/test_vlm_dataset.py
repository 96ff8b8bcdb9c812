"""Samples: cutting long rows, pictures, rows without anything to learn."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_rows
from PIL import Image

import dataset.vlm_dataset
from dataset.errors import DataError
from dataset.pictures import open_image
from dataset.vlm_dataset import VLMDataset, cut, image_starts
from model.processing_vlm import IGNORE_INDEX, MiniMindVLMProcessor

RUN = [34] * 4
IMAGE = RUN[0], len(RUN)


def shortened(row: list[int], max_length: int) -> tuple[list[int], list[int], list[int]]:
    return cut(row, list(row), image_starts(row, *IMAGE), len(RUN), max_length)


@pytest.mark.parametrize(
    ("max_length", "left", "images"),
    [
        (20, 14, 2),
        (14, 14, 2),
        (13, 13, 2),
        (12, 12, 2),
        (11, 8, 1),
        (8, 8, 1),
        (6, 6, 1),
        (5, 5, 1),
        (4, 1, 0),
        (1, 1, 0),
    ],
)
def test_rows_are_cut_in_text_only(max_length, left, images):
    row = [7, *RUN, 8, 9, 10, *RUN, 11, 12]
    ids, labels, kept = shortened(row, max_length)
    assert (ids, labels, kept) == (row[:left], row[:left], [1, 8][:images])


def test_cut_knows_a_lone_placeholder_from_an_image():
    row = [34, 7, 34, 34, 7, *RUN, 8, 9, 9]
    assert shortened(row, 11) == (row[:11], row[:11], [5])
    assert shortened(row, 8) == (row[:5], row[:5], [])


def test_adjacent_images_are_cut_between():
    row = [7, *RUN, *RUN, 8]
    assert shortened(row, 7) == (row[:5], row[:5], [1])


def test_sample_of_a_picture_row(data, processor):
    samples = VLMDataset([data / "dialogues.jsonl"], processor, 512, data / "images")
    sample = samples[2]
    assert sample.pixel_values.shape == (2, 3, 224, 224)
    assert sample.input_ids.count(34) == 8
    picture = Image.open(data / "images/0.png").convert("RGB")
    expected = processor.pixel_values([picture])[0]
    assert torch.allclose(samples.pixels.normalised(sample.pixel_values)[1], expected, atol=1e-5)
    assert sample.image_starts == [i for i in range(len(sample.input_ids)) if sample.input_ids[i:][:4] == RUN]
    assert samples[0].pixel_values is None


def test_text_rows_learn_everything(data, processor):
    sample = VLMDataset([data / "texts.jsonl"], processor, 512)[1]
    assert sample.input_ids[0] == 1 and sample.input_ids[-1] == 2
    assert sample.labels == sample.input_ids


def test_the_text_stage_has_no_use_for_images(data, processor):
    text_only = MiniMindVLMProcessor(None, processor.tokenizer)
    assert VLMDataset([data / "texts.jsonl"], text_only, 512)[0].supervised
    with pytest.raises(DataError, match=r"dialogues.jsonl:2: has images, but only text can be trained on"):
        VLMDataset([data / "dialogues.jsonl"], text_only, 512, data / "images")


def test_the_log_says_how_many_rows_have_pictures(data, processor, caplog):
    with caplog.at_level(logging.INFO):
        VLMDataset([data / "dialogues.jsonl", data / "texts.jsonl"], processor, 512, data / "images")
    assert "dialogues.jsonl: layout conversations: 5 of 8 rows have pictures" in caplog.messages
    assert "texts.jsonl: layout text: 0 of 8 rows have pictures" in caplog.messages


def test_newer_code_counts_tokens_anew(data, processor, monkeypatch):
    counts = [VLMDataset([data / "texts.jsonl"], processor, 512).tokens.cache_files for _ in range(2)]
    newer = data / "vlm_dataset.py"
    newer.write_text("# another version")
    monkeypatch.setattr(dataset.vlm_dataset, "__file__", str(newer))
    counts.append(VLMDataset([data / "texts.jsonl"], processor, 512).tokens.cache_files)
    assert counts[0] == counts[1] != counts[2]


def test_a_row_cut_before_its_answer_has_nothing_to_learn(data, processor):
    samples = VLMDataset([data / "captions.jsonl"], processor, 12, data / "images")
    assert not samples[0].supervised
    assert set(samples[0].labels) == {IGNORE_INDEX}
    assert samples[0].pixel_values is None or samples[0].input_ids.count(34) == 4


@pytest.mark.parametrize("name", ["dialogues", "captions", "texts"])
def test_lengths_are_at_least_the_real_ones_and_close(data, processor, name):
    samples = VLMDataset([data / f"{name}.jsonl"], processor, 512, data / "images")
    real = np.array([len(samples[i].input_ids) for i in range(len(samples))])
    spare = samples.lengths() - real
    assert spare.min() >= 0 and spare.max() <= 12


LITERAL = "<|im_start|>assistant\n<|im_end|>\n<|endoftext|>" * 20


def talk(*contents: str) -> dict:
    roles = ("user", "assistant") * len(contents)
    return {"conversations": [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]}


@pytest.mark.parametrize(
    "row",
    [
        pytest.param({"text": LITERAL}, id="text"),
        pytest.param({"text": "<image>" * 20}, id="markers in a text"),
        pytest.param(talk(LITERAL, LITERAL), id="conversation"),
        pytest.param(talk("<image>" * 20, "a"), id="markers that are text"),
        pytest.param(talk("a", "<image>" * 20) | {"image": "0.png"}, id="markers in an answer"),
    ],
)
def test_what_a_text_merely_quotes_is_counted_as_text(data, processor, row):
    samples = VLMDataset([write_rows(data / "rows.jsonl", [row])], processor, 4096, data / "images")
    real = len(samples[0].input_ids)
    assert real <= samples.lengths()[0] <= real + 12


@pytest.mark.parametrize(
    "row", [{"text": "a @@@@@ b"}, talk("a @@@@@ b", "c"), talk("a", "b @@@@@")], ids=str
)
def test_a_text_that_looks_like_an_image_is_that_rows_error(data, processor, row):
    rows = write_rows(data / "rows.jsonl", [row, {"text": "@@@ is text"}])
    samples = VLMDataset([rows], processor, 512)
    bad, good = samples.samples_or_errors(samples.rows)
    assert isinstance(bad, DataError)
    assert str(bad) == "rows.jsonl:1: the text has 4 '@' in a row: that means an image"
    assert good.input_ids.count(34) == 3


def test_what_the_template_refuses_is_that_rows_error(data, processor):
    strict = "{{ raise_exception('roles must alternate') if messages|length > 2 else messages[0].content }}"
    processor = MiniMindVLMProcessor(processor.image_processor, processor.tokenizer, strict, 4)
    rows = write_rows(data / "rows.jsonl", [talk("a", "b", "c"), talk("a", "b")])
    samples = VLMDataset([rows], processor, 512)
    bad, good = samples.samples_or_errors(samples.rows)
    assert isinstance(bad, DataError) and str(bad) == "rows.jsonl:1: roles must alternate"
    assert good.input_ids


def test_unreadable_image_is_named(data, processor):
    (data / "images/0.png").write_bytes(b"not a picture")
    samples = VLMDataset([data / "captions.jsonl"], processor, 512, data / "images")
    with pytest.raises(DataError, match=r"captions.jsonl:1: cannot read image .*0.png"):
        samples[0]


def test_a_strip_that_would_fill_the_memory_is_refused(data, processor):
    """Encoders scale the shorter side to theirs: this one would become 20 million pixels."""
    Image.new("RGB", (20_000, 10)).save(data / "images/0.png")
    samples = VLMDataset([data / "captions.jsonl"], processor, 512, data / "images")
    with pytest.raises(DataError, match=r"0.png \(20000 x 10 pixels, one side over 100 times the other\)"):
        samples[0]


def test_an_image_that_vanishes_later_is_named(data, processor):
    samples = VLMDataset([data / "captions.jsonl"], processor, 512, data / "images")
    (data / "images/3.png").unlink()
    with pytest.raises(DataError, match=r"captions.jsonl:4: cannot read image .*3.png"):
        samples[3]


def test_phone_pictures_are_turned_upright(data, processor):
    picture = Image.new("RGB", (40, 20))
    exif = picture.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    picture.save(data / "images/turned.jpg", exif=exif)
    row = {"image": "turned.jpg", "conversations": [{"role": "assistant", "content": "x"}]}
    row["conversations"].insert(0, {"role": "user", "content": "?"})
    write_rows(data / "turned.jsonl", [row])
    assert open_image(str(data / "images/turned.jpg"), "turned.jsonl:1").size == (20, 40)


def pictured(samples: VLMDataset) -> list[set[str]]:
    return [set(row["images"]) for row in samples.rows]


@pytest.fixture
def many(data) -> Path:
    """300 rows: of 60 pictures with two questions each, of 60 pairs that share pictures, and 120 texts."""
    rows: list[dict] = []
    for i in range(120):
        Image.new("RGB", (40, 40), (i, 0, 0)).save(data / f"images/{i}.png")
        turns = [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": "It is red."}]
        rows.append({"image": f"{i % 60}.png", "conversations": turns})
        rows.append({"text": f"The text of number {i}."})
    for i in range(60):
        pair = [f"{60 + i}.png", f"{60 + (i + 1) % 60 // 2 * 2}.png"]
        question = {"role": "user", "content": "<image><image>And these?"}
        rows.append({"image": pair, "conversations": [question, turns[1]]})
    return write_rows(data / "many.jsonl", rows)


def test_what_is_held_out_shares_no_picture_with_the_rest(many, data, processor):
    samples = VLMDataset([many], processor, 512, data / "images")
    kept, held = samples.split(0.1)
    assert len(kept) + len(held) == 300 and 10 <= len(held) <= 60
    assert not set().union(*pictured(kept)) & set().union(*pictured(held))
    assert any(not images for images in pictured(held)) and any(len(images) == 2 for images in pictured(held))
    again = VLMDataset([many], processor, 512, data / "images").split(0.1)[1]
    assert again.rows["where"][:] == held.rows["where"][:]


def test_a_part_has_lengths_samples_and_pictures_of_its_own(many, data, processor):
    samples = VLMDataset([many], processor, 512, data / "images")
    places = {row["where"]: i for i, row in enumerate(samples.rows)}
    for part in samples.split(0.1):
        own = [places[where] for where in part.rows["where"][:]]
        assert part.lengths().tolist() == samples.lengths()[own].tolist()
        assert part[0].input_ids == samples[own[0]].input_ids
        shown = [Path(picture).name for picture, _ in part.image_paths()]
        assert shown == [name for row in part.rows for name in row["images"]]


@pytest.mark.parametrize("share", [1e-9, 0.999999])
def test_a_share_that_leaves_one_side_empty_is_an_error(data, processor, share):
    samples = VLMDataset([data / "captions.jsonl"], processor, 512, data / "images")
    with pytest.raises(DataError, match=r"\d of 8 rows would be held out: give another share"):
        samples.split(share)


def test_a_data_set_tells_what_there_is_to_learn(data, processor):
    rows = [*map(json.loads, (data / "dialogues.jsonl").read_text().splitlines())]
    write_rows(data / "twice.jsonl", [*rows, rows[0]])
    samples = VLMDataset([data / "twice.jsonl"], processor, 512, data / "images")
    learnt = [sum(label != IGNORE_INDEX for label in samples[i].labels[1:]) for i in range(9)]
    assert samples.counts["supervised"].tolist() == learnt
    figures = f"up to 0 cut, {np.mean(learnt):.1f} supervised tokens a row, 11.1% duplicates"
    assert samples.about() == f"9 rows, 5 with pictures, {figures}"
    short = VLMDataset([data / "twice.jsonl"], processor, 20, data / "images")
    assert "5 with pictures, up to 9 cut, " in short.about()
