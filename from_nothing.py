"""Text from nothing: what is written for clips of silence, noise and music, whose references are empty.

No error rate shows it, for there is no word to divide by: words a minute of such audio do.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hallucination import TOKEN, plain_text


@dataclass(frozen=True)
class FromNothing:
    """Words (characters in Chinese, Japanese and Thai) that were written where nobody spoke."""

    num_clips: int  # with an empty reference
    num_with_text: int  # of them
    num_words: int
    seconds: float  # of audio; NaN where that of a clip is not known

    @property
    def words_per_minute(self) -> float:
        """NaN where the seconds of a clip are not known, or there are none."""
        return 60 * self.num_words / self.seconds if self.seconds else math.nan

    def __str__(self) -> str:
        clips = f"{self.num_words:,} words in {self.num_with_text:,} of {self.num_clips:,} clips without speech"
        return f"text from nothing: {self.words_per_minute:.2f} words a minute ({clips}, {self.seconds:,.1f} s)"


def text_from_nothing(
    references: Sequence[str], hypotheses: Sequence[str], durations: Sequence[float | None]
) -> FromNothing | None:
    """What was written for the clips with an empty reference; None if there are none. `durations` are in seconds."""
    clips = [
        (len(TOKEN.findall(plain_text(hypothesis))), math.nan if seconds is None else seconds)
        for reference, hypothesis, seconds in zip(references, hypotheses, durations, strict=True)
        if not reference.strip()
    ]
    if not clips:
        return None
    num_words, seconds = zip(*clips, strict=True)
    return FromNothing(len(clips), sum(map(bool, num_words)), sum(num_words), sum(seconds))
