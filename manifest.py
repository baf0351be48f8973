"""What goes in and what comes out: records of a manifest, options of decoding, hypotheses.

records = Manifest("train.jsonl")
records[0]  # {"wav": "a.wav", "txt": "hello world", "where": "train.jsonl:1", "folder": Path(".")}
"""

import json
import os
from array import array
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import orjson

from errors import InputError

SAMPLE_RATE = 16000  # Hz, of audio that is given as an array, and of all audio once it is loaded
AUDIO = "<audio>"  # in a prompt: the speech goes here
PROMPT = f"{AUDIO}\nTranscribe the speech"
SPEECH, BOUNDARY = -1, (-2, -3)  # in input_ids: a speech embedding; the vectors before and after a clip
TYPES = {"wav": str, "txt": str, "prompt": str, "messages": list, "key": (str, int, float)}
SECONDS = ("start", "end", "duration")  # keys of a record


class Records(Protocol):
    """What every source of data is turned into; the rest of the system knows nothing else of it."""

    durations: np.ndarray  # (len,) seconds of audio, NaN where only the audio itself would tell

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict:
        """The keys of a manifest's line (audio may be samples (S,), too), "where" it stands, "folder" of its paths."""

    def fingerprint(self, count: int | None = None) -> str:
        """Tells these records, or the first `count` of them, from all others; a resumed run compares it."""


class Manifest(Sequence):
    """The records of a JSON-lines file, read from disk when asked for: 16 bytes of memory a line.

    Opening it parses and checks every line once, and raises InputError with the number of the first bad one. The
    duration of a line whose audio file is missing is NaN, so that whoever looks there finds out.
    """

    def __init__(self, path: str | Path, needs_text: bool = True):
        self.path, self.offsets, durations = Path(path), array("q", [0]), array("d")  # offsets in bytes
        if not self.path.is_file():
            raise InputError(f"{path}: no such manifest; wanted a file of JSON lines with 'wav' and 'txt'")
        with open(self.path, "rb") as file, ThreadPoolExecutor(8) as pool:
            while lines := list(islice(file, 16_000)):
                records = []  # of these lines alone
                for number, line in enumerate(lines, len(durations) + 1):
                    records.append(parse_line(line, f"{path}:{number}", needs_text))
                    self.offsets.append(self.offsets[-1] + len(line))
                # Whether a file exists is a question to the disk, perhaps over a network: 8 threads ask at once.
                blocks = [records[start : start + 1000] for start in range(0, len(records), 1000)]
                for block in pool.map(self.seconds_of_present, blocks):
                    durations.extend(block)
        if not durations:
            raise InputError(f"{path}: the manifest is empty; wanted one JSON object a line with 'wav' and 'txt'")
        self.durations = np.array(durations)

    def seconds_of_present(self, records: list[dict]) -> list[float]:
        """Stated seconds of records, NaN where the audio file is missing."""
        folder, seconds = str(self.path.parent), []  # paths are relative to the manifest
        for record in records:
            is_present = "wav" not in record or os.path.exists(os.path.join(folder, record["wav"]))
            seconds.append(stated_seconds(record) if is_present else np.nan)
        return seconds

    def __len__(self) -> int:
        return len(self.durations)

    def __getitem__(self, index: int) -> dict:
        index = range(len(self))[index]  # raises IndexError past the end, where iteration stops
        with open(self.path, "rb") as file:
            file.seek(self.offsets[index])  # where the line begins
            where = f"{self.path}:{index + 1}"
            return parse_line(file.readline(), where, needs_text=False) | {"where": where, "folder": self.path.parent}

    def fingerprint(self, count: int | None = None) -> str:
        digest = sha256()  # of the bytes: the file is not parsed again
        with open(self.path, "rb") as file:
            for line in islice(file, count):
                digest.update(line.rstrip(b"\r\n") + b"\n")  # the last line may lack its end until more is appended
        return digest.hexdigest()


# A record


