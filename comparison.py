"""Whether one system is better than another on the same lines: `score.py --compare a.txt b.txt`.

The p-value is that of approximate randomisation: if the systems were equally good, swapping their hypotheses of a line
would change nothing, so that differences as large as the one seen would be common among random swaps. Noreen 1989,
"Computer-intensive methods for testing hypotheses"; Riezler and Maxwell 2005, "On some pitfalls in automatic evaluation
and significance testing for MT" (ACL workshop, W05-0908). The interval is that of the paired bootstrap: Bisani and Ney
2004 (ICASSP).
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from intervals import LEVEL, Interval, middle, resampled_sums, sums_of_units


@dataclass(frozen=True)
class PairedTest:
    """Of the second system with the first."""

    difference: float  # rate of the second less that of the first, a fraction; below 0 = the second is better
    interval: Interval  # of the difference
    p_value: float  # two-sided: how often random swaps differ as much

    def __str__(self) -> str:
        """In per cent."""
        return f"difference {100 * self.difference:+.2f}, {LEVEL} % interval {self.interval}, p = {self.p_value:.4f}"


@dataclass(frozen=True)
class Differences:
    """Line by line."""

    num_better: int  # lines in which the second system has fewer errors
    num_worse: int
    largest: list[int]  # indices of the lines that differ, those with the most errors between them first


def paired_test(
    first: Sequence[tuple], second: Sequence[tuple], num_resamples: int, units: Sequence[Hashable] | None = None
) -> PairedTest:
    """The test of two systems, whose lines are score.Counts of the same references; not all of these may be empty.

    `units` names the unit of each line that is drawn and swapped, a speaker say; without, each line is one.
    """
    lengths = np.array([line[-1] for line in first])
    sums = sums_of_units(np.stack([gains(first, second), lengths], axis=1), units)
    drawn_gains, drawn_lengths = resampled_sums(sums, num_resamples).T  # (num_resamples,) each
    is_rate = drawn_lengths > 0  # among a handful of lines, all that are drawn may have empty references
    interval = middle(drawn_gains[is_rate] / drawn_lengths[is_rate])
    return PairedTest(float(sums[:, 0].sum() / lengths.sum()), interval, p_value(sums[:, 0], num_resamples))


def differences(first: Sequence[tuple], second: Sequence[tuple]) -> Differences:
    """Which lines differ in their errors."""
    gain = gains(first, second)
    largest = [int(index) for index in np.argsort(-abs(gain), kind="stable") if gain[index]]
    return Differences(int((gain < 0).sum()), int((gain > 0).sum()), largest)


def gains(first: Sequence[tuple], second: Sequence[tuple]) -> np.ndarray:
    """Errors of the second system less those of the first: (lines,); below 0 = the second is better."""
    errors = [[sum(line[:-1]) for line in lines] for lines in (first, second)]
    return np.array(errors[1]) - np.array(errors[0])


def p_value(gain: np.ndarray, num_resamples: int) -> float:
    """How often |sum| is as large as it is, or larger, when each gain has a random sign; never 0."""
    generator, n = np.random.default_rng(0), len(gain)
    signs = (generator.integers(0, 2, n) * 2 - 1 for _ in range(num_resamples))  # -1 = swapped
    sums = np.array([swap @ gain for swap in signs])
    return (1 + int((abs(sums) >= abs(gain.sum())).sum())) / (1 + num_resamples)
