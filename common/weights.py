"""Weights on disk: `{name}.pth`, an fp16 state dict without the encoder, and `{name}.json`, its sidecar.

The sidecar says what the tensors cannot: head counts, tokenizer, encoder, stage, step, arguments, versions.
"""

import json
import logging
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import torch
import transformers
from safetensors.torch import load_file
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.cli import UserError
from common.tokenizer import load_tokenizer, tokenizer_fingerprint
from dataset.files import write_atomically
from model.model_minimind import RELEASE_3_NAMES, MiniMindConfig
from model.model_vlm import without_encoder

log = logging.getLogger(__name__)
Sidecar = dict[str, Any]
SIZES = "hidden_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size use_moe".split()

FOLDER_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # of a transformers folder
# Release 3: its defaults in its own names, what it never varies in ours, and its YaRN.
RELEASE_3 = dict(hidden_size=768, num_key_value_heads=4, rms_norm_eps=1e-6, image_ids=[12])
RELEASE_3 |= dict(num_experts=4, num_experts_per_tok=1, router_aux_loss_coef=5e-4, image_token_len=64)
FIXED_3 = dict(qk_norm=True, projector="mlp", n_shared_experts=0, norm_top1_prob=True, seq_aux=False)
YARN_3 = dict(rope_type="yarn", factor=16, original_max_position_embeddings=2048)
YARN_3 |= dict(beta_fast=32, beta_slow=1, attention_factor=1.0)


def weight_name(stage: str, hidden_size: int, use_moe: bool) -> str:
    """File name of a stage's weights, such as `sft_vlm_512_moe.pth`."""
    return f"{stage}_{hidden_size}{'_moe' if use_moe else ''}.pth"


def save_weights(path: Path, state: dict[str, torch.Tensor], sidecar: Sidecar) -> None:
    """Writes a `half_state` and its sidecar, each whole or as it was before; UserError if that fails."""
    # torch.save stores the stem of a path inside the archive: with a handle, equal weights are equal bytes.
    write_file(path, lambda file: torch.save(state, file))
    write_json(path.with_suffix(".json"), sidecar)


