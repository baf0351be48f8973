"""What score.py promises: the figures, and the lines that the second figure leaves out."""

import math

import jiwer
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from errors import InputError
from score import NORMALIZERS, Counts, choose_metric, score

REFUSAL = "I apologize, but it appears that there is no speech to transcribe."
LONG_CHINESE = "甚至出现交易几乎停滞的情况一二线城市虽然也处于调整中" * 2  # 52 characters


# The figures


def test_errors_are_summed_over_the_corpus_before_they_are_divided():
    # 1 of 1 word wrong, 0 of 9: the mean of the lines' rates is 50 %, the corpus has 1 error in 10 words.
    result = score(["a", "b c d e f g h i j"], ["x", "b c d e f g h i j"])
    assert result.all.rate == 1 / 10
    assert result.summary() == "WER 10.00 / 10.00, 0 of 2 lines left out"


@pytest.mark.parametrize(
    ("reference", "hypothesis", "substitutions", "deletions", "insertions"),
    [
        ("the cat sat", "the cat sat", 0, 0, 0),
        ("the cat sat", "the hat sat", 1, 0, 0),
        ("the cat sat", "the sat", 0, 1, 0),
        ("the cat sat", "the cat sat down", 0, 0, 1),
        ("a b c d e f", "x b d e f g", 1, 1, 1),
        ("the cat sat", "", 0, 3, 0),
        ("", "", 0, 0, 0),
        ("", "two words", 0, 0, 2),
    ],
)
def test_substitutions_deletions_and_insertions_are_told_apart(
    reference, hypothesis, substitutions, deletions, insertions
):
    expected = Counts(substitutions, deletions, insertions, len(reference.split()))
    assert score([reference], [hypothesis], metric="wer").all == expected


def test_the_counts_and_the_alignment_of_each_line_are_kept():
    references, hypotheses = ["the cat sat", "", "no more"], ["the hat sat down", "x", "no more"]
    result = score(references, hypotheses)
    assert result.lines == [Counts(1, 0, 1, 3), Counts(0, 0, 1, 0), Counts(0, 0, 0, 2)]
    assert result.all == Counts(1, 0, 2, 5)
    assert [alignment.references for alignment in result.alignments] == [[text.split()] for text in references]
    assert "HYP: the hat sat down" in jiwer.visualize_alignment(result.alignments[0])


# Few words, so that many pairs have some in common; texts of them and of any other words.
WORDS = st.one_of(st.sampled_from("a b c d".split()), st.text("xyäß你ก-'", min_size=1, max_size=4))
CORPORA = st.lists(
    st.tuples(st.lists(WORDS, min_size=1, max_size=8), st.lists(WORDS, max_size=8)), min_size=1, max_size=5
)


@given(CORPORA)
@settings(max_examples=100, deadline=None)
def test_counts_and_rates_are_those_of_jiwer(corpus):
    references, hypotheses = ([" ".join(text) for text in texts] for texts in zip(*corpus, strict=True))
    by_words = jiwer.process_words(references, hypotheses)
    counts = score(references, hypotheses, metric="wer").all
    assert counts[:3] == (by_words.substitutions, by_words.deletions, by_words.insertions)
    assert counts.rate == pytest.approx(by_words.wer)
    references, hypotheses = (["".join(text.split()) for text in texts] for texts in (references, hypotheses))
    assert score(references, hypotheses, metric="cer").all.rate == pytest.approx(jiwer.cer(references, hypotheses))


@given(CORPORA)
@settings(max_examples=30, deadline=None)
def test_the_second_figure_is_the_first_of_the_lines_that_are_not_left_out(corpus):
    references, hypotheses = ([" ".join(text) for text in texts] for texts in zip(*corpus, strict=True))
    hypotheses[0] = REFUSAL
    result = score(references, hypotheses, metric="wer")
    kept = [index for index in range(len(references)) if index not in result.hallucinated]
    rest = score([references[index] for index in kept], [hypotheses[index] for index in kept], metric="wer")
    assert 0 in result.hallucinated and result.filtered == rest.all


def test_an_empty_reference_adds_insertions_to_a_corpus():
    assert score(["a b c d", ""], ["a b c d", "x"]).all == Counts(0, 0, 1, 4)


@pytest.mark.parametrize(("references", "hypotheses"), [([], []), ([""], [""]), ([""], ["x"])])
def test_the_rate_of_a_corpus_without_a_single_reference_word_is_nan(references, hypotheses):
    result = score(references, hypotheses)
    assert math.isnan(result.all.rate)
    assert result.summary().startswith("WER nan / nan, ")


@pytest.mark.parametrize("space", ["  ", "\t", "\u3000", "\u00a0"])
def test_any_whitespace_separates_words(space):
    assert score([f"a{space}b"], ["a b"], metric="wer").all == Counts(0, 0, 0, 2)


