"""The loop's arithmetic: one global batch has one gradient, however it is split."""

import math

import numpy as np
import pytest
import torch

from common.distributed import Runtime
from dataset import vlm_dataset
from dataset.collate import StepDataset, StepSampler
from dataset.pictures import open_image
from dataset.pixels import Pixels
from dataset.vlm_dataset import VLMDataset
from model.model_vlm import MiniMindVLM, VLMConfig
from model.processing_vlm import MiniMindVLMProcessor, image_slots
from trainer.arguments import TrainingFlags
from trainer.batches import planned_steps
from trainer.learner import Learner, backward, model_inputs
from trainer.loop import count, learning_rate
from trainer.stage import set_trainable
from trainer.state import Progress

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


def tiny_model(encoder, **config) -> MiniMindVLM:
    torch.manual_seed(0)
    return MiniMindVLM(VLMConfig(**SIZES, **config), encoder).train()


def gradients(model: MiniMindVLM, micro_batches: list[dict]) -> dict[str, torch.Tensor]:
    run = Runtime(torch.device("cpu"))
    model.zero_grad()
    flags = TrainingFlags(data_path=["x"], dtype="float32")
    learner = Learner(model, flags, run, Pixels(model.processor))
    backward(learner, micro_batches, count(micro_batches, run))
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("config", [{}, {"use_moe": True, "seq_aux": True}], ids=["dense", "moe"])
def test_accumulation_gives_the_gradient_of_the_whole_batch(data, processor, config):
    from conftest import TINY_ENCODER

    model = tiny_model(TINY_ENCODER, **config)
    set_trainable(model, "proj_llm")
    full = MiniMindVLMProcessor(processor.image_processor, processor.tokenizer, tokens_per_image=196)
    steps = StepDataset(VLMDataset([data / "dialogues.jsonl"], full, 1024, data / "images"), 0)
    whole = gradients(model, steps[[list(range(8))]])
    halves = gradients(model, steps[[[0, 3, 6, 5], [1, 2, 4, 7]]])  # unequal numbers of supervised tokens
    assert whole.keys() == halves.keys()
    worst = max(float((whole[name] - halves[name]).abs().max()) for name in whole)
    assert worst < 1e-5
    assert max(float(grad.abs().max()) for grad in whole.values()) > 1e-2


def test_packed_rows_give_the_logits_and_the_gradient_of_unpacked_ones(data, processor):
    from conftest import TINY_ENCODER

    model = tiny_model(TINY_ENCODER)
    set_trainable(model, "proj_llm")
    full = MiniMindVLMProcessor(processor.image_processor, processor.tokenizer, tokens_per_image=196)
    samples = VLMDataset([data / "dialogues.jsonl", data / "texts.jsonl"], full, 1024, data / "images")
    rows = [list(range(16))]
    (plain,), (packed,) = StepDataset(samples, 0)[rows], StepDataset(samples, 0, 700)[rows]
    assert len(packed["input_ids"]) < 16
    assert len(plain["picture_numbers"]) == 7 and len(plain["pixel_values"]) == 6

    def forward(batch):
        return model(**model_inputs(batch, torch.device("cpu"), samples.pixels))

    with torch.no_grad():
        expected, found = forward(plain), forward(packed)
    assert found.loss.item() == pytest.approx(expected.loss.item(), abs=1e-5)
    spans = packed_spans(packed)
    assert len(spans) == 16 and sum(len(span) for _, span in spans) == plain["tokens"]
    for row, span in spans:
        ids = packed["input_ids"][row, span]
        (same,) = (
            number
            for number, tokens in enumerate(plain["sequence_ids"] >= 0)
            if torch.equal(plain["input_ids"][number, : int(tokens.sum())], ids)
        )
        worst = (found.logits[row, span] - expected.logits[same, : len(span)]).abs().max()
        assert worst < 1e-4
    apart, together = gradients(model, [plain]), gradients(model, [packed])
    assert max(float((apart[name] - together[name]).abs().max()) for name in apart) < 1e-5


def packed_spans(batch: dict) -> list[tuple[int, torch.Tensor]]:
    """(row, token numbers) of each packed sample; single tokens are padding."""
    spans = []
    for row, positions in enumerate(batch["position_ids"]):
        pieces = torch.arange(len(positions)).tensor_split((positions == 0).nonzero().flatten())
        spans += [(row, piece) for piece in pieces if len(piece) > 1]
    return spans


