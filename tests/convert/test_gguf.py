"""The target `gguf`: what stands in its two files, read by others than who wrote them, and what is refused.

That llama.cpp answers from them as the source does is a matter of scripts/interop/check_llama_cpp.py.
"""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from conftest import GOLDEN, ROOT, save_dinov2
from language_models import write_tokenizer
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer, SiglipVisionConfig, SiglipVisionModel

from common.setup import build_vlm
from common.tokenizer import load_tokenizer
from common.weights import describe, half_state, save_weights, translated
from convert import gguf as target
from convert.export import Source
from convert.names import to_text_config
from model.model_vlm import MiniMindVLM

TINY = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
CLIP, SIGLIP = GOLDEN / "clip", GOLDEN / "v3/siglip"
MOE = {"use_moe": True}
Q8_0 = gguf.GGMLQuantizationType.Q8_0
YARN = dict(rope_type="yarn", factor=8, original_max_position_embeddings=256, beta_fast=32, beta_slow=1)
LAYER = {  # of SigLIP, in the library and in llama.cpp
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}


def make_source(release: int = 2, encoder: Path = SIGLIP, tokenizer: Path | None = None, **config) -> Source:
    """A random model, loud enough for every weight to matter, with the values that a .pth has."""
    torch.manual_seed(0)
    fields = TINY | config
    if release == 3:
        fields = {k: v for k, v in translated(fields).items() if not k.startswith("image_")}
    tokenizer = load_tokenizer(str(tokenizer or ROOT / "model/tokenizer"))
    model, processor = build_vlm(fields, str(encoder), tokenizer)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if not key.startswith("vision_encoder."):
                parameter.copy_((parameter * 5 if parameter.dim() > 1 else torch.rand_like(parameter)).half())
    return Source(model.eval(), processor)


def read(file: Path) -> tuple[dict, dict[str, np.ndarray], dict]:
    """Keys, values of tensors, and how they are stored."""
    reader = gguf.GGUFReader(file)
    values = {it.name: gguf.quants.dequantize(it.data, it.tensor_type) for it in reader.tensors}
    kinds = {it.name: it.tensor_type for it in reader.tensors}
    return {key: field.contents() for key, field in reader.fields.items()}, values, kinds


def written(source: Source, folder: Path, quantization: str = "f16") -> tuple[dict, dict, dict]:
    """The language model's file, read back."""
    target.write(folder, source, quantization)
    return read(folder / f"model-{quantization}.gguf")


# --- the language model


@pytest.mark.parametrize(
    ("release", "config", "bound"),
    [
        (2, {}, 0),
        (2, {"tie_word_embeddings": False, "num_key_value_heads": 4}, 0),
        (2, {"max_position_embeddings": 2048, "rope_scaling": YARN | {"attention_factor": 1.3}}, 1e-4),
        (3, {"head_dim": 128, "num_key_value_heads": 1}, 0),
        (3, MOE | {"num_experts_per_tok": 2, "moe_intermediate_size": 32}, 1e-5),
    ],
    ids=["llama", "untied", "yarn", "qwen3", "qwen3moe"],
)
@torch.no_grad()
def test_transformers_reads_the_same_language_model(tmp_path, release, config, bound):
    source = make_source(release, **config)
    target.write(tmp_path, source)

    # Of keys the library leaves some unread that only other models than its own have.
    known = (
        {"config": to_text_config(source.model.config)} if {"use_moe", "rope_scaling"} & config.keys() else {}
    )
    found = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model-f16.gguf", dtype="float32", **known
    )

    ids = torch.tensor([source.processor.tokenizer.encode("What is this? 一只 cat")])
    expected = source.model(ids).logits
    assert expected.std() > 0.2
    assert (found(ids).logits - expected).abs().max() <= bound


