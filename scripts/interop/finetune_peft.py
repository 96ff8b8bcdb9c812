"""A few steps of LoRA with PEFT on an exported llava folder, as others would do it: nothing of ours runs.

The encoder stays as it is. The adapters are merged and `save_pretrained` writes the folder --out.
"""

import argparse
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor, BatchFeature

# The language model's layers and the projection; the encoder's have the same names.
ADAPTED = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj|.*multi_modal_projector\.linear_1"
IGNORED = -100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("folder", "data_path", "images_path", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3)
    flags = parser.parse_args()
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_pretrained(flags.folder, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(flags.folder)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=ADAPTED))
    losses = list(train(adapted, batches(processor, flags.data_path, flags.images_path), flags.steps))
    merged = adapted.merge_and_unload()
    merged.save_pretrained(flags.out)
    processor.save_pretrained(flags.out)
    changed = {key for key, value in merged.state_dict().items() if not torch.equal(value, before[key])}
    print(
        f"losses: {', '.join(f'{loss:.3f}' for loss in losses)}; "
        f"{len(changed)} of {len(before)} tensors have changed"
    )
    if not changed or any("vision_tower" in key for key in changed):
        raise SystemExit(f"expected changes, and none in the encoder: {sorted(changed)}")


def train(model: torch.nn.Module, batches: Iterator[BatchFeature], steps: int) -> Iterator[float]:
    """Each step's loss."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for inputs in itertools.islice(batches, steps):
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def batches(
    processor: AutoProcessor, data_path: Path, images_path: Path, size: int = 8
) -> Iterator[BatchFeature]:
    """First turns of the file's rows, padded, with labels for the answers."""
    with data_path.open(encoding="utf-8") as lines:
        rows = map(json.loads, lines)
        while batch := list(itertools.islice(rows, size)):
            yield encode(processor, batch, images_path)


def encode(processor: AutoProcessor, rows: list[dict], images_path: Path) -> BatchFeature:
    chats, answers = [], []
    for row in rows:
        question, answer = (turn["content"] for turn in row["conversations"][:2])
        picture = {"type": "image", "path": str(images_path / row["image"])}
        text = {"type": "text", "text": question.removeprefix("<image>\n")}
        answers.append(answer)
        chats.append(
            [
                {"role": "user", "content": [picture, text]},
                {"role": "assistant", "content": [{"type": "text", "text": answer}]},
            ]
        )
    options = {"padding": True, "padding_side": "left"}
    inputs = processor.apply_chat_template(
        chats, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs=options
    )
    labels = torch.full_like(inputs["input_ids"], IGNORED)  # (B, T)
    end = len(processor.tokenizer.encode("<|im_end|>\n", add_special_tokens=False))
    for i, answer in enumerate(answers):
        tokens = len(processor.tokenizer.encode(answer, add_special_tokens=False)) + end
        labels[i, -tokens:] = inputs["input_ids"][i, -tokens:]
    inputs["labels"] = labels
    return inputs


if __name__ == "__main__":
    main()
