"""Fixtures shared by the tests: a tokenizer, a tiny encoder, and small data that is made, not shipped."""

import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # several test processes share the cores

import numpy as np
import pytest
import torch
import transformers.dynamic_module_utils
from entry_points import ROOT, EntryPoint, start_server
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    BitImageProcessorPil,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
)

from common.cli import run_main
from common.setup import build_vlm
from common.weights import describe, half_state, save_weights, translated
from dataset.collate import collate
from dataset.vlm_dataset import VLMDataset
from model.model_vlm import MiniMindVLM, VLMConfig, load_weights
from model.processing_vlm import MiniMindVLMProcessor
from trainer.learner import model_inputs

# Whoever runs the tests may ignore Ctrl-C, as a script's background job does, and processes inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

GOLDEN = ROOT / "tests/golden"
TINY_ENCODER = GOLDEN / "clip"  # hidden 64, 196 patch tokens
COLOURS = ("blue", "green", "red", "yellow")
THINGS = ["cat", "red bus", "old clock", "tree", "dog", "boat", "cup", "bird"]


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tables that tests build, and the code of exports that they load, stay out of the user's caches."""
    os.environ["HF_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("datasets_cache"))
    import datasets.config

    datasets.config.HF_DATASETS_CACHE = Path(os.environ["HF_DATASETS_CACHE"])
    # Entry points get the search path of this process: they must keep code where it does.
    os.environ["HF_MODULES_CACHE"] = str(tmp_path_factory.mktemp("modules_cache"))
    transformers.dynamic_module_utils.HF_MODULES_CACHE = os.environ["HF_MODULES_CACHE"]


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


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """Four plain pictures, and eval.jsonl: colours, a follow-up, two pictures at once, a text question."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "images").mkdir()
    rows = []
    for colour in COLOURS:
        Image.new("RGB", (48, 40), colour).save(folder / f"images/{colour}.png")
        turns = [("What colour is this?", f"It is {colour}."), ("And in one word?", colour)]
        rows.append(row("colour", turns, f"{colour}.png"))
    rows.append(row("two", [("Which colours?", "First red, then blue.")], "red.png, blue.png"))
    rows.append(row("two", [("Which colours?", "First blue, then red.")], "blue.png, red.png"))
    rows.append(row("", [("你好吗？", "我很好。")]))
    write_rows(folder / "eval.jsonl", rows)
    return folder


@pytest.fixture(scope="session")
def weight(world, tokenizer) -> Path:
    """A .pth with its sidecar that answers eval.jsonl rightly."""
    torch.manual_seed(0)
    config = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    model, processor = build_vlm(config, str(TINY_ENCODER), tokenizer)
    samples = VLMDataset([world / "eval.jsonl"], processor, 1000, world / "images")
    rows = [samples[i] for i in range(len(samples))]
    batch = collate(rows, tokenizer.pad_token_id, tokens_per_image=processor.tokens_per_image)
    inputs = model_inputs(batch, torch.device("cpu"), samples.pixels)
    pictures = model.get_image_embeddings(inputs.pop("pixel_values"), model.vision_encoder)
    inputs["image_features"] = pictures[inputs.pop("picture_numbers")]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=8e-3)
    for _ in range(300):
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss < 0.02:
            break
    assert loss < 0.02, "the fixture did not learn its few rows"
    path = world / "weights/sft_vlm_64.pth"
    save_weights(
        path,
        half_state(model.state_dict()),
        describe(model, tokenizer, "sft_vlm", 1, {"vision_model_path": str(TINY_ENCODER)}),
    )
    return path


def golden_model(name: str) -> tuple[MiniMindVLM, dict]:
    """A model of either release, built from the config in that release's own names, and what is expected of
    it (tests/golden/README.md)."""
    expected = torch.load(GOLDEN / f"{name}_golden.pt", weights_only=True)
    is_new = name.startswith("v3/")
    config = VLMConfig(**translated(expected["config"]) if is_new else expected["config"])
    encoder = GOLDEN / "v3/siglip" if is_new else GOLDEN / "clip"
    model = MiniMindVLM(config, vision_model_path=encoder).eval()
    load_weights(model, torch.load(GOLDEN / f"{name}.pth", weights_only=True))
    expected["pixel_values"] = expected["pixel_values"].float()
    return model, expected


@pytest.fixture(scope="session")
def device() -> torch.device:
    """For tests marked `gpu`."""
    name = os.environ.get("GPU_TESTS_ON", "cuda" if torch.cuda.is_available() else "")
    if not name:
        pytest.skip("there is no GPU; GPU_TESTS_ON=cpu runs it on the CPU")
    return torch.device(name, 0 if name == "cuda" else None)


@pytest.fixture
def exact(monkeypatch) -> None:
    """float32 is float32: convolutions would use TF32, with 10 bits of mantissa."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


class Syncs(TorchDispatchMode):
    """Notes the operations for which the CPU would have to wait for a GPU, but for those that are called
    within one of the functions `known`."""

    WAITS = "_local_scalar_dense nonzero equal masked_select bincount _unique2 repeat_interleave".split()

    def __init__(self, known: Iterable[str] = ()):
        super().__init__()
        self.known, self.found = set(known), []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.name().removeprefix("aten::").split(".")[0]
        masks = arguments[1] if name in ("index", "index_put_", "_index_put_impl_") else ()
        if name in self.WAITS or any(mask is not None and mask.dtype == torch.bool for mask in masks):
            callers = [frame.name for frame in traceback.extract_stack()]
            if not self.known & set(callers):
                self.found.append((name, callers[-6:-1]))
        return function(*arguments, **(options or {}))


TINY_VIT = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=70,
    patch_size=14,
)


