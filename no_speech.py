"""Silence and noise with an empty transcript among the training data, so that the model learns to say nothing.

--no_speech_share 0.1: a tenth of each epoch. A recogniser that has only ever heard speech makes up text where nobody
speaks (Koenecke et al. 2024, arXiv:2402.08021).
"""

from collections.abc import Sequence
from hashlib import sha256
from typing import TYPE_CHECKING

import numpy as np

from dataset import known_durations, load_audio
from errors import InputError
from manifest import SAMPLE_RATE, Records
from mixture import Mixture, say
from sources import Subset, audio_files

if TYPE_CHECKING:
    from train import DataArguments

Random = np.random.Generator
SHORTEST_SECONDS = 0.5  # shorter training clips are rare, and a projector of a large stride makes nothing of them
MOST_HEADERS = 1000  # files that are measured where no record states a duration


# A sound is a function (number of samples, random) -> samples (S,) of any loudness, and a row in SOUNDS.


def silence(count: int, random: Random) -> np.ndarray:
    """Digital silence, as of a microphone that is switched off."""
    return np.zeros(count)


def coloured_noise(count: int, random: Random) -> np.ndarray:
    """White, pink or brown noise: power that falls with the frequency to the power of 0, 1 or 2."""
    spectrum = np.fft.rfft(random.normal(size=count))
    spectrum[0] = 0  # no constant part
    frequencies = np.fft.rfftfreq(count, 1 / SAMPLE_RATE).clip(20)  # Hz; below 20 nothing is heard
    return np.fft.irfft(spectrum * frequencies ** (-random.integers(3) / 2), count)


def hum(count: int, random: Random) -> np.ndarray:
    """The mains, 50 or 60 Hz, with overtones that grow weaker."""
    time = np.arange(count) / SAMPLE_RATE
    base, overtones = random.choice([50.0, 60.0]), np.arange(1, 11)
    strengths = random.uniform(0, 1, 10) / overtones
    phases = random.uniform(0, 2 * np.pi, 10)
    waves = zip(strengths, overtones, phases, strict=True)
    return sum(strength * np.sin(2 * np.pi * base * overtone * time + phase) for strength, overtone, phase in waves)


def clicks(count: int, random: Random) -> np.ndarray:
    """One to five clicks a second, each of which rings for some milliseconds."""
    pulses = np.zeros(count)
    where = random.integers(count, size=1 + round(random.uniform(1, 5) * count / SAMPLE_RATE))
    pulses[where] = random.uniform(-1, 1, len(where))
    time = np.arange(400) / SAMPLE_RATE  # 25 ms
    ring = np.exp(-time / random.uniform(0.0005, 0.005)) * np.cos(2 * np.pi * random.uniform(300, 4000) * time)
    return np.convolve(pulses, ring)[:count]


def room_tone(count: int, random: Random) -> np.ndarray:
    """What a quiet room sounds like: low noise that swells and falls, and a little hum."""
    time = np.arange(count) / SAMPLE_RATE
    swell = 1 + 0.5 * np.sin(2 * np.pi * random.uniform(0.05, 0.5) * time + random.uniform(0, 2 * np.pi))
    noise, mains = coloured_noise(count, random), hum(count, random)
    return noise / noise.std() * swell + random.uniform(0, 0.5) * mains / mains.std()


SOUNDS = [silence, coloured_noise, hum, clicks, room_tone]


class NoSpeech(Sequence):
    """Records of sounds without speech, made when asked for: the same for the same seed and index, in any process.

    Their lengths, in seconds, are drawn from `lengths`. Where there are `files` of background noise, as many clips are
    stretches of these as of any other sound.
    """

    def __init__(self, count: int, lengths: np.ndarray, seed: int, files: Sequence[str] = ()):
        self.seed, self.files = seed, list(files)
        sizes = np.rint(np.random.default_rng(seed).choice(lengths, count) * SAMPLE_RATE).astype(int)
        self.durations = sizes / SAMPLE_RATE

    def __len__(self) -> int:
        return len(self.durations)

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return {"wav": self.samples(index), "txt": "", "where": f"no speech {index + 1}"}

    def samples(self, index: int) -> np.ndarray:
        """Samples (S,) of a clip: a sound at -70 to -20 dB of full scale."""
        random = np.random.default_rng([self.seed, index])
        count, kind = round(self.durations[index] * SAMPLE_RATE), random.integers(len(SOUNDS) + bool(self.files))
        sound = SOUNDS[kind](count, random) if kind < len(SOUNDS) else self.recording(count, random)
        loudness = 10 ** (random.uniform(-70, -20) / 20)  # root mean square
        sound = sound * (loudness / max(np.sqrt(np.mean(sound**2)), 1e-9))
        return sound.clip(-1, 1).astype(np.float32)

    def recording(self, count: int, random: Random) -> np.ndarray:
        """A stretch of one of the files, repeated where it is shorter. Raises BadUtterance."""
        background = load_audio(self.files[random.integers(len(self.files))])
        return np.resize(np.roll(background, -random.integers(len(background))), count)

    def fingerprint(self, count: int | None = None) -> str:
        facts = self.seed, self.files, self.durations[:count].tolist()
        return sha256(str(facts).encode()).hexdigest()


def add(records: Records, data: "DataArguments", seed: int) -> Mixture:
    """The records and, behind them, clips without speech: --no_speech_share of the whole.

    Their lengths are those of the records, up to --max_seconds. The folders of --augment noise:FOLDER lend recordings.
    Prints how many clips there are. Raises InputError.
    """
    share = data.no_speech_share
    if not 0 < share < 1:
        raise InputError(f"--no_speech_share {share}: wanted a share of an epoch, from 0 to below 1")
    lengths = records.durations
    if np.isnan(lengths).all():
        some = np.arange(0, len(records), -(-len(records) // MOST_HEADERS))
        lengths, _ = known_durations(Subset(records, some, lengths[some]))
    lengths = lengths[(lengths > 0) & (lengths <= (data.max_seconds or np.inf))]  # NaN is neither
    if not len(lengths):
        raise InputError(f"--no_speech_share {share}: no record has a known length; wanted audio that can be read")
    folders = [name.split(":")[1] for name in data.augment if name.startswith("noise:")]
    files = [str(path) for folder in folders for path in audio_files(folder)]
    clips = NoSpeech(round(len(records) * share / (1 - share)), lengths.clip(SHORTEST_SECONDS), seed, files)
    told = f"{len(clips):,} clips, {clips.durations.sum() / 3600:.2f} hours"
    say(f"no speech: {told}, {len(clips) / (len(clips) + len(records)):.1%} of an epoch")
    return Mixture([records, clips])
