"""Facts about rows -> figures of a data set: counters and digests, never the rows themselves.

A digest takes eight bytes, so that a million rows with their pictures, questions and answers take some 50 MB.
"""

import re
from array import array
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from scripts.checks.reading import Facts, Picture

FREQUENT, FREQUENT_SHOWN = 10_000, 10  # answers whose text is kept at a time, and in the report
REASONS = 1000  # kinds of errors that are told apart
VALUES = re.compile(r"(?<=cannot read image ).*(?= \()|'[^']*'|\"[^\"]*\"|\d[\d,.]*")
PERCENTILES = (50, 95, 100)


class Figures:
    """Of the rows that were given to `add`."""

    def __init__(self) -> None:
        self.rows: Counter[str] = Counter()
        self.layouts: Counter[str] = Counter()
        self.scripts: Counter[str] = Counter()
        self.modes: Counter[str] = Counter()
        self.formats: Counter[str] = Counter()
        self.sides: Counter[int] = Counter()  # the shorter ones of pictures
        self.tokens: Counter[int] = Counter()
        self.supervised: Counter[int] = Counter()
        self.reasons: Counter[str] = Counter()
        self.first: dict[str, str] = {}  # the first message of each reason
        self.row_digests, self.names, self.contents = array("Q"), array("Q"), array("Q")
        self.questions, self.answers = array("Q"), array("Q")
        self.texts: dict[int, tuple[str, int]] = {}  # of answers that may be frequent, and a count to drop by

    def add(self, facts: Facts) -> None:
        rows = self.rows
        rows["read"] += 1
        self.layouts[facts.layout or "none"] += 1
        if facts.error:
            rows["bad structure" if facts.is_structural else "bad sample"] += 1
            self._reason(facts)
        if facts.is_structural:
            return
        rows["with pictures"] += bool(facts.pictures)
        rows["cut"] += facts.is_cut
        rows["answers cut"] += facts.answers_cut
        self.scripts[facts.script] += 1
        self.row_digests.append(facts.digest)
        self.questions.extend(facts.questions)
        for picture in facts.pictures:
            self._picture(picture)
        for digest, text in facts.answers:
            self._answer(digest, text)
        if facts.tokens:
            self.tokens[facts.tokens] += 1
        if not facts.error:
            self.supervised[facts.supervised] += 1

    def _reason(self, facts: Facts) -> None:
        reason = VALUES.sub("…", facts.error.removeprefix(f"{facts.where}: "))[:160]
        reason = reason if reason in self.reasons or len(self.reasons) < REASONS else "others"
        self.reasons[reason] += 1
        self.first.setdefault(reason, facts.error)

    def _picture(self, picture: Picture) -> None:
        self.names.append(picture.name)
        self.contents.append(picture.content)
        if picture.size:
            self.modes[picture.mode] += 1
            self.formats[picture.format] += 1
            self.sides[min(picture.size)] += 1

    def _answer(self, digest: int, text: str) -> None:
        """Keeps the texts of all answers that are more than 1 in FREQUENT (Misra and Gries, 1982)."""
        self.answers.append(digest)
        if digest in self.texts:
            text, count = self.texts[digest]
            self.texts[digest] = text, count + 1
        elif len(self.texts) < FREQUENT:
            self.texts[digest] = text, 1
        else:
            self.texts = {key: (told, count - 1) for key, (told, count) in self.texts.items() if count > 1}

    def report(self) -> dict[str, Any]:
        """All figures by name, for report.json."""
        rows, bad = self.rows, {"structure": self.rows["bad structure"], "samples": self.rows["bad sample"]}
        judged, decoded = len(self.row_digests), self.sides.total()
        names, contents = (np.unique(np.asarray(given)) for given in (self.names, self.contents))
        return {
            "rows": rows["read"],
            "good_rows": rows["read"] - sum(bad.values()),
            "bad_rows": bad,
            "bad_reasons": [
                {"reason": reason, "rows": count, "first": self.first[reason]}
                for reason, count in self.reasons.most_common()
            ],
            "layouts": dict(self.layouts.most_common()),
            "scripts": dict(self.scripts.most_common()),
            "duplicate_rows": judged - len(np.unique(np.asarray(self.row_digests))),
            "pictures": {
                "rows": rows["with pictures"],
                "shown": len(self.names),
                "distinct": len(contents),
                "copies_under_other_names": len(names) - len(contents),
                "modes": dict(self.modes.most_common()),
                "formats": dict(self.formats.most_common()),
                "shorter_side": summary(self.sides) if decoded else None,
            },
            "tokens": summary(self.tokens) | {"cut_rows": rows["cut"]},
            "supervised_tokens": summary(self.supervised),
            "answers": self._frequent() | {"cut": rows["answers cut"]},
        }

    def _frequent(self) -> dict[str, Any]:
        """The most frequent answers: always giving the first is right as often as `majority` says."""
        digests, counts = np.unique(np.asarray(self.answers), return_counts=True)
        order = np.argsort(-counts, kind="stable")[:FREQUENT_SHOWN]
        found = [(self.texts.get(int(digests[i]), ("",))[0], int(counts[i])) for i in order]
        shown = [{"answer": text or "(a long one)", "count": count} for text, count in found if count > 1]
        majority = float(counts.max() / counts.sum()) if len(counts) else None
        found = {"count": len(self.answers), "distinct": len(digests), "majority": majority}
        return found | {"most_frequent": shown}


