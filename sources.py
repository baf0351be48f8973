"""Sources of data other than a manifest: --data_path KIND:PLACE.

A source is a function (place, needs_text) -> Records, and a row in SOURCES. Records are described in manifest.py; most
sources are read into a RecordList: a list of dicts with the keys of a manifest's line, and "where" they come from.
"""

import json
from collections.abc import Callable
from pathlib import Path

from errors import InputError
from manifest import RecordList, Records, check_record


def folder(place: str, needs_text: bool) -> Records:
    """A folder of audio files, each with its transcript beside it: a.flac and a.txt."""
    records = []
    for path in sorted(Path(place).rglob("*")):
        if path.suffix.lower() in (".wav", ".flac", ".ogg", ".mp3"):
            record, text = {"wav": str(path)}, path.with_suffix(".txt")
            if text.is_file():
                record["txt"] = " ".join(text.read_text(encoding="utf-8").split())
            check_record(record, str(path), needs_text)
            records.append(record | {"where": str(path)})
    if not records:
        raise InputError(f"folder:{place}: wanted a folder with .wav, .flac, .ogg or .mp3 files in it")
    return RecordList(records)


def nemo(place: str, needs_text: bool) -> Records:
    """A NeMo manifest: JSON lines with audio_filepath, text, duration, and perhaps offset."""
    path, records = Path(place), []
    if not path.is_file():
        raise InputError(f"nemo:{place}: no such file; wanted JSON lines with 'audio_filepath' and 'text'")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        where = f"{place}:{number}"
        try:
            row = json.loads(line)
            record = {"wav": row["audio_filepath"]}
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{where}: {error!r}; wanted a JSON object with 'audio_filepath'") from None
        names = {"text": "txt", "duration": "duration", "offset": "start"}
        record |= {ours: row[theirs] for theirs, ours in names.items() if theirs in row}
        if "start" in record and "duration" in record:
            record["end"] = record["start"] + record["duration"]
        check_record(record, where, needs_text)
        records.append(record | {"where": where, "folder": path.parent})
    return RecordList(records)


SOURCES: dict[str, Callable[[str, bool], Records]] = {"folder": folder, "nemo": nemo}
