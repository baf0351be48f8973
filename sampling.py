"""Probabilities changed before a token is chosen: --no_repeat_ngram_size, --repetition_penalty, --do_sample.

All that is counted as repeated are tokens of the transcript; prompt and speech are none. In a beam search transformers
applies the repetition penalty to log-probabilities, where it weighs less than on the logits of a greedy search.

A sample is the same whatever stands beside it in the batch, and for any number of processes: each draw of a clip has
its own random numbers, one a token, which follow from the seed, the number of the line in the manifest and the number
of the draw. As in any search, rounding in another batch can turn a near tie.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from manifest import DecodingOptions


def keywords(options: DecodingOptions, indices: Sequence[int]) -> dict[str, Any]:
    """What transformers' generate is told for clips of these indices."""
    # By its own keywords generate would skip as many tokens of a transcript as its prompt has padding (5.23), so that
    # the penalty of a clip would depend on its batch.
    processors = []
    if options.no_repeat_ngram_size:
        processors.append(NoRepeatNGramLogitsProcessor(options.no_repeat_ngram_size))
    if options.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(options.repetition_penalty))
    if not options.do_sample:
        return {"logits_processor": processors}
    if options.temperature != 1:
        processors.append(TemperatureLogitsWarper(options.temperature))
    if options.top_p < 1:
        processors.append(TopPLogitsWarper(options.top_p))
    randoms = [
        np.random.default_rng([options.seed, index, draw]).random(options.max_new_tokens)
        for index in indices
        for draw in range(options.nbest)
    ]
    processors.append(Draw(torch.tensor(np.array(randoms), dtype=torch.float32)))
    return {"logits_processor": processors, "do_sample": True, "top_k": 0, "num_beams": 1}


class Draw(LogitsProcessor):
    """Leaves each row the one token that its random number stands for, so that generate can choose no other."""

    def __init__(self, randoms: Tensor):
        self.randoms = randoms  # (rows, max_new_tokens), 0 to below 1

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits (rows, V) -> 0 for the token that is drawn and -inf for all others, by inverting the distribution."""
        step = input_ids.shape[1]  # tokens so far: a prompt of embeddings has none
        sums = scores.float().softmax(dim=1).cumsum(dim=1)  # (rows, V)
        random = self.randoms[:, step, None].to(sums.device) * sums[:, -1:]  # the last sum is 1 but for rounding
        likely = (scores > -torch.inf).long()  # rounding must not lead to a token that top_p took away
        last = likely.shape[1] - 1 - likely.flip(1).argmax(dim=1, keepdim=True)  # (rows, 1) the last that is left
        token = torch.searchsorted(sums, random, right=True).minimum(last)  # (rows, 1)
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)
