"""How time and memory grow with sequence length, batch, rows, ranks and loader processes: the scaling part of
benchmark.py, which calls `scale`. Every point that reports memory runs in a process of its own.
"""

import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from common.distributed import Runtime, peak_memory_bytes
from common.setup import TOKENIZERS
from common.tokenizer import load_tokenizer
from common.weights import half_state, save_weights
from dataset.collate import StepDataset, StepSampler, collate
from dataset.vlm_dataset import Sample, VLMDataset
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.processing_vlm import MiniMindVLMProcessor
from trainer.arguments import TrainingFlags
from trainer.learner import Learner
from trainer.loop import count
from trainer.state import Checkpoints, Progress

ROOT = Path(__file__).resolve().parents[2]
LENGTHS = (128, 256, 512, 1024, 2048)  # tokens, in one row
BATCHES = (1, 2, 4, 8, 16)  # rows of 256 tokens
PICTURES = 256  # JPEG files of 640 x 480 pixels
TEXT = "a cat at the top left, a red apple in the center and a bicycle on the right. What is on the right? "


def scale(folder: Path, hidden_size: int, layers: int, rows: list[int], steps: int) -> dict[str, list[dict]]:
    """Figures by section; `folder` takes what has to be written."""
    # Its own, so that the first start is the first; spawned processes and torchrun inherit it.
    os.environ["HF_DATASETS_CACHE"] = str(folder / "datasets")
    model = hidden_size, layers
    return {
        "length": [{"tokens": n, **apart(step_cost, *model, 1, n)} for n in LENGTHS],
        "batch": [{"rows": n, **apart(step_cost, *model, n, 256)} for n in BATCHES],
        "saving": [apart(saving_cost, str(folder / "saving"), *model)],
        "rows": [point for n in rows for point in row_points(folder, n)],
        "ranks": [rank_point(folder, *model, ranks, steps) for ranks in (1, 2)],
        "loader": [loader_point(folder, workers) for workers in (0, 1, 2)],
    }


