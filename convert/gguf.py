"""The target `gguf`: two files for llama.cpp, the language model, and its `mmproj`: encoder and projection.

llama.cpp's projectors `mlp` and `phi4` are linear, GELU, linear: GELU of large numbers of either sign passes
a linear projection on as it is, and the norm of an MLP becomes part of the encoder.
"""

import copy
import json
import logging
import math
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from PIL import Image

from convert.export import Source
from convert.llava import TOWERS, with_norm
from convert.names import PROJECTIONS, State, to_text_config, to_text_state

log = logging.getLogger(__name__)
logging.getLogger("gguf").setLevel(logging.WARNING)
ARCHITECTURES = {(False, False): "llama", (False, True): "bailingmoe"}  # by (qk_norm, use_moe)
ARCHITECTURES |= {(True, False): "qwen3", (True, True): "qwen3moe"}
USES_GELU = {"quick_gelu": False, "gelu_pytorch_tanh": True, "gelu": True}
RESAMPLING = {"mlp": Image.Resampling.BICUBIC, "phi4": Image.Resampling.BILINEAR}  # by projector
SCALE = 2.0**10  # gelu(s x) / s - gelu(-s x) / s is x
TEMPLATE = Path(__file__).with_name("gguf.jinja")
CLASS_TOKEN = (
    "warning: llama.cpp as it is puts this encoder's class token last (issue 25814), and answers"
)
CLASS_TOKEN += " 31 instead of 43 of 60 demo questions rightly: docs/interoperability.md has a one-line fix"
# llama.cpp's names for how text is cut before merging. Ours has no merges over what GPT-2 does not cut.
QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
QWEN2 += r"|\s+(?!\S)|\s+"
LLAMA3 = QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|")
CUTS = {"ByteLevel": "gpt-2", r"[@\n]": "gpt-2", "Digits": "smollm", QWEN2: "qwen2", LLAMA3: "llama-bpe"}
Content = tuple[dict[str, Any], State]  # a file's keys, and tensors: those in fp16 may be stored in less


def write(folder: Path, source: Source, quantization: str = "f16") -> None:
    add = {bool: "add_bool", int: "add_uint32", float: "add_float32", str: "add_string", list: "add_array"}
    for name, (keys, tensors) in contents(source, quantization).items():
        writer = GGUFWriter(folder / name, keys.pop("general.architecture"))
        for key, value in keys.items():
            getattr(writer, add[type(value)])(key, value)
        for key, value in tensors.items():
            if not value.isfinite().all():
                raise ValueError(f"{key} has values that fp16 cannot hold")
            less = value.dtype == torch.float16 and value.shape[-1] % 32 == 0 and "mmproj" not in name
            kind = GGMLQuantizationType[quantization.upper() if less else f"F{value.itemsize * 8}"]
            writer.add_tensor(key, gguf.quants.quantize(value.float().numpy(), kind), raw_dtype=kind)
        for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
            step()
        writer.close()


