"""`scripts/download.py` as a user runs it, against a local stand-in for the hub."""

import importlib.util
import io
import json
import os
import random
import re
import signal
import stat
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT
from hub_stub import HubStub
from release3 import make_state, make_tokenizer
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoImageProcessor, CLIPVisionModel, PreTrainedTokenizerFast

from model.model_vlm import MiniMindVLM

SCRIPT = ROOT / "scripts" / "download.py"
GOLDEN_CLIP = ROOT / "tests" / "golden" / "clip"

CLIP = "openai/clip-vit-base-patch16"
WEIGHTS = "jingyaogong/MiniMind2-V-PyTorch"
TOKENIZER = "jingyaogong/MiniMind2-V"
DATASET = "jingyaogong/minimind-v_dataset"

# The library hands over content in pieces of 10 MiB, so only a longer file leaves something to resume.
PIECE = 10 * 1024 * 1024


@pytest.fixture
def hub() -> Iterator[HubStub]:
    with HubStub() as stub:
        yield stub


@pytest.fixture
def download(hub: HubStub, tmp_path: Path):
    """Run the script in an empty folder; `endpoint` and `token` override the stub's."""

    def run(*names: str, **environment: str) -> subprocess.CompletedProcess:
        with start(tmp_path, hub.endpoint, *names, **environment) as process:
            stdout, stderr = process.communicate(timeout=120)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    return run


def start(folder: Path, endpoint: str, *names: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, SCRIPT, *names],
        cwd=folder,
        env=environment_of(folder, endpoint) | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def environment_of(folder: Path, endpoint: str) -> dict[str, str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    settings = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(folder / "hf_home"),
        "NO_PROXY": "*",
        "OMP_NUM_THREADS": "1",
    }
    return inherited | settings


def published_names(folder: Path) -> list[str]:
    """Names in a folder, but for the one where the library keeps its records."""
    return sorted(path.name for path in folder.iterdir() if path.name != ".cache")


def assert_one_line_error(result: subprocess.CompletedProcess, *parts: str) -> None:
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: "), result.stderr
    for part in parts:
        assert part in last


def as_pth(state: dict[str, torch.Tensor]) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def as_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- clip


def clip_repository(weights: str) -> dict[str, bytes]:
    """The golden CLIP with the legacy preprocessor keys of the published one, and files nobody needs."""
    model = (GOLDEN_CLIP / "model.safetensors").read_bytes()
    if weights == "pytorch_model.bin":
        model = as_pth(load_file(GOLDEN_CLIP / "model.safetensors"))
    preprocessor = json.loads((GOLDEN_CLIP / "preprocessor_config.json").read_text())
    del preprocessor["image_processor_type"]
    preprocessor |= {"feature_extractor_type": "CLIPFeatureExtractor", "size": 224, "crop_size": 224}
    return {
        "config.json": (GOLDEN_CLIP / "config.json").read_bytes(),
        "preprocessor_config.json": json.dumps(preprocessor).encode(),
        "pytorch_model.bin": b"not needed where model.safetensors is published",
        weights: model,
        "tokenizer.json": b"{}",
        "tf_model.h5": b"not needed",
    }


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_clip_keeps_only_the_vision_part_unchanged(hub, download, tmp_path, weights):
    hub.models[CLIP] = clip_repository(weights)

    result = download("clip")

    assert result.returncode == 0, result.stderr
    assert sorted(hub.fetched()) == sorted(["config.json", "preprocessor_config.json", weights])
    folder = tmp_path / "model/vision_model/clip-vit-base-patch16"
    kept = ["config.json", "model.safetensors", "preprocessor_config.json"]
    assert sorted(path.name for path in folder.iterdir()) == kept
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert json.loads((folder / "config.json").read_text())["model_type"] == "clip_vision_model"
    published = CLIPVisionModel.from_pretrained(GOLDEN_CLIP).state_dict()
    fetched = CLIPVisionModel.from_pretrained(folder).state_dict()
    assert published.keys() == fetched.keys()
    assert all(torch.equal(published[name], fetched[name]) for name in published)
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    expected = AutoImageProcessor.from_pretrained(GOLDEN_CLIP, backend="pil")
    assert processor.to_dict() == expected.to_dict()


