"""Augmentations of the samples, in training only: --augment NAME [NAME ...].

An augmentation is a function (samples (S,), random) -> samples (S',), and a row in AUGMENTATIONS. The random generator
knows seed, epoch and index of the example, so that the same example sounds the same in any process and after a resume.
"""

from collections.abc import Callable

import numpy as np
import soxr

from errors import InputError
from manifest import SAMPLE_RATE

Augmentation = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def gain(samples: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Up to 10 dB softer or louder."""
    return samples * np.float32(10 ** (random.uniform(-10, 10) / 20))


def speed(samples: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """A tape at 0.9, 1 or 1.1 times its speed: pitch moves too (Ko et al. 2015, Audio augmentation)."""
    factor = random.choice([0.9, 1.0, 1.1])
    return soxr.resample(samples, SAMPLE_RATE * factor, SAMPLE_RATE) if factor != 1 else samples


AUGMENTATIONS: dict[str, Augmentation] = {"gain": gain, "speed": speed}


class Chain:
    """Several augmentations, one after the other. Raises InputError for a name that is not in the table."""

    def __init__(self, names: list[str]):
        unknown = [name for name in names if name not in AUGMENTATIONS]
        if unknown:
            raise InputError(f"--augment {unknown[0]}: wanted some of {', '.join(AUGMENTATIONS)}")
        self.steps = [AUGMENTATIONS[name] for name in names]

    def __call__(self, samples: np.ndarray, random: np.random.Generator) -> np.ndarray:
        for step in self.steps:
            samples = step(samples, random)
        return samples