def verify(folder: Path, source: Source) -> str:
    """Reads both files back. ValueError for what differs."""
    if source.model.config.vision_config.model_type == "clip_vision_model":
        log.warning(CLASS_TOKEN)
    quantization = next(folder.glob("model-*.gguf")).stem.removeprefix("model-")
    for name, (keys, tensors) in contents(source, quantization).items():
        reader = gguf.GGUFReader(folder / name)
        found = {key: field.contents() for key, field in reader.fields.items()}
        found |= {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
        for key, expected in {**keys, **tensors}.items():
            if not is_near(found.get(key), expected):
                raise ValueError(f"{name}: {key} differs from the source")
    return "both files were read back, and hold the source"


def is_near(found: Any, expected: Any) -> bool:
    """Whether a key or a tensor, read back, is what was written, but for rounding: Q8_0 has 255 steps."""
    if isinstance(expected, list | str) or found is None:
        return found == expected
    expected = np.asarray(expected, np.float32)
    return np.allclose(found, expected, rtol=0, atol=np.abs(expected).max() / 200)


def contents(source: Source, quantization: str) -> dict[str, Content]:
    return {f"model-{quantization}.gguf": language_model(source), "mmproj-f16.gguf": vision_model(source)}


def language_model(source: Source) -> Content:
    ours, state = source.model.config, source.model.state_dict()
    theirs, architecture = to_text_config(ours), ARCHITECTURES[ours.qk_norm, ours.use_moe]
    base, is_normed = ours.rope_theta, getattr(theirs, "norm_topk_prob", True)
    if ours.hidden_act != "silu":
        raise ValueError(f"hidden_act is {ours.hidden_act!r}: llama.cpp's {architecture} has silu")
    fields = dict(vocab_size=ours.vocab_size, context_length=ours.max_position_embeddings)
    fields |= dict(embedding_length=ours.hidden_size, feed_forward_length=ours.intermediate_size)
    fields |= {"block_count": ours.num_hidden_layers, "attention.head_count": ours.num_attention_heads}
    fields |= {"attention.head_count_kv": ours.num_key_value_heads, "rope.dimension_count": ours.head_dim}
    fields |= {"attention.key_length": ours.head_dim, "attention.value_length": ours.head_dim}
    fields |= {"attention.layer_norm_rms_epsilon": ours.rms_norm_eps, "rope.freq_base": float(base)}
    if (rope := theirs.rope_parameters)["rope_type"] == "yarn":
        if (rope["beta_fast"], rope["beta_slow"]) != (32, 1):
            raise ValueError(f"rope_scaling is {rope}: llama.cpp's YaRN has beta_fast 32 and beta_slow 1")
        factor, length = float(rope["factor"]), rope["original_max_position_embeddings"]
        # There it is multiplied by the magnitude of YaRN's paper.
        magnitude = rope["attention_factor"] / (0.1 * math.log(factor) + 1)
        fields |= {"rope.scaling.type": "yarn", "rope.scaling.factor": factor}
        fields |= {"rope.scaling.original_context_length": length, "rope.scaling.attn_factor": magnitude}
    if ours.use_moe:
        if ours.qk_norm and not is_normed:
            raise ValueError("norm_topk_prob is False: llama.cpp's qwen3moe norms the experts' weights")
        fields |= dict(expert_count=ours.n_routed_experts, expert_used_count=ours.num_experts_per_tok)
        fields |= dict(expert_feed_forward_length=ours.moe_intermediate_size, expert_weights_norm=is_normed)
        fields |= dict(expert_shared_count=max(ours.n_shared_experts, 1))
    keys = {"general.architecture": architecture, "general.name": "MiniMind-V"}
    keys |= {f"{architecture}.{name}": value for name, value in fields.items()} | tokenizer_keys(source)
    parts = defaultdict(list)
    for key, value in to_text_state(state, ours).items():
        if not key.endswith((".bias", "shared_expert_gate.weight")):  # zeros, of Qwen2-MoE
            parts[re.sub(r"\.experts\.\d+", ".experts", key)].append(value)
    if ours.tie_word_embeddings and architecture != "bailingmoe":
        del parts["lm_head.weight"]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], ours.num_hidden_layers)
    tensors = {}
    for key, values in parts.items():
        value = torch.stack(values) if ".experts." in key else values[0]
        if key.endswith("shared_expert.down_proj.weight"):
            value = value * PROJECTIONS[-1][-1]
        if not ours.qk_norm and (found := re.search(r"\.([qk])_proj", key)):  # RoPE rotates pairs, not halves
            heads = ours.num_attention_heads if found[1] == "q" else ours.num_key_value_heads
            value = value.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        is_exact = value.dim() == 1 or key.endswith("mlp.gate.weight")
        tensors[names.get_name(key, (".weight",))] = value if is_exact else value.half()
    return keys, tensors


def tokenizer_keys(source: Source) -> dict[str, Any]:
    tokenizer, config = source.processor.tokenizer, source.model.config
    parts, tokens = json.loads(tokenizer.backend_tokenizer.to_str()), {}
    first = (parts["pre_tokenizer"] or {}).get("pretokenizers", [parts["pre_tokenizer"] or {}])[0]
    cut = first.get("pattern", {}).get("Regex") or first.get("type")
    if parts["model"]["type"] != "BPE" or cut not in CUTS:
        raise ValueError(f"the tokenizer cuts text by {cut!r}, which llama.cpp does not know")
    tokens = {i: (token, TokenType.NORMAL) for token, i in tokenizer.get_vocab().items()}
    if max(tokens) >= config.vocab_size:
        raise ValueError(f"vocab_size is {config.vocab_size}, but the tokenizer has {max(tokens) + 1} tokens")
    for token in parts["added_tokens"]:
        kind = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
        tokens[token["id"]] = token["content"], kind
    rows = [tokens.get(i, (f"[unused {i}]", TokenType.UNUSED)) for i in range(config.vocab_size)]
    end = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
    ids = {"bos": config.bos_token_id, "eos": end, "eot": end, "padding": config.pad_token_id}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in parts["model"]["merges"]]
    keys = {"model": "gpt2", "pre": CUTS[cut], "merges": merges, "add_bos_token": False}
    keys |= {"tokens": [token for token, _ in rows], "token_type": [int(kind) for _, kind in rows]}
    keys |= {f"{name}_token_id": i for name, i in ids.items() if i is not None}
    template = TEMPLATE.read_text().replace("TEMPLATE", source.processor.chat_template)
    named = {f"tokenizer.ggml.{name}": value for name, value in keys.items()}
    return named | {"tokenizer.chat_template": template}


