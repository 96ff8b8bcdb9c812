"""The target `gguf`: two files for llama.cpp, the language model, and its `mmproj`: encoder and projection.

llama.cpp's projectors `mlp` and `phi4` are linear, GELU, linear: GELU of large numbers of either sign passes
a linear projection on as it is, and the norm of an MLP becomes part of the encoder. gguf.json has its names.
"""

import copy
import json
import logging
import math
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, TokenType
from PIL import Image

from convert.export import Source
from convert.llava import LARGE, TOWERS, with_norm
from convert.names import State, to_text_config, to_text_state

log = logging.getLogger(__name__)
logging.getLogger("gguf").setLevel(logging.WARNING)
NAMES = json.loads(Path(__file__).with_name("gguf.json").read_text(encoding="utf-8"))
TEMPLATE = Path(__file__).with_name("gguf.jinja")
RESAMPLING = {"mlp": Image.Resampling.BICUBIC, "phi4": Image.Resampling.BILINEAR}  # by projector
SCALE = 2.0**10  # gelu(s x) / s - gelu(-s x) / s is x
CLASS_TOKEN = (
    "warning: llama.cpp puts this encoder's class token last, and loses its first patch (its issue 25814)"
)
CLASS_TOKEN += ": 372 of 400 answers of the demo are equal; docs/interoperability.md has a fix of one line"
Content = tuple[dict[str, Any], State]  # a file's keys, and tensors: those in fp16 may be stored in less


def write(folder: Path, source: Source, quantization: str = "f16") -> None:
    for name, (keys, tensors) in contents(source, quantization).items():
        writer = gguf.GGUFWriter(folder / name, keys.pop("general.architecture"))
        for key, value in keys.items():
            kind = gguf.GGUFValueType.get_type(value)
            writer.add_key_value(key, value, gguf.GGUFValueType.UINT32 if type(value) is int else kind)
        for key, value in tensors.items():
            less = value.dtype == torch.float16 and value.shape[-1] % 32 == 0 and "mmproj" not in name
            kind = GGMLQuantizationType[quantization.upper() if less else f"F{value.itemsize * 8}"]
            writer.add_tensor(key, gguf.quants.quantize(value.float().numpy(), kind), raw_dtype=kind)
        for part in ("header", "kv_data", "tensors"):
            getattr(writer, f"write_{part}_to_file")()
        writer.close()


def verify(folder: Path, source: Source) -> str:
    """Reads the files back. ValueError for what is not the source's, rounded."""
    quantization = next(folder.glob("model-*.gguf")).stem.removeprefix("model-")
    for name, (keys, tensors) in contents(source, quantization).items():
        reader = gguf.GGUFReader(folder / name)
        found = {key: field.contents() for key, field in reader.fields.items()}
        wrong = [key for key, value in keys.items() if found.get(key) != value]
        for it in reader.tensors:
            expected = gguf.quants.quantize(tensors.pop(it.name).float().numpy(), it.tensor_type)
            wrong += [] if np.array_equal(expected, it.data) else [it.name]
        if wrong := [*wrong, *tensors]:
            raise ValueError(f"{name}: {wrong[0]} differs from the source")
    if source.model.config.vision_config.model_type == TOWERS[0]:
        log.warning(CLASS_TOKEN)
    return "both files, read back, hold the source's keys and tensors"


def contents(source: Source, quantization: str) -> dict[str, Content]:
    return {f"model-{quantization}.gguf": language_model(source), "mmproj-f16.gguf": vision_model(source)}


def named(part: str, config: Any) -> dict[str, Any]:
    """A config's fields under llama.cpp's names, floats as fp32 has them."""
    return {theirs: single(getattr(config, ours)) for theirs, ours in NAMES[part].items()}


def single(value: Any) -> Any:
    return np.float32(value).tolist() if isinstance(value, float | list | tuple) else value


