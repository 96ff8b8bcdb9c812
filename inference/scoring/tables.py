"""Scores of one or several models on a file of questions: tables for people, a dict for a JSON report.

Every figure has a 95 % bootstrap interval; several models are compared over the same resampled questions.
Shapes: S models, n questions, R resamples, M metrics (inference/scoring/text_metrics.py).
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from common.cli import CONTROLS
from inference.answers import Question, greedy_answers
from inference.ask import Speaker
from inference.scoring.accuracy import score
from inference.scoring.text_metrics import METRICS, answer_columns, figures, interval, resampled

MEAN, ALL = "mean of kinds", "all questions"
KIND_WIDTH = 16  # of a table; longer names are cut
TITLES = {"exact": "accuracy", "contains": "contains", "bleu": "BLEU", "rouge_l": "ROUGE-L", "cider": "CIDEr"}


@dataclass
class Scored:
    """A model's answers: `report` is that of `score`, `blank` the same for answers to grey pictures, without
    its questions, or None; `columns` (n, C) is what text_metrics makes figures of."""

    name: str
    report: dict[str, Any]
    columns: np.ndarray
    blank: dict[str, Any] | None
    speed: str

    @property
    def answers(self) -> list[str]:
        return [row["answer"] for row in self.report["questions"]]


def score_model(
    speaker: Speaker, questions: Sequence[Question], batch_size: int, blank_images: bool, baseline: bool
) -> Scored:
    """Asks all questions, about grey pictures instead with `blank_images`, and then once more about grey ones
    as the `baseline`."""
    start = time.perf_counter()
    answers, tokens = answer_all(speaker, questions, batch_size, blank_images)
    seconds = time.perf_counter() - start
    speed = (
        f"{len(questions)} questions in {seconds:.1f} s "
        f"({len(questions) / seconds:.1f} questions/s, {tokens / seconds:.1f} tokens/s)"
    )
    blank = None
    if baseline and not blank_images:
        blank = score(questions, answer_all(speaker, questions, batch_size, blank=True)[0])
        del blank["questions"], blank["majority"]
    columns = answer_columns(answers, [question.expected for question in questions])
    return Scored(speaker.name, score(questions, answers), columns, blank, speed)


def answer_all(
    speaker: Speaker, questions: Sequence[Question], batch_size: int, blank: bool
) -> tuple[list[str], int]:
    """The answers, and how many tokens they have in all."""
    answers, total = [""] * len(questions), 0
    answered = greedy_answers(speaker.model, speaker.processor, questions, batch_size, blank)
    shown = "blank pictures" if blank else None
    with tqdm(total=len(questions), desc=shown, unit=" questions", smoothing=0) as bar:
        for index, (answer, tokens) in answered:
            answers[index] = answer
            total += tokens
            bar.update()
    return answers, total


@dataclass
class Measured:
    """Metrics of all models for each kind, MEAN and ALL: `values` (S, M) and `samples` (S, R, M)."""

    values: dict[str, np.ndarray]
    samples: dict[str, np.ndarray]

    def of_model(self, name: str, model: int, less: int | None = None) -> dict[str, dict[str, float]]:
        """Each metric's value, low and high end of the interval; with `less`, those of the difference to
        that model."""
        values, samples = self.values[name][model], self.samples[name][model]
        if less is not None:
            values, samples = values - self.values[name][less], samples - self.samples[name][less]
        low, high = interval(samples)
        return {
            metric: {"value": float(values[i]), "low": float(low[i]), "high": float(high[i])}
            for i, metric in enumerate(METRICS)
        }

    def nested(self, model: int, less: int | None = None) -> dict[str, Any]:
        """`of_model` for all questions, the mean over kinds, and each kind."""
        kinds = [name for name in self.values if name not in (MEAN, ALL)]
        return {
            "all": self.of_model(ALL, model, less),
            "mean_over_kinds": self.of_model(MEAN, model, less),
            "by_kind": {kind: self.of_model(kind, model, less) for kind in kinds},
        }


def measure(scored: Sequence[Scored]) -> Measured:
    kinds = np.array([row["kind"] for row in scored[0].report["questions"]])
    rows = {kind: np.flatnonzero(kinds == kind) for kind in scored[0].report["by_kind"]}
    columns = {kind: [one.columns[of_kind] for one in scored] for kind, of_kind in rows.items()}
    columns[ALL] = [one.columns for one in scored]
    values = {name: np.array([figures(one) for one in these]) for name, these in columns.items()}
    samples = {name: resampled(these, seed) for seed, (name, these) in enumerate(columns.items())}
    for found in (values, samples):
        whole = found.pop(ALL)
        found |= {MEAN: np.mean(list(found.values()), axis=0), ALL: whole}
    return Measured(values, samples)


def report_of(scored: Sequence[Scored], measured: Measured) -> dict[str, Any]:
    """What --report holds: the first model's scores, and under `compared` those of the others with their
    differences to the first."""
    first, *others = scored
    report = {**first.report, "blank": first.blank, "metrics": measured.nested(0)}
    if others:
        report["compared"] = [
            {
                "weight": one.name,
                **{name: one.report[name] for name in ("accuracy", "mean_over_kinds", "n", "by_kind")},
                "blank": one.blank,
                "metrics": measured.nested(number),
                "difference": measured.nested(number, less=0),
                "answers": one.answers,
            }
            for number, one in enumerate(others, start=1)
        ]
    return report


def score_table(scored: Scored, measured: Measured) -> str:
    """A line for each kind, then the mean over kinds and all questions, beside the baselines."""
    with_blank = [scored.blank] if scored.blank else []
    head = ["kind", "n", "accuracy", "95 % interval", *list(TITLES.values())[1:], "majority"]
    lines = [head + ["blank"] * len(with_blank)]
    for name in measured.values:
        found = measured.of_model(name, 0)
        exact = found["exact"]
        lines.append(
            [
                name[:KIND_WIDTH],
                str(count_of(scored.report, name)),
                f"{exact['value']:.3f}",
                f"{exact['low']:.3f} to {exact['high']:.3f}",
                *(f"{found[metric]['value']:{precision(metric)}}" for metric in list(TITLES)[1:]),
                *(
                    f"{accuracy_of(baseline, name):.3f}"
                    for baseline in (scored.report["majority"], *with_blank)
                ),
            ]
        )
    return aligned(lines)


def comparison_tables(scored: Sequence[Scored], measured: Measured) -> str:
    """Accuracies side by side, their differences to the first model, and the other metrics likewise."""
    letters = [chr(ord("A") + number) for number in range(len(scored))]
    names = "\n".join(
        f"{letter}: {one.name}".translate(CONTROLS) for letter, one in zip(letters, scored, strict=True)
    )
    baselines = [one.blank for one in scored if one.blank]
    head = ["accuracy", "n", *letters, "majority", *(f"blank {letter}" for letter in letters if baselines)]
    lines = [head]
    for name in measured.values:
        shown = [one.report for one in scored] + [scored[0].report["majority"], *baselines]
        shares = [f"{accuracy_of(one, name):.3f}" for one in shown]
        lines.append([name[:KIND_WIDTH], str(count_of(scored[0].report, name)), *shares])
    others = range(1, len(scored))
    pairs = [cell for letter in letters[1:] for cell in (f"{letter} - A", "95 % interval")]
    differences = [["accuracy", *pairs]]
    for name in measured.values:
        found = [measured.of_model(name, other, less=0)["exact"] for other in others]
        differences.append([name[:KIND_WIDTH], *(cell for one in found for cell in change(one, "+.3f"))])
    metrics = [[ALL, *letters, *pairs]]
    for metric, title in TITLES.items():
        values = [measured.of_model(ALL, model)[metric]["value"] for model in range(len(scored))]
        found = [measured.of_model(ALL, other, less=0)[metric] for other in others]
        form = precision(metric)
        changes = [cell for one in found for cell in change(one, f"+{form}")]
        metrics.append([title, *(f"{value:{form}}" for value in values), *changes])
    return "\n\n".join([names, aligned(lines), aligned(differences), aligned(metrics)])


def change(difference: dict[str, float], form: str) -> tuple[str, str]:
    return f"{difference['value']:{form}}", f"{difference['low']:{form}} to {difference['high']:{form}}"


def precision(metric: str) -> str:
    return ".1f" if metric == "bleu" else ".2f" if metric == "cider" else ".3f"


def accuracy_of(report: dict[str, Any], name: str) -> float:
    if name == MEAN:
        return report["mean_over_kinds"]
    return report["accuracy"] if name == ALL else report["by_kind"][name]["accuracy"]


def count_of(report: dict[str, Any], name: str) -> int:
    return report["n"] if name in (MEAN, ALL) else report["by_kind"][name]["n"]


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Cells in columns, the first one to the left, the others to the right, for a terminal."""
    lines = [[cell.translate(CONTROLS) for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])]) for first, *rest in lines
    )
