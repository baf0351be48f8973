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

from intervals import Interval, middle, resampled_sums, sums_of_units


@dataclass(frozen=True)
class Comparison:
    """Of system b with system a, on the same lines."""

    difference: float  # rate of b less rate of a, a fraction; below 0 = b is better
    interval: Interval  # of the difference
    p_value: float  # two-sided: how often random swaps differ as much
    num_better: int  # lines in which b has fewer errors
    num_worse: int
    num_equal: int
    largest: list[int]  # indices of the lines that differ, those with the most errors between them first

    def __str__(self) -> str:
        return (
            f"difference {100 * self.difference:+.2f} (95 % interval {self.interval}), p = {self.p_value:.4f}: "
            f"the second is better in {self.num_better:,} lines, worse in {self.num_worse:,}, "
            f"equal in {self.num_equal:,}"
        )


def compare(
    a: Sequence[tuple], b: Sequence[tuple], num_resamples: int, units: Sequence[Hashable] | None = None
) -> Comparison | None:
    """The paired test of two systems; `a` and `b` are score.Counts of the same lines.

    `units` names the unit of each line that is drawn and swapped, a speaker say. None where all references are empty.
    """
    errors_a, errors_b = (np.array([sum(line[:-1]) for line in lines]) for lines in (a, b))
    gains = errors_b - errors_a  # below 0 = b has fewer errors
    lengths = np.array([line[-1] for line in a])
    if not lengths.any():
        return None
    sums = sums_of_units(np.stack([gains, lengths], axis=1), units)
    drawn_gains, drawn_lengths = resampled_sums(sums, num_resamples).T  # (num_resamples,) each
    whole = drawn_lengths > 0  # a handful of lines with empty references can draw nothing else
    return Comparison(
        difference=gains.sum() / lengths.sum(),
        interval=middle(drawn_gains[whole] / drawn_lengths[whole]),
        p_value=p_value(sums[:, 0], num_resamples),
        num_better=int((gains < 0).sum()),
        num_worse=int((gains > 0).sum()),
        num_equal=int((gains == 0).sum()),
        largest=[int(index) for index in np.argsort(-abs(gains), kind="stable") if gains[index]],
    )


def p_value(differences: np.ndarray, num_resamples: int) -> float:
    """How often |sum| is as large as it is, or larger, when each difference has a random sign; never 0."""
    generator, n = np.random.default_rng(0), len(differences)
    signs = (generator.integers(0, 2, n) * 2 - 1 for _ in range(num_resamples))  # -1 = swapped
    sums = np.array([swap @ differences for swap in signs])
    return (1 + int((abs(sums) >= abs(differences.sum())).sum())) / (1 + num_resamples)
