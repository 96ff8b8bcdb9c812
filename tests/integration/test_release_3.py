"""The way of the README to a model of release 3, command by command, on what a stand-in hub offers."""

import io
import json
import shlex
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT
from hub_stub import HubStub
from PIL import Image
from release3 import make_state, make_tokenizer, write_encoder
from test_download import RELEASE_3, SIGLIP, as_files, as_pth, environment_of
from test_readme import fences

from inference.web.events import Demo

FEW = ["--max_steps", 3, "--batch_size", 2, "--num_workers", 0, "--device", "cpu", "--log_interval", 1]


def parquet(rows: int, dialogues: bool) -> bytes:
    """Rows over ten pictures, as published; every third dialogue is text, with a tiny black picture."""
    generator = np.random.default_rng(0)
    jpegs = []
    for size in (*[80] * 10, 16):
        pixels = generator.integers(0, 256, (size, size, 3), dtype=np.uint8) * (size > 16)
        Image.fromarray(pixels).save(file := io.BytesIO(), "jpeg")
        jpegs.append(file.getvalue())
    table = []
    for i in range(rows):
        text = dialogues and i % 3 == 0
        asked = "Who are you?" if text else "<image>\nWhat is this?"
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": f"Answer {i}."}]
        picture = jpegs[10 if text else i % 10]
        table.append({"conversations": json.dumps(turns), "image_bytes": [picture] if dialogues else picture})
    pq.write_table(pa.Table.from_pylist(table), file := io.BytesIO(), row_group_size=20)
    return file.getvalue()


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    made = tmp_path_factory.mktemp("published")
    make_tokenizer().save_pretrained(made / "tokenizer")
    encoder = write_encoder(made / "siglip")
    with HubStub() as hub:
        hub.models[RELEASE_3[0]] = {
            "llm_768.pth": as_pth(make_state(visual=False)),
            "sft_vlm_768.pth": as_pth(make_state(encoder=encoder)),
        }
        hub.models[RELEASE_3[1]] = as_files(made / "tokenizer")
        hub.models[SIGLIP] = as_files(encoder)
        files = {"pretrain_i2t.parquet": parquet(40, False), "sft_i2t.parquet": parquet(60, True)}
        hub.datasets["jingyaogong/minimind-v_dataset"] = files
        yield hub


def readme_commands() -> list[list[str]]:
    """From the download to the exports, of release 3, on one device."""
    lines = [line for block in fences("README.md", "bash") for line in block.splitlines()]
    start = lines.index("python scripts/download.py encoder lm dataset --part sft")
    end = max(i for i, line in enumerate(lines) if line.startswith("python convert_to_hf.py --weight"))
    commands = [shlex.split(line) for line in lines[start : end + 1] if line.startswith("python ")]
    left_out = (
        "--release",
        "web_demo.py",
        "--push_to_hub",
        "--data_dir",
        "out/demo/sft_vlm_128.pth",
        "out/lm_512.pth",
    )
    return [command[1:] for command in commands if not {*left_out} & {*command}]


def test_the_commands_of_the_readme_lead_to_a_model(hub, run, tmp_path, monkeypatch):
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset/eval_images").symlink_to(ROOT / "dataset/eval_images")
    seen, shown = [], ""
    for script, *arguments in readme_commands():
        seen.append(script)
        if script == "scripts/download.py":
            command = [sys.executable, ROOT / script, *arguments]
            environment = environment_of(tmp_path, hub.endpoint)
            done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            continue
        if script == "train_sft_vlm.py" and "--from_weight" not in arguments:  # after the other way, here
            (tmp_path / "out/runs/sft_vlm_768").rename(tmp_path / "single_stage")
        few = FEW if script.startswith("train_") else []
        few = ["--max_new_tokens", 4, "--device", "cpu"] if script == "eval_vlm.py" else few
        shown += run(script, *arguments, *few, folder=tmp_path).stderr

    order = ["scripts/download.py", "train_sft_vlm.py", "train_pretrain_vlm.py", "eval_vlm.py"]
    assert list(dict.fromkeys(seen)) == [*order, "convert_to_hf.py"]
    assert "sft_i2t.parquet: layout release 3: 40 of 60 rows have pictures" in shown
    assert "pretrain_vlm_768.pth, on cpu" in shown
    sidecar = json.loads((tmp_path / "out/sft_vlm_768.json").read_text())
    assert sidecar["arguments"]["trainable"] == "proj_first_last" and sidecar["config"]["qk_norm"]
    assert "reloaded by LlavaForConditionalGeneration" in shown and "reloaded by Qwen3ForCausalLM" in shown
    learnt = torch.load(tmp_path / "out/sft_vlm_768.pth", weights_only=True)
    published = torch.load(tmp_path / "out/published/sft_vlm_768.pth", weights_only=True)
    assert learnt.keys() == published.keys()
    monkeypatch.chdir(tmp_path)
    for weight in ("out/sft_vlm_768.pth", "out/published/sft_vlm_768.pth", "out/minimind-v"):
        model, processor = Demo(weight, torch.device("cpu"), ("float32", "auto")).model(weight)
        pixel_values = processor.pixel_values(["dataset/eval_images/photo_cat.jpg"])
        assert pixel_values.shape == (1, 3, 256, 256) and model.config.qk_norm
