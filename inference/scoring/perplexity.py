"""How well a model expects a data file: its loss over the supervised tokens, as training measures it."""

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from common.distributed import Runtime
from dataset.errors import DataError
from dataset.vlm_dataset import VLMDataset
from inference.answers import MID_GREY
from inference.ask import Speaker
from inference.chat import encode_picture
from inference.scoring.tables import aligned
from trainer.arguments import VLMTrainingFlags
from trainer.loop import evaluate


def perplexity(
    speaker: Speaker, path: str, images_path: str, batch_size: int, dtype: str, run: Runtime, baseline: bool
) -> dict[str, Any]:
    """`perplexity` is exp(`loss`), `loss` the mean over `tokens` supervised tokens; with `baseline`, `blank`
    has the same for mid-grey pictures, None where the file has none.

    DataError for a row that is not usable, or where no token is supervised.
    """
    model, processor = speaker.model, speaker.processor
    longest = model.config.max_position_embeddings
    samples = VLMDataset([Path(path)], processor, longest, Path(images_path) if images_path else None)
    how = {"batch_size": batch_size, "dtype": dtype, "max_seq_len": longest, "num_workers": 0}
    flags = VLMTrainingFlags(data_path=[path], on_bad_sample="error", **how)
    found = measured(model, samples, flags, run) | {"blank": None}
    if baseline and next(samples.image_paths(), None):
        grey = encode_picture(model, processor, Image.new("RGB", (224, 224), MID_GREY)).cpu()  # (P, W)
        samples.features = defaultdict(lambda: grey)  # stands where a cache of features does
        found["blank"] = measured(model, samples, flags, run)
    return found


def perplexity_table(found: dict[str, dict[str, Any]]) -> str:
    """A line for each weight."""
    lines = [["", "tokens", "loss", "perplexity", "blank"]]
    for name, figures in found.items():
        blank = f"{figures['blank']['perplexity']:.3f}" if figures.get("blank") else "-"
        shown = f"{figures['loss']:.4f}", f"{figures['perplexity']:.3f}", blank
        lines.append([name, str(figures["tokens"]), *shown])
    return aligned(lines)


def measured(
    model: torch.nn.Module, samples: VLMDataset, flags: VLMTrainingFlags, run: Runtime
) -> dict[str, Any]:
    figures, _ = evaluate(model, samples, flags, run)
    model.eval()
    if not figures["eval_tokens"]:
        raise DataError(f"{flags.data_path[0]}: no row has a supervised token")
    loss = figures["eval_loss"]
    return {"perplexity": math.exp(loss), "loss": loss, "tokens": figures["eval_tokens"]}