def test_cer_ignores_whitespace():
    assert score(["ab cd"], [" a b\u3000cx "], metric="cer").all == Counts(1, 0, 0, 4)


def test_the_chinese_corpus_rate_is_the_hand_computed_one():
    result = score(["今天天气好", "你好"], ["今天天汽好", "你"])
    assert result.metric == "cer"
    assert result.all == Counts(substitutions=1, deletions=1, insertions=0, reference_length=7)
    assert result.summary() == "CER 28.57 / 28.57, 0 of 2 lines left out"


@pytest.mark.parametrize(
    ("text", "metric"),
    [
        ("甚至出现交易几乎停滞的情况", "cer"),
        ("今日はいい天気ですね", "cer"),
        ("コンピューター", "cer"),
        ("สวัสดีครับ", "cer"),
        ("오늘은 날씨가 좋습니다", "wer"),
        ("good morning", "wer"),
        ("доброе утро", "wer"),
        ("शुभ प्रभात", "wer"),
        ("我用 wifi 上网看今天的新闻", "cer"),
        ("the city is called 北京 in chinese", "wer"),
        ("123 456", "wer"),
        ("", "wer"),
    ],
)
def test_cer_is_chosen_for_chinese_japanese_and_thai_and_not_for_korean(text, metric):
    assert choose_metric([text]) == metric
    assert score([text], [text]).metric == metric


def test_a_metric_that_is_asked_for_is_not_overruled():
    assert score(["你好"], ["你好"], metric="wer").all.reference_length == 1
    assert score(["good day"], ["good day"], metric="cer").all.reference_length == 7


@pytest.mark.parametrize(("normalizer", "errors"), [("none", 3), ("basic", 2), ("english", 0)])
def test_texts_pass_through_whispers_normalizers_first(normalizer, errors):
    result = score(["it is twenty colours"], ["It is 20 colors."], normalizer=normalizer)
    assert (result.all.errors, result.normalizer) == (errors, normalizer)


@pytest.mark.parametrize(
    ("text", "folded"),
    [
        ("ＡＢＣ１２３", "abc123"),
        ("今天，天气很好。", "今天天气很好"),
        ("今天 天气　很好！", "今天天气很好"),
        ("「對不起」（笑）", "對不起笑"),
        ("我用 WiFi 上网", "我用wifi上网"),
        ("ｶﾀｶﾅ", "カタカナ"),
        ("Good morning, 北京", "good morning北京"),
        ("50％", "50"),
    ],
)
def test_the_chinese_normalizer_folds_width_and_case_and_takes_punctuation_away(text, folded):
    assert NORMALIZERS["chinese"]()(text) == folded
    assert score([folded], [text], normalizer="chinese", metric="cer").all.errors == 0


def test_a_reference_that_the_normalizer_empties_counts_no_words():
    assert score(["[noise]"], ["hello"], normalizer="basic").all == Counts(0, 0, 1, 0)


def test_the_normalizer_does_not_change_which_lines_are_left_out():
    references, hypotheses = ["the cat", "the cat", "no"], [REFUSAL, "the cat", "no " * 20]
    for normalizer in NORMALIZERS:
        result = score(references, hypotheses, normalizer=normalizer)
        assert list(result.hallucinated) == [0, 2]


@pytest.mark.parametrize(
    "arguments",
    [
        {"hypotheses": ["a", "b"]},
        {"hypotheses": ["a"], "durations": [1.0, 2.0]},
        {"hypotheses": ["a"], "metric": "ser"},
        {"hypotheses": ["a"], "normalizer": "french"},
    ],
)
def test_unequal_lengths_and_unknown_names_are_value_errors(arguments):
    with pytest.raises(ValueError, match="wanted"):
        score(["a"], **arguments)
    assert issubclass(InputError, ValueError)


# The lines that the second figure leaves out


def test_the_second_figure_leaves_hallucinated_lines_out_and_the_first_counts_them():
    result = score(["the cat sat down", "good morning"], ["the hat sat down", REFUSAL])
    assert result.all.errors == 1 + 12
    assert result.filtered == Counts(1, 0, 0, 4)
    assert list(result.hallucinated) == [1] and result.hallucinated[1].startswith("chat: ")
    assert result.summary() == "WER 216.67 / 25.00, 1 of 2 lines left out"


@pytest.mark.parametrize(
    ("durations", "left_out"), [([0.5, 60], [0]), ([None, 0.5], [1]), ([math.nan, None], []), (None, [])]
)
def test_a_line_of_unknown_duration_is_never_too_long(durations, left_out):
    assert list(score(["yes", "yes"], [LONG_CHINESE] * 2, durations).hallucinated) == left_out
