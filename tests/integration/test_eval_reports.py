"""What eval_vlm.py writes and compares: several checkpoints, pages of pictures, perplexity."""

import base64
import io
import json
import math
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from conftest import COLOURS, row, write_rows
from PIL import Image
from test_eval_vlm import call

from common.weights import save_weights
from dataset.vlm_dataset import VLMDataset
from inference.trained import load_vlm


@pytest.fixture(scope="module")
def forgetful(weight) -> Path:
    """A second checkpoint of the same model, whose projection is gone: it sees no picture."""
    state = torch.load(weight, weights_only=True)
    blind = {name: tensor * 0 if "vision_proj" in name else tensor for name, tensor in state.items()}
    path = weight.with_name("blind_64.pth")
    save_weights(path, blind, json.loads(weight.with_suffix(".json").read_text()))
    return path


def test_checkpoints_are_compared_over_the_same_questions(world, weight, forgetful, run):
    where = ["--data_path", world / "eval.jsonl", "--images_path", world / "images"]
    report_path = world / "compared.json"
    models = ["--weight", weight, "--weight", forgetful, "--no_blank_baseline"]
    result = run("eval_vlm.py", *models, *where, "--score", "--report", report_path)

    report = json.loads(report_path.read_text(encoding="utf-8"))
    (other,) = report["compared"]
    assert report["accuracy"] == 1 and report["blank"] is None and other["weight"] == str(forgetful)
    assert other["by_kind"]["(none)"]["accuracy"] == 1 and other["by_kind"]["two"]["accuracy"] <= 0.5
    expected = [question["expected"] for question in report["questions"]]
    right = [answer == text for answer, text in zip(other["answers"], expected, strict=True)]
    assert other["accuracy"] == sum(right) / 11 < 0.7
    difference = other["difference"]["all"]["exact"]
    assert difference["value"] == pytest.approx(other["accuracy"] - 1)
    assert difference["low"] <= difference["value"] <= difference["high"] < 0
    unchanged = other["difference"]["by_kind"]["(none)"]
    assert all(set(ends.values()) == {0.0} for ends in unchanged.values())

    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 100 + len(str(world))
    printed = [line.split() for line in lines]
    assert ["A:", str(weight)] in printed and ["B:", str(forgetful)] in printed
    assert ["accuracy", "n", "A", "B", "majority"] in printed
    assert ["all", "questions", "11", "1.000", f"{other['accuracy']:.3f}", "0.273"] in printed
    ends = f"{difference['low']:+.3f}", "to", f"{difference['high']:+.3f}"
    assert ["all", "questions", f"{difference['value']:+.3f}", *ends] in printed


def test_a_page_of_pictures_is_one_html_file_with_every_models_answers(world, weight, forgetful, run):
    page = world / "pages/page.html"
    asked = ["--prompt", "<b>What colour is this?</b>", "--temperature", 0, "--max_new_tokens", 8]
    models = ["--weight", weight, "--weight", forgetful]
    run("eval_vlm.py", *models, "--image_dir", world / "images", *asked, "--report", page)
    parsed = Page()
    parsed.feed(page.read_text(encoding="utf-8"))
    assert parsed.tags["b"] == 0, "a question is no markup"
    assert parsed.tags["tr"] == 1 + len(COLOURS) and parsed.tags["img"] == len(COLOURS)
    assert [name for name in parsed.texts if name in (str(weight), str(forgetful))] == [
        str(weight),
        str(forgetful),
    ]
    assert parsed.texts.count("<b>What colour is this?</b>") == len(COLOURS)
    assert sum(bool(re.fullmatch(r"\d+\.\d tokens/s", text)) for text in parsed.texts) == 2 * len(COLOURS)
    for colour, source in zip(COLOURS, parsed.pictures, strict=True):
        data = base64.b64decode(source.removeprefix("data:image/jpeg;base64,"))
        seen, meant = (
            picture.convert("RGB").resize((1, 1)).getpixel((0, 0))
            for picture in (Image.open(io.BytesIO(data)), Image.new("RGB", (1, 1), colour))
        )
        assert max(abs(a - b) for a, b in zip(seen, meant, strict=True)) < 20


class Page(HTMLParser):
    """What a browser would find in it."""

    def __init__(self) -> None:
        super().__init__()
        self.tags, self.texts, self.pictures = Counter(), [], []

    def handle_starttag(self, tag, attributes) -> None:
        self.tags[tag] += 1
        if tag == "img":
            self.pictures.append(dict(attributes)["src"])

    def handle_data(self, data) -> None:
        self.texts.append(data)


