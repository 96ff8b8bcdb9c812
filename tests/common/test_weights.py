"""Weights on disk: format, atomic writing, sidecar, and what is refused."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY_ENCODER
from release3 import make_state, make_tokenizer
from safetensors.torch import save_file

from common.cli import UserError
from common.setup import build_lm, build_vlm, load_base, settings_of_base
from common.tokenizer import load_tokenizer, tokenizer_fingerprint
from common.weights import (
    config_from_shapes,
    describe,
    half_state,
    load_weights_file,
    save_weights,
    translated,
    weight_name,
    write_file,
)
from inference.trained import find_weight, load_vlm
from model.model_minimind import MiniMindForCausalLM
from model.model_vlm import MiniMindVLM, VLMConfig

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture
def saved(tmp_path, tokenizer):
    """A tiny model with random weights, saved; returns model and path."""
    model, _ = build_vlm(SIZES, str(TINY_ENCODER), tokenizer)
    path = tmp_path / "sft_vlm_64.pth"
    arguments = {"vision_model_path": str(TINY_ENCODER)}
    save_weights(path, half_state(model.state_dict()), describe(model, tokenizer, "sft_vlm", 7, arguments))
    return model, path


def test_names_are_the_published_ones():
    assert weight_name("pretrain_vlm", 512, False) == "pretrain_vlm_512.pth"
    assert weight_name("sft_vlm", 768, True) == "sft_vlm_768_moe.pth"


def test_file_is_fp16_without_encoder(saved):
    model, path = saved
    state = torch.load(path, weights_only=True)
    expected = {key for key in model.state_dict() if not key.startswith("vision_encoder.")}
    assert state.keys() == expected and "lm_head.weight" in expected
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}
    assert torch.equal(state["model.norm.weight"], model.model.norm.weight.half())
    assert state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()


def test_equal_weights_are_equal_bytes_under_any_name(saved, tokenizer):
    model, path = saved
    other = path.with_name("other_name.pth")
    save_weights(other, half_state(model.state_dict()), {})
    assert other.read_bytes() == path.read_bytes()


def test_loading_for_inference_needs_nothing_but_the_path(saved):
    model, path = saved
    loaded, processor = load_vlm(str(path))
    assert loaded.config.num_attention_heads == 4 and processor.tokens_per_image == 196
    assert torch.equal(
        loaded.vision_proj.vision_proj[0].bias, model.vision_proj.vision_proj[0].bias.half().float()
    )
    assert not loaded.training


def test_sidecar_says_what_the_tensors_cannot(saved, tokenizer):
    _, path = saved
    sidecar = json.loads(path.with_suffix(".json").read_text())
    assert sidecar["stage"] == "sft_vlm" and sidecar["step"] == 7
    assert sidecar["config"]["num_attention_heads"] == 4
    assert sidecar["tokenizer"]["fingerprint"] == tokenizer_fingerprint(tokenizer)
    assert sidecar["encoder"]["config"]["hidden_size"] == 64
    assert sidecar["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_sizes_of_a_bare_file_are_read_off_its_tensors(name):
    path = ROOT / f"tests/golden/{name}.pth"
    state = torch.load(path, weights_only=True)
    golden = torch.load(ROOT / f"tests/golden/{name}_golden.pt", weights_only=True)["config"]
    found = config_from_shapes(state, path)
    wanted = VLMConfig(**golden)
    assert {k: getattr(wanted, k) for k in found} == found


RELEASE_3 = "dense3 dense3_headdim moe3 moe3_top2 moe3_top2_raw"


@pytest.mark.parametrize("name", RELEASE_3.split())
def test_sizes_of_release_3_are_read_off_its_tensors_head_counts_too(name):
    path = ROOT / f"tests/golden/v3/{name}.pth"
    golden = torch.load(ROOT / f"tests/golden/v3/{name}_golden.pt", weights_only=True)["config"]
    found = VLMConfig(**config_from_shapes(torch.load(path, weights_only=True), path))
    wanted = VLMConfig(**translated(golden))
    told = "hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim vocab_size qk_norm"
    told += " use_moe n_routed_experts n_shared_experts projector rms_norm_eps norm_top1_prob"
    told += " moe_intermediate_size" if golden.get("use_moe") else " intermediate_size"
    assert {k: getattr(found, k) for k in told.split()} == {k: getattr(wanted, k) for k in told.split()}


def test_the_format_of_a_few_days_in_2026_is_named():
    state = torch.load(ROOT / "tests/golden/v3/dense3.pth", weights_only=True)
    state["vision_proj.mlp.0.weight"] = torch.zeros(64, 48)
    with pytest.raises(
        UserError, match=r"^x.pth: vision_proj.mlp.0.weight has shape \(64, 48\), .* format of April 2026"
    ):
        config_from_shapes(state, Path("x.pth"))


@pytest.mark.parametrize(
    ("config", "model", "parameters"),
    [
        ({}, MiniMindVLM, 65_094_912),
        ({"use_moe": True}, MiniMindVLM, 199_599_360),
        ({}, MiniMindForCausalLM, 63_912_192),
        ({"use_moe": True}, MiniMindForCausalLM, 198_416_640),
    ],
    ids=["dense", "moe", "dense_lm", "moe_lm"],
)
def test_release_3_has_the_published_numbers_of_parameters(config, model, parameters):
    with torch.device("meta"):
        found = model(VLMConfig(**translated(config)), *([None] if model is MiniMindVLM else []))
    assert sum(weight.numel() for weight in found.parameters()) == parameters


def test_weights_and_tokenizer_of_different_releases_are_refused(tokenizer):
    with pytest.raises(UserError, match=r"takes <.* for an image, .* has @: they are of different releases"):
        build_vlm(translated({}), str(TINY_ENCODER), tokenizer)


SIGLIP = ROOT / "tests/golden/v3/siglip"
CONFIG_3 = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
CONFIG_3 |= {"image_hidden_size": 48, "image_token_len": 64, "image_ids": [12], "num_experts": 4}


@pytest.fixture(scope="module")
def state_3() -> dict[str, torch.Tensor]:
    return make_state(CONFIG_3, encoder=SIGLIP)


@pytest.fixture
def published(tmp_path, state_3) -> Path:
    """A transformers folder as release 3 is published: its own config and code, and no encoder."""
    folder = tmp_path / "minimind-3v"
    make_tokenizer().save_pretrained(folder)
    stored = {name: value for name, value in state_3.items() if name != "lm_head.weight"}  # it is tied
    save_file(stored, folder / "model.safetensors")
    trap = f"open({str(tmp_path / 'ran')!r}, 'w')"
    (folder / "model_vlm.py").write_text(trap)
    code = {"AutoConfig": "model_vlm.VLMConfig", "AutoModelForCausalLM": "model_vlm.MiniMindVLM"}
    config = CONFIG_3 | {"model_type": "minimind-v", "auto_map": code, "dtype": "float16"}
    config |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_scaling": None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_a_published_folder_of_release_3_is_read_by_our_code(published, state_3, kind, tmp_path):
    if kind == "pytorch_model.bin":
        (published / "model.safetensors").unlink()
        torch.save(state_3, published / kind)
    model, processor = load_vlm(str(published), str(SIGLIP))
    assert model.config.qk_norm and model.config.projector == "mlp"
    assert processor.placeholder_id == 12 and processor.tokens_per_image == 64
    assert model.config.rope_theta == 1e6 and model.config.rope_scaling is None
    found = half_state(model.state_dict())
    assert found.keys() == state_3.keys()
    assert all(torch.equal(found[name], value) for name, value in state_3.items())
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda folder: (folder / "model.safetensors").unlink(),
            "without model.safetensors or pytorch_model",
        ),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 99), "not readable weights"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: not a JSON object"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer_path"),
    ],
    ids=["no_weights", "damaged", "config", "tokenizer"],
)
def test_a_published_folder_that_is_not_usable_is_told_in_one_line(published, change, message):
    change(published)
    with pytest.raises(UserError, match=message) as raised:
        load_vlm(str(published), str(SIGLIP))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("encoder", [str(TINY_ENCODER), None], ids=["clip", "not_downloaded"])
def test_a_published_folder_takes_the_encoder_of_its_release(published, encoder):
    told = "has 196 tokens for an image, the weights were trained with one that has 64"
    with pytest.raises(UserError, match=told if encoder else r"siglip2-base-p32-256-ve"):
        load_vlm(str(published), encoder)


def test_weights_of_another_size_are_refused(saved, tokenizer):
    _, path = saved
    other, _ = build_vlm(SIZES | {"num_hidden_layers": 3}, str(TINY_ENCODER), tokenizer)
    with pytest.raises(UserError, match=r"does not fit the flags: it has num_hidden_layers 2 \(flag: 3\)"):
        load_base(other, path, tokenizer)
    heads, _ = build_vlm(
        SIZES | {"num_attention_heads": 8, "num_key_value_heads": 4}, str(TINY_ENCODER), tokenizer
    )
    with pytest.raises(UserError, match=r"num_attention_heads 4 \(flag: 8\)"):
        load_base(heads, path, tokenizer)


def test_another_tokenizer_is_refused(saved, tmp_path):
    model, path = saved
    folder = tmp_path / "other_tokenizer"
    folder.mkdir()
    for file in (ROOT / "model/tokenizer").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    parts = json.loads((folder / "tokenizer.json").read_text())
    parts["model"]["merges"] = parts["model"]["merges"][:-1]
    (folder / "tokenizer.json").write_text(json.dumps(parts))
    with pytest.raises(UserError, match=r"was trained with another tokenizer .*give --tokenizer_path"):
        load_base(model, path, load_tokenizer(str(folder)))
    with pytest.raises(UserError, match="another tokenizer"):
        load_vlm(str(path), tokenizer_path=str(folder))


def test_a_bare_file_gets_a_warning_about_its_tokenizer(saved, tokenizer, caplog):
    model, path = saved
    path.with_suffix(".json").unlink()
    load_base(model, path, tokenizer)
    assert "its tokenizer cannot be checked" in caplog.text
    caplog.clear()
    load_base(model, path, tokenizer, tokenizer_asked=True)
    assert not caplog.text


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None], ids=["empty", "text", "cut"])
def test_damaged_files_are_named(saved, content):
    _, path = saved
    path.write_bytes(path.read_bytes()[:5000] if content is None else content)
    with pytest.raises(UserError, match=r"sft_vlm_64.pth: not readable weights"):
        load_weights_file(path)


@pytest.mark.parametrize("sidecar", ["{}", "[]", "{", '{"config": 3}'])
def test_a_damaged_sidecar_is_named(saved, sidecar):
    _, path = saved
    path.with_suffix(".json").write_text(sidecar)
    with pytest.raises(UserError, match=r"sft_vlm_64.json: not a"):
        load_weights_file(path)


@pytest.mark.parametrize("key", ["model.embed_tokens.weight", "model.layers.0.mlp.gate_proj.weight"])
def test_other_models_weights_are_named(saved, key):
    _, path = saved
    state = torch.load(path, weights_only=True)
    for broken in ({**state, key: state[key].flatten()[0]}, {k: v for k, v in state.items() if k != key}):
        with pytest.raises(UserError, match=r"sft_vlm_64.pth: not MiniMind weights"):
            config_from_shapes(broken, path)


def test_a_missing_key_is_named(saved, tokenizer):
    model, path = saved
    state, _ = load_weights_file(path)
    del state["model.norm.weight"]
    with path.open("wb") as file:
        torch.save(state, file)
    with pytest.raises(UserError, match=r"model\.norm\.weight"):
        load_base(model, path, tokenizer)


@pytest.mark.parametrize(("mask", "mode"), [(0o077, 0o600), (0o022, 0o644), (0o002, 0o664)])
def test_files_have_the_mode_that_the_umask_leaves(mask, mode, tmp_path):
    before = os.umask(mask)
    try:
        save_weights(tmp_path / "lm_64.pth", {}, {"config": {}})
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {
        "lm_64.pth": mode,
        "lm_64.json": mode,
    }


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(b"old")

    def fill_the_disk(file) -> None:
        file.write(b"new")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match=r"No space left on device; the previous weights.pth is intact"):
        write_file(path, fill_the_disk)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_encoder_that_is_not_there_or_not_one_is_named(tmp_path, tokenizer):
    with pytest.raises(UserError, match=r"python scripts/download.py clip"):
        build_vlm(SIZES, str(tmp_path / "clip"), tokenizer)
    with pytest.raises(UserError, match="not a usable vision encoder"):
        build_vlm(SIZES, str(ROOT / "model/tokenizer"), tokenizer)


def test_a_damaged_encoder_is_named(tmp_path, tokenizer):
    for file in TINY_ENCODER.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[:50_000])
    with pytest.raises(UserError, match="is not a usable vision encoder"):
        build_vlm(SIZES, str(tmp_path), tokenizer)


def test_a_wrong_path_is_not_taken_for_a_name(saved, tmp_path, monkeypatch):
    _, path = saved
    (tmp_path / "out").mkdir()
    path.rename(tmp_path / "out/mine.pth")
    monkeypatch.chdir(tmp_path)
    assert find_weight("mine") == find_weight("mine.pth") == Path("out/mine.pth")
    assert find_weight("elsewhere/mine.pth") == Path("elsewhere/mine.pth")


def test_projection_is_fresh_when_the_base_is_a_language_model(saved, tokenizer):
    model, path = saved
    state, _ = load_weights_file(path)
    with path.open("wb") as file:
        torch.save({k: v for k, v in state.items() if not k.startswith("vision_proj.")}, file)
    before = model.vision_proj.vision_proj[0].weight.clone()
    load_base(model, path, tokenizer)
    assert torch.equal(model.vision_proj.vision_proj[0].weight, before)
    assert isinstance(model, MiniMindVLM)


@pytest.fixture
def shuffled(tmp_path, tokenizer):
    """As `saved`, with 49 tokens for 196 patches and the published head counts."""
    config = SIZES | {"num_attention_heads": 8, "pixel_shuffle": 2}
    model, _ = build_vlm(config, str(TINY_ENCODER), tokenizer)
    path = tmp_path / "sft_vlm_64.pth"
    arguments = {"vision_model_path": str(TINY_ENCODER)}
    save_weights(path, half_state(model.state_dict()), describe(model, tokenizer, "sft_vlm", 7, arguments))
    return model, path


def test_pixel_shuffle_stands_in_the_sidecar(shuffled):
    expected, path = shuffled
    model, processor = load_vlm(str(path))
    assert model.config.pixel_shuffle == 2 and processor.tokens_per_image == 49
    weight = expected.vision_proj.vision_proj[0].weight
    assert torch.equal(model.vision_proj.vision_proj[0].weight, weight.half().float())


@pytest.mark.parametrize("sidecar", [False, True], ids=["bare", "downloaded"])
def test_pixel_shuffle_is_read_off_the_projection_where_only_the_tensors_tell(shuffled, sidecar, caplog):
    expected, path = shuffled
    path.with_suffix(".json").unlink()
    if sidecar:
        state, _ = load_weights_file(path)
        about = {"config": config_from_shapes(state, path), "encoder": None}
        path.with_suffix(".json").write_text(json.dumps(about))
    model, processor = load_vlm(str(path), str(TINY_ENCODER), str(ROOT / "model/tokenizer"))
    assert model.config.pixel_shuffle == 2 and processor.tokens_per_image == 49
    weight = expected.vision_proj.vision_proj[0].weight
    assert torch.equal(model.vision_proj.vision_proj[0].weight, weight.half().float())
    assert f"{path}: its projection's width, 256, means pixel_shuffle 2" in caplog.text


def test_pixel_shuffle_of_release_3_is_read_off_its_norm(tmp_path, state_3):
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    config = translated(CONFIG_3) | {"pixel_shuffle": 4, "image_ids": None}
    model, _ = build_vlm(config, str(SIGLIP), make_tokenizer())
    torch.save(half_state(model.state_dict()), tmp_path / "sft_vlm_64.pth")
    model, processor = load_vlm(str(tmp_path / "sft_vlm_64.pth"), str(SIGLIP), str(tmp_path / "tokenizer"))
    assert model.config.pixel_shuffle == 4 and processor.tokens_per_image == 4
    assert model.vision_proj.mlp[0].weight.shape == (16 * 48,)


@pytest.mark.parametrize(
    ("change", "r", "wanted"),
    [
        (lambda sidecar: None, 2, 1),
        (lambda sidecar: sidecar.unlink(), 2, 1),
        (lambda sidecar: drop_field(sidecar), 1, 2),
    ],
    ids=["sidecar", "bare", "older_sidecar"],
)
def test_another_pixel_shuffle_than_the_weights_have_is_refused(tmp_path, tokenizer, change, r, wanted):
    model, _ = build_vlm(SIZES | {"pixel_shuffle": r}, str(TINY_ENCODER), tokenizer)
    path = tmp_path / "pretrain_vlm_64.pth"
    about = describe(model, tokenizer, "pretrain_vlm", 7, {"vision_model_path": str(TINY_ENCODER)})
    save_weights(path, half_state(model.state_dict()), about)
    change(path.with_suffix(".json"))
    with pytest.raises(UserError) as raised:
        settings_of_base(path, {"pixel_shuffle": wanted}, str(TINY_ENCODER))
    told = f"{path} does not fit the flags: it has pixel_shuffle {r} (flag: {wanted})"
    assert str(raised.value) == told
    assert settings_of_base(path, {"pixel_shuffle": r}, str(TINY_ENCODER))[0]["pixel_shuffle"] == r


def drop_field(sidecar: Path) -> None:
    about = json.loads(sidecar.read_text())
    del about["config"]["pixel_shuffle"]
    sidecar.write_text(json.dumps(about))


@pytest.mark.parametrize("kind", ["bare", "folder"])
def test_a_language_model_takes_any_pixel_shuffle(tmp_path, kind):
    state = make_state(CONFIG_3, visual=False)
    path = tmp_path / "model.safetensors" if kind == "folder" else tmp_path / "llm_64.pth"
    if kind == "folder":
        save_file({name: value for name, value in state.items() if name != "lm_head.weight"}, path)
        (tmp_path / "config.json").write_text(json.dumps(CONFIG_3))
    else:
        torch.save(state, path)
    config, _ = settings_of_base(path, {"pixel_shuffle": 2}, str(SIGLIP))
    model, processor = build_vlm(config | {"pixel_shuffle": 2}, str(SIGLIP), make_tokenizer())
    load_base(model, path, make_tokenizer())
    assert processor.tokens_per_image == 16


def test_heads_that_a_bare_file_does_not_tell_are_assumed_with_a_warning(weight, tmp_path, caplog):
    bare = tmp_path / "bare.pth"
    bare.write_bytes(weight.read_bytes())
    parts = str(bare), str(TINY_ENCODER), str(ROOT / "model/tokenizer")
    with pytest.raises(UserError, match=r"k_proj\.weight has shape"):
        load_vlm(*parts)
    assert "--num_attention_heads 8, --num_key_value_heads 2 is assumed" in caplog.text
    caplog.clear()
    model, _ = load_vlm(*parts, {"num_attention_heads": 4, "num_key_value_heads": None})
    assert "--num_key_value_heads 2 is assumed" in caplog.text and "--num_attention" not in caplog.text
    assert model.config.num_attention_heads == 4
    with pytest.raises(UserError, match=r"it has num_attention_heads 4 \(flag: 2\)"):
        load_vlm(str(weight), heads={"num_attention_heads": 2})


def test_language_model_weights_are_told_from_those_that_see(tmp_path, tokenizer):
    model, _ = build_lm(SIZES, tokenizer)
    save_weights(tmp_path / "lm.pth", half_state(model.state_dict()), describe(model, tokenizer, "lm", 1, {}))
    with pytest.raises(UserError, match=r"lm\.pth has no projection: a language model's weights"):
        load_vlm(str(tmp_path / "lm.pth"))
