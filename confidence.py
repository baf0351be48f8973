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
from itertools import compress, pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dataset import IGNORE, pad_left
from hallucination import TOKEN
from manifest import DecodingOptions

if TYPE_CHECKING:
    from model import SpeechLLM

WORD = re.compile(rf"\s*({TOKEN.pattern})")  # with the space before it


@torch.no_grad()
def scores(
    model: "SpeechLLM",
    options: DecodingOptions,
    inputs: dict[str, Tensor],
    ids: Tensor,
    lengths: list[int],
    limits: list[int],
) -> list[dict[str, Any]]:
    """Further fields of the hypotheses of a batch, as options ask for them.

    `inputs` are those of generate, with speech_embeds, `ids` (B * nbest, new) what it returns, the best of each clip
    first, `lengths` (B * nbest) their tokens before the end, `limits` (B) the tokens after which a clip is cut off.
    """
    prompts = [
        row[mask.bool()].tolist() for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    ]
    nbest = options.nbest
    limits = [limit for limit in limits for _ in range(nbest)]  # (B * nbest), as lengths
    rows = list(zip(ids.tolist(), lengths, limits, strict=True))
    answers = [row[: min(length + 1, limit)] for row, length, limit in rows]  # with the end, where there is one
    texts = model.tokenizer.batch_decode([row[:length] for row, length, _ in rows], skip_special_tokens=True)
    log_probs = [[]] * len(rows)  # of each token
    for rank in range(nbest):  # the best of all clips together, then the second best ...
        log_probs[rank::nbest] = token_log_probabilities(model, prompts, answers[rank::nbest], inputs["speech_embeds"])
    totals = [round(sum(probs), 4) for probs in log_probs]

    fields = []
    for best in range(0, len(rows), nbest):
        fields.append({"log_probability": totals[best]})
        if options.confidence:
            length, probs = lengths[best], log_probs[best]
            fields[-1]["confidence"] = round(math.exp(sum(probs) / len(probs)), 4)
            fields[-1]["words"] = words_with_confidence(answers[best][:length], probs[:length], model.tokenizer)
        if nbest > 1:
            fields[-1]["alternatives"] = [
                {"text": " ".join(texts[other].split()), "log_probability": totals[other]}
                for other in range(best + 1, best + nbest)
            ]
    return fields


def token_log_probabilities(
    model: "SpeechLLM", prompts: list[list[int]], answers: list[list[int]], speech_embeds: Tensor
) -> list[list[float]]:
    """Log-probability of each token of the answers to as many prompts, after all that stands before it."""
    rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    batch = pad_left(rows, 0), pad_left([[1] * len(row) for row in rows], 0), pad_left(answers, IGNORE)
    ids, mask, labels = (tensor.to(speech_embeds.device) for tensor in batch)  # (B, L) twice, (B, K)
    logits = model(input_ids=ids, attention_mask=mask, labels=labels, speech_embeds=speech_embeds).logits  # (B, K, V)
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
