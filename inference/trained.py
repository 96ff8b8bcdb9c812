"""Which trained model is used, its flags, and how it is loaded: for evaluation, export and the web demo."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoImageProcessor, PreTrainedModel, PreTrainedTokenizerBase

from common.cli import DeviceFlags, EncoderFlags, UserError, flag, user_errors
from common.setup import ENCODERS, TOKENIZERS, build_vlm, with_pixel_shuffle
from common.tokenizer import check_tokenizer, load_tokenizer
from common.weights import Sidecar, check_sizes, describe, load_weights_file, published_weights, release_of
from model.model_vlm import MiniMindVLM, load_weights
from model.processing_vlm import MiniMindVLMProcessor

PUBLISHED_NAMES = (Path("out/sft_vlm_768.pth"), Path("out/sft_vlm_512.pth"))  # of release 3, of release 2
DEMO_FOLDER = Path("out/demo")
SIDECAR = "minimind_sidecar.json"  # marks a folder as ours to replace; the `.pth` gets it back
DEFAULT_WEIGHT = (
    f"{PUBLISHED_NAMES[0]}, else {PUBLISHED_NAMES[1]}, else the newest sft_vlm_*.pth in {DEMO_FOLDER}/"
)


@dataclass
class WeightFlags:
    """Flags of everything that reads the `.pth` of a trained model."""

    vision_model_path: str | None = flag(
        None, "folder of the image encoder of a .pth; if not given: what it was trained with"
    )
    tokenizer_path: str | None = flag(None, "folder of its tokenizer; if not given: likewise")
    num_attention_heads: int | None = flag(None, "query heads of a .pth that does not tell")
    num_key_value_heads: int | None = flag(None, "key and value heads of a .pth that does not tell")

    def heads(self) -> dict[str, int | None]:
        names = ("num_attention_heads", "num_key_value_heads")
        return {name: getattr(self, name) for name in names}


@dataclass
class ModelFlags(WeightFlags, EncoderFlags, DeviceFlags):
    """Flags of everything that asks a trained model."""


def default_weight() -> str:
    """The weights to take where none are named. UserError where there are none."""
    demo = sorted(DEMO_FOLDER.glob("sft_vlm_*.pth"), key=lambda path: path.stat().st_mtime, reverse=True)
    found = next((path for path in (*PUBLISHED_NAMES, *demo) if path.is_file()), None)
    if found is None:
        raise UserError(
            f"no weights ({DEFAULT_WEIGHT}): train the demo (bash scripts/quickstart.sh), "
            "get the published ones (python scripts/download.py encoder vlm), or give --weight"
        )
    return str(found)


def load_vlm(
    weight: str,
    vision_model_path: str | None = None,
    tokenizer_path: str | None = None,
    heads: dict[str, int | None] | None = None,
) -> tuple[MiniMindVLM, MiniMindVLMProcessor]:
    """A trained model in fp32 and eval mode on the CPU, and its processor: for evaluation, export and the web
    demo.

    `weight` is a `.pth`, the name of one in `out/`, a published transformers folder of release 3, or an
    exported folder, which holds encoder and tokenizer. For the others these come from the sidecar unless
    given. UserError if something is missing or does not fit.
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
    sidecar = sidecar | {"config": sidecar["config"] | given}
    trained = {part: sidecar.get(part) or {} for part in ("tokenizer", "encoder")}
    release = release_of(sidecar["config"])
    tokenizer = load_tokenizer(tokenizer_path or trained["tokenizer"].get("path") or TOKENIZERS[release])
    check_tokenizer(sidecar, tokenizer, path, asked=tokenizer_path is not None)
    encoder = vision_model_path or trained["encoder"].get("path") or ENCODERS[release]
    sidecar = with_pixel_shuffle(sidecar, state, encoder, path)
    model, processor = build_vlm(sidecar["config"], encoder, tokenizer)
    with user_errors(str(path)):
        load_weights(model, state)
    return model.eval(), processor, sidecar


def find_weight(weight: str) -> Path:
    """A path as it is; the name of a `.pth` in `out/` as the path of that; a folder of release 3 as it was
    published as the weights in it."""
    path = Path(weight)
    named = Path("out") / f"{path.name.removesuffix('.pth')}.pth"
    with user_errors("--weight"):  # raises for a name that is too long
        there = path.exists() or path.parent != Path() or not named.is_file()
        return published_weights(path if there else named)


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


def is_export(folder: Path) -> bool:
    try:
        sidecar = json.loads((folder / SIDECAR).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(sidecar, dict) and "config" in sidecar


def read_sidecar(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Sidecar:
    """The sidecar that an export carries, else what the files say: `save_pretrained` does not copy it."""
    if (folder / SIDECAR).is_file():
        with user_errors(str(folder / SIDECAR)):
            return json.loads((folder / SIDECAR).read_text(encoding="utf-8"))
    sidecar = describe(model, tokenizer, stage="", step=0, arguments={})
    for name in ("architectures", "auto_map", "dtype"):  # of the folder, not of the weights
        sidecar["config"].pop(name, None)
    return {name: sidecar[name] for name in ("config", "tokenizer", "encoder")}
