"""The model card that `convert_to_hf.py` writes: its figures are those of the files, none is made up."""

import json
import os
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from conftest import ROOT, write_rows
from PIL import Image
from test_convert_to_hf import make_weights

from inference.answers import Question
from inference.model_card import write_card
from inference.scoring.accuracy import score
from inference.trained import load_pth

STEP = 7  # of make_weights
SEEN, MAJORITY = "`seen.jsonl`", "`seen.jsonl`, most frequent answer"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = make_weights(tmp_path_factory.mktemp("weights"))
    return path, *load_pth(path)


@pytest.fixture
def made(model, tmp_path):
    """A folder of weights beside everything that a card tells of, and a function that writes the card."""
    path, vlm, processor, sidecar = model
    weights = tmp_path / "out/tiny.pth"
    weights.parent.mkdir()
    write_rows(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two"}, {"text": "three"}])
    pq.write_table(pa.table({"conversations": ["[]"] * 1200}), tmp_path / "b.parquet")
    weights.write_bytes(path.read_bytes())
    run = weights.parent / "runs/tiny"
    run.mkdir(parents=True)
    losses = [
        (2, "loss", 3.5),
        (4, "eval_loss", 2.25),
        (6, "loss", 1.5),
        (8, "loss", 0.25),
        (8, "eval_loss", 0.5),
    ]
    write_rows(run / "metrics.jsonl", [{"step": step, name: value} for step, name, value in losses])
    write_report(weights.with_name("report_seen.json"), weights, "data/seen.jsonl")

    def card(target: str = "minimind", **changed) -> str:
        arguments = {
            "data_path": [str(tmp_path / name) for name in ("a.jsonl", "b.parquet")],
            "log_interval": 2,
        }
        found = sidecar | {"step": STEP, "arguments": arguments} | changed
        write_card(tmp_path, target, "me/tiny", weights, vlm, processor, found, "some/clip", "5.23")
        return (tmp_path / "README.md").read_text(encoding="utf-8")

    return weights, card


def write_report(path: Path, weights: Path, data: str, blank=False, grey=None) -> None:
    """As eval_vlm.py --score writes it: two kinds, four questions, three of them answered rightly."""
    asked, answers = [{"role": "user", "content": "What?"}], ["red", "red", "two", "one"]
    expected = [("colour", "red"), ("colour", "blue"), ("count", "two"), ("count", "one")]
    questions = [Question("eval:1", asked, [], kind, answer) for kind, answer in expected]
    report = score(questions, answers) | {"blank": score(questions, grey) if grey else None, "metrics": {}}
    report |= {"blank_images": blank, "weight": str(weights), "data_path": data}
    path.write_text(json.dumps(report), encoding="utf-8")


def table(card: str, corner: str) -> dict[str, dict[str, str]]:
    """The cells of the table whose first heading is `corner`: by column, by row."""
    block = card[card.index(f"| {corner} |") :].partition("\n\n")[0]
    header, dashes, *rows = [
        [cell.strip() for cell in line.strip("| ").split("|")] for line in block.splitlines()
    ]
    assert len(header) == len(dashes) and all(len(row) == len(header) for row in rows), block
    return {name: {row[0]: row[i] for row in rows} for i, name in enumerate(header[1:], start=1)}


def test_figures_are_those_of_the_files(made):
    _, card = made
    text = card()
    assert table(text, "data of the last stage") == {"rows": {"`a.jsonl`": "3", "`b.parquet`": "1,200"}}
    assert table(text, "loss") == {
        "value": {"training": "1.5000", "validation": "2.2500"},
        "at step": {"training": "6", "validation": "4"},
    }
    means = {"mean over kinds": "0.75", "all questions": "0.75", "number of questions": "4"}
    assert table(text, "kind") == {
        SEEN: {"colour": "0.50", "count": "1.00"} | means,
        MAJORITY: {"colour": "0.50", "count": "0.50"} | means | dict.fromkeys(list(means)[:2], "0.50"),
    }
    assert (
        f"Trained with torch {torch.__version__.partition('+')[0]}, transformers {transformers.__version__}."
        in text
    )


def test_grey_pictures_stand_beside_the_others(made):
    weights, card = made
    write_report(weights.with_name("report_a.json"), weights, "data/unseen.jsonl", blank=True)
    write_report(
        weights.with_name("report.json"), weights, "data/own.jsonl", grey=["red", "red", "one", "two"]
    )
    columns = table(card(), "kind")
    assert list(columns) == [
        "`own.jsonl`",
        "`own.jsonl`, grey pictures",
        SEEN,
        "`unseen.jsonl`, grey pictures",
        "`own.jsonl`, most frequent answer",
        "`unseen.jsonl`, most frequent answer",
        MAJORITY,
    ]
    assert columns["`own.jsonl`, grey pictures"]["count"] == "0.00"


@pytest.mark.parametrize("target", ["minimind", "llava", "internvl"])
def test_the_example_is_what_the_model_answers(made, model, tmp_path, target):
    _, vlm, processor, _ = model
    text = made[1](target)
    content = [
        {"type": "image", "path": str(tmp_path / "example.jpg")},
        {"type": "text", "text": "What is this?"},
    ]
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
    inputs = processor.apply_chat_template([{"role": "user", "content": content}], **options)
    ids = vlm.generate(**inputs, do_sample=False, max_new_tokens=64)[0, inputs["input_ids"].shape[1] :]
    expected = processor.decode(ids, skip_special_tokens=True).replace("`", "'")
    assert re.search(r"^```text\n(.*?)\n```$", text, re.MULTILINE | re.DOTALL)[1] == expected
    assert '"What is this?"' in text and "(example.jpg)" in text and "CC BY 4.0" in text
    with (
        Image.open(tmp_path / "example.jpg") as picture,
        Image.open(ROOT / "dataset/eval_images/drawing_tiger.png") as drawn,
    ):
        assert (picture.format, picture.size) == ("JPEG", drawn.size)
    assert (tmp_path / "example.jpg").stat().st_size < 50_000


def test_the_language_model_alone_has_no_picture(made, tmp_path):
    text = made[1]("llama")
    assert "example.jpg" not in text and not (tmp_path / "example.jpg").exists()
    assert "## Training" in text and "## Evaluation" in text


@pytest.mark.parametrize("change", [{"arguments": {}, "step": 0}, {"arguments": None, "versions": None}])
def test_what_is_not_known_is_left_out(made, change):
    weights, card = made
    weights.with_name("report_seen.json").unlink()
    text = card(**change)
    assert "## Training" not in text and "## Evaluation" not in text
    assert "None" not in text and "Undefined" not in text
    assert "## Example" in text and "## Licence" in text
    assert "\n\n\n" not in text


@pytest.mark.parametrize("fault", ["older", "other weights", "not JSON", "a list", "another format"])
def test_a_report_that_is_not_about_these_weights_is_left_out(made, fault):
    weights, card = made
    path = weights.with_name("report_seen.json")
    report = json.loads(path.read_text())
    if fault == "older":
        os.utime(path, (0, 0))
    elif fault == "other weights":
        path.write_text(json.dumps(report | {"weight": "out/other.pth"}))
    else:
        path.write_text({"not JSON": "{", "a list": "[1]", "another format": '{"weight": "tiny.pth"}'}[fault])
    assert "## Evaluation" not in card()


@pytest.mark.parametrize("fault", ["gone", "changed since", "not Parquet"])
def test_rows_of_a_file_that_is_another_by_now_are_not_counted(made, tmp_path, fault):
    weights, card = made
    path = tmp_path / "b.parquet"
    if fault == "gone":
        path.unlink()
    elif fault == "changed since":
        os.utime(path, (weights.stat().st_mtime + 1,) * 2)
    else:
        path.write_bytes(b"text")
        os.utime(path, (0, 0))
    rows = table(card(), "data of the last stage")["rows"]
    assert rows == {"`a.jsonl`": "3", "`b.parquet`": "not known"}


@pytest.mark.parametrize("fault", ["another run has begun", "damaged", "gone"])
def test_losses_of_another_run_are_not_told(made, fault):
    weights, card = made
    path = weights.parent / "runs/tiny/metrics.jsonl"
    if fault == "another run has begun":
        write_rows(path, [{"step": 2, "loss": 9.0}, {"step": 4, "loss": 8.0}])
    elif fault == "damaged":
        path.write_text('{"step": 6, "lo')
    else:
        path.unlink()
    text = card()
    assert "| loss |" not in text and "## Training" in text
