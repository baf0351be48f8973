"""Which words stand most often for which: `score.py --confusions 20`."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from alignment import columns_of

if TYPE_CHECKING:
    import jiwer


@dataclass(frozen=True)
class Confusion:
    """A word of the reference that was recognised as another; "" = it was inserted, or deleted."""

    reference: str
    hypothesis: str
    count: int

    def __str__(self) -> str:
        return f"{self.count:,} x {self.reference or '(nothing)'} -> {self.hypothesis or '(nothing)'}"


def confusions(alignments: Sequence["jiwer.WordOutput"], most: int) -> list[Confusion]:
    """The commonest errors, at most `most` of them, word by word (jiwer's own count joins neighbours to phrases)."""
    columns = (column for alignment in alignments for column in columns_of(alignment))
    counter = Counter((column.reference, column.hypothesis) for column in columns if column.kind != "equal")
    return [Confusion(*pair, count) for pair, count in counter.most_common(most)]
