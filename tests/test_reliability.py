"""What reliability.py promises: confidence against accuracy."""

import numpy as np
import pytest

from reliability import reliability, table
from score import characters, score, words


def with_confidences(text: str, *confidences: float) -> list[dict]:
    pairs = zip(text.split(), confidences, strict=True)
    return [{"word": word, "confidence": confidence} for word, confidence in pairs]


def test_a_word_is_right_where_it_stands_in_the_reference():
    lines = [with_confidences("the hat sat down", 0.9, 0.4, 0.9, 0.4), None]
    result = score(["the cat sat", "no words here"], ["the hat sat down", "no words"])
    found = reliability(lines, result.alignments, words)
    assert [(row.low, row.num_words, row.confidence, row.accuracy) for row in found.bins] == [
        (0.4, 2, pytest.approx(0.4), 0.0),
        (0.9, 2, pytest.approx(0.9), 1.0),
    ]
    assert found.expected_calibration_error == pytest.approx((2 * 0.4 + 2 * 0.1) / 4)


def test_confidences_that_are_true_have_no_calibration_error():
    generator = np.random.default_rng(0)
    confidences = generator.random(100_000)
    found = table(confidences, generator.random(100_000) < confidences)
    assert len(found.bins) == 10 and found.expected_calibration_error < 0.01
    assert table(confidences, generator.random(100_000) < confidences**2).expected_calibration_error > 0.1


def test_the_last_bin_holds_1_and_the_first_0():
    found = table(np.array([0.0, 0.1, 1.0]), np.array([False, True, True]))
    assert [(row.low, row.high) for row in found.bins] == [(0.0, 0.1), (0.1, 0.2), (0.9, 1.0)]


def test_words_go_through_the_normalizer_and_punctuation_does_not_count():
    lines = [with_confidences("Hello , World!", 0.9, 0.1, 0.8)]
    result = score(["hello world"], ["Hello , World!"], normalizer="chinese")
    found = reliability(lines, result.alignments, lambda word: word.lower().strip(",!").split())
    assert (found.num_words, found.num_left_out) == (2, 0)
    assert [row.accuracy for row in found.bins] == [1.0, 1.0]


def test_of_several_characters_in_a_word_all_must_be_right():
    result = score(["今天天气"], ["今天天汽"])
    found = reliability([with_confidences("今天 天汽", 0.9, 0.9)], result.alignments, characters)
    assert found.num_words == 2 and found.bins[0].accuracy == 0.5


def test_a_line_whose_words_do_not_spell_its_hypothesis_is_left_out_and_counted():
    result = score(["a b", "c"], ["a b", "c"])
    found = reliability([with_confidences("a", 0.9), with_confidences("c", 0.9)], result.alignments, words)
    assert (found.num_words, found.num_left_out) == (1, 1)
    assert found.as_lines()[-1].strip().startswith("1 lines are not in it")
    nothing = reliability([[], None], result.alignments, words)
    assert (nothing.num_words, nothing.num_left_out, nothing.expected_calibration_error) == (0, 1, 0)
