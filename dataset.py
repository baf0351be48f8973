"""Records and batches: manifest -> audio -> features and token ids -> one padded batch.

records = Manifest("train.jsonl")
dataset = SpeechDataset(records, tokenizer, speech_lengths=lambda frames: frames // 10, num_mels=80)
batch = collate([dataset[0], dataset[1]])  # a dict of left-padded tensors, what SpeechLLM.forward takes
"""

import json
import sys
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

AUDIO = "<audio>"  # in a prompt: the speech goes here
SPEECH = -1  # in input_ids: a speech embedding goes here; no vocabulary has this id
IGNORE = -100  # in labels: not trained on
SAMPLE_RATE = 16000
WINDOW = 30 * SAMPLE_RATE  # samples; Whisper's positions end at 30 s


class InputError(ValueError):
    """Something the user gave us is wrong. The message is one line: where, what, what was wanted, the cure."""


class BadUtterance(InputError):
    """One line of a manifest cannot be used: its audio is unreadable, empty or too long, or its text does not fit."""


def run(main: Callable[[], None]) -> None:
    """Call a command's `main`; wrong input becomes one line on standard error and exit status 2."""
    try:
        main()
    except InputError as error:  # a DataLoader worker wraps the message in its traceback: the last part is ours
        cure = "; mend it, or pass --on_bad_audio skip" if isinstance(error, BadUtterance) else ""
        print(f"error: {str(error).strip().rsplit('BadUtterance: ', 1)[-1]}{cure}", file=sys.stderr)
        sys.exit(2)


class Manifest(Sequence):
    """The records of a JSON-lines file, read from disk when asked for: 12 bytes of memory a line.

    Opening it checks every line and raises InputError with the number of the first bad one. `durations` (seconds,
    NaN where the line does not tell) and `sha256` (of the file) come from the same pass.
    """

    def __init__(self, path: str, needs_text: bool = True):
        self.path = Path(path)
        if not self.path.is_file():
            raise InputError(f"{path}: no such manifest; wanted a file of JSON lines with 'wav' and 'txt'")
        offsets, durations, digest, offset = array("q"), array("f"), sha256(), 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                record = parse_line(line, f"{path}:{number}", needs_text)
                durations.append(float(seconds) if (seconds := stated_seconds(record)) is not None else np.nan)
                offsets.append(offset)
                offset += len(line)
                digest.update(line)
        if not offsets:
            raise InputError(f"{path}: the manifest is empty; wanted one JSON object a line with 'wav' and 'txt'")
        self.offsets, self.durations = np.frombuffer(offsets, np.int64), np.frombuffer(durations, np.float32)
        self.sha256 = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, index: int) -> dict:
        with open(self.path, "rb") as file:
            file.seek(self.offsets[index])
            return {"where": f"{self.path}:{index + 1}", "folder": self.path.parent, **json.loads(file.readline())}


