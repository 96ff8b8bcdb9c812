"""Turns a trained `.pth` into a transformers folder that needs nothing of this repository, and back.

The folder holds weights, encoder, tokenizer, processor and the model's code. It is written beside `--out`,
reloaded and compared with the source, and only then takes its place.
"""

import contextlib
import copy
import json
import logging
import platform
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig
from transformers.utils import logging as transformers_logging

from common.cli import UserError, flag, parse_flags, run_main, user_errors
from common.weights import Sidecar, describe, half_state, save_weights
from inference.trained import WeightFlags, find_weight, load_export, load_pth
from model.model_vlm import MiniMindVLM, VLMConfig
from model.processing_vlm import MiniMindVLMProcessor

log = logging.getLogger(__name__)
SIDECAR = "minimind_sidecar.json"  # marks a folder as ours to replace; the `.pth` gets it back
CODE = ("model_minimind.py", "model_vlm.py", "pictures.py", "processing_vlm.py")
TOLERANCE = 1e-3  # largest difference of a logit in fp32
AUTO_MAP = {
    "AutoConfig": "model_vlm.VLMConfig",
    "AutoModelForCausalLM": "model_vlm.MiniMindVLM",
    "AutoModelForImageTextToText": "model_vlm.MiniMindVLM",
    "AutoProcessor": "processing_vlm.MiniMindVLMProcessor",
}


@dataclass
class ConvertFlags(WeightFlags):
    out: str = field(kw_only=True, metadata={"help": "folder to write; with --to_torch the .pth to write"})
    weight: str | None = flag(None, "the .pth to convert, or the name of one in out/")
    to_torch: str | None = flag(None, "the folder to turn back into a .pth and its .json")

    def __post_init__(self):
        if (self.weight is None) == (self.to_torch is None):
            raise ValueError("give either --weight or --to_torch")
        of_a_pth = {"vision_model_path": self.vision_model_path, "tokenizer_path": self.tokenizer_path}
        for name, value in {**of_a_pth, **self.heads()}.items():
            if self.to_torch and value:
                raise ValueError(f"--to_torch takes no --{name}")
        if self.to_torch and not self.out.endswith(".pth"):
            raise ValueError(f"--out {self.out}: with --to_torch a name that ends in .pth is expected")


def main() -> None:
    flags = parse_flags(ConvertFlags, __doc__)
    transformers_logging.disable_progress_bar()
    if flags.to_torch:
        export_to_pth(Path(flags.to_torch), Path(flags.out))
    else:
        pth_to_export(flags)


def pth_to_export(flags: ConvertFlags) -> None:
    out = Path(flags.out)
    check_target(out)
    path = find_weight(flags.weight)
    if path.is_dir():
        raise UserError(f"--weight {path} is a folder, expected a .pth")
    source, processor, sidecar = load_pth(path, flags.vision_model_path, flags.tokenizer_path, flags.heads())
    encoder = flags.vision_model_path or (sidecar.get("encoder") or {}).get("path")
    with replacing(out) as folder:
        with write_errors(out):
            write_export(folder, source, processor, sidecar)
            card = model_card(out.resolve().name, source, sidecar, encoder)
            (folder / "README.md").write_text(card, encoding="utf-8")
        with user_errors("the export is wrong and was removed"):
            largest = verify(folder, source, processor)
        log.info("largest difference of a logit, reloaded from source: %.2g; greedy text is equal", largest)
    megabytes = sum(file.stat().st_size for file in out.iterdir()) / 1e6
    log.info("%s -> %s (%.1f MB)", path, out, megabytes)


def export_to_pth(folder: Path, out: Path) -> None:
    if not has_our_config(folder):
        raise UserError(
            f"--to_torch {folder}: expected a folder written by this script, or saved by a model that was "
            f"loaded from one: its config.json says {VLMConfig.model_type!r}"
        )
    if out.is_dir():
        raise UserError(f"--out {out} is a folder, expected a file name")
    model, processor = load_export(folder)
    if (folder / SIDECAR).is_file():
        with user_errors(str(folder / SIDECAR)):
            sidecar = json.loads((folder / SIDECAR).read_text(encoding="utf-8"))
    else:
        sidecar = sidecar_of(model, processor)
        unknown = "stage, step, arguments and the encoder's folder are unknown (see --vision_model_path)"
        log.warning("warning: %s has no %s: %s", folder, SIDECAR, unknown)
    save_weights(out, half_state(model.state_dict()), sidecar)
    log.info("%s -> %s and %s", folder, out, out.with_suffix(".json").name)


