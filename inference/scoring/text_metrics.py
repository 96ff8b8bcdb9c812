"""How near answers are to the expected ones, beyond being equal, and how sure such a figure is.

Words are those of sacrebleu's "zh" tokenizer, in which every Chinese character is one; all figures but BLEU
ignore case and punctuation. Shapes: n answers, C columns of figures that add up, R resamples, M metrics.
"""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU
from sacrebleu.tokenizers.tokenizer_zh import TokenizerZh

METRICS = ("exact", "contains", "rouge_l", "cider", "bleu")
MEANS = 4  # the first metrics are means of a column of their own; BLEU follows from the sums of the rest
RESAMPLES = 1000
NGRAMS = 4
CIDER_LENGTH_SPREAD = 6.0

_tokenize = TokenizerZh()


def answer_columns(answers: Sequence[str], expected: Sequence[str]) -> np.ndarray:
    """What each answer adds to the figures of a file, (n, C) float64, for `figures`."""
    pairs = list(zip(map(words, answers), map(words, expected), strict=True))
    rouge = RougeScorer(["rougeL"], tokenizer=_Words())
    bleu = BLEU(tokenize="zh", effective_order=True)
    rows = []
    similar = cider(pairs)
    for number, (answer, right) in enumerate(zip(answers, expected, strict=True)):
        counts = bleu.sentence_score(answer, [right])
        rows.append(
            [
                answer.strip() == right.strip(),
                contains(*pairs[number]) or answer.strip() == right.strip(),
                rouge.score(right, answer)["rougeL"].fmeasure,
                similar[number],
                *counts.counts,
                *counts.totals,
                counts.sys_len,
                counts.ref_len,
            ]
        )
    return np.array(rows, dtype=np.float64)


def figures(columns: np.ndarray) -> np.ndarray:
    """(n, C) -> (M,): exact, contains and ROUGE-L (F1) from 0 to 1, CIDEr-D from 0 to 10, BLEU from 0 to 100.

    BLEU is the corpus's; orders that no answer is long enough for are left out (`effective_order`).
    """
    sums = columns.sum(axis=0)
    counts, totals = np.split(sums[MEANS : MEANS + 2 * NGRAMS], 2)
    lengths = sums[MEANS + 2 * NGRAMS :].astype(int)
    bleu = BLEU.compute_bleu(list(counts), list(totals), *lengths, "exp", effective_order=True).score
    return np.array([*sums[:MEANS] / len(columns), bleu])


def resampled(columns: Sequence[np.ndarray], seed: int = 1337) -> np.ndarray:
    """Figures of RESAMPLES bootstrap resamples of the n questions, (len(columns), R, M).

    The (n, C) columns of several models are resampled together, so that differences are paired.
    """
    n = len(columns[0])
    generator = np.random.default_rng(seed)
    samples = np.empty((len(columns), RESAMPLES, len(METRICS)))
    for number in range(RESAMPLES):
        rows = generator.integers(0, n, n)
        samples[:, number] = [figures(of_model[rows]) for of_model in columns]
    return samples


def interval(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the 95 % percentile interval of resampled figures (R, M): (M,), (M,)."""
    low, high = np.percentile(samples, [2.5, 97.5], axis=0)
    return low, high


def words(text: str) -> list[str]:
    return [word for word in _tokenize(text.lower()).split() if any(map(str.isalnum, word))]


def contains(answer: list[str], expected: list[str]) -> bool:
    """Whether the words of `expected`, if there are any, stand in `answer` one after the other."""
    starts = range(len(answer) - len(expected) + 1)
    return bool(expected) and any(answer[start : start + len(expected)] == expected for start in starts)


def cider(pairs: Sequence[tuple[list[str], list[str]]]) -> list[float]:
    """CIDEr-D (arXiv 1411.5726) of each (answer, expected) pair of words, 0 to 10, as pycocoevalcap has it.

    That package is 104 MB of Java programs beside these few lines. Rarity is counted over the expected
    answers, so a file with one question, or with equal ones, gets 0; a one-word answer gets 2.5 at most.
    """
    counted = [(ngrams(answer), ngrams(right)) for answer, right in pairs]
    occurs = Counter(ngram for _, right in counted for ngram in right)

    def weigh(counts: Counter) -> tuple[dict[tuple, float], np.ndarray, int]:
        weights = {
            ngram: count * (math.log(len(pairs)) - math.log(max(1, occurs[ngram])))
            for ngram, count in counts.items()
        }
        squares = np.zeros(NGRAMS)
        for ngram, weight in weights.items():
            squares[len(ngram) - 1] += weight**2
        return weights, np.sqrt(squares), sum(count for ngram, count in counts.items() if len(ngram) == 2)

    scores = []
    for answer, right in counted:
        (own, own_norm, own_length), (other, other_norm, other_length) = weigh(answer), weigh(right)
        products = np.zeros(NGRAMS)
        for ngram, weight in own.items():
            products[len(ngram) - 1] += min(weight, other.get(ngram, 0.0)) * other.get(ngram, 0.0)
        norms = own_norm * other_norm
        cosines = np.divide(products, norms, out=np.zeros(NGRAMS), where=norms > 0)
        penalty = math.exp(-((own_length - other_length) ** 2) / (2 * CIDER_LENGTH_SPREAD**2))
        scores.append(10 * float(cosines.mean()) * penalty)
    return scores


def ngrams(text: list[str]) -> Counter:
    return Counter(
        tuple(text[start : start + size])
        for size in range(1, NGRAMS + 1)
        for start in range(len(text) - size + 1)
    )


class _Words:
    """What rouge-score takes as a tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)
