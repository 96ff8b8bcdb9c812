"""The target `llava`: LlavaForConditionalGeneration and LlavaProcessor, without code of ours.

What `internvl` shares with it stands here too: the folder's files.
"""

import copy
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, LlavaConfig, LlavaProcessor, PreTrainedConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from convert.export import Source, compare, prepare_tokenizer, save_generation_config, save_tensors
from convert.names import State, to_text_config, to_text_state

MARKER = "<image>"
CLASS_TOKENS = ("embeddings.class_embedding", "embeddings.cls_token")
TOWERS = ("clip_vision_model", "siglip_vision_model")
SCALE = 2.0**10  # tanh(x / SCALE) * SCALE is x, but for 4e-5 in the logits (2^8: 7e-4)
LARGE = 2.0**30  # a power of four; what the residual stream adds to it is lost in fp32
LARGER = 2.0**54  # likewise, and so is what LARGE has added
# Templates that know only strings get messages whose parts are joined as our processor joins them. vLLM sends
# parts to those alone that loop over something of the name `content`.
FLATTEN = Path(__file__).with_name("flatten.jinja")
verify = compare


def write(folder: Path, source: Source, projector_act: str = "linear") -> None:
    """Exactly as it is, or, with `projector_act` tanh, for vLLM: that knows no linear projection, and leaves
    out the encoder's last norm."""
    model = source.model
    if model.config.pixel_shuffle != 1:
        raise ValueError(f"pixel_shuffle is {model.config.pixel_shuffle}: LLaVA has no such step")
    vision, encoder = copy.deepcopy(model.config.vision_config), model.vision_encoder.state_dict()
    if vision.model_type not in TOWERS:
        raise ValueError(f"the encoder is {vision.model_type}, expected one of {', '.join(TOWERS)}")
    for_vllm, last_norm, large = projector_act == "tanh", model.vision_encoder.post_layernorm, LARGE
    if model.config.projector == "mlp":
        last_norm, first, _, second = model.vision_proj.mlp
        encoder, projector_act, large = with_norm(encoder, vision, last_norm), "gelu", LARGER
        parts = first.weight, first.bias, second.weight, second.bias
    else:
        linear, width = model.vision_proj.vision_proj[0], model.config.hidden_size
        scale = SCALE if for_vllm else 1.0
        parts = linear.weight / scale, linear.bias / scale, torch.eye(width) * scale, torch.zeros(width)
    names = [f"linear_{i}.{name}" for i in (1, 2) for name in ("weight", "bias")]
    projector = {name: part.detach() for name, part in zip(names, parts, strict=True)}
    vision.tie_last_hidden_states = not for_vllm  # if not, hidden_states[-1] is before the last norm
    if for_vllm and vision.model_type != "clip_vision_model":
        encoder = with_norm(encoder, vision, last_norm, large)
        projector["linear_1.weight"] = projector["linear_1.weight"] / large
    write_folder(folder, source, LlavaConfig(projector_hidden_act=projector_act), vision, encoder, projector)


def with_norm(encoder: State, vision: PreTrainedConfig, norm: nn.LayerNorm, large: float = LARGE) -> State:
    """A SigLIP encoder that ends in the projection's `norm`, which LLaVA has no place for: one layer more
    (`vision` is told) adds `large` times its own last norm's output u to the residual stream x, and the norm
    of large * u + x is that of u: 1e-5 in the logits. Its MLP is linear: gelu(s u) - gelu(-s u) = s u."""
    width, inner, layer = vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers
    if vision.model_type != "siglip_vision_model" or inner < 2 * width:
        found = f"{vision.model_type}, {width} wide and {inner} within"
        raise ValueError(f"the encoder is {found}: one more norm needs SigLIP's, with twice the width within")
    s = large**0.5
    both = torch.cat([torch.eye(width), -torch.eye(width), torch.zeros(inner - 2 * width, width)]) * s
    last = {f"layer_norm2.{name}": encoder[f"post_layernorm.{name}"].clone() for name in ("weight", "bias")}
    last |= {"mlp.fc1.weight": both, "mlp.fc2.weight": both.T}
    before = f"encoder.layers.{layer - 1}."
    names = [key.removeprefix(before) for key in encoder if key.startswith(before)]
    blank = {name: torch.zeros_like(encoder[before + name]) for name in names}
    vision.num_hidden_layers += 1
    result = encoder | {f"encoder.layers.{layer}.{name}": value for name, value in (blank | last).items()}
    return result | {f"post_layernorm.{name}": value for name, value in norm.state_dict().items()}


