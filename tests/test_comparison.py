"""What comparison.py promises: a paired test of two systems."""

import itertools
import random

import numpy as np
import pytest

from comparison import differences, p_value, paired_test
from score import Counts


def lines(*errors: int) -> list[Counts]:
    """Lines of ten words."""
    return [Counts(num, 0, 0, 10) for num in errors]


def system(rate: float, seed: int) -> list[Counts]:
    generator = random.Random(seed)
    return lines(*(sum(generator.random() < rate for _ in range(10)) for _ in range(300)))


def test_a_system_that_is_clearly_better_is_told_so():
    test = paired_test(system(0.2, 1), system(0.1, 2), 1000)
    assert test.difference == pytest.approx(-0.1, abs=0.03)
    assert test.interval.low < test.difference < test.interval.high < 0
    assert test.p_value == pytest.approx(1 / 1001)


def test_the_order_of_the_systems_turns_the_sign_alone():
    one, other = system(0.2, 1), system(0.18, 2)
    forth, back = paired_test(one, other, 500), paired_test(other, one, 500)
    assert (forth.difference, forth.p_value) == (-back.difference, back.p_value)


def test_a_system_compared_with_itself_has_p_1():
    test = paired_test(system(0.2, 1), system(0.2, 1), 100)
    assert (test.difference, test.interval.low, test.interval.high, test.p_value) == (0, 0, 0, 1)


def test_equal_systems_are_thought_different_in_about_5_of_100_trials():
    values = [paired_test(system(0.1, seed), system(0.1, 1000 + seed), 100).p_value for seed in range(100)]
    assert 0.01 <= sum(value <= 0.05 for value in values) / len(values) <= 0.12


def test_the_p_value_is_near_that_of_all_swaps():
    gains = np.array([3, -1, 2, 0, 4, 1, -2, 2])
    sums = [abs(np.dot(signs, gains)) for signs in itertools.product([-1, 1], repeat=len(gains))]
    exact = sum(value >= abs(gains.sum()) for value in sums) / len(sums)
    assert p_value(gains, 20_000) == pytest.approx(exact, abs=0.01)


def test_few_speakers_prove_less_than_their_many_lines():
    first, second = lines(*[2] * 40), lines(*[1] * 40)
    speakers = [index // 10 for index in range(40)]  # four: two of their sixteen swaps differ as much
    assert paired_test(first, second, 1000).p_value < 0.01
    assert paired_test(first, second, 1000, speakers).p_value == pytest.approx(2 / 16, abs=0.05)


def test_the_lines_that_differ_most_come_first():
    found = differences(lines(0, 5, 1, 3), lines(0, 1, 2, 0))
    assert (found.num_better, found.num_worse, found.largest) == (2, 1, [1, 3, 2])


def test_the_test_is_printed_in_per_cent():
    text = str(paired_test(lines(2, 2), lines(1, 1), 100))
    assert text.startswith("difference -10.00, 95 % interval -10.00 to -10.00, p = 0.")
