"""What alignment.py promises: every token of a line is in one column."""

import jiwer

from alignment import Column, columns_of


def test_every_token_of_an_alignment_is_a_column():
    alignment = jiwer.process_words("a b c d f", "a x d f e")
    assert columns_of(alignment) == [
        Column("equal", "a", "a"),
        Column("substitute", "b", "x"),
        Column("delete", "c", ""),
        Column("equal", "d", "d"),
        Column("equal", "f", "f"),
        Column("insert", "", "e"),
    ]
