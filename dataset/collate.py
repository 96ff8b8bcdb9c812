"""Samples -> the batches of one optimizer step, and the sampler that decides which rows go together.

A *step* is what one optimizer step consumes: `accumulation_steps` micro-batches on each of `world_size`
ranks. Shapes: B rows, T tokens, N most images of a row.
"""

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from dataset.errors import DataError
from dataset.vlm_dataset import Sample, VLMDataset
from model.processing_vlm import IGNORE_INDEX

MASKED_TOKENS = 3000  # a token of such a long sequence costs as much in masked attention as in all else
PACKINGS = 64  # tried at most, for one batch
SILENT = Sample(input_ids=[0, 0], labels=[IGNORE_INDEX] * 2)  # keeps ranks in step; counts for nothing
WINDOW_STEPS = 50  # rows are sorted by length within shuffled windows of this many steps


@dataclass(eq=False)
class StepSampler(Sampler):
    """Yields, for each optimizer step, this rank's row numbers: a list of micro-batches. Every row comes once
    an epoch, shuffled by (seed, epoch). Rows of a step are of similar length. The rows of a step depend on
    batch_size * accumulation_steps * world_size only, not on how they are split, and ranks get rows of nearly
    equal lengths. All ranks have the same number of micro-batches; one without a row of its own (end of the
    epoch) gets an empty list. With `tokens_per_batch`, a micro-batch has as many rows as fit instead of
    `batch_size`: longest row times rows is at most that, and the number of steps differs a little from epoch
    to epoch."""

    lengths: np.ndarray
    batch_size: int
    accumulation_steps: int = 1
    rank: int = 0
    world_size: int = 1
    seed: int = 0
    shuffle: bool = True
    tokens_per_batch: int | None = None

    def __post_init__(self):
        if self.tokens_per_batch:  # for the size of a window
            self.batch_size = max(int(self.tokens_per_batch / max(self.lengths.mean(), 1)), 1)
        self.micro_rows = self.batch_size * self.world_size
        self.step_rows = self.micro_rows * self.accumulation_steps
        self.epoch = self.first_step = 0

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Iterating yields the steps of `epoch` from `first_step` on: what is left of it after that many."""
        self.epoch, self.first_step = epoch, first_step

    def __len__(self) -> int:
        return max(self.steps_of_epoch(self.epoch) - self.first_step, 0)

    def steps_of_epoch(self, epoch: int) -> int:
        if self.tokens_per_batch:
            return len(self._steps(epoch))
        return -(-len(self.lengths) // self.step_rows)

    def __iter__(self) -> Iterator[list[list[int]]]:
        for step in self._steps(self.epoch)[self.first_step :]:
            yield [micro[self.rank :: self.world_size].tolist() for micro in step]

    def _steps(self, epoch: int) -> list[list[np.ndarray]]:
        """Row numbers of the micro-batches of each step, all ranks together."""
        generator = np.random.default_rng((self.seed, epoch))
        order = generator.permutation(len(self.lengths)) if self.shuffle else np.arange(len(self.lengths))
        window = self.step_rows * WINDOW_STEPS
        micros: list[np.ndarray] = []
        for part in np.split(order, range(window, len(order), window)):
            micros += self._micro_batches(part[np.argsort(self.lengths[part], kind="stable")])
        size = self.accumulation_steps
        steps = [micros[i : i + size] for i in range(0, len(micros), size)]
        return [steps[i] for i in generator.permutation(len(steps))] if self.shuffle else steps

    def _micro_batches(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        """Cuts a window's rows, which are sorted by length."""
        fit = self.micro_rows
        rows = rows[::-1] if self.tokens_per_batch else rows
        while len(rows):
            if self.tokens_per_batch:  # the first row of a micro-batch, its longest, says how many fit
                fit = max(self.tokens_per_batch // int(self.lengths[rows[0]]), 1) * self.world_size
            yield rows[:fit]
            rows = rows[fit:]


@dataclass(eq=False)
class StepDataset(Dataset):
    """Lets a DataLoader fetch whole steps: an index is a step's list of micro-batches. A row without a
    supervised token is left out and listed in the batch's `skipped`, and so is one that is not usable unless
    `skip_bad` is off."""

    samples: VLMDataset
    pad_token_id: int
    pack_length: int | None = None
    length_multiple: int = 1
    skip_bad: bool = False

    def __getitem__(self, step: list[list[int]]) -> list[dict] | DataError:
        """The step's micro-batches. A DataError is returned, not raised: a worker process would bury it."""
        try:
            return [self._micro_batch(rows) for rows in step]
        except DataError as error:
            return error

    def _micro_batch(self, rows: list[int]) -> dict:
        useful, skipped = [], []
        for sample in self.samples.samples_or_errors(self.samples.rows[i] for i in rows):
            if isinstance(sample, DataError):
                if not self.skip_bad:
                    raise sample
                skipped.append(str(sample))
            elif sample.supervised:
                useful.append(sample)
            else:
                skipped.append(f"{sample.where}: {self.samples.nothing_learnt}")
        layout = self.pad_token_id, self.pack_length, self.length_multiple
        batch = collate(useful or [SILENT], *layout, self.samples.processor.tokens_per_image)
        return batch | {"rows": len(useful), "skipped": skipped, "where": [sample.where for sample in useful]}


def collate(
    samples: list[Sample], pad_token_id: int, pack_length=None, length_multiple=1, tokens_per_image=0
) -> dict:
    """Right-padded int64 tensors, T a multiple of `length_multiple`, and what to look for would stop a GPU.
    input_ids, labels, sequence_ids (B, T), the last one the number of a token's sequence in its row, -1 for
    padding; `sequences`, their most; label_positions, flat in B * T, whose next label counts, and these,
    label_ids (N,). Where a row has images, image_positions (images * P,), flat, of their placeholders, with
    either image_features (images, P, W) or pixel_values (pictures, ...), each picture once, and
    picture_numbers (images,), which of them an image is. The counts `supervised_tokens` and `tokens`. With
    `pack_length`, several samples may share a row of at most that many tokens. Where they do, there are
    position_ids (B, T) as well, which begin at 0 in each sequence."""
    lengths = [len(sample.input_ids) for sample in samples]
    rows = pack(lengths, pack_length) if pack_length else [[i] for i in range(len(samples))]
    longest = max(sum(lengths[i] for i in row) for row in rows)
    longest = -(-longest // length_multiple) * length_multiple

    def padded(values: list[Sequence[int]], fill: int) -> torch.Tensor:  # (B, T)
        joined = [[value for i in row for value in values[i]] for row in rows]
        return torch.tensor([row + [fill] * (longest - len(row)) for row in joined])

    numbers = {i: number for row in rows for number, i in enumerate(row)}
    # Nothing predicts a sequence's first token.
    labels = padded([[IGNORE_INDEX, *sample.labels[1:]] for sample in samples], IGNORE_INDEX)
    following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()  # (B * T,)
    positions = (following != IGNORE_INDEX).nonzero().squeeze(1)  # (N,)
    batch = {
        "input_ids": padded([sample.input_ids for sample in samples], pad_token_id),
        "labels": labels,
        "label_positions": positions,
        "label_ids": following[positions],
        "sequence_ids": padded([[numbers[i]] * length for i, length in enumerate(lengths)], -1),
        "sequences": max(map(len, rows)),
        "supervised_tokens": len(positions),
        "tokens": sum(lengths),
    }
    if len(rows) < len(samples):
        batch["position_ids"] = padded([range(length) for length in lengths], 0)
    ordered, starts = [], []
    for number, row in enumerate(rows):
        begin = number * longest
        for i in row:
            starts += [begin + start for start in samples[i].image_starts]
            ordered += [samples[i]] if samples[i].images else []
            begin += lengths[i]
    if not ordered:
        return batch
    batch["image_positions"] = (torch.tensor(starts)[:, None] + torch.arange(tokens_per_image)).flatten()
    if ordered[0].image_features is not None:
        return batch | {"image_features": torch.cat([sample.image_features for sample in ordered])}
    shown = [pair for each in ordered for pair in zip(each.images, each.pixel_values, strict=True)]
    pictures = dict(shown)  # in the order in which they come first
    batch["picture_numbers"] = torch.tensor([[*pictures].index(path) for path, _ in shown])
    return batch | {"pixel_values": torch.stack([*pictures.values()])}


def pack(lengths: list[int], pack_length: int) -> list[list[int]]:
    """Groups the numbers of `lengths` into sequences of at most `pack_length` tokens, or of one sample.
    Longest first, each into the sequence that is emptiest so far, for the possible numbers of sequences (of
    many, at most PACKINGS that lie evenly); the cheapest wins. That is one sample to a sequence, under a
    causal mask that costs half, where little padding would be saved."""
    limit = max(pack_length, *lengths)
    best: list[list[int]] = []
    lowest = math.inf
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    fewest = -(-sum(lengths) // limit)
    step = -(-(len(lengths) + 1 - fewest) // PACKINGS)
    for count in range(len(lengths), fewest - 1, -step):
        rows: list[list[int]] = [[] for _ in range(count)]
        filled = [(0, number) for number in range(count)]  # a heap
        for i in longest_first:
            length, emptiest = filled[0]
            rows[emptiest].append(i)
            heapq.heapreplace(filled, (length + lengths[i], emptiest))
        length = max(filled)[0]
        cost = count * length * (1 + length / MASKED_TOKENS / (1 if count < len(lengths) else 2))
        if length <= limit and cost <= lowest:
            best, lowest = rows, cost
    return best
