"""Audio files: their seconds, from headers, and their samples, of any rate and number of channels -> 16 kHz mono."""

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import soundfile
import soxr

from manifest import SAMPLE_RATE, BadUtterance, Manifest, clips, place


def load_audio(audio: str | Path | np.ndarray, start: float = 0, end: float | None = None) -> np.ndarray:
    """Samples (S,), float32, mono, 16 kHz, of a wav, flac, ogg or mp3 file (or of an array that is that already).

    Channels are averaged; other rates are resampled by soxr. `start` and `end` are seconds. Raises BadUtterance.
    """
    samples = np.asarray([] if isinstance(audio, (str, Path)) else audio, dtype=np.float32)
    if isinstance(audio, (str, Path)):
        try:
            with soundfile.SoundFile(audio) as file:
                rate, first, last = file.samplerate, round(start * file.samplerate), file.frames
                last = last if end is None else round(end * rate)
                if not 0 <= first < max(last, 1) <= file.frames + 0.1 * rate:  # rounded ends may lie a little outside
                    raise BadUtterance(f"{audio}: segment {start} to {end} s of {file.frames / rate:.2f} s")
                if first:  # some formats cannot seek
                    file.seek(first)
                samples = file.read(last - first, dtype="float32", always_2d=True).mean(axis=1)
                is_cut = end is None and lacks_data(file.extra_info)
            if len(samples) < 0.9 * (min(last, file.frames) - first):  # of an mp3, whose length may be a guess
                is_cut |= bool(re.search(b"Xing|Info", Path(audio).read_bytes()[:1_000_000]))
            check_whole(audio, len(samples) / rate, is_cut)
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


def seconds_of(record: dict, stated: float = np.nan) -> float:
    """Seconds of audio in a record: as stated, else from headers. BadUtterance if a file is missing or unreadable."""
    total = 0.0
    for audio, start, end in clips(record):
        if not isinstance(audio, Path):
            total += len(audio) / SAMPLE_RATE
        elif not audio.is_file():
            raise BadUtterance(f"{audio}: no such file")
        elif np.isnan(stated):
            try:
                info = soundfile.info(audio)
                check_whole(audio, info.duration, end is None and lacks_data(info.extra_info))
                total += (info.duration if end is None else end) - start
            except soundfile.SoundFileError as error:
                raise BadUtterance(f"{audio}: unreadable ({error})") from None
    return total if np.isnan(stated) else stated


def lacks_data(extra_info: str) -> bool:
    """Whether a wav file has less than its header says, by what libsndfile notes of it.

    Sizes of 2 GB and more mean that its writer, at the end of a pipe, could not go back and fill them in.
    """
    sizes = re.search(r"data : (\d+) \(should be (\d+)\)", extra_info)
    declared, found = map(int, sizes.groups()) if sizes else (0, 0)
    return found < 0.9 * declared and declared < 0x7FFF0000


def check_whole(audio: str | Path, seconds: float, is_cut: bool) -> None:
    if is_cut:
        raise BadUtterance(f"{audio}: cut off after {seconds:.2f} s; its header promises more")


def measure(records: Sequence[dict], max_seconds: float | None) -> tuple[np.ndarray, dict[int, str]]:
    """Seconds of records, from headers where their lines do not state them; and index -> what is wrong with it."""
    durations, bad = np.zeros(len(records)), {}

    def look(indices: np.ndarray) -> None:
        for index in indices.tolist():
            record = records[index]
            try:
                stated = records.durations[index] if isinstance(records, Manifest) else np.nan
                durations[index] = seconds_of(record, stated)
                check_seconds(durations[index], max_seconds)
            except BadUtterance as error:
                bad[index] = f"{place(record, index)}: {error}"

    with ThreadPoolExecutor(16) as pool:  # headers wait for the disk, not for the processor
        list(pool.map(look, np.array_split(np.arange(len(records)), 64)))
    return durations, bad


def check_seconds(seconds: float, max_seconds: float | None) -> None:
    if max_seconds and seconds > max_seconds + 0.01:
        raise BadUtterance(f"{seconds:.2f} s of audio, over --max_seconds {max_seconds:g}")
