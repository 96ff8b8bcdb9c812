"""Targets in the library's own architectures: what they answer, and that they come back as they were."""

import json
import time
from pathlib import Path

import pytest
import release3
import torch
from conftest import GOLDEN, ROOT, golden_model, save_dinov2, start
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    InternVLForConditionalGeneration,
)

from common.setup import build_vlm
from common.tokenizer import load_tokenizer
from common.weights import describe, half_state, save_weights, translated
from convert import internvl
from convert.export import Source
from inference.trained import load_vlm
from model.processing_vlm import MiniMindVLMProcessor

TINY = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
ENCODERS = {2: GOLDEN / "clip", 3: GOLDEN / "v3/siglip"}
PICTURES = [Image.radial_gradient("L").convert("RGB"), Image.linear_gradient("L").resize((90, 60))]

MOE = {"use_moe": True}
# What a dense model's config says of mixtures: InternVL's and LLaVA's do not.
IDLE = {"seq_aux", "n_shared_experts", "norm_top1_prob", "num_experts_per_tok", "aux_loss_alpha"}
CASES = {  # release, target, largest difference of a logit, config
    "dense": (2, "llava", 0, {}),
    "untied": (2, "llava", 0, {"tie_word_embeddings": False}),
    "siglip": (2, "llava", 0, {"encoder": ENCODERS[3]}),
    "one_head": (2, "llava", 0, {"num_key_value_heads": 4, "head_dim": 24}),
    "mixture": (2, "llava", 1e-5, MOE),
    "two_shared": (2, "llava", 1e-5, MOE | {"n_shared_experts": 2, "norm_topk_prob": False}),
    "no_shared": (2, "llava", 1e-5, MOE | {"n_shared_experts": 0, "num_experts_per_tok": 1}),
    "release_3": (3, "llava", 1e-4, {}),
    "release_3_mixture": (3, "llava", 1e-4, MOE),
    "dense_internvl": (3, "internvl", 0, {}),
    "head_dim_internvl": (3, "internvl", 0, {"num_key_value_heads": 1, "head_dim": 24}),
    "mixture_internvl": (3, "internvl", 1e-5, MOE | {"num_experts_per_tok": 2}),
    "16_tokens_internvl": (3, "internvl", 0, {"pixel_shuffle": 2}),
    "yarn_internvl": (3, "internvl", 1e-5, {"inference_rope_scaling": True}),
    "dinov2_of_another_size": (3, "internvl", 0, {"encoder": "dinov2", "image_token_len": 16}),
    "llama": (2, "llama", 0, {}),
    "qwen2_moe": (2, "llama", 1e-5, MOE),
    "qwen3": (3, "llama", 0, {}),
    "qwen3_moe": (3, "llama", 1e-5, MOE),
}

SLOW = "untied one_head two_shared no_shared release_3_mixture head_dim_internvl 16_tokens_internvl".split()
VARIANTS = [pytest.param(*CASES[name], id=name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CASES]


def make_weights(folder: Path, release: int, encoder: Path | str | None = None, **config) -> Path:
    """A random model, loud enough for every weight to matter, and its tokenizer's folder beside it."""
    torch.manual_seed(0)
    encoder = save_dinov2(folder / encoder) if encoder == "dinov2" else encoder or ENCODERS[release]
    tokenizer = load_tokenizer(str(ROOT / "model/tokenizer"))
    if release == 3:
        release3.make_tokenizer().save_pretrained(folder / "tokenizer")
        tokenizer = load_tokenizer(str(folder / "tokenizer"))
    fields = TINY | config
    model, _ = build_vlm(translated(fields) if release == 3 else fields, str(encoder), tokenizer)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if not key.startswith("vision_encoder.") and parameter.dim() > 1:
                parameter.mul_(5)
    path = folder / "tiny.pth"
    arguments = {"vision_model_path": str(encoder)}
    save_weights(path, half_state(model.state_dict()), describe(model, tokenizer, "sft_vlm", 7, arguments))
    return path


def load(folder: Path, target: str) -> tuple:
    """Model and processor as users load them."""
    if target == "llama":
        return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    if target == "internvl":
        model = InternVLForConditionalGeneration.from_pretrained(folder, config=internvl.read_config(folder))
    else:
        model = AutoModelForImageTextToText.from_pretrained(folder)
    return model, AutoProcessor.from_pretrained(folder)


def chat(pictures: list, text: str) -> list[dict]:
    parts = [{"type": "image", "image": picture} for picture in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}] if parts else text}]


