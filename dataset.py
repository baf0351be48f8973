"""Examples and batches: records -> audio -> features and token ids -> one padded batch.

records = Manifest("train.jsonl")
dataset = SpeechDataset(records, tokenizer, speech_lengths=lambda frames: frames // 10, num_mels=80)
batch = collate([dataset[0], dataset[1]])  # a dict of left-padded tensors, what SpeechLLM.forward takes
"""

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from jinja2 import TemplateError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from manifest import SAMPLE_RATE, BadUtterance, InputError, Manifest, clips, reference, seconds_of

AUDIO = "<audio>"  # in a prompt: the speech goes here
SPEECH = -1  # in input_ids: a speech embedding goes here; no vocabulary has this id
IGNORE = -100  # in labels: not trained on
WINDOW = 30 * SAMPLE_RATE  # samples; Whisper's positions end at 30 s
PROMPT = f"{AUDIO}\nTranscribe the speech"


def load_audio(audio: str | Path | np.ndarray, start: float = 0, end: float | None = None) -> np.ndarray:
    """Samples (S,), float32, mono, 16 kHz, of a wav, flac, ogg or mp3 file (or of an array that is that already).

    Channels are averaged; other rates are resampled by soxr. `start` and `end` are seconds. Raises BadUtterance.
    """
    import soundfile
    import soxr

    samples = np.asarray([] if isinstance(audio, (str, Path)) else audio, dtype=np.float32)
    if isinstance(audio, (str, Path)):
        try:
            with soundfile.SoundFile(audio) as file:
                rate, first, last = file.samplerate, round(start * file.samplerate), file.frames
                last = last if end is None else round(end * rate)
                if not 0 <= first < max(last, 1) <= file.frames + 0.1 * rate:  # rounded ends may lie a little outside
                    raise BadUtterance(f"{audio}: segment {start} to {end} s of {file.frames / rate:.2f} s")
                file.seek(first)
                samples = file.read(last - first, dtype="float32", always_2d=True).mean(axis=1)
        except (OSError, soundfile.SoundFileError) as error:
            found = f"unreadable ({error})" if Path(audio).is_file() else "no such file"
            raise BadUtterance(f"{audio}: {found}; wanted a wav, flac, ogg or mp3 file") from None
        samples = soxr.resample(samples, rate, SAMPLE_RATE) if rate != SAMPLE_RATE else samples
    name = audio if isinstance(audio, (str, Path)) else "audio array"
    if not isinstance(audio, (str, Path)) and not np.issubdtype(np.asarray(audio).dtype, np.floating):
        raise BadUtterance(f"{name}: samples of type {np.asarray(audio).dtype}; wanted floats between -1 and 1")
    if samples.ndim != 1 or not samples.size:
        raise BadUtterance(f"{name}: the audio is empty, or of shape {samples.shape} where (S,) is wanted")
    if not np.isfinite(samples).all():
        raise BadUtterance(f"{name}: the audio holds NaN or infinite samples")
    return samples