class Overlap:
    """What rows that a model is to be measured with share with the training rows in `learnt`."""

    def __init__(self, learnt: Figures):
        self.pictures, self.questions = (
            np.unique(np.asarray(given)) for given in (learnt.contents, learnt.questions)
        )
        self.counts: Counter[str] = Counter()

    def of(self, facts: Facts) -> list[str]:
        """What a row shares: "picture", "question" (about the same pictures, or without any)."""
        pictures = _among([picture.content for picture in facts.pictures], self.pictures)
        questions = _among(facts.questions, self.questions)
        self.counts["rows"] += 1
        self.counts["rows_with_a_picture_of_training"] += pictures
        self.counts["rows_with_a_question_of_training"] += questions
        return ["picture"] * pictures + ["question"] * questions


def _among(digests: list[int], known: np.ndarray) -> bool:
    """Whether any of them is among the `known`, which are sorted."""
    found = np.asarray(digests, dtype=np.uint64)
    places = np.searchsorted(known, found).clip(max=max(len(known) - 1, 0))
    return bool(len(known) and (known[places] == found).any())


def summary(counts: Counter[int]) -> dict[str, Any]:
    """Mean, percentiles and a histogram: lower bounds of bins of equal width, and how many fall in each."""
    if not counts:
        return {"mean": None, "histogram": {"from": [], "count": []}}
    values, weights = (np.array(part) for part in zip(*sorted(counts.items()), strict=True))
    reached = np.cumsum(weights) / weights.sum()
    found = {f"p{p}": int(values[np.searchsorted(reached, p / 100 - 1e-12)]) for p in PERCENTILES}
    width = max(-(-int(values[-1] - values[0] + 1) // 24), 1)
    bins = np.bincount((values - values[0]) // width, weights)
    lower = [int(values[0] + i * width) for i in range(len(bins))]
    told = {"mean": round(float((values * weights).sum() / weights.sum()), 2), "min": int(values[0]), **found}
    return told | {"histogram": {"from": lower, "count": [int(count) for count in bins]}}


def share(part: int, whole: int) -> str:
    return f"{part:,} ({part / max(whole, 1):.1%})"


def lines_of(report: dict[str, Any]) -> Iterable[str]:
    """The report for a terminal."""
    rows, bad = report["rows"], sum(report["bad_rows"].values())
    pictures, tokens, answers = (report[name] for name in ("pictures", "tokens", "answers"))
    yield f"{rows:,} rows, {pictures['rows']:,} with pictures, {bad:,} bad"
    yield f"  layout: {counted(report['layouts'])}"
    for name in report["broken_files"]:
        yield f"  not read: {name}"
    for kind in report["bad_reasons"][:20]:
        yield f"  bad: {kind['rows']:,} x {kind['reason']}; first {kind['first']}"
    yield f"duplicates: {share(report['duplicate_rows'], rows)} rows are like one before"
    if pictures["shown"]:
        copies = pictures["copies_under_other_names"]
        yield f"pictures: {pictures['shown']:,} shown, {pictures['distinct']:,} different"
        if side := pictures["shorter_side"]:
            yield f"  {copies:,} are copies under other names"
            yield f"  {counted(pictures['formats'])}; {counted(pictures['modes'])}"
            yield f"  shorter side in pixels: {spread(side)}"
        else:
            yield "  not opened (--no_decode): told apart by path, sizes not known"
    yield f"tokens of a row: {spread(tokens)}"
    cut, limit = tokens["cut_rows"], report["max_seq_len"]
    yield f"  --max_seq_len {limit} cuts {share(cut, rows)} rows; {answers['cut']:,} answers lose their end"
    yield f"supervised tokens of a row: {spread(report['supervised_tokens'])}"
    yield f"scripts: {counted(report['scripts'])}"
    yield f"answers: {answers['count']:,}, {answers['distinct']:,} different"
    if answers["most_frequent"]:
        yield f"  always giving the most frequent one is right in {answers['majority']:.1%}"
    for one in answers["most_frequent"][:5]:
        yield f"  {share(one['count'], answers['count'])} {one['answer']!r}"
    if overlap := report.get("overlap"):
        of = overlap["rows"]
        yield f"evaluation: {of:,} rows, {overlap['bad_rows']:,} bad"
        yield f"  a picture of training: {share(overlap['rows_with_a_picture_of_training'], of)} rows"
        yield f"  a question of training: {share(overlap['rows_with_a_question_of_training'], of)} rows"


def counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items()) or "none"


def spread(figures: dict[str, Any]) -> str:
    if figures["mean"] is None:
        return "none"
    shown = {"mean": "mean", "p50": "median", "p95": "95 % up to", "p100": "largest"}
    return ", ".join(f"{title} {figures[name]:,}" for name, title in shown.items())
