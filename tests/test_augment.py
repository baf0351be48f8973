"""What augment.py promises: augmentations that change what they say, by the random numbers that they are handed."""

import pickle

import numpy as np
import pytest
import soundfile
from conftest import SAMPLE_RATE, noise

from augment import AUGMENTATIONS, Chain
from errors import InputError


@pytest.fixture
def folder(tmp_path) -> str:
    """Two files of background noise."""
    for number, seconds in enumerate((0.2, 3.0)):
        soundfile.write(tmp_path / f"{number}.wav", noise(seconds, seed=9 + number), SAMPLE_RATE)
    return str(tmp_path)


def energy(samples: np.ndarray, low: float, high: float) -> float:
    """Of the frequencies from low to high, Hz."""
    frequencies = np.fft.rfftfreq(len(samples), 1 / SAMPLE_RATE)
    return float((np.abs(np.fft.rfft(samples))[(frequencies >= low) & (frequencies < high)] ** 2).sum())


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_an_augmentation_is_decided_by_its_random_numbers_and_leaves_its_input_as_it_was(name, folder):
    samples = noise(0.5)
    before, augmentation = samples.copy(), Chain([f"noise:{folder}" if name == "noise" else name])
    augmented = [augmentation(samples, np.random.default_rng(seed)) for seed in [*range(8), *range(8)]]
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


def test_noise_lies_as_far_below_the_speech_as_asked(folder):
    samples = noise(1.0)
    for seed in range(8):
        added = Chain([f"noise:{folder}:10:10"])(samples, np.random.default_rng(seed)) - samples
        assert 10 * np.log10(np.mean(samples**2) / np.mean(added**2)) == pytest.approx(10, abs=0.01)
    assert not Chain([f"noise:{folder}"])(np.zeros(100, np.float32), np.random.default_rng(0)).any()


def test_a_room_keeps_length_and_loudness_and_what_comes_first():
    click = np.zeros(SAMPLE_RATE, np.float32)
    click[100] = 1
    wet = AUGMENTATIONS["room"](click, np.random.default_rng(0))
    assert len(wet) == len(click) and np.linalg.norm(wet) == pytest.approx(1, rel=1e-5)
    assert np.abs(wet[:100]).max() < 1e-6 and np.abs(wet).argmax() == 100
    early, late = np.square(wet[101:1700]).sum(), np.square(wet[-1600:]).sum()
    assert early > 1000 * late  # it dies away


def test_a_telephone_has_nothing_below_300_and_above_3400_hz_but_what_8_bits_bring():
    samples = noise(1.0)
    heard = [AUGMENTATIONS["telephone"](samples, np.random.default_rng(seed)) for seed in range(8)]
    narrow = [other for other in heard if not np.array_equal(other, samples)]
    assert 0 < len(narrow) < 8
    for other in narrow:
        assert energy(other, 3400, 8000) < 0.01 * energy(other, 300, 3400)
        assert energy(other, 300, 3400) == pytest.approx(energy(samples, 300, 3400), rel=0.01)


def test_a_mask_takes_bands_and_stretches_away_and_adds_nothing():
    samples = noise(3.0)
    masked = [AUGMENTATIONS["mask"](samples, np.random.default_rng(seed)) for seed in range(8)]
    assert all(len(other) == len(samples) for other in masked)
    assert all(np.square(other).sum() < np.square(samples).sum() for other in masked)
    assert all((other == 0).sum() > 100 for other in masked)
    assert len(AUGMENTATIONS["mask"](noise(0.01), np.random.default_rng(0))) == 160


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("noise", r"^--augment noise: missing a required argument: 'folder'$"),
        ("noise:nowhere", r"^--augment noise:nowhere: nowhere: wanted a folder with \.wav.* files in it$"),
        ("noise:{folder}:loud", r"^--augment noise:.*:loud: could not convert string to float: 'loud'$"),
        ("gain:3", r"^--augment gain:3: too many positional arguments$"),
    ],
)
def test_wrong_parameters_are_one_line(text, error, folder):
    with pytest.raises(InputError, match=error):
        Chain([text.replace("{folder}", folder)])


def test_parameters_go_to_processes_that_are_started_anew(folder):
    chain = Chain([f"noise:{folder}:1:2", "mask"])
    again, samples = pickle.loads(pickle.dumps(chain)), noise(0.5)
    np.testing.assert_array_equal(*(c(samples, np.random.default_rng(3)) for c in (chain, again)))


def test_several_come_one_after_the_other():
    samples = noise(0.5)
    chained = Chain(["speed", "gain"])(samples, np.random.default_rng(5))
    random = np.random.default_rng(5)
    np.testing.assert_array_equal(chained, AUGMENTATIONS["gain"](AUGMENTATIONS["speed"](samples, random), random))


def test_a_name_that_is_unknown_is_told_the_known_ones():
    with pytest.raises(InputError, match=r"^--augment echo: wanted some of gain, speed, noise, room, telephone, mask$"):
        Chain(["gain", "echo"])
