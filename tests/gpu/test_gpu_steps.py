"""Training steps on a GPU: packing, compiling, fp16's scaler, bad steps, and nothing waits inside one."""

import contextlib
import math
from collections.abc import Callable

import pytest
import torch
from conftest import TINY_ENCODER, Syncs

from common.distributed import Runtime
from common.setup import place
from dataset.collate import StepDataset
from dataset.feature_cache import FeatureCache, encode_missing
from dataset.vlm_dataset import VLMDataset
from model.model_vlm import MiniMindVLM, VLMConfig
from model.processing_vlm import MiniMindVLMProcessor
from trainer.arguments import VLMTrainingFlags
from trainer.learner import Learner, backward
from trainer.loop import count
from trainer.stage import set_trainable
from trainer.state import Progress

pytestmark = pytest.mark.gpu
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture
def make(data, processor, device) -> Callable[..., tuple[Learner, VLMDataset]]:
    """A learner with a tiny model on the device, and rows of none, one and two pictures."""

    def make(config: dict | None = None, **flags) -> tuple[Learner, VLMDataset]:
        torch.manual_seed(0)
        model = MiniMindVLM(VLMConfig(**SIZES, **(config or {})), TINY_ENCODER).train()
        set_trainable(model, "proj_llm")
        full = MiniMindVLMProcessor(processor.image_processor, processor.tokenizer, tokens_per_image=196)
        flags = VLMTrainingFlags(data_path=["x"], **{"dtype": "float32", "learning_rate": 1e-3, **flags})
        place(model, device, flags.dtype)
        samples = VLMDataset([data / "dialogues.jsonl"], full, 1024, data / "images")
        return Learner(model, flags, Runtime(device), samples.pixels), samples

    return make


def take(learner: Learner, batch: dict, progress: Progress) -> dict:
    learner.step([batch], count([batch], learner.runtime), learner.flags.learning_rate, progress)
    (told,) = learner.settle(progress)
    return told


def weights(learner: Learner) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten().clone() for parameter in learner.learning])


@pytest.mark.parametrize("config", [{}, {"use_moe": True}], ids=["dense", "moe"])
def test_packed_rows_have_the_gradient_of_unpacked_ones(make, exact, config):
    learner, samples = make(config)
    found = []
    for pack_length in (None, 900):
        (batch,) = StepDataset(samples, 0, pack_length)[[[*range(8)]]]
        assert len(batch["input_ids"]) < 8 or pack_length is None
        learner.model.zero_grad()
        sums = backward(learner, [batch], count([batch], learner.runtime))
        found.append((sums["loss"], *(p.grad.clone() for p in learner.learning if p.grad is not None)))
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() <= 1e-3 * other.norm() + 1e-6


def test_compiled_steps_have_the_losses_of_others(make, exact):
    losses = []
    for is_compiled in (False, True):
        learner, samples = make(compile=is_compiled)
        (batch,) = StepDataset(samples, 0, None, 32)[[[*range(8)]]]
        progress = Progress()
        losses.append([take(learner, batch, progress)["loss"] for _ in range(4)])
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)
    assert losses[0][3] < losses[0][0]


def test_fp16_lowers_its_scale_until_a_step_counts(make):
    learner, samples = make(dtype="float16")
    (batch,) = StepDataset(samples, 0)[[[*range(8)]]]
    learner.scaler = torch.amp.GradScaler(learner.runtime.device.type, init_scale=2.0**40)
    progress, before = Progress(), weights(learner)
    told = take(learner, batch, progress)
    assert torch.equal(weights(learner), before) and learner.scaler.get_scale() == 2.0**39
    assert told["bad"] == "" and math.isfinite(told["loss"]) and not math.isfinite(told["grad_norm"])
    for _ in range(40):
        take(learner, batch, progress)
    assert not torch.equal(weights(learner), before) and bool(weights(learner).isfinite().all())
    assert progress.bad_steps == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_named(make, dtype):
    learner, samples = make(dtype=dtype)
    (batch,) = StepDataset(samples, 0)[[[*range(8)]]]
    progress = Progress()
    with torch.no_grad():
        learner.model.model.norm.weight[0] = math.nan
    before = weights(learner)
    told = take(learner, batch, progress)
    assert torch.equal(weights(learner).nan_to_num(7), before.nan_to_num(7))
    assert "loss nan" in told["bad"] and told["where"] == batch["where"]
    assert (progress.step, progress.bad_steps, progress.bad_in_a_row) == (1, 1, 1)
    with torch.no_grad():
        learner.model.model.norm.weight[0] = 1.0
    assert take(learner, batch, progress)["bad"] == "" and progress.bad_in_a_row == 0


KINDS = {
    "pictures": ({}, {}, None),
    "packed": ({}, {}, 900),
    "mixture": ({"use_moe": True}, {}, None),
    "spikes": ({}, {"loss_spike": 3.0}, None),
    "cached": ({}, {}, None),
}


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_inside_a_step_waits_for_the_device(make, kind, tmp_path):
    """On the CPU, where nothing can wait, operations are counted that would; experts' slices are known to."""
    config, flags, pack_length = KINDS[kind]
    learner, samples = make(config, dtype="bfloat16", **flags)
    device = learner.runtime.device
    if kind == "cached":
        parts = learner.model, samples.processor
        samples.features = FeatureCache(tmp_path, *parts)
        encode_missing(samples.features, *parts, samples.image_paths())
        samples.features.check_complete()
    (batch,) = StepDataset(samples, 0, pack_length)[[[*range(8)]]]
    if device.type == "cuda":  # as the loader does it
        batch = {k: v.pin_memory() if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    totals, progress = count([batch], learner.runtime), Progress()
    learner.step([batch], totals, 1e-3, progress)  # kernels and constants are made
    list(learner.settle(progress))
    with waits_are_errors(device, {"_routed"} if device.type == "cpu" else set()):
        for _ in range(2):
            learner.step([batch], totals, 1e-3, progress)
    assert [told["bad"] for told in learner.settle(progress)] == ["", ""]


@contextlib.contextmanager
def waits_are_errors(device: torch.device, known: set[str]):
    if device.type == "cpu":
        with Syncs(known) as syncs:
            yield
        assert syncs.found == []
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
