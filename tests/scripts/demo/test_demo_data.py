"""The demo's drawings, composed data and encoder: counts, right answers, equal seeds, the held-out style."""

import io
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT
from PIL import Image
from transformers import AutoImageProcessor, CLIPVisionModel

from dataset.collate import StepSampler
from dataset.vlm_dataset import VLMDataset
from model.processing_vlm import MiniMindVLMProcessor

SCRIPT = ROOT / "scripts/demo/make_demo_data.py"
ENCODER = ROOT / "model" / "vision_model" / "demo-encoder"
WORLD = json.loads((ROOT / "dataset" / "demo" / "world.json").read_text(encoding="utf-8"))
TEMPLATES = WORLD["big_questions"] | WORLD["questions"]
PICTURES, QUESTIONS, SEED = 40, 48, 7

sys.path.insert(0, str(ROOT / "scripts/demo"))
import make_demo_data  # noqa: E402


def make_data(out_dir: Path, seed: int = SEED) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), "--out_dir", str(out_dir), "--seed", str(seed)]
    command += ["--pictures", str(PICTURES), "--questions", str(QUESTIONS)]
    return subprocess.run(command, capture_output=True, text=True)


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def all_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out_dir = tmp_path_factory.mktemp("demo") / "data"
    result = make_data(out_dir)
    assert result.returncode == 0, result.stderr
    return out_dir


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list]:
    """What is in the pictures of each folder, by picture name."""
    folder = tmp_path_factory.mktemp("scenes")
    found = {}
    for split, count in (("images", PICTURES), ("images_seen", QUESTIONS), ("images_unseen", QUESTIONS)):
        (folder / split).mkdir()
        found |= make_demo_data.draw_pictures(folder, split, range(count), SEED)
    return found


def expected_answer(question: str, names: list[str], cells: list[int | None]) -> str:
    """The answer worked out from the question's words alone, and from what is where."""
    language = "en" if question.isascii() else "zh"
    concept = {entry[language]: entry for entry in WORLD["concepts"]}
    spoken = {entry["en"]: entry[language] for entry in WORLD["concepts"]}
    positions = [position[language] for position in WORLD["positions"]]
    there = [spoken[name] for name in names]
    for kind, entry in TEMPLATES.items():
        pattern = re.sub(r"\\{(a\\ )?(\w+)\\}", r"(?P<\2>.+)", re.escape(entry[language][0]))
        match = re.fullmatch(pattern, question)
        if not match or (kind in WORLD["big_questions"]) != (cells[0] is None):
            continue
        if kind in ("this", "what"):
            return there[0] if kind == "this" else there[cells.index(positions.index(match["position"]))]
        if kind in ("kindof", "kind"):
            name = there[0] if kind == "kindof" else there[cells.index(positions.index(match["position"]))]
            return WORLD["kinds"][concept[name]["kind"]][language]
        if kind == "where":
            return positions[cells[there.index(match["thing"])]]
        if kind == "count":
            return WORLD["numbers"][len(there) - 1][language]
        choices = [re.sub("^an? ", "", match[side]) for side in ("first", "second")]
        return next(choice for choice in choices if choice in there)
    raise AssertionError(f"not a question of world.json: {question}")


def expected_caption(language: str, names: list[str], cells: list[int | None]) -> str:
    spoken = {entry["en"]: entry[language] for entry in WORLD["concepts"]}
    positions = [position[language] for position in WORLD["positions"]]
    an = {name for name in spoken if name[0] in "aeiou"} - {"unicorn"} | {"hourglass"}
    bare = set(WORLD["no_article"])
    parts = []
    for name, cell in zip(names, cells, strict=True):
        if language == "zh":
            parts.append(spoken[name] if cell is None else f"{positions[cell]}有{spoken[name]}")
        else:
            thing = name if name in bare else f"{'an' if name in an else 'a'} {name}"
            parts.append(thing if cell is None else f"{thing} {positions[cell]}")
    return "，".join(parts) if language == "zh" else ", ".join(parts)[::-1].replace(" ,", " dna ", 1)[::-1]