@pytest.mark.parametrize("pack_length", [None, 900])
def test_a_picture_of_several_rows_is_read_and_encoded_once(data, processor, monkeypatch, pack_length):
    from conftest import TINY_ENCODER

    model = tiny_model(TINY_ENCODER)
    full = MiniMindVLMProcessor(processor.image_processor, processor.tokenizer, tokens_per_image=196)
    samples = VLMDataset([data / "dialogues.jsonl"], full, 1024, data / "images")
    opened, encoded = [], []
    monkeypatch.setattr(
        vlm_dataset, "open_image", lambda path, *rest: opened.append(path) or open_image(path, *rest)
    )
    (batch,) = StepDataset(samples, 0, pack_length)[[list(range(8))]]
    # 1.png, 4.png and 7.png alone; 2.png and 5.png each with 0.png
    assert len(opened) == len(set(opened)) == 6 and len(batch["picture_numbers"]) == 7
    hook = model.vision_encoder.register_forward_pre_hook(
        lambda _, __, kwargs: encoded.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    inputs = model_inputs(batch, torch.device("cpu"), samples.pixels)
    found = model(**inputs).loss.item()
    hook.remove()
    assert encoded == [6]
    inputs["pixel_values"] = inputs["pixel_values"][inputs.pop("picture_numbers")]
    assert found == pytest.approx(model(**inputs).loss.item(), abs=1e-5)


@pytest.mark.parametrize("config", [{}, {"use_moe": True}], ids=["dense", "moe"])
def test_what_a_batch_tells_is_what_the_model_would_find(data, processor, config):
    from conftest import TINY_ENCODER

    model = tiny_model(TINY_ENCODER, **config)
    full = MiniMindVLMProcessor(processor.image_processor, processor.tokenizer, tokens_per_image=196)
    samples = VLMDataset([data / "dialogues.jsonl"], full, 1024, data / "images")
    (batch,) = StepDataset(samples, 0)[[list(range(8))]]
    told = model(**model_inputs(batch, torch.device("cpu"), samples.pixels))
    shown = [samples[i].pixel_values for i in range(8)]
    counts = torch.tensor([0 if pictures is None else len(pictures) for pictures in shown])
    pixels = samples.pixels.normalised(torch.cat([pictures for pictures in shown if pictures is not None]))
    images = {"pixel_values": image_slots(pixels, counts), "image_counts": counts}
    mask = (batch["sequence_ids"] >= 0).long()
    found = model(batch["input_ids"], mask, labels=batch["labels"], **images)
    assert told.loss.item() == pytest.approx(found.loss.item(), abs=1e-6)
    assert told.aux_loss.item() == pytest.approx(found.aux_loss.item(), abs=1e-7)
    assert torch.allclose(told.logits[mask.bool()], found.logits[mask.bool()], atol=1e-5)


ON_THE_CPU = ("_routed",)  # experts come in slices there


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("pack_length", [None, 900], ids=["apart", "packed"])
@pytest.mark.parametrize(
    ("config", "known"), [({}, ()), ({"use_moe": True}, ON_THE_CPU)], ids=["dense", "moe"]
)
def test_nothing_inside_a_step_would_wait_for_a_gpu(data, processor, config, known, pack_length, dtype):
    from conftest import TINY_ENCODER, Syncs

    full = MiniMindVLMProcessor(processor.image_processor, processor.tokenizer, tokens_per_image=196)
    samples = VLMDataset([data / "dialogues.jsonl"], full, 1024, data / "images")
    batches = StepDataset(samples, 0, pack_length)[[[0, 1, 2, 3], [4, 5, 6, 7]]]
    flags = TrainingFlags(data_path=["x"], dtype=dtype, loss_spike=3.0)
    run = Runtime(torch.device("cpu"))
    learner = Learner(tiny_model(TINY_ENCODER, **config), flags, run, samples.pixels)
    totals, progress = count(batches, run), Progress()
    with Syncs(known) as syncs:
        for _ in range(2):
            learner.step(batches, totals, 1e-3, progress)
    assert syncs.found == []
    assert [sums["bad"] for sums in learner.settle(progress)] == ["", ""]


def test_looking_at_a_number_is_seen_as_waiting():
    from conftest import Syncs

    values = torch.arange(4.0)
    with Syncs() as syncs:
        bool((values > 2).any())
        values[values > 2]
        values.nonzero()
    assert [name for name, _ in syncs.found] == ["_local_scalar_dense", "index", "nonzero"]


def test_a_step_is_told_while_the_next_one_runs(data, processor):
    samples = VLMDataset([data / "texts.jsonl"], processor, 64)
    (batch,) = StepDataset(samples, 0)[[[0, 1, 2]]]
    broken = batch | {"label_ids": batch["label_ids"].clone(), "where": ["broken"]}
    run, flags = Runtime(torch.device("cpu")), TrainingFlags(data_path=["x"], dtype="float32", loss_spike=1.5)
    learner = Learner(tiny_model(None), flags, run, None)
    progress, told = Progress(), []
    for number in range(4):
        with torch.no_grad():  # the third step has a loss that is far too high
            learner.model.lm_head.weight.mul_({2: 500, 3: 1 / 500}.get(number, 1))
        before = learner.model.model.norm.weight.clone()
        step = [broken if number == 2 else batch]
        learner.step(step, count(step, run), 1e-3, progress)
        assert torch.equal(before, learner.model.model.norm.weight) == (number == 2)
        told += learner.settle(progress, running=1)
        assert (len(told), progress.step) == (number, number + 1)
    told += learner.settle(progress)
    assert [sums["step"] for sums in told] == [1, 2, 3, 4]
    assert [bool(sums["bad"]) for sums in told] == [False, False, True, False]
    assert "times its mean" in told[2]["bad"] and told[2]["where"] == ["broken"]
    assert (progress.bad_steps, progress.bad_in_a_row) == (1, 0)
    assert progress.learnt_tokens == 3 * batch["supervised_tokens"]


@pytest.mark.parametrize(
    ("trainable", "learns"),
    [
        ("proj", ["vision_proj."]),
        ("proj_last", ["vision_proj.", "model.layers.2."]),
        ("proj_first_last", ["vision_proj.", "model.layers.0.", "model.layers.2."]),
        ("proj_attn", ["vision_proj.", *(f"self_attn.{x}_proj" for x in "qkvo")]),
        ("proj_llm", ["vision_proj.", "model.", "lm_head."]),
    ],
)
def test_trainable_sets(trainable, learns):
    with torch.device("meta"):
        model = MiniMindVLM(VLMConfig(**SIZES | {"num_hidden_layers": 3}), None)
    set_trainable(model, trainable)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == any(part in name for part in learns), name


def test_encoder_never_learns():
    from conftest import TINY_ENCODER

    model = tiny_model(TINY_ENCODER)
    set_trainable(model, "proj_llm")
    assert not any(
        p.requires_grad for name, p in model.named_parameters() if name.startswith("vision_encoder.")
    )
    assert not model.vision_encoder.training


def test_schedule_warms_up_then_falls_to_a_tenth():
    flags = TrainingFlags(data_path=["x"], learning_rate=1.0, warmup_iters=4)
    rates = [learning_rate(step, 104, flags) for step in range(104)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[4] == 1.0
    assert rates[54] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 2)))
    assert rates[-1] == pytest.approx(0.1, abs=1e-3) and sorted(rates[4:], reverse=True) == rates[4:]


