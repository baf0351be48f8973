"""Records that are left out of the training data by rule: --min_seconds, --min_tokens, --max_tokens and others.

They are no bad audio: the user does not want them, so --on_bad_audio plays no part. A record whose length nobody states
is measured by the header of its file; one that cannot be read stays, so that --on_bad_audio finds it.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from transformers import AutoTokenizer

from dataset import known_durations
from errors import InputError, as_input_error
from manifest import Records, transcript_of
from mixture import Mixture, say
from sources import Subset

if TYPE_CHECKING:
    from model import ModelArguments

BLOCK = 10_000  # texts that are tokenised together


@dataclass(frozen=True)
class Limits:
    """0 = off. Raises InputError."""

    min_seconds: float = 0.0
    min_tokens: int = 0  # of the transcript, without its end token
    max_tokens: int = 0
    max_characters_per_second: float = 0.0  # of the transcript, without spaces

    def __post_init__(self):
        for name, limit in asdict(self).items():
            if not limit >= 0:  # nor NaN
                raise InputError(f"--{name} {limit}: wanted more than 0, or 0 = off")


RULES = ["none", *(field.name for field in fields(Limits))]


def keep(records: Records, limits: Sequence[float], config: "ModelArguments") -> tuple[Records, str]:
    """The records within the values of Limits, in tokens of the LLM; and what each rule left out, printed, too.

    Each source of a mixture keeps its weight. Raises InputError where nothing is left of a source.
    """
    limits, encode, llm = Limits(*limits), None, config.llm_model_name_or_path
    if limits.min_tokens or limits.max_tokens:
        with as_input_error(str(llm), "load the tokenizer", "a folder or Hub name of a causal LLM, with its tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(llm, revision=config.llm_revision, trust_remote_code=False)
        encode = partial(tokenizer, add_special_tokens=False, return_attention_mask=False)
    parts = records.parts if isinstance(records, Mixture) else [records]
    durations = [known_durations(part)[0] for part in parts]
    rules = [broken_rules(part, seconds, limits, encode) for part, seconds in zip(parts, durations, strict=True)]
    # The tokenizer has used its threads. It would warn of them in each data-loading process that is forked from here.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    subsets = []
    for part, rules_of_part, seconds in zip(parts, rules, durations, strict=True):
        kept = np.flatnonzero(rules_of_part == 0)
        if not len(kept):
            flags = " ".join(f"--{name} {limit:g}" for name, limit in asdict(limits).items() if limit)
            raise InputError(
                f"{part[0]['where']}: no record of this source ({len(part):,}) passes {flags}; loosen them"
            )
        subsets.append(Subset(part, kept, seconds[kept]))
    left_out = counts(limits, np.concatenate(rules), np.concatenate(durations))
    say(f"left out: {left_out}")
    if not isinstance(records, Mixture):
        return subsets[0], left_out
    mixture = Mixture(subsets, records.weights, records.names)
    say(f"of what is left: {mixture}")
    return mixture, left_out


def counts(limits: Limits, rules: np.ndarray, durations: np.ndarray) -> str:
    """`--min_seconds 0.5: 12 records, 0.00 hours; ...`, of the rule that each record breaks and its seconds."""
    texts = []
    for name, limit in asdict(limits).items():
        if limit:
            seconds = durations[rules == RULES.index(name)]
            texts.append(f"--{name} {limit:g}: {len(seconds):,} records, {np.nansum(seconds) / 3600:.2f} hours")
    return "; ".join(texts)


def broken_rules(records: Records, durations: np.ndarray, limits: Limits, encode: Callable | None) -> np.ndarray:
    """(len,) which of RULES a record breaks first; 0 = none. `encode` gives input_ids of a list of texts."""
    rules = np.where(durations < limits.min_seconds, RULES.index("min_seconds"), 0)  # NaN breaks none
    if not encode and not limits.max_characters_per_second:
        return rules  # the texts need not be read
    left = np.flatnonzero(rules == 0)
    for indices in np.split(left, range(BLOCK, len(left), BLOCK)):
        texts = [transcript_of(records[index]) for index in indices.tolist()]
        checks = {}
        if encode and texts:
            num_tokens = np.array([len(ids) for ids in encode(texts).input_ids])
            checks["min_tokens"] = num_tokens < limits.min_tokens
            checks["max_tokens"] = num_tokens > (limits.max_tokens or np.inf)
        if limits.max_characters_per_second:
            num_characters = np.array([len("".join(text.split())) for text in texts])
            checks["max_characters_per_second"] = num_characters > durations[indices] * limits.max_characters_per_second
        for name, is_broken in checks.items():
            rules[indices[is_broken & (rules[indices] == 0)]] = RULES.index(name)
    return rules