def parse_line(line: bytes, where: str, needs_text: bool) -> dict:
    """The record of one manifest line; InputError if it is no JSON object or lacks a key."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: malformed JSON ({error}); wanted one object a line") from None
    if not isinstance(record, dict):
        raise InputError(f"{where}: found a JSON {type(record).__name__}, wanted an object with 'wav' and 'txt'")
    wanted = {"messages": list} if "messages" in record else {"wav": str, "txt": str} if needs_text else {"wav": str}
    if missing := sorted(wanted.keys() - record.keys()):
        raise InputError(f"{where}: missing {missing}; every line needs {' and '.join(map(repr, wanted))}")
    for key, kind in {"txt": str, "prompt": str, "start": (int, float), "end": (int, float), **wanted}.items():
        if key in record and not isinstance(record[key], kind):
            raise InputError(f"{where}: {key!r} is {json.dumps(record[key])[:40]}, which is of the wrong type")
    if needs_text and "messages" in record and reference(record) is None:
        raise InputError(f"{where}: the last of 'messages' is not the assistant's; nothing would be trained on")
    return record


def stated_seconds(record: dict) -> float | None:
    """Seconds of speech in a record, as far as its own keys tell."""
    return record["end"] - record.get("start", 0) if record.get("end") is not None else record.get("duration")


def reference(record: dict) -> str | None:
    """The transcript of a record, None if it has none."""
    if "messages" not in record:
        return record.get("txt")
    last = record["messages"][-1] if record["messages"] else {}
    return last.get("content") if last.get("role") == "assistant" else None


def clips(record: dict) -> list[tuple]:
    """(audio, start seconds or None, end seconds or None) of each <audio>; audio is a path or 16 kHz samples (S,)."""
    if "messages" not in record:
        found = [(record["wav"], record.get("start"), record.get("end"))]
    else:
        found = [(path, None, None) for turn in record["messages"] for path in turn.get("audio", [])]
    folder = record.get("folder", Path())
    return [(folder / a if isinstance(a, (str, Path)) else a, start, end) for a, start, end in found]


def load_audio(audio: str | Path | np.ndarray, start: float | None = None, end: float | None = None) -> np.ndarray:
    """Samples (S,), float32, mono, 16 kHz, of a wav, flac, ogg or mp3 file (or of an array that is that already).

    Channels are averaged; other rates are resampled by soxr. `start` and `end` are seconds. Raises BadUtterance.
    """
    import soundfile
    import soxr

    if isinstance(audio, (str, Path)):
        try:
            with soundfile.SoundFile(audio) as file:
                rate, first = file.samplerate, round((start or 0) * file.samplerate)
                last = file.frames if end is None else round(end * rate)
                if not 0 <= first <= last <= file.frames + 0.1 * rate:  # rounded ends may lie a little outside
                    raise BadUtterance(f"segment {start} to {end} s of {audio}, which has {file.frames / rate:.2f} s")
                file.seek(min(first, file.frames))
                samples = file.read(last - first, dtype="float32", always_2d=True).mean(axis=1)
        except (OSError, soundfile.SoundFileError) as error:
            missing = "no such file" if not Path(audio).is_file() else f"unreadable ({error})"
            raise BadUtterance(f"{audio}: {missing}; wanted a wav, flac, ogg or mp3 file") from None
        samples = soxr.resample(samples, rate, SAMPLE_RATE) if rate != SAMPLE_RATE else samples
    else:
        samples, audio = np.asarray(audio, dtype=np.float32), "audio array"
        if samples.ndim != 1:
            raise BadUtterance(f"{audio}: shape {samples.shape}; wanted mono samples (S,) at 16 kHz")
    if not len(samples):
        raise BadUtterance(f"{audio}: the audio is empty")
    if not np.isfinite(samples).all():
        raise BadUtterance(f"{audio}: the audio holds NaN or infinite samples")
    return samples


def log_mel(samples: np.ndarray, num_mels: int, pad_to_30s: bool = False) -> list[Tensor]:
    """Whisper's log-mel features of a clip, one (F, M) for each window: clips over 30 s are cut into equal windows."""
    import whisper

    count = -(-len(samples) // WINDOW)
    windows = np.array_split(samples, count)
    windows = [whisper.pad_or_trim(w) for w in windows] if pad_to_30s else windows
    return [whisper.log_mel_spectrogram(w, num_mels).T for w in windows]


@lru_cache(maxsize=64)
def render_prompt(tokenizer, conversation: str) -> tuple[list[list[int]], int]:
    """Token ids of the pieces of a conversation (JSON) around each <audio>, up to the answer; and its end token's id.

    The chat template is rendered as text, split at <audio> and tokenised piece by piece, so the vocabulary needs no
    new token. The end token is what the template puts after an answer, else the tokenizer's eos.
    """
    if tokenizer.chat_template is None:
        raise InputError(f"{tokenizer.name_or_path}: no chat template; wanted an instruction-tuned LLM's tokenizer")

    def render(messages: list[dict], **options) -> str:  # thinking models are told not to think
        return tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=False, **options)

    def tokenize(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    messages = [{"role": turn["role"], "content": turn["content"]} for turn in json.loads(conversation)]
    pieces = [tokenize(text) for text in render(messages, add_generation_prompt=True).split(AUDIO)]
    answer = "Seven."
    after = render([*messages, {"role": "assistant", "content": answer}]).rpartition(answer)[2]
    end_ids = [token for token in tokenize(after) if token in tokenizer.added_tokens_decoder]
    end_id = end_ids[0] if end_ids else tokenizer.eos_token_id
    if end_id is None:
        raise InputError(f"{tokenizer.name_or_path}: neither the chat template nor the tokenizer has an end token")
    return pieces, end_id


class SpeechDataset(torch.utils.data.Dataset):
    """Examples {index, prompt_ids, target_ids, features, bad} of records, ready for `collate`.

    `speech_lengths` tells how many embeddings the model makes of so many feature frames. `on_bad`: "error" raises
    BadUtterance, "skip" leaves out what is known to be bad beforehand (see `bad`, index -> reason), "keep" keeps
    every line. What turns out bad only when it is read becomes, unless that is an error, a silent second without a
    transcript, with the reason in `bad`. A missing or overlong file is found when the dataset is made.
    """

    def __init__(
        self,
        records: Sequence[dict],
        tokenizer,
        speech_lengths: Callable[[int], int],
        num_mels: int,
        prompt: str = f"{AUDIO}\nTranscribe the speech",
        pad_to_30s: bool = False,
        max_length: int | None = None,  # positions of prompt, speech and transcript together
        max_seconds: float | None = None,
        on_bad: str = "error",
    ):
        self.records, self.tokenizer, self.speech_lengths, self.num_mels = records, tokenizer, speech_lengths, num_mels
        self.prompt, self.pad_to_30s, self.max_length, self.max_seconds = prompt, pad_to_30s, max_length, max_seconds
        self.on_bad, self.bad = on_bad, {}
        stated = records.durations if isinstance(records, Manifest) else np.full(len(records), np.nan)
        with ThreadPoolExecutor(16) as pool:  # headers wait for the disk, not for the processor
            self.durations = np.fromiter(pool.map(self.look_at, range(len(records)), stated), np.float32, len(records))
        if self.bad and on_bad == "error":
            first = self.bad[min(self.bad)]
            more = f" (and {len(self.bad) - 1} lines more)" if len(self.bad) > 1 else ""
            raise BadUtterance(f"{first}{more}")
        kept = np.arange(len(records))
        self.indices = np.delete(kept, sorted(self.bad)) if on_bad == "skip" else kept
        if not len(self.indices):
            raise InputError(f"every one of {len(records)} utterances is bad; the first: {self.bad[0]}")

    def look_at(self, index: int, seconds: float) -> float:
        """Seconds of a record, from its audio's header where it does not say; notes in `bad` what is wrong."""
        import soundfile

        record = self.records[index]
        try:
            files = [clip for clip in clips(record) if isinstance(clip[0], Path)]
            for audio, _, _ in files:
                if not audio.is_file():
                    raise BadUtterance(f"{audio}: no such file")
            if np.isnan(seconds):
                try:
                    whole = [len(a) / SAMPLE_RATE for a, _, _ in clips(record) if not isinstance(a, Path)]
                    seconds = sum(whole + [soundfile.info(a).duration - (start or 0) for a, start, _ in files])
                except soundfile.SoundFileError as error:
                    raise BadUtterance(f"{files[0][0]}: unreadable ({error})") from None
            self.check_seconds(seconds)
        except BadUtterance as error:
            self.bad[index] = f"{record['where']}: {error}"
        return np.nan_to_num(seconds)

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
            reason = f"{record['where']}: {error}"
            if self.on_bad == "error":
                raise BadUtterance(reason) from None
            silence = {"where": "", "wav": np.zeros(SAMPLE_RATE, np.float32)}
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

        messages = record.get("messages") or [{"role": "user", "content": record.get("prompt") or self.prompt}]
        transcript = reference(record)
        asked = messages[:-1] if "messages" in record and transcript is not None else messages
        pieces, end_id = render_prompt(self.tokenizer, json.dumps(asked))
        if len(pieces) != len(counts) + 1:
            raise BadUtterance(f"{len(pieces) - 1} {AUDIO} in the prompt for {len(counts)} audio clips")
        prompt_ids = list(pieces[0])
        for count, piece in zip(counts, pieces[1:], strict=True):
            prompt_ids += [SPEECH] * count + piece
        target_ids = []
        if transcript is not None:
            target_ids = [*self.tokenizer(transcript, add_special_tokens=False).input_ids, end_id]
        if self.max_length and len(prompt_ids) + len(target_ids) > self.max_length:
            prompt = f"{len(prompt_ids)} positions of prompt and speech"
            limit = f"{self.max_length} (--model_max_length, or the LLM's context)"
            raise BadUtterance(f"{prompt} and {len(target_ids)} of transcript do not fit in {limit}")
        windows = [window for clip in features for window in clip]
        return {"prompt_ids": prompt_ids, "target_ids": target_ids, "features": windows}


def collate(examples: list[dict], with_targets: bool = True) -> dict:
    """One batch: input_ids, attention_mask (B, L), labels (B, K), input_features (A, M, F), feature_lengths (A,).

    Ids are padded on the left, so transcripts end at the right edge, and labels cover the last K positions only:
    K = the longest transcript with its end token. Features are padded with zeros at their end. Without targets
    (for decoding) the ids end with the prompt. `index` and `bad` are lists, one entry an example.
    """
    targets = [e["target_ids"] if with_targets else [] for e in examples]
    ids = [torch.tensor(e["prompt_ids"] + t) for e, t in zip(examples, targets, strict=True)]
    features = [window for e in examples for window in e["features"]]
    return {
        "input_ids": pad_left(ids, 0),
        "attention_mask": pad_left([torch.ones_like(i) for i in ids], 0),
        "labels": pad_left([torch.tensor(t, dtype=torch.long) for t in targets], IGNORE),
        "input_features": torch.nn.utils.rnn.pad_sequence(features, batch_first=True).transpose(1, 2),
        "feature_lengths": torch.tensor([len(f) for f in features]),
        "index": [e["index"] for e in examples],
        "bad": [e["bad"] for e in examples],
    }


def pad_left(rows: list[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value, padding_side="left")


class LengthSampler(torch.utils.data.Sampler):
    """Positions in a random order in which each run of `batch_size` has similar lengths; a new order every epoch.

    Shuffled positions are sorted by length within groups of 50 batches, and the batches shuffled again. The order
    depends on the seed and the epoch alone, so a resumed run sees what the first would have seen.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int, epoch: Callable[[], int] = lambda: 0):
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng([self.seed, self.epoch()])
        order = random.permutation(len(self.lengths))
        group = 50 * self.batch_size
        order = np.concatenate(
            [g[np.argsort(self.lengths[g], kind="stable")] for g in np.split(order, range(group, len(order), group))]
        )
        full = len(order) - len(order) % self.batch_size  # a smaller last batch stays the last
        batches = random.permutation(order[:full].reshape(-1, self.batch_size))
        return iter(np.concatenate([batches.ravel(), order[full:]]).tolist())
