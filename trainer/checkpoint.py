"""Weights on disk: `{name}.pth`, an fp16 state dict without the encoder, and `{name}.json`, its sidecar.

The sidecar says what the tensors cannot: head counts, tokenizer, encoder, stage, step, arguments, versions.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from transformers import PreTrainedTokenizerBase

from trainer.cli import UserError

Sidecar = dict[str, Any]


def weight_name(stage: str, hidden_size: int, use_moe: bool) -> str:
    """File name of a stage's weights, such as `sft_vlm_512_moe.pth`."""
    return f"{stage}_{hidden_size}{'_moe' if use_moe else ''}.pth"


def save_weights(path: Path, model: torch.nn.Module, sidecar: Sidecar) -> None:
    """Writes `path` and its sidecar; each file is whole or as it was before. UserError if that fails."""
    state = half_state(model)
    # torch.save stores the stem of a path inside the archive; an open handle keeps equal weights equal in
    # bytes.
    write_atomically(path, lambda file: torch.save(state, file))
    text = json.dumps(sidecar, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path.with_suffix(".json"), lambda file: file.write(text.encode()))


def half_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The model's state dict in fp16 on the CPU, without the encoder; tied tensors stay one tensor."""
    copies: dict[int, torch.Tensor] = {}
    state = {}
    for key, tensor in model.state_dict().items():
        if not key.startswith("vision_encoder."):
            state[key] = copies.setdefault(
                tensor.data_ptr(), tensor.detach().to("cpu", torch.float16, copy=True)
            )
    return state


def write_atomically(path: Path, write: Callable[[Any], Any]) -> None:
    """Writes to a temporary file beside `path`, flushes it to the disk and renames it. UserError if that
    fails."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        reason = " ".join(str(error.__cause__ or error.__context__ or error).split())
        kept = f"; the previous {path.name} is intact" if path.is_file() else ""
        raise UserError(f"cannot write {path}: {reason}{kept}") from error


def describe(
    model: transformers.PreTrainedModel,
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
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "datasets": datasets.__version__,
        },
    }


SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "use_moe",
)


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
    sidecar_path = path.with_suffix(".json")
    if not sidecar_path.is_file():
        return state, {"config": config_from_shapes(state, path)}
    try:
        return state, json.loads(sidecar_path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{sidecar_path}: not a JSON sidecar ({error})") from None


def config_from_shapes(state: dict[str, torch.Tensor], path: Path) -> dict[str, Any]:
    """The config fields that the shapes of a state dict tell. UserError if it is not a MiniMind one.

    Head counts are not in the shapes; the config's defaults are the published ones.
    """
    try:
        vocab_size, hidden_size = state["model.embed_tokens.weight"].shape
    except KeyError as error:
        raise UserError(f"{path}: not MiniMind weights, {error} is missing") from None
    layers = {int(match[1]) for key in state if (match := re.match(r"model\.layers\.(\d+)\.", key))}
    config = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": len(layers),
        "use_moe": False,
    }
    expert = "model.layers.0.mlp.experts.0.gate_proj.weight"
    if expert in state:
        shared = {
            match[1]
            for key in state
            if (match := re.match(r"model\.layers\.0\.mlp\.shared_experts\.(\d+)", key))
        }
        gate = state["model.layers.0.mlp.gate.weight"]
        config |= {"use_moe": True, "n_routed_experts": gate.shape[0], "n_shared_experts": len(shared)}
    mlp = state[expert if expert in state else "model.layers.0.mlp.gate_proj.weight"]
    return config | {"intermediate_size": mlp.shape[0]}


def check_sizes(sidecar: Sidecar, wanted: dict[str, Any], path: Path) -> None:
    """UserError that names each size in which the weights differ from the flags."""
    config = sidecar["config"]
    different = [f"{k} {config[k]} (flag: {v})" for k, v in wanted.items() if k in config and config[k] != v]
    if different:
        raise UserError(f"{path} does not fit the flags: it has {', '.join(different)}")


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what decides the ids of a text: vocabulary, merges, added tokens."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = {
        "model": parts["model"],
        "added_tokens": parts["added_tokens"],
        "pre_tokenizer": parts["pre_tokenizer"],
    }
    return hashlib.sha256(json.dumps(kept, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def check_tokenizer(
    sidecar: Sidecar, tokenizer: PreTrainedTokenizerBase, path: Path, asked: bool = False
) -> str:
    """UserError if the weights were trained with another tokenizer; a warning text where that cannot be told
    and no tokenizer was asked for, else an empty string."""
    trained = sidecar.get("tokenizer")
    if not trained:
        return (
            "" if asked else f"{path} has no sidecar: its tokenizer cannot be checked, see --tokenizer_path"
        )
    if trained["fingerprint"] != tokenizer_fingerprint(tokenizer):
        raise UserError(
            f"{path} was trained with another tokenizer ({trained['path']}) than {tokenizer.name_or_path}: "
            f"give --tokenizer_path"
        )
    return ""


def describe_published_weights(path: Path, tokenizer_dir: Path, stage: str) -> Path:
    """Writes the sidecar of a bare published `.pth` next to it and returns the sidecar's path."""
    state, _ = load_weights_file(path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_dir)
    sidecar = {
        "stage": stage,
        "step": None,
        "config": config_from_shapes(state, path),
        "tokenizer": {"fingerprint": tokenizer_fingerprint(tokenizer), "path": str(tokenizer_dir)},
        "encoder": None,
    }
    target = path.with_suffix(".json")
    write_atomically(target, lambda file: file.write((json.dumps(sidecar, indent=2) + "\n").encode()))
    return target