def vision_model(source: Source) -> Content:
    model, vision = source.model, copy.deepcopy(source.model.config.vision_config)
    is_clip, size, step = vision.model_type == "clip_vision_model", vision.image_size, vision.patch_size // 2
    if vision.model_type not in TOWERS:
        raise ValueError(f"the encoder is {vision.model_type}, expected one of {', '.join(TOWERS)}")
    if (r := model.config.pixel_shuffle) != 1:
        raise ValueError(f"pixel_shuffle is {r}: llama.cpp's projectors have no such step alone")
    if vision.hidden_act not in USES_GELU or vision.intermediate_size == vision.hidden_size:
        sizes = f"hidden_act {vision.hidden_act!r}, intermediate_size {vision.intermediate_size}"
        raise ValueError(f"the encoder has {sizes}: expected {', '.join(USES_GELU)}, and not its hidden_size")
    encoder, exact = model.vision_encoder.state_dict(), "none"
    if model.config.projector == "mlp":
        norm, first, _, second = model.vision_proj.mlp
        encoder = with_norm(encoder, vision, norm)
        exact = f"encoder.layers.{vision.num_hidden_layers - 1}.mlp"
        parts = first.weight, first.bias, second.weight, second.bias
    else:
        linear, identity = model.vision_proj.vision_proj[0], torch.eye(model.config.hidden_size) / SCALE
        first, second = (torch.cat([part, -part]) for part in (linear.weight * SCALE, linear.bias * SCALE))
        parts = first, second, torch.cat([identity, -identity], 1), torch.zeros(len(identity))
    names = [f"mm.{i}.{name}" for i in (0, 2) for name in ("weight", "bias")]
    tensors = {name: part.detach() for name, part in zip(names, parts, strict=True)}
    fields = dict(image_size=size, patch_size=vision.patch_size, projection_dim=model.config.hidden_size)
    # `phi4` makes any square one of image_size.
    fields |= dict(image_min_pixels=(size - step) ** 2, image_max_pixels=(size + step) ** 2)
    for name in ("image_mean", "image_std"):
        fields[name] = [float(value) for value in getattr(source.processor.image_processor, name)]
    fields |= dict(embedding_length=vision.hidden_size, feed_forward_length=vision.intermediate_size)
    # `mlp` takes the last layer but one by default.
    fields |= dict(block_count=vision.num_hidden_layers, feature_layer=[vision.num_hidden_layers])
    fields |= {"attention.head_count": vision.num_attention_heads}
    fields |= {"attention.layer_norm_epsilon": vision.layer_norm_eps}
    keys = {"general.architecture": "clip", "general.name": "MiniMind-V", "clip.has_vision_encoder": True}
    keys |= {"clip.projector_type": projector_type(source), "clip.use_gelu": USES_GELU[vision.hidden_act]}
    keys |= {f"clip.vision.{name}": value for name, value in fields.items()}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, vision.num_hidden_layers)
    for key, value in encoder.items():
        if key.startswith("head.") or (is_clip and key.startswith("post_layernorm")):  # what pools
            continue
        is_exact = value.dim() == 1 or "position" in key or key.startswith(exact)
        name = names.get_name(f"vision_tower.vision_model.{key}", (".weight", ".bias"))
        tensors[name] = value.float() if is_exact else value.half()
    return keys, tensors


def projector_type(source: Source) -> str:
    """The one that prepares squares as the image processor does. ValueError if none does."""
    size, processor = source.model.config.vision_config.image_size, source.processor
    square = Image.effect_noise((2 * size - 3, 2 * size - 3), 64).convert("RGB")
    mean, std = processor.image_processor.image_mean, processor.image_processor.image_std
    found = processor.pixel_values([square])[0].permute(1, 2, 0).numpy()  # (S, S, 3)
    has_class_token = source.model.config.vision_config.model_type == "clip_vision_model"
    for projector, resampling in list(RESAMPLING.items())[: 1 if has_class_token else None]:
        pixels = (np.asarray(square.resize((size, size), resampling)) / 255 - mean) / std
        if found.shape == pixels.shape and np.allclose(found, pixels, atol=1e-4):
            return projector
    raise ValueError(f"the image processor does more to a square than llama.cpp's resize to {size} pixels")