def read_projector(projector: State, encoder: State, config: PreTrainedConfig) -> State:
    """Our projection for LLaVA's two layers. ValueError for what does not come down to one of ours."""
    act, vision = config.projector_hidden_act, config.vision_config
    first, second = ({name: projector[f"linear_{i}.{name}"] for name in ("weight", "bias")} for i in (1, 2))
    added = [key for key in encoder if key.endswith("self_attn.out_proj.weight") and not encoder[key].any()]
    vision.num_hidden_layers -= len(added)
    if added and not vision.tie_last_hidden_states:
        first["weight"] = first["weight"] * (LARGER if act == "gelu" else LARGE)
    if act == "gelu" and added:
        norm = {name: encoder[f"post_layernorm.{name}"] for name in ("weight", "bias")}
        parts = {0: norm, 1: first, 3: second}
        return {f"vision_proj.mlp.{i}.{name}": part[name] for i, part in parts.items() for name in part}
    weight, bias = second["weight"] @ first["weight"], second["weight"] @ first["bias"] + second["bias"]
    is_ours = torch.equal(second["weight"], torch.eye(len(bias)) * SCALE) and not second["bias"].any()
    if act != "linear" and not (act == "tanh" and is_ours):
        raise ValueError(f"projector_hidden_act {act!r} between two layers: ours is linear")
    return {"vision_proj.vision_proj.0.weight": weight, "vision_proj.vision_proj.0.bias": bias}


def write_folder(
    folder: Path,
    source: Source,
    config: PreTrainedConfig,
    vision: PreTrainedConfig,
    encoder: State,
    projector: State,
) -> None:
    """Completes `config` with what all such models have in common, and writes all files."""
    ours, image_token = source.model.config, source.processor.placeholder
    tokenizer = source.processor.tokenizer
    own_token = image_token not in tokenizer.added_tokens_encoder  # "@" is text as well
    if own_token:
        tokenizer, image_token = with_marker(tokenizer), MARKER
    image_id = tokenizer.convert_tokens_to_ids(image_token)
    if image_id > ours.vocab_size:
        raise ValueError(f"vocab_size is {ours.vocab_size}, but the tokenizer has {image_id} tokens")
    if registers := getattr(vision, "num_register_tokens", 0):
        raise ValueError(f"the encoder has {registers} registers: at most a class token can be dropped")
    has_class_token = any(name in encoder for name in CLASS_TOKENS)
    strategy = "default" if has_class_token else "full"
    config.text_config = to_text_config(ours, max(ours.vocab_size, image_id + 1))
    config.vision_config = vision
    config.image_token_id, config.image_seq_length = image_id, len(ours.image_ids)
    config.vision_feature_layer, config.vision_feature_select_strategy = -1, strategy
    config.tie_word_embeddings, config.dtype = ours.tie_word_embeddings, torch.float32
    config.architectures = [f"{type(config).__name__.removesuffix('Config')}ForConditionalGeneration"]
    config.save_pretrained(folder)

    text = to_text_state(source.model.state_dict(), ours)
    if image_id == ours.vocab_size:
        text |= {key: with_mean_row(text[key]) for key in ("model.embed_tokens.weight", "lm_head.weight")}
    if ours.tie_word_embeddings:
        del text["lm_head.weight"]
    # Names of the files that LLaVA was published with: the library renames them, vLLM knows no others.
    inner = "vision_model." if vision.model_type in TOWERS else ""
    save_tensors(
        folder,
        {f"language_model.{key}": value for key, value in text.items()},
        {f"multi_modal_projector.{key}": value for key, value in projector.items()},
        {f"vision_tower.{inner}{key}": value for key, value in encoder.items()},
    )
    save_generation_config(folder, ours, **({"suppress_tokens": [image_id]} if own_token else {}))
    prepare_tokenizer(tokenizer)
    flatten = "" if own_token else FLATTEN.read_text().replace("MARKER", image_token)
    LlavaProcessor(
        image_processor=copy.deepcopy(source.processor.image_processor),
        tokenizer=tokenizer,
        patch_size=vision.patch_size * ours.pixel_shuffle,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(has_class_token),
        image_token=image_token,
        chat_template=flatten + source.processor.chat_template,
    ).save_pretrained(folder)


def with_marker(tokenizer: Tokenizer) -> Tokenizer:
    """A copy that has `<image>` as a special token, the one after its last."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return AutoTokenizer.from_pretrained(folder, extra_special_tokens={"image_token": MARKER})


def with_mean_row(rows: Tensor) -> Tensor:
    """(V, C) -> (V + 1, C): the logit of the last row is the mean of all others, never the largest."""
    return torch.cat([rows, rows.mean(0, keepdim=True).half().to(rows.dtype)])
