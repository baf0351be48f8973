"""The lines of a result file, which recognize.py wrote, beside those of its manifest."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from errors import BadUtterance, InputError
from manifest import Records, key_of, stated_seconds, transcript_of


class Line(NamedTuple):
    """Of a result file."""

    text: str
    words: list[dict] | None = None  # {"word", "confidence"} each, where the model told them
    key: str | None = None  # of the record; None in a .txt


@dataclass
class Rows:
    """The lines of a result file that have a reference, beside each other."""

    records: Records  # of the whole manifest
    references: list[str] = field(default_factory=list)
    hypotheses: list[str] = field(default_factory=list)
    words: list[list[dict] | None] = field(default_factory=list)  # with confidences, as Line has them
    durations: list[float] = field(default_factory=list)  # seconds, NaN where unknown
    places: list[str] = field(default_factory=list)  # file and line of the manifest
    keys: list[str] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)  # of the records
    values: dict[str, list] = field(default_factory=dict)  # of the keys that --by names, and the speakers
    num_not_scored: int = 0  # lines without a reference

    @property
    def speakers(self) -> list | None:
        """Who speaks in each line; None unless every record has a `speaker`, and there are several."""
        speakers = list(map(str, self.values["speaker"]))
        return speakers if None not in self.values["speaker"] and len(set(speakers)) > 1 else None


def read_rows(data_path: str | list[str], result_path: str, by: Sequence[str] = (), **options: str) -> Rows:
    """The lines of a result file beside those of its manifest, with the values of the keys `by`. Raises InputError.

    `data_path` is a manifest or another source, or several that were decoded together; `options` are fields of
    SourceOptions.
    """
    from dataset import open_records  # here, because dataset imports torch, for 2 s

    records = open_records(data_path, needs_text=False, **options)
    data_path = " ".join([data_path] if isinstance(data_path, str) else data_path)  # for the messages
    rows, lines = Rows(records, values={key: [] for key in {"speaker", *by}}), read_lines(result_path, len(records))
    for index, (record, line) in enumerate(zip(records, lines, strict=True)):
        key = key_of(record)
        if line.key not in (None, key):
            raise InputError(f"{result_path}:{index + 1}: found key {line.key!r}; wanted {key!r}; decode this manifest")
        if (reference := transcript_of(record)) is None:
            rows.num_not_scored += 1
            continue
        rows.references.append(reference)
        rows.hypotheses.append(line.text)
        rows.words.append(line.words)
        rows.durations.append(seconds_of(record))
        rows.places.append(record["where"])
        rows.keys.append(key)
        rows.indices.append(index)
        for name, values in rows.values.items():
            values.append(record.get(name))
    if not rows.references:
        raise InputError(f"{data_path}: found {len(records):,} lines, none with a reference; wanted 'txt' in them")
    for name in by:
        if name != "duration" and all(value is None for value in rows.values[name]):
            raise InputError(f"{data_path}: no record has the key {name!r}, for --by {name}")
    return rows


def read_lines(path: str, num_lines: int) -> list[Line]:
    """The lines of a .txt or .jsonl result file, as many as the manifest has. Raises InputError."""
    if not str(path).endswith((".txt", ".jsonl")) or not Path(path).is_file():
        raise InputError(f"{path}: no such result file; wanted a .txt or .jsonl that recognize.py wrote")
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: cannot be read ({error}); wanted text in UTF-8") from None
    lines = [line.removesuffix("\r") for line in text.split("\n")]  # str.splitlines would also cut inside a hypothesis
    if not lines[-1]:
        lines.pop()  # nothing follows the last line feed
    if len(lines) != num_lines:
        wanted = f"{num_lines:,}, one for each line of the manifest"
        raise InputError(f"{path}: found {len(lines):,} lines; wanted {wanted}; let recognize.py finish")
    if str(path).endswith(".txt"):
        return [Line(line) for line in lines]
    return [parse_line(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]


def parse_line(line: str, where: str) -> Line:
    """A line of a .jsonl result file. Raises InputError."""
    try:
        row = json.loads(line)
        key, text = str(row["key"]), row["pred"] + ""  # TypeError if it is no text
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InputError(f"{where}: wanted a JSON object with 'key' and 'pred'; decode again") from None
    if (words := row.get("words")) is None:
        return Line(text, key=key)
    try:
        is_good = all(isinstance(word["word"], str) and 0 <= word["confidence"] <= 1 for word in words)
    except (KeyError, TypeError):
        is_good = False
    if not is_good:
        raise InputError(f"{where}: 'words' wants a list of {{'word': text, 'confidence': 0 to 1}}; decode again")
    return Line(text, words, key)


def seconds_of(record: dict) -> float:
    """Seconds of audio, as the record states them, else as the header of its file does; NaN if there is none."""
    if not math.isnan(seconds := stated_seconds(record)):
        return seconds
    from dataset import audio_seconds

    try:
        return audio_seconds(record)
    except BadUtterance:
        return math.nan  # counted in the report
