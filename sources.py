"""Sources of data other than a manifest: a list in memory, and --data_path KIND:PLACE.

A source is a function (place, needs_text) -> Records, and a row in SOURCES. Records are described in manifest.py; most
sources are read into a RecordList: a list of dicts with the keys of a manifest's line, and "where" they come from.
Further arguments with the names of SourceOptions get the values of these flags.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256
from inspect import signature
from pathlib import Path

import numpy as np

from errors import InputError
from manifest import Manifest, Records, check_record, stated_seconds, without_nulls


class RecordList(Sequence):
    """The records of a list of dicts, without their nulls. Those without "where" are called `name` and their number."""

    def __init__(self, records: Iterable[dict], name: str = "record"):
        self.records = [{"where": f"{name} {i}"} | without_nulls(record) for i, record in enumerate(records, 1)]
        self.durations = np.array([stated_seconds(record) for record in self.records])

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        return self.records[index]

    def fingerprint(self, count: int | None = None) -> str:
        def encode(value) -> str:  # str() would leave the middle of a long array out
            return sha256(value.tobytes()).hexdigest() if isinstance(value, np.ndarray) else str(value)

        texts = [json.dumps(record, default=encode) for record in self.records[:count]]
        return sha256("\n".join(texts).encode()).hexdigest()


def folder(place: str, needs_text: bool) -> Records:
    """A folder of audio files, each with its transcript beside it: a.flac and a.txt."""
    records = []
    for path in audio_files(place):
        record, text = {"wav": str(path)}, path.with_suffix(".txt")
        if text.is_file():
            record["txt"] = " ".join(text_of(text).split())
        check_record(record, str(path), needs_text)
        records.append(record | {"where": str(path)})
    return RecordList(records)


def audio_files(folder: str) -> list[Path]:
    """The audio files in a folder and its subfolders, in the same order everywhere. Raises InputError."""
    endings = (".wav", ".flac", ".ogg", ".mp3")
    files = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in endings)
    if not files:
        raise InputError(f"{folder}: wanted a folder with {', '.join(endings)} files in it")
    return files


def nemo(place: str, needs_text: bool) -> Records:
    """A NeMo manifest: JSON lines with audio_filepath, text, duration, and perhaps offset."""
    path, records = Path(place), []
    if not path.is_file():
        raise InputError(f"nemo:{place}: no such file; wanted JSON lines with 'audio_filepath' and 'text'")
    for number, line in enumerate(path.read_bytes().rstrip().split(b"\n"), 1):
        where = f"{place}:{number}"
        try:
            row = json.loads(line.decode())
            record = {"wav": row["audio_filepath"]}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"{where}: {error!r}; wanted a JSON object with 'audio_filepath'") from None
        names = {"text": "txt", "duration": "duration", "offset": "start"}
        record |= {ours: row[theirs] for theirs, ours in names.items() if row.get(theirs) is not None}
        check_record(record, where, needs_text)
        records.append(record | {"where": where, "folder": path.parent})
    return RecordList(records)


def kaldi(place: str, needs_text: bool) -> Records:
    """A Kaldi data folder: wav.scp (key, path), text (key, transcript), and perhaps segments (key, file, start, end).

    Paths are relative to the folder in which the command is started, as Kaldi's tools have it.
    """
    paths = read_table(Path(place, "wav.scp"))
    for where, path in paths.values():
        if path.endswith("|"):
            raise InputError(
                f"{where}: {path!r} is a shell command, which is not run; wanted the path of an audio file"
            )
    texts = read_table(Path(place, "text")) if needs_text or Path(place, "text").is_file() else {}
    segments = read_table(Path(place, "segments")) if Path(place, "segments").is_file() else None
    records = []
    for key, (where, value) in (paths if segments is None else segments).items():
        record = {"key": key, "wav": value}
        if segments is not None:
            try:
                recording, start, end = value.split()
                record |= {"wav": paths[recording][1], "start": float(start), "end": float(end)}
            except (ValueError, KeyError):
                raise InputError(f"{where}: {value!r}; wanted a key of wav.scp, start and end in seconds") from None
        if key in texts:
            record["txt"] = texts[key][1]
        check_record(record, where, needs_text)
        records.append(record | {"where": where})
    return RecordList(records)


def read_table(path: Path) -> dict[str, tuple[str, str]]:
    """Key -> (file and line, the rest of the line) of a table of Kaldi. Raises InputError."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; wanted a Kaldi data folder with wav.scp and text")
    rows = {}
    for number, line in enumerate(text_of(path).rstrip().split("\n"), 1):
        key, rest = (*line.split(maxsplit=1), "", "")[:2]  # spaces or tabs between them; some have no text
        if key in rows:
            raise InputError(f"{path}:{number}: {key!r} stands in line {rows[key][0].rpartition(':')[2]} too")
        rows[key] = f"{path}:{number}", rest.strip()
    return rows


