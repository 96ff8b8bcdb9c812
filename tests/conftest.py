"""Fixtures shared by the tests: a tokenizer, a tiny encoder, and small data that is made, not shipped."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
from entry_points import ROOT, EntryPoint, start_server
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer

from model.processing_vlm import MiniMindVLMProcessor

TINY_ENCODER = ROOT / "tests/golden/clip"  # hidden 64, 196 patch tokens
THINGS = ["cat", "red bus", "old clock", "tree", "dog", "boat", "cup", "bird"]


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tables that tests build stay out of the user's cache."""
    os.environ["HF_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("datasets_cache"))
    import datasets.config

    datasets.config.HF_DATASETS_CACHE = Path(os.environ["HF_DATASETS_CACHE"])


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "model/tokenizer")


@pytest.fixture(scope="session")
def processor(tokenizer) -> MiniMindVLMProcessor:
    """With few placeholder tokens, so that rows stay readable; no encoder goes with it."""
    image_processor = AutoImageProcessor.from_pretrained(TINY_ENCODER, backend="pil")
    return MiniMindVLMProcessor(image_processor, tokenizer, tokens_per_image=4)


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Eight pictures in images/, captions.jsonl, dialogues.jsonl (0 to 2 images a row) and texts.jsonl."""
    images = tmp_path / "images"
    images.mkdir()
    generator = np.random.default_rng(0)
    captions, dialogues, texts = [], [], []
    for i, thing in enumerate(THINGS):
        pixels = generator.integers(0, 256, (40 + i, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{i}.png")
        answer = {"role": "assistant", "content": f"A {thing}. " * (1 + i % 3)}
        question = {"role": "user", "content": "What is this?\n<image>"}
        captions.append({"image": f"{i}.png", "conversations": [question, answer]})
        more = [{"role": "user", "content": "Really?"}, {"role": "assistant", "content": f"Yes, a {thing}."}]
        row = {"conversations": [question, answer, *more]}
        if i % 3 == 0:
            row = {"conversations": more}
        elif i % 3 == 1:
            row["image"] = f"{i}.png"
        else:
            both = {"role": "user", "content": "What are these?\n<image>\n<image>"}
            row = {"image": [f"{i}.png", "0.png"], "conversations": [both, answer]}
        dialogues.append(row)
        texts.append({"text": f"This is a text about a {thing}, and what it does. " * (1 + i)})
    write_rows(tmp_path / "captions.jsonl", captions)
    write_rows(tmp_path / "dialogues.jsonl", dialogues)
    write_rows(tmp_path / "texts.jsonl", texts)
    return tmp_path


def start(command: list, own_session: bool = False, **env: str) -> EntryPoint | subprocess.Popen:
    """Starts an entry point as users do, from the repository's root: start(["eval_vlm.py", "--score"]).

    With `-m MODULE`, or with environment variables, it gets an interpreter of its own.
    """
    command = list(map(str, command))
    if not env and command[0] != "-m":
        start_server()
        return EntryPoint(command, own_session)
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=own_session,
    )


@pytest.fixture
def run() -> Callable[..., subprocess.CompletedProcess]:
    """Runs an entry point to its end: run("eval_vlm.py", "--weight", path)."""

    def run(*command, expect: int | None = 0, timeout: float = 280, **env) -> subprocess.CompletedProcess:
        process = start(command, **env)
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        finally:
            process.kill()
        if expect is not None and process.returncode != expect:
            pytest.fail(f"exit code {process.returncode}, expected {expect}\n{stdout}\n{stderr}")
        return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)

    return run


TINY = ["--hidden_size", 64, "--num_hidden_layers", 2, "--num_attention_heads", 4, "--num_key_value_heads", 2]
TINY += ["--vision_model_path", TINY_ENCODER, "--num_workers", 0, "--device", "cpu", "--log_interval", 1]
