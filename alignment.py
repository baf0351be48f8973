"""A line's alignment as columns: which word of the reference stands over which of the hypothesis."""

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import jiwer


class Column(NamedTuple):
    kind: str  # equal, substitute, delete or insert
    reference: str  # "" = inserted
    hypothesis: str  # "" = deleted


def columns_of(alignment: "jiwer.WordOutput") -> list[Column]:
    """The columns of a line, in the tokens of its metric."""
    reference, hypothesis, columns = alignment.references[0], alignment.hypotheses[0], []
    for chunk in alignment.alignments[0]:
        upper = reference[chunk.ref_start_idx : chunk.ref_end_idx]
        lower = hypothesis[chunk.hyp_start_idx : chunk.hyp_end_idx]
        empty = [""] * max(len(upper), len(lower))  # one of them is empty, or both are of a length
        columns += [Column(chunk.type, *pair) for pair in zip(upper or empty, lower or empty, strict=True)]
    return columns
