"""Turns a trained `.pth` into a folder for other tools, which needs nothing of this repository, and back.

`--format`: minimind (transformers with our own code), llava and internvl (transformers' own classes, servers
such as vLLM), llama (the language model alone), gguf (llama.cpp). The folder is written beside `--out`,
reloaded by the tool it is for, compared with the source, and only then takes its place.
"""

import contextlib
import json
import logging
import re
from dataclasses import dataclass, field
from pathlib import Path

from transformers.utils import logging as transformers_logging

from common.cli import UserError, flag, parse_flags, run_main, user_errors
from common.weights import half_state, save_weights
from convert import gguf, internvl, llama, llava, minimind
from convert.export import Source, replacing, write_errors
from convert.names import KINDS
from convert.pth import READERS, read_folder
from inference import llama_cpp
from inference.hub import push
from inference.model_card import write_card
from inference.trained import (
    SIDECAR,
    WeightFlags,
    find_weight,
    is_export,
    load_export,
    load_pth,
    read_sidecar,
)
from model.model_vlm import VLMConfig

log = logging.getLogger(__name__)
TARGETS = {"minimind": minimind, "llava": llava, "internvl": internvl, "llama": llama, "gguf": gguf}
FORMATS = tuple(TARGETS)
READABLE = (VLMConfig.model_type, *READERS, *KINDS)


@dataclass
class ConvertFlags(WeightFlags):
    out: str = field(kw_only=True, metadata={"help": "folder to write; with --to_torch the .pth to write"})
    weight: str | None = flag(None, "the .pth to convert, or the name of one in out/")
    format: str = flag("minimind", "what to write (docs/interoperability.md)", FORMATS)
    projector_act: str = flag("linear", "of --format llava: tanh is for vLLM", ("linear", "tanh"))
    quantization: str = flag("f16", "of --format gguf: the language model's weights", ("f16", "q8_0"))
    push_to_hub: str | None = flag(None, "OWNER/NAME of a model on the hub, to upload the folder to as well")
    to_torch: str | None = flag(None, "the folder to turn back into a .pth and its .json")

    def __post_init__(self):
        if (self.weight is None) == (self.to_torch is None):
            raise ValueError("give either --weight or --to_torch")
        of_a_pth = {"vision_model_path": self.vision_model_path, "tokenizer_path": self.tokenizer_path}
        of_a_pth |= {"push_to_hub": self.push_to_hub, **self.heads()}
        for name, value in of_a_pth.items():
            if self.to_torch and value:
                raise ValueError(f"--to_torch takes no --{name}")
        if self.to_torch and not self.out.endswith(".pth"):
            raise ValueError(f"--out {self.out}: with --to_torch a name that ends in .pth is expected")
        if self.projector_act != "linear" and self.format != "llava":
            raise ValueError(f"--projector_act {self.projector_act} is for --format llava")
        if self.quantization != "f16" and self.format != "gguf":
            raise ValueError(f"--quantization {self.quantization} is for --format gguf")
        if self.push_to_hub and not re.fullmatch(r"[\w.-]+/[\w.-]+", self.push_to_hub):
            raise ValueError(f"--push_to_hub {self.push_to_hub}: expected OWNER/NAME")


def main() -> None:
    flags = parse_flags(ConvertFlags, __doc__)
    transformers_logging.disable_progress_bar()
    if flags.to_torch:
        folder_to_pth(Path(flags.to_torch), Path(flags.out))
    else:
        pth_to_folder(flags)


def pth_to_folder(flags: ConvertFlags) -> None:
    out = Path(flags.out)
    check_target(out)
    path = find_weight(flags.weight)
    if path.is_dir():
        raise UserError(f"--weight {path} is a folder, expected a .pth")
    model, processor, sidecar = load_pth(path, flags.vision_model_path, flags.tokenizer_path, flags.heads())
    encoder = flags.vision_model_path or (sidecar.get("encoder") or {}).get("path")
    source, target = Source(model, processor), TARGETS[flags.format]
    options = {"llava": {"projector_act": flags.projector_act}, "gguf": {"quantization": flags.quantization}}
    with replacing(out) as folder:
        with write_errors(out), user_errors(f"--format {flags.format} cannot hold {path}"):
            target.write(folder, source, **options.get(flags.format, {}))
            text = json.dumps(sidecar, indent=2, ensure_ascii=False)
            (folder / SIDECAR).write_text(text + "\n", encoding="utf-8")
            name, needed = flags.push_to_hub or out.name, minimind.required_transformers()
            write_card(folder, flags.format, name, path, *source, sidecar, encoder, needed)
        with user_errors("the export is wrong and was removed"):
            log.info(target.verify(folder, source))
            if target is gguf and llama_cpp.is_installed():
                log.info(llama_cpp.compare(folder, model, processor))
    megabytes = sum(file.stat().st_size for file in out.iterdir()) / 1e6
    log.info("%s -> %s (%.1f MB)", path, out, megabytes)
    if flags.push_to_hub:
        transformers_logging.enable_progress_bar()  # also the hub's
        log.info("%s -> %s", out, push(out, flags.push_to_hub, SIDECAR))


def folder_to_pth(folder: Path, out: Path) -> None:
    kind = model_type(folder)
    if kind not in READABLE:
        raise UserError(
            f"--to_torch {folder}: expected a folder written by this script, or saved by a model that was "
            f"loaded from one: its config.json says {', '.join(READABLE)}"
        )
    if out.is_dir():
        raise UserError(f"--out {out} is a folder, expected a file name")
    if kind == VLMConfig.model_type:
        model, processor = load_export(folder)
        tokenizer = processor.tokenizer
    else:
        model, tokenizer = read_folder(folder)
    if not (folder / SIDECAR).is_file():
        unknown = "stage, step, arguments and the encoder's folder are unknown (see --vision_model_path)"
        log.warning("warning: %s has no %s: %s", folder, SIDECAR, unknown)
    save_weights(out, half_state(model.state_dict()), read_sidecar(folder, model, tokenizer))
    log.info("%s -> %s and %s", folder, out, out.with_suffix(".json").name)


def check_target(out: Path) -> None:
    """UserError if `out` is something that an export must not replace."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file, expected a folder")
    if out.is_dir() and any(out.iterdir()) and not is_export(out):
        raise UserError(f"--out {out} is not empty and not an export: it stays as it is, name another folder")


def model_type(folder: Path) -> str | None:
    with contextlib.suppress(OSError, ValueError):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return config.get("model_type") if isinstance(config, dict) else None


if __name__ == "__main__":
    run_main(main)