@pytest.mark.parametrize(
    ("config", "shared", "is_normed"),
    [
        ({}, 1, True),
        ({"n_shared_experts": 2, "norm_topk_prob": False}, 2, False),
        ({"n_shared_experts": 0, "num_experts_per_tok": 1}, 0, False),
    ],
    ids=["one_shared", "two_shared", "no_shared"],
)
def test_a_mixture_of_release_2_is_bailings(tmp_path, config, shared, is_normed):
    source = make_source(**MOE, **config)

    keys, values, kinds = written(source, tmp_path)

    state = {key: value.numpy() for key, value in source.model.state_dict().items()}
    assert keys["general.architecture"] == "bailingmoe"
    told = ["expert_count", "expert_used_count", "expert_shared_count", "expert_weights_norm"]
    told = [keys[f"bailingmoe.{name}"] for name in told]
    assert told == [4, source.model.config.num_experts_per_tok, max(shared, 1), is_normed]
    assert np.array_equal(values["output.weight"], values["token_embd.weight"])  # tied: it wants both
    mlp = "model.layers.1.mlp."
    assert np.array_equal(values["blk.1.ffn_gate_inp.weight"], state[f"{mlp}gate.weight"])
    assert kinds["blk.1.ffn_gate_inp.weight"] == gguf.GGMLQuantizationType.F32
    for name, axis in (("gate", 0), ("up", 0), ("down", 1)):
        routed = np.stack([state[f"{mlp}experts.{i}.{name}_proj.weight"] for i in range(4)])
        assert np.array_equal(values[f"blk.1.ffn_{name}_exps.weight"], routed)
        joined = [state[f"{mlp}shared_experts.{i}.{name}_proj.weight"] for i in range(shared)]
        joined = np.concatenate(joined or [0 * routed[0]], axis)
        assert np.array_equal(values[f"blk.1.ffn_{name}_shexp.weight"], joined)


def test_rope_rotates_pairs_where_ours_rotates_halves(tmp_path):
    source = make_source(**MOE)
    _, values, _ = written(source, tmp_path)
    ours = source.model.state_dict()
    for name, heads in (("q", 4), ("k", 2)):
        halves = ours[f"model.layers.0.self_attn.{name}_proj.weight"].unflatten(0, (heads, 2, 8))
        found = torch.from_numpy(values[f"blk.0.attn_{name}.weight"]).unflatten(0, (heads, 8, 2))
        assert torch.equal(found[:, :, 0], halves[:, 0]) and torch.equal(found[:, :, 1], halves[:, 1])


def test_q8_0_is_for_the_language_models_matrices(tmp_path):
    _, exact, _ = written(make_source(), tmp_path)
    _, values, kinds = written(make_source(), tmp_path, "q8_0")
    _, _, encoder = read(tmp_path / "mmproj-f16.gguf")

    matrices = {name for name, value in values.items() if value.ndim > 1}
    assert {name for name, kind in kinds.items() if kind == Q8_0} == matrices
    assert Q8_0 not in encoder.values()
    for name in matrices:
        blocks = exact[name].reshape(-1, 32)
        steps = np.abs(blocks).max(1, keepdims=True) / 127
        assert (np.abs(values[name].reshape(-1, 32) - blocks) <= 0.57 * steps).all()


# --- tokens and template


def test_tokens_are_those_of_the_tokenizer(tmp_path):
    source = make_source()
    keys, _, _ = written(source, tmp_path)

    ours = source.processor.tokenizer
    assert keys["tokenizer.ggml.tokens"] == ours.convert_ids_to_tokens(range(6400))
    assert keys["tokenizer.ggml.token_type"] == [3] * 3 + [1] * 6397  # control tokens, text
    assert [keys[f"tokenizer.ggml.{name}_token_id"] for name in ("padding", "bos", "eos", "eot")] == [
        0,
        1,
        2,
        2,
    ]
    assert keys["tokenizer.ggml.pre"] == "gpt-2"
    found = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model-f16.gguf")
    text = "<|im_start|>user\nHow many cats, 12 or 3? 图里有几只猫？\n\n@ it's<|im_end|>"
    assert found.encode(text) == ours.encode(text)


@pytest.mark.parametrize(("kind", "expected"), [("smollm2", "smollm"), ("qwen3", "qwen2")])
def test_tokenizers_of_other_language_models_keep_their_way_to_cut_text(tmp_path, kind, expected):
    write_tokenizer(tmp_path / "tokenizer", kind)
    source = make_source(tokenizer=tmp_path / "tokenizer")

    keys, _, _ = written(source, tmp_path)

    assert keys["tokenizer.ggml.pre"] == expected
    ours, kinds = source.processor.tokenizer, keys["tokenizer.ggml.token_type"]
    assert keys["tokenizer.ggml.tokens"] == ours.convert_ids_to_tokens(range(len(ours)))
    assert kinds[ours.convert_tokens_to_ids("<|im_end|>")] == 3
    plain = ours.convert_tokens_to_ids("<think>")
    assert kind == "smollm2" or kinds[plain] == 4  # matched in any text, but no control token