@pytest.mark.parametrize("budget", [None, 2000])
def test_all_steps_of_all_epochs_are_planned(budget):
    lengths = np.random.default_rng(0).integers(10, 500, 3000)
    sampler = StepSampler(lengths, 7, 1, tokens_per_batch=budget)
    steps = []
    for epoch in range(6):
        sampler.set_epoch(epoch)
        steps.append(len(list(sampler)))
    assert planned_steps(sampler, TrainingFlags(data_path=["x"], epochs=6)) == sum(steps)
    assert planned_steps(sampler, TrainingFlags(data_path=["x"], epochs=6, max_steps=7)) == 7
    assert (len(set(steps)) > 1) == (budget is not None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 0}, "--batch_size must be above 0, found 0"),
        ({"tokens_per_batch": 0}, "--tokens_per_batch must be above 0, found 0"),
        ({"max_steps": 0}, "--max_steps must be above 0"),
        ({"learning_rate": -1.0}, "--learning_rate must be above 0"),
        ({"num_workers": -1}, "--num_workers must not be negative"),
        ({"loss_spike": 0.0}, "--loss_spike must be above 0"),
        ({"timeout_seconds": math.inf}, "--timeout_seconds must be above 0, found inf"),
        ({"seed": 2**64}, "--seed must be from 0 to"),
        ({"data_path": []}, "--data_path is needed"),
    ],
)
def test_flags_that_make_no_sense_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        TrainingFlags(**{"data_path": ["x"], **values})