def sidecar_of(model: MiniMindVLM, processor: MiniMindVLMProcessor) -> Sidecar:
    """What an export's files say by themselves: `save_pretrained` does not copy its sidecar."""
    sidecar = describe(model, processor.tokenizer, stage="", step=0, arguments={})
    for name in ("architectures", "auto_map", "dtype"):  # of the folder, not of the weights
        sidecar["config"].pop(name, None)
    return {name: sidecar[name] for name in ("config", "tokenizer", "encoder")}


def write_export(folder: Path, model: MiniMindVLM, processor: MiniMindVLMProcessor, sidecar: Sidecar) -> None:
    """Everything but the model card. The language model is stored in fp16, as in the `.pth`; the encoder too,
    if that keeps all of its values, else in fp32."""
    state = half_state(model.state_dict())
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    state |= exact_half({k: v for k, v in model.state_dict().items() if k.startswith("vision_encoder.")})
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    config = copy.deepcopy(model.config)
    config.architectures, config.auto_map = [type(model).__name__], AUTO_MAP
    config.dtype = torch.float32  # what the model loads in by default: fp16 is slow on CPUs and may overflow
    config.save_pretrained(folder)
    ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(do_sample=False, max_new_tokens=512, **ids).save_pretrained(folder)

    settings = processor.tokenizer.init_kwargs  # what goes to tokenizer_config.json
    settings["padding_side"] = processor.tokenizer.padding_side = "left"  # pipelines that batch pad by it
    for name in ("is_local", "local_files_only"):  # how this process loaded it
        settings.pop(name, None)
    processor.auto_map = {"AutoProcessor": AUTO_MAP["AutoProcessor"]}
    processor.save_pretrained(folder)
    for name in CODE:
        source = (Path(__file__).parent / "model" / name).read_text(encoding="utf-8")
        (folder / name).write_text(with_version_check(source), encoding="utf-8")
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)  # 0600, whatever the umask
    (folder / SIDECAR).write_text(json.dumps(sidecar, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def with_version_check(source: str) -> str:
    """A module's source that first, after its docstring, says which transformers it needs."""
    docstring, quotes, rest = source.partition('"""\n')
    needed = required_transformers()
    check = VERSION_CHECK.format(needed=needed, numbers=needed.replace(".", ", "))
    return docstring + quotes + check + rest


def required_transformers() -> str:
    requirements = (Path(__file__).parent / "requirements.txt").read_text(encoding="utf-8")
    return re.search(r"^transformers>=(\d+\.\d+)$", requirements, re.MULTILINE)[1]


def exact_half(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors in fp16 if that changes no value of any of them, else as they are."""
    half = {key: value.half() for key, value in state.items()}
    return half if all(torch.equal(half[key].float(), value) for key, value in state.items()) else state


@torch.no_grad()
def verify(folder: Path, source: MiniMindVLM, processor: MiniMindVLMProcessor) -> float:
    """The largest difference between the source's logits and those of the folder, loaded as users load it.

    ValueError if it is above TOLERANCE, or if the greedy answers to a question about a picture differ.
    """
    reloaded = AutoModelForImageTextToText.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32
    )
    reloaded_processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    pictures = [Image.radial_gradient("L").convert("RGB"), Image.linear_gradient("L").rotate(30)]
    largest, answers = 0.0, []
    for count in range(3):
        content = [{"type": "image", "image": picture} for picture in pictures[:count]]
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": "What is this?"}]}]
        logits = []
        for model, its_processor in ((source, processor), (reloaded, reloaded_processor)):
            inputs = its_processor.apply_chat_template(
                messages, tokenize=True, return_dict=True, add_generation_prompt=True
            )
            logits.append(model(**inputs).logits)  # (1, T, V)
            if count == 1:
                answers.append(model.generate(**inputs, do_sample=False, max_new_tokens=32).tolist())
        expected, found = logits
        if expected.shape != found.shape:
            raise ValueError(f"a prompt with {count} images has other tokens")
        difference = (expected - found).abs().max().item()
        if not difference <= TOLERANCE:  # NaN is no success either
            raise ValueError(
                f"with {count} images a logit differs by {difference:.2g} from the source, "
                f"at most {TOLERANCE:g} is expected"
            )
        largest = max(largest, difference)
    if answers[0] != answers[1]:
        raise ValueError("its greedy answer differs from the source's")
    return largest


def check_target(out: Path) -> None:
    """UserError if `out` is something that an export must not replace."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file, expected a folder")
    if out.is_dir() and any(out.iterdir()) and not is_export(out):
        raise UserError(f"--out {out} is not empty and not an export: it stays as it is, name another folder")


def is_export(folder: Path) -> bool:
    return has_our_config(folder) and (folder / SIDECAR).is_file()


def has_our_config(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == VLMConfig.model_type


@contextlib.contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """An empty folder that takes the place of `out` when the block ends well, and is removed otherwise.

    It has `out`'s name, in a temporary folder beside it: the library caches a folder's code by that name.
    """
    target = out.resolve()
    with contextlib.ExitStack() as stack:
        with write_errors(out):
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = stack.enter_context(tempfile.TemporaryDirectory(dir=target.parent, prefix=".export."))
            folder = Path(temporary, "new", target.name)
            folder.mkdir(parents=True)
        yield folder
        with write_errors(out):
            previous = Path(temporary, "previous")
            try:
                if target.exists():
                    target.rename(previous)
                folder.rename(target)
            except BaseException:
                if previous.exists():
                    previous.rename(target)
                raise


@contextlib.contextmanager
def write_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {out}: {error}") from error


def model_card(name: str, model: MiniMindVLM, sidecar: Sidecar, encoder: str | None) -> str:
    parameters = sum(
        p.numel() for key, p in model.named_parameters() if not key.startswith("vision_encoder.")
    )
    vision = model.config.vision_config
    encoder = f"`{Path(encoder).name}`" if encoder else "a frozen encoder"
    return MODEL_CARD.format(
        name=name,
        parameters=f"{parameters / 1e6:.2f}",
        config=model.config,
        kind="mixture of experts" if model.config.use_moe else "dense",
        stage=sidecar.get("stage") or "unknown",
        encoder=encoder,
        vision=vision,
        tokens=len(model.config.image_ids),
        python=platform.python_version(),
        torch=torch.__version__.partition("+")[0],
        transformers=transformers.__version__,
        needed=required_transformers(),
    )


VERSION_CHECK = """
import transformers

if [int(part) for part in transformers.__version__.split(".")[:2]] < [{numbers}]:
    raise ImportError(
        f"this model needs transformers {needed} or newer, but {{transformers.__version__}} is installed\\n"
        "upgrade it: pip install -U 'transformers>={needed}'"
    )
"""

MODEL_CARD = """\
---
license: apache-2.0
language: [en, zh]
library_name: transformers
pipeline_tag: image-text-to-text
---

# {name}

A MiniMind-V vision-language model that answers questions about one or several images, in English and Chinese.

- Language model: {config.num_hidden_layers} layers of width {config.hidden_size} ({kind}), with the
  projection {parameters} million parameters; last trained in stage `{stage}`.
- Base encoder, frozen and contained here: {encoder} ({vision.model_type}, {tokens} tokens per image).

## Use

`trust_remote_code=True` runs the model's code in this folder; nothing else is read.

```python
from transformers import pipeline

ask = pipeline("image-text-to-text", model="{name}", trust_remote_code=True)
content = [{{"type": "image", "path": "picture.jpg"}}, {{"type": "text", "text": "What is this?"}}]
print(ask([{{"role": "user", "content": content}}], return_full_text=False)[0]["generated_text"])
```

`AutoProcessor` and `AutoModelForImageTextToText` (or `AutoModelForCausalLM`) load the parts. The weights are
stored in fp16 and load as float32; pass `dtype=torch.bfloat16` or `torch.float16` on a GPU.

Needs transformers {needed} or newer (`pip install -U "transformers>={needed}"`), torch and Pillow.
Made and checked with Python {python}, torch {torch}, transformers {transformers}.

## Licence

Apache-2.0 for code and trained weights. The encoder keeps the licence it was published under.
"""


if __name__ == "__main__":
    run_main(main)
