"""Loading tokenizers, and telling whether weights were trained with one."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from common.cli import UserError, user_errors

log = logging.getLogger(__name__)


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    with user_errors(f"--tokenizer_path {path}"):
        if not Path(path).is_dir():
            raise OSError("no such folder (release 3's comes with `python scripts/download.py lm`)")
        # AutoTokenizer would ask whether to run the code in an exported folder.
        return PreTrainedTokenizerFast.from_pretrained(path)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what decides the ids of a text."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = {name: parts[name] for name in ("normalizer", "pre_tokenizer", "model", "added_tokens")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def check_tokenizer(
    sidecar: dict[str, Any], tokenizer: PreTrainedTokenizerBase, path: Path, asked: bool = False
) -> None:
    """UserError if the weights had another tokenizer; a warning if they do not tell, unless `asked` for."""
    trained = sidecar.get("tokenizer")
    if not trained and not asked:
        log.warning("warning: %s has no sidecar: its tokenizer cannot be checked, see --tokenizer_path", path)
    if trained and trained["fingerprint"] != tokenizer_fingerprint(tokenizer):
        found = f"another tokenizer ({trained['path']}) than {tokenizer.name_or_path}"
        raise UserError(f"{path} was trained with {found}: give --tokenizer_path")