def half_state(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A model's state dict in fp16 on the CPU, without the encoder; tied tensors stay one tensor."""
    return cpu_copy(without_encoder(state_dict), torch.float16)


def cpu_copy(value: Any, dtype: torch.dtype | None = None) -> Any:
    """A nested state dict with copies of its tensors on the CPU; one that stands in it twice stays one."""
    copies: dict[tuple, torch.Tensor] = {}

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() == 0 or key not in copies:
            copies[key] = tensor.detach().to("cpu", dtype, copy=True)
        return copies[key]

    return tree_map_only(torch.Tensor, copy, value)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file whole or not at all; UserError if that fails."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_file(path, lambda file: file.write(text.encode(errors="backslashreplace")))


def write_file(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Writes a file whole or not at all; UserError if that fails."""
    try:
        write_atomically(path, write)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        reason = " ".join(str(error.__cause__ or error.__context__ or error).split())
        kept = f"; the previous {path.name} is intact" if path.is_file() else ""
        raise UserError(f"cannot write {path}: {reason}{kept}") from error


def describe(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stage: str, step: int, arguments: dict
) -> Sidecar:
    """The sidecar of a model's weights."""
    config = model.config.to_diff_dict()
    if encoder := config.pop("vision_config", None):
        dtype = str(model.vision_encoder.dtype).removeprefix("torch.")
        encoder = {"path": arguments.get("vision_model_path"), "config": encoder, "dtype": dtype}
    return {
        "stage": stage,
        "step": step,
        "config": config | {name: getattr(model.config, name) for name in SIZES},
        "tokenizer": {"fingerprint": tokenizer_fingerprint(tokenizer), "path": tokenizer.name_or_path},
        "encoder": encoder,
        "arguments": arguments,
        "versions": {library.__name__: library.__version__ for library in (torch, transformers, datasets)},
    }


def load_weights_file(path: Path) -> tuple[dict[str, torch.Tensor], Sidecar]:
    """State dict and sidecar of a weights file; without a sidecar, one made from the tensors' shapes."""
    if not path.is_file():
        raise UserError(f"{path}: no such weights")
    try:
        is_safe = path.suffix == ".safetensors"
        state = load_file(path) if is_safe else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch raises for a damaged file
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(f"{path}: not readable weights ({reason})") from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{path}: expected a state dict of tensors, found {type(state).__name__}")
    return state, read_sidecar(path) or {"config": config_from_shapes(state, path)}


def read_sidecar(path: Path) -> Sidecar:
    """The sidecar file of a `.pth`, or what a published folder tells of its weights; {} if there is none."""
    if path.name in FOLDER_WEIGHTS:
        tokenizer = None
        if (path.parent / "tokenizer.json").is_file():
            fingerprint = tokenizer_fingerprint(load_tokenizer(str(path.parent)))
            tokenizer = {"path": str(path.parent), "fingerprint": fingerprint}
        return {"config": translated(_read_object(path.with_name("config.json"))), "tokenizer": tokenizer}
    sidecar_path = path.with_suffix(".json")
    sidecar = _read_object(sidecar_path)
    if sidecar_path.is_file() and not isinstance(sidecar.get("config"), dict):
        raise UserError(f"{sidecar_path}: not a sidecar, it has no 'config'")
    return sidecar


def published_weights(path: Path) -> Path:
    """The weights in a folder of release 3 as published, UserError without any; any other path as it is."""
    if not path.is_dir() or not RELEASE_3_NAMES & _read_object(path / "config.json").keys():
        return path
    if found := [path / name for name in FOLDER_WEIGHTS if (path / name).is_file()]:
        return found[0]
    raise UserError(f"{path}: a folder of release 3 without {' or '.join(FOLDER_WEIGHTS)}")


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object, {} if there is no file."""
    if not path.is_file():
        return {}
    try:
        if isinstance(content := json.loads(path.read_text(encoding="utf-8")), dict):
            return content
        raise ValueError(f"but a {type(content).__name__}")
    except ValueError as error:
        raise UserError(f"{path}: not a JSON object ({error})") from None


def release_of(config: dict[str, Any]) -> int:
    """2 (MiniMind2-V, 2025) or 3 (minimind-3v, 2026): the release whose architecture a config describes."""
    return 3 if config.get("qk_norm") else 2


def config_from_shapes(state: dict[str, torch.Tensor], path: Path) -> dict[str, Any]:
    """The config fields that the shapes of a state dict tell. UserError if it is not a MiniMind one.
    Weights with query norms or release 3's projector are of release 3: what no tensor tells has its defaults.
    Without query norms head counts are not in the shapes; the config's defaults are the published ones."""

    def size(name: str, axis: int = 0) -> int:
        return state[f"model.{name}.weight"].shape[axis]

    def numbers(inner: str = "") -> int:
        return len({found[1] for key in state if (found := re.match(rf"model\.layers\.{inner}(\d+)\.", key))})

    projector = state.get("vision_proj.mlp.0.weight")
    if projector is not None and projector.dim() != 1:
        found = f"vision_proj.mlp.0.weight has shape {tuple(projector.shape)}, expected a norm's"
        raise UserError(f"{path}: {found}: a format of April 2026 that was published for a few days only")
    use_moe = "model.layers.0.mlp.gate.weight" in state
    mlp = "layers.0.mlp.experts.0" if use_moe else "layers.0.mlp"
    try:
        config = {"vocab_size": size("embed_tokens"), "hidden_size": size("embed_tokens", 1)}
        config |= {"num_hidden_layers": numbers(), "use_moe": use_moe}
        width = size(f"{mlp}.gate_proj")
        experts = size("layers.0.mlp.gate") if use_moe else None
        if "model.layers.0.self_attn.q_norm.weight" in state:
            config["head_dim"] = head_dim = size("layers.0.self_attn.q_norm")
            config["num_attention_heads"] = size("layers.0.self_attn.q_proj") // head_dim
            config["num_key_value_heads"] = size("layers.0.self_attn.k_proj") // head_dim
        elif projector is None:
            config |= {"intermediate_size": width, "image_special_token": "@" * 196}
            shared = {"n_routed_experts": experts, "n_shared_experts": numbers(r"0\.mlp\.shared_experts\.")}
            return config | (shared if use_moe else {})
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"{path}: not MiniMind weights ({type(error).__name__}: {error})") from None
    mixture = {"num_experts": experts, "moe_intermediate_size": width}
    return translated(config | (mixture if use_moe else {"intermediate_size": width}))


def translated(config: dict[str, Any]) -> dict[str, Any]:
    """Fields of VLMConfig for a config of release 3 in its own names, `config.json` or arguments; what is not
    there has the release's default (golden numbers and facts: tests/golden/v3/README.md)."""
    given = {name: value for name, value in config.items() if value is not None}
    config = RELEASE_3 | given.get("rope_parameters", {}) | given
    tokens, width = config["image_token_len"], 64 * math.ceil(config["hidden_size"] * math.pi / 64)
    alike = {name: value for name, value in config.items() if name in MiniMindConfig.__annotations__}
    return alike | {
        **FIXED_3,
        "intermediate_size": config.get("intermediate_size", width),
        "n_routed_experts": config["num_experts"],
        # Their statistic is k times ours.
        "aux_loss_alpha": config["router_aux_loss_coef"] * config["num_experts_per_tok"],
        "rope_scaling": YARN_3 if config.get("inference_rope_scaling") else None,
        "image_ids": config["image_ids"][:1] * tokens,
        "image_special_token": "<|image_pad|>" * tokens,
    }


def check_sizes(sidecar: Sidecar, wanted: dict[str, Any], path: Path) -> None:
    """UserError that names each size in which the weights differ from the flags; a warning where neither
    tells how many heads they have."""
    config = sidecar["config"]
    different = [f"{k} {config[k]} (flag: {v})" for k, v in wanted.items() if k in config and config[k] != v]
    if different:
        raise UserError(f"{path} does not fit the flags: it has {', '.join(different)}")
    if missing := {"num_attention_heads", "num_key_value_heads"} - config.keys() - wanted.keys():
        counts = ", ".join(f"--{name} {getattr(MiniMindConfig(), name)}" for name in sorted(missing))
        log.warning("warning: %s does not tell its heads, %s is assumed", path, counts)
