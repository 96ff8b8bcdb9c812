"""The model card of an exported folder. Figures are computed, or read from what training and evaluation left
beside the weights; what is not there, or is older or of another run, is left out."""

import contextlib
import json
import platform
from collections.abc import Iterator
from pathlib import Path

import jinja2
import pyarrow.parquet as pq
import torch
import transformers

from common.weights import Sidecar
from dataset.sources import raw_rows
from model.model_vlm import MiniMindVLM
from model.pictures import to_rgb
from model.processing_vlm import MiniMindVLMProcessor

TEMPLATE = Path(__file__).with_suffix(".md.jinja")
PICTURE = Path(__file__).resolve().parent.parent / "dataset/eval_images/drawing_tiger.png"
QUESTION = "What is this?"
UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError)  # gone, or not a file of ours
REPORTED = {"weight", "data_path", "blank_images", "blank", "by_kind", "mean_over_kinds", "majority", "n"}


def write_card(
    folder: Path,
    target: str,
    name: str,
    weights: Path,
    model: MiniMindVLM,
    processor: MiniMindVLMProcessor,
    sidecar: Sidecar,
    encoder: str | None,
    needed: str,
) -> None:
    """Writes README.md, and example.jpg for a target that takes pictures; `weights` is the `.pth`, `needed`
    the version of transformers that `target` wants."""
    learnt = (p for key, p in model.named_parameters() if not key.startswith("vision_encoder."))
    files = map(Path, (sidecar.get("arguments") or {}).get("data_path") or [])
    facts = dict(target=target, name=name, config=model.config, sidecar=sidecar, encoder=encoder)
    facts |= dict(question=QUESTION, needed=needed)
    facts |= dict(parameters=sum(p.numel() for p in learnt), reports=list(reports(weights)))
    facts |= dict(data={file.name: count_rows(file, weights) for file in files})
    facts |= dict(losses=last_losses(sidecar, weights))
    facts |= dict(platform=platform, torch=torch, transformers=transformers)
    facts |= {} if target == "llama" else {"answer": answer(folder, model, processor)}
    template = jinja2.Template(TEMPLATE.read_text(encoding="utf-8"), keep_trailing_newline=True)
    (folder / "README.md").write_text(template.render(facts), encoding="utf-8")


def count_rows(file: Path, weights: Path) -> int | None:
    """None for a file that has gone, or has changed since the weights were written."""
    with contextlib.suppress(*UNREADABLE):
        if file.stat().st_mtime <= weights.stat().st_mtime:
            is_parquet = file.suffix == ".parquet"
            return pq.read_metadata(file).num_rows if is_parquet else sum(1 for _ in raw_rows(file))
    return None


def last_losses(sidecar: Sidecar, weights: Path) -> dict[str, tuple[float, int]]:
    """The last losses that the run noted before it wrote these weights, each with its step."""
    step, found = sidecar.get("step") or 0, {}
    with contextlib.suppress(*UNREADABLE):
        log = weights.parent / "runs" / weights.stem / "metrics.jsonl"
        for record in map(json.loads, log.read_text(encoding="utf-8").splitlines()):
            if record["step"] <= step:
                found |= {k: (record[k], record["step"]) for k in ("loss", "eval_loss") if k in record}
        # Further back it is another run's, which has begun to write that file and not yet the weights.
        return found if step - found["loss"][1] < sidecar["arguments"]["log_interval"] else {}
    return {}


def reports(weights: Path) -> Iterator[dict]:
    """What eval_vlm.py reported beside the weights, about them and after they were written."""
    for file in sorted(weights.parent.glob("report*.json")):
        with contextlib.suppress(*UNREADABLE):
            report = json.loads(file.read_text(encoding="utf-8"))
            is_new = file.stat().st_mtime >= weights.stat().st_mtime
            if is_new and report.keys() >= REPORTED and Path(report["weight"]).stem == weights.stem:
                yield report


def answer(folder: Path, model: MiniMindVLM, processor: MiniMindVLMProcessor) -> str:
    """The greedy answer about PICTURE, of which example.jpg is a copy."""
    to_rgb(PICTURE).save(folder / "example.jpg", quality=90)
    content = [{"type": "image", "path": str(folder / "example.jpg")}, {"type": "text", "text": QUESTION}]
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
    inputs = processor.apply_chat_template([{"role": "user", "content": content}], **options)
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=64)[0]  # (T + new,)
    return processor.decode(tokens[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
