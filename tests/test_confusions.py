"""What confusions.py promises: which words stand most often for which."""

from confusions import Confusion, confusions
from score import score


def test_the_commonest_errors_come_first_word_by_word():
    references = ["forty one and forty one", "forty one", "a b c", ""]
    hypotheses = ["fourteen two and forty one", "fourteen one", "a c", "uh"]
    most = confusions(score(references, hypotheses).alignments, 10)
    assert most[0] == Confusion("forty", "fourteen", 2)
    assert set(most[1:]) == {Confusion("one", "two", 1), Confusion("b", "", 1), Confusion("", "uh", 1)}
    assert confusions(score(references, hypotheses).alignments, 1) == most[:1]


def test_an_insertion_and_a_deletion_are_printed_as_nothing():
    assert str(Confusion("forty", "fourteen", 1200)) == "1,200 x forty -> fourteen"
    assert str(Confusion("", "uh", 1)) == "1 x (nothing) -> uh"
    assert str(Confusion("the", "", 1)) == "1 x the -> (nothing)"


def test_the_count_is_that_of_all_errors():
    result = score(["a b c d", "e f"], ["x y d d", "e"])
    assert sum(confusion.count for confusion in confusions(result.alignments, 100)) == result.all.errors