def save_dinov2(folder: Path, registers: int = 0) -> Path:
    """A random DINOv2 for 70 pixels by its config, 56 by its preprocessing, as the published ones for 518 and
    224: 16 patches, a class token and `registers`."""
    torch.manual_seed(0)
    if registers:
        config = Dinov2WithRegistersConfig(**TINY_VIT, num_register_tokens=registers)
        Dinov2WithRegistersModel(config).save_pretrained(folder)
    else:
        Dinov2Model(Dinov2Config(**TINY_VIT)).save_pretrained(folder)
    sizes = {"size": {"shortest_edge": 64}, "crop_size": {"height": 56, "width": 56}}
    BitImageProcessorPil(**sizes).save_pretrained(folder)
    return folder


def row(kind: str, turns: list[tuple[str, str]], image: str = "") -> dict:
    roles = ("user", "assistant")
    conversations = [
        {"role": role, "content": text} for turn in turns for role, text in zip(roles, turn, strict=True)
    ]
    return {"image": image, "kind": kind, "conversations": conversations}


def start(
    command: list, own_session: bool = False, folder: Path = ROOT, **env: str
) -> EntryPoint | subprocess.Popen:
    """Starts an entry point as users do, from the repository's root: start(["eval_vlm.py", "--score"]).

    With `-m MODULE`, or with environment variables, it gets an interpreter of its own.
    """
    command = list(map(str, command))
    if not env and command[0] != "-m":
        start_server()
        return EntryPoint(command, own_session, folder)
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


@pytest.fixture
def convert_and_print(monkeypatch, capsys) -> Callable[..., tuple[int, str]]:
    """Runs convert_to_hf.py in this process: (exit code, stderr)."""
    import convert_to_hf  # needs more packages than the tests for a GPU have

    def run(*arguments) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["convert_to_hf.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            run_main(convert_to_hf.main)
        return end.value.code or 0, capsys.readouterr().err

    return run


@pytest.fixture
def convert(convert_and_print) -> Callable[..., tuple[int, str]]:
    """The same, with the last line of stderr alone."""

    def run(*arguments) -> tuple[int, str]:
        code, printed = convert_and_print(*arguments)
        return code, (printed.strip().splitlines() or [""])[-1]

    return run


TINY = ["--hidden_size", 64, "--num_hidden_layers", 2, "--num_attention_heads", 4, "--num_key_value_heads", 2]
TINY += ["--vision_model_path", TINY_ENCODER, "--num_workers", 0, "--device", "cpu", "--log_interval", 1]