TEMPLATE = dict(tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True)


@pytest.mark.parametrize(("release", "target", "bound", "config"), VARIANTS)
@torch.no_grad()
def test_an_export_answers_as_its_source_and_comes_back(convert, tmp_path, release, target, bound, config):
    weights = make_weights(tmp_path, release, **config)
    folder = tmp_path / "export"

    assert convert("--weight", weights, "--out", folder, "--format", target) == (0, "")

    assert not list(folder.glob("*.py"))
    (ours, our_processor), (theirs, their_processor) = load_vlm(str(weights)), load(folder, target)
    assert theirs.dtype == torch.float32
    answers = []
    for count in range(1 if target == "llama" else 3):
        messages = chat(PICTURES[:count], "一只 cat@home 在哪里？")
        expected = our_processor.apply_chat_template(messages, **TEMPLATE)
        found = their_processor.apply_chat_template(messages, **TEMPLATE)
        ids, placeholder = expected["input_ids"], ours.config.image_ids[0]
        told = getattr(theirs.config, "image_token_id", placeholder)
        assert torch.equal(ids, found["input_ids"].masked_fill(found["input_ids"] == told, placeholder))
        if count:
            assert torch.equal(expected["pixel_values"].flatten(), found["pixel_values"].flatten())
        difference = ours(**expected).logits - theirs(**found).logits[..., : ours.config.vocab_size]
        assert difference.abs().max() <= bound
        both = [
            model.generate(**i, max_new_tokens=12)[0, ids.shape[1] :]
            for model, i in ((ours, expected), (theirs, found))
        ]
        assert torch.equal(*both)
        answers.append(their_processor.decode(both[1], skip_special_tokens=True))
    if target != "llama":
        assert len(set(answers)) > 1, "the pictures make no difference: this test shows nothing"
        rows = [chat(PICTURES[:count], "一只 cat@home 在哪里？") for count in (1, 2)]
        batch = their_processor.apply_chat_template(rows, **TEMPLATE, processor_kwargs={"padding": True})
        assert not batch["attention_mask"][0].all()
        tokens = theirs.generate(**batch, max_new_tokens=12)[:, batch["input_ids"].shape[1] :]
        assert their_processor.batch_decode(tokens, skip_special_tokens=True) == answers[1:]

    back = tmp_path / "back.pth"
    assert convert("--to_torch", folder, "--out", back)[0] == 0
    assert back.with_suffix(".json").read_bytes() == weights.with_suffix(".json").read_bytes()
    assert_same(weights, back, without_pictures=target == "llama")


def assert_same(weights: Path, back: Path, without_pictures: bool = False) -> None:
    expected, found = (torch.load(path, weights_only=True) for path in (weights, back))
    if without_pictures:
        expected = {key: value for key, value in expected.items() if not key.startswith("vision_proj.")}
    assert found.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []


