"""Figures of answers against values worked out by hand, and the intervals around them."""

import math

import numpy as np
import pytest

from inference.scoring.tables import aligned
from inference.scoring.text_metrics import METRICS, answer_columns, figures, interval, resampled, words


def measured(*pairs: tuple[str, str]) -> dict[str, float]:
    answers, expected = zip(*pairs, strict=True)
    return dict(zip(METRICS, figures(answer_columns(answers, expected)), strict=True))


def test_words_of_chinese_are_characters_and_punctuation_is_none():
    assert words("It's a RED bus, no?") == ["it's", "a", "red", "bus", "no"]
    assert words("一只猫，2 dogs。") == ["一", "只", "猫", "2", "dogs"]


def test_bleu_of_a_known_pair():
    # Of the answer's n-grams 5 of 6, 3 of 5, 1 of 4 and 0 of 3 are expected; the last counts as 1 / (2 * 3)
    # ("exp" smoothing). Both have 6 words, so there is no penalty.
    found = measured(("the cat sat on a mat", "the cat lay on a mat"))["bleu"]
    assert found == pytest.approx(100 * (5 / 6 * 3 / 5 * 1 / 4 * 1 / 6) ** 0.25)


def test_bleu_is_the_corpus_s_with_its_brevity_penalty():
    # 3 + 1 words of 4 expected in each; 2-grams 2 + 0, 3-grams 1, no 4-gram, and 8 expected words to 4.
    found = measured(("a b c", "a b c d"), ("w", "w x y z"))["bleu"]
    assert found == pytest.approx(100 * math.exp(1 - 8 / 4)), "every n-gram that is there is right"


def test_bleu_of_one_word_counts_no_longer_ngrams():
    assert measured(("fish", "fish"))["bleu"] == pytest.approx(100)
    assert measured(("猫", "猫"), ("狗", "鸟"))["bleu"] == pytest.approx(50)


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence():
    # "the on the": 3 of 4 answered words, 3 of 6 expected ones.
    found = measured(("the dog on the", "The cat sat on the mat."))["rouge_l"]
    assert found == pytest.approx(2 * 0.75 * 0.5 / (0.75 + 0.5))
    assert measured(("一只白猫", "一只黑猫"))["rouge_l"] == pytest.approx(0.75)


def test_cider_weighs_words_by_how_rare_they_are():
    # "a" stands in both expected answers, so it weighs nothing; "cat" and "a cat" weigh log 2 in all three
    # vectors: cosines 1, 1, and 0 for the lengths that two words do not have.
    assert measured(("a cat", "a cat"), ("a cat", "a dog"))["cider"] == pytest.approx((5 + 0) / 2)
    # One bigram too many (3 words to 2): of the weights only "cat" and "a cat" are expected.
    unigram = math.log(2) / math.hypot(math.log(2), math.log(2))  # "now" weighs log 2 as well
    bigram = math.log(2) / math.hypot(math.log(2), math.log(2))
    longer = 10 * (unigram + bigram) / 4 * math.exp(-1 / (2 * 36))
    assert measured(("a cat now", "a cat"), ("", "a dog"))["cider"] == pytest.approx(longer / 2)


@pytest.mark.parametrize(
    ("answer", "expected", "found"),
    [
        ("It is a red bus.", "Red bus", 1),
        ("It is a red, old bus.", "red bus", 0),
        ("concatenate", "cat", 0),
        ("这是一只猫。", "猫", 1),
        ("?", "?", 1),
        ("", "?", 0),
    ],
)
def test_contains_is_about_whole_words_in_a_row(answer, expected, found):
    assert measured((answer, expected))["contains"] == found


def test_interval_of_a_constant_is_that_constant():
    columns = answer_columns(["a b c d e"] * 9, ["a b c d e"] * 9)
    (samples,) = resampled([columns])
    low, high = interval(samples)
    assert low == pytest.approx(figures(columns)) and high == pytest.approx(figures(columns))


def test_interval_of_a_share_is_the_binomial_s_and_follows_its_seed():
    right = ["yes"] * 70 + ["no"] * 30
    columns = answer_columns(right, ["yes"] * 100)
    low, high = (ends[METRICS.index("exact")] for ends in interval(resampled([columns])[0]))
    spread = 1.96 * math.sqrt(0.7 * 0.3 / 100)
    assert low == pytest.approx(0.7 - spread, abs=0.02) and high == pytest.approx(0.7 + spread, abs=0.02)
    assert np.array_equal(resampled([columns]), resampled([columns]))
    assert not np.array_equal(resampled([columns]), resampled([columns], seed=1))


def test_models_are_resampled_together():
    one = answer_columns(["yes"] * 5 + ["no"] * 5, ["yes"] * 10)
    other = answer_columns(["no"] * 5 + ["yes"] * 5, ["yes"] * 10)
    first, second = resampled([one, other])[:, :, METRICS.index("exact")]
    assert first + second == pytest.approx(np.ones(len(first)))


def test_columns_are_aligned():
    assert aligned([["kind", "n"], ["a", "100"]]) == "kind    n\na     100"
