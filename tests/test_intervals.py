"""What intervals.py promises: intervals of error rates by the bootstrap."""

import math
import random

import numpy as np
import pytest

from intervals import Interval, middle, rate_interval, resampled_sums, sums_of_units
from score import Counts


def corpus(num_lines: int, rate: float = 0.1, words: int = 10, seed: int = 0) -> list[Counts]:
    """Lines of `words` words, of which each is wrong at random."""
    generator = random.Random(seed)
    return [Counts(sum(generator.random() < rate for _ in range(words)), 0, 0, words) for _ in range(num_lines)]


def test_the_interval_is_that_of_the_binomial_where_all_words_are_wrong_independently():
    interval = rate_interval(lines := corpus(2000), 1000)
    rate = sum(line.errors for line in lines) / 20_000
    half = 1.96 * math.sqrt(rate * (1 - rate) / 20_000)
    assert (interval.low, interval.high) == pytest.approx((rate - half, rate + half), abs=half / 8)


def test_the_true_rate_lies_within_about_95_of_100_intervals():
    intervals = [rate_interval(corpus(100, seed=seed), 200) for seed in range(100)]
    share = sum(interval.low <= 0.1 <= interval.high for interval in intervals) / len(intervals)
    assert 0.88 <= share <= 0.99


def test_errors_that_a_speaker_makes_together_widen_the_interval_over_speakers():
    lines = [Counts(10 * (index < 50), 0, 0, 10) for index in range(100)]
    speakers = [f"speaker {index // 10}" for index in range(100)]  # five of them have every word wrong
    by_line, by_speaker = rate_interval(lines, 1000), rate_interval(lines, 1000, speakers)
    assert by_speaker.high - by_speaker.low > 2 * (by_line.high - by_line.low)


def test_the_same_lines_give_the_same_interval():
    assert rate_interval(corpus(50), 100) == rate_interval(corpus(50), 100)


@pytest.mark.parametrize(
    ("lines", "num_resamples", "units"),
    [
        ([], 100, None),
        ([Counts(1, 0, 0, 4)], 100, None),
        ([Counts(1, 0, 0, 4)] * 3, 0, None),
        ([Counts(0, 0, 2, 0)] * 3, 100, None),
        ([Counts(1, 0, 0, 4)] * 3, 100, ["anna", "anna", "anna"]),
    ],
)
def test_too_little_to_draw_from_has_no_interval(lines, num_resamples, units):
    assert rate_interval(lines, num_resamples, units) is None


def test_lines_with_empty_references_count_their_insertions():
    interval = rate_interval([Counts(0, 0, 0, 10), Counts(0, 0, 5, 0)] * 20, 200)
    assert interval.low < 0.5 < interval.high


def test_rows_of_a_unit_are_added_up():
    rows = np.array([[1, 2], [3, 4], [5, 6]])
    assert sums_of_units(rows, ["b", "a", "b"]).tolist() == [[6, 8], [3, 4]]
    assert sums_of_units(rows, None) is rows


def test_a_resampled_corpus_has_as_many_lines_as_the_corpus():
    sums = resampled_sums(np.array([[1, 0], [1, 1], [1, 2]]), 50)
    assert sums.shape == (50, 2) and set(sums[:, 0]) == {3.0}
    assert set(sums[:, 1]) <= set(range(7)) and len(set(sums[:, 1])) > 2


def test_an_interval_is_printed_in_per_cent():
    assert str(middle(np.linspace(0, 1, 101))) == "2.50 to 97.50"
    assert str(Interval(-0.01234, 0.5)) == "-1.23 to 50.00"
