"""Published layouts: each gives the batches that our own rows give, or one line that says why not."""

import base64
import json
import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import TINY_ENCODER, write_rows
from PIL import Image
from transformers import AutoImageProcessor

from dataset.collate import StepDataset
from dataset.errors import DataError
from dataset.rows import load_rows
from dataset.vlm_dataset import VLMDataset
from model.processing_vlm import MiniMindVLMProcessor

COUNT = 1000
ASKED = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "A cat."}]
PLAIN = [{"role": "user", "content": "What?"}, ASKED[1]]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Seven of them, 0.png to 6.png."""
    folder = tmp_path_factory.mktemp("pictures")
    noise = np.random.default_rng(0)
    for number in range(7):
        Image.fromarray(noise.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return folder


def names_of(number: int) -> list[str]:
    """None, one or two pictures."""
    return [f"{(number + i) % 7}.png" for i in range(number % 3)]


def said(number: int) -> list[str]:
    """Question and answer, twice for some rows."""
    return [f"What is number {number}?", f"A thing of {number}."] * (1 + number % 2)


def turns(
    number: int, role: str = "role", content: str = "content", roles=("user", "assistant")
) -> list[dict]:
    found = [{role: roles[i % 2], content: text} for i, text in enumerate(said(number))]
    found[0][content] = "<image>\n" * len(names_of(number)) + found[0][content]
    return found


def ours(number: int, pictures: Path) -> dict:
    return {"image": names_of(number), "conversations": turns(number)}


def llava(number: int, pictures: Path) -> dict:
    conversations = turns(number, "from", "value", ("human", "gpt"))
    return {"id": str(number), "image": ", ".join(names_of(number)), "conversations": conversations}


def black() -> bytes:
    return base64.b64decode(
        "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
    )


def release_3(number: int, pictures: Path) -> dict:
    """A list of bytes; a black picture where there is none."""
    inside = [(pictures / name).read_bytes() for name in names_of(number)] or [black()]
    return {"conversations": json.dumps(turns(number), ensure_ascii=False), "image_bytes": inside}


def the_cauldron(number: int, pictures: Path) -> dict:
    texts = said(number)
    pairs = zip(texts[::2], texts[1::2], strict=True)
    images = [{"bytes": (pictures / name).read_bytes(), "path": None} for name in names_of(number)]
    return {"images": images, "texts": [{"user": q, "assistant": a, "source": "x"} for q, a in pairs]}


def messages(number: int, pictures: Path) -> dict:
    """Parts that stand for the row's pictures."""
    found = [
        {"role": turn["role"], "content": [{"type": "text", "text": turn["content"]}]}
        for turn in turns(number)
    ]
    parts: list = [{"type": "image", "text": None} for _ in names_of(number)]
    found[0]["content"] = [*parts, {"type": "text", "text": said(number)[0]}]
    images = [{"bytes": (pictures / name).read_bytes(), "path": name} for name in names_of(number)]
    return {"images": images, "messages": found}


def urls(number: int, pictures: Path) -> dict:
    """Parts that carry their pictures."""
    found = turns(number)
    made = [base64.b64encode((pictures / name).read_bytes()).decode() for name in names_of(number)]
    parts = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{each}"}} for each in made]
    found[0]["content"] = [*parts, {"type": "text", "text": said(number)[0]}]
    return {"messages": found}


def imagefolder(number: int, pictures: Path) -> dict:
    return {"file_names": names_of(number), "messages": turns(number)}


def write_parquet(path: Path, rows: list[dict], row_group_size: int = 300, **options) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=row_group_size, **options)
    return path


def write_json(path: Path, rows: list[dict]) -> Path:
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


FORMS = {
    "LLaVA": (llava, write_json, "x.json"),
    "LLaVA in Parquet": (llava, write_parquet, "x.parquet"),
    "release 3": (release_3, write_parquet, "x.parquet"),
    "the_cauldron": (the_cauldron, write_parquet, "x.parquet"),
    "messages": (messages, write_parquet, "x.parquet"),
    "messages with data: URLs": (urls, write_rows, "x.jsonl"),
    "imagefolder": (imagefolder, write_rows, "metadata.jsonl"),
    "conversations": (ours, write_parquet, "x.parquet"),
}


