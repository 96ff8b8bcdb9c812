"""Draws loss, learning rate and throughput of one or several runs, from their metrics.jsonl, to a PNG."""

import argparse
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import UserError, run_main, user_errors

PANELS = {"loss": "loss", "learning_rate": "learning rate", "samples_per_second": "samples/s"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder or metrics.jsonl")
    parser.add_argument("--out", type=Path, default=Path("metrics.png"), help="the PNG to write")
    arguments = parser.parse_args()
    runs = dict(zip(labels(arguments.runs), map(read, arguments.runs), strict=True))
    draw(runs, arguments.out)
    print(f"{arguments.out}: {', '.join(runs)}")


def labels(paths: list[Path]) -> list[str]:
    """The folders' names; the paths as given where names are equal."""
    names = [(path if path.is_dir() else path.parent).resolve().name for path in paths]
    return [str(path) if names.count(name) > 1 else name for name, path in zip(names, paths, strict=True)]


def read(path: Path) -> list[dict[str, float | None]]:
    """The lines of a run. UserError names file and line of one that cannot be read."""
    path = path / "metrics.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a run's folder or its metrics.jsonl")
    records = read_lines(path)
    if not any("loss" in record for record in records):
        raise UserError(f"{path}: none of its {len(records)} lines has a loss")
    return records


def read_lines(path: Path) -> list[dict]:
    """The objects of a JSONL file that the training wrote. UserError names file and line."""
    with user_errors(str(path)), path.open(encoding="utf-8") as file:
        lines = list(file)  # not splitlines(): answers may have what else ends a line in Unicode
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}:{number}: not JSON: {error}") from None
        if not isinstance(record, dict) or "step" not in record:
            raise UserError(f"{path}:{number}: expected an object with a step, as the training writes it")
        records.append(record)
    return records


def draw(runs: dict[str, list[dict[str, float | None]]], out: Path) -> None:
    """One panel below the other, a colour for each run; a value that is None leaves a gap."""
    figure_class = import_figure()
    panels = panels_of(runs)
    figure = figure_class(figsize=(9, 3 * len(panels)), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(len(panels), sharex=True), panels.items(), strict=True):
        draw_panel(axes, runs, name)
        axes.set_ylabel(title)
    figure.axes[0].legend()
    figure.axes[-1].set_xlabel("optimizer step")
    with user_errors(f"--out {out}: cannot be written"):
        figure.savefig(out, format="png", dpi=120)


def import_figure() -> type:
    """matplotlib's Figure. UserError where the package is missing."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise UserError("plotting needs the package matplotlib: pip install matplotlib") from None
    return Figure


def panels_of(runs: dict[str, list[dict[str, float | None]]]) -> dict[str, str]:
    """Names and titles of the figures that these runs have curves for."""
    has_aux_loss = any(record.get("aux_loss") for records in runs.values() for record in records)
    return PANELS | ({"aux_loss": "auxiliary loss"} if has_aux_loss else {})


def draw_panel(axes, runs: dict[str, list[dict[str, float | None]]], name: str) -> None:
    """The curves of one figure; beside the loss stands the validation loss, dashed."""
    for number, (label, records) in enumerate(runs.items()):
        style = {"color": f"C{number}", "marker": "." if len(records) < 50 else None}
        axes.plot(*curve(records, name), label=label, **style)
        for other, means, line in (("eval_loss", "eval", "--"), ("eval_loss_blank", "eval, blank", ":")):
            if name == "loss" and any(other in record for record in records):
                axes.plot(*curve(records, other), label=f"{label}, {means}", linestyle=line, **style)
    axes.grid(alpha=0.3)


def curve(records: list[dict[str, float | None]], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of the lines that have `name`."""
    points = [(record["step"], record[name]) for record in records if name in record]
    return [step for step, _ in points], [math.nan if value is None else value for _, value in points]


if __name__ == "__main__":
    run_main(main)
