"""`convert_to_hf.py`: an export that lives without this repository, the way back, and everything refused."""

import json
import os
import platform
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, save_dinov2
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig, CompileConfig

from common.setup import build_vlm
from common.tokenizer import load_tokenizer
from common.weights import describe, half_state, save_weights
from convert import minimind
from convert.export import exact_half
from convert.minimind import required_transformers
from inference.trained import load_vlm
from model.model_vlm import MiniMindVLM
from model.processing_vlm import MiniMindVLMProcessor

ENCODER = ROOT / "tests" / "golden" / "clip"
TOKENIZER = ROOT / "model" / "tokenizer"
TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
NEW_TOKENS = 8

# What a stranger does with an export: prints JSON, saves logits. Arguments: export, pictures, file of logits.
STRANGER = """
import json, sys
from pathlib import Path

opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)

import torch
from PIL import Image
from transformers import (
    AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, pipeline
)

folder, pictures, logits_file, new_tokens = sys.argv[1], sys.argv[2].split(","), sys.argv[3], int(sys.argv[4])
pictures = [Image.open(picture) for picture in pictures]
chats = []
for count in range(3):
    content = [{"type": "image", "image": picture} for picture in pictures[:count]]
    chats.append([{"role": "user", "content": [*content, {"type": "text", "text": "What is this?"}]}])

found = {}
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
found["config"] = [config.model_type, config.vision_config.model_type, len(config.image_ids)]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
found["roundtrip"] = tokenizer.decode(tokenizer.encode("一只 cat@home"))
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
found["dtype"] = str(model.dtype)
found["tied"] = model.lm_head.weight is model.model.embed_tokens.weight
found["loaded_from"] = [type(model).__module__, type(processor).__module__]
found["image_processor"] = type(processor.image_processor).__name__
greedy = {"max_new_tokens": new_tokens}
template = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
logits, found["greedy"] = [], []
with torch.no_grad():
    for chat in chats:
        inputs = processor.apply_chat_template(chat, **template)
        logits.append(model(**inputs).logits)
        output = model.generate(**inputs, **greedy)
        found["greedy"].append(output[0, inputs["input_ids"].shape[1] :].tolist())
    inputs = processor.apply_chat_template(chats, **template)
    answers = model.generate(**inputs, **greedy)[:, inputs["input_ids"].shape[1] :]
    found["batch"] = processor.batch_decode(answers, skip_special_tokens=True)
    causal = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    inputs = processor.apply_chat_template(chats[2], **template)
    found["causal_equal"] = torch.equal(causal(**inputs).logits, logits[2])
    half = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)
    found["half_dtypes"] = sorted({str(parameter.dtype) for parameter in half.parameters()})
    found["half_finite"] = bool(half(**inputs).logits.isfinite().all())
torch.save(logits, logits_file)

ask = pipeline("image-text-to-text", model=folder, trust_remote_code=True)
options = {"return_full_text": False, "generate_kwargs": greedy}
found["pipeline"] = [ask(chat, **options)[0]["generated_text"] for chat in chats]
found["pipeline_list"] = [answer[0]["generated_text"] for answer in ask(chats, **options)]
content = [{"type": "image", "image": pictures[1]}, {"type": "text", "text": "How many do you see of it?"}]
longer = [{"role": "user", "content": content}]
found["pipeline_longer"] = ask(longer, **options)[0]["generated_text"]
batch = ask([chats[1], longer], batch_size=2, **options)  # equal numbers of images: the library's limit
found["pipeline_batch"] = [answer[0]["generated_text"] for answer in batch]
found["pipeline_text"] = ask(images=pictures[:1], text="<image> a", **options)[0]["generated_text"]
write = pipeline("text-generation", model=folder, trust_remote_code=True)
texts = ("What is this?", "Hello, what can you do for me?")
text_chats = [[{"role": "user", "content": text}] for text in texts]
for size in (1, 2):
    answers = write(text_chats, return_full_text=False, batch_size=size, **greedy)
    found[f"text_generation_{size}"] = [answer[0]["generated_text"] for answer in answers]
found["opened"] = opened
print(json.dumps(found))
"""


