"""The picture of benchmark.py."""

import statistics
import sys
from pathlib import Path


def plot(stages: dict[str, dict], path: Path) -> None:
    """Bars: how many times as fast as published; whiskers from the lowest to the highest repeat."""
    try:
        import matplotlib
    except ImportError:
        sys.exit("error: --plot needs the package matplotlib: pip install matplotlib")
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for number, mode in enumerate(("published", "default", "cached")):
        found = [(i, s[mode]["ratio"]) for i, s in enumerate(stages.values()) if mode in s]
        heights = [statistics.median(ratios) for _, ratios in found]
        whiskers = [
            [h - min(r) for h, (_, r) in zip(heights, found, strict=True)],
            [max(r) - h for h, (_, r) in zip(heights, found, strict=True)],
        ]
        axes.bar(
            [i + 0.27 * (number - 1) for i, _ in found], heights, 0.25, yerr=whiskers, label=mode, capsize=3
        )
    axes.set_xticks(range(len(stages)), list(stages))
    axes.set_ylabel("speed, published = 1")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
