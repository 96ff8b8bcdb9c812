"""Which rows go together, and what a batch holds."""

import itertools
import time

import numpy as np
import pytest
import torch
from conftest import write_rows

from dataset.collate import StepDataset, StepSampler, pack
from dataset.errors import DataError
from dataset.vlm_dataset import VLMDataset
from model.processing_vlm import IGNORE_INDEX

LENGTHS = np.random.default_rng(0).integers(10, 500, 1003)


def rows_of_steps(
    batch_size: int, accumulation_steps: int, world_size: int, epoch: int = 0
) -> list[set[int]]:
    """The rows of each step, of all ranks together."""
    ranks = []
    for rank in range(world_size):
        sampler = StepSampler(LENGTHS, batch_size, accumulation_steps, rank, world_size, seed=3)
        sampler.set_epoch(epoch)
        ranks.append(list(sampler))
        assert len(ranks[-1]) == len(sampler)
    assert all(len(set(map(len, step))) == 1 for step in zip(*ranks, strict=True)), "ranks out of step"
    return [{row for rank in step for micro in rank for row in micro} for step in zip(*ranks, strict=True)]


@pytest.mark.parametrize(
    ("batch", "accumulation", "world"), [(8, 1, 1), (4, 2, 1), (4, 1, 2), (2, 2, 2), (3, 1, 1)]
)
def test_every_row_comes_once_an_epoch(batch, accumulation, world):
    steps = rows_of_steps(batch, accumulation, world)
    assert sum(map(len, steps)) == len(LENGTHS)
    assert set().union(*steps) == set(range(len(LENGTHS)))


@pytest.mark.parametrize(("batch", "accumulation", "world"), [(4, 2, 1), (4, 1, 2), (2, 2, 2), (1, 8, 1)])
def test_steps_do_not_depend_on_how_they_are_split(batch, accumulation, world):
    assert rows_of_steps(batch, accumulation, world) == rows_of_steps(8, 1, 1)


def test_epochs_differ_and_repeat():
    assert rows_of_steps(8, 1, 1, epoch=0) != rows_of_steps(8, 1, 1, epoch=1)
    assert rows_of_steps(8, 1, 1, epoch=1) == rows_of_steps(8, 1, 1, epoch=1)


@pytest.mark.parametrize("budget", [None, 3000])
@pytest.mark.parametrize("epoch", [0, 3])
@pytest.mark.parametrize("first", [0, 1, 17, 10_000])
def test_an_epoch_goes_on_at_any_step(budget, epoch, first):
    sampler = StepSampler(LENGTHS, 4, 2, seed=3, tokens_per_batch=budget)
    sampler.set_epoch(epoch)
    whole = list(sampler)
    assert len(sampler) == len(whole) == sampler.steps_of_epoch(epoch)
    sampler.set_epoch(epoch, first)
    assert list(sampler) == whole[first:]
    assert len(sampler) == len(whole[first:])


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("budget", [500, 1999, 4000])
def test_a_token_budget_fills_micro_batches(budget, world):
    samplers = [
        StepSampler(LENGTHS, 4, 2, rank, world, seed=3, tokens_per_batch=budget) for rank in range(world)
    ]
    ranks = [list(sampler) for sampler in samplers]
    assert len(set(map(len, ranks))) == 1
    assert all(len(set(map(len, step))) == 1 for step in zip(*ranks, strict=True))
    rows = [row for rank in ranks for step in rank for micro in step for row in micro]
    assert sorted(rows) == list(range(len(LENGTHS)))
    padded = [
        [LENGTHS[micro].max() * len(micro) for step in rank for micro in step if micro] for rank in ranks
    ]
    assert max(map(max, padded)) <= budget
    assert np.mean(np.concatenate(padded)) > (0.65 if budget == 500 else 0.85) * budget
    tokens = [sum(rank) for rank in padded]
    assert max(tokens) - min(tokens) < 0.03 * max(tokens)