def make_weights(folder: Path, encoder: Path = ENCODER, **config) -> Path:
    """A random model, loud enough for every weight to matter, saved as training saves it."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(str(TOKENIZER))
    model, _ = build_vlm(TINY | config, str(encoder), tokenizer)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if not key.startswith("vision_encoder.") and parameter.dim() > 1:
                parameter.mul_(5)
    path = folder / "tiny.pth"
    arguments = {"vision_model_path": str(encoder), "note": "中文"}
    save_weights(path, half_state(model.state_dict()), describe(model, tokenizer, "sft_vlm", 7, arguments))
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return make_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def export(weights, tmp_path_factory) -> tuple[Path, str]:
    """The weights' export, made by the script as users run it, and what that printed."""
    folder = tmp_path_factory.mktemp("export") / "nested" / "tiny-v1.0"
    result = run_script("--weight", weights, "--out", folder)
    assert result.returncode == 0, result.stderr
    return folder, result.stdout + result.stderr


@pytest.mark.parametrize(("mask", "mode"), [(0o077, 0o600), (0o002, 0o664)])
def test_an_exports_files_have_the_mode_that_the_umask_leaves(mask, mode, weights, convert, tmp_path):
    before = os.umask(mask)
    try:
        assert convert("--weight", weights, "--out", tmp_path / "hf")[0] == 0
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "hf").iterdir()} == {mode}


def run_script(*arguments, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "convert_to_hf.py", *arguments]
    return subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


def environment(**more: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PYTHON"))}
    return kept | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | more


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- the export


def test_export_works_without_the_repository(weights, export, tmp_path):
    folder, _ = export
    pictures = [tmp_path / "a.png", tmp_path / "b.png"]
    generator = np.random.default_rng(0)
    for picture, size in zip(pictures, [(30, 50), (64, 64)], strict=True):
        Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)).save(picture)
    expected_logits, expected_greedy, texts = answers_of_source(weights, pictures)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    result = subprocess.run(
        [
            sys.executable,
            "-I",
            "-c",
            STRANGER,
            folder,
            ",".join(map(str, pictures)),
            "logits.pt",
            str(NEW_TOKENS),
        ],
        cwd=elsewhere,
        env=environment(HF_HOME=str(tmp_path / "hf_home")),
        capture_output=True,
        text=True,
        timeout=120,
    )

    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    for logits, expected in zip(torch.load(elsewhere / "logits.pt"), expected_logits, strict=True):
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    assert found["greedy"] == expected_greedy
    assert found["pipeline"] == found["pipeline_list"] == found["batch"] == texts
    assert found["pipeline_batch"] == [texts[1], found["pipeline_longer"]]
    assert found["text_generation_1"] == found["text_generation_2"]
    assert found["text_generation_1"][0] == texts[0]
    assert isinstance(found["pipeline_text"], str)
    assert found["config"] == ["minimind-v", "clip_vision_model", 196]
    assert found["roundtrip"] == "一只 cat@home"
    assert found["dtype"] == "torch.float32"
    assert found["tied"] and found["causal_equal"] and found["half_finite"]
    assert found["half_dtypes"] == ["torch.bfloat16"]
    assert found["image_processor"] == "CLIPImageProcessorPil"
    assert all(module.startswith("transformers_modules.") for module in found["loaded_from"])
    own = [
        path for path in found["opened"] if path.startswith(f"{ROOT}/") and not path.startswith(sys.prefix)
    ]
    assert own == []
    assert "trust" not in result.stderr


def answers_of_source(
    weights: Path, pictures: list[Path]
) -> tuple[list[torch.Tensor], list[list[int]], list[str]]:
    """Logits, greedy ids and text of the `.pth` for the question with none, one and two of the pictures."""
    model, processor = load_vlm(str(weights), tokenizer_path=str(TOKENIZER))
    all_logits, all_greedy, texts = [], [], []
    for count in range(3):
        images = [Image.open(picture) for picture in pictures[:count]]
        content = "\n".join(["<image>"] * count + ["What is this?"])
        ids = processor.encode_prompt([{"role": "user", "content": content}], count)
        inputs = processor.batch([ids], [images])
        with torch.no_grad():
            all_logits.append(model(**inputs).logits)
            output = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)
        all_greedy.append(output[0, len(ids) :].tolist())
        texts.append(processor.decode(all_greedy[-1], skip_special_tokens=True))
    assert len(set(map(tuple, all_greedy))) > 1, "the pictures make no difference: this test shows nothing"
    return all_logits, all_greedy, texts


