"""Audio files inside other files: a member of a tar, a cell of a table, an array at a rate of its own."""

import io
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from errors import InputError

END_OF_TAR = 1024  # bytes, all of them zero: where they are missing, the tar was cut short


@dataclass(frozen=True)
class PackedAudio:
    """What stands for a path in a record's `wav`. As of a Path, str() is its name, and open() gives its content."""

    name: str  # for people: in messages and result files
    read: Callable[[], bytes]  # -> the audio file; called when its samples are wanted

    def __str__(self) -> str:
        return self.name

    def open(self) -> io.BytesIO:
        return NamedBytes(self)


class NamedBytes(io.BytesIO):
    """The content of a PackedAudio; soundfile's messages show it as repr() does: as its name."""

    def __init__(self, audio: PackedAudio):
        super().__init__(audio.read())
        self.audio = audio

    def __repr__(self) -> str:
        return self.audio.name


def wav_of(samples: Sequence | np.ndarray, rate: int) -> bytes:
    """A wav file of samples (S,) or (channels, S) at a rate in Hz. Raises TypeError if they are no floats."""
    samples, file = np.asarray(samples), io.BytesIO()
    if not np.issubdtype(samples.dtype, np.floating):
        raise TypeError(f"samples of type {samples.dtype}; wanted floats between -1 and 1")
    soundfile.write(file, samples.T, int(rate), format="WAV", subtype="FLOAT")
    return file.getvalue()


def read_bytes(path: Path, offset: int, size: int) -> bytes:
    """A stretch of a file, such as a member of a tar."""
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(size)


def tar_members(path: Path) -> list[tuple[str, int, int]]:
    """(name, offset, size) in bytes of each file in a tar, from its headers. Raises InputError, as check_tar does."""
    check_tar(path)
    try:
        with tarfile.open(path, "r:") as tar:  # the colon: uncompressed, so that an offset can be sought
            return [(member.name, member.offset_data, member.size) for member in tar if member.isfile()]
    except tarfile.TarError as error:
        raise InputError(f"{path}: unreadable ({error}); wanted an uncompressed tar") from None


def check_tar(path: Path) -> None:
    """Raise InputError if the end of a tar is missing: what is left may well be read without a complaint."""
    size = path.stat().st_size
    if size < END_OF_TAR or any(read_bytes(path, size - END_OF_TAR, END_OF_TAR)):
        raise InputError(f"{path}: the tar is cut short, at {size:,} bytes; wanted a whole one: copy it again")
