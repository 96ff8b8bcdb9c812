"""The report as an HTML page that needs nothing else: figures, histograms, samples as the model sees them."""

import io
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from dataset.errors import DataError
from dataset.pixels import Pixels
from dataset.vlm_dataset import Sample, SampleMaker
from inference.picture_report import data_uri
from model.processing_vlm import IGNORE_INDEX, MiniMindVLMProcessor
from scripts.checks.figures import share
from scripts.checks.reading import RawRow, RowChecker

TITLES = {
    "tokens": "tokens of a row, before it is cut",
    "supervised_tokens": "supervised tokens of a row",
    "shorter_side": "shorter side of pictures, in pixels",
}
BAD_SHOWN = 50


def page(report: dict[str, Any], checker: RowChecker, sampled: list[RawRow]) -> str:
    """The page's HTML; `sampled` are drawn rows, which `checker` turns into samples again."""
    settings = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True, "undefined": StrictUndefined}
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), **settings)
    environment.filters["share"] = share
    summaries = {name: report.get(name) or report["pictures"].get(name) for name in TITLES}
    return environment.get_template("page.html.jinja").render(
        report=report,
        bad=sum(report["bad_rows"].values()),
        reasons=[(kind["first"], kind["rows"]) for kind in report["bad_reasons"][:BAD_SHOWN]],
        histograms={
            TITLES[name]: bars(found) for name, found in summaries.items() if found and found["mean"]
        },
        samples=[shown(checker, row) for row in sorted(sampled, key=place)],
    )


def place(row: RawRow) -> tuple[int, int, str]:
    """The order of rows in their files."""
    return row.file, len(row.where), row.where


def bars(summary: dict[str, Any]) -> dict[str, Any]:
    """A histogram for the page: for each bin what it counts, and its height in percent of the highest."""
    found = summary["histogram"]
    highest, ends = max(found["count"]), [*(start - 1 for start in found["from"][1:]), summary["p100"]]
    bins = zip(found["from"], ends, found["count"], strict=True)
    drawn = [{"from": a, "to": b, "count": n, "height": round(100 * n / highest, 2)} for a, b, n in bins]
    return {"bins": drawn, **{name: summary[name] for name in ("mean", "min", "p50", "p95", "p100")}}


def shown(checker: RowChecker, raw: RawRow) -> dict[str, Any]:
    """A row as the model gets it: pictures after preprocessing, spans of text; or the error."""
    ((facts, row),) = checker.read([raw])
    found: dict[str, Any] = {"where": facts.where, "error": facts.error, "pictures": [], "spans": []}
    if row is None:
        return found
    facts, sample = checker.judge(facts, row)
    found["error"] = facts.error
    if sample is None:
        return found
    try:
        pixels = [SampleMaker.picture(checker, path, facts.where) for path in sample.images]
    except DataError as error:  # not opened before, with --no_decode
        return found | {"error": str(error)}
    found["pictures"] = [data_uri(png_of(each, checker.pixels), "image/png") for each in pixels]
    cut = f", of {facts.tokens} before it was cut" if facts.is_cut else ""
    found["about"] = f"{len(sample.input_ids)} tokens{cut}, {facts.supervised} supervised"
    return found | {"spans": spans_of(sample, checker.processor)}


def spans_of(sample: Sample, processor: MiniMindVLMProcessor) -> list[tuple[str, str]]:
    """Kind ("learnt", "image" or "") and text of each part; a picture's placeholders are folded into one."""
    kinds = ["" if label == IGNORE_INDEX else "learnt" for label in sample.labels]
    kinds[:1] = [""]  # nothing predicts the first token
    for start in sample.image_starts:
        kinds[start : start + processor.tokens_per_image] = [f"image {start}"] * processor.tokens_per_image
    spans, position = [], 0
    for kind, run in itertools.groupby(kinds):
        ids = sample.input_ids[position : (position := position + len(list(run)))]
        text = processor.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        folded = f"<{len(ids)} x {processor.placeholder}>"
        spans.append(("image", folded) if kind.startswith("image") else (kind, text))
    return spans


def png_of(pixels: torch.Tensor, how: Pixels) -> bytes:
    """A picture (3, H, W) as Pixels gives it; what is no bytes there is turned back into them."""
    if pixels.dtype != torch.uint8:
        mean, std = (torch.tensor(value).view(3, 1, 1) for value in how.mean_std)
        pixels = ((pixels * std + mean) / how.scale).round().clamp(0, 255).to(torch.uint8)
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())).save(file, "PNG")  # (H, W, 3)
    return file.getvalue()
