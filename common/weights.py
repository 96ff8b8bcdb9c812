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
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.cli import UserError
from common.tokenizer import tokenizer_fingerprint
from dataset.files import write_atomically
from model.model_minimind import MiniMindConfig
from model.model_vlm import without_encoder

log = logging.getLogger(__name__)
Sidecar = dict[str, Any]
SIZES = "hidden_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size use_moe".split()


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

    def copy(part: Any) -> Any:
        if isinstance(part, torch.Tensor):
            key = (part.data_ptr(), part.shape, part.stride())
            if part.numel() == 0 or key not in copies:
                copies[key] = part.detach().to("cpu", dtype, copy=True)
            return copies[key]
        if isinstance(part, dict):
            return {name: copy(inner) for name, inner in part.items()}
        return [copy(inner) for inner in part] if isinstance(part, list) else part

    return copy(value)


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
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    stage: str,
    step: int,
    arguments: dict[str, Any],
) -> Sidecar:
    """The sidecar of a model's weights."""
    config = model.config.to_diff_dict()
    encoder = config.pop("vision_config", None)
    return {
        "stage": stage,
        "step": step,
        "config": config | {name: getattr(model.config, name) for name in SIZES},
        "tokenizer": {"fingerprint": tokenizer_fingerprint(tokenizer), "path": tokenizer.name_or_path},
        "encoder": {"path": arguments.get("vision_model_path"), "config": encoder} if encoder else None,
        "arguments": arguments,
        "versions": {library.__name__: library.__version__ for library in (torch, transformers, datasets)},
    }


def load_weights_file(path: Path) -> tuple[dict[str, torch.Tensor], Sidecar]:
    """State dict and sidecar of a `.pth`; without a sidecar file, one made from the tensors' shapes."""
    if not path.is_file():
        raise UserError(f"{path}: no such weights")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch raises for a damaged file
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(f"{path}: not a readable .pth file ({reason})") from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{path}: expected a state dict of tensors, found {type(state).__name__}")
    return state, read_sidecar(path) or {"config": config_from_shapes(state, path)}


def read_sidecar(path: Path) -> Sidecar:
    """The sidecar file of a `.pth`, {} where it has none."""
    sidecar_path = path.with_suffix(".json")
    if not sidecar_path.is_file():
        return {}
    try:
        sidecar = json.loads(sidecar_path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{sidecar_path}: not a JSON sidecar ({error})") from None
    if not isinstance(sidecar, dict) or not isinstance(sidecar.get("config"), dict):
        raise UserError(f"{sidecar_path}: not a sidecar, it has no 'config'")
    return sidecar


def config_from_shapes(state: dict[str, torch.Tensor], path: Path) -> dict[str, Any]:
    """The config fields that the shapes of a state dict tell. UserError if it is not a MiniMind one.

    Head counts are not in the shapes; the config's defaults are the published ones.
    """
    if "model.layers.0.self_attn.q_norm.weight" in state:
        return _release_3_from_shapes(state, path)
    layers, shared = (
        {match[1] for key in state if (match := re.match(rf"model\.layers\.{inner}(\d+)\.", key))}
        for inner in ("", r"0\.mlp\.shared_experts\.")
    )
    use_moe = "model.layers.0.mlp.gate.weight" in state
    mlp = "model.layers.0.mlp.experts.0" if use_moe else "model.layers.0.mlp"
    try:
        vocab_size, hidden_size = state["model.embed_tokens.weight"].shape
        config = {
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "num_hidden_layers": len(layers),
            "intermediate_size": state[f"{mlp}.gate_proj.weight"].shape[0],
            "use_moe": use_moe,
        }
        if use_moe:
            experts = state["model.layers.0.mlp.gate.weight"].shape[0]
            config |= {"n_routed_experts": experts, "n_shared_experts": len(shared)}
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"{path}: not MiniMind weights ({type(error).__name__}: {error})") from None
    return config