def parse_line(line: bytes, where: str, needs_text: bool) -> dict:
    """The record of a manifest's line, without its nulls. Raises InputError if it is none."""
    if not line.strip():
        raise InputError(f"{where}: a blank line; wanted one JSON object a line")
    try:
        # Four times as quick as json, and stricter: half a character, "\ud800", could be written to no result file.
        record = orjson.loads(line.removeprefix(b"\xef\xbb\xbf"))  # some editors on Windows begin a file so
    except orjson.JSONDecodeError as error:
        raise InputError(f"{where}: malformed JSON ({error}); wanted one object a line") from None
    if not isinstance(record, dict):
        raise InputError(f"{where}: found {line[:20]!r}; wanted a JSON object with 'wav' and 'txt'")
    record = without_nulls(record) if None in record.values() else record
    check_record(record, where, needs_text)
    return record


def without_nulls(record: dict) -> dict:
    return {key: value for key, value in record.items() if value is not None}


def check_record(record: dict, where: str, needs_text: bool) -> None:
    """Raise InputError for keys that are missing, or values of another type than a manifest has."""
    for key, value in record.items():
        if key in TYPES and not isinstance(value, TYPES[key]):
            wanted = "text" if key == "key" else f"a {TYPES[key].__name__}"
            raise InputError(f"{where}: {key!r} is {json.dumps(value)[:40]}; wanted {wanted}")
        if key in SECONDS and not (type(value) in (int, float) and 0 <= value < 1e9):  # nor NaN
            raise InputError(f"{where}: {key!r} is {json.dumps(value)[:40]}; wanted seconds, 0 or more")
    if "end" in record and record["end"] <= record.get("start", 0):
        raise InputError(f"{where}: start {record.get('start', 0)} and end {record['end']}; wanted start < end")
    if "messages" in record:
        from conversations import check_messages  # an option

        check_messages(record, where, needs_text, AUDIO)
    elif missing := [key for key in ("wav", "txt")[: 1 + needs_text] if key not in record]:
        raise InputError(f"{where}: missing {missing}; every line needs 'wav'" + " and 'txt'" * needs_text)


def transcript_of(record: dict) -> str | None:
    """What was said in a record, the last answer of a conversation; None if it does not tell."""
    if "messages" not in record:
        return record.get("txt")
    last = record["messages"][-1] if record["messages"] else {}  # turn
    return last.get("content") if last.get("role") == "assistant" else None


def key_of(record: dict) -> str:
    """The id of a record: its `key`, else the stem of its file, else the number of its line."""
    if "key" in record:
        return str(record["key"])  # numbers, too
    if isinstance(record.get("wav"), (str, Path)):
        return Path(record["wav"]).stem  # "a/b.wav" -> "b"
    return f"line{record['where'].replace(':', ' ').split()[-1]}"


class Clip(NamedTuple):  # a stretch of audio, for one <audio>
    audio: Path | np.ndarray  # a file (one inside another too, see packed_audio.py), or samples (S,) at 16 kHz
    start: float = 0.0  # seconds
    end: float | None = None  # seconds; None = to the end of the file


def clips_of(record: dict) -> list[Clip]:
    """The clips of a record, in order."""
    start, seconds = record.get("start", 0), record.get("duration") if "start" in record else None
    end = record.get("end", None if seconds is None else start + seconds)
    clips = [Clip(record.get("wav"), start, end)]  # one, but in a conversation
    if "messages" in record:
        clips = [Clip(audio) for turn in record["messages"] for audio in turn.get("audio", [])]
    folder = record.get("folder", Path())  # of the manifest
    return [clip._replace(audio=folder / clip.audio) if isinstance(clip.audio, (str, Path)) else clip for clip in clips]


def stated_seconds(record: dict) -> float:
    """Seconds of audio, as a record itself tells; NaN where only the header of a file would."""
    if "end" in record:
        return record["end"] - record.get("start", 0)  # without a look at the audio
    if "duration" in record:
        return record["duration"]
    if isinstance(record.get("wav"), (str, Path, type(None))) or hasattr(record["wav"], "open"):
        return np.nan
    return len(record["wav"]) / SAMPLE_RATE - record.get("start", 0)


def option(default: Any, help: str, **metadata) -> Any:
    """A field with a help text for the command line."""
    values = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return field(**values, metadata={"help": help, **metadata})