def log_mel(samples: np.ndarray, num_mels: int, pad_to_30s: bool = False) -> list[Tensor]:
    """Whisper's log-mel features of a clip, one (F, M) for each window: clips over 30 s are cut into equal windows."""
    import whisper

    windows = np.array_split(samples, -(-len(samples) // WINDOW))
    windows = [whisper.pad_or_trim(window) for window in windows] if pad_to_30s else windows
    too_short = torch.zeros(0, num_mels)  # 200 samples are half of Whisper's first frame, which is mirrored at the edge
    return [whisper.log_mel_spectrogram(w, num_mels).T if len(w) > 200 else too_short for w in windows]


@lru_cache(maxsize=64)
def render_prompt(tokenizer, conversation: str) -> tuple[list[list[int]], int]:
    """Token ids of the pieces of a conversation (JSON) around each <audio>, up to the answer; and its end token's id.

    The chat template is rendered as text, split at <audio> and tokenised piece by piece, so the vocabulary needs no
    new token. The end token is what the template puts after an answer, else the tokenizer's eos.
    """

    def render(messages: list[dict], **options) -> str:  # thinking models are told not to think, LLaMA 3 a fixed date
        options |= {"enable_thinking": False, "date_string": "26 Jul 2024"}
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except TemplateError as error:  # Mistral and Gemma have no system prompt, for one
            raise BadUtterance(f"the chat template refuses the conversation ({error})") from None

    def tokenize(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    if tokenizer.chat_template is None:
        raise InputError(f"{tokenizer.name_or_path}: no chat template; wanted an instruction-tuned LLM's tokenizer")
    messages = json.loads(conversation)
    pieces = [tokenize(text) for text in render(messages, add_generation_prompt=True).split(AUDIO)]
    answer = "Seven."
    after = tokenize(render([*messages, {"role": "assistant", "content": answer}]).rpartition(answer)[2])
    end_id = next((token for token in after if token in tokenizer.added_tokens_decoder), tokenizer.eos_token_id)
    if end_id is None:
        raise InputError(f"{tokenizer.name_or_path}: neither the chat template nor the tokenizer has an end token")
    return pieces, end_id


@dataclass(eq=False)
class SpeechDataset(torch.utils.data.Dataset):
    """Examples {index, prompt_ids, target_ids, features, bad} of records, ready for `collate`.

    `on_bad`: "error" raises BadUtterance; "skip" leaves out what is known to be bad beforehand, such as a missing or
    overlong file (see `bad`, index -> reason); "keep" keeps every line. What turns out bad only when it is read
    becomes, unless that is an error, a silent moment without a transcript, with the reason in the example's `bad`.
    """

    records: Sequence[dict]
    tokenizer: Callable
    speech_lengths: Callable[[int], int]  # feature frames -> the embeddings that the model makes of them
    num_mels: int
    prompt: str = PROMPT
    pad_to_30s: bool = False
    max_length: int | None = None  # LLM positions of prompt, speech and transcript together
    max_seconds: float | None = None
    on_bad: str = "error"

    def __post_init__(self):
        count = len(self.records)
        self.bad, self.durations = {}, np.zeros(count)  # seconds
        with ThreadPoolExecutor(16) as pool:  # headers wait for the disk, not for the processor
            list(pool.map(self.measure, np.array_split(np.arange(count), 64)))
        if self.bad and self.on_bad == "error":
            more = f" (and {len(self.bad) - 1} lines more)" if len(self.bad) > 1 else ""
            raise BadUtterance(f"{self.bad[min(self.bad)]}{more}")
        if self.on_bad == "skip" and len(self.bad) == count:
            raise InputError(f"every utterance is bad; the first: {self.bad[0]}")
        self.indices = np.array([i for i in range(count) if self.on_bad != "skip" or i not in self.bad])

    def measure(self, indices: np.ndarray) -> None:
        """Note the seconds of records, from headers where their lines do not state them, and in `bad` what is wrong."""
        for index in indices.tolist():
            record = self.records[index]
            stated = self.records.durations[index] if isinstance(self.records, Manifest) else np.nan
            try:
                self.durations[index] = seconds_of(record, stated)
                self.check_seconds(self.durations[index])
            except BadUtterance as error:
                self.bad[index] = f"{record.get('where', f'record {index}')}: {error}"

    def check_seconds(self, seconds: float) -> None:
        if self.max_seconds and seconds > self.max_seconds + 0.01:
            raise BadUtterance(f"{seconds:.2f} s of audio, over --max_seconds {self.max_seconds:g}")

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> dict:
        index = int(self.indices[position])
        record = self.records[index]
        try:
            return {"index": index, "bad": None, **self.build(record)}
        except BadUtterance as error:
            reason = f"{record.get('where', f'record {index}')}: {error}"
            if self.on_bad == "error":
                raise BadUtterance(reason) from None
            silence = {"wav": np.zeros(SAMPLE_RATE // 5, np.float32)}
            return {"index": index, "bad": reason, **self.build(silence), "target_ids": []}

    def build(self, record: dict) -> dict:
        """Features and token ids of one record; BadUtterance if its audio or its length does not do."""
        samples = [load_audio(*clip) for clip in clips(record)]
        self.check_seconds(sum(map(len, samples)) / SAMPLE_RATE)
        features = [log_mel(s, self.num_mels, self.pad_to_30s) for s in samples]
        counts = [sum(self.speech_lengths(len(window)) for window in clip) for clip in features]
        if 0 in counts:
            seconds = len(samples[counts.index(0)]) / SAMPLE_RATE
            raise BadUtterance(f"{seconds:.3f} s of audio are too short for a single speech embedding")

        messages = record.get("messages", [{"role": "user", "content": record.get("prompt", self.prompt)}])
        transcript = reference(record)
        asked = messages[:-1] if "messages" in record and transcript is not None else messages
        asked = [{"role": turn["role"], "content": turn["content"]} for turn in asked]  # the same for other clips
        pieces, end_id = render_prompt(self.tokenizer, json.dumps(asked))
        if len(pieces) != len(counts) + 1:
            raise BadUtterance(f"{len(pieces) - 1} {AUDIO} in the prompt for {len(counts)} audio clips")
        prompt_ids = list(pieces[0])
        for count, piece in zip(counts, pieces[1:], strict=True):
            prompt_ids += [SPEECH] * count + piece
        target_ids = []
        if transcript is not None:
            target_ids = [*self.tokenizer(transcript, add_special_tokens=False).input_ids, end_id]
        if self.max_length is not None and len(prompt_ids) + len(target_ids) > self.max_length:
            parts = f"{len(prompt_ids)} positions of prompt and speech and {len(target_ids)} of transcript"
            raise BadUtterance(f"{parts} do not fit in {self.max_length} (--model_max_length, or the LLM's context)")
        windows = [window for clip in features for window in clip]
        return {"prompt_ids": prompt_ids, "target_ids": target_ids, "features": windows}


def collate(examples: list[dict], with_targets: bool = True) -> dict:
    """One batch: input_ids, attention_mask (B, L), labels (B, K), input_features (A, M, F), feature_lengths (A,).

    Ids are padded on the left, so transcripts end at the right edge, and labels cover the last K positions only:
    K = the longest transcript with its end token. Features are padded with zeros at their end. Without targets
    (for decoding) the ids end with the prompt. `index` and `bad` are lists, one entry an example.
    """

    def pad_left(rows: list[list[int]], value: int) -> Tensor:
        rows = [torch.tensor(row, dtype=torch.long) for row in rows]
        return pad_sequence(rows, batch_first=True, padding_value=value, padding_side="left")

    targets = [e["target_ids"] if with_targets else [] for e in examples]
    ids = [e["prompt_ids"] + target for e, target in zip(examples, targets, strict=True)]
    features = [window for e in examples for window in e["features"]]
    return {
        "input_ids": pad_left(ids, 0),
        "attention_mask": pad_left([[1] * len(row) for row in ids], 0),
        "labels": pad_left(targets, IGNORE),
        "input_features": pad_sequence(features, batch_first=True).transpose(1, 2),
        "feature_lengths": torch.tensor([len(window) for window in features]),
        "index": [e["index"] for e in examples],
        "bad": [e["bad"] for e in examples],
    }


class LengthSampler(torch.utils.data.Sampler):
    """Positions in a random order in which each run of `batch_size` has similar lengths; a new order every epoch.

    Shuffled positions are sorted by length within groups of 50 batches, and the batches shuffled again. The last batch
    is filled up with positions that come twice, so that any number of processes sees the same batches. The order
    depends on the seed and the epoch alone, so a resumed run sees what the first would have seen.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int, epoch: Callable[[], int] = lambda: 0):
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, epoch

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size) * self.batch_size

    def __iter__(self) -> Iterator[int]:
        random, size = np.random.default_rng([self.seed, self.epoch()]), self.batch_size
        order = np.resize(random.permutation(len(self.lengths)), len(self))
        groups = np.split(order, range(50 * size, len(order), 50 * size))
        order = np.concatenate([group[np.argsort(self.lengths[group], kind="stable")] for group in groups])
        return iter(random.permutation(order.reshape(-1, size)).ravel().tolist())
