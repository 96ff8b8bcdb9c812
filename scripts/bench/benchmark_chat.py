"""How long somebody waits who asks about one picture: until the first token, and from token to token.

    python scripts/bench/benchmark_chat.py
Random weights, one stream, greedy; in fp32 on a CPU unless flags say otherwise. What is timed is all that a
chat does: the picture is prepared and encoded, the prompt is read, tokens are generated.
"""

import json
import statistics
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers.generation.streamers import BaseStreamer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmark import random_vlm, synchronize

from common.cli import DTYPES, run_main
from common.distributed import autocast, runtime
from inference.answers import prepare
from inference.chat import encode_picture
from model.model_vlm import MiniMindVLM
from model.processing_vlm import MiniMindVLMProcessor

QUESTION = [{"role": "user", "content": "What is in the picture, and where?"}]


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="measurements; medians are shown")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of the answer")
    parser.add_argument("--hidden_size", type=int, default=512, help="width of the language model")
    parser.add_argument("--num_hidden_layers", type=int, default=8, help="its layers")
    parser.add_argument("--vision_layers", type=int, default=12, help="layers of the encoder, else ViT-B/16")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="auto: what is fast here")
    parser.add_argument("--device", default="cpu", help="cuda or cpu")
    parser.add_argument("--json", type=Path, help="file for every figure")
    options = parser.parse_args()
    if options.repeats < 1 or options.tokens < 2:
        parser.error("--repeats must be at least 1, --tokens at least 2")
    with runtime(options.device, 1337) as run, autocast(options.dtype, run.device):
        model, processor = random_vlm(options)
        model.eval().to(run.device)
        measure(model, processor, options.tokens)  # warms up
        found = [measure(model, processor, options.tokens) for _ in range(options.repeats)]
    figures = {name: [one[name] for one in found] for name in found[0]}
    for name, values in figures.items():
        print(f"{name:<24}{statistics.median(values):9.3f}  ({min(values):.3f} to {max(values):.3f})")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


def measure(model: MiniMindVLM, processor: MiniMindVLMProcessor, tokens: int) -> dict[str, float]:
    """Seconds until the first token, the encoder's share of them, and tokens per second after it."""
    coarse = np.random.default_rng(1337).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize((640, 480))
    clock = Clock()
    start = time.perf_counter()
    features = {"picture": encode_picture(model, processor, picture)}
    synchronize(model.device)
    encoded = time.perf_counter() - start
    prompt = processor.encode_prompt(QUESTION, 1)
    inputs = prepare(processor, [prompt], [list(features)], features).to(model.device)
    model.generate(**inputs, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens, streamer=clock)
    first, last = clock.times[1], clock.times[-1]  # the prompt itself is the first that a streamer gets
    return {
        "first_token_seconds": first - start,
        "encoder_share": encoded / (first - start),
        "tokens_per_second": (tokens - 1) / (last - first),
    }


class Clock(BaseStreamer):
    """Notes when each token comes."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


if __name__ == "__main__":
    run_main(main)