@dataclass
class SourceOptions:
    """What to take of a source of data: flags of train.py, recognize.py and score.py."""

    data_subset: str = option("", "hf: the configuration of a data set of Hugging Face")
    data_split: str = option("train", "hf: its split, if --data_path does not name one, as hf:NAME:SPLIT does")
    data_amount: str = option("", "the stretch of the records to take, as of a list: :1000 or :10%% or 10%%:")
    remap_keys: str = option("", """hf: columns by our keys, as JSON: '{"sentence": "txt"}'""")


def source_options(args: Any, is_evaluation_of: list[str] | None = None) -> dict[str, str]:
    """The SourceOptions among parsed arguments that are not as they are by default, for open_records."""
    values = {option.name: getattr(args, option.name) for option in fields(SourceOptions)}
    if is_evaluation_of:  # which names its own split, hf:NAME:SPLIT, and is taken whole
        is_hf = all(source.startswith("hf:") for source in is_evaluation_of)
        values = values | {"data_split": "", "data_amount": ""} if is_hf else {}
    return {name: value for name, value in values.items() if value != getattr(SourceOptions, name)}


# Decoding


@dataclass(frozen=True)
class DecodingOptions:
    """All that decides a hypothesis of a given model, by the names of transformers' generate. Raises InputError.

    Flags of recognize.py, keywords of decode and transcribe, and the key of an unfinished result file come from these
    fields: a new option is one line here. What is `ours` is no keyword of generate, or decode_batch sees to it.
    """

    num_beams: int = option(4, "beams of the search; 1 = greedy", least=1)
    max_new_tokens: int = option(200, "most tokens of a transcript", least=1)
    max_tokens_per_second: float = option(25.0, "most tokens for 1 s of audio, beside 20 for any", least=0, ours=True)
    length_penalty: float = option(1.0, "of a beam search; above 1 favours long transcripts")
    no_repeat_ngram_size: int = option(0, "so many tokens come in the same order but once; 0 = off", least=0, ours=True)
    repetition_penalty: float = option(1.0, "above 1: what was said is said again less often", least=0.01, ours=True)
    do_sample: bool = option(False, "draw each token by its probability, without beams", ours=True)
    temperature: float = option(1.0, "of samples; below 1 they keep to likely tokens", least=0.01, ours=True)
    top_p: float = option(1.0, "of samples: from the likeliest tokens with this share together", least=0, ours=True)
    seed: int = option(0, "of samples, which depend on it and the number of the line, on no batch", least=0, ours=True)
    nbest: int = option(1, "transcripts of a clip, with their log-probabilities", least=1, ours=True)
    confidence: bool = option(False, "rate each word and line, from 0 to 1", ours=True)
    timestamps: bool = option(False, "cut audio of any length at pauses: segments with their times", ours=True)

    def __post_init__(self):
        for each in fields(self):
            value, least = getattr(self, each.name), each.metadata.get("least", -np.inf)
            if not value >= least:
                raise InputError(f"--{each.name} {value}: wanted {least} or more")
        if not self.do_sample and (self.temperature, self.top_p, self.seed) != (1, 1, 0):
            raise InputError("--temperature, --top_p, --seed: change nothing without --do_sample")
        if self.nbest > self.num_beams and not self.do_sample:
            raise InputError(f"--nbest {self.nbest}: wanted as many --num_beams, or --do_sample")


@dataclass(frozen=True)
class Hypothesis:
    """What was recognised in the record `index`; the last five as options ask. See confidence.py for the numbers."""

    index: int
    text: str
    problem: str | None = None  # why the text is missing or perhaps not whole, for the user to read
    log_probability: float | None = None  # of the text and its end, given the audio
    confidence: float | None = None  # 0 to 1
    words: list[dict] | None = None  # {"word": str, "confidence": 0 to 1}
    alternatives: list[dict] | None = None  # {"text": str, "log_probability": float}; of beams the second best first
    segments: list[dict] | None = None  # {"start": seconds, "end": seconds, "text": str}; see long_audio.py
