"""`convert_to_hf.py --push_to_hub`: what arrives on the hub, by which transport, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from hub_stub import WRITER, HubStub
from huggingface_hub import constants, snapshot_download
from test_convert_to_hf import answers_of_source, environment, files, make_weights

from inference.hub import push
from inference.trained import SIDECAR

REPOSITORY = "me/tiny-v1.0"
PICTURE = ROOT / "dataset/eval_images/drawing_sailboat.png"
# Loads a repository as anybody does, and prints the answer's ids. Arguments: repository, picture.
STRANGER = """
import sys
from transformers import AutoModelForImageTextToText, AutoProcessor

repository, picture = sys.argv[1:]
processor = AutoProcessor.from_pretrained(repository, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(repository, trust_remote_code=True)
content = [{"type": "image", "path": picture}, {"type": "text", "text": "What is this?"}]
options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
inputs = processor.apply_chat_template([{"role": "user", "content": content}], **options)
print(model.generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :].tolist())
"""


@pytest.fixture(scope="module")
def hub():
    with HubStub() as stub:
        yield stub


def online(hub: HubStub, home: Path, **more: str) -> dict[str, str]:
    settings = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "NO_PROXY": "*", "HF_HUB_OFFLINE": "0"}
    return environment(**settings | more)


@pytest.fixture(scope="module")
def pushed(hub, tmp_path_factory) -> tuple[Path, Path, str]:
    """Weights, their export, and what was printed when it was pushed as users do it: by Xet."""
    folder = tmp_path_factory.mktemp("pushed")
    weights, out = make_weights(folder), folder / "export"
    sidecar = json.loads(weights.with_suffix(".json").read_text(encoding="utf-8"))
    sidecar["arguments"] |= {
        "data_path": ["out/data/a.jsonl", str(folder / "my data/b.jsonl"), "../elsewhere/c.jsonl"],
        "out_dir": "~/out",
        "from_weight": str(folder / 'a "quoted" one.pth'),
        "learning_rate": 1e-3,
    }
    weights.with_suffix(".json").write_text(json.dumps(sidecar, indent=2, ensure_ascii=False) + "\n")
    command = [sys.executable, ROOT / "convert_to_hf.py", "--weight", weights, "--out", out]
    result = subprocess.run(
        [*command, "--push_to_hub", REPOSITORY],
        env=online(hub, folder / "home", HF_TOKEN=WRITER),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return weights, out, result.stdout + result.stderr


@pytest.fixture
def here(hub, monkeypatch, tmp_path) -> HubStub:
    """The hub for this process, with a token and without Xet, as where hf_xet is not installed."""
    addresses = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", addresses)
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    monkeypatch.setenv("HF_TOKEN", WRITER)
    monkeypatch.setenv("NO_PROXY", "*")
    return hub


# --- what arrives


def test_all_files_arrive_in_one_commit_by_xet(hub, pushed):
    _, out, printed = pushed
    assert f"{out} -> {hub.endpoint}/{REPOSITORY}/commit/" in printed
    assert hub.commits[0]["files"] == sorted(files(out))
    paths = [request.path for request in hub.requests]
    assert "/xet/v1/shards" in paths and any(path.startswith("/xet/v1/xorbs/default/") for path in paths)
    assert not any("/lfs" in path for path in paths)


def test_a_download_is_the_export_but_for_paths_of_this_machine(here, pushed, convert_and_print, tmp_path):
    weights, out, _ = pushed

    downloaded = tmp_path / "downloaded"
    snapshot_download(REPOSITORY, local_dir=downloaded)

    found = {path.name: path.read_bytes() for path in downloaded.iterdir() if path.is_file()}
    assert {name: found[name] for name in found if name != SIDECAR} == {
        name: content for name, content in files(out).items() if name != SIDECAR
    }
    for name, content in found.items():
        assert not any(str(path).encode() in content for path in (ROOT, weights.parent, Path.home())), name
    known, sidecar = (json.loads((folder / SIDECAR).read_text("utf-8")) for folder in (out, downloaded))
    assert known == json.loads(weights.with_suffix(".json").read_text("utf-8"))
    arguments = {"vision_model_path": "clip", "from_weight": 'a "quoted" one.pth', "out_dir": "out"}
    arguments |= {"data_path": ["out/data/a.jsonl", "b.jsonl", "c.jsonl"]}
    assert sidecar["arguments"] == known["arguments"] | arguments
    known["encoder"]["path"], known["tokenizer"]["path"] = "clip", "tokenizer"
    assert sidecar == known | {"arguments": sidecar["arguments"]}

    assert convert_and_print("--to_torch", downloaded, "--out", tmp_path / "back.pth")[0] == 0
    assert (tmp_path / "back.pth").read_bytes() == weights.read_bytes()


def test_its_card_names_the_repository(here, pushed):
    card = here.models[REPOSITORY]["README.md"].decode()
    assert f"# {REPOSITORY}\n" in card
    assert f'pipeline("image-text-to-text", model="{REPOSITORY}", trust_remote_code=True)' in card


def test_anybody_loads_it_by_its_name(hub, pushed, tmp_path):
    weights, *_ = pushed
    _, greedy, _ = answers_of_source(weights, [PICTURE, PICTURE])

    result = subprocess.run(
        [sys.executable, "-I", "-c", STRANGER, REPOSITORY, PICTURE],
        cwd=tmp_path,
        env=online(hub, tmp_path / "home", HF_HUB_DISABLE_XET="1"),
        capture_output=True,
        text=True,
        timeout=120,
    )

    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == greedy[1]


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the library's own call
@pytest.mark.parametrize("part", [None, 300_000], ids=["whole", "parts"])
def test_large_files_arrive_by_lfs(here, pushed, monkeypatch, part):
    _, out, _ = pushed
    monkeypatch.setattr(here, "lfs_part", part)
    monkeypatch.setattr(here, "objects", {})
    repository = f"me/by-lfs-{part}"

    address = push(out, repository, SIDECAR)

    assert address.startswith(f"{here.endpoint}/{repository}/commit/")
    assert here.models[repository] == here.models[REPOSITORY]
    assert len(here.objects) == 2  # weights and picture
    stored = [request.path for request in here.requests if request.path.startswith("/lfs-store/")]
    assert len(stored) >= (8 if part else 2)


def test_the_same_again_makes_no_commit_and_another_export_one(here, pushed, tmp_path):
    _, out, _ = pushed
    push(out, "me/again", SIDECAR)
    before = len(here.commits)

    assert push(out, "me/again", SIDECAR).startswith(f"{here.endpoint}/me/again/commit/")
    assert len(here.commits) == before

    changed = tmp_path / "changed"
    changed.mkdir()
    for name, content in files(out).items():
        (changed / name).write_bytes(content)
    (changed / "README.md").write_bytes(files(out)["README.md"] + b"More.\n")
    push(changed, "me/again", SIDECAR)
    assert here.commits[-1]["files"] == ["README.md"]


# --- what is refused


REFUSED = {
    "no token": "no token: log in with `hf auth login`, or set HF_TOKEN",
    "wrong token": "Invalid username or password.",
    "namespace": "You don't have the rights to create a model under the namespace",
    "full": "Repository storage limit reached",
    "unreachable": "refused",
    "offline": "offline mode is enabled",
}


@pytest.mark.parametrize(("fault", "expected"), REFUSED.items(), ids=REFUSED)
def test_what_the_hub_refuses_is_one_line_and_the_export_stays(
    here, pushed, convert_and_print, monkeypatch, tmp_path, fault, expected
):
    repository, out = "others/tiny" if fault == "namespace" else "me/refused", tmp_path / "hf"
    if "token" in fault:
        monkeypatch.setenv("HF_TOKEN", "" if fault == "no token" else "hf_reader")
    elif fault == "full":
        monkeypatch.setattr(here, "full", {repository})
    elif fault == "unreachable":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    elif fault == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    code, printed = convert_and_print("--weight", pushed[0], "--out", out, "--push_to_hub", repository)

    *bars, message = printed.splitlines()  # the library shows what it uploads
    assert (code, [line for line in bars if line and "Upload" not in line]) == (1, [])
    assert message.startswith(f"error: --push_to_hub {repository}: ") and expected in message
    assert message.endswith(f"; {out} is complete and stays")
    assert files(out).keys() == files(pushed[1]).keys()
    assert not here.models.get(repository)


@pytest.mark.parametrize("name", ["tiny", "a/b/c", "me/", "me/ti ny", "https://hub/me/tiny"])
def test_a_name_that_is_none_is_told_before_anything_is_done(convert_and_print, pushed, tmp_path, name):
    code, printed = convert_and_print("--weight", pushed[0], "--out", tmp_path / "hf", "--push_to_hub", name)
    assert (code, f"error: --push_to_hub {name}: expected OWNER/NAME" in printed) == (2, True)
    assert list(tmp_path.iterdir()) == []


def test_the_way_back_pushes_nothing(convert_and_print, pushed, tmp_path):
    arguments = ["--to_torch", pushed[1], "--out", tmp_path / "back.pth", "--push_to_hub", REPOSITORY]
    code, printed = convert_and_print(*arguments)
    assert (code, "--to_torch takes no --push_to_hub" in printed) == (2, True)
