"""One HTML page about a training run: figures, curves, answers on the way and at the end, scores, flags.

The page needs nothing else: pictures and curves are inside it. What a run lacks is said where it would stand.
"""

import argparse
import io
import json
import mimetypes
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plot_metrics import draw_panel, import_figure, panels_of, read, read_lines

from common.cli import UserError, run_main, user_errors
from common.setup import ENCODERS, build_vlm, load_base
from common.weights import Sidecar, release_of, write_file
from dataset.errors import DataError
from dataset.pictures import open_image, picture_name
from inference.chat import Sampling, encode_picture, stream_answer
from inference.picture_report import data_uri, thumbnail
from inference.pictures import SHIPPED_PICTURES, pictures_in
from inference.trained import load_vlm
from model.model_vlm import MiniMindVLM
from model.processing_vlm import MiniMindVLMProcessor
from trainer.stage import find_base

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ROOT / SHIPPED_PICTURES
MOST_STEPS = 8  # of the time line
QUESTION = "Describe the picture."
ANSWER = Sampling(temperature=0, max_new_tokens=64)
BASES = {"pretrain_vlm": ("lm", "llm"), "sft_vlm": ("pretrain_vlm",)}  # what a stage starts from
INK = "#010203"  # a colour that nothing else has; the page replaces it by that of its text


