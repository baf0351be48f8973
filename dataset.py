"""From records to batches: audio -> samples -> features, prompt -> token ids, and the order in which they come.

    dataset = model.make_dataset(open_records("train.jsonl"))
    batch = collate([dataset[0], dataset[1]])  # a dict of left-padded tensors, what SpeechLLM.forward takes

Shapes: B batch, A audio windows in the batch, S samples, M mel bins, F feature frames, L tokens, K with labels.
"""

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch
from jinja2 import TemplateError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from errors import BadUtterance, InputError
from manifest import AUDIO, BOUNDARY, PROMPT, SAMPLE_RATE, SPEECH, Clip, Manifest, Records, clips_of, transcript_of

WINDOW = 30 * SAMPLE_RATE  # samples; longer clips are encoded in equal windows of at most so many
IGNORE = -100  # in labels: not trained on
SHORTEST = 400  # samples, 25 ms: the least that gives a frame of a spectrogram, or of a convolutional feature extractor
SILENCE = 2 * SAMPLE_RATE  # samples that stand for a clip which cannot be read
TOO_LONG = "{:.2f} s of audio, over --max_seconds {:g}"
PLAIN_TEMPLATE = (  # for LLMs that come without a chat template
    "{% for turn in messages %}{{ turn.role }}: {{ turn.content }}"
    "{{ eos_token if turn.role == 'assistant' }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def open_records(source: str | Path | list[str], needs_text: bool = True, **options) -> Records:
    """The records of a manifest, of KIND:PLACE (see sources.py), or of several (see mixture.py). Raises InputError.

    `options` are `may_weigh` of mixture.py, and fields of SourceOptions.
    """
    sources = source if isinstance(source, list) else [str(source)]
    if len(sources) == 1 and Path(sources[0]).exists() and options.keys() <= {"may_weigh"}:
        return Manifest(sources[0], needs_text)
    from mixture import open_sources  # an option

    return open_sources(sources, needs_text, **options)


# Audio


def load_audio(audio: str | Path | np.ndarray, start: float = 0.0, end: float | None = None) -> np.ndarray:
    """Samples (S,), float32, mono, 16 kHz, of a wav, flac, ogg or mp3 file (or of an array that is that already).

    Channels are averaged; other rates are resampled by soxr. `start` and `end` are seconds. Raises BadUtterance.
    """
    if isinstance(audio, str) or hasattr(audio, "open"):  # a path, or a file inside another: packed_audio.py
        audio = Path(audio) if isinstance(audio, str) else audio
        with open_audio(Clip(audio, start, end)) as file:
            rate, first = file.samplerate, round(start * file.samplerate)  # Hz, and a frame of the file
            last = file.frames if end is None else round(end * rate)  # one behind the last frame
            if not 0 <= first < max(last, 1) <= file.frames + 0.1 * rate:  # rounded ends may lie a little outside
                raise BadUtterance(f"{audio}: segment {start} to {end} s of {file.frames / rate:.2f} s")
            if first:  # some formats cannot seek
                file.seek(first)
            samples = file.read(last - first, dtype="float32", always_2d=True).mean(axis=1)  # (S, channels) -> (S,)
        samples = soxr.resample(samples, rate, SAMPLE_RATE) if rate != SAMPLE_RATE else samples
    else:
        samples, audio = np.asarray(audio), "audio array"
        if not np.issubdtype(samples.dtype, np.floating):
            raise BadUtterance(f"{audio}: samples of type {samples.dtype}; wanted floats between -1 and 1")
        last = len(samples) if end is None else round(end * SAMPLE_RATE)
        samples = samples[round(start * SAMPLE_RATE) : last].astype(np.float32, copy=False)  # (S,)
    if samples.ndim != 1 or not samples.size:
        raise BadUtterance(f"{audio}: the audio is empty, or of shape {samples.shape} where (S,) is wanted")
    if not np.isfinite(samples).all():
        raise BadUtterance(f"{audio}: the audio holds NaN or infinite samples")
    return samples


def audio_seconds(record: dict) -> float:
    """Seconds of audio in a record, from the headers of its files. Raises BadUtterance if one cannot be read."""
    total = 0.0  # seconds
    for clip in clips_of(record):
        if not hasattr(clip.audio, "open"):
            total += len(load_audio(*clip)) / SAMPLE_RATE
            continue
        with open_audio(clip) as file:
            total += (file.frames / file.samplerate if clip.end is None else clip.end) - clip.start
    return total


def known_durations(records: Records) -> tuple[np.ndarray, dict[int, str]]:
    """Seconds of all records, from headers where they do not state them.

    NaN where a header cannot be read, and why, by the index of the record.
    """
    durations, problems = np.array(records.durations, dtype=float), {}  # a copy

    def read_headers(indices: np.ndarray) -> None:
        for index in indices.tolist():
            record = records[index]
            try:
                durations[index] = audio_seconds(record)
            except BadUtterance as error:
                problems[index] = f"{record['where']}: {error}"

    unknown = np.flatnonzero(np.isnan(durations))
    with ThreadPoolExecutor(16) as pool:  # headers wait for the disk, not for the processor
        list(pool.map(read_headers, [unknown[start::64] for start in range(min(len(unknown), 64))]))
    return durations, problems


@contextmanager
def open_audio(clip: Clip) -> Iterator[soundfile.SoundFile]:
    """The file of a clip. Raises BadUtterance if it is missing, unreadable, or ends before its header says."""
    try:
        is_path = isinstance(clip.audio, Path)
        if is_path and not clip.audio.is_file():  # SoundFile would wait for the writer of a pipe
            raise BadUtterance(f"{clip.audio}: no such file; wanted a wav, flac, ogg or mp3 file")
        with soundfile.SoundFile(clip.audio if is_path else clip.audio.open()) as file:
            # libsndfile notes where a wav file has less data than its header says. Sizes of 2 GB and more mean that its
            # writer, at the end of a pipe, could not go back and fill them in.
            sizes = re.search(r"data : (\d+) \(should be (\d+)\)", file.extra_info)
            declared, present = map(int, sizes.groups()) if sizes else (0, 0)
            if clip.end is None and present < 0.9 * declared and declared < 0x7FFF0000:
                seconds = file.frames / file.samplerate
                raise BadUtterance(f"{clip.audio}: cut off after {seconds:.2f} s; its header promises more")
            yield file
    except (OSError, TypeError, soundfile.SoundFileError) as error:  # TypeError: a file named .raw, without a header
        raise BadUtterance(f"{clip.audio}: unreadable ({error}); wanted a wav, flac, ogg or mp3 file") from None


# Prompts


def render_prompt(tokenizer, prompt: str | list[dict], system_prompt: str | None = None) -> tuple[list[list[int]], int]:
    """Token ids of the pieces of a prompt around each <audio>, up to the answer; and the id of the answer's end token.

    `prompt` is the user's turn, or the turns of a conversation. The chat template is rendered as text, split at <audio>
    and tokenised piece by piece, so the vocabulary needs no new token. The end token is what the template puts after an
    answer, else the tokenizer's eos. Raises BadUtterance where the template refuses (Mistral's knows no system prompt).
    """
    if isinstance(prompt, str):
        system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
        prompt = [*system, {"role": "user", "content": prompt}]
    turns = tuple((turn["role"], turn["content"]) for turn in prompt)  # can be a key of the cache
    return render_template(tokenizer, tokenizer.chat_template, turns)


@lru_cache(maxsize=64)  # most records have the same prompt
def render_template(tokenizer, chat_template: str, turns: tuple[tuple[str, str], ...]) -> tuple[list[list[int]], int]:
    """What render_prompt gives, of (role, content) of each turn."""

    def render(messages: list[dict], **options) -> str:  # thinking models are told not to think, LLaMA 3 a fixed date
        options |= {"chat_template": chat_template, "enable_thinking": False, "date_string": "26 Jul 2024"}
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except TemplateError as error:
            raise BadUtterance(f"the chat template refuses the conversation ({error})") from None

    def tokenize(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    messages = [{"role": role, "content": content} for role, content in turns]
    pieces = [tokenize(text) for text in render(messages, add_generation_prompt=True).split(AUDIO)]
    answer = "Seven."  # no template contains it: the text behind it is the end of the turn
    _, shows_answer, end_of_turn = render([*messages, {"role": "assistant", "content": answer}]).rpartition(answer)
    special = [token for token in tokenize(end_of_turn) if token in tokenizer.added_tokens_decoder]  # no plain text
    end_id = special[0] if shows_answer and special else tokenizer.eos_token_id
    if end_id is None:
        raise InputError(f"{tokenizer.name_or_path}: neither the chat template nor the tokenizer has an end token")
    return pieces, end_id


def speech_ids(count: int, boundary_tokens: bool) -> list[int]:
    """Placeholders of a clip's speech embeddings in input_ids."""
    return [BOUNDARY[0], *[SPEECH] * count, BOUNDARY[1]] if boundary_tokens else [SPEECH] * count


# Examples


@dataclass(eq=False)
class SpeechDataset(torch.utils.data.Dataset):
    """Examples {index, prompt_ids, target_ids, labels, features, bad} of records, ready for `collate`.

    An example is made in three steps: `load` (samples) -> `augment` (training only) -> `render` (features and ids).
    dataset[position] is an example of epoch 0, dataset[epoch, position] of a later one.

    What headers show to be bad is in `bad` (index -> reason): `on_bad` "error" raises BadUtterance, "skip" leaves it
    out, "keep" keeps its place. What proves bad only when it is read raises ("error"), or becomes a silent moment
    without a transcript, with the reason in the example's `bad`.
    """

    records: Records
    tokenizer: Callable
    extract: Callable[[np.ndarray], Tensor]  # samples (S,) -> what the encoder takes: features (F, M), or samples again
    embedding_counts: np.ndarray  # [length of features] -> speech embeddings that the model makes of them
    prompt: str = PROMPT
    system_prompt: str | None = None
    audio_boundary_tokens: bool = False
    pad_to_30s: bool = False
    max_length: int | None = None  # LLM positions of prompt, speech and transcript together
    max_seconds: float | None = None  # None or 0 = any
    on_bad: str = "error"
    with_targets: bool = True  # transcripts, to train on or to evaluate; decoding needs none
    augment: Callable[[np.ndarray, np.random.Generator], np.ndarray] | None = None  # samples (S,) -> samples (S',)
    seed: int = 0  # of the augmentation
    train_on_turns: str = "last"  # of a conversation: the last answer, or "all"

    def __post_init__(self):
        self.limit = (self.max_seconds or np.inf) + 0.01  # seconds; times are rounded
        durations, self.bad = known_durations(self.records)
        for index in np.flatnonzero(durations > self.limit).tolist():
            self.bad[index] = f"{self.records[index]['where']}: {TOO_LONG.format(durations[index], self.max_seconds)}"
        self.durations = np.nan_to_num(durations)  # 0 where nobody knows
        if self.bad and self.on_bad == "error":
            more = f" (and {len(self.bad) - 1} lines more)" if len(self.bad) > 1 else ""
            raise BadUtterance(f"{self.bad[min(self.bad)]}{more}")
        if self.bad and self.on_bad == "skip" and len(self.bad) == len(self.records):
            raise InputError(f"every utterance is bad; the first: {self.bad[0]}")
        left_out = list(self.bad) if self.on_bad == "skip" else []
        self.indices = np.delete(np.arange(len(self.records)), left_out)  # of the records, by position
        self.seconds = self.durations[self.indices] if left_out else self.durations  # by position

    def __len__(self) -> int:
        return len(self.indices)

    def __str__(self) -> str:
        size = f"{len(self):,} utterances, {self.seconds.sum() / 3600:.2f} hours" if len(self) else "a stream"
        return f"{size}, fingerprint {self.records.fingerprint()}"

    def __getitem__(self, position: int | tuple[int, int]) -> dict:
        epoch, position = position if isinstance(position, tuple) else (0, position)  # a sampler's tuples
        index = int(self.indices[position])  # of the record; left-out records have no position
        return self.example(index, self.records[index], epoch, self.bad.get(index))

    def example(self, index: int, record: dict, epoch: int = 0, reason: str | None = None) -> dict:
        """The example of a record; a silent moment if it is bad for a reason, or proves to be."""
        if reason is None:
            try:
                clips = self.load(record)
                if self.augment:
                    random = np.random.default_rng([self.seed, epoch, index])  # the same in any process, at any time
                    clips = [self.augment(samples, random) for samples in clips]
                return {"index": index, "bad": None, **self.render(record, clips)}
            except BadUtterance as error:
                reason = f"{record['where']}: {error}"
                if self.on_bad == "error":
                    raise BadUtterance(reason) from None
        silence = self.render({"txt": ""}, [np.zeros(SILENCE, np.float32)], check_length=False)
        return {"index": index, "bad": reason, **silence, "target_ids": [], "labels": []}

    def load(self, record: dict) -> list[np.ndarray]:
        """Samples (S,) of each clip of a record. Raises BadUtterance."""
        clips = [load_audio(*clip) for clip in clips_of(record)]  # (S,) each; none in a conversation of text alone
        seconds = sum(map(len, clips)) / SAMPLE_RATE  # the record may have stated fewer
        if seconds > self.limit:
            raise BadUtterance(TOO_LONG.format(seconds, self.max_seconds))
        return clips

    def render(self, record: dict, clips: list[np.ndarray], check_length: bool = True) -> dict:
        """Features and token ids of a record and the samples of its clips. Raises BadUtterance."""
        features = [self.windows(samples) for samples in clips]  # windows (F, M) of each clip
        counts = [sum(int(self.embedding_counts[len(window)]) for window in windows) for windows in features]  # N
        if 0 in counts:
            seconds = len(clips[counts.index(0)]) / SAMPLE_RATE
            raise BadUtterance(f"{seconds:.3f} s of audio are too short for a single speech embedding")

        transcript = transcript_of(record)  # None in decoding, perhaps
        prompt = record.get("prompt", self.prompt)
        if "messages" in record:  # whose last turn, if the assistant's, is the transcript
            prompt = record["messages"] if transcript is None else record["messages"][:-1]
        pieces, end_id = render_prompt(self.tokenizer, prompt, self.system_prompt)
        if len(pieces) != len(counts) + 1:
            raise BadUtterance(f"{len(pieces) - 1} {AUDIO} in the prompt for {len(counts)} audio clips")
        speech = [speech_ids(count, self.audio_boundary_tokens) for count in counts]  # of each clip
        prompt_ids, labels = list(pieces[0]), []  # up to the first clip; nothing of the prompt is trained
        for ids, piece in zip(speech, pieces[1:], strict=True):
            prompt_ids += ids + piece  # a clip, and the text behind it
        if self.train_on_turns == "all" and "messages" in record:
            import conversations  # an option

            prompt_ids, labels = conversations.with_labels(prompt, speech, self.tokenizer, render_prompt, AUDIO, IGNORE)

        target_ids = []
        if transcript is not None and self.with_targets:
            target_ids = [*self.tokenizer(transcript, add_special_tokens=False).input_ids, end_id]
        if check_length and self.max_length is not None and len(prompt_ids) + len(target_ids) > self.max_length:
            sizes = f"{len(prompt_ids)} positions of prompt and speech and {len(target_ids)} of transcript do not fit"
            limit = f"{self.max_length} (--model_max_length, or what --max_new_tokens leaves)"
            raise BadUtterance(f"{sizes} in {limit}; recognize.py --timestamps or --format cuts long audio at pauses")
        labels = labels + target_ids  # of the last positions, never told by ids: many LLMs pad with their end token
        ids = {"prompt_ids": prompt_ids, "target_ids": target_ids, "labels": labels}
        windows = sum(features, []) or self.windows(np.zeros(SILENCE, np.float32))  # text alone: a silence of length 0
        return ids | {"features": windows, "feature_lengths": [len(window) if clips else 0 for window in windows]}

    def windows(self, samples: np.ndarray) -> list[Tensor]:
        """Features (F, M) of a clip (S,); over 30 s, of its equal windows of at most 30 s."""
        windows = np.array_split(samples, -(-len(samples) // WINDOW))  # equal ones, as few as will do
        if self.pad_to_30s:
            windows = [np.pad(window, (0, WINDOW - len(window))) for window in windows]
        return [self.extract(window) if len(window) >= SHORTEST else torch.zeros(0) for window in windows]


# Batches


def collate(examples: list[dict], with_targets: bool = True) -> dict:
    """One batch: input_ids, attention_mask (B, L), labels (B, K), feature_lengths (A,), and the features.

    These are input_features (A, F, M), or input_values (A, S), padded with zeros at their end. Ids are padded on the
    left, so transcripts end at the right edge, and labels cover the last K positions only: K = the longest transcript
    with its end token. Without targets (for decoding) the ids end with the prompt. `index` and `bad` are lists, one
    entry an example.
    """
    targets = [example["target_ids"] if with_targets else [] for example in examples]
    ids = [example["prompt_ids"] + target for example, target in zip(examples, targets, strict=True)]
    features = [window for example in examples for window in example["features"]]  # A windows, clip by clip
    return {
        "input_ids": pad_left(ids, 0),
        "attention_mask": pad_left([[1] * len(row) for row in ids], 0),  # (B, L), 0 = padding
        "labels": pad_left([example["labels"] if with_targets else [] for example in examples], IGNORE),
        "input_values" if features[0].ndim == 1 else "input_features": pad_sequence(features, batch_first=True),
        "feature_lengths": torch.tensor(sum([example["feature_lengths"] for example in examples], [])),  # (A,)
        "index": [example["index"] for example in examples],
        "bad": [example["bad"] for example in examples],
    }


def pad_left(rows: list[list[int]], value: int) -> Tensor:
    rows = [torch.tensor(row, dtype=torch.long) for row in rows]
    return pad_sequence(rows, batch_first=True, padding_value=value, padding_side="left")


def length_mask(lengths: Tensor, size: int) -> Tensor:
    """(A, size), True where a position lies inside its row's length (A,)."""
    return torch.arange(size, device=lengths.device) < lengths.unsqueeze(1)