@pytest.mark.parametrize(
    "parts",
    [["P", "Q"], ["P"], ["P", "P", "Q"], ["Q", "P"], ["P", "Q", "P", "Q"], ["Q"]],
    ids="".join,
)
def test_template_sets_pictures_apart_as_our_processor_does(tmp_path, parts):
    """llama.cpp joins a message's parts without newlines around what stands for a picture."""
    source = make_source()
    keys, _, _ = written(source, tmp_path)
    content = [{"type": "image"} if part == "P" else {"type": "text", "text": "什么？"} for part in parts]
    if "P" not in parts:
        content = content[0]["text"]
    expected = source.processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )

    glued = "".join("<__media_x7__>" if part == "P" else "什么？" for part in parts)
    found = source.processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": glued}],
        chat_template=keys["tokenizer.chat_template"],
        add_generation_prompt=True,
        tokenize=False,
    )

    assert found == expected.replace("<image>", "<__media_x7__>")


# --- encoder and projection


def embedded(file: Path, pictures: torch.Tensor) -> torch.Tensor:
    """What llama.cpp makes of pictures with a SigLIP encoder: its own names, put into the library's class."""
    keys, values, _ = read(file)

    def both(ours: str, theirs: str) -> dict:
        return {
            f"{ours}.{it}": torch.from_numpy(values[f"{theirs}.{it}"].copy()) for it in ("weight", "bias")
        }

    vision = {name.removeprefix("clip.vision."): value for name, value in keys.items()}
    layers = range(vision["block_count"])
    state = both("embeddings.patch_embedding", "v.patch_embd") | both("post_layernorm", "v.post_ln")
    state["embeddings.position_embedding.weight"] = torch.from_numpy(values["v.position_embd.weight"].copy())
    for i in layers:
        for ours, theirs in LAYER.items():
            state |= both(f"encoder.layers.{i}.{ours}", f"v.blk.{i}.{theirs}")
    config = SiglipVisionConfig(
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
        hidden_size=vision["embedding_length"],
        intermediate_size=vision["feed_forward_length"],
        num_hidden_layers=len(layers),
        num_attention_heads=vision["attention.head_count"],
        layer_norm_eps=vision["attention.layer_norm_epsilon"],
        vision_use_head=False,
    )
    model = SiglipVisionModel(config).eval()
    model.load_state_dict(state)
    first, second = (torch.nn.Linear(1, 1) for _ in range(2))
    for layer, name in ((first, "mm.0"), (second, "mm.2")):
        layer.weight.data, layer.bias.data = both("it", name).values()
    return second(torch.nn.functional.gelu(first(model(pictures).last_hidden_state), approximate="tanh"))


@pytest.mark.parametrize(("release", "layers"), [(2, 2), (3, 3)], ids=["linear", "mlp_with_norm"])
@torch.no_grad()
def test_a_siglip_encoder_and_either_projection_give_our_features(tmp_path, release, layers):
    source = make_source(release)
    keys, _, _ = written(source, tmp_path) and read(tmp_path / "mmproj-f16.gguf")
    pictures = source.processor.pixel_values([Image.radial_gradient("L"), Image.linear_gradient("L")])

    found = embedded(tmp_path / "mmproj-f16.gguf", pictures)

    expected = source.model.vision_proj(
        MiniMindVLM.get_image_embeddings(pictures, source.model.vision_encoder)
    )
    assert keys["clip.vision.block_count"] == layers and keys["clip.vision.feature_layer"] == [layers]
    assert (keys["clip.projector_type"], keys["clip.use_gelu"]) == ("mlp", True)
    assert expected.std() > 0.1
    assert (found - expected).abs().max() < 0.01 * expected.abs().max()  # the encoder is rounded to fp16


def test_bilinear_preprocessing_takes_a_projector_that_has_it(tmp_path):
    source = make_source(3)
    source.processor.image_processor.resample = Image.Resampling.BILINEAR
    written(source, tmp_path)
    keys, _, _ = read(tmp_path / "mmproj-f16.gguf")
    assert keys["clip.projector_type"] == "phi4"
    assert [keys[f"clip.vision.image_{side}_pixels"] for side in ("min", "max")] == [60**2, 68**2]


def test_clips_positions_follow_its_class_token_to_the_end(tmp_path):
    source = make_source(encoder=CLIP)
    written(source, tmp_path)
    keys, values, _ = read(tmp_path / "mmproj-f16.gguf")
    ours = source.model.vision_encoder.state_dict()
    positions = ours["embeddings.position_embedding.weight"].numpy()
    assert np.array_equal(values["v.position_embd.weight"], np.concatenate([positions[1:], positions[:1]]))
    assert np.array_equal(values["v.class_embd"], ours["embeddings.class_embedding"].numpy())
    assert "v.pre_ln.weight" in values and "v.post_ln.weight" not in values
    assert keys["clip.use_gelu"] is False


