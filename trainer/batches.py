"""What the loop reads: which rows make a step, and the loader that fetches them."""

from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader

from common.distributed import Runtime, ignore_signals, signals_held
from dataset.collate import StepDataset, StepSampler
from dataset.vlm_dataset import VLMDataset
from trainer.arguments import TrainingFlags

COMPILED_MULTIPLE = 32  # lengths are rounded up to it, so that few of them have to be compiled for


def step_sampler(
    samples: VLMDataset, flags: TrainingFlags, run: Runtime, training: bool = True
) -> StepSampler:
    """This rank's rows; for evaluation, one micro-batch at a time in the same order always."""
    split = flags.batch_size, flags.accumulation_steps if training else 1, run.rank, run.world_size
    return StepSampler(samples.lengths(), *split, flags.seed, training, flags.tokens_per_batch)


def planned_steps(sampler: StepSampler, flags: TrainingFlags) -> int:
    """Optimizer steps of the whole run: those of all epochs, or --max_steps if that is less."""
    steps = 0
    for epoch in range(flags.epochs):
        if not flags.max_steps or steps < flags.max_steps:  # counting may take long
            steps += sampler.steps_of_epoch(epoch)
    return min(steps, flags.max_steps or steps)


def step_loader(samples: VLMDataset, sampler: StepSampler, flags: TrainingFlags, run: Runtime) -> Iterator:
    """What is left of the sampler's epoch: each item is a step's micro-batches, or its DataError."""
    pad_token_id = samples.processor.tokenizer.pad_token_id
    layout = flags.max_seq_len if flags.pack else None, COMPILED_MULTIPLE if flags.compile else 1
    steps = StepDataset(samples, pad_token_id, *layout, skip_bad=flags.on_bad_sample == "skip")
    own = torch.Generator().manual_seed(flags.seed)  # so that a run's own generator is left alone
    settings = {"sampler": sampler, "generator": own, "pin_memory": run.device.type == "cuda"}
    workers = {"num_workers": flags.num_workers, "worker_init_fn": ignore_signals}
    with signals_held():
        return iter(DataLoader(steps, batch_size=None, **settings, **workers))
