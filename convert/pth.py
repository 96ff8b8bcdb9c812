"""The way back: a folder of any target, also as others saved it, becomes our model again."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    InternVLConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from common.cli import user_errors
from common.tokenizer import load_tokenizer
from convert import internvl, llava
from convert.names import KINDS, State, from_text_config, from_text_state
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.model_vlm import MiniMindVLM, VLMConfig, load_weights
from model.processing_vlm import PLACEHOLDERS

READERS = {"llava": llava, "internvl": internvl}


def read_folder(folder: Path) -> tuple[MiniMindForCausalLM, PreTrainedTokenizerBase]:
    """Model (fp32) and tokenizer of a folder in the library's own architectures: a MiniMindVLM for LLaVA and
    InternVL, else the language model. UserError for what does not fit ours."""
    with user_errors(str(folder)):
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        if config.model_type == InternVLConfig.model_type:
            config = internvl.read_config(folder)
        tokenizer = load_tokenizer(str(folder))
        if config.model_type in KINDS:
            return read_language_model(folder, config), tokenizer
        return read_vlm(folder, config, tokenizer)


def read_language_model(folder: Path, config: PreTrainedConfig) -> MiniMindForCausalLM:
    fields = from_text_config(config)
    state, shared = from_text_state(load_state(folder, AutoModelForCausalLM, config), config)
    return filled(MiniMindForCausalLM(MiniMindConfig(**fields | shared)), state)


def read_vlm(
    folder: Path, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[MiniMindVLM, PreTrainedTokenizerBase]:
    if config.vision_feature_layer != -1:
        raise ValueError(f"vision_feature_layer is {config.vision_feature_layer}, expected -1, the last")
    theirs = load_state(folder, AutoModelForImageTextToText, config)

    def part(prefix: str, new: str = "") -> State:
        return {new + k.removeprefix(prefix): v for k, v in theirs.items() if k.startswith(prefix)}

    fields = from_text_config(config.text_config) | {"tie_word_embeddings": config.tie_word_embeddings}
    text = part("model.language_model.", "model.") | part("lm_head.", "lm_head.")
    state, shared = from_text_state(text, config.text_config)
    image_id, token = config.image_token_id, tokenizer.convert_ids_to_tokens(config.image_token_id)
    if token == llava.MARKER and image_id == fields["vocab_size"] - 1:  # the row that the export added
        fields["vocab_size"] = image_id
        for key in ("model.embed_tokens.weight", "lm_head.weight"):
            state[key] = state[key][:image_id]
        tokenizer, token = without_marker(tokenizer), PLACEHOLDERS[-1]
        image_id = tokenizer.convert_tokens_to_ids(token)
    projector, encoder = part("model.multi_modal_projector."), part("model.vision_tower.")
    state |= READERS[config.model_type].read_projector(projector, encoder, config)
    vars(config.vision_config).pop("tie_last_hidden_states", None)
    ours = VLMConfig(
        **fields | shared,
        image_ids=[image_id] * config.image_seq_length,
        image_special_token=token * config.image_seq_length,
        vision_config=config.vision_config,
        projector="mlp" if "vision_proj.mlp.0.weight" in state else "linear",
        pixel_shuffle=round(1 / getattr(config, "downsample_ratio", 1)),
    )
    return filled(MiniMindVLM(ours), state), tokenizer


def filled(model: MiniMindForCausalLM, state: State) -> MiniMindForCausalLM:
    """The model with these weights. ValueError for a value that the fp16 of our `.pth` cannot hold."""
    largest = torch.finfo(torch.float16).max
    for key, value in state.items():
        if not key.startswith("vision_encoder.") and not (value.abs() <= largest).all():
            found = f"{key} has {value.abs().max():g}"
            raise ValueError(f"{found}, beyond fp16's {largest:g}: a .pth cannot hold it")
    load_weights(model, state)
    return model.eval()


def load_state(folder: Path, model_class: type, config: PreTrainedConfig) -> State:
    """The state dict of the library's own class in fp32. ValueError for missing or damaged weights."""
    try:
        options = dict(config=config, local_files_only=True, output_loading_info=True)
        options |= dict(ignore_mismatched_sizes=True)  # they are told below
        model, report = model_class.from_pretrained(folder, dtype=torch.float32, **options)
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(str(error)) from error
    if wrong := report["mismatched_keys"]:
        key, found, expected = min(wrong)
        raise ValueError(f"{key} has shape {tuple(found)}, but its config says {tuple(expected)}")
    if missing := report["missing_keys"]:  # the library would go on with random weights
        raise ValueError(f"{len(missing)} weights are missing, {min(missing)} among them")
    return model.state_dict()


def without_marker(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer that `llava.with_marker` was given."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    parts["added_tokens"] = [token for token in parts["added_tokens"] if token["content"] != llava.MARKER]
    names = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(parts)), **names)
