"""Examples and batches: records -> audio -> features and token ids -> one padded batch.

dataset = model.make_dataset(Manifest("train.jsonl"))
batch = collate([dataset[0], dataset[1]])  # a dict of left-padded tensors, what SpeechLLM.forward takes
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from audio import check_seconds, load_audio, measure
from encoders import WINDOW
from manifest import AUDIO, SAMPLE_RATE, BadUtterance, InputError, clips, place, reference
from prompt import END, PROMPT, SPEECH, START, conversation, render_prompt

IGNORE = -100  # in labels: not trained on
SILENCE = 2 * SAMPLE_RATE  # samples that stand for a clip which cannot be read
SHORTEST = 400  # samples, 25 ms: a frame of a spectrogram, or of a convolutional feature extractor


@dataclass(eq=False)
class SpeechDataset(torch.utils.data.Dataset):
    """Examples {index, prompt_ids, target_ids, features, bad} of records, ready for `collate`.

    `on_bad`: "error" raises BadUtterance; "skip" leaves out what is known to be bad beforehand, such as a missing or
    overlong file (see `bad`, index -> reason); "keep" keeps every line. What turns out bad only when it is read
    becomes, unless that is an error, a silent moment without a transcript, with the reason in the example's `bad`.
    """

    records: Sequence[dict]
    tokenizer: Callable
    extract: Callable[[np.ndarray], Tensor]  # samples (S,) -> what the encoder takes: (F, M), or samples again
    speech_lengths: Sequence[int]  # [length of features] -> the embeddings that the model makes of them
    prompt: str = PROMPT
    system_prompt: str | None = None
    boundary_tokens: bool = False
    max_length: int | None = None  # LLM positions of prompt, speech and transcript together
    max_seconds: float | None = None
    on_bad: str = "error"
    with_targets: bool = True  # transcripts, to train on or to evaluate; decoding needs none

    def __post_init__(self):
        count = len(self.records)
        self.durations, self.bad = measure(self.records, self.max_seconds)  # seconds; index -> reason
        if self.bad and self.on_bad == "error":
            more = f" (and {len(self.bad) - 1} lines more)" if len(self.bad) > 1 else ""
            raise BadUtterance(f"{self.bad[min(self.bad)]}{more}")
        if self.on_bad == "skip" and len(self.bad) == count:
            raise InputError(f"every utterance is bad; the first: {self.bad[0]}")
        self.indices = np.array([i for i in range(count) if self.on_bad != "skip" or i not in self.bad])

    def check_length(self, example: dict) -> None:
        prompt, target = len(example["prompt_ids"]), len(example["target_ids"])
        if self.max_length is not None and prompt + target > self.max_length:
            parts = f"{prompt} positions of prompt and speech and {target} of transcript"
            raise BadUtterance(f"{parts} do not fit in {self.max_length} (--model_max_length, or the LLM's context)")

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> dict:
        index = int(self.indices[position])
        record = self.records[index]
        try:
            example = self.build(record)
            self.check_length(example)
            return {"index": index, "bad": None, **example}
        except BadUtterance as error:
            reason = f"{place(record, index)}: {error}"
            if self.on_bad == "error":
                raise BadUtterance(reason) from None
            silence = {"wav": np.zeros(SILENCE, np.float32)}
            return {"index": index, "bad": reason, **self.build(silence), "target_ids": []}

    def build(self, record: dict) -> dict:
        """Features and token ids of one record; BadUtterance if its audio or its length does not do."""
        samples = [load_audio(*clip) for clip in clips(record)]
        if not samples:
            raise BadUtterance(f"no audio in the conversation; wanted {AUDIO} in a turn, and its file in 'audio'")
        check_seconds(sum(map(len, samples)) / SAMPLE_RATE, self.max_seconds)
        features = [self.windows(clip) for clip in samples]
        counts = [int(sum(self.speech_lengths[len(window)] for window in clip)) for clip in features]
        if 0 in counts:
            seconds = len(samples[counts.index(0)]) / SAMPLE_RATE
            raise BadUtterance(f"{seconds:.3f} s of audio are too short for a single speech embedding")

        transcript = reference(record)
        messages = conversation(record.get("prompt", self.prompt), self.system_prompt)
        if "messages" in record:
            messages = record["messages"][: None if transcript is None else -1]
        asked = [{"role": turn["role"], "content": turn["content"]} for turn in messages]  # the same for other clips
        pieces, end_id = render_prompt(self.tokenizer, json.dumps(asked))
        if len(pieces) != len(counts) + 1:
            raise BadUtterance(f"{len(pieces) - 1} {AUDIO} in the prompt for {len(counts)} audio clips")
        prompt_ids = list(pieces[0])
        for count, piece in zip(counts, pieces[1:], strict=True):
            prompt_ids += speech_ids(count, self.boundary_tokens) + piece
        target_ids = []
        if transcript is not None and self.with_targets:
            target_ids = [*self.tokenizer(transcript, add_special_tokens=False).input_ids, end_id]
        return {"prompt_ids": prompt_ids, "target_ids": target_ids, "features": [w for clip in features for w in clip]}

    def windows(self, samples: np.ndarray) -> list[Tensor]:
        """Features of a clip; over 30 s, of its equal windows of at most 30 s."""
        windows = np.array_split(samples, -(-len(samples) // WINDOW))
        return [self.extract(window) if len(window) >= SHORTEST else torch.zeros(0) for window in windows]


def speech_ids(count: int, boundary_tokens: bool) -> list[int]:
    """Placeholders of a clip's speech embeddings in input_ids."""
    return [START, *[SPEECH] * count, END] if boundary_tokens else [SPEECH] * count


def pad_left(rows: list[list[int]], value: int) -> Tensor:
    rows = [torch.tensor(row, dtype=torch.long) for row in rows]
    return pad_sequence(rows, batch_first=True, padding_value=value, padding_side="left")


def collate(examples: list[dict], with_targets: bool = True) -> dict:
    """One batch: input_ids, attention_mask (B, L), labels (B, K), feature_lengths (A,), and the features.

    These are input_features (A, F, M), or input_values (A, S), padded with zeros at their end. Ids are padded on the
    left, so transcripts end at the right edge, and labels cover the last K positions only: K = the longest transcript
    with its end token. Without targets (for decoding) the ids end with the prompt. `index` and `bad` are lists, one
    entry an example.
    """
    targets = [e["target_ids"] if with_targets else [] for e in examples]
    ids = [e["prompt_ids"] + target for e, target in zip(examples, targets, strict=True)]
    features = [window for e in examples for window in e["features"]]
    return {
        "input_ids": pad_left(ids, 0),
        "attention_mask": pad_left([[1] * len(row) for row in ids], 0),
        "labels": pad_left(targets, IGNORE),
        "input_values" if features[0].ndim == 1 else "input_features": pad_sequence(features, batch_first=True),
        "feature_lengths": torch.tensor([len(window) for window in features]),
        "index": [e["index"] for e in examples],
        "bad": [e["bad"] for e in examples],
    }
