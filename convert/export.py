"""What every target shares: the folder that takes the place of `--out` once it is right, tensors on disk, and
the comparison of what the library loads from it with the source."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, GenerationConfig

from common.cli import UserError
from model.model_vlm import MiniMindVLM
from model.processing_vlm import MiniMindVLMProcessor

TOLERANCE = 1e-3  # largest difference of a logit in fp32


class Source(NamedTuple):
    """What is exported: a model in fp32 and eval mode on the CPU, and its processor."""

    model: MiniMindVLM
    processor: MiniMindVLMProcessor


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


def save_tensors(folder: Path, *groups: dict[str, Tensor]) -> None:
    """Writes `model.safetensors`; a group is stored in fp16 if that keeps all of its values, else in fp32."""
    state = {key: value.contiguous() for group in groups for key, value in exact_half(group).items()}
    file = folder / "model.safetensors"
    save_file(state, file, metadata={"format": "pt"})
    file.chmod((folder / "config.json").stat().st_mode)  # 0600, whatever the umask


def exact_half(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in fp16 if that changes no value of any of them, else as they are."""
    half = {key: value.half() for key, value in state.items()}
    is_exact = (torch.equal(half[key].to(value.dtype), value) for key, value in state.items())
    return half if all(is_exact) else state


def save_generation_config(folder: Path, config: Any, **settings: Any) -> None:
    ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(do_sample=False, max_new_tokens=512, **ids, **settings).save_pretrained(folder)


def prepare_tokenizer(tokenizer: Any) -> None:
    """Settings that its folder is to have: batches are padded on the left, no word of this machine."""
    settings = tokenizer.init_kwargs  # what goes to tokenizer_config.json
    settings["padding_side"] = tokenizer.padding_side = "left"  # pipelines that batch pad by it
    for name in ("is_local", "local_files_only"):  # how this process loaded it
        settings.pop(name, None)


@torch.no_grad()
def compare(
    folder: Path,
    source: Source,
    model_class: type = AutoModelForImageTextToText,
    processor_class: type = AutoProcessor,
    **options: Any,
) -> str:
    """Says how much the folder's logits, loaded as users load it with `options`, differ from the source's;
    without pictures where the processor is a tokenizer. ValueError if it is more than TOLERANCE, or if
    prompts, pictures or greedy answers differ."""
    theirs = model_class.from_pretrained(folder, dtype=torch.float32, **options).eval()
    trust = {name: value for name, value in options.items() if name == "trust_remote_code"}
    processor, largest = processor_class.from_pretrained(folder, **trust), 0.0
    placeholder = source.model.config.image_ids[0]
    for count in range(1 if processor_class is AutoTokenizer else 3):
        ids, pixels, logits, tokens = answer(source.model, source.processor, count)
        found_ids, found_pixels, found_logits, found_tokens = answer(theirs, processor, count)
        image_id = getattr(theirs.config, "image_token_id", placeholder)
        if not torch.equal(ids, found_ids.masked_fill(found_ids == image_id, placeholder)):
            raise ValueError(f"a prompt with {count} images has other tokens")
        if not torch.equal(pixels, found_pixels):
            raise ValueError("its processor makes other pixels of a picture")
        difference = (logits - found_logits[..., : logits.shape[-1]]).abs().max().item()
        if not difference <= TOLERANCE:  # NaN is no success either
            found = f"with {count} images a logit differs by {difference:.2g} from the source"
            raise ValueError(f"{found}, at most {TOLERANCE:g} is expected")
        if not torch.equal(tokens, found_tokens):
            raise ValueError("its greedy answer differs from the source's")
        largest = max(largest, difference)
    by = f"by {type(theirs).__name__} from source"
    return f"largest difference of a logit, reloaded {by}: {largest:.2g}; greedy text is equal"


def answer(model: Any, processor: Any, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ids (1, T), pixels, logits (1, T, V) and greedy tokens of a question about `count` pictures."""
    pictures = [Image.radial_gradient("L").convert("RGB"), Image.linear_gradient("L").rotate(30)]
    parts = [{"type": "image", "image": picture} for picture in pictures[:count]]
    content = [*parts, {"type": "text", "text": "What is this?"}] if parts else "What is this?"
    options = dict(tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True)
    inputs = processor.apply_chat_template([{"role": "user", "content": content}], **options)
    ids, pixels = inputs["input_ids"], inputs.get("pixel_values", torch.zeros(0))
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=16)
    return ids, pixels.flatten(), model(**inputs).logits, tokens[:, ids.shape[1] :]
