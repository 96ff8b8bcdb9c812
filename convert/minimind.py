"""The target `minimind`: our own code travels with the weights, `trust_remote_code=True` runs it."""

import copy
import re
from functools import partial
from pathlib import Path

import torch

from common.weights import half_state
from convert.export import Source, compare, prepare_tokenizer, save_generation_config, save_tensors

ROOT = Path(__file__).resolve().parent.parent
CODE = ("model_minimind.py", "model_vlm.py", "pictures.py", "processing_vlm.py")
verify = partial(compare, trust_remote_code=True)
AUTO_MAP = {
    "AutoConfig": "model_vlm.VLMConfig",
    "AutoModelForCausalLM": "model_vlm.MiniMindVLM",
    "AutoModelForImageTextToText": "model_vlm.MiniMindVLM",
    "AutoModelForMultimodalLM": "model_vlm.MiniMindVLM",  # `transformers serve`
    "AutoProcessor": "processing_vlm.MiniMindVLMProcessor",
}


def write(folder: Path, source: Source) -> None:
    """The language model is stored in fp16, as in the `.pth`; the encoder too, if that keeps its values."""
    model, processor = source.model, source.processor
    config = copy.deepcopy(model.config)
    config.architectures, config.auto_map = [type(model).__name__], AUTO_MAP
    config.dtype = torch.float32  # what the model loads in by default: fp16 is slow on CPUs and may overflow
    config.save_pretrained(folder)
    state = half_state(model.state_dict())
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    encoder = {k: v for k, v in model.state_dict().items() if k.startswith("vision_encoder.")}
    save_tensors(folder, state, encoder)
    save_generation_config(folder, config)
    prepare_tokenizer(processor.tokenizer)
    processor.auto_map = {"AutoProcessor": AUTO_MAP["AutoProcessor"]}
    processor.save_pretrained(folder)
    for name in CODE:
        code = (ROOT / "model" / name).read_text(encoding="utf-8")
        (folder / name).write_text(with_version_check(code), encoding="utf-8")


def with_version_check(source: str) -> str:
    """A module's source that first, after its docstring, says which transformers it needs."""
    docstring, quotes, rest = source.partition('"""\n')
    needed = required_transformers()
    check = VERSION_CHECK.format(needed=needed, numbers=needed.replace(".", ", "))
    return docstring + quotes + check + rest


def required_transformers() -> str:
    requirements = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    return re.search(r"^transformers>=(\d+\.\d+)$", requirements, re.MULTILINE)[1]


VERSION_CHECK = """
import transformers

if [int(part) for part in transformers.__version__.split(".")[:2]] < [{numbers}]:
    raise ImportError(
        f"this model needs transformers {needed} or newer, but {{transformers.__version__}} is installed\\n"
        "upgrade it: pip install -U 'transformers>={needed}'"
    )
"""
