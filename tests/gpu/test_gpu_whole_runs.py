"""Whole runs on a GPU: resuming, one rank with NCCL, two that share a card with gloo."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY
from torch.nn.parallel import DistributedDataParallel

pytestmark = pytest.mark.gpu
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node"]
NAME = "sft_vlm_64"


@pytest.fixture
def command(data, device) -> list:
    rows = ["--data_path", data / "dialogues.jsonl", "--images_path", data / "images"]
    flags = ["--device", device.type, "--dtype", "float32", "--learning_rate", 1e-3, "--from_weight", "none"]
    return ["train_sft_vlm.py", *TINY, *rows, *flags, "--log_interval", 1]


def losses(out: Path) -> list[float]:
    lines = (out / f"runs/{NAME}/metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def same(one: Path, other: Path, tolerance: float) -> bool:
    found, expected = (torch.load(out / f"{NAME}.pth", weights_only=True) for out in (one, other))
    return all(torch.allclose(found[key].float(), expected[key].float(), atol=tolerance) for key in expected)


def test_a_resumed_run_ends_where_a_whole_one_does(command, tmp_path, run, device):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    own = ["--batch_size", 2, "--epochs", 2, "--max_steps", 6, "--save_interval", 3]
    run(*command, *own, "--out_dir", whole, GPU_TEST="1")
    shutil.copytree(whole, parts)
    run(
        *command,
        *own,
        "--out_dir",
        parts,
        "--resume",
        parts / f"runs/{NAME}/checkpoints/step-3",
        GPU_TEST="1",
    )
    # Some kernels of a GPU add in any order.
    tolerance = 0.0 if device.type == "cpu" else 1e-3
    assert losses(parts) == pytest.approx(losses(whole), abs=tolerance) and len(losses(parts)) == 6
    assert same(parts, whole, 5 * tolerance)


def test_nccl_and_gloo_stand_side_by_side(device):
    """As on several cards: what is on the GPU goes by NCCL, counts by gloo."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        for place in {"cpu", device.type}:
            values = torch.arange(3.0, device=place)
            parts = [torch.empty_like(values)]
            torch.distributed.all_gather(parts, values)
            assert parts[0].tolist() == [0.0, 1.0, 2.0] and parts[0].device.type == place
        model = DistributedDataParallel(torch.nn.Linear(3, 1).to(device))
        model(torch.ones(2, 3, device=device)).sum().backward()
        assert model.module.weight.grad.flatten().tolist() == [2.0, 2.0, 2.0]
    finally:
        torch.distributed.destroy_process_group()


def test_one_rank_of_torchrun_trains_as_a_process_does(command, tmp_path, run):
    own = ["--batch_size", 4, "--max_steps", 2]
    run(*command, *own, "--out_dir", tmp_path / "alone", GPU_TEST="1")
    run(*TORCHRUN, 1, *command, *own, "--out_dir", tmp_path / "rank")
    assert losses(tmp_path / "rank") == pytest.approx(losses(tmp_path / "alone"), abs=1e-3)


def test_two_ranks_on_one_card_train_as_one_with_twice_the_batch(command, tmp_path, run):
    run(*command, "--batch_size", 4, "--max_steps", 2, "--out_dir", tmp_path / "one", GPU_TEST="1")
    run(*TORCHRUN, 2, *command, "--batch_size", 2, "--max_steps", 2, "--out_dir", tmp_path / "two")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-3)
    assert same(tmp_path / "two", tmp_path / "one", 5e-3)