# --- the entry point


def save(source: Source, folder: Path, encoder: Path) -> Path:
    path = folder / "tiny.pth"
    described = describe(
        source.model, source.processor.tokenizer, "sft_vlm", 7, {"vision_model_path": str(encoder)}
    )
    save_weights(path, half_state(source.model.state_dict()), described)
    return path


@pytest.mark.parametrize(("encoder", "warnings"), [(CLIP, 1), (SIGLIP, 0)], ids=["clip", "siglip"])
def test_export_is_read_back_and_says_what_a_class_token_costs(convert, tmp_path, caplog, encoder, warnings):
    weights = save(make_source(encoder=encoder), tmp_path, encoder)
    options = ["--format", "gguf", "--quantization", "q8_0"]
    caplog.set_level("INFO")

    assert convert("--weight", weights, "--out", tmp_path / "out", *options)[0] == 0

    names = {path.name for path in (tmp_path / "out").iterdir()}
    files = {"model-q8_0.gguf", "mmproj-f16.gguf", "minimind_sidecar.json", "README.md", "example.jpg"}
    assert names == files
    about = [message for message in caplog.messages if "25814" in message]
    assert len(about) == warnings and all(
        "\n" not in message and "372 of 400" in message for message in about
    )
    assert "both files, read back, hold the source's keys and tensors" in caplog.messages
    card = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    assert (
        "library_name: gguf" in card and "llama-mtmd-cli -m model-*.gguf" in card and "pipeline(" not in card
    )


def test_a_file_that_is_not_the_source_is_named(tmp_path):
    source = make_source()
    target.write(tmp_path, source)
    with torch.no_grad():
        source.model.model.layers[1].mlp.up_proj.weight[3, 5] += 1
    with pytest.raises(ValueError, match=r"^model-f16.gguf: blk.1.ffn_up.weight differs from the source$"):
        target.verify(tmp_path, source)


def test_quantization_is_for_gguf(convert, tmp_path):
    code, message = convert("--weight", "x.pth", "--out", tmp_path / "out", "--quantization", "q8_0")
    assert (code, message) == (2, "convert_to_hf.py: error: --quantization q8_0 is for --format gguf")


def of_another_size(source: Source) -> None:
    source.processor.image_processor.size = {"shortest_edge": 256}


CHANGES = {
    "pixel_shuffle": ({"encoder": CLIP, "pixel_shuffle": 2}, None, "pixel_shuffle is 2: llama.cpp's"),
    "dinov2": (
        {"encoder": "dinov2"},
        None,
        "the encoder is dinov2, expected one of clip_vision_model, siglip_",
    ),
    "mlp_of_clip": ({"encoder": CLIP, "projector": "mlp"}, None, "one more norm needs SigLIP's"),
    "gelu": ({"hidden_act": "gelu"}, None, "hidden_act is 'gelu': llama.cpp's llama has silu"),
    "unnormed": (
        {"release": 3, **MOE, "norm_topk_prob": False},
        None,
        "norm_topk_prob is False: llama.cpp's",
    ),
    "yarn": (
        {"rope_scaling": YARN | {"beta_fast": 16, "attention_factor": 1}},
        None,
        "llama.cpp's YaRN has beta_fast 32 and beta_slow 1",
    ),
    "larger_crop": (
        {"encoder": CLIP},
        of_another_size,
        "the image processor does more to a square than llama.cpp's",
    ),
    "marks_of_words": (
        {"tokenizer": "base"},
        None,
        "the tokenizer cuts text by None, which llama.cpp has no name",
    ),
}


@pytest.mark.parametrize(("config", "change", "message"), CHANGES.values(), ids=CHANGES.keys())
def test_what_llama_cpp_cannot_have_is_refused_by_name(tmp_path, config, change, message):
    config = dict(config)
    if config.get("encoder") == "dinov2":
        config["encoder"] = save_dinov2(tmp_path / "dinov2")
    if name := config.get("tokenizer"):
        write_tokenizer(tmp_path / name, name)
        config["tokenizer"] = tmp_path / name
    source = make_source(**config)
    if change:
        change(source)
    with pytest.raises(ValueError) as error:
        target.write(tmp_path, source)
    assert message in str(error.value)