def _release_3_from_shapes(state: dict[str, torch.Tensor], path: Path) -> dict[str, Any]:
    """As `config_from_shapes`, of weights with query norms, whose width tells the head counts. What no tensor
    tells has the release's defaults."""
    attention = "model.layers.0.self_attn"
    gate = state.get("model.layers.0.mlp.gate.weight")  # of a mixture
    mlp = "model.layers.0.mlp" if gate is None else "model.layers.0.mlp.experts.0"
    projector = state.get("vision_proj.mlp.0.weight")
    if projector is not None and projector.dim() != 1:
        found = f"vision_proj.mlp.0.weight has shape {tuple(projector.shape)}, a norm's is expected"
        raise UserError(f"{path}: the format of a few days in April 2026 ({found})")
    try:
        vocab_size, hidden_size = state["model.embed_tokens.weight"].shape
        head_dim = len(state[f"{attention}.q_norm.weight"])
        queries, keys = (len(state[f"{attention}.{name}_proj.weight"]) // head_dim for name in "qk")
        width = len(state[f"{mlp}.gate_proj.weight"])
    except (KeyError, ValueError) as error:
        raise UserError(f"{path}: not MiniMind weights ({type(error).__name__}: {error})") from None
    layers = {match[1] for key in state if (match := re.match(r"model\.layers\.(\d+)\.", key))}
    found = {"vocab_size": vocab_size, "hidden_size": hidden_size, "num_hidden_layers": len(layers)}
    found |= {"num_attention_heads": queries, "num_key_value_heads": keys, "head_dim": head_dim}
    if gate is None:
        return translated(found | {"intermediate_size": width})
    return translated(found | {"use_moe": True, "num_experts": len(gate), "moe_intermediate_size": width})


def translated(config: dict[str, Any]) -> dict[str, Any]:
    """Fields of VLMConfig for a config of release 3 in its own names, `config.json` or arguments; what is not
    there has the release's default (golden numbers and facts: tests/golden/v3/README.md)."""
    defaults = {
        "hidden_size": 768,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    }
    defaults |= {"vocab_size": 6400, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "use_moe": False}
    config = defaults | config
    intermediate_size = 64 * math.ceil(config["hidden_size"] * math.pi / 64)
    chosen, tokens = config.get("num_experts_per_tok", 1), config.get("image_token_len", 64)
    yarn = {"rope_type": "yarn", "factor": 16, "original_max_position_embeddings": 2048}
    yarn |= {"beta_fast": 32, "beta_slow": 1, "attention_factor": 1.0}
    kept = [
        *defaults,
        "head_dim",
        "moe_intermediate_size",
        "max_position_embeddings",
        "dropout",
        "hidden_act",
    ]
    kept += ["norm_topk_prob", "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"]
    return (
        {name: config[name] for name in kept if config.get(name) is not None}
        | {
            "intermediate_size": config.get("intermediate_size") or intermediate_size,
            "qk_norm": True,
            "projector": "mlp",
            "n_routed_experts": config.get("num_experts", 4),
            "n_shared_experts": 0,
            "num_experts_per_tok": chosen,
            "norm_top1_prob": True,
            "seq_aux": False,
            "aux_loss_alpha": config.get("router_aux_loss_coef", 5e-4)
            * chosen,  # their statistic is k times ours
            "rope_scaling": yarn if config.get("inference_rope_scaling") else None,
            "image_ids": (config.get("image_ids") or [12])[:1] * tokens,
            "image_special_token": "<|image_pad|>" * tokens,
        }
    )


def check_sizes(sidecar: Sidecar, wanted: dict[str, Any], path: Path) -> None:
    """UserError that names each size in which the weights differ from the flags."""
    config = sidecar["config"]
    different = [f"{k} {config[k]} (flag: {v})" for k, v in wanted.items() if k in config and config[k] != v]
    if different:
        raise UserError(f"{path} does not fit the flags: it has {', '.join(different)}")


def warn_of_heads(sidecar: Sidecar, given: dict[str, Any], path: Path) -> None:
    """A warning where nothing tells how many heads the weights have."""
    if missing := {"num_attention_heads", "num_key_value_heads"} - sidecar["config"].keys() - given.keys():
        counts = ", ".join(f"--{name} {getattr(MiniMindConfig(), name)}" for name in sorted(missing))
        log.warning("warning: %s does not tell its heads, %s is assumed", path, counts)
