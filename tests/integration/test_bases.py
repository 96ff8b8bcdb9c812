"""Sizes, tokenizer and encoder are said once, in the first stage: later ones follow what they start from."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, TINY_ENCODER
from release3 import make_state, make_tokenizer
from test_training import error_line

SIZES = dict(zip(TINY[:8:2], TINY[1:8:2], strict=True))
EACH = ["--num_workers", 0, "--device", "cpu", "--max_steps", 1]


def sizes_of(path: Path) -> dict[str, int]:
    config = json.loads(path.with_suffix(".json").read_text())["config"]
    return {name: config[name.removeprefix("--")] for name in SIZES}


def sees(data: Path, out: Path, *more) -> list:
    rows = ["--data_path", data / "captions.jsonl", "--images_path", data / "images"]
    return [*rows, "--out_dir", out, "--batch_size", 4, *EACH, *more]


@pytest.fixture(scope="module")
def first(tmp_path_factory, request) -> Path:
    """A folder with lm_64.pth of a tokenizer of its own, trained by nobody for long."""
    folder = tmp_path_factory.mktemp("first")
    shutil.copytree(ROOT / "model/tokenizer", folder / "tokenizer")
    return folder


@pytest.fixture
def lm(first, data, run) -> Path:
    out = first / "out"
    if not out.exists():
        texts = ["--data_path", data / "texts.jsonl", "--tokenizer_path", first / "tokenizer"]
        sizes = [part for pair in SIZES.items() for part in pair]
        run("scripts/train_lm.py", *sizes, *texts, "--out_dir", out, *EACH)
    return out / "lm_64.pth"


def test_later_stages_follow_the_first(data, tmp_path, run, lm):
    shutil.copytree(lm.parent, tmp_path / "out")
    out = tmp_path / "out"
    run("train_pretrain_vlm.py", *sees(data, out, "--vision_model_path", TINY_ENCODER))
    run("train_sft_vlm.py", *sees(data, out))

    sidecar = json.loads((out / "sft_vlm_64.json").read_text())
    assert sizes_of(out / "sft_vlm_64.pth") == sizes_of(lm) == SIZES
    assert sidecar["tokenizer"]["path"] == str(lm.parent.parent / "tokenizer")
    assert sidecar["encoder"]["path"] == str(TINY_ENCODER)
    # Flags that say what is followed anyway are no change: the run is the same.
    said = [*TINY, "--tokenizer_path", lm.parent.parent / "tokenizer", "--no_use_moe"]
    assert "done before" in run("train_sft_vlm.py", *sees(data, out, *said)).stderr


def test_weights_without_a_sidecar_tell_what_their_shapes_tell(data, tmp_path, run, lm):
    bare = shutil.copy(lm, tmp_path / "bare.pth")
    heads = ["--num_attention_heads", 4, "--tokenizer_path", lm.parent.parent / "tokenizer"]
    flags = ["--from_weight", bare, "--vision_model_path", TINY_ENCODER, *heads]
    run("train_pretrain_vlm.py", *sees(data, tmp_path / "out", *flags))
    assert sizes_of(tmp_path / "out/pretrain_vlm_64.pth") == SIZES


def test_the_checkpoint_of_resume_decides_before_any_base(data, tmp_path, run, lm):
    out = tmp_path / "out"
    flags = ["--vision_model_path", TINY_ENCODER, "--save_interval", 1, "--max_steps", 2]
    run("train_pretrain_vlm.py", *sees(data, out, "--from_weight", lm, *flags))
    step = out / "runs/pretrain_vlm_64/checkpoints/step-1"
    (tmp_path / "again").mkdir()
    (tmp_path / "again/lm_512.pth").write_bytes(b"another size, and not looked at")
    more = ["--from_weight", lm, "--resume", step, "--max_steps", 2]
    again = run("train_pretrain_vlm.py", *sees(data, tmp_path / "again", *more))
    assert f"from {step}" in again.stderr
    assert (tmp_path / "again/pretrain_vlm_64.pth").read_bytes() == (out / "pretrain_vlm_64.pth").read_bytes()


@pytest.mark.parametrize(
    ("files", "flags", "code", "message"),
    [
        (["lm_64", "lm_128", "lm_128_moe"], [], 1, "lm_128.pth, lm_128_moe.pth, lm_64.pth; name one with"),
        (["lm_128", "lm_128_moe"], ["--hidden_size", 128], 1, "lm_128.pth, lm_128_moe.pth; name one with"),
        (["lm_64", "lm_128"], ["--hidden_size", 128], 1, "lm_128.pth: not readable weights"),
        (["lm_64", "lm_64_moe"], ["--no_use_moe"], 1, "lm_64.pth: not readable weights"),
        (["llm_64", "lm_64", "lm_own"], [], 1, "out/lm_64.pth: not readable weights"),
        ([], [], 1, "no lm_512.pth in"),
        (["lm_64"], ["--hidden_size", 128, "--use_moe"], 1, "no lm_128_moe.pth in"),
        ([], ["--from_weight", "gone.pth"], 1, "gone.pth: no such weights"),
        (["lm_64"], ["--from_weight", "none", "--num_attention_heads", 3], 2, "--hidden_size 512 must be"),
        ([], ["--from_weight", "none", "--hidden_size", 100], 2, "--hidden_size 100 must be a multiple of"),
        ([], ["--from_weight", "none", "--max_seq_len", 40000], 2, "must be at most 32768, found 40000"),
    ],
)
def test_what_does_not_decide_is_told_in_one_line(data, tmp_path, run, files, flags, code, message):
    out = tmp_path / "out"
    out.mkdir()
    for name in files:
        (out / f"{name}.pth").write_bytes(b"")
    assert message in error_line(run("train_pretrain_vlm.py", *sees(data, out, *flags), expect=code))


def test_a_flag_that_contradicts_the_base_is_an_error(data, run, lm):
    result = run("train_pretrain_vlm.py", *sees(data, lm.parent, "--num_hidden_layers", 3), expect=1)
    assert "does not fit the flags: it has num_hidden_layers 2 (flag: 3)" in error_line(result)


def test_fewer_tokens_a_picture_are_followed_from_the_first_stage_to_an_export(data, tmp_path, run, lm):
    out = tmp_path / "out"
    shutil.copytree(lm.parent, out)
    cached = ["--cache_features", tmp_path / "cache"]
    steps = ["--max_steps", 2, "--save_interval", 1, *cached]
    asked = ["--vision_model_path", TINY_ENCODER, "--pixel_shuffle", 2]
    run("train_pretrain_vlm.py", *sees(data, out, *asked, *steps))
    step = ["--resume", out / "runs/pretrain_vlm_64/checkpoints/step-1"]
    run("train_pretrain_vlm.py", *sees(data, tmp_path / "again", *step, *steps))
    again = tmp_path / "again/pretrain_vlm_64.pth"
    assert again.read_bytes() == (out / "pretrain_vlm_64.pth").read_bytes()

    refused = run("train_sft_vlm.py", *sees(data, out, "--pixel_shuffle", 1), expect=1)
    assert "does not fit the flags: it has pixel_shuffle 2 (flag: 1)" in error_line(refused)
    (stored,) = (tmp_path / "cache").glob("*/*.npy")
    run("train_sft_vlm.py", *sees(data, out, *cached))
    assert list((tmp_path / "cache").glob("*/*.npy")) == [stored], "patches serve any number of tokens"
    sidecar = json.loads((out / "sft_vlm_64.json").read_text())
    assert sidecar["config"]["pixel_shuffle"] == sidecar["arguments"]["pixel_shuffle"] == 2
    assert sidecar["config"]["image_ids"] == [34] * 49

    weight, report = out / "sft_vlm_64.pth", tmp_path / "report.json"
    rows = ["--data_path", data / "captions.jsonl", "--images_path", data / "images"]
    run("eval_vlm.py", "--weight", weight, *rows, "--score", "--report", report, "--device", "cpu")
    assert json.loads(report.read_text())["n"] == 8
    exported = run("convert_to_hf.py", "--weight", weight, "--out", tmp_path / "hf").stderr
    assert "reloaded by MiniMindVLM from source: 0; greedy text is equal" in exported
    run("convert_to_hf.py", "--to_torch", tmp_path / "hf", "--out", tmp_path / "back.pth")
    assert (tmp_path / "back.pth").read_bytes() == weight.read_bytes()


def test_a_grid_that_pixel_shuffle_does_not_divide_is_told_in_one_line(data, tmp_path, run, lm):
    flags = ["--from_weight", lm, "--vision_model_path", TINY_ENCODER, "--pixel_shuffle", 4]
    result = run("train_pretrain_vlm.py", *sees(data, tmp_path / "out", *flags), expect=1)
    assert "pixel_shuffle 4: found a grid of 14 x 14 patches" in error_line(result)


SMALL_3 = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}  # of 2 layers
SIGLIP = ROOT / "tests/golden/v3/siglip"


@pytest.fixture
def release_3(tmp_path) -> Path:
    """A folder with what is published: tokenizer/, llm_64.pth and llm_64_moe.pth."""
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    torch.save(make_state(SMALL_3, visual=False), tmp_path / "llm_64.pth")
    mixture = SMALL_3 | {"use_moe": True, "moe_intermediate_size": 128}
    torch.save(make_state(mixture, visual=False), tmp_path / "llm_64_moe.pth")
    return tmp_path


@pytest.mark.parametrize("moe", ["", "_moe"], ids=["dense", "mixture"])
def test_a_base_of_release_3_brings_its_architecture_and_defaults(data, run, release_3, moe):
    base, out = release_3 / f"llm_64{moe}.pth", release_3 / "out"
    parts = ["--tokenizer_path", release_3 / "tokenizer", "--vision_model_path", SIGLIP]
    steps = ["--max_steps", 2, "--save_interval", 1]
    run("train_pretrain_vlm.py", *sees(data, out, "--from_weight", base, *parts, *steps))
    run("train_sft_vlm.py", *sees(data, out))

    pretrained, tuned = (
        json.loads((out / f"{stage}_vlm_64{moe}.json").read_text()) for stage in ("pretrain", "sft")
    )
    taken = "epochs max_seq_len trainable learning_rate".split()
    assert [pretrained["arguments"][name] for name in taken] == [2, 450, "proj", 4e-4]
    assert [tuned["arguments"][name] for name in taken] == [2, 768, "proj_first_last", 5e-6]
    config = tuned["config"]
    assert config["qk_norm"] and config["projector"] == "mlp" and config["rms_norm_eps"] == 1e-6
    assert config["image_ids"] == [12] * 64
    if moe:
        assert config["moe_intermediate_size"] == 128 and config["n_shared_experts"] == 0
        assert config["num_experts_per_tok"] == 1 and config["aux_loss_alpha"] == 5e-4
    base.unlink()  # a checkpoint knows the config as well
    again = ["--resume", out / f"runs/pretrain_vlm_64{moe}/checkpoints/step-1", "--max_steps", 2]
    again += ["--from_weight", base]
    run("train_pretrain_vlm.py", *sees(data, release_3 / "again", *again))
    name = f"pretrain_vlm_64{moe}.pth"
    assert (release_3 / "again" / name).read_bytes() == (out / name).read_bytes()


def test_release_3_trains_from_a_language_model_in_a_single_stage(data, run, release_3):
    parts = ["--tokenizer_path", release_3 / "tokenizer", "--vision_model_path", SIGLIP]
    base = release_3 / "llm_64.pth"
    result = run("train_sft_vlm.py", *sees(data, release_3 / "out", "--from_weight", base, *parts))
    assert "llm_64.pth has no projection: it starts with fresh weights" in result.stderr
    learnt = torch.load(release_3 / "out/sft_vlm_64.pth", weights_only=True)
    before = torch.load(base, weights_only=True)
    first, embedding = "model.layers.0.self_attn.q_norm.weight", "model.embed_tokens.weight"
    assert torch.equal(learnt[embedding], before[embedding])  # two layers: the first and the last
    assert learnt["vision_proj.mlp.3.weight"].shape == (64, 64) and first in learnt


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"tokenizer_path": "model/tokenizer"}, "model/tokenizer has @: they are of different releases"),
        (
            {"vision_model_path": TINY_ENCODER},
            "has 196 tokens for an image, the weights were trained with one",
        ),
    ],
    ids=["tokenizer", "encoder"],
)
def test_parts_of_release_2_with_weights_of_release_3_are_refused(data, run, release_3, flags, message):
    weights = release_3 / "pretrain_vlm_64.pth"
    torch.save(make_state(SMALL_3, encoder=SIGLIP), weights)
    parts = {"tokenizer_path": release_3 / "tokenizer", "vision_model_path": SIGLIP} | flags
    given = [part for name, value in parts.items() for part in (f"--{name}", value)]
    result = run(
        "train_sft_vlm.py", *sees(data, release_3 / "out", "--from_weight", weights, *given), expect=1
    )
    assert message in error_line(result)


def test_the_tokenizer_of_release_3_with_weights_of_release_2_is_refused(data, tmp_path, run, lm):
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    bare = shutil.copy(lm, tmp_path / "bare.pth")  # without a sidecar, which knows the tokenizer
    flags = ["--from_weight", bare, "--vision_model_path", SIGLIP, "--num_attention_heads", 4]
    flags += ["--tokenizer_path", tmp_path / "tokenizer"]
    message = error_line(run("train_pretrain_vlm.py", *sees(data, tmp_path / "out", *flags), expect=1))
    assert "takes @ for an image, the tokenizer" in message
