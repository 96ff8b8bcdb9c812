"""Flags and files -> tokenizer, processor, and a model with its weights; shared by training and inference."""

import logging
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedTokenizerBase

from common.cli import UserError, user_errors
from common.distributed import resolve_dtype
from common.tokenizer import check_tokenizer
from common.weights import SIZES, Sidecar, check_sizes, load_weights_file, release_of
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.model_vlm import MiniMindVLM, VLMConfig, load_weights
from model.processing_vlm import PLACEHOLDERS, MiniMindVLMProcessor

log = logging.getLogger(__name__)
transformers.logging.disable_progress_bar()  # weights are there in a blink
# Where weights do not tell, by their release; download.py puts the published ones there.
TOKENIZERS = {2: "model/tokenizer", 3: "out/minimind3-tokenizer"}
ENCODERS = {2: "model/vision_model/clip-vit-base-patch16", 3: "model/vision_model/siglip2-base-p32-256-ve"}


def build_vlm(
    config: dict[str, Any], vision_model_path: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[MiniMindVLM, MiniMindVLMProcessor]:
    """A model with fresh weights and the encoder of `vision_model_path`, and its processor. UserError where
    tokenizer or encoder are not of the kind that the weights of `config` were trained with."""
    text = MiniMindVLMProcessor(None, tokenizer)
    trained = config.get("image_special_token") or text.placeholder
    if not trained.startswith(text.placeholder):
        unit = next((token for token in PLACEHOLDERS if trained.startswith(token)), trained)
        found = f"the tokenizer {tokenizer.name_or_path} has {text.placeholder}"
        raise UserError(f"the model takes {unit} for an image, {found}: they are of different releases")
    image = {"image_ids": [text.placeholder_id], "image_special_token": text.placeholder}
    with user_errors():  # the encoder sets how many
        model = MiniMindVLM(VLMConfig(**config | special_ids(tokenizer) | image), vision_model_path)
    tokens, known = len(model.config.image_ids), len(config.get("image_ids") or ())
    if known not in (0, tokens):
        found = f"the encoder {vision_model_path} has {tokens} tokens for an image"
        raise UserError(f"{found}, the weights were trained with one that has {known}")
    return model, MiniMindVLMProcessor(model.processor, tokenizer, tokens_per_image=tokens)


def build_lm(
    config: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> tuple[MiniMindForCausalLM, MiniMindVLMProcessor]:
    """A language model with fresh weights, and a processor that knows no images."""
    config = {name: value for name, value in config.items() if name in MiniMindConfig.__annotations__}
    with user_errors():
        model = MiniMindForCausalLM(MiniMindConfig(**config | special_ids(tokenizer)))
    return model, MiniMindVLMProcessor(None, tokenizer)


def place(model: MiniMindForCausalLM, device: torch.device, dtype: str, encoder_dtype: str = "auto") -> None:
    """Moves a model to where it runs. Its weights stay in fp32, for autocast in `dtype`; the encoder's are in
    `encoder_dtype`, which no autocast touches: auto means as `dtype`."""
    model.to(device)
    if encoder := getattr(model, "vision_encoder", None):
        encoder.to(resolve_dtype(dtype if encoder_dtype == "auto" else encoder_dtype, device))


def settings_of_base(path: Path, wanted: dict[str, Any], encoder: str | None) -> tuple[dict, dict]:
    """The config of the weights at `path`, for `encoder` or their own; `tokenizer_path`, `vision_model_path`,
    None where these are unknown. UserError where a size differs from the one that is `wanted`."""
    state, sidecar = load_weights_file(path)
    flags = {"tokenizer_path": "tokenizer", "vision_model_path": "encoder"}
    paths = {flag: (sidecar.get(part) or {}).get("path") for flag, part in flags.items()}
    encoder = encoder or paths["vision_model_path"] or ENCODERS[release_of(sidecar["config"])]
    sidecar = with_pixel_shuffle(sidecar, state, encoder, path)
    check_sizes(sidecar, wanted, path)
    return sidecar["config"], paths


def with_pixel_shuffle(sidecar: Sidecar, state: dict[str, Any], encoder: str, path: Path) -> Sidecar:
    """The sidecar with the `pixel_shuffle` of the weights, read off the projection where it knows no encoder;
    a language model learns with any, and with any number of tokens for an image."""
    config = sidecar["config"] | {"pixel_shuffle": sidecar["config"].get("pixel_shuffle", 1)}
    inputs = [key for key in state if key.startswith("vision_proj.") and key.endswith(".0.weight")]
    if not inputs:
        config = {name: value for name, value in config.items() if name not in ("pixel_shuffle", "image_ids")}
    elif not sidecar.get("encoder") and Path(encoder).is_dir():
        with user_errors():
            width = MiniMindVLM.get_vision_model(encoder)[0].config.hidden_size
        found = state[inputs[0]].shape[-1]
        if (r := int((found / width) ** 0.5)) > 1 and r * r * width == found:
            log.warning("warning: %s: its projection's width, %d, means pixel_shuffle %d", path, found, r)
            config |= {"pixel_shuffle": r, "image_ids": None}
    return sidecar | {"config": config}


def special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Config fields that are the tokenizer's to say."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {"vocab_size": len(tokenizer)} | {name: getattr(tokenizer, name) for name in names}


def load_base(
    model: MiniMindForCausalLM, path: Path, tokenizer: PreTrainedTokenizerBase, tokenizer_asked: bool = False
) -> Sidecar:
    """Loads the `.pth` at `path` into `model`, and returns its sidecar; a projection that the file lacks (an
    LM's) keeps its fresh weights. UserError where sizes or tokenizer do not agree."""
    state, sidecar = load_weights_file(path)
    check_tokenizer(sidecar, tokenizer, path, tokenizer_asked)
    check_sizes(sidecar, {name: getattr(model.config, name) for name in SIZES}, path)
    fresh = ()
    if isinstance(model, MiniMindVLM) and not any(key.startswith("vision_proj.") for key in state):
        log.info("%s has no projection: it starts with fresh weights", path)
        fresh = ("vision_proj.",)
    with user_errors(str(path)):
        load_weights(model, state, allow_missing=fresh)
    return sidecar