def check_turns(row: dict, scene: list) -> None:
    names, cells = [thing.name for thing in scene], [thing.cell for thing in scene]
    prompts = {prompt: lang for lang in ("en", "zh") for prompt in WORLD["caption"]["prompts"][lang]}
    turns = row["conversations"]
    assert turns[0]["content"].startswith("<image>\n")
    for question, answer in zip(turns[::2], turns[1::2], strict=True):
        assert (question["role"], answer["role"]) == ("user", "assistant")
        text = question["content"].removeprefix("<image>\n")
        if text in prompts:
            assert answer["content"] == expected_caption(prompts[text], names, cells)
        else:
            assert answer["content"] == expected_answer(text, names, cells)


def test_there_is_a_drawing_of_every_thing_in_every_style_that_has_one():
    rows = pq.read_table(ROOT / "dataset" / "demo" / "sprites.parquet").to_pylist()
    listed = {(entry["en"], style) for entry in WORLD["concepts"] for style in entry["icons"]}
    assert {(row["name"], row["style"]) for row in rows} == listed
    assert len(rows) == len(listed) == 1375
    for row in rows:
        drawing = Image.open(io.BytesIO(row["image"]))
        assert (drawing.format, drawing.mode, drawing.size) == ("WEBP", "RGBA", (64, 64))
        left, top, right, bottom = drawing.getchannel("A").point(lambda alpha: 255 * (alpha > 8)).getbbox()
        assert max(right - left, bottom - top) >= 62, (row["name"], row["style"])


def test_credits_name_every_style_and_its_licence():
    text = (ROOT / "dataset" / "demo" / "CREDITS.md").read_text(encoding="utf-8")
    for style, licence in WORLD["styles"].items():
        line = next(line for line in text.splitlines() if line.startswith(f"| `{style}` |"))
        assert f"[{licence.split(',')[0]}]" in line


@pytest.mark.parametrize("name", ["pretrain.jsonl", "sft.jsonl", "eval_seen.jsonl", "eval_unseen.jsonl"])
def test_answers_and_captions_are_those_of_the_scene(data: Path, scenes: dict[str, list], name: str):
    rows = read_rows(data / name)
    assert rows
    for row in rows:
        check_turns(row, scenes[row["image"]])


def test_texts_describe_the_scene_they_ask_about(data: Path):
    names = {entry[lang]: entry["en"] for lang in ("en", "zh") for entry in WORLD["concepts"]}
    spoken_positions = [p[lang] for lang in ("en", "zh") for p in WORLD["positions"]]
    for row in read_rows(data / "lm.jsonl"):
        assert "image" not in row
        description, question = re.fullmatch(
            r"(.+?)(?:\. |。)(.+)", row["conversations"][0]["content"]
        ).groups()
        parts = re.split("，|, | and ", description)
        scene = []
        for part in parts:
            by_length = sorted(spoken_positions, key=len, reverse=True)
            place = next((p for p in by_length if part.endswith(" " + p) or part.startswith(p + "有")), None)
            cell = None if place is None else spoken_positions.index(place) % 9
            thing = part if place is None else part.removesuffix(" " + place).removeprefix(place + "有")
            name = names[thing if thing in names else re.sub("^an? ", "", thing)]
            scene.append(make_demo_data.Thing(name, "", cell, 0, 0, 0))
        first = {"role": "user", "content": "<image>\n" + question}
        check_turns({"conversations": [first, *row["conversations"][1:]]}, scene)


def test_every_name_and_kind_is_an_answer_in_the_texts(data: Path):
    answers = {turn["content"] for row in read_rows(data / "lm.jsonl") for turn in row["conversations"][1::2]}
    words = {entry[lang] for lang in ("en", "zh") for entry in [*WORLD["concepts"], *WORLD["kinds"].values()]}
    assert words <= answers