def test_export_is_complete_and_says_what_it_is(weights, export):
    folder, printed = export
    names = set(files(folder))
    assert names == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "example.jpg",
        "generation_config.json",
        "minimind_sidecar.json",
        "model.safetensors",
        "model_minimind.py",
        "model_vlm.py",
        "pictures.py",
        "processing_vlm.py",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert "largest difference" in printed
    generation = json.loads((folder / "generation_config.json").read_text())
    assert (generation["do_sample"], generation["max_new_tokens"]) == (False, 512)
    assert [generation[f"{name}_token_id"] for name in ("pad", "bos", "eos")] == [0, 1, 2]
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert (
        f"Python {platform.python_version()}, torch {torch.__version__.split('+')[0]}, transformers" in card
    )
    assert f"transformers {transformers.__version__}.\n" in card and "Needs transformers 5." in card
    assert "license: apache-2.0" in card and "`clip`" in card and "# tiny-v1.0" in card
    shared = (folder / "config.json").read_text() + (folder / "processor_config.json").read_text() + card
    assert str(ROOT) not in shared


def test_language_model_is_stored_once_and_as_in_the_pth(weights, export):
    stored = load_file(export[0] / "model.safetensors")
    source = torch.load(weights, weights_only=True)
    del source["lm_head.weight"]
    language = {key: value for key, value in stored.items() if not key.startswith("vision_encoder.")}
    assert language.keys() == source.keys()
    assert all(
        value.dtype == torch.float16 and torch.equal(value, source[key]) for key, value in language.items()
    )


def test_encoder_is_halved_only_where_nothing_is_lost():
    exact, inexact = torch.tensor([0.5, -2.0]), torch.tensor([0.1])
    assert {v.dtype for v in exact_half({"a": exact}).values()} == {torch.float16}
    assert {v.dtype for v in exact_half({"a": exact, "b": inexact}).values()} == {torch.float32}


# --- other ways to load it


@pytest.fixture(scope="module")
def asked(export) -> tuple[list[dict], list[torch.Tensor], list[torch.Tensor]]:
    """Questions about none, one and two pictures; greedy ids and logits of the export as it is."""
    processor = AutoProcessor.from_pretrained(export[0], trust_remote_code=True)
    model = load(export[0])
    pictures = [Image.radial_gradient("L"), Image.linear_gradient("L").rotate(30)]
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
    inputs = []
    for count in range(3):
        content = [{"type": "image", "image": picture} for picture in pictures[:count]]
        content.append({"type": "text", "text": "What is this?"})
        inputs.append(processor.apply_chat_template([{"role": "user", "content": content}], **options))
    return inputs, [answer(model, each) for each in inputs], [logits_of(model, each) for each in inputs]


def load(folder: Path, **options) -> MiniMindVLM:
    return AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, **options).eval()


def answer(model: MiniMindVLM, inputs: dict, **options) -> list[list[int]]:
    return model.generate(**inputs, max_new_tokens=NEW_TOKENS, **options).tolist()


@torch.no_grad()
def logits_of(model: MiniMindVLM, inputs: dict) -> torch.Tensor:
    return model(**inputs).logits


@pytest.mark.parametrize("room", [None, "1MB"], ids=["it fits", "the rest on the disk"])
def test_accelerate_places_it(export, asked, tmp_path, room):
    limit = {"max_memory": {"cpu": room}, "offload_folder": tmp_path} if room else {}

    model = load(export[0], device_map="auto", **limit)

    inputs, greedy, _ = asked
    assert ("disk" in getattr(model, "hf_device_map", {}).values()) == (room is not None)
    assert [answer(model, each) for each in inputs] == greedy


