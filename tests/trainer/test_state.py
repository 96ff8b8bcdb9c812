"""A run that stopped and went on has the bits of one that never stopped; checkpoints on disk."""

import json
from dataclasses import fields
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import TINY_ENCODER

from common.cli import UserError
from common.distributed import Runtime
from dataset.feature_cache import FeatureCache, encode_missing
from dataset.vlm_dataset import VLMDataset
from inference.samples import sample_answers
from model.model_vlm import MiniMindVLM, VLMConfig
from model.processing_vlm import MiniMindVLMProcessor
from scripts.train_lm import LMFlags
from train_pretrain_vlm import PretrainFlags
from train_sft_vlm import SFTFlags
from trainer.arguments import VLMTrainingFlags
from trainer.learner import Learner
from trainer.loop import train
from trainer.metrics import Metrics
from trainer.stage import set_trainable
from trainer.state import Checkpoints, check_settings, newest_first, newest_intact, run_lock, settings_of

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
ABOUT = {"settings": {}, "run_id": "0"}
STEPS = 9


class StoppingMetrics(Metrics):
    """As if a SIGTERM came during step `stop_at`."""

    stop_at = STEPS + 1

    def step(self, step: int, *args, **kwargs) -> None:
        super().step(step, *args, **kwargs)
        if step == self.stop_at:
            self.runtime.stop_code = 143


def learn(
    data: Path, out: Path, processor, flags: dict, config: dict, stop_at: int = STEPS + 1, asked=None
) -> dict:
    """Trains for STEPS steps or up to the one after `stop_at`, from the checkpoint in `out` if there is one;
    returns the weights. `asked(stop)` is called before each time that answers are given."""
    run = Runtime(torch.device("cpu"))
    torch.manual_seed(0)
    model = MiniMindVLM(VLMConfig(**SIZES, **config), TINY_ENCODER)
    set_trainable(model, "proj_llm")
    if flags.get("activation_checkpointing"):
        model.activation_checkpointing_enable()
    full = MiniMindVLMProcessor(processor.image_processor, processor.tokenizer, tokens_per_image=196)
    samples = VLMDataset([data / "dialogues.jsonl"], full, 1024, data / "images")
    cached = flags.pop("cached", False)
    if cached:
        samples.features = FeatureCache(data / "features", model, full)
        encode_missing(samples.features, model, full, samples.image_paths())
        samples.features.check_complete()
    settings = {"data_path": ["x"], "num_workers": 0, "batch_size": 2, "epochs": 9, "max_steps": STEPS}
    settings |= {"dtype": "float32", "learning_rate": 1e-2, "log_interval": 2, "eval_interval": 3} | flags
    out.mkdir(exist_ok=True)
    checkpoints = Checkpoints(out / "checkpoints", 2, True, ABOUT, lambda state, step: None)
    answers = None
    if asked:
        questions = {"sample_data_path": [str(data / "captions.jsonl")], "images_path": str(data / "images")}
        given = sample_answers(VLMTrainingFlags(**settings | questions), model, full)
        answers = lambda stop: asked(run) or given(stop)  # noqa: E731
    newest = newest_intact(checkpoints.folder)
    metrics = StoppingMetrics(out, STEPS, run, "", resumed_step=newest.about["step"] if newest else 0)
    metrics.stop_at = stop_at
    state = newest.load() if newest else None
    parts = model, samples, samples, VLMTrainingFlags(**settings), run, metrics, checkpoints, STEPS, state
    train(*parts, answers)
    metrics.close()
    checkpoints.close()
    flags |= {"cached": cached}
    return {name: tensor for name, tensor in model.state_dict().items() if "encoder" not in name}


def losses(out: Path) -> list[tuple]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    names = ("step", "epoch", "loss", "aux_loss", "grad_norm", "eval_loss")
    return [tuple(line.get(name) for name in names) for line in lines]


@pytest.mark.parametrize(
    ("flags", "config"),
    [
        ({}, {}),
        ({}, {"use_moe": True}),
        ({"batch_size": 1, "accumulation_steps": 2}, {}),
        ({"dtype": "float16"}, {}),
        ({}, {"dropout": 0.2}),
        ({"num_workers": 2}, {}),
        ({"cached": True}, {"use_moe": True}),
        ({"tokens_per_batch": 600, "pack": True}, {}),
    ],
    ids=["dense", "moe", "accumulation", "fp16", "dropout", "workers", "cache", "budget"],
)
def test_resume_gives_the_same_bits(data, tmp_path, processor, flags, config):
    whole = learn(data, tmp_path / "whole", processor, flags, config)
    # In the middle of an epoch, of a line of metrics and of an evaluation (6), and before others (3 and 9).
    for stop_at, stopped in ((2, 3), (6, 6), (STEPS - 1, STEPS), (STEPS + 1, STEPS)):
        parts = learn(data, tmp_path / "parts", processor, flags, config, stop_at)
        assert read_steps(tmp_path / "parts")[0] == stopped
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole") and len(losses(tmp_path / "whole")) == 8
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


