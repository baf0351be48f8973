"""Confidence intervals of error rates, by the bootstrap over utterances or speakers.

Bisani and Ney 2004, "Bootstrap estimates for confidence intervals in ASR performance evaluation" (ICASSP). Words of one
utterance are wrong together, and so are utterances of one speaker: whole utterances, or whole speakers, are drawn.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 95  # per cent of resampled corpora whose rate lies within the interval


@dataclass(frozen=True)
class Interval:
    """Of a rate, or of a difference of two: fractions."""

    low: float
    high: float

    def __str__(self) -> str:
        """`7.21 to 8.05`, in per cent."""
        return f"{100 * self.low:.2f} to {100 * self.high:.2f}"


def rate_interval(
    lines: Sequence[tuple], num_resamples: int, units: Sequence[Hashable] | None = None
) -> Interval | None:
    """The interval of the error rate of lines, which are score.Counts: the last of each is the reference's length.

    `units` names the unit of each line that is drawn, a speaker say; without, each line is one. The draws have a fixed
    seed: the same lines give the same interval. None with fewer than two units, or nothing to draw.
    """
    counts = np.array([(sum(line[:-1]), line[-1]) for line in lines]).reshape(-1, 2)  # errors, reference length
    sums = sums_of_units(counts, units)
    if num_resamples == 0 or len(sums) < 2 or not sums[:, 1].any():
        return None
    errors, lengths = resampled_sums(sums, num_resamples).T  # (num_resamples,) each
    return middle(errors[lengths > 0] / lengths[lengths > 0])


def sums_of_units(rows: np.ndarray, units: Sequence[Hashable] | None) -> np.ndarray:
    """Rows of the same unit added up: (lines, K) -> (units, K), in the order in which they appear."""
    if units is None:
        return rows
    numbers = {unit: number for number, unit in enumerate(dict.fromkeys(units))}
    sums = np.zeros((len(numbers), rows.shape[1]), rows.dtype)
    np.add.at(sums, [numbers[unit] for unit in units], rows)
    return sums


def resampled_sums(rows: np.ndarray, num_resamples: int) -> np.ndarray:
    """Sums over as many rows as there are, drawn with replacement: (n, K) -> (num_resamples, K)."""
    generator, n = np.random.default_rng(0), len(rows)
    rows = rows.astype(float)  # integers below 2 ** 53 stay exact, and the product is quicker
    draws = (np.bincount(generator.integers(n, size=n), minlength=n) for _ in range(num_resamples))  # times of each row
    return np.stack([draw @ rows for draw in draws])


def middle(values: np.ndarray) -> Interval:
    """What LEVEL per cent of the values lie in; as many lie below it as above."""
    return Interval(*np.percentile(values, [50 - LEVEL / 2, 50 + LEVEL / 2]).tolist())