def test_bf16_is_bf16_throughout(export, asked):
    model = load(export[0], device_map="auto", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    for inputs, _, logits in zip(*asked, strict=True):
        found = logits_of(model, inputs)
        assert (found.shape, found.dtype) == (logits.shape, torch.bfloat16)
        assert (found - logits).abs().max() < 0.1 * logits.abs().max()
        assert len(answer(model, inputs)[0]) == inputs["input_ids"].shape[1] + NEW_TOKENS


INDUCTOR = pytest.param("inductor", True, marks=pytest.mark.slow)
MIXTURE = pytest.param("eager", False, marks=pytest.mark.slow)


@pytest.mark.parametrize(("backend", "is_dense"), [("eager", True), INDUCTOR, MIXTURE])
def test_a_static_cache_is_compiled(export, asked, convert, tmp_path, backend, is_dense):
    """As `generate` compiles a step by itself on a GPU: in one graph, but for a mixture's experts."""
    folder, (inputs, greedy, _) = export[0], asked
    if not is_dense:
        folder = tmp_path / "hf"
        assert convert("--weight", make_weights(tmp_path, use_moe=True), "--out", folder)[0] == 0
        greedy = [answer(load(folder), each) for each in inputs]
    model, mode = load(folder), "default" if backend == "inductor" else None
    settings = CompileConfig(backend=backend, mode=mode, fullgraph=is_dense)
    settings._compile_all_devices = True
    options = {"cache_implementation": "static", "compile_config": settings}

    assert [answer(model, each, **options) for each in inputs] == greedy
    assert model._compiled_call


def test_eight_bits_are_enough(export, asked):
    pytest.importorskip("bitsandbytes")

    model = load(export[0], device_map="cpu", quantization_config=BitsAndBytesConfig(load_in_8bit=True))

    assert model.vision_proj.vision_proj[0].weight.dtype == torch.int8
    inputs, greedy, logits = asked
    for each, expected, exact in list(zip(inputs, greedy, logits, strict=True)):
        assert (logits_of(model, each) - exact).abs().max() < 0.1 * exact.abs().max()
        assert len(answer(model, each)[0]) == len(expected[0])
    assert answer(model, inputs[1]) == greedy[1]


# --- and back


@pytest.mark.parametrize(
    "config",
    [{}, {"use_moe": True}, {"pixel_shuffle": 2}, {"pixel_shuffle": 7, "projector": "mlp"}],
    ids=["dense", "moe", "49_tokens", "4_tokens"],
)
def test_round_trip_gives_the_same_bytes(convert, tmp_path, config):
    source = make_weights(tmp_path, **config)

    assert convert("--weight", source, "--out", tmp_path / "hf")[0] == 0
    assert convert("--to_torch", tmp_path / "hf", "--out", tmp_path / "back" / "again.pth")[0] == 0

    assert (tmp_path / "back/again.pth").read_bytes() == source.read_bytes()
    assert (tmp_path / "back/again.json").read_bytes() == source.with_suffix(".json").read_bytes()


def test_an_encoder_with_registers_and_other_preprocessing_is_exported(convert, tmp_path):
    """Its config speaks of 25 patches, its preprocessing makes 16."""
    source = make_weights(tmp_path, save_dinov2(tmp_path / "dinov2", registers=4))

    assert convert("--weight", source, "--out", tmp_path / "hf") == (0, "")

    model, processor = load_vlm(str(tmp_path / "hf"))
    assert len(model.config.image_ids) == processor.tokens_per_image == 16
    card = (tmp_path / "hf/README.md").read_text(encoding="utf-8")
    assert "(dinov2_with_registers, 16 tokens per image)" in card


def test_bare_pth_is_exported_and_comes_back(convert, tmp_path):
    """As the published files are: no sidecar, so encoder and tokenizer are flags, and 8 and 2 heads."""
    source = make_weights(tmp_path, num_attention_heads=8, pixel_shuffle=2)
    source.with_suffix(".json").unlink()
    flags = ["--vision_model_path", ENCODER, "--tokenizer_path", TOKENIZER]

    assert convert("--weight", source, "--out", tmp_path / "hf", *flags)[0] == 0
    assert convert("--to_torch", tmp_path / "hf", "--out", tmp_path / "back.pth")[0] == 0

    assert (tmp_path / "back.pth").read_bytes() == source.read_bytes()


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "1MB"}], ids=["whole", "shards"])
def test_a_folder_saved_by_a_loaded_export_comes_back(convert, weights, export, tmp_path, caplog, options):
    """`save_pretrained` of model and processor, as after somebody's own training: without our sidecar."""
    model = AutoModelForImageTextToText.from_pretrained(export[0], trust_remote_code=True)
    model.save_pretrained(tmp_path / "saved", **options)
    AutoProcessor.from_pretrained(export[0], trust_remote_code=True).save_pretrained(tmp_path / "saved")

    back = tmp_path / "back.pth"
    assert convert("--to_torch", tmp_path / "saved", "--out", back)[0] == 0

    unknown = "stage, step, arguments and the encoder's folder are unknown (see --vision_model_path)"
    assert caplog.messages[0] == f"warning: {tmp_path / 'saved'} has no minimind_sidecar.json: {unknown}"
    expected, found = (torch.load(path, weights_only=True) for path in (weights, back))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    known, sidecar = (json.loads(path.with_suffix(".json").read_text()) for path in (weights, back))
    assert sidecar.keys() == {"config", "tokenizer", "encoder"}
    assert sidecar["config"] == known["config"]
    assert sidecar["tokenizer"]["fingerprint"] == known["tokenizer"]["fingerprint"]
    assert sidecar["encoder"] == known["encoder"] | {"path": None}
    loaded, _ = load_vlm(str(back), str(ENCODER))
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_a_folder_that_others_saved_is_not_replaced(convert, weights, export, tmp_path):
    out = tmp_path / "saved"
    shutil.copytree(export[0], out)
    (out / "minimind_sidecar.json").unlink()
    before = files(out)

    code, message = convert("--weight", weights, "--out", out)

    assert (code, "is not empty and not an export" in message) == (1, True)
    assert files(out) == before