@dataclass
class Run:
    """What is known of a run; `summary` and `sidecar` are empty where their file is missing."""

    folder: Path
    records: list[dict[str, Any]]
    summary: dict[str, Any]
    sidecar: Sidecar

    @property
    def weights(self) -> Path:
        return self.folder.parent.parent / f"{self.folder.name}.pth"

    @property
    def arguments(self) -> dict[str, Any]:
        return self.summary.get("arguments") or self.sidecar.get("arguments") or {}

    @property
    def stage(self) -> str:
        return self.summary.get("stage") or self.sidecar.get("stage") or ""

    def last(self, name: str) -> float | None:
        """The newest value of a figure, None if it was never written."""
        return next((record[name] for record in reversed(self.records) if name in record), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder, such as out/runs/sft_vlm_512")
    parser.add_argument("--out", type=Path, help="the page to write; if not given: RUN/report.html")
    arguments = parser.parse_args()
    run = open_run(arguments.run)
    page = render(run).encode()
    out = arguments.out or arguments.run / "report.html"
    write_file(out, lambda file: file.write(page))
    print(f"{out}: {run.folder.name}, {len(page) / 1e6:.1f} MB")


def open_run(folder: Path) -> Run:
    """UserError for a folder that is none of a run, or one of whose files is damaged."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected a run's, such as out/runs/sft_vlm_512")
    folder = folder.resolve()
    run = Run(folder, read(folder), read_json(folder / "summary.json"), {})
    run.sidecar = read_json(run.weights.with_suffix(".json"))
    return run


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file, {} if there is no file. UserError names one that is something else."""
    if not path.is_file():
        return {}
    with user_errors(f"{path}: not JSON"):
        content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def render(run: Run) -> str:
    environment = Environment(
        loader=FileSystemLoader(ROOT / "scripts"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters["value"] = as_text
    answers, answers_missing = sample_answers(run)
    scores, unread = score_table(run)
    steps, asked = time_line(run)
    return environment.get_template("report.html.jinja").render(
        name=run.folder.name,
        state=state_of(run),
        tiles=tiles(run),
        curves=curves(run),
        steps=steps,
        asked=asked,
        question=QUESTION,
        answers=answers,
        answers_missing=answers_missing,
        scores=scores,
        unread=unread,
        demo=read_json(run.weights.parent / "report.json") if run.stage == "sft_vlm" else {},
        throughput=throughput(run),
        config=without_repeats(run.sidecar.get("config") or {}),
        encoder=encoder_of(run.sidecar),
        arguments=run.arguments,
        trained_with=run.sidecar.get("versions") or {},
        machine=machine(),
    )


def as_text(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def state_of(run: Run) -> str:
    if not run.summary:
        return f"not ended: no summary.json; step {run.last('step')} was the last one written down"
    code = run.summary.get("exit_code")
    return "finished" if code == 0 else f"stopped early (exit code {code})"


def tiles(run: Run) -> dict[str, str]:
    """The figures that one looks for first."""
    figures = {
        name: run.summary.get(name, run.last(name)) for name in ("step", "loss", "eval_loss", "seconds")
    }
    seconds = figures["seconds"]
    found = {
        "optimizer steps": figures["step"],
        "training loss": figures["loss"],
        "validation loss": figures["eval_loss"],
        "training time": None if seconds is None else duration(seconds),
    }
    return {name: "none" if value is None else as_text(value) for name, value in found.items()}


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def throughput(run: Run) -> dict[str, Any]:
    """Means over the whole run where it has ended, else those of the newest line."""
    if not run.summary:
        names = {"samples_per_second": "samples per second", "tokens_per_second": "tokens per second"}
        return {f"{title}, newest line": run.last(name) for name, title in names.items()}
    seconds, summary = run.summary.get("seconds") or 0.0, run.summary
    rows = {
        "samples per second": summary.get("samples_per_second"),
        "tokens per second": summary["tokens"] / seconds if seconds and "tokens" in summary else None,
        "rows": summary.get("rows"),
        "tokens": summary.get("tokens"),
        "supervised tokens": summary.get("supervised_tokens"),
        "skipped rows": summary.get("skipped_rows"),
        "steps that were not taken": summary.get("bad_steps"),
    }
    if memory := summary.get("peak_memory_bytes"):
        rows["peak memory"] = f"{memory / 1e9:.2f} GB"
    return rows


def curves(run: Run) -> list[tuple[str, Markup]]:
    """Title and SVG of each figure over the steps, in the colours of the page."""
    figure_class = import_figure()
    from matplotlib import rc_context

    colours = dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK
    )
    drawn, runs = [], {run.folder.name: run.records}
    with rc_context({**colours, "svg.fonttype": "none", "svg.hashsalt": "report", "legend.framealpha": 0}):
        for name, title in panels_of(runs).items():
            figure = figure_class(figsize=(5, 2.8), layout="constrained")
            axes = figure.subplots()
            draw_panel(axes, runs, name)
            axes.set_xlabel("optimizer step")
            axes.spines[["top", "right"]].set_visible(False)
            if len(axes.lines) > 1:
                axes.legend()
            drawn.append((title, svg(figure)))
    return drawn


def svg(figure) -> Markup:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return Markup(text[text.index("<svg") :].replace(INK, "currentColor"))


def time_line(run: Run) -> tuple[list[int], list[dict[str, Any]]]:
    """Up to MOST_STEPS steps, the first and the last among them, and for each question of the last one its
    pictures and the answer at each of the steps, None where it was not asked. UserError names a file that is
    not as the training writes it."""
    path = run.folder / "samples.jsonl"
    lines = read_lines(path) if path.is_file() else []
    if (last := len(lines) - 1) >= MOST_STEPS:
        lines = [lines[round(number * last / (MOST_STEPS - 1))] for number in range(MOST_STEPS)]
    try:
        said = [{(one["where"], one["question"]): one for one in line["answers"]} for line in lines]
        asked = [
            {name: one[name] for name in ("question", "expected")}
            | {"pictures": [shown(image, one["where"]) for image in one["images"]]}
            | {"answers": [answers[key]["answer"] if key in answers else None for answers in said]}
            for key, one in (said[-1] if said else {}).items()
        ]
    except (KeyError, TypeError):
        raise UserError(f"{path}: expected answers as the training writes them") from None
    return [line["step"] for line in lines], asked


def shown(image: str, where: str) -> dict[str, str | None]:
    """Name and data URI of a picture; without the latter if it is not there any more."""
    name = Path(picture_name(image)).name
    try:
        return {"name": name, "uri": data_uri(thumbnail(image, where), "image/jpeg")}
    except DataError:
        return {"name": name, "uri": None}


def sample_answers(run: Run) -> tuple[list[dict[str, Any]], str]:
    """For each shipped picture, the answers of the weights before and after; or why there are none."""
    if run.stage not in BASES:
        return [], "This stage reads no pictures." if run.stage else "It is not known what stage this is."
    for needed in (run.weights, run.weights.with_suffix(".json")):
        if not needed.is_file():
            return [], f"{needed.name} is not there."
    try:
        model, processor = load_vlm(str(run.weights))
        flags = {"from_weight": None, "hidden_size": None, "use_moe": None} | run.arguments
        base = find_base(argparse.Namespace(**flags | {"out_dir": run.weights.parent}), BASES[run.stage])
        base = base if base and base.is_file() else None
        pictures = [open_image(str(path), path.name) for path in pictures_in(PICTURES)]
        features = [encode_picture(model, processor, picture) for picture in pictures]
        after = answers(model, processor, features)
        before = [None] * len(after)
        if base is not None:
            torch.manual_seed(run.arguments.get("seed", 0))
            # Where the base has no projection, the answer is that of a fresh one.
            config = run.sidecar["config"]
            encoder = (run.sidecar.get("encoder") or {}).get("path") or ENCODERS[release_of(config)]
            model, _ = build_vlm(config, encoder, processor.tokenizer)
            load_base(model, base, processor.tokenizer)
            before = answers(model.eval(), processor, features)
    except UserError as error:
        return [], f"The weights cannot be asked: {error}"
    missing = ""
    if base is None:
        fresh = run.arguments.get("from_weight") == "none"
        start = "It started from fresh weights" if fresh else "The weights that it started from are not there"
        missing = f"{start}, so only the answers after it."
    shown = zip(pictures_in(PICTURES), before, after, strict=True)
    found = []
    for path, first, second in shown:
        uri = data_uri(path.read_bytes(), mimetypes.guess_type(path)[0])
        found.append({"name": path.stem.replace("_", " "), "uri": uri, "before": first, "after": second})
    return found, missing


def answers(model: MiniMindVLM, processor: MiniMindVLMProcessor, features: list[torch.Tensor]) -> list[str]:
    """The greedy answer about each picture; `features` (P, W) each."""
    asked = [{"role": "user", "content": QUESTION}]
    return [
        "".join(stream_answer(model, processor, asked, [picture], ANSWER)).strip() for picture in features
    ]


def score_table(run: Run) -> tuple[dict[str, Any], list[str]]:
    """Columns and rows of the accuracies in report_*.json that are of this run's weights, and the names of
    files that are no such reports."""
    columns: dict[str, dict[str, float]] = {}
    majority: dict[str, dict[str, float]] = {}
    unread = []
    for path in sorted(run.weights.parent.glob("report_*.json")):
        try:
            report = read_json(path)
            if Path(report["weight"]).stem == run.weights.stem:
                title = path.stem.removeprefix("report_")
                blank = report["blank_images"] and "blank" not in title
                columns[f"{title} (blank pictures)" if blank else title] = flat(report)
                title = f"most frequent answer ({Path(report['data_path']).stem})"
                majority[title] = flat(report["majority"])
        except (UserError, KeyError, TypeError, ValueError, AttributeError):
            unread.append(path.name)
    columns |= majority
    kinds = list(dict.fromkeys(kind for cells in columns.values() for kind in cells))
    rows = [(kind, [cells.get(kind) for cells in columns.values()]) for kind in kinds]
    return {"columns": list(columns), "rows": rows}, unread


def flat(scores: dict[str, Any]) -> dict[str, float]:
    """Accuracy by kind, then over all."""
    by_kind = {kind: float(entry["accuracy"]) for kind, entry in scores["by_kind"].items()}
    means = {"mean of kinds": scores["mean_over_kinds"], "all questions": scores["accuracy"]}
    return by_kind | {name: float(mean) for name, mean in means.items()}


def without_repeats(config: dict[str, Any]) -> dict[str, Any]:
    """The placeholder's 196 repetitions as their number."""
    return {
        k: f"{len(v)} tokens" if k in ("image_ids", "image_special_token") else v for k, v in config.items()
    }


def encoder_of(sidecar: Sidecar) -> dict[str, Any]:
    encoder = sidecar.get("encoder") or {}
    return {"path": encoder.get("path"), **(encoder.get("config") or {})} if encoder else {}


def machine() -> dict[str, str]:
    """This machine, on which the report is written and the sample answers are given."""
    import matplotlib
    import transformers

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {
        "system": f"{platform.system()} {platform.release()}",
        "processor": f"{model or platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "matplotlib": matplotlib.__version__,
    }


if __name__ == "__main__":
    run_main(main)
