"""What augment.py promises: augmentations that change what they say, by the random numbers that they are handed."""

import numpy as np
import pytest
from conftest import SAMPLE_RATE, noise

from augment import AUGMENTATIONS, Chain
from errors import InputError


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_an_augmentation_is_decided_by_its_random_numbers_and_leaves_its_input_as_it_was(name):
    samples = noise(0.5)
    before = samples.copy()
    augmented = [AUGMENTATIONS[name](samples, np.random.default_rng(seed)) for seed in [*range(8), *range(8)]]
    for once, again in zip(augmented[:8], augmented[8:], strict=True):
        np.testing.assert_array_equal(once, again)
    assert len({(len(result), float(result[100])) for result in augmented}) > 1
    assert all(result.dtype == np.float32 and result.ndim == 1 for result in augmented)
    np.testing.assert_array_equal(samples, before)


def test_gain_is_10_db_at_most_and_the_same_for_all_samples():
    samples = noise(0.5)
    for seed in range(20):
        ratio = AUGMENTATIONS["gain"](samples, np.random.default_rng(seed)) / samples
        assert np.ptp(ratio) < 1e-5
        assert abs(20 * np.log10(ratio[0])) <= 10


def test_speed_changes_length_and_pitch_together():
    tone = np.sin(2 * np.pi * 1000 * np.arange(SAMPLE_RATE) / SAMPLE_RATE).astype(np.float32)  # 1 s
    factors = set()
    for seed in range(20):
        samples = AUGMENTATIONS["speed"](tone, np.random.default_rng(seed))
        factor = round(SAMPLE_RATE / len(samples), 3)
        pitch = np.abs(np.fft.rfft(samples)).argmax() * SAMPLE_RATE / len(samples)
        assert pitch == pytest.approx(1000 * factor, abs=2)
        factors.add(factor)
    assert factors == {0.9, 1, 1.1}


def test_several_come_one_after_the_other():
    samples = noise(0.5)
    chained = Chain(["speed", "gain"])(samples, np.random.default_rng(5))
    random = np.random.default_rng(5)
    np.testing.assert_array_equal(chained, AUGMENTATIONS["gain"](AUGMENTATIONS["speed"](samples, random), random))


def test_a_name_that_is_unknown_is_told_the_known_ones():
    with pytest.raises(InputError, match=r"^--augment echo: wanted some of gain, speed$"):
        Chain(["gain", "echo"])
