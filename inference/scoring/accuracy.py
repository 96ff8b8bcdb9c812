"""Answers -> accuracy, by kind of question, and the baseline that always gives the most frequent answer."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from dataset.pictures import picture_name
from inference.answers import Question


def score(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, Any]:
    """Exact-match accuracy of stripped answers, and of the baseline that always gives a kind's most frequent
    answer: accuracy, mean_over_kinds, n, by_kind, majority, questions."""
    rows = [
        {
            "where": question.where,
            "kind": question.kind,
            "question": question.text,
            "answer": answer.strip(),
            "expected": question.expected,
            "correct": answer.strip() == question.expected,
            "images": [picture_name(image) for image in question.images],
        }
        for question, answer in zip(questions, answers, strict=True)
    ]
    correct, expected = defaultdict(list), defaultdict(Counter)
    for row in rows:
        correct[row["kind"]].append(row["correct"])
        expected[row["kind"]][row["expected"]] += 1
    best = {kind: count.most_common(1)[0] for kind, count in expected.items()}
    n = {kind: len(correct[kind]) for kind in sorted(correct)}
    majority = {
        kind: {"accuracy": best[kind][1] / n[kind], "n": n[kind], "answer": best[kind][0]} for kind in n
    }
    return {
        **summary({kind: {"accuracy": sum(correct[kind]) / n[kind], "n": n[kind]} for kind in n}),
        "majority": summary(majority),
        "questions": rows,
    }


def summary(by_kind: dict[str, dict[str, Any]]) -> dict[str, Any]:
    total = sum(kind["n"] for kind in by_kind.values())
    return {
        "accuracy": sum(round(kind["accuracy"] * kind["n"]) for kind in by_kind.values()) / total,
        "mean_over_kinds": sum(kind["accuracy"] for kind in by_kind.values()) / len(by_kind),
        "n": total,
        "by_kind": by_kind,
    }
