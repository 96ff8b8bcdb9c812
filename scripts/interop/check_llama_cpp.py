"""Asks llama.cpp and our own code about the same square pictures, for language models of both releases.

Run in an environment of its own, with xllamacpp, a build of llama.cpp (scripts/test_interop.sh). Models are
small and know a text about each picture by heart, so that no answer hangs by a rounding error. With `--demo`
the demo's language model gets a SigLIP encoder as well, and is asked about the demo's pictures.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers import SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from common.setup import build_vlm
from common.tokenizer import load_tokenizer
from common.weights import half_state, translated
from convert import gguf
from convert.export import Source
from inference import llama_cpp
from inference.trained import load_pth
from model.model_vlm import load_weights

TIED = 0.05  # logits: where the source's two best tokens are this near, rounding to fp16 may choose the other
SIZES = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
KINDS = {
    "release 2, dense": SIZES,
    "release 2, mixture": SIZES | {"use_moe": True},
    "release 3, dense": translated(SIZES),
    "release 3, mixture": translated(SIZES | {"use_moe": True}),
}
WORDS = "red blue green yellow black white cat dog boat tree cup bird clock house star fish".split()
QUESTION, PICTURES, STEPS = "What is this?", 12, 400
Questions = list[tuple[Image.Image, str]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--demo", type=Path, help="folder of the trained demo, such as out/demo")
    demo = parser.parse_args().demo
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        encoder = make_encoder(folder / "siglip")
        checks = [(kind, *memorizing(config, encoder)) for kind, config in KINDS.items()]
        if demo:
            checks.append(("demo with SigLIP", *demo_with(encoder, demo, folder)))
        print(f"{'model':20} {'format':6} {'equal':>9} {'largest lead':>13} {'largest gap':>12}")
        unequal = [
            f"{kind} in {quantization}"
            for kind, source, questions in checks
            for quantization in llama_cpp.NEAR
            if compared(kind, source, questions, quantization, folder) > TIED and quantization == "f16"
        ]
    sys.exit(f"llama.cpp answers otherwise: {', '.join(unequal)}" if unequal else 0)


def compared(kind: str, source: Source, questions: Questions, quantization: str, folder: Path) -> float:
    """Prints a row. The largest lead of the source's best token over what llama.cpp chose."""
    out = folder / f"{kind} {quantization}"
    out.mkdir()
    gguf.write(out, source, quantization)
    answers = llama_cpp.ask(out, source.model, source.processor, questions)
    equal = sum(answer.lead == 0 for answer in answers)
    lead, gap = max(answer.lead for answer in answers), max(answer.gap or 0 for answer in answers)
    print(f"{kind:20} {quantization:6} {equal:>3} of {len(answers)} {lead:13.3f} {gap:12.3f}", flush=True)
    return lead


def make_encoder(folder: Path) -> Path:
    """A SigLIP with random weights, loud enough for pictures to differ."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=96, patch_size=16))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 96, "width": 96}).save_pretrained(folder)
    return folder


def memorizing(config: dict, encoder: Path) -> tuple[Source, Questions]:
    """A model that has learnt a text about each of `PICTURES` pictures by heart, and questions about them."""
    config = {name: value for name, value in config.items() if not name.startswith("image_")}
    model, processor = build_vlm(config, str(encoder), load_tokenizer(str(ROOT / "model/tokenizer")))
    generator, words = np.random.default_rng(0), random.Random(0)
    pictures, rows = [], []
    for i in range(PICTURES):
        colours = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        pictures.append(colours.resize((60 + 20 * i,) * 2, Image.Resampling.BICUBIC))
        answer = {"role": "assistant", "content": " ".join(words.choices(WORDS, k=20))}
        rows.append(processor.encode_chat([{"role": "user", "content": QUESTION}, answer], num_images=1))
    ids, labels = zip(*rows, strict=True)
    inputs = {"input_ids": padded(ids, 0), "labels": padded(labels, -100)}
    inputs["attention_mask"] = padded([[1] * len(row) for row in ids], 0)
    features = model.get_image_embeddings(processor.pixel_values(pictures), model.vision_encoder)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(STEPS):
        loss = model.train()(**inputs, image_features=features[:, None]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss < 0.05:
            break
    load_weights(model, half_state(model.state_dict()))  # rounded, as a .pth has them
    return Source(model.eval(), processor), [(picture, QUESTION) for picture in pictures]


def padded(rows: list[list[int]], value: int) -> torch.Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def demo_with(encoder: Path, demo: Path, folder: Path) -> tuple[Source, Questions]:
    """The demo's language model with `encoder`, its projection trained on the demo's captions, and questions
    about the demo's pictures. The answers mean little: the encoder has random weights."""
    flags = {"from_weight": demo / "lm_128.pth", "vision_model_path": encoder, "out_dir": folder}
    flags |= {"data_path": demo / "data/pretrain.jsonl", "images_path": demo / "data", "max_steps": STEPS}
    flags |= {"batch_size": 16, "learning_rate": 1e-3, "device": "cpu", "tracker": "none"}
    command = [sys.executable, str(ROOT / "train_pretrain_vlm.py")]
    command += [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    subprocess.run(command, cwd=ROOT, check=True)
    source = Source(*load_pth(folder / "pretrain_vlm_128.pth")[:2])
    with (demo / "data/eval_unseen.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(60), strict=False)]
    questions = [row["conversations"][0]["content"].removeprefix("<image>\n") for row in rows]
    pictures = [Image.open(demo / "data" / row["image"]).convert("RGB") for row in rows]
    return source, list(zip(pictures, questions, strict=True))


if __name__ == "__main__":
    main()
