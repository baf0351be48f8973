"""What from_nothing.py promises: how much is written where nobody spoke."""

import math

from from_nothing import text_from_nothing


def test_words_a_minute_are_counted_over_clips_with_an_empty_reference_alone():
    figure = text_from_nothing(["", "hello", " ", ""], ["Thank you.", "hello there", "", "you"], [30, 2, 60, 30])
    assert (figure.num_clips, figure.num_with_text, figure.num_words, figure.seconds) == (3, 2, 3, 120)
    assert figure.words_per_minute == 1.5
    told = "text from nothing: 1.50 words a minute (3 words in 2 of 3 clips without speech, 120.0 s)"
    assert str(figure) == told


def test_chinese_characters_are_counted_and_punctuation_is_not():
    assert text_from_nothing([""], ["谢谢 大家。 OK!"], [60]).words_per_minute == 5
    assert text_from_nothing([""], ["..."], [60]).num_with_text == 0


def test_without_such_clips_there_is_no_figure():
    assert text_from_nothing(["hello"], [""], [1.0]) is None


def test_a_duration_that_is_not_known_gives_no_rate():
    for unknown in (None, math.nan):
        figure = text_from_nothing(["", ""], ["you", ""], [unknown, 1.0])
        assert figure.num_words == 1 and math.isnan(figure.words_per_minute)
    assert math.isnan(text_from_nothing([""], [""], [0.0]).words_per_minute)