@pytest.mark.parametrize(
    ("flags", "config"),
    [
        ({}, {"dropout": 0.2}),
        ({}, {"use_moe": True}),
        ({"dtype": "bfloat16"}, {}),
        ({"activation_checkpointing": True}, {"dropout": 0.2}),
    ],
    ids=["dropout", "moe", "bfloat16", "checkpointing"],
)
def test_answers_change_no_bit_of_what_is_learnt(data, tmp_path, processor, flags, config):
    without = learn(data, tmp_path / "without", processor, flags, config)
    shown = learn(data, tmp_path / "with", processor, flags, config, asked=lambda run: None)
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    assert all(torch.equal(shown[name], without[name]) for name in without)
    assert steps_of_answers(tmp_path / "with") == [3, 6, 9]
    assert not (tmp_path / "without/samples.jsonl").exists()


def steps_of_answers(out: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (out / "samples.jsonl").read_text().splitlines()]


def test_a_resumed_run_has_the_answers_of_one_that_never_stopped(data, tmp_path, processor):
    learn(data, tmp_path / "whole", processor, {}, {}, asked=lambda run: None)
    learn(data, tmp_path / "parts", processor, {}, {}, stop_at=4, asked=lambda run: None)
    assert read_steps(tmp_path / "parts") == [5] and steps_of_answers(tmp_path / "parts") == [3]
    with (tmp_path / "parts/samples.jsonl").open("a") as file:  # of a process that was killed
        file.write('{"step": 6, "answers": []}\n{"step": 9, "ans')
    learn(data, tmp_path / "parts", processor, {}, {}, asked=lambda run: None)
    whole, parts = ((tmp_path / name / "samples.jsonl").read_bytes() for name in ("whole", "parts"))
    assert parts == whole


def test_a_signal_ends_the_answers_and_they_are_made_up_for(data, tmp_path, processor):
    def stop(run: Runtime) -> None:
        run.stop_code = 143

    learn(data, tmp_path / "whole", processor, {}, {}, asked=lambda run: None)
    learn(data, tmp_path / "parts", processor, {}, {}, asked=stop)
    assert read_steps(tmp_path / "parts") == [3] and not (tmp_path / "parts/samples.jsonl").exists()
    assert [line[-1] for line in losses(tmp_path / "parts")] == [None]  # the evaluation is not counted either
    learn(data, tmp_path / "parts", processor, {}, {}, asked=lambda run: None)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    whole, parts = ((tmp_path / name / "samples.jsonl").read_bytes() for name in ("whole", "parts"))
    assert parts == whole


def test_fp16_scale_is_part_of_the_state(data, tmp_path, processor):
    learn(data, tmp_path, processor, {"dtype": "float16"}, {}, 2)
    state = newest_intact(tmp_path / "checkpoints").load()
    assert state["progress"]["step"] == 3
    state["scaler"]["scale"] = 8.0
    model = MiniMindVLM(VLMConfig(**SIZES), TINY_ENCODER)
    set_trainable(model, "proj_llm")
    for dtype, scale in (("float16", 8.0), ("float32", 1.0)):
        learner = Learner(
            model, VLMTrainingFlags(data_path=["x"], dtype=dtype), Runtime(torch.device("cpu")), None
        )
        learner.restore(state)
        assert learner.scaler.get_scale() == scale
    state["scaler"] = {}  # of a device without fp16
    flags = VLMTrainingFlags(data_path=["x"], dtype="float16")
    learner = Learner(model, flags, Runtime(torch.device("cpu")), None)
    assert learner.restore(state).step == 3


def read_steps(out: Path) -> list[int]:
    return [found.about["step"] for found in newest_first(out / "checkpoints")]


@pytest.fixture
def checkpoints(tmp_path):
    made = Checkpoints(tmp_path / "checkpoints", 2, True, ABOUT, lambda state, step: None)
    for step in (3, 6, 9):
        made.save({"progress": {"step": step}, "model": {"w": torch.full((1000,), float(step))}}, False)
    made.close()
    return made


def test_the_newest_stay(checkpoints, tmp_path):
    assert read_steps(tmp_path) == [9, 6]
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["step-6", "step-9"]
    assert newest_intact(checkpoints.folder).load()["model"]["w"][0] == 9


