"""Records: the lines of a manifest, checked when it is opened and read from disk when asked for.

records = Manifest("train.jsonl")
records[0]  # {"wav": "a.wav", "txt": "hello world", "where": "train.jsonl:1", "folder": Path(".")}
"""

import atexit
import json
import os
import sys
import textwrap
import warnings
from array import array
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np

SAMPLE_RATE = 16000  # of audio that is given as an array
AUDIO = "<audio>"  # in a prompt: the speech goes here
KINDS = {"wav": str, "txt": str, "prompt": str, "messages": list, "key": (str, int, float)}


class InputError(ValueError):
    """Something the user gave us is wrong. The message is one line: where, what, what was wanted, the cure."""


class BadUtterance(InputError):
    """One line of a manifest cannot be used: its audio is unreadable, empty or too long, or its text does not fit."""


def run(main: Callable[[], None]) -> None:
    """Call a command's `main`; wrong input becomes one line on standard error and exit status 2.

    Of several processes, each leaves without Python's teardown, in which torch 2.13 may abort it (Python < 3.14):
    gloo's threads, which DDP keeps alive, want the GIL to let go of the last collective's tensors.
    """
    status = 0
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    try:
        main()
    except InputError as error:  # a DataLoader worker wraps the message in its traceback: the last part is ours
        cure = "; mend it, or pass --on_bad_audio skip" if isinstance(error, BadUtterance) else ""
        from tqdm.auto import tqdm  # takes a progress bar off the line first

        tqdm.write(f"error: {str(error).strip().rsplit('BadUtterance: ', 1)[-1]}{cure}", file=sys.stderr)
        status = 2
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_available() and distributed.is_initialized():
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    if status:
        sys.exit(status)


class Manifest(Sequence):
    """The records of a JSON-lines file, read from disk when asked for: 16 bytes of memory a line.

    Opening it checks every line and raises InputError with the number of the first bad one. `durations` (seconds,
    NaN where the line does not tell) and `sha256` (of the file) come from the same pass.
    """

    def __init__(self, path: str, needs_text: bool = True):
        self.path, self.offsets = Path(path), array("q", [0])
        if not self.path.is_file():
            raise InputError(f"{path}: no such manifest; wanted a file of JSON lines with 'wav' and 'txt'")
        durations, digest = array("d"), sha256()
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                durations.append(check_line(line, f"{path}:{number}", needs_text))
                self.offsets.append(self.offsets[-1] + len(line))
                digest.update(line)
        if not durations:
            raise InputError(f"{path}: the manifest is empty; wanted one JSON object a line with 'wav' and 'txt'")
        self.durations, self.sha256 = np.array(durations), digest.hexdigest()

    def __len__(self) -> int:
        return len(self.durations)

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(index)
        with open(self.path, "rb") as file:
            file.seek(self.offsets[index])
            return parse_line(file.readline()) | {"where": f"{self.path}:{index + 1}", "folder": self.path.parent}


def parse_line(line: bytes) -> dict:
    return {key: value for key, value in json.loads(line).items() if value is not None}


def check_line(line: bytes, where: str, needs_text: bool) -> float:
    """Seconds of audio that a manifest line states, NaN if none; InputError if the line is no record."""
    if not line.strip():
        raise InputError(f"{where}: a blank line; wanted one JSON object a line")
    try:
        record = parse_line(line)
        if rb"\u" in line:  # half a character, "\ud800", is valid JSON
            json.dumps(record, ensure_ascii=False).encode()
    except AttributeError:
        raise InputError(f"{where}: found {line[:20]!r}; wanted a JSON object with 'wav' and 'txt'") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: malformed JSON ({error}); wanted one object a line") from None
    for key, kind in KINDS.items():
        if key in record and not isinstance(record[key], kind):
            wanted = "text" if key == "key" else f"a {kind.__name__}"
            raise InputError(f"{where}: {key!r} is {json.dumps(record[key])[:40]}; wanted {wanted}")
    for key in ("start", "end", "duration"):
        value = record.get(key, 0.0)
        if type(value) not in (int, float) or not 0 <= value < 1e9:  # nor NaN
            raise InputError(f"{where}: {key!r} is {json.dumps(value)[:40]}; wanted seconds, 0 or more")
    turns = record.get("messages", [])
    if wrong := wrong_turns(turns):
        raise InputError(f"{where}: {wrong}")
    if not all(isinstance(path, str) for turn in turns for path in turn.get("audio", [])):
        raise InputError(f"{where}: wanted paths in 'audio' of 'messages'")
    if record.get("end", np.inf) <= record.get("start", 0):
        raise InputError(f"{where}: start {record.get('start', 0)} and end {record['end']}; wanted start < end")
    needed = [] if "messages" in record else ["wav", "txt"] if needs_text else ["wav"]
    if missing := [key for key in needed if key not in record]:
        raise InputError(f"{where}: missing {missing}; every line needs {' and '.join(map(repr, needed))}")
    if needs_text and reference(record) is None:
        raise InputError(f"{where}: the last of 'messages' is not the assistant's; nothing would be trained on")
    return record["end"] - record.get("start", 0) if "end" in record else record.get("duration", np.nan)


def wrong_turns(turns: list[dict]) -> str | None:
    """What is wrong with a conversation; where none of its turns has an <audio>, the template places them."""
    for turn in turns:
        texts = [turn.get("role"), turn.get("content")] if isinstance(turn, dict) else [None]
        if not all(isinstance(text, str) for text in texts) or not isinstance(turn.get("audio", []), list):
            found = textwrap.shorten(str(turn), 80, placeholder=" ...")
            return f"{found} in the conversation; wanted texts in 'role', 'content' and a list in 'audio'"
    counts = [(turn["content"].count(AUDIO), len(turn.get("audio", []))) for turn in turns]
    uneven = [pair for pair in counts if pair[0] != pair[1]] if any(places for places, _ in counts) else []
    return f"{uneven[0][0]} {AUDIO} in a turn with {uneven[0][1]} audio clips" if uneven else None


def reference(record: dict) -> str | None:
    """The transcript of a record, None if it has none."""
    last = record["messages"][-1:] if "messages" in record else [{"role": "assistant", "content": record.get("txt")}]
    return last[0].get("content") if last and last[0].get("role") == "assistant" else None


def record_key(record: dict) -> str:
    """The id of a record: its `key`, else the stem of its file, else the number of its line."""
    stem = Path(record["wav"]).stem if "wav" in record else f"line{record['where'].rpartition(':')[2]}"
    return str(record.get("key") or stem)


def clips(record: dict) -> list[tuple]:
    """(audio, start seconds, end seconds or None) for each <audio>; audio is a path or 16 kHz samples (S,)."""
    found = [(record.get("wav"), record.get("start", 0), record.get("end"))]
    if "messages" in record:
        found = [(path, 0, None) for turn in record["messages"] for path in turn.get("audio", [])]
    folder = record.get("folder", Path())
    return [(folder / audio if isinstance(audio, (str, Path)) else audio, start, end) for audio, start, end in found]


def place(record: dict, index: int) -> str:
    """Where a record comes from: file and line of a manifest."""
    return record.get("where", f"record {index}")