def language_model(source: Source) -> Content:
    ours, theirs = source.model.config, to_text_config(source.model.config)
    architecture, parts, tensors = NAMES["architecture"][theirs.model_type], {}, {}
    fields = named("language_model", ours) | {"rope.freq_base": single(float(ours.rope_theta))}
    if ours.hidden_act != "silu":
        raise ValueError(f"hidden_act is {ours.hidden_act!r}: llama.cpp's {architecture} has silu")
    if (rope := theirs.rope_parameters)["rope_type"] == "yarn":
        if (rope["beta_fast"], rope["beta_slow"]) != (32, 1):
            raise ValueError(f"rope_scaling is {rope}: llama.cpp's YaRN has beta_fast 32 and beta_slow 1")
        # It is multiplied there by the magnitude that YaRN's paper has.
        magnitude = rope["attention_factor"] / (0.1 * math.log(rope["factor"]) + 1)
        scaling = {"type": "yarn", "factor": float(rope["factor"]), "attn_factor": magnitude}
        scaling["original_context_length"] = rope["original_max_position_embeddings"]
        fields |= {f"rope.scaling.{name}": single(value) for name, value in scaling.items()}
    if ours.use_moe:
        if ours.qk_norm and not theirs.norm_topk_prob:
            raise ValueError("norm_topk_prob is False: llama.cpp's qwen3moe always norms experts' weights")
        fields |= named("mixture", ours) | {"expert_weights_norm": theirs.norm_topk_prob}
        fields["expert_shared_count"] = max(ours.n_shared_experts, 1)
    for key, value in to_text_state(source.model.state_dict(), ours).items():
        if not key.endswith((".bias", "shared_expert_gate.weight")):  # zeros, for Qwen2-MoE
            parts.setdefault(re.sub(r"\.experts\.\d+", ".experts", key), []).append(value)
    if ours.tie_word_embeddings and architecture != "bailingmoe":
        del parts["lm_head.weight"]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], ours.num_hidden_layers)
    for key, values in parts.items():
        value = torch.stack(values) if ".experts." in key else values[0]
        if key.endswith("shared_expert.down_proj.weight"):
            value = value / 2  # Qwen2-MoE halves it
        if not ours.qk_norm and key.endswith(("q_proj.weight", "k_proj.weight")):  # RoPE rotates pairs there
            value = value.unflatten(0, (-1, 2, ours.head_dim // 2)).transpose(1, 2).flatten(0, 2)
        is_exact = value.dim() == 1 or key.endswith("mlp.gate.weight")
        tensors[names.get_name(key, (".weight",))] = value if is_exact else value.half()
    keys = {"general.architecture": architecture, "general.name": "MiniMind-V", **tokenizer_keys(source)}
    return keys | {f"{architecture}.{name}": value for name, value in fields.items()}, tensors


def tokenizer_keys(source: Source) -> dict[str, Any]:
    tokenizer = source.processor.tokenizer
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    cut = parts["pre_tokenizer"] or {}
    cut = cut.get("pretokenizers", [cut])[0]
    cut = cut["pattern"].get("Regex") if "pattern" in cut else cut.get("type")
    if parts["model"]["type"] != "BPE" or cut not in NAMES["pre_tokenizer"]:
        raise ValueError(f"the tokenizer cuts text by {cut!r}, which llama.cpp has no name for")
    tokens = {i: (token, int(TokenType.NORMAL)) for token, i in tokenizer.get_vocab().items()}
    kinds = {True: int(TokenType.CONTROL), False: int(TokenType.USER_DEFINED)}
    tokens |= {it["id"]: (it["content"], kinds[it["special"]]) for it in parts["added_tokens"]}
    fields = {"model": "gpt2", "pre": NAMES["pre_tokenizer"][cut], "add_bos_token": False}
    fields["tokens"], fields["token_type"] = map(list, zip(*(tokens[i] for i in sorted(tokens)), strict=True))
    fields["merges"] = [it if isinstance(it, str) else " ".join(it) for it in parts["model"]["merges"]]
    fields |= {name: i for name, i in named("tokenizer", tokenizer).items() if i is not None}
    template = TEMPLATE.read_text(encoding="utf-8").replace("TEMPLATE", source.processor.chat_template)
    return {f"tokenizer.ggml.{k}": v for k, v in fields.items()} | {"tokenizer.chat_template": template}


def vision_model(source: Source) -> Content:
    model, vision = source.model, copy.deepcopy(source.model.config.vision_config)
    act, size, half = vision.hidden_act, vision.image_size, vision.patch_size // 2
    if vision.model_type not in TOWERS:
        raise ValueError(f"the encoder is {vision.model_type}, expected one of {', '.join(TOWERS)}")
    if (r := model.config.pixel_shuffle) != 1:
        raise ValueError(f"pixel_shuffle is {r}: llama.cpp's projectors have no such step alone")
    if act not in NAMES["use_gelu"] or vision.intermediate_size == vision.hidden_size:
        sizes = f"intermediate_size {vision.intermediate_size}, hidden_size {vision.hidden_size}"
        raise ValueError(f"the encoder's hidden_act is {act!r}, {sizes}: llama.cpp has no such encoder")
    encoder, is_clip = model.vision_encoder.state_dict(), vision.model_type == TOWERS[0]
    projection = list(model.vision_proj.state_dict().values())
    if model.config.projector == "mlp":
        encoder, projection = with_norm(encoder, vision, model.vision_proj.mlp[0]), projection[2:]
    else:
        (weight, bias), identity = (SCALE * part for part in projection), torch.eye(model.config.hidden_size)
        projection = [torch.cat([weight, -weight]), torch.cat([bias, -bias])]
        projection += [torch.cat([identity, -identity], 1) / SCALE, torch.zeros(len(identity))]
    tensors = dict(zip(("mm.0.weight", "mm.0.bias", "mm.2.weight", "mm.2.bias"), projection, strict=True))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, vision.num_hidden_layers)
    for key, value in encoder.items():
        if key.startswith(("head.", "post_layernorm.")[: 1 + is_clip]):  # what pools
            continue
        if is_clip and "position" in key:
            value = value.roll(-1, 0)  # the class token is the first here, the last there
        # Where LARGE passes, fp16 would overflow: llama.cpp rounds what it multiplies as the weights are.
        is_exact = value.dim() == 1 or "position" in key or value.abs().max() >= LARGE**0.5
        name = names.get_name(f"vision_tower.vision_model.{key}", (".weight", ".bias"))
        tensors[name] = value.float() if is_exact else value.half()
    fields = named("encoder", vision) | named("image_processor", source.processor.image_processor)
    fields["feature_layer"] = [vision.num_hidden_layers]  # `mlp` would stop one before the last
    # `phi4` takes pictures of any size: this makes a square one of image_size.
    fields |= {"image_min_pixels": (size - half) ** 2, "image_max_pixels": (size + half) ** 2}
    fields["projection_dim"] = model.config.hidden_size
    keys = {"general.architecture": "clip", "general.name": "MiniMind-V", "clip.has_vision_encoder": True}
    keys |= {"clip.projector_type": projector_type(source, is_clip), "clip.use_gelu": NAMES["use_gelu"][act]}
    return keys | {f"clip.vision.{name}": value for name, value in fields.items()}, tensors


def projector_type(source: Source, is_clip: bool) -> str:
    """The projector that prepares a square as the image processor does. ValueError if there is none."""
    size, settings = source.model.config.vision_config.image_size, source.processor.image_processor
    square = Image.effect_noise((2 * size - 3,) * 2, 64).convert("RGB")
    found = source.processor.pixel_values([square])[0].permute(1, 2, 0).numpy()  # (S, S, 3)
    found = (found * settings.image_std + settings.image_mean) * 255
    for projector, resampling in list(RESAMPLING.items())[: 1 if is_clip else 2]:
        if np.allclose(found, square.resize((size, size), resampling), rtol=0, atol=0.01):
            return projector
    raise ValueError(f"the image processor does more to a square than llama.cpp's resize to {size} pixels")