def truncate(folder: Path) -> None:
    content = (folder / "state.pt").read_bytes()
    (folder / "state.pt").write_bytes(content[: len(content) // 2])


def flip_a_bit(folder: Path) -> None:
    content = bytearray((folder / "state.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "state.pt").write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        flip_a_bit,
        lambda folder: (folder / "state.pt").unlink(),
        lambda folder: (folder / "state.json").write_text('{"step": 9'),
        lambda folder: (folder / "state.json").unlink(),
    ],
    ids=["truncated", "bit", "no_state", "half_json", "no_json"],
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(checkpoints, damage, caplog):
    damage(checkpoints.folder / "step-9")
    assert newest_intact(checkpoints.folder).load()["model"]["w"][0] == 6
    assert "step-9 is damaged" in caplog.text
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["damaged-step-9", "step-6"]
    damage(checkpoints.folder / "step-6")
    with pytest.raises(UserError, match="no checkpoint is intact; --resume never starts over"):
        newest_intact(checkpoints.folder)


def test_half_a_save_is_no_checkpoint(checkpoints, tmp_path):
    """What a process that was killed while it wrote leaves behind; the next run removes it."""
    (checkpoints.folder / "step-9").rename(checkpoints.folder / ".step-9")
    assert read_steps(tmp_path) == [6]
    again = Checkpoints(checkpoints.folder, 2, True, ABOUT, lambda state, step: None)
    again.save({"progress": {"step": 8}, "model": {}}, True)
    again.close()
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["step-6", "step-8"]


def test_the_newest_is_the_one_that_was_saved_last(checkpoints, tmp_path):
    """A run that went on from an earlier step leaves the later ones behind."""
    again = Checkpoints(checkpoints.folder, 2, True, ABOUT, lambda state, step: None)
    again.save({"progress": {"step": 7}, "model": {}}, False)
    again.close()
    assert read_steps(tmp_path) == [7, 9]


def test_a_kill_while_a_run_is_cleared_leaves_its_newest_checkpoint(checkpoints, tmp_path, monkeypatch):
    again = Checkpoints(checkpoints.folder, 2, True)
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr("shutil.rmtree", Mock(side_effect=KeyboardInterrupt))
        again.clear()
    assert read_steps(tmp_path) == [9]
    Checkpoints(checkpoints.folder, 2, True).clear()
    assert not checkpoints.folder.exists()


MAY_CHANGE = """
    data_path images_path out_dir batch_size accumulation_steps pack device compile activation_checkpointing
    num_workers log_interval save_interval keep_checkpoints eval_data_path eval_interval tracker use_wandb
    wandb_project resume resume_override timeout_seconds on_bad_sample max_bad_steps loss_spike cache_features
    eval_blank sample_data_path sample_rows
""".split()


@pytest.mark.parametrize("flags", [LMFlags, VLMTrainingFlags, PretrainFlags, SFTFlags])
def test_the_same_flags_may_change_on_resume_in_every_stage(flags):
    resumable = {item.name for item in fields(flags) if item.metadata["resumable"]}
    assert resumable == {name for name in MAY_CHANGE if name in flags.__dataclass_fields__}


def test_changed_flags_are_named(checkpoints, data, processor):
    samples = VLMDataset([data / "captions.jsonl"], processor, 512, data / "images")
    flags = {"data_path": ["x"], "batch_size": 4, "learning_rate": 1e-3}

    def settings(**changed):
        return settings_of(VLMTrainingFlags(**flags | changed), samples, changed.pop("ranks", 1))

    newest = newest_intact(checkpoints.folder)
    newest.about["settings"] = settings()
    check_settings(newest, settings(num_workers=3, log_interval=7, data_path=["elsewhere"]), False)
    check_settings(newest, settings(batch_size=2, accumulation_steps=2), False)
    check_settings(newest, settings_of(VLMTrainingFlags(**flags | {"batch_size": 2}), samples, 2), False)
    changed = settings(batch_size=3, learning_rate=0.1, trainable="proj")
    with pytest.raises(UserError) as error:
        check_settings(newest, changed, False)
    for part in ("--learning_rate 0.001 (now 0.1)", "--trainable 'proj_llm' (now 'proj')", "ranks 4 (now 3)"):
        assert part in str(error.value)
    assert "--resume never" in str(error.value) and "--resume_override" in str(error.value)
    check_settings(newest, changed, True)
    fewer = VLMDataset([data / "texts.jsonl"], processor, 512)
    with pytest.raises(UserError, match="data_path"):
        check_settings(newest, settings_of(VLMTrainingFlags(**flags), fewer, 1), False)


def test_a_checkpoint_from_before_pixel_shuffle_has_1(checkpoints):
    newest = newest_intact(checkpoints.folder)
    check_settings(newest, {"pixel_shuffle": 1}, False)
    with pytest.raises(UserError, match=r"--pixel_shuffle 1 \(now 2\)"):
        check_settings(newest, {"pixel_shuffle": 2}, False)


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("fcntl.lockf", Mock(side_effect=OSError(37, "No locks available")))
    with run_lock(tmp_path / "runs/lm_64", Runtime(torch.device("cpu"))):
        assert "cannot be locked" in caplog.text
