"""Lhotse: --data_path lhotse:cuts.jsonl.gz, and shar:FOLDER with cuts.*.jsonl.gz and recording.*.tar in it.

Paths of recordings are relative to the folder in which the command is started, as Lhotse has them.
"""

import json
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from errors import InputError
from manifest import Records, check_record, stated_seconds
from packed_audio import PackedAudio, read_bytes, tar_members, wav_of

if TYPE_CHECKING:
    from lhotse.cut import Cut


def read_cuts(place: str, needs_text: bool) -> Records:
    """The records of a CutSet in JSON lines, perhaps compressed. Raises InputError."""
    if not Path(place).is_file() or not place.endswith((".jsonl", ".jsonl.gz")):
        raise InputError(f"lhotse:{place}: no such file; wanted cuts of Lhotse in a .jsonl or .jsonl.gz")

    def records() -> Iterator[dict]:
        for where, cut in cuts_of(Path(place)):
            record = record_of(cut, where, needs_text)
            check_files(cut, where)
            if is_stretch_of_file(cut):
                yield record | stretch_of(cut) | {"wav": cut.recording.sources[0].source}
            else:  # mixed, padded, one channel of several, at another speed
                yield record | {"wav": {"cut": json.dumps(cut.to_dict())}}

    return CutRecords(records(), f"lhotse:{place}")


def read_shards(place: str, needs_text: bool) -> Records:
    """The records of a folder of Lhotse Shar. Raises InputError.

    For each cut of cuts.000000.jsonl.gz, recording.000000.tar has the audio and its description, in the same order.
    """
    shards = sorted(Path(place).glob("cuts.*.jsonl*")), sorted(Path(place).glob("recording.*.tar*"))
    numbers = [[path.name.split(".")[1] for path in paths] for paths in shards]  # cuts.000000.jsonl.gz -> 000000
    if not numbers[0] or numbers[0] != numbers[1]:
        found = f"cuts of the shards {numbers[0]} and recordings of {numbers[1]}"
        raise InputError(f"shar:{place}: found {found}; wanted cuts.*.jsonl.gz, and a recording.*.tar for each")

    def records() -> Iterator[dict]:
        for cuts, tar in zip(*shards, strict=True):
            members, count = tar_members(tar), 0
            for count, (where, cut) in enumerate(cuts_of(cuts), 1):
                name, offset, size = members[2 * count - 2] if 2 * count <= len(members) else ("nothing", 0, 0)
                if name.rpartition(".")[0] != cut.id or name.endswith(".nodata"):
                    raise InputError(f"{tar}: found {name} for the cut {cut.id}, {where}; wanted its audio")
                audio = {"tar": str(tar), "offset": offset, "size": size, "name": name}
                yield record_of(cut, where, needs_text) | stretch_of(cut) | {"wav": audio}
            if 2 * count != len(members):
                raise InputError(f"{cuts}: {count:,} cuts for {len(members) // 2:,} recordings; is it cut short?")

    return CutRecords(records(), f"shar:{place}")


def cuts_of(path: Path) -> Iterator[tuple[str, "Cut"]]:
    """(file and line, cut) of each cut in a file, which Lhotse reads line by line. Raises InputError."""
    try:
        from lhotse import CutSet
        from lhotse.cut import Cut
    except ImportError:
        raise InputError(f"{path}: the package lhotse is missing; pip install lhotse") from None
    number = 1
    try:
        for cut in CutSet.from_file(path):
            if not isinstance(cut, Cut):
                raise TypeError(f"a {type(cut).__name__}")
            yield f"{path}:{number}", cut
            number += 1
    except (OSError, EOFError, ValueError, LookupError, TypeError, AssertionError, AttributeError, zlib.error) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{path}:{number}: no cut ({reason}); wanted what CutSet.to_file writes, whole") from None


def record_of(cut: "Cut", where: str, needs_text: bool) -> dict:
    """The record of a cut, but for its audio. The texts of its supervisions are joined in the order of their time."""
    if not cut.has_recording:
        raise InputError(f"{where}: the cut {cut.id} has no recording; wanted audio, which features cannot stand for")
    texts = [s.text for s in sorted(cut.supervisions, key=lambda s: s.start) if s.text is not None]
    record = {"key": cut.id, "duration": cut.duration, "where": where}
    if texts:
        record["txt"] = " ".join(texts)
    check_record(record | {"wav": ""}, where, needs_text)
    return record


def check_files(cut: "Cut", where: str) -> None:
    """Raise InputError if a cut's audio is anywhere but in files. (Lhotse would run shell commands of a manifest.)"""
    parts = [track.cut for track in cut.tracks] if hasattr(cut, "tracks") else [cut]
    recordings = [part.recording for part in parts if hasattr(part, "recording") and part.recording]  # padding has none
    for source in [source for recording in recordings for source in recording.sources]:
        if source.type != "file":
            raise InputError(f"{where}: the audio of {cut.id} is a {source.type!r}; wanted files alone")


def is_stretch_of_file(cut: "Cut") -> bool:
    """Whether a cut is all channels of a file, from one time to another; resampling is dataset.py's."""
    if hasattr(cut, "tracks") or len(cut.recording.sources) > 1:
        return False
    channels = [cut.channel] if isinstance(cut.channel, int) else cut.channel
    changes = {type(transform).__name__ for transform in cut.recording.transforms or []} - {"Resample"}
    return sorted(channels) == sorted(cut.recording.channel_ids) and not changes


def stretch_of(cut: "Cut") -> dict:
    """Start and end of a cut in its recording, in seconds; nothing for all of it."""
    is_whole = cut.start == 0 and cut.duration == cut.recording.duration
    return {} if is_whole else {"start": cut.start, "end": cut.end}


class CutRecords(Sequence):
    """Records that are held as JSON in one piece of memory: about 200 bytes each, where a dict takes 1,000."""

    def __init__(self, records: Iterable[dict], name: str):
        self.lines, self.offsets, durations = bytearray(), array("q", [0]), array("d")
        for record in records:
            durations.append(stated_seconds(record))
            self.lines += json.dumps(record).encode()
            self.offsets.append(len(self.lines))
        if not durations:
            raise InputError(f"{name}: there are no cuts")
        self.durations = np.array(durations)

    def __len__(self) -> int:
        return len(self.durations)

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(index)
        record = json.loads(self.lines[self.offsets[index] : self.offsets[index + 1]])
        return record | {"wav": audio_of(record["wav"], record["key"])}

    def fingerprint(self, count: int | None = None) -> str:
        return sha256(self.lines[: self.offsets[len(self) if count is None else count]]).hexdigest()


def audio_of(wav: str | dict, key: str) -> str | PackedAudio:
    """The path of a record's audio, or what stands for it."""
    if isinstance(wav, str):
        return wav
    if "cut" in wav:
        return PackedAudio(key, partial(load_by_lhotse, wav["cut"]))
    return PackedAudio(wav["name"], partial(read_bytes, Path(wav["tar"]), wav["offset"], wav["size"]))


def load_by_lhotse(text: str) -> bytes:
    """A wav file of the audio of a cut in JSON. Raises OSError if Lhotse cannot load it, for whatever reason."""
    from lhotse.cut.set import deserialize_cut

    try:
        cut = deserialize_cut(json.loads(text))
        return wav_of(cut.load_audio(), cut.sampling_rate)
    except Exception as error:  # of any library that Lhotse asks
        raise OSError("Lhotse: " + str(error).partition("\n")[0]) from error
