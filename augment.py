"""Augmentations of the samples, in training only: --augment NAME [NAME ...], some as NAME:PARAMETER:PARAMETER.

An augmentation is a function (samples (S,), random, parameters as text ...) -> samples (S',), and a row in
AUGMENTATIONS. The random generator knows seed, epoch and index of the example, so that the same example sounds the same
in any process and after a resume.
"""

import inspect
from collections.abc import Callable
from functools import lru_cache, partial

import numpy as np
import soxr

from dataset import load_audio
from errors import InputError
from manifest import SAMPLE_RATE
from sources import audio_files

files_of = lru_cache(audio_files)  # for each clip again
Augmentation = Callable[..., np.ndarray]
Random = np.random.Generator


def gain(samples: np.ndarray, random: Random) -> np.ndarray:
    """Up to 10 dB softer or louder."""
    return samples * np.float32(10 ** (random.uniform(-10, 10) / 20))


def speed(samples: np.ndarray, random: Random) -> np.ndarray:
    """A tape at 0.9, 1 or 1.1 times its speed: pitch moves too (Ko et al. 2015, Audio augmentation)."""
    factor = random.choice([0.9, 1.0, 1.1])
    return soxr.resample(samples, SAMPLE_RATE * factor, SAMPLE_RATE) if factor != 1 else samples


def noise(samples: np.ndarray, random: Random, folder: str, low: str = "5", high: str = "20") -> np.ndarray:
    """A stretch of a file of `folder`, repeated where it is shorter, LOW to HIGH dB below the speech."""
    files = files_of(folder)
    background = load_audio(files[random.integers(len(files))])
    start = random.integers(len(background))
    background = np.resize(np.roll(background, -start), len(samples))
    decibels = random.uniform(float(low), float(high))
    power, noise_power = np.mean(samples**2), np.mean(background**2)
    factor = np.sqrt(power / max(noise_power, 1e-12) / 10 ** (decibels / 10))  # silence stays silence
    return (samples + factor * background).astype(np.float32)


def room(samples: np.ndarray, random: Random) -> np.ndarray:
    """A room whose echo falls by 60 dB in 0.2 to 0.8 s: noise that dies away (Polack's model), behind the direct sound.

    The clip keeps its length, so that the end of its last echo is lost, and its loudness.
    """
    seconds = random.uniform(0.2, 0.8)
    time = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    echo = random.normal(0, 1, len(time)) * 10 ** (-3 * time / seconds)
    echo *= 10 ** (-random.uniform(0, 12) / 20) / np.linalg.norm(echo)  # 0 to 12 dB below the direct sound
    echo[0] = 1.0
    size = len(samples) + len(echo)
    wet = np.fft.irfft(np.fft.rfft(samples, size) * np.fft.rfft(echo, size), size)[: len(samples)]
    return (wet * np.linalg.norm(samples) / max(np.linalg.norm(wet), 1e-12)).astype(np.float32)


def telephone(samples: np.ndarray, random: Random) -> np.ndarray:
    """Half of the time the band of a telephone, 300 to 3400 Hz, in the 8 bits of its mu-law (ITU-T G.711)."""
    if random.random() < 0.5:
        return samples
    narrow = without_band(without_band(samples, 0, 300), 3400, SAMPLE_RATE)
    loudest = max(np.abs(narrow).max(), 1e-12)
    compressed = np.sign(narrow) * np.log1p(255 * np.abs(narrow) / loudest) / np.log(256)  # -1 to 1
    quantised = np.round(compressed * 127) / 127
    return (np.sign(quantised) * np.expm1(np.abs(quantised) * np.log(256)) / 255 * loudest).astype(np.float32)


def mask(samples: np.ndarray, random: Random) -> np.ndarray:
    """SpecAugment (Park et al. 2019, arXiv:1904.08779) on the wave, for encoders of samples too.

    Two bands of up to 27 of 80 mel bins and two stretches of up to 0.4 s, or a fifth of the clip, are silent.
    """
    top = 2595 * np.log10(1 + SAMPLE_RATE / 2 / 700)  # mel
    for _ in range(2):
        width = random.uniform(0, 27 / 80) * top
        low = random.uniform(0, top - width)
        samples = without_band(samples, *(700 * (10 ** (mel / 2595) - 1) for mel in (low, low + width)))
    for _ in range(2):
        width = random.integers(min(round(0.4 * SAMPLE_RATE), len(samples) // 5) + 1)
        start = random.integers(len(samples) - width + 1)
        samples[start : start + width] = 0  # without_band returned a copy
    return samples


def without_band(samples: np.ndarray, low: float, high: float) -> np.ndarray:
    """A copy of samples (S,) without the frequencies from `low` to below `high`, Hz."""
    spectrum = np.fft.rfft(samples)
    frequencies = np.fft.rfftfreq(len(samples), 1 / SAMPLE_RATE)
    spectrum[(frequencies >= low) & (frequencies < high)] = 0
    return np.fft.irfft(spectrum, len(samples)).astype(np.float32)


AUGMENTATIONS: dict[str, Augmentation] = {
    "gain": gain, "speed": speed, "noise": noise, "room": room, "telephone": telephone, "mask": mask,
}  # fmt: skip


class Chain:
    """Several augmentations, one after the other. Raises InputError for a wrong name or wrong parameters."""

    def __init__(self, names: list[str]):
        self.steps = []
        for text in names:
            name, *parameters = text.split(":")
            if name not in AUGMENTATIONS:
                raise InputError(f"--augment {name}: wanted some of {', '.join(AUGMENTATIONS)}")
            try:
                arguments = inspect.signature(AUGMENTATIONS[name]).bind(None, None, *parameters).arguments
                step = partial(AUGMENTATIONS[name], **dict(list(arguments.items())[2:]))  # without samples and random
                step(np.ones(SAMPLE_RATE, np.float32), np.random.default_rng(0))  # a try: are the parameters right?
            except (TypeError, ValueError) as error:
                raise InputError(f"--augment {text}: {error}") from None
            self.steps.append(step)

    def __call__(self, samples: np.ndarray, random: Random) -> np.ndarray:
        for step in self.steps:
            samples = step(samples, random)
        return samples
