"""How sure the model is of what it wrote: --confidence, and the log-probabilities of --nbest.

All numbers come from one more pass over prompt, speech and the finished transcript, as in training. So they are of the
model's own distribution, before penalties, temperature and the length penalty, no two beams can be mixed up, and no
step of the search keeps its logits: 16 clips, 4 beams, 200 tokens and a vocabulary of 152,000 would be 7.8 GB.

log_probability  of a transcript: the sum over its tokens and its end (no end where it was cut off).
confidence       of a line: the geometric mean of these tokens' probabilities, exp(log_probability / tokens), as
                 Whisper's avg_logprob has it (Radford et al. 2022, arXiv:2212.04356, section 4.5): long lines compare
                 with short ones.
confidence       of a word: the product of the probabilities of the tokens that hold a part of it. By the chain rule
                 that is the model's probability of the word after what stands before it; the minimum over its tokens
                 would be no probability of anything. Subword units are combined so or by minimum or mean in Laptev and
                 Ginsburg 2022, arXiv:2212.08703. In Chinese, Japanese and Thai each character counts as a word.

An LLM's probabilities are often too high (Guo et al. 2017, arXiv:1706.04599): as thresholds they want a look at data.
"""

import math
import re
from collections.abc import Callable
from itertools import compress, pairwise
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from dataset import IGNORE, pad_left
from hallucination import UNSPACED
from manifest import DecodingOptions

WORD = re.compile(rf"\s*([{UNSPACED}]|[^\s{UNSPACED}]+)")  # with the space before it


def scores(
    options: DecodingOptions,
    ids: Tensor,
    lengths: list[int],
    limits: list[int],
    tokenizer,
    forward: Callable,
    inputs: dict[str, Tensor],
) -> list[dict[str, Any]]:
    """Further fields of the hypotheses of a batch, as options ask for them.

    `ids` (B * nbest, new) are what generate returns, `lengths` (B * nbest) their tokens before the end, `limits` (B)
    the tokens after which a clip is cut off. `forward` is that of the model, `inputs` are those of generate.
    """
    nbest, ranks = options.nbest, []  # ranks: of the best of all clips, the second best ..., what is known of them
    for rank in range(nbest):
        rows = list(zip(ids[rank::nbest].tolist(), lengths[rank::nbest], limits, strict=True))
        answers = [row[: min(length + 1, limit)] for row, length, limit in rows]  # with the end, where there is one
        log_probs = token_log_probabilities(answers, forward, inputs["input_ids"], inputs["attention_mask"])
        ranks.append([(row[:length], probs) for (row, length, _), probs in zip(rows, log_probs, strict=True)])
    fields = []
    for (best_ids, best_probs), *others in zip(*ranks, strict=True):  # of a clip
        fields.append({"log_probability": round(sum(best_probs), 4)})
        if options.confidence:
            confidence = math.exp(sum(best_probs) / len(best_probs))
            words = words_with_confidence(best_ids, best_probs[: len(best_ids)], tokenizer)
            fields[-1] |= {"confidence": round(confidence, 4), "words": words}
        if nbest > 1:
            texts = tokenizer.batch_decode([row for row, _ in others], skip_special_tokens=True)
            sums = [round(sum(probs), 4) for _, probs in others]
            pairs = [(" ".join(text.split()), total) for text, total in zip(texts, sums, strict=True)]
            fields[-1]["alternatives"] = [{"text": text, "log_probability": total} for text, total in pairs]
    return fields


def token_log_probabilities(
    answers: list[list[int]], forward: Callable, input_ids: Tensor, attention_mask: Tensor
) -> list[list[float]]:
    """Log-probability of each token of an answer to each prompt (B, L), after all that stands before it."""
    prompts = [row[mask.bool()].tolist() for row, mask in zip(input_ids, attention_mask, strict=True)]
    rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    batch = pad_left(rows, 0), pad_left([[1] * len(row) for row in rows], 0), pad_left(answers, IGNORE)
    ids, mask, labels = (tensor.to(input_ids.device) for tensor in batch)  # (B, L + K) twice, (B, K)
    logits = forward(input_ids=ids, attention_mask=mask, labels=labels).logits  # (B, K, V)
    log_probs = -F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")  # (B, K), on the right edge
    return [row[-len(answer) :].tolist() for row, answer in zip(log_probs, answers, strict=True)]


def words_with_confidence(ids: list[int], log_probs: list[float], tokenizer) -> list[dict[str, Any]]:
    """[{"word": "hello", "confidence": 0.97}, ...] of a transcript, from its tokens and their log-probabilities.

    A token counts for the words in which its characters stand, a space for the word behind it. So the product of all
    words' confidences and of the end's probability is that of the line, unless a token has parts of two words.
    """
    starts = [ids[:count] for count in range(len(ids) + 1)]
    starts = tokenizer.batch_decode(starts, skip_special_tokens=True)  # the text after 0, 1, 2 ... tokens
    text = starts[-1]
    spans = []  # of each token, in characters of the text
    for before, after in pairwise(starts):
        # The last token may hold a part of a character alone, which is decoded to something else than that character.
        has_part = not text.startswith(after)
        spans.append((num_common(before, text), num_common(after, text) + has_part))
    words = []
    for match in WORD.finditer(text):
        is_part = [start < match.end() and match.start() < end for start, end in spans]
        confidence = math.exp(sum(compress(log_probs, is_part)))
        words.append({"word": match.group(1), "confidence": round(confidence, 4)})
    return words


def num_common(start: str, text: str) -> int:
    """How many characters two texts have in common before they differ."""
    return next((n for n, (a, b) in enumerate(zip(start, text, strict=False)) if a != b), min(len(start), len(text)))
