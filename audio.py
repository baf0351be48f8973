"""Samples of audio files: any rate, any number of channels -> 16 kHz mono."""

import re
from pathlib import Path

import numpy as np

from manifest import SAMPLE_RATE, BadUtterance, is_cut_off


def load_audio(audio: str | Path | np.ndarray, start: float = 0, end: float | None = None) -> np.ndarray:
    """Samples (S,), float32, mono, 16 kHz, of a wav, flac, ogg or mp3 file (or of an array that is that already).

    Channels are averaged; other rates are resampled by soxr. `start` and `end` are seconds. Raises BadUtterance.
    """
    import soundfile
    import soxr

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
                is_cut = end is None and is_cut_off(file.extra_info)
            if len(samples) < 0.9 * (min(last, file.frames) - first):  # of an mp3, whose length may be a guess
                is_cut |= bool(re.search(b"Xing|Info", Path(audio).read_bytes()[:1_000_000]))
            if is_cut:
                raise BadUtterance(f"{audio}: cut off after {len(samples) / rate:.2f} s; its header promises more")
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
