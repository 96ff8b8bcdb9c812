"""Sizes, tokenizer and encoder are said once, in the first stage: later ones follow what they start from."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, TINY, TINY_ENCODER
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
        (["lm_64", "lm_128"], ["--hidden_size", 128], 1, "lm_128.pth: not a readable .pth file"),
        (["lm_64", "lm_64_moe"], ["--no_use_moe"], 1, "lm_64.pth: not a readable .pth file"),
        (["llm_64", "lm_64", "lm_own"], [], 1, "out/lm_64.pth: not a readable .pth file"),
        ([], [], 1, "no lm_512.pth in"),
        (["lm_64"], ["--hidden_size", 128, "--use_moe"], 1, "no lm_128_moe.pth in"),
        ([], ["--from_weight", "gone.pth"], 1, "gone.pth: no such weights"),
        (["lm_64"], ["--from_weight", "none", "--num_attention_heads", 3], 2, "--hidden_size 512 must be"),
        ([], ["--from_weight", "none", "--hidden_size", 100], 2, "--hidden_size 100 must be a multiple of"),
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
