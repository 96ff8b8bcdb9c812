"""Run by torchrun: saves the gradient of one step of 8 rows, as this number of
ranks computes it.

Arguments: data folder, rows of a micro-batch, "dense" or "moe", file to write.
"""

import sys
from pathlib import Path

import torch

from common.distributed import runtime
from common.setup import build_vlm
from common.tokenizer import load_tokenizer
from dataset.collate import StepDataset, StepSampler
from dataset.vlm_dataset import VLMDataset
from trainer.arguments import TrainingFlags
from trainer.learner import Learner, backward
from trainer.loop import count
from trainer.stage import set_trainable

ENCODER = "tests/golden/clip"


def main(data: str, batch_size: int, kind: str, target: str) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    flags = TrainingFlags(data_path=[f"{data}/dialogues.jsonl"], dtype="float32")
    with runtime("cpu", 0) as run:
        model, processor = build_vlm(
            sizes | {"use_moe": kind == "moe"}, ENCODER, load_tokenizer("model/tokenizer")
        )
        set_trainable(model, "proj_llm")
        with run.main_first():
            samples = VLMDataset([Path(flags.data_path[0])], processor, 1024, Path(data) / "images")
        sampler = StepSampler(samples.lengths(), batch_size, 1, run.rank, run.world_size)
        (step,) = list(sampler)
        micro_batches = StepDataset(samples, 0)[step]
        backward(Learner(model.train(), flags, run, samples.pixels), micro_batches, count(micro_batches, run))
        if run.is_main:
            grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            with Path(target).open("wb") as file:
                torch.save(grads, file)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4])