def test_complete_clip_is_skipped_without_a_request(hub, download, tmp_path):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    for name in ("config.json", "preprocessor_config.json", "model.safetensors"):
        (folder / name).write_bytes((GOLDEN_CLIP / name).read_bytes())

    result = download("clip", "--vision_model_path", "elsewhere")

    assert result.returncode == 0, result.stderr
    assert "already complete, skipped" in result.stdout
    assert not hub.requests


# --- lm, vlm


def published_weights() -> bytes:
    """A state dict in the published layout: 2 layers, hidden 64, 8 heads of which 2 for keys and values."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"model.embed_tokens.weight": (259, 64), "model.norm.weight": (64,)}
    for layer in ("model.layers.0", "model.layers.1"):
        shapes |= {
            f"{layer}.self_attn.q_proj.weight": (64, 64),
            f"{layer}.self_attn.k_proj.weight": (16, 64),
            f"{layer}.self_attn.v_proj.weight": (16, 64),
            f"{layer}.self_attn.o_proj.weight": (64, 64),
            f"{layer}.input_layernorm.weight": (64,),
            f"{layer}.post_attention_layernorm.weight": (64,),
            f"{layer}.mlp.gate_proj.weight": (192, 64),
            f"{layer}.mlp.up_proj.weight": (192, 64),
            f"{layer}.mlp.down_proj.weight": (64, 192),
        }
    state = {name: torch.randn(shape, generator=generator).half() for name, shape in shapes.items()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    return as_pth(state)


@pytest.fixture(scope="module")
def published_tokenizer(tmp_path_factory) -> dict[str, bytes]:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=special[0], bos_token=special[1], eos_token=special[2]
    ).save_pretrained(folder)
    return as_files(folder)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("lm", ["lm_512.pth"]), ("vlm", ["pretrain_vlm_512.pth", "sft_vlm_512.pth"])],
)
def test_weights_come_with_tokenizer_and_sidecar(
    hub, download, tmp_path, published_tokenizer, name, expected
):
    files = ["lm_512.pth", "pretrain_vlm_512.pth", "sft_vlm_512.pth", "sft_vlm_768.pth"]
    hub.models[WEIGHTS] = {file: published_weights() for file in files}
    hub.models[TOKENIZER] = published_tokenizer | {"model.safetensors": b"not needed"}

    result = download(name, "--release", "2")

    assert result.returncode == 0, result.stderr
    out = tmp_path / "out"
    assert sorted(path.name for path in out.glob("*.pth")) == expected
    assert (out / "minimind2-tokenizer/tokenizer.json").exists()
    assert not (out / "minimind2-tokenizer/model.safetensors").exists()
    for file in expected:
        sidecar = json.loads((out / file).with_suffix(".json").read_text())
        assert sidecar["stage"] == file.removesuffix("_512.pth")
        assert (sidecar["config"]["hidden_size"], sidecar["config"]["num_hidden_layers"]) == (64, 2)
        assert (
            sidecar["tokenizer"]["path"] == "out/minimind2-tokenizer" and sidecar["tokenizer"]["fingerprint"]
        )


def test_weights_that_are_none_are_a_one_line_error(hub, download, published_tokenizer):
    hub.models[WEIGHTS] = {"lm_512.pth": b"not a torch file"}
    hub.models[TOKENIZER] = published_tokenizer

    assert_one_line_error(download("lm", "--release", "2"), "out/lm_512.pth")


def test_own_weights_are_never_overwritten(hub, download, tmp_path, published_tokenizer):
    hub.models[WEIGHTS] = {"lm_512.pth": b"published"}
    hub.models[TOKENIZER] = published_tokenizer
    own = tmp_path / "out/lm_512.pth"
    own.parent.mkdir()
    own.write_bytes(b"my weights")

    result = download("lm", "--release", "2")

    assert_one_line_error(result, "out/lm_512.pth", "move it away")
    assert own.read_bytes() == b"my weights"
    assert not hub.fetched()


def test_own_weights_are_never_overwritten_from_the_cache_of_the_library(
    hub, download, tmp_path, published_tokenizer
):
    hub.models[WEIGHTS] = {"lm_512.pth": published_weights()}
    hub.models[TOKENIZER] = published_tokenizer
    code = f"from huggingface_hub import hf_hub_download; hf_hub_download({WEIGHTS!r}, 'lm_512.pth')"
    environment = environment_of(tmp_path, hub.endpoint) | {"HF_HUB_DISABLE_XET": "1"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)
    own = tmp_path / "out/lm_512.pth"
    own.parent.mkdir()
    own.write_bytes(b"my weights")

    result = download("lm", "--release", "2")

    assert_one_line_error(result, "out/lm_512.pth", "move it away")
    assert own.read_bytes() == b"my weights"


@pytest.fixture
def published(hub, tmp_path, published_tokenizer) -> Path:
    """A folder with what `lm` fetches, as if copied there: without what the library notes about its files."""
    hub.models[WEIGHTS] = {"lm_512.pth": published_weights()}
    hub.models[TOKENIZER] = published_tokenizer
    out = tmp_path / "out"
    (out / "minimind2-tokenizer").mkdir(parents=True)
    (out / "lm_512.pth").write_bytes(hub.models[WEIGHTS]["lm_512.pth"])
    for name, content in published_tokenizer.items():
        (out / "minimind2-tokenizer" / name).write_bytes(content)
    return out


def test_complete_files_are_recognised_by_their_content(hub, download, published):
    result = download("lm", "--release", "2")

    assert result.returncode == 0, result.stderr
    assert not hub.fetched()
    assert "to download" not in result.stdout
    for name in ("lm_512.pth", "minimind2-tokenizer/tokenizer.json"):
        assert re.search(rf"out/{name}: \S+B already here", result.stdout)
    assert (published / "lm_512.json").exists()


@pytest.mark.parametrize("name", ["lm_512.pth", "minimind2-tokenizer/tokenizer.json"])
def test_file_of_the_same_length_and_an_old_time_is_not_taken_for_the_published_one(
    hub, download, published, name
):
    own, sidecar = published / name, published / "lm_512.json"
    content = own.read_bytes()[:-1] + b"!"
    own.write_bytes(content)
    os.utime(own, (1, 1))
    sidecar.write_text("mine")

    result = download("lm", "--release", "2")

    assert_one_line_error(result, f"out/{name} exists and differs from the published file", "move it away")
    assert own.read_bytes() == content
    assert sidecar.read_text() == "mine"
    assert not hub.fetched()


def test_file_changed_after_the_download_is_not_overwritten(hub, download, tmp_path):
    hub.datasets[DATASET] = {"sft_data.jsonl": b"{}\n"}
    assert download("dataset").returncode == 0
    own = tmp_path / "dataset/sft_data.jsonl"
    own.write_bytes(b"{}!")
    os.utime(own, (1, 1))

    result = download("dataset")

    assert_one_line_error(result, "sft_data.jsonl exists and differs from the published file")
    assert own.read_bytes() == b"{}!"
    assert hub.fetched() == ["sft_data.jsonl"]


# --- dataset


def zip_of(files: dict[str, bytes], links: dict[str, str] | None = None) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        for name, target in (links or {}).items():
            info = zipfile.ZipInfo(name)
            info.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(info, target)
    return buffer.getvalue()


def tar_of(files: dict[str, bytes], links: dict[str, str] | None = None) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)
    return buffer.getvalue()


def test_dataset_is_extracted_once_and_archives_are_deleted(hub, download, tmp_path):
    hub.datasets[DATASET] = {
        "README.md": b"not needed",
        "pretrain_data.jsonl": b"{}\n",
        "pretrain_images.zip": zip_of({"pretrain_images/a.jpg": b"a", "pretrain_images/b/c.jpg": b"c"}),
        "sft_images.zip": zip_of({"d.jpg": b"d"}),  # without a folder of its own
        "eval_images.tar.gz": tar_of({"eval_images/e.jpg": b"e"}),
    }

    first = download("dataset")
    fetched = hub.fetched()
    second = download("dataset")

    assert first.returncode == 0, first.stderr
    assert second.returncode == 0, second.stderr
    names = ["eval_images.tar.gz", "pretrain_data.jsonl", "pretrain_images.zip", "sft_images.zip"]
    assert sorted(fetched) == names
    assert hub.fetched() == fetched
    assert "pretrain_data.jsonl: 3.00B already here" in second.stdout
    assert "to download" not in second.stdout
    assert "dataset/sft_images is up to date, skipped" in second.stdout
    assert "dataset/sft_images.zip is extracted to dataset/sft_images and deleted" in first.stdout
    folder = tmp_path / "dataset"
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix in {".jpg", ".jsonl"}}
    pictures = {"pretrain_images/a.jpg", "pretrain_images/b/c.jpg", "sft_images/d.jpg", "eval_images/e.jpg"}
    assert found == {"pretrain_data.jsonl"} | pictures
    assert published_names(folder) == ["eval_images", "pretrain_data.jsonl", "pretrain_images", "sft_images"]


def test_newer_archive_replaces_what_was_extracted_before(hub, download, tmp_path):
    hub.datasets[DATASET] = {"sft_images.zip": zip_of({"old.jpg": b"1"})}
    assert download("dataset").returncode == 0
    hub.datasets[DATASET] = {"sft_images.zip": zip_of({"new.jpg": b"2"})}
    (tmp_path / "dataset/sft_images/mine.jpg").write_bytes(b"mine")

    result = download("dataset")

    assert result.returncode == 0, result.stderr
    assert [path.name for path in (tmp_path / "dataset/sft_images").glob("*.jpg")] == ["new.jpg"]
    (before,) = (tmp_path / "dataset").glob("sft_images.before-*")
    assert sorted(path.name for path in before.glob("*.jpg")) == ["mine.jpg", "old.jpg"]
    assert f"dataset/{before.name} is what dataset/sft_images was" in result.stdout


def test_pictures_extracted_by_hand_are_left_alone(hub, download, tmp_path):
    hub.datasets[DATASET] = {"sft_images.zip": zip_of({"a.jpg": b"1"})}
    own = tmp_path / "dataset/sft_images/mine.jpg"
    own.parent.mkdir(parents=True)
    own.write_bytes(b"mine")

    result = download("dataset")

    assert result.returncode == 0, result.stderr
    assert "not extracted by this script, skipped" in result.stdout
    assert [path.name for path in own.parent.iterdir()] == ["mine.jpg"]


@pytest.mark.parametrize(
    ("name", "archive", "problem"),
    [
        ("evil.zip", zip_of({"ok.jpg": b"1", "../../escaped": b"2"}), "leaves the folder"),
        ("evil.zip", zip_of({"ok.jpg": b"1", "/tmp/minimind_escaped": b"2"}), "leaves the folder"),
        ("evil.zip", zip_of({"ok.jpg": b"1", "a\\..\\..\\escaped": b"2"}), "leaves the folder"),
        ("evil.zip", zip_of({"ok.jpg": b"1"}, links={"link": "/etc"}), "is a link"),
        ("evil.tar.gz", tar_of({"ok.jpg": b"1", "../../escaped": b"2"}), "leaves the folder"),
        ("evil.tar.gz", tar_of({"ok.jpg": b"1"}, links={"link": "/etc"}), "is a link"),
        ("evil.zip", b"no archive at all", "cannot be extracted"),
    ],
    ids=[
        "zip-traversal",
        "zip-absolute",
        "zip-backslash",
        "zip-symlink",
        "tar-traversal",
        "tar-symlink",
        "garbage",
    ],
)
def test_malicious_archive_is_refused_as_a_whole(hub, download, tmp_path, name, archive, problem):
    hub.datasets[DATASET] = {name: archive}

    result = download("dataset")

    assert_one_line_error(result, f"dataset/{name}", problem)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path.name for path in files if not {"hf_home", ".cache"} & set(path.parts)] == [name]
    assert not list(tmp_path.rglob("*escaped*"))
    assert not (tmp_path / "dataset/evil").exists()
    assert not Path("/tmp/minimind_escaped").exists()


def test_archive_larger_than_the_free_disk_is_not_extracted(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("download", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "download", script)
    spec.loader.exec_module(script)
    archive = tmp_path / "bomb.zip"
    archive.write_bytes(zip_of({"zeros.jpg": bytes(1_000_000)}))
    usage = type("Usage", (), {"free": 999_999})()
    monkeypatch.setattr(script.shutil, "disk_usage", lambda _: usage)

    with pytest.raises(script.UserError, match=r"unpacks to 1\.00MB"):
        script.extract(archive, tmp_path / "bomb")

    assert not (tmp_path / "bomb").exists()


# --- interruptions, space, errors


@pytest.fixture(scope="module")
def long_file() -> bytes:
    return random.Random(0).randbytes(PIECE + 2_000_000)


def test_cut_connection_is_resumed_within_the_run(hub, download, tmp_path, long_file):
    hub.datasets[DATASET] = {"sft_data.jsonl": long_file}
    hub.cut_once["sft_data.jsonl"] = PIECE + 1_000_000

    result = download("dataset")

    assert result.returncode == 0, result.stderr
    assert hub.ranges("sft_data.jsonl") == [None, f"bytes={PIECE}-"]
    assert (tmp_path / "dataset/sft_data.jsonl").read_bytes() == long_file


def test_ctrl_c_leaves_nothing_half_written_and_a_second_run_completes(hub, download, tmp_path, long_file):
    hub.datasets[DATASET] = {"pretrain_data.jsonl": b"{}\n", "sft_data.jsonl": long_file}
    hub.stall_once["sft_data.jsonl"] = PIECE + 1_000_000
    folder = tmp_path / "dataset"

    with start(tmp_path, hub.endpoint, "dataset", HF_HUB_DOWNLOAD_TIMEOUT="60") as process:
        deadline = time.monotonic() + 60
        while not any(path.stat().st_size >= PIECE for path in folder.rglob("*.incomplete")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)

    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert published_names(folder) == ["pretrain_data.jsonl"]
    assert not list(folder.rglob("*.incomplete"))
    result = download("dataset")
    assert result.returncode == 0, result.stderr
    assert hub.fetched() == ["pretrain_data.jsonl", "sft_data.jsonl", "sft_data.jsonl"]
    assert hub.ranges("sft_data.jsonl") == [None, None]
    assert (folder / "sft_data.jsonl").read_bytes() == long_file


def test_content_that_arrived_damaged_is_found_by_the_next_run(hub, download):
    hub.datasets[DATASET] = {"sft_data.jsonl": b"{}\n"}
    hub.damaged.add("sft_data.jsonl")
    assert download("dataset").returncode == 0  # the library compares sizes

    assert_one_line_error(download("dataset"), "dataset/sft_data.jsonl exists and differs from the published")


def test_only_files_in_the_root_of_a_repository_count(hub, download, tmp_path):
    names = ["sft_data.jsonl", "old/sft_data.jsonl", "../escaped.jsonl", "..\\escaped.jsonl", "...zip"]
    hub.datasets[DATASET] = dict.fromkeys(names, b"{}\n")

    result = download("dataset")

    assert result.returncode == 0, result.stderr
    assert hub.fetched() == ["sft_data.jsonl"]
    assert published_names(tmp_path / "dataset") == ["sft_data.jsonl"]
    assert not list(tmp_path.rglob("*escaped*"))


def test_too_little_disk_space_stops_before_the_first_byte(hub, download, tmp_path):
    hub.models[CLIP] = clip_repository("model.safetensors")
    hub.datasets[DATASET] = {"sft_images.zip": zip_of({"a.jpg": b"1"})}
    hub.claimed_sizes["sft_images.zip"] = 3 * 10**15

    result = download("clip", "dataset")

    assert_one_line_error(result, "not enough space", "6.00PB needed")
    assert "dataset/sft_images.zip: 3.00PB to download" in result.stdout
    assert not hub.fetched()
    assert not (tmp_path / "dataset").exists()


def test_missing_repository_is_one_line_with_the_endpoint(hub, download):
    assert_one_line_error(download("clip"), hub.endpoint, "404", CLIP, "HF_ENDPOINT")


def test_gated_repository_asks_for_a_token(hub, download):
    hub.datasets[DATASET] = {"sft_data.jsonl": b"{}\n"}
    hub.gated.add(DATASET)

    assert_one_line_error(download("dataset"), hub.endpoint, "accept its terms", "HF_TOKEN")


def test_file_that_the_hub_refuses_is_one_line_with_the_endpoint(hub, download, tmp_path):
    hub.datasets[DATASET] = {"sft_data.jsonl": b"{}\n"}
    hub.refused.add("sft_data.jsonl")

    assert_one_line_error(download("dataset"), f"from {hub.endpoint}: 403", "sft_data.jsonl", "HF_ENDPOINT")
    assert published_names(tmp_path / "dataset") == []


def test_no_server_is_one_line_with_the_endpoint(download):
    result = download("lm", HF_ENDPOINT="http://127.0.0.1:9")

    assert_one_line_error(result, "cannot fetch from http://127.0.0.1:9", "HF_ENDPOINT")


def test_no_server_is_told_even_where_every_file_is_here(hub, download):
    hub.datasets[DATASET] = {"sft_data.jsonl": b"{}\n"}
    assert download("dataset").returncode == 0

    result = download("dataset", HF_ENDPOINT="http://127.0.0.1:9")

    assert_one_line_error(result, "cannot fetch from http://127.0.0.1:9", "HF_ENDPOINT")


def test_missing_file_names_the_repository(hub, download, published_tokenizer):
    hub.models[WEIGHTS] = {"README.md": b""}
    hub.models[TOKENIZER] = published_tokenizer

    assert_one_line_error(download("vlm", "--release", "2"), WEIGHTS, "_vlm_512")


def test_token_goes_to_the_hub_and_not_to_its_cdn(hub, download):
    hub.datasets[DATASET] = {"sft_data.jsonl": b"{}\n"}

    result = download("dataset", HF_TOKEN="hf_secret")

    assert result.returncode == 0, result.stderr
    sent = {request.path.split("/")[1]: request.authorization for request in hub.requests}
    assert sent == {"api": "Bearer hf_secret", "datasets": "Bearer hf_secret", "cdn": None}


def test_unknown_name_is_a_usage_error(download):
    result = download("clips")

    assert result.returncode == 2
    assert "invalid choice: 'clips'" in result.stderr


# --- release 3


RELEASE_3 = "jingyaogong/minimind-3v-pytorch", "jingyaogong/minimind-3v"
SIGLIP = "jingyaogong/siglip2-base-p32-256-ve"
GOLDEN_SIGLIP = ROOT / "tests/golden/v3/siglip"


@pytest.fixture
def published_3(hub, tmp_path_factory) -> None:
    """What release 3 publishes, in small."""
    folder = tmp_path_factory.mktemp("tokenizer3")
    make_tokenizer().save_pretrained(folder)
    small = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    vlm = as_pth(make_state(small, encoder=GOLDEN_SIGLIP))
    hub.models[RELEASE_3[0]] = {
        "llm_768.pth": as_pth(make_state(small, visual=False)),
        "sft_vlm_768.pth": vlm,
        "sft_vlm_768_moe.pth": as_pth(make_state(small | {"use_moe": True}, encoder=GOLDEN_SIGLIP)),
        "sft_vlm_512.pth": vlm,
    }
    hub.models[RELEASE_3[1]] = as_files(folder) | {"model.safetensors": b"not needed", "model.py": b"1 / 0"}
    hub.models[SIGLIP] = as_files(GOLDEN_SIGLIP) | {"README.md": b"not needed"}


def test_release_3_is_the_default_and_comes_described(hub, download, tmp_path, published_3):
    result = download("encoder", "lm", "vlm")

    assert result.returncode == 0, result.stderr
    out = tmp_path / "out"
    weights = ["llm_768.pth", "sft_vlm_768.pth", "sft_vlm_768_moe.pth"]
    assert sorted(path.name for path in out.glob("*.pth")) == weights
    sidecars = [json.loads((out / name).with_suffix(".json").read_text()) for name in weights]
    assert [sidecar["stage"] for sidecar in sidecars] == ["llm", "sft_vlm", "sft_vlm"]
    for sidecar in sidecars:
        assert sidecar["tokenizer"]["path"] == "out/minimind3-tokenizer"
        config = sidecar["config"]
        assert config["qk_norm"] and (config["num_attention_heads"], config["num_key_value_heads"]) == (4, 2)
    assert sidecars[2]["config"]["use_moe"] and sidecars[2]["config"]["num_experts_per_tok"] == 1
    kept = {path.name for path in (out / "minimind3-tokenizer").iterdir()} - {".cache"}
    assert {"tokenizer.json", "tokenizer_config.json"} <= kept and "model.py" not in kept
    encoder = tmp_path / "model/vision_model/siglip2-base-p32-256-ve"
    found, _ = MiniMindVLM.get_vision_model(encoder)
    expected, _ = MiniMindVLM.get_vision_model(GOLDEN_SIGLIP)
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), expected.parameters(), strict=True))
    assert "already complete, skipped" in download("siglip2", "--release", "2").stdout


PICTURES = [f"picture {i} ".encode() * 4000 for i in range(40)]


def parquet_rows(count: int) -> list[dict]:
    return [{"conversations": f'[{{"row": {i}}}]', "image_bytes": [PICTURES[i % 40]]} for i in range(count)]


@pytest.fixture
def parquet(hub, tmp_path_factory) -> bytes:
    """Five row groups of 400 rows over 40 pictures; the other stage has another file."""
    file = tmp_path_factory.mktemp("parquet") / "sft.parquet"
    table = pa.Table.from_pylist(parquet_rows(2000))
    pq.write_table(table, file, row_group_size=400, dictionary_pagesize_limit=2**30, compression="none")
    hub.datasets[DATASET] = {"sft_i2t.parquet": file.read_bytes(), "pretrain_i2t.parquet": b"other"}
    return file.read_bytes()


def test_one_part_of_the_data_is_fetched_alone(hub, download, tmp_path, parquet):
    hub.datasets[DATASET] |= {"sft_data.jsonl": b"{}\n", "sft_images.zip": b"not needed"}
    result = download("dataset", "--part", "sft")
    assert result.returncode == 0, result.stderr
    assert published_names(tmp_path / "dataset") == ["sft_i2t.parquet"]
    assert (tmp_path / "dataset/sft_i2t.parquet").read_bytes() == parquet


def test_release_2_takes_its_own_files_where_they_are(hub, download, tmp_path, parquet):
    hub.datasets[DATASET] |= {"sft_data.jsonl": b"{}\n", "sft_images.zip": zip_of({"a.png": b"a"})}
    assert download("dataset", "--part", "sft", "--release", "2").returncode == 0
    assert published_names(tmp_path / "dataset") == ["sft_data.jsonl", "sft_images"]


@pytest.mark.parametrize("count", [1, 401, 5000])
def test_the_first_rows_are_fetched_by_ranges(hub, download, tmp_path, parquet, count):
    result = download("dataset", "--part", "sft", "--max_rows", str(count))

    assert result.returncode == 0, result.stderr
    target = tmp_path / f"dataset/sft_i2t-first-{count}.parquet"
    assert published_names(tmp_path / "dataset") == [target.name]
    assert pq.read_table(target).to_pylist() == parquet_rows(min(count, 2000))
    assert target.stat().st_size < 1.1 * len(PICTURES) * len(PICTURES[0])  # each once
    sent = [re.fullmatch(r"bytes=(\d+)-(\d+)", asked) for asked in hub.ranges("sft_i2t.parquet")]
    fetched = sum(int(one[2]) - int(one[1]) + 1 for one in sent)
    groups = -(-min(count, 2000) // 400)
    assert fetched < len(parquet) * (groups / 5 + 0.1)
    hub.requests.clear()
    assert "already there, skipped" in download("dataset", "--part", "sft", "--max_rows", str(count)).stdout
    assert not hub.requests


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "has no sft_i2t.parquet"), (b"PAR1 but no more", "is no readable Parquet")],
    ids=["missing", "damaged"],
)
def test_first_rows_that_cannot_be_had_are_told_in_one_line(hub, download, tmp_path, content, message):
    hub.datasets[DATASET] = {"README.md": b"", **({"sft_i2t.parquet": content} if content else {})}
    assert_one_line_error(download("dataset", "--part", "sft", "--max_rows", "5"), message)
    assert not list(tmp_path.glob("dataset/*.parquet"))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("clip lm", "clip does not go with the models of release 3: download.py encoder lm --release 2"),
        ("siglip2 vlm --release 2", "siglip2 does not go with the models of release 2: download.py encoder"),
        ("lm --part sft", "--part and --max_rows are for dataset"),
        ("lm --max_rows 5", "--part and --max_rows are for dataset"),
        ("dataset --max_rows 0", "--max_rows must be above 0, found 0"),
        ("clip siglip2 --vision_model_path x", "several encoders are named"),
    ],
)
def test_names_and_flags_that_do_not_go_together_are_a_usage_error(hub, download, command, message):
    result = download(*command.split())
    assert result.returncode == 2 and message in result.stderr
    assert not hub.requests
