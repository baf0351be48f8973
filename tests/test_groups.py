"""What groups.py promises: error rates of groups of lines."""

import math

import pytest

from groups import MAX_GROUPS, as_lines, duration_bin, groups, name_of
from score import Counts


def test_the_lines_of_a_group_are_added_up_and_groups_are_sorted_by_name():
    rows, num_left_out = groups(["fr", "de", "fr"], [Counts(1, 0, 0, 4), Counts(0, 0, 0, 5), Counts(0, 1, 1, 6)], 100)
    assert [(row.name, row.num_lines, row.num_errors, row.reference_length) for row in rows] == [
        ("de", 1, 0, 5),
        ("fr", 2, 3, 10),
    ]
    assert num_left_out == 0 and rows[1].rate == 0.3
    assert rows[0].interval is None and rows[1].interval.low <= 0.3 <= rows[1].interval.high


def test_durations_stand_in_the_order_of_seconds():
    names = [duration_bin(seconds) for seconds in (100, 25, 3, math.nan, 0.5)]
    rows, _ = groups(names, [Counts(0, 0, 0, 1)] * 5, 0)
    assert [row.name for row in rows] == ["0 to 2 s", "2 to 5 s", "20 to 30 s", "30 s and more", "unknown"]


@pytest.mark.parametrize(
    ("seconds", "name"), [(0, "0 to 2 s"), (2, "2 to 5 s"), (9.99, "5 to 10 s"), (30, "30 s and more")]
)
def test_a_bin_holds_its_lower_edge(seconds, name):
    assert duration_bin(seconds) == name


def test_of_many_groups_the_largest_are_shown_and_the_others_counted():
    names = [str(index) for index in range(MAX_GROUPS + 5)] + ["many"] * 3
    rows, num_left_out = groups(names, [Counts(0, 0, 0, 1)] * len(names), 0)
    assert len(rows) == MAX_GROUPS and num_left_out == 6 and "many" in [row.name for row in rows]
    assert as_lines("key", rows, num_left_out, "wer", "words")[-1] == "  and 6 smaller groups"


@pytest.mark.parametrize(
    ("value", "name"), [("de", "de"), (3, "3"), (True, "true"), (None, "(none)"), (["a", "é"], '["a", "é"]')]
)
def test_any_value_of_a_record_names_a_group(value, name):
    assert name_of(value) == name


def test_a_group_of_empty_references_has_no_rate():
    rows, _ = groups(["noise"], [Counts(0, 0, 3, 0)], 100)
    assert rows[0].rate is None
    assert as_lines("kind", rows, 0, "wer", "words")[1].split() == ["noise", "1", "0", "-", "-"]