def batches(path: Path, images: Path, processor) -> list[dict]:
    samples = VLMDataset([path], processor, 512, images)
    assert len(samples) == COUNT
    steps = [StepDataset(samples, 0)[[list(range(start, start + 50))]] for start in range(0, COUNT, 50)]
    assert not [step for step in steps if isinstance(step, DataError)]
    return [step[0] for step in steps]


@pytest.fixture(scope="module")
def small(processor) -> MiniMindVLMProcessor:
    """The processor, for pictures of 32 pixels: there are thousands."""
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    image_processor = AutoImageProcessor.from_pretrained(TINY_ENCODER, backend="pil", **sizes)
    return MiniMindVLMProcessor(image_processor, processor.tokenizer, tokens_per_image=4)


@pytest.fixture(scope="module")
def expected(pictures, small, tmp_path_factory) -> list[dict]:
    path = tmp_path_factory.mktemp("ours") / "x.jsonl"
    return batches(write_rows(path, [ours(i, pictures) for i in range(COUNT)]), pictures, small)


@pytest.mark.parametrize("form", FORMS)
def test_every_layout_gives_the_batches_of_our_rows(form, pictures, small, expected, tmp_path, caplog):
    make, write, name = FORMS[form]
    folder = pictures if make is imagefolder else tmp_path
    path = write(folder / name, [make(i, pictures) for i in range(COUNT)])
    with caplog.at_level(logging.INFO):
        found = batches(path, pictures, small)
    ignored = "; in 334 no <image> asks for it" if form == "release 3" else ""
    layout = form.removesuffix(" in Parquet").removesuffix(" with data: URLs")
    assert f"{name}: layout {layout}: 666 of 1000 rows have pictures{ignored}" in caplog.messages
    for one, other in zip(expected, found, strict=True):
        assert one.keys() == other.keys()
        for key in one.keys() - {"where"}:
            equal = torch.equal(one[key], other[key]) if torch.is_tensor(one[key]) else one[key] == other[key]
            assert equal, key


PART = {"type": "image"}
TEXT = {"type": "text", "text": "What?"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "x", "id": 5}, "found None: no layout has the fields 'question', 'id'"),
        (
            {"messages": [{"role": "user", "content": [PART, TEXT]}]},
            "turn 1: an image part more than the row has",
        ),
        (
            {"image": ["0.png", "1.png"], "messages": [{"role": "user", "content": [PART, TEXT]}, ASKED[1]]},
            "1 <image> markers in the user's turns, but 2 images",
        ),
        (
            {"image": "0.png", "messages": [{"role": "assistant", "content": [PART, TEXT]}]},
            "turn 1: pictures are expected in the user's turns",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}]},
            "turn 1: expected a part 'text', 'image' or 'image_url', found {'type': 'video'",
        ),
        (
            {"messages": [{"role": "user", "content": [PART | {"image_url": {"url": "https://x/a.png"}}]}]},
            "no picture is fetched from the network, expected a path: 'https://x/a.png'",
        ),
        (
            {"messages": [{"role": "user", "content": [PART | {"image": "data:image/png;base64,??"}]}]},
            "cannot read image 'data:image/p",
        ),
        ({"image": "\x000:100", "conversations": PLAIN}, "no path can have a NUL character"),
        ({"texts": [{"user": "a", "assistant": ""}]}, "an assistant turn is empty"),
        ({"texts": [{"user": "a", "assistant": "b", "image": "0.png"}]}, "found 'image': '0.png'"),
        ({"texts": [{"user": "a", "assistant": "b"}], "video": "a.mp4"}, "found 'video': 'a.mp4'"),
        ({"file_name": 5, "conversations": ASKED}, "5' not found"),
        ({"texts": "[5]"}, "turn 1 is not an object with 'user' and 'assistant'"),
    ],
)
def test_what_a_layout_does_not_have_is_named(tmp_path, row, message):
    path = write_rows(tmp_path / "x.jsonl", [{"text": "x"}, row])
    with pytest.raises(DataError) as caught:
        load_rows([path], tmp_path)
    assert str(caught.value).startswith("x.jsonl:2: ") and message in str(caught.value)


def test_a_picture_in_parquet_may_be_a_path(data):
    image = {"bytes": None, "path": "3.png"}
    path = write_parquet(data / "x.parquet", [{"image": image, "conversations": ASKED}])
    assert load_rows([path], data / "images")["images"][0] == ["3.png"]