@pytest.mark.parametrize("case", ["mixture", "release_3", "mixture_internvl", "qwen2_moe", "qwen3"])
def test_a_folder_that_others_saved_comes_back(convert, tmp_path, case):
    """Their own names on disk, several files, none of ours beside them."""
    release, target, _, config = CASES[case]
    weights = make_weights(tmp_path, release, **config)
    assert convert("--weight", weights, "--out", tmp_path / "export", "--format", target) == (0, "")
    for part in load(tmp_path / "export", target):
        part.save_pretrained(tmp_path / "saved", max_shard_size="1MB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1

    assert convert("--to_torch", tmp_path / "saved", "--out", tmp_path / "back.pth")[0] == 0

    assert_same(weights, tmp_path / "back.pth", without_pictures=target == "llama")
    known, found = (
        json.loads(path.with_suffix(".json").read_text()) for path in (weights, tmp_path / "back.pth")
    )
    assert found["tokenizer"]["fingerprint"] == known["tokenizer"]["fingerprint"]
    if target != "llama":
        for sidecar in (found, known) if not config.get("use_moe") else ():
            sidecar["config"] = {k: v for k, v in sidecar["config"].items() if k not in IDLE}
        assert found["config"] == known["config"]
        assert found["encoder"]["config"] == known["encoder"]["config"]
        flags = {"vision_model_path": str(ENCODERS[release])}
        flags |= {"tokenizer_path": str(tmp_path / "tokenizer")} if release == 3 else {}
        again, _ = load_vlm(str(tmp_path / "back.pth"), **flags)
        assert torch.equal(again.lm_head.weight, load_vlm(str(weights))[0].lm_head.weight)


FOR_VLLM = {"clip": (2, None, "tanh"), "siglip": (2, ENCODERS[3], "tanh"), "release_3": (3, None, "gelu")}


@pytest.mark.parametrize(("release", "encoder", "activation"), FOR_VLLM.values(), ids=FOR_VLLM.keys())
@torch.no_grad()
def test_what_vllm_needs_costs_little_and_comes_back(convert, tmp_path, release, encoder, activation):
    """An activation that it knows, and no norm after the encoder's layers, which it leaves out."""
    weights, folder = make_weights(tmp_path, release, encoder), tmp_path / "export"

    options = ["--format", "llava", "--projector_act", "tanh"]
    assert convert("--weight", weights, "--out", folder, *options) == (0, "")

    ours, processor = load_vlm(str(weights))
    theirs, their_processor = load(folder, "llava")
    assert theirs.config.projector_hidden_act == activation
    theirs.model.vision_tower.post_layernorm = torch.nn.Identity()
    messages = chat(PICTURES, "What?")
    expected = ours(**processor.apply_chat_template(messages, **TEMPLATE)).logits
    found = theirs(**their_processor.apply_chat_template(messages, **TEMPLATE)).logits[
        ..., : expected.shape[-1]
    ]
    assert 0 < (found - expected).abs().max() < 3e-4
    assert convert("--to_torch", folder, "--out", tmp_path / "back.pth")[0] == 0
    assert_same(weights, tmp_path / "back.pth")


GOLDEN_3 = {"dense3": 0, "dense3_headdim": 0, "dense3_yarn": 1e-6, "moe3": 4e-7, "moe3_top2": 4e-7}
GOLDEN_3 |= {"moe3_top1_raw": 4e-7, "moe3_top2_raw": 4e-7}


@pytest.mark.parametrize("name", GOLDEN_3)
@torch.no_grad()
def test_internvl_gives_the_golden_logits_of_release_3(tmp_path, name):
    model, golden = golden_model(f"v3/{name}")
    image_processor = AutoImageProcessor.from_pretrained(ENCODERS[3], backend="pil")
    processor = MiniMindVLMProcessor(image_processor, release3.make_tokenizer(), tokens_per_image=64)
    internvl.write(tmp_path, Source(model, processor))
    theirs, _ = load(tmp_path, "internvl")

    pixels = golden["pixel_values"].flatten(0, 1)  # (images, 3, H, W)
    found = theirs(input_ids=golden["input_ids"], pixel_values=pixels).logits

    expected = model(golden["input_ids"], pixel_values=golden["pixel_values"]).logits
    assert (found - expected).abs().max() <= GOLDEN_3[name]
    torch.testing.assert_close(found[:, -20:], golden["logits_last"], atol=1e-4, rtol=0)


def test_the_added_token_is_never_written(convert, tmp_path):
    """LLaVA's placeholder is a row more than we have: its logit is the mean of all."""
    weights, folder = make_weights(tmp_path, 2), tmp_path / "export"
    assert convert("--weight", weights, "--out", folder, "--format", "llava") == (0, "")

    model, processor = load(folder, "llava")

    assert processor.image_token_id == model.config.image_token_id == 6400
    assert model.generation_config.suppress_tokens == [6400]
    inputs = processor.apply_chat_template(chat(PICTURES, "What?"), **TEMPLATE)
    with torch.no_grad():
        logits = model(**inputs).logits
    torch.testing.assert_close(logits[..., 6400], logits[..., :6400].mean(-1), atol=2e-2, rtol=0)
    assert (logits.argmax(-1) < 6400).all()


# --- nothing is half there


@pytest.mark.parametrize("moment", ["config.json", "model.safetensors", "README.md"])
@pytest.mark.parametrize("target", ["llava", pytest.param("minimind", marks=pytest.mark.slow)])
def test_a_killed_export_leaves_what_was_there(convert, tmp_path, moment, target):
    weights, out = make_weights(tmp_path, 2), tmp_path / "export"
    assert convert("--weight", weights, "--out", out, "--format", target) == (0, "")
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    process = start(["convert_to_hf.py", "--weight", weights, "--out", out, "--format", target])
    while not (found := list(tmp_path.glob(f".export.*/new/export/{moment}"))) and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    process.communicate(60)

    assert found, "it ended before it could be killed"
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert convert("--weight", weights, "--out", out, "--format", target) == (0, "")


# --- what is refused


REFUSED = {
    "mlp with CLIP": (2, "llava", {"projector": "mlp"}, "clip_vision_model, 64 wide and 128 within"),
    "dinov2": (2, "llava", {"encoder": "dinov2"}, "the encoder is dinov2, expected one of clip_vision_model"),
    "linear": (2, "internvl", {}, "projector is 'linear': InternVL's is an MLP, see --format llava"),
    "pixel shuffle": (2, "llava", {"pixel_shuffle": 2}, "pixel_shuffle is 2: LLaVA has no such step"),
    "shared experts": (
        2,
        "llama",
        MOE | {"qk_norm": True},
        "n_shared_experts is 1: Qwen3-MoE has no shared experts",
    ),
}


@pytest.mark.parametrize(("release", "target", "config", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_a_target_cannot_hold_is_one_line(convert, tmp_path, release, target, config, message):
    weights = make_weights(tmp_path, release, **config)
    before = sorted(tmp_path.iterdir())

    code, line = convert("--weight", weights, "--out", tmp_path / "export", "--format", target)

    assert (code, line) == (1, f"error: --format {target} cannot hold {weights}: {line.split(': ', 2)[2]}")
    assert message in line
    assert sorted(tmp_path.iterdir()) == before


def test_registers_are_refused(convert, tmp_path):
    weights = make_weights(tmp_path, 3, save_dinov2(tmp_path / "dinov2", registers=4), image_token_len=16)
    code, line = convert("--weight", weights, "--out", tmp_path / "export", "--format", "internvl")
    assert (code, "4 registers: at most a class token can be dropped" in line) == (1, True)


USAGE = {
    "format": (["--format", "onnx"], "invalid choice: 'onnx'"),
    "tanh": (["--projector_act", "tanh"], "--projector_act tanh is for --format llava"),
}


@pytest.mark.parametrize(("flags", "message"), USAGE.values(), ids=USAGE.keys())
def test_wrong_usage_is_one_line(convert, tmp_path, flags, message):
    code, line = convert("--weight", "x.pth", "--out", tmp_path / "export", *flags)
    assert (code, message in line) == (2, True)


def break_bias(folder: Path, model) -> None:
    model.model.layers[1].self_attn.k_proj.bias.data[3] = 1


def break_range(folder: Path, model) -> None:
    model.model.layers[0].mlp.gate.weight.data[0, 0] = 1e5


def break_config(**changes):
    def change(folder: Path, model) -> None:
        for name, value in changes.items():
            setattr(model.config, name, value)

    return change


BROKEN = {
    "bias": (break_bias, "model.layers.1.self_attn.k_proj.bias has values that are not zero"),
    "fp16": (break_range, "model.layers.0.mlp.gate.weight has 100000, beyond fp16's 65504"),
    "rope": (
        break_config(rope_parameters={"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0}),
        "expected plain RoPE or YaRN over whole heads",
    ),
    "sliding": (
        break_config(use_sliding_window=True, sliding_window=64, layer_types=["sliding_attention"] * 2),
        "sliding_window is 64",
    ),
    "sparse": (break_config(mlp_only_layers=[1]), "mlp_only_layers [1]: every layer here has experts"),
}


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_what_a_pth_cannot_hold_is_one_line(convert, tmp_path, change, message):
    weights = make_weights(tmp_path, 2, **MOE)
    assert convert("--weight", weights, "--out", tmp_path / "export", "--format", "llama") == (0, "")
    model, tokenizer = load(tmp_path / "export", "llama")
    change(tmp_path, model)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "saved")

    code, line = convert("--to_torch", tmp_path / "saved", "--out", tmp_path / "back.pth")

    assert (code, message in line) == (1, True), line
    assert line.startswith(f"error: {tmp_path / 'saved'}: ")
    assert not (tmp_path / "back.pth").exists()


def test_a_projection_that_learnt_another_way_is_refused(convert, tmp_path):
    weights = make_weights(tmp_path, 2)
    options = ["--format", "llava", "--projector_act", "tanh"]
    assert convert("--weight", weights, "--out", tmp_path / "export", *options) == (0, "")
    model, processor = load(tmp_path / "export", "llava")
    model.model.multi_modal_projector.linear_2.weight.data[0, 1] = 0.5
    for part in (model, processor):
        part.save_pretrained(tmp_path / "saved")

    code, line = convert("--to_torch", tmp_path / "saved", "--out", tmp_path / "back.pth")

    assert (code, "projector_hidden_act 'tanh' between two layers" in line) == (1, True)


def test_weights_that_do_not_fit_the_config_are_named(convert, tmp_path):
    weights, folder = make_weights(tmp_path, 2), tmp_path / "export"
    assert convert("--weight", weights, "--out", folder, "--format", "llama") == (0, "")
    config = json.loads((folder / "config.json").read_text()) | {"intermediate_size": 100}
    (folder / "config.json").write_text(json.dumps(config))

    code, line = convert("--to_torch", folder, "--out", tmp_path / "back.pth")

    key, shapes = "model.layers.0.mlp.down_proj.weight", "(64, 192), but its config says (64, 100)"
    assert (code, line) == (1, f"error: {folder}: {key} has shape {shapes}")


def test_features_of_another_layer_are_refused(convert, tmp_path):
    """As LLaVA 1.5 has them."""
    weights, folder = make_weights(tmp_path, 2), tmp_path / "export"
    assert convert("--weight", weights, "--out", folder, "--format", "llava") == (0, "")
    config = json.loads((folder / "config.json").read_text()) | {"vision_feature_layer": -2}
    (folder / "config.json").write_text(json.dumps(config))

    code, line = convert("--to_torch", folder, "--out", tmp_path / "back.pth")

    assert (code, line) == (1, f"error: {folder}: vision_feature_layer is -2, expected -1, the last")


def test_a_folder_without_weights_is_named(convert, tmp_path):
    weights = make_weights(tmp_path, 2)
    assert convert("--weight", weights, "--out", tmp_path / "export", "--format", "llava") == (0, "")
    (tmp_path / "export/model.safetensors").unlink()

    code, line = convert("--to_torch", tmp_path / "export", "--out", tmp_path / "back.pth")

    assert code == 1
    assert line.startswith(f"error: {tmp_path / 'export'}: ") and "model.safetensors" in line
