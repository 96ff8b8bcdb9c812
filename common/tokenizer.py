"""Loading tokenizers, and telling whether weights were trained with one."""

import hashlib
import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from common.cli import UserError, user_errors


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    if not Path(path).is_dir():
        raise UserError(f"--tokenizer_path {path}: no such folder")
    with user_errors(f"--tokenizer_path {path}"):
        # AutoTokenizer would ask whether to run the code in an exported folder.
        return PreTrainedTokenizerFast.from_pretrained(path)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what decides the ids of a text."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = {name: parts[name] for name in ("normalizer", "pre_tokenizer", "model", "added_tokens")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def check_tokenizer(
    sidecar: dict[str, Any], tokenizer: PreTrainedTokenizerBase, path: Path, asked: bool = False
) -> str:
    """UserError if the weights at `path` were trained with another tokenizer. Where their sidecar does not
    tell and no tokenizer was asked for, returns a warning, else an empty string."""
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
