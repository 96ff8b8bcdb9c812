"""Flags and files -> tokenizer, processor, and a model with its weights; shared by training and inference."""

import logging
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoImageProcessor, PreTrainedTokenizerBase

from common.cli import UserError, user_errors
from common.tokenizer import check_tokenizer, load_tokenizer
from common.weights import SIZES, Sidecar, check_sizes, load_weights_file, read_sidecar, warn_of_heads
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.model_vlm import MiniMindVLM, VLMConfig, load_weights
from model.processing_vlm import PLACEHOLDER, MiniMindVLMProcessor

log = logging.getLogger(__name__)
transformers.logging.disable_progress_bar()  # weights are there in a blink
DEFAULT_TOKENIZER = "model/tokenizer"
DEFAULT_ENCODER = "model/vision_model/clip-vit-base-patch16"


def build_vlm(
    config: dict[str, Any], vision_model_path: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[MiniMindVLM, MiniMindVLMProcessor]:
    """A model with fresh weights and the encoder of `vision_model_path`, and its processor."""
    with user_errors():
        image_ids = [tokenizer.convert_tokens_to_ids(PLACEHOLDER)]  # the encoder sets how many
        parts = config | special_ids(tokenizer) | {"image_ids": image_ids}
        model = MiniMindVLM(VLMConfig(**parts), vision_model_path)
    tokens = len(model.config.image_ids)
    return model, MiniMindVLMProcessor(model.processor, tokenizer, tokens_per_image=tokens)


def build_lm(
    config: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> tuple[MiniMindForCausalLM, MiniMindVLMProcessor]:
    """A language model with fresh weights, and a processor that knows no images."""
    with user_errors():
        model = MiniMindForCausalLM(MiniMindConfig(**config | special_ids(tokenizer)))
    return model, MiniMindVLMProcessor(None, tokenizer)


def load_vlm(
    weight: str,
    vision_model_path: str | None = None,
    tokenizer_path: str | None = None,
    heads: dict[str, int | None] | None = None,
) -> tuple[MiniMindVLM, MiniMindVLMProcessor]:
    """A trained model in fp32 and eval mode on the CPU, and its processor: for evaluation, export and the web
    demo.

    `weight` is a `.pth`, the name of one in `out/`, or an exported folder, which holds encoder and tokenizer.
    For a `.pth` these come from its sidecar unless given. UserError if something is missing or does not fit.
    """
    path = find_weight(weight)
    if not path.is_dir():
        return load_pth(path, vision_model_path, tokenizer_path, heads)[:2]
    if vision_model_path or tokenizer_path or any((heads or {}).values()):
        raise UserError(f"{path} brings its own encoder, tokenizer and heads: their flags are for a .pth")
    return load_export(path)


def load_pth(
    path: Path,
    vision_model_path: str | None = None,
    tokenizer_path: str | None = None,
    heads: dict[str, int | None] | None = None,
) -> tuple[MiniMindVLM, MiniMindVLMProcessor, Sidecar]:
    """As `load_vlm`, for a `.pth` alone, and its sidecar."""
    state, sidecar = load_weights_file(path)
    if not any(key.startswith("vision_proj.") for key in state):
        raise UserError(f"{path} has no projection: a language model's weights, expected a VLM's")
    given = {name: count for name, count in (heads or {}).items() if count}
    check_sizes(sidecar, given, path)
    warn_of_heads(sidecar, given, path)
    sidecar = sidecar | {"config": sidecar["config"] | given}
    trained = {part: sidecar.get(part) or {} for part in ("tokenizer", "encoder")}
    tokenizer = load_tokenizer(tokenizer_path or trained["tokenizer"].get("path") or DEFAULT_TOKENIZER)
    check_tokenizer(sidecar, tokenizer, path, asked=tokenizer_path is not None)
    model, processor = build_vlm(
        sidecar["config"], vision_model_path or trained["encoder"].get("path") or DEFAULT_ENCODER, tokenizer
    )
    with user_errors(str(path)):
        load_weights(model, state)
    return model.eval(), processor, sidecar


def find_weight(weight: str) -> Path:
    """A path as it is; the name of a `.pth` in `out/` as the path of that."""
    path = Path(weight)
    named = Path("out") / f"{path.name.removesuffix('.pth')}.pth"
    is_name = path.parent == Path() and not path.exists()
    return named if is_name and named.is_file() else path


def load_export(folder: Path) -> tuple[MiniMindVLM, MiniMindVLMProcessor]:
    """An exported folder's model (fp32, eval mode) and processor, by our code: none of the folder's runs."""
    with user_errors(str(folder)):
        try:
            model, report = MiniMindVLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        except (RuntimeError, SafetensorError) as error:  # other sizes than the config's, a damaged file
            raise ValueError(str(error)) from error
        if missing := report["missing_keys"]:  # the library would go on with random weights
            raise ValueError(f"{len(missing)} weights are missing, {min(missing)} among them")
        image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    parts = image_processor, load_tokenizer(str(folder))
    return model.eval(), MiniMindVLMProcessor(*parts, tokens_per_image=len(model.config.image_ids))


def settings_of_base(path: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """The config of the weights at `path`, and `tokenizer_path` and `vision_model_path`, None where these are
    unknown. UserError where a size differs from the one that is `wanted`."""
    sidecar = read_sidecar(path) or load_weights_file(path)[1]
    check_sizes(sidecar, wanted, path)
    warn_of_heads(sidecar, wanted, path)
    flags = {"tokenizer_path": "tokenizer", "vision_model_path": "encoder"}
    return sidecar["config"] | {flag: (sidecar.get(part) or {}).get("path") for flag, part in flags.items()}


def special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Config fields that are the tokenizer's to say."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {"vocab_size": len(tokenizer)} | {name: getattr(tokenizer, name) for name in names}


def load_base(
    model: MiniMindForCausalLM, path: Path, tokenizer: PreTrainedTokenizerBase, tokenizer_asked: bool = False
) -> Sidecar:
    """Loads the `.pth` at `path` into `model`; a projection that the file lacks (an LM's) keeps its fresh
    weights.

    UserError where sizes or tokenizer do not agree. Returns the file's sidecar.
    """
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
