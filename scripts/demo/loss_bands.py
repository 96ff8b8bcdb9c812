"""Is a run's loss normal? Compares runs of the quickstart with five others that differ in their seed alone.

Prints a line for each loss that is outside the band of the five, and ends with 1 if there is one.
loss_bands.json has the five's losses by stage and number of steps; --measured puts the given runs' there.
"""

import argparse
import json
import math
import statistics
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.cli import UserError, run_main
from common.weights import write_json
from scripts.plot_metrics import read

BANDS = Path(__file__).with_suffix(".json")
SHARES = (0.01, 0.1, 0.5, 1)  # of a run's steps
LEAST_STEPS = 10
T_99 = 4.604  # 99 % of Student's t distribution with 4 degrees of freedom lie within


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument("--measured", action="store_true", help="take their losses as what is normal")
    arguments = parser.parse_args()
    found = [(run, *losses(run)) for run in arguments.runs]
    bands = json.loads(BANDS.read_text(encoding="utf-8"))
    if arguments.measured:
        measured = defaultdict(lambda: defaultdict(list))
        for _, kind, by_step in found:
            for step, loss in by_step.items():
                measured[kind][str(step)].append(round(loss, 4))
        write_json(BANDS, bands | measured)
        return 0
    told = [line for run, kind, by_step in found for line in outside(run, by_step, bands.get(kind))]
    print(*told, sep="\n", end="\n" if told else "")
    return int(bool(told))


def losses(run: Path) -> tuple[str, dict[int, float]]:
    """The kind of a run, and its loss at SHARES of its steps: the mean over tokens of the last tenth of the
    steps so far, but of a hundredth of all steps and LEAST_STEPS at least."""
    records = [record for record in read(run) if record.get("loss") is not None]
    steps, found = records[-1]["step"], {}
    least = max(steps // 100, LEAST_STEPS)
    for end in (max(int(share * steps), least) for share in SHARES):
        first = end - max(end // 10, least) + 1
        lines = [record for record in records if first <= record["step"] <= end]
        if not lines:
            raise UserError(f"{run}: no loss of the steps {first} to {end}: lower --log_interval")
        tokens = sum(line["supervised_tokens"] for line in lines)
        found[end] = sum(line["loss"] * line["supervised_tokens"] for line in lines) / tokens
    return f"{run.resolve().name.rpartition('_')[0]}, {steps} steps", found


def band(measured: list[float]) -> tuple[float, float]:
    """Where 99 of 100 further runs lie if losses are normally distributed (prediction interval)."""
    mean, deviation = statistics.mean(measured), statistics.stdev(measured)
    reach = T_99 * deviation * math.sqrt(1 + 1 / len(measured))
    return mean - reach, mean + reach


def outside(run: Path, by_step: dict[int, float], known: dict[str, list[float]] | None) -> list[str]:
    if known is None:
        return [f"{run}: no other runs of its stage and length to compare with"]
    told = []
    for step, loss in by_step.items():
        low, high = band(known[str(step)])
        if not low <= loss <= high:
            expected = f"expected {low:.3f} to {high:.3f}, as with other seeds: see docs/recipes.md"
            told.append(f"{run}: loss {loss:.3f} at step {step}, {expected}")
    return told


if __name__ == "__main__":
    run_main(main)