def test_previous_export_is_replaced(convert, weights, tmp_path):
    first = make_weights(tmp_path, num_hidden_layers=1)
    out = tmp_path / "hf"
    assert convert("--weight", first, "--out", out)[0] == 0
    (out / "left_over.txt").write_text("from the first export")

    assert convert("--weight", weights, "--out", out)[0] == 0

    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 2
    assert not (out / "left_over.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "tiny.json", "tiny.pth"]


# --- what is refused


@pytest.mark.parametrize("kind", ["AutoConfig", "AutoProcessor", "AutoModelForImageTextToText", "pipeline"])
@pytest.mark.parametrize("version", ["4.57.1", "5.22.3.dev0"])
def test_an_older_transformers_is_told_in_two_lines(export, tmp_path, monkeypatch, kind, version):
    folder = tmp_path / tmp_path.name  # the library keeps modules by the folder's name
    shutil.copytree(export[0], folder)
    monkeypatch.setattr(transformers, "__version__", version)
    with pytest.raises(ImportError) as error:
        if kind == "pipeline":
            transformers.pipeline("image-text-to-text", str(folder), trust_remote_code=True)
        else:
            getattr(transformers, kind).from_pretrained(folder, trust_remote_code=True)
    needed = required_transformers()
    assert str(error.value).splitlines() == [
        f"this model needs transformers {needed} or newer, but {version} is installed",
        f"upgrade it: pip install -U 'transformers>={needed}'",
    ]


def test_exported_code_is_ours_with_a_check_after_the_docstring(export):
    found = (export[0] / "model_vlm.py").read_text(encoding="utf-8")
    ours = (ROOT / "model/model_vlm.py").read_text(encoding="utf-8")
    docstring = ours[: ours.index('"""', 3) + 4]
    check = found.removeprefix(docstring).removesuffix(ours.removeprefix(docstring))
    assert found == docstring + check + ours.removeprefix(docstring)
    assert check.startswith("\nimport transformers\n\nif ") and max(map(len, found.splitlines())) <= 110


@pytest.mark.parametrize("fault", ["weights", "nan", "processor", "generate"])
def test_export_that_differs_from_its_source_is_removed(convert, weights, tmp_path, monkeypatch, fault):
    if fault in ("weights", "nan"):
        half_state = minimind.half_state

        def corrupted(state_dict):
            state = half_state(state_dict)
            state["model.layers.1.self_attn.q_proj.weight"][0] += 1 if fault == "weights" else torch.nan
            return state

        monkeypatch.setattr(minimind, "half_state", corrupted)
    elif fault == "processor":
        to_dict = MiniMindVLMProcessor.to_dict
        monkeypatch.setattr(
            MiniMindVLMProcessor, "to_dict", lambda self: to_dict(self) | {"tokens_per_image": 98}
        )
    else:
        generate = MiniMindVLM.generate
        monkeypatch.setattr(MiniMindVLM, "generate", lambda self, **inputs: generate(self, **inputs) + 1)

    code, message = convert("--weight", weights, "--out", tmp_path / "hf")

    assert code == 1
    assert message.startswith("error: the export")
    assert list(tmp_path.iterdir()) == []


def test_full_disk_leaves_the_previous_export(export, weights):
    folder, _ = export
    before = files(folder)

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    result = run_script("--weight", weights, "--out", folder, preexec_fn=small_files)

    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].startswith(f"error: cannot write {folder}: ")
    assert "Traceback" not in result.stderr
    assert files(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_foreign_folder_is_left_alone(convert, weights, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    before = files(tmp_path)

    code, message = convert("--weight", weights, "--out", tmp_path)

    assert (code, f"--out {tmp_path} is not empty" in message) == (1, True)
    assert files(tmp_path) == before


BAD = {
    "missing weights": (1, "no such weights", "--weight", "{tmp}/none.pth", "--out", "{tmp}/hf"),
    "weights are a folder": (1, "is a folder", "--weight", "{export}", "--out", "{tmp}/hf"),
    "weights are text": (1, "text: not readable weights", "--weight", "{tmp}/text", "--out", "{tmp}/hf"),
    "out is a file": (1, "is a file", "--weight", "{weights}", "--out", "{tmp}/text"),
    "a file in the way": (1, "cannot write", "--weight", "{weights}", "--out", "{tmp}/text/hf"),
    "no encoder": (
        1,
        "no vision encoder",
        *"--weight {weights} --out {tmp}/hf --vision_model_path {tmp}/x".split(),
    ),
    "no tokenizer": (
        1,
        "no such folder",
        *"--weight {weights} --out {tmp}/hf --tokenizer_path {tmp}/x".split(),
    ),
    "not an export": (1, "expected a folder written", "--to_torch", str(ENCODER), "--out", "{tmp}/w.pth"),
    "missing export": (1, "expected a folder written", "--to_torch", "{tmp}/none", "--out", "{tmp}/w.pth"),
    "pth is a folder": (1, "is a folder", "--to_torch", "{export}", "--out", "{tmp}/folder.pth"),
    "neither way": (2, "either --weight or --to_torch", "--out", "{tmp}/hf"),
    "both ways": (2, "either --weight or --to_torch", *"--weight a --to_torch b --out {tmp}/hf".split()),
    "no out": (2, "--out", "--weight", "{weights}"),
    "not a pth": (2, "ends in .pth", "--to_torch", "{export}", "--out", "{tmp}/w.json"),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line(convert, weights, export, tmp_path, case):
    code, text, *arguments = case
    (tmp_path / "text").write_text("not weights")
    (tmp_path / "folder.pth").mkdir()
    before = sorted(tmp_path.iterdir())
    places = {"tmp": tmp_path, "weights": weights, "export": export[0]}

    found, message = convert(*(argument.format(**places) for argument in arguments))

    assert found == code
    assert "error: " in message and text in message
    assert sorted(tmp_path.iterdir()) == before


def test_damaged_export_is_named(convert, weights, tmp_path):
    assert convert("--weight", weights, "--out", tmp_path / "hf")[0] == 0
    os.truncate(tmp_path / "hf/model.safetensors", 100_000)

    code, message = convert("--to_torch", tmp_path / "hf", "--out", tmp_path / "w.pth")

    assert code == 1
    assert message.startswith(f"error: {tmp_path / 'hf'}: ")
    assert not (tmp_path / "w.pth").exists()
