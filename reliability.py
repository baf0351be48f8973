"""Whether confidences are true: of the words that a model is 80 % sure of, 80 % should be right.

A table of confidence against accuracy in ten bins, and the expected calibration error, the mean distance of the two
over all words: Guo et al. 2017, arXiv:1706.04599. The words come from a result.jsonl whose rows have
`words`: [{"word": "hello", "confidence": 0.97}, ...].
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import jiwer

NUM_BINS = 10


@dataclass(frozen=True)
class Bin:
    """The words of which the confidence lies between two edges."""

    low: float
    high: float
    num_words: int
    confidence: float  # mean, a fraction
    accuracy: float  # share that stands in the reference, a fraction


@dataclass(frozen=True)
class Reliability:
    bins: list[Bin]  # those that hold words
    num_words: int
    expected_calibration_error: float  # a fraction
    num_left_out: int  # lines whose words do not spell their hypothesis

    def as_lines(self) -> list[str]:
        """A table to read."""
        error = f"expected calibration error {self.expected_calibration_error:.3f}"
        lines = [f"confidence of {self.num_words:,} words: {error}", "  confidence     words   mean  accuracy"]
        for row in self.bins:
            edges = f"{row.low:.1f} to {row.high:.1f}"
            lines.append(f"  {edges:10}  {row.num_words:>8,}  {row.confidence:5.3f}  {row.accuracy:8.3f}")
        note = f"  {self.num_left_out:,} lines are not in it: their words do not spell the hypothesis"
        return lines + [note] * bool(self.num_left_out)


def reliability(
    lines: Sequence[Sequence[dict] | None],
    alignments: Sequence["jiwer.WordOutput"],
    tokens_of: Callable[[str], list[str]],
) -> Reliability:
    """The table of the words of all lines; a line without any is None.

    `tokens_of` normalises a word and cuts it into the tokens of the alignments. A word is right if all of its tokens
    are; one without any, punctuation that the normaliser takes away, does not count.
    """
    confidences, is_right, num_left_out = [], [], 0
    for words, alignment in zip(lines, alignments, strict=True):
        if words is None:
            continue
        tokens = [tokens_of(word["word"]) for word in words]
        if sum(tokens, []) != list(alignment.hypotheses[0]):
            num_left_out += 1
            continue
        right = set()  # positions of the hypothesis that stand in the reference
        for chunk in alignment.alignments[0]:
            if chunk.type == "equal":
                right.update(range(chunk.hyp_start_idx, chunk.hyp_end_idx))
        start = 0
        for word, pieces in zip(words, tokens, strict=True):
            if pieces:
                confidences.append(word["confidence"])
                is_right.append(right.issuperset(range(start, start + len(pieces))))
            start += len(pieces)
    return table(np.array(confidences), np.array(is_right), num_left_out)


def table(confidences: np.ndarray, is_right: np.ndarray, num_left_out: int = 0) -> Reliability:
    """The bins of words, whose confidences (W,) lie between 0 and 1; a bin has its upper edge only if that is 1."""
    numbers = np.minimum((confidences * NUM_BINS).astype(int), NUM_BINS - 1)  # bin of each word
    bins = []
    for number in np.unique(numbers).tolist():
        inside, low, high = numbers == number, number / NUM_BINS, (number + 1) / NUM_BINS
        confidence, accuracy = float(confidences[inside].mean()), float(is_right[inside].mean())
        bins.append(Bin(low, high, int(inside.sum()), confidence, accuracy))
    error = sum(row.num_words * abs(row.confidence - row.accuracy) for row in bins) / max(len(confidences), 1)
    return Reliability(bins, len(confidences), error, num_left_out)