def test_a_markdown_page_keeps_its_thumbnails_beside_it(world, weight, monkeypatch, capsys):
    folder = world / "pages md"
    where = ["--data_path", world / "eval.jsonl", "--images_path", world / "images", "--temperature", 0]
    code, _, error = call(monkeypatch, capsys, "--weight", weight, *where, "--report", folder / "p.md")
    assert code == 0, error
    lines = (folder / "p.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert rows[0] == ["picture", "question", "expected", "answer"]
    assert rows[2][:3] == [
        "![blue.png](p_pictures/0000.jpg)",
        "What colour is this?",
        "It is blue.",
    ]
    assert re.fullmatch(r"It is blue\. \(\d+\.\d tokens/s\)", rows[2][3])
    assert rows[-1][:3] == ["", "你好吗？", "我很好。"]
    assert sorted(path.name for path in (folder / "p_pictures").iterdir()) == [
        f"{number:04}.jpg" for number in range(len(COLOURS))
    ]
    with Image.open(folder / "p_pictures/0000.jpg") as picture:
        assert picture.size == (48, 40)


LATIN = "caf\udce9"  # as Linux hands on the name of a file in Latin-1


@pytest.mark.parametrize("report", ["r.html", "r.md", f"{LATIN}.md", "r.json", f"{LATIN}.json"], ids=ascii)
def test_a_report_is_written_though_a_name_is_not_text(report, world, weight, tmp_path, monkeypatch, capsys):
    picture, model = tmp_path / f"{LATIN}.png", tmp_path / f"{LATIN}.pth"
    picture.write_bytes((world / "images/red.png").read_bytes())
    for suffix in (".pth", ".json"):
        model.with_suffix(suffix).write_bytes(weight.with_suffix(suffix).read_bytes())
    asked = ["--image", picture, "--prompt", "What colour is this?", "--temperature", 0]
    if report.endswith(".json"):
        rows = [row("colour", [("What colour is this?", "It is red.")], "red.png")]
        where = ["--images_path", world / "images", "--no_blank_baseline"]
        asked = ["--data_path", write_rows(tmp_path / f"{LATIN}.jsonl", rows), "--score", *where]
    models = ["--weight", model, "--weight", weight]
    code, out, error = call(monkeypatch, capsys, *models, *asked, "--report", tmp_path / report)
    assert code == 0, error
    content = (tmp_path / report).read_text(encoding="utf-8")
    assert "caf" in content and "caf" in out and (report.endswith(".json") or "It is red." in content)
    if report.endswith(".json"):
        assert json.loads(content)["weight"] == str(model)


@pytest.mark.parametrize("mode", [["--report", "{folder}/r.md"], ["--score"]], ids=" ".join)
def test_a_picture_that_is_cut_off_is_told_before_the_first_question(
    mode, weight, tmp_path, monkeypatch, capsys
):
    pictures = [tmp_path / name for name in ("a.jpg", "b.jpg")]
    for path in pictures:
        Image.effect_noise((200, 200), 64).save(path)
    content = pictures[1].read_bytes()
    pictures[1].write_bytes(content[: len(content) // 2])
    rows = [row("", [("Hm?", "Ah.")], str(path)) for path in pictures]
    asked = ["--data_path", write_rows(tmp_path / "q.jsonl", rows), "--weight", weight]
    asked += [part.replace("{folder}", str(tmp_path)) for part in mode]
    code, out, error = call(monkeypatch, capsys, *asked)
    assert (code, out) == (1, "")
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: q.jsonl:2: cannot read image {pictures[1]} (")


def test_perplexity_is_that_of_the_loss_over_supervised_tokens(world, weight, monkeypatch, capsys):
    report_path = world / "perplexity.json"
    where = ["--data_path", world / "eval.jsonl", "--images_path", world / "images", "--batch_size", 2]
    asked = ["--weight", weight, "--perplexity", "--report", report_path]
    code, out, error = call(monkeypatch, capsys, *asked, *where)
    assert code == 0, error
    (found,) = json.loads(report_path.read_text())["models"]

    model, processor = load_vlm(str(weight))
    samples = VLMDataset([world / "eval.jsonl"], processor, 1000, world / "images")
    total, tokens = 0.0, 0
    for sample in (samples[i] for i in range(len(samples))):
        ids, labels = torch.tensor([sample.input_ids]), torch.tensor(sample.labels)
        pictures = sample.pixel_values
        with torch.no_grad():
            pixels = None if pictures is None else samples.pixels.normalised(pictures)[None]
            logits = model(ids, pixel_values=pixels).logits[0]
        counted = labels[1:] != -100
        total -= float(logits[:-1].log_softmax(-1)[counted].gather(1, labels[1:][counted, None]).sum())
        tokens += int(counted.sum())
    assert found["tokens"] == tokens
    assert found["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-4)
    assert found["blank"]["perplexity"] > 1.2 * found["perplexity"], "it needs its eyes"
    shown = [line.split() for line in out.splitlines()]
    assert shown[0] == ["tokens", "loss", "perplexity", "blank"]
    assert shown[1][0] == str(weight) and shown[1][3] == f"{found['perplexity']:.3f}"


def test_perplexity_of_texts_and_of_a_broken_file(world, weight, monkeypatch, capsys):
    texts = write_rows(world / "plain.jsonl", [{"text": "Nobody asks."}, {"text": "And nobody answers."}])
    code, out, _ = call(monkeypatch, capsys, "--weight", weight, "--perplexity", "--data_path", texts)
    assert code == 0
    _, _, loss, perplexity, blank = out.splitlines()[1].split()
    assert float(perplexity) == pytest.approx(math.exp(float(loss)), rel=1e-3) and blank == "-"
    broken = row("colour", [("What?", "It is red.")], "broken.png")
    (world / "images/broken.png").write_bytes(b"no picture")
    try:
        where = ["--data_path", write_rows(world / "bad.jsonl", [broken]), "--images_path", world / "images"]
        code, _, error = call(monkeypatch, capsys, "--weight", weight, "--perplexity", *where)
    finally:
        (world / "images/broken.png").unlink()
    assert code == 1
    assert "error: bad.jsonl:1: cannot read image" in error and "Traceback" not in error
