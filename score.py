"""Word and character error rates, with and without hallucinated lines.

    python score.py --data_path test.jsonl --result_path result.txt
    WER 7.62 / 6.29, 12 of 2,620 lines left out

The first figure counts every line: errors summed over the corpus, divided by the length of all references. The second
leaves out the lines where the LLM did something else than transcribe: hallucination.py says which.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import jiwer

from errors import InputError, run
from hallucination import UNSPACED, hallucination, plain_text

# A metric is a function that cuts a text into the tokens to count, and a row. Its docstring is printed for the user.


def words(text: str) -> list[str]:
    """words between whitespace"""
    return text.split()


def characters(text: str) -> list[str]:
    """characters without whitespace"""
    return list("".join(text.split()))


METRICS = {"wer": words, "cer": characters}

# A normaliser is a function that returns what both texts go through first, and a row. Its docstring is for --help.


def unchanged() -> Callable[[str], str]:
    """nothing, so case and punctuation count"""
    return str


def whisper_basic() -> Callable[[str], str]:
    """Whisper's, lower case, no punctuation, symbols nor [notes] (nor the vowel signs of Thai and Hindi)"""
    from whisper.normalizers import BasicTextNormalizer  # here, for whisper imports torch: 3 s

    return BasicTextNormalizer()


def whisper_english() -> Callable[[str], str]:
    """Whisper's, lower case, no punctuation, [notes] nor um and uh; British spelling, numbers, contractions unified"""
    from whisper.normalizers import EnglishTextNormalizer

    return EnglishTextNormalizer()


def chinese() -> Callable[[str], str]:
    """full to half width, lower case, no punctuation nor symbols, spaces only between words of spaced scripts"""
    return plain_text


NORMALIZERS = {"none": unchanged, "basic": whisper_basic, "english": whisper_english, "chinese": chinese}


class Counts(NamedTuple):
    """Errors of one line, or summed over lines, in the tokens of a metric."""

    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    reference_length: int = 0

    @property
    def errors(self) -> int:
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Errors / reference_length, a fraction; nan where every reference is empty, whatever the errors."""
        return self.errors / self.reference_length if self.reference_length else math.nan


@dataclass(frozen=True)
class Score:
    metric: str  # a row of METRICS, never "auto"
    normalizer: str  # a row of NORMALIZERS
    all: Counts  # of all lines
    filtered: Counts  # without the hallucinated lines
    hallucinated: dict[int, str]  # index of a line -> why it is left out
    lines: list[Counts] = field(repr=False)  # of each line, in the order of the corpus
    alignments: list[jiwer.WordOutput] = field(repr=False)  # of each line; jiwer.visualize_alignment prints one

    def summary(self) -> str:
        """`WER 7.62 / 6.29, 12 of 2,620 lines left out`: per cent of all lines / without these."""
        left_out = f"{len(self.hallucinated):,} of {len(self.lines):,} lines left out"
        return f"{self.metric.upper()} {100 * self.all.rate:.2f} / {100 * self.filtered.rate:.2f}, {left_out}"


def score(
    references: Sequence[str],
    hypotheses: Sequence[str],
    durations: Sequence[float | None] | None = None,
    metric: str = "auto",
    normalizer: str = "none",
) -> Score:
    """The error counts of a corpus, over all lines and without hallucinated lines.

    "auto" is "cer" where most letters of the references are Chinese, Japanese or Thai, else "wer". A reference may be
    empty: its hypothesis is then all insertions. `durations` are in seconds; without them, or where one is None or NaN,
    "too long" is not checked. hallucination.py reads the texts as they are, not normalised.
    Raises InputError (a ValueError) for unequal lengths and unknown names.
    """
    durations = [None] * len(references) if durations is None else durations
    lengths = (len(references), len(hypotheses), len(durations))
    if len(set(lengths)) > 1:
        raise InputError(f"found {lengths} references, hypotheses and durations; wanted as many of each")
    for option, name, names in (("metric", metric, ["auto", *METRICS]), ("normalizer", normalizer, NORMALIZERS)):
        if name not in names:
            raise InputError(f"{option}: found {name!r}; wanted one of {', '.join(names)}")
    metric = choose_metric(references) if metric == "auto" else metric
    normalize, tokens_of = NORMALIZERS[normalizer](), METRICS[metric]  # text -> text -> tokens

    pairs = [[tokens_of(normalize(text)) for text in pair] for pair in zip(references, hypotheses, strict=True)]
    # jiwer is given tokens, for it would split words at U+0020 alone. One call for a whole corpus is no faster.
    options = {"reference_transform": list, "hypothesis_transform": list}
    alignments = [jiwer.process_words([reference], [hypothesis], **options) for reference, hypothesis in pairs]
    lines = [Counts(a.substitutions, a.deletions, a.insertions, len(a.references[0])) for a in alignments]
    reasons = map(hallucination, references, hypotheses, durations)  # why a line is left out, or None
    hallucinated = {index: reason for index, reason in enumerate(reasons) if reason}
    others = [counts for index, counts in enumerate(lines) if index not in hallucinated]  # the second figure
    return Score(metric, normalizer, total(lines), total(others), hallucinated, lines, alignments)


def total(lines: Sequence[Counts]) -> Counts:
    return Counts(*map(sum, zip(*lines, strict=True)))


def choose_metric(references: Sequence[str]) -> str:
    """cer where most letters are Chinese, Japanese or Thai, else wer. Korean has spaces: wer."""
    text = "".join(references)  # a letter counts, a mark or digit does not
    num_unspaced = len(re.findall(f"[{UNSPACED}]", text))
    return "cer" if num_unspaced > len(re.findall(rf"[^\W\d_{UNSPACED}]", text)) else "wer"


def main(argv: Sequence[str] | None = None) -> None:
    import report  # an option

    report.report(argv, score, METRICS, NORMALIZERS)


if __name__ == "__main__":
    run(main)