@pytest.mark.parametrize("name", ["eval_seen.jsonl", "eval_unseen.jsonl"])
def test_tests_are_balanced_over_kinds_and_languages(data: Path, name: str):
    rows = read_rows(data / name)
    cases = Counter((row["kind"], row["conversations"][0]["content"].isascii()) for row in rows)
    assert len(rows) == QUESTIONS
    assert len(cases) == 16
    assert set(cases.values()) == {QUESTIONS // 16}


def test_the_held_out_style_is_in_the_unseen_test_only(tmp_path: Path):
    for split in make_demo_data.SPLITS:
        (tmp_path / split).mkdir()
        drawn = make_demo_data.draw_pictures(tmp_path, split, range(40), SEED)
        styles = {thing.style for _, scene in drawn for thing in scene}
        if split == "images_unseen":
            assert styles == {"twemoji"}
        else:
            assert styles == set(WORLD["styles"]) - {"twemoji"}


def test_pictures_are_square_and_half_of_them_show_one_large_thing(tmp_path: Path):
    (tmp_path / "images").mkdir()
    scenes = [scene for _, scene in make_demo_data.draw_pictures(tmp_path, "images", range(200), SEED)]
    large = [scene for scene in scenes if scene[0].cell is None]
    assert 70 <= len(large) <= 130
    assert all(len(scene) == 1 and 48 <= scene[0].size <= 91 for scene in large)
    assert {len(scene) for scene in scenes if scene[0].cell is not None} == {1, 2, 3}
    with Image.open(tmp_path / "images" / "000000.png") as picture:
        assert (picture.size, picture.mode) == ((96, 96), "RGB")


def test_equal_arguments_give_equal_bytes_and_another_seed_others(data: Path, tmp_path: Path):
    assert make_data(tmp_path / "again").returncode == 0
    assert make_data(tmp_path / "other", seed=SEED + 1).returncode == 0
    assert all_bytes(tmp_path / "again") == all_bytes(data)
    first = "images/000000.png"
    assert all_bytes(tmp_path / "other")[first] != all_bytes(data)[first]


def test_a_second_run_leaves_what_is_there(data: Path):
    before = (data / "manifest.json").stat().st_mtime_ns
    result = make_data(data)
    assert result.returncode == 0
    assert "already there" in result.stdout
    assert (data / "manifest.json").stat().st_mtime_ns == before


def test_a_folder_with_other_files_is_refused(tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("mine")
    result = make_data(tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_encoder_folder_loads_and_sees_small_pictures_unresized():
    encoder = CLIPVisionModel.from_pretrained(ENCODER, dtype=torch.float32).eval()
    processor = AutoImageProcessor.from_pretrained(ENCODER, backend="pil")
    pixels = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    photo = Image.new("RGB", (300, 200), "red")
    pixel_values = processor([Image.fromarray(pixels), photo], return_tensors="pt")["pixel_values"]
    np.testing.assert_allclose(pixel_values[0].permute(1, 2, 0), pixels / 127.5 - 1, atol=1e-5)
    with torch.no_grad():
        hidden = encoder(pixel_values).last_hidden_state
    assert hidden.shape == (2, 1 + 36, encoder.config.hidden_size)
    assert hidden.isfinite().all()
    assert (ENCODER / "model.safetensors").stat().st_size <= 8 * 2**20


def test_encoder_was_not_trained_on_the_held_out_style():
    training = json.loads((ENCODER / "training.json").read_text(encoding="utf-8"))
    assert training["held_out_style"] == WORLD["held_out_style"] == "twemoji"
    assert sorted([*training["styles"], "twemoji"]) == sorted(WORLD["styles"])
    assert training["scores"]["held_out"]["large"] > 0.5


@pytest.mark.parametrize(("name", "batch_size"), [("pretrain", 16), ("sft", 4)])
def test_padding_of_the_demo_is_below_five_percent(data, tokenizer, name, batch_size):
    image_processor = AutoImageProcessor.from_pretrained(ENCODER, backend="pil")
    processor = MiniMindVLMProcessor(image_processor, tokenizer, tokens_per_image=36)
    samples = VLMDataset([data / f"{name}.jsonl"], processor, 640, data)
    lengths = np.array([len(samples[row].input_ids) for row in range(len(samples))])
    micros = [micro for step in StepSampler(samples.lengths(), batch_size) for micro in step]
    padded = sum(lengths[micro].max() * len(micro) for micro in micros)
    assert 1 - lengths.sum() / padded < 0.05