def apart(measure: Callable[..., dict], *arguments: Any) -> dict:
    """`measure(*arguments)` in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(measure, arguments)


def step_cost(hidden_size: int, layers: int, batch: int, length: int) -> dict:
    """Forward and backward of a language model, every second token supervised."""
    torch.manual_seed(0)
    model = MiniMindForCausalLM(MiniMindConfig(hidden_size=hidden_size, num_hidden_layers=layers))
    base = peak_memory_bytes(torch.device("cpu"))
    input_ids = torch.randint(300, 6000, (batch, length))  # (B, T)
    labels = torch.where(torch.arange(length) % 2 == 0, -100, input_ids)
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        model(input_ids, labels=labels, skip_logits=True).loss.backward()
        model.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - start)
    more = peak_memory_bytes(torch.device("cpu")) - base
    return {"seconds": statistics.median(seconds[1:]), "memory_bytes": more}


def saving_cost(folder: str, hidden_size: int, layers: int) -> dict:
    """What a save takes from steps of fine-tuning (4 rows of 512 tokens): `stall_seconds` in the loop itself,
    `extra_seconds` with what the thread takes from the steps beside it, `share` at one save in 1000 steps."""
    torch.manual_seed(0)
    model = MiniMindForCausalLM(MiniMindConfig(hidden_size=hidden_size, num_hidden_layers=layers)).train()
    run = Runtime(torch.device("cpu"))
    flags = TrainingFlags(data_path=["-"], dtype="float32")
    learner, progress = Learner(model, flags, run, None), Progress()
    path = Path(folder) / "model.pth"
    about = {"settings": {}, "run_id": ""}
    checkpoints = Checkpoints(
        Path(folder), 1, True, about, lambda state, _: save_weights(path, half_state(state), {})
    )
    input_ids = torch.randint(300, 6000, (4, 512))  # (B, T)
    rows = [Sample(ids, ids, where="random") for ids in input_ids.tolist()]
    batch = collate(rows, 0) | {"rows": 4, "skipped": [], "where": []}
    totals = count([batch], run)

    def step() -> float:
        start = time.perf_counter()
        learner.step([batch], totals, 1e-5, progress)
        list(learner.settle(progress))
        return time.perf_counter() - start

    plain = statistics.median([step() for _ in range(6)][1:])
    stalls, extras = [], []
    for _ in range(3):
        start = time.perf_counter()
        checkpoints.save(learner.state(progress), False)
        stalls.append(time.perf_counter() - start)
        steps = [step()]
        while not checkpoints.saves[-1].done():
            steps.append(step())
        extras.append(stalls[-1] + sum(steps) - len(steps) * plain)
    checkpoints.close()
    size = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
    extra = statistics.median(extras)
    return {
        "disk_bytes": size,
        "step_seconds": plain,
        "stall_seconds": statistics.median(stalls),
        "extra_seconds": extra,
        "share": extra / (1000 * plain),
    }


def row_points(folder: Path, rows: int) -> list[dict]:
    """The first start with a file of that many rows, which converts it, and a later one."""
    path = folder / f"rows_{rows}.jsonl"
    with path.open("w") as file:
        for number in range(rows):
            file.write(json_line(TEXT + str(number), "a bicycle"))
    points = [{"rows": rows, "start": start, **apart(first_step, str(path))} for start in ("first", "later")]
    path.unlink()
    return points


def first_step(path: str) -> dict:
    """From a file to the first batch of 16."""
    tokenizer = load_tokenizer(str(ROOT / TOKENIZERS[2]))
    base = peak_memory_bytes(torch.device("cpu"))
    start = time.perf_counter()
    samples = VLMDataset([Path(path)], MiniMindVLMProcessor(None, tokenizer), 640)
    sampler = StepSampler(samples.lengths(), 16)
    StepDataset(samples, tokenizer.pad_token_id)[next(iter(sampler))]
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "memory_bytes": peak_memory_bytes(torch.device("cpu")) - base}


def rank_point(folder: Path, hidden_size: int, layers: int, ranks: int, steps: int) -> dict:
    """The language model's stage under torchrun, the machine's cores shared among the ranks."""
    path = folder / "ranks.jsonl"
    path.write_text("".join(json.dumps({"text": TEXT * (1 + n % 8)}) + "\n" for n in range(2048)))
    command = f"""{sys.executable} -m torch.distributed.run --standalone --nproc_per_node {ranks}
        scripts/train_lm.py --data_path {path} --out_dir {folder}/ranks --hidden_size {hidden_size}
        --num_hidden_layers {layers} --batch_size {16 // ranks} --max_steps {2 * steps} --log_interval {steps}
        --num_workers 0 --resume never --dtype float32""".split()
    threads = max(1, (os.cpu_count() or 1) // ranks)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    subprocess.run(command, check=True, cwd=ROOT, env=environment, capture_output=True)
    (metrics,) = (folder / "ranks" / "runs").glob("*/metrics.jsonl")
    last = json.loads(metrics.read_text().splitlines()[-1])
    return {"ranks": ranks} | {
        name: last[name] for name in ("samples_per_second", "tokens_per_second", "peak_memory_bytes")
    }


def loader_point(folder: Path, workers: int) -> dict:
    """Pictures that the loader alone decodes and prepares for the encoder in a second."""
    images, path = folder / "jpeg", folder / "jpeg.jsonl"
    images.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    lines = []
    for number in range(PICTURES):
        file = images / f"{number}.jpg"
        if not file.exists():
            coarse = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((640, 480)).save(file, quality=90)
        lines.append(json_line("What is here?", "a cat", file))
    path.write_text("".join(lines))
    tokenizer = load_tokenizer(str(ROOT / TOKENIZERS[2]))
    samples = VLMDataset([path], MiniMindVLMProcessor(CLIPImageProcessorPil(), tokenizer), 640)
    loader = DataLoader(
        StepDataset(samples, tokenizer.pad_token_id),
        batch_size=None,
        sampler=StepSampler(samples.lengths(), 16),
        num_workers=workers,
    )
    start = time.perf_counter()
    count = sum(len(batch["input_ids"]) for step in loader for batch in step)
    return {"workers": workers, "images_per_second": count / (time.perf_counter() - start)}


def json_line(question: str, answer: str, image: Path | str = "") -> str:
    """A row of the training files with one question, about a picture if one is given."""
    marker = "<image>\n" if image else ""
    turns = [{"role": "user", "content": marker + question}, {"role": "assistant", "content": answer}]
    return json.dumps({"image": str(image), "conversations": turns}) + "\n"


def scaling_table(sections: dict[str, list[dict]]) -> str:
    lines = []
    for name, points in sections.items():
        lines += ["", name, "".join(f"{column:>20}" for column in points[0])]
        lines += ["".join(f"{_cell(value):>20}" for value in point.values()) for point in points]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value / 1e6:,.0f} MB" if isinstance(value, int) and value > 2e6 else str(value)