def text_of(path: Path) -> str:
    """The text of a file. Raises InputError if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: {error}; wanted text in UTF-8") from None


def hf(place: str, needs_text: bool, data_subset: str = "", data_split: str = "train", remap_keys: str = "") -> Records:
    """A data set of Hugging Face, on the Hub or in a folder: see hf_datasets.py."""
    import hf_datasets

    return hf_datasets.records_of_place(place, needs_text, data_subset, data_split, remap_keys)


def lhotse(place: str, needs_text: bool) -> Records:
    """A CutSet of Lhotse, in JSON lines: see lhotse_cuts.py."""
    import lhotse_cuts

    return lhotse_cuts.read_cuts(place, needs_text)


def shar(place: str, needs_text: bool) -> Records:
    """A folder of Lhotse Shar: cuts.*.jsonl.gz beside recording.*.tar, which hold the audio."""
    import lhotse_cuts

    return lhotse_cuts.read_shards(place, needs_text)


SOURCES: dict[str, Callable[..., Records]] = {"folder": folder, "nemo": nemo, "kaldi": kaldi}
SOURCES |= {"hf": hf, "lhotse": lhotse, "shar": shar}


def open_source(source: str, needs_text: bool, data_amount: str = "", **options: str) -> Records:
    """The records of KIND:PLACE, or of a manifest of which `options` want something. Raises InputError."""
    kind, colon, place = source.partition(":")
    if not colon or Path(source).exists():
        kind, place, read = "a manifest", source, Manifest
    elif kind in SOURCES:
        read = SOURCES[kind]
    else:
        raise InputError(f"{source}: no such file, and no source {kind!r}; wanted one of {', '.join(SOURCES)}")
    if unknown := sorted(options.keys() - set(signature(read).parameters)):
        raise InputError(f"--{unknown[0]}: {kind} has no use for it; wanted a --data_path hf:PLACE with it")
    records = read(place, needs_text, **options)
    return stretch(records, data_amount) if data_amount else records


def stretch(records: Records, amount: str) -> "Subset":
    """The records START:END as of a list; a number with % is a share of them all. Raises InputError."""
    if not (match := re.fullmatch(r"(?:(-?\d+)(%?))?:(?:(-?\d+)(%?))?", amount)):
        raise InputError(f"--data_amount {amount}: wanted a stretch, such as :1000 or :10% or 10%:")
    start, start_percent, end, end_percent = match.groups()

    def position(number: str | None, percent: str | None) -> int | None:
        if number is None:  # from the first, or to the last
            return None
        return round(int(number) * len(records) / 100) if percent else int(number)

    indices = np.arange(len(records))[position(start, start_percent) : position(end, end_percent)]
    if not len(indices):
        raise InputError(f"--data_amount {amount}: leaves none of {len(records):,} records")
    return Subset(records, indices, records.durations[indices])


class Subset(Sequence):
    """Some records of others, in their order: those at `indices`, with their durations."""

    def __init__(self, records: Records, indices: np.ndarray, durations: np.ndarray):
        self.records, self.indices, self.durations = records, indices, durations

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.records[int(self.indices[index])]

    def fingerprint(self, count: int | None = None) -> str:
        """That of the records up to the last of these, and which of them are left out: so more may come behind them."""
        indices = self.indices[:count]
        size = int(indices[-1]) + 1 if len(indices) else 0
        digest, left_out = self.records.fingerprint(size), np.delete(np.arange(size), indices)
        return sha256(digest.encode() + left_out.astype("<i8").tobytes()).hexdigest() if len(left_out) else digest
