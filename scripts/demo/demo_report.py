"""Puts the quickstart's figures together: prints a table and writes report.json."""

import argparse
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out_dir", type=Path, default=Path("out/demo"), help="where the quickstart wrote")
    out_dir = parser.parse_args().out_dir
    seen, unseen, blank = (read(out_dir / f"report_{name}.json") for name in ("seen", "unseen", "blank"))
    encoder = read(ROOT / "model/vision_model/demo-encoder/training.json")["scores"]
    report = {
        "accuracy": unseen["mean_over_kinds"],
        "accuracy_seen": seen["mean_over_kinds"],
        "by_kind": {kind: entry["accuracy"] for kind, entry in unseen["by_kind"].items()},
        "by_kind_seen": {kind: entry["accuracy"] for kind, entry in seen["by_kind"].items()},
        "majority": unseen["majority"]["mean_over_kinds"],
        "blank": blank["mean_over_kinds"],
        "encoder": encoder["held_out"]["all"],
        "encoder_large": encoder["held_out"]["large"],
        "seconds": {path.name: int(path.read_text().split()[0]) for path in sorted(out_dir.glob("done/*"))},
    }
    (out_dir / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")

    majority = {kind: entry["accuracy"] for kind, entry in unseen["majority"]["by_kind"].items()}
    blanks = {kind: entry["accuracy"] for kind, entry in blank["by_kind"].items()}
    print("Share of questions answered exactly right, on pictures that were not trained on:")
    print(f"{'kind':8} {'seen artists':>13} {'unseen artist':>14} {'blank picture':>14} {'majority':>9}")
    for kind, accuracy in report["by_kind"].items():
        line(kind, report["by_kind_seen"][kind], accuracy, blanks[kind], majority[kind])
    line("mean", report["accuracy_seen"], report["accuracy"], report["blank"], report["majority"])
    examples(unseen["questions"])
    print(
        f"The encoder alone names {report['encoder']:.2f} of the unseen artist's drawings, "
        f"{report['encoder_large']:.2f} of the large ones."
    )
    print(f"{sum(report['seconds'].values())} seconds in all: {report['seconds']}")


def examples(questions: list[dict]) -> None:
    """One question of each kind, in both languages by turns; the file's order is kinds within languages."""
    print("Some answers about the unseen artist's drawings:")
    for row in questions[:64:9]:
        verdict = "right" if row["correct"] else f"should be: {row['expected']}"
        print(f"  {row['question']}  {row['answer']}  ({verdict})")


def line(name: str, *shares: float) -> None:
    seen, unseen, blank, majority = shares
    print(f"{name:8} {seen:13.2f} {unseen:14.2f} {blank:14.2f} {majority:9.2f}")


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
