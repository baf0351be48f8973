"""Which words stand most often for which: `score.py --confusions 20`."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

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
    counter: Counter = Counter()
    for alignment in alignments:
        reference, hypothesis = alignment.references[0], alignment.hypotheses[0]
        for chunk in alignment.alignments[0]:
            if chunk.type == "equal":
                continue
            spoken = reference[chunk.ref_start_idx : chunk.ref_end_idx]
            written = hypothesis[chunk.hyp_start_idx : chunk.hyp_end_idx]
            length = max(len(spoken), len(written))  # one of them is empty, or both are of a length
            counter.update(zip(spoken or [""] * length, written or [""] * length, strict=True))
    return [Confusion(*pair, count) for pair, count in counter.most_common(most)]