GENERATOR = np.random.default_rng(0)
DISTRIBUTIONS = {
    "dialogues": (np.clip(GENERATOR.lognormal(np.log(380), 0.35, 1000), 210, 700).astype(int), 4),
    "captions": (GENERATOR.integers(205, 261, 1000), 16),
    "any": (LENGTHS, 8),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("budget", [None, 4096])
@pytest.mark.parametrize("world", [1, 2])
def test_padding_is_below_five_percent(name, budget, world):
    lengths, batch_size = DISTRIBUTIONS[name]
    padded = 0
    for rank in range(world):
        for step in StepSampler(lengths, batch_size, 1, rank, world, tokens_per_batch=budget):
            padded += sum(lengths[micro].max() * len(micro) for micro in step if micro)
    assert 0 <= 1 - lengths.sum() / padded < 0.05


def test_a_rank_without_a_row_gets_an_empty_micro_batch():
    samplers = [StepSampler(np.ones(5), 2, 1, rank, 2, shuffle=False) for rank in range(2)]
    assert [list(sampler)[-1] for sampler in samplers] == [[[4]], [[]]]


def test_batches_are_padded_to_their_longest_row(data, processor):
    steps = StepDataset(VLMDataset([data / "dialogues.jsonl"], processor, 512, data / "images"), 0)
    (batch,) = steps[[[0, 1, 2]]]
    real = batch["sequence_ids"] == 0
    lengths = real.sum(1)
    assert batch["input_ids"].shape == (3, int(lengths.max()))
    assert batch["tokens"] == int(lengths.sum()) and batch["rows"] == 3
    assert batch["supervised_tokens"] == int((batch["labels"] != IGNORE_INDEX).sum())
    assert batch["pixel_values"].shape == (3, 3, 224, 224) and batch["picture_numbers"].tolist() == [0, 1, 2]
    assert torch.equal(batch["image_positions"], (batch["input_ids"].flatten() == 34).nonzero().flatten())
    assert (batch["labels"][~real] == IGNORE_INDEX).all() and batch["sequences"] == 1
    following = batch["labels"].flatten()[batch["label_positions"] + 1]
    assert torch.equal(batch["label_ids"], following) and len(following) == batch["supervised_tokens"]


def test_rows_with_nothing_to_learn_are_left_out_and_counted(data, processor):
    long = {"role": "user", "content": "word " * 60}
    write_rows(
        data / "mixed.jsonl",
        [{"conversations": [long, {"role": "assistant", "content": "x"}]}, {"text": "short"}],
    )
    steps = StepDataset(VLMDataset([data / "mixed.jsonl"], processor, 40), 0)
    (batch,) = steps[[[0, 1]]]
    assert (batch["rows"], len(batch["input_ids"]), batch["where"]) == (1, 1, ["mixed.jsonl:2"])
    assert batch["skipped"] == ["mixed.jsonl:1: no supervised token within 40 tokens"]
    for rows, skipped in (([0], 1), ([], 0)):
        (silent,) = steps[[rows]]
        assert (silent["rows"], len(silent["skipped"]), silent["supervised_tokens"]) == (0, skipped, 0)


def test_a_bad_row_is_returned_not_raised(data, processor):
    steps = StepDataset(VLMDataset([data / "captions.jsonl"], processor, 512, data / "images"), 0)
    (data / "images/0.png").unlink()
    assert isinstance(steps[[[0]]], DataError)


@pytest.mark.parametrize(
    ("lengths", "limit", "sequences", "tokens"),
    [
        ([40, 40, 40, 40], 120, 4, 40),  # no padding to save
        ([90, 10, 50, 40, 10], 100, 2, 100),
        ([90, 10, 50, 40, 10], 80, 3, 90),
        ([300, 20, 20], 100, 2, 300),
        ([7], 100, 1, 7),
    ],
)
def test_packing_saves_padding(lengths, limit, sequences, tokens):
    rows = pack(lengths, limit)
    filled = [sum(lengths[i] for i in row) for row in rows]
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert max(filled) <= max(limit, *lengths)
    assert (len(rows), max(filled)) == (sequences, tokens)


def test_packing_a_thousand_rows_takes_less_than_a_second():
    lengths = np.random.default_rng(0).integers(10, 40, 1000).tolist()
    start = time.perf_counter()
    rows = pack(lengths, 640)
    assert time.perf_counter() - start < 1
    assert sorted(i for row in rows for i in row) == list(range(1000))
    assert max(sum(lengths[i] for i in row) for row in rows) <= 640


def test_packed_rows_keep_their_own_positions_and_pictures(data, processor):
    samples = VLMDataset([data / "dialogues.jsonl"], processor, 512, data / "images")
    (plain,) = StepDataset(samples, 0)[[list(range(8))]]
    (packed,) = StepDataset(samples, 0, 150)[[list(range(8))]]
    assert packed["input_ids"].shape[1] <= 150
    assert (packed["sequence_ids"] >= 0).sum() == packed["tokens"]
    assert packed["sequences"] == packed["sequence_ids"].max() + 1 > 1
    assert len(packed["input_ids"]) < 8
    for name in ("supervised_tokens", "tokens", "rows"):
        assert packed[name] == plain[name]
    found = []
    for ids, positions in zip(packed["input_ids"], packed["position_ids"], strict=True):
        starts = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
        found += [ids[a:b].tolist() for a, b in itertools.pairwise(starts) if b - a > 1]
    assert sorted(found) == sorted(samples[i].input_ids for i in range(8))
    assert len(packed["picture_numbers"]) == len(plain["picture_numbers"])
    placeholders = (packed["input_ids"].flatten() == 34).nonzero().flatten()
    assert torch.equal(packed["image_positions"].sort().values, placeholders)
    assert (packed["labels"][packed["position_ids"] == 0] == IGNORE_INDEX).all()


@pytest.mark.parametrize("pack_length", [None, 150])
def test_lengths_are_rounded_up_for_compilation(data, processor, pack_length):
    samples = VLMDataset([data / "dialogues.jsonl"], processor, 512, data / "images")
    (batch,) = StepDataset(samples, 0, pack_length, 32)[[[0, 1, 2, 3]]]
    (exact,) = StepDataset(samples, 0, pack_length)[[[0, 1, 2, 3]]]
    width = exact["input_ids"].shape[1]
    assert width % 32 and batch["input_ids"].shape[1] == 32 * (width // 32 + 1)
    for name in ("tokens", "supervised_tokens"):
        assert batch[name] == exact[name]
    for name in ("input_ids", "labels"):
        assert torch.equal(batch[name][:, :width], exact[name])
    assert (batch["input_ids"][:, width:] == 0).all() and (batch["labels"][:, width:] == IGNORE_INDEX).all()
