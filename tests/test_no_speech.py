"""What no_speech.py promises: an exact share of silence and noise, on which the model learns to say nothing."""

import os
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from conftest import SAMPLE_RATE, TRAIN_FLAGS, noise
from runs import error_of
from torch.utils.data import DataLoader

import no_speech
import train
from dataset import IGNORE, collate
from errors import InputError
from no_speech import SOUNDS, NoSpeech, add
from sources import RecordList

FLAGS = f"{TRAIN_FLAGS} --data_path corpus.jsonl --no_speech_share 0.2 --per_device_train_batch_size 5"


def data(share: float, **values) -> SimpleNamespace:
    """What train.py's flags say."""
    return SimpleNamespace(**{"no_speech_share": share, "max_seconds": 30, "augment": []} | values)


def records(*seconds: float) -> RecordList:
    return RecordList({"wav": "a.wav", "txt": "hello"} | ({} if np.isnan(s) else {"duration": s}) for s in seconds)


@pytest.fixture(scope="module")
def clips() -> NoSpeech:
    return NoSpeech(60, np.array([1.0, 0.5]), seed=3)


@pytest.mark.parametrize(("share", "count"), [(0.1, 90), (0.25, 30), (0.5, 7), (0.9, 2), (0.001, 999), (1 / 3, 100)])
def test_the_share_is_that_of_the_clips_in_an_epoch(share, count):
    mixture = add(records(*[1.0] * count), data(share), seed=0)
    num_clips = sum(record["txt"] == "" for record in mixture)
    assert num_clips / len(mixture) == pytest.approx(share, abs=0.5 / len(mixture))
    assert len(mixture) - num_clips == count  # each record comes, as before


def test_lengths_are_drawn_from_those_of_the_records_that_are_known_and_allowed():
    mixture = add(records(1, 1, 1, 3, np.nan, 50, 0.1), data(0.99), seed=0)
    lengths = mixture.durations[7:]
    assert set(lengths) == {0.5, 1, 3}  # half a second is the least
    assert np.mean(lengths == 1) == pytest.approx(3 / 5, abs=0.1)


def test_where_no_record_states_its_length_headers_tell_it(tmp_path):
    soundfile.write(tmp_path / "a.wav", noise(1.25), SAMPLE_RATE)
    rows = [{"wav": str(tmp_path / name), "txt": "hello"} for name in ("a.wav", "missing.wav")]
    assert set(add(RecordList(rows), data(0.5), seed=0).durations[2:]) == {1.25}
    with pytest.raises(InputError, match="no record has a known length"):
        add(RecordList(rows[1:]), data(0.5), seed=0)


@pytest.mark.parametrize("share", [1, -0.1, 2, float("nan")])
def test_a_share_that_is_none_is_wrong_input(share):
    with pytest.raises(InputError, match=r"--no_speech_share \S+: wanted a share of an epoch, from 0 to below 1"):
        add(records(1), data(share), seed=0)


def test_a_clip_is_samples_of_its_length_without_a_transcript(clips):
    for index, record in enumerate(clips):
        samples = record["wav"]
        assert len(samples) / SAMPLE_RATE == clips.durations[index] and samples.dtype == np.float32
        assert record["txt"] == "" and record["where"] == f"no speech {index + 1}"
        assert np.isfinite(samples).all() and np.abs(samples).max() <= 1
        assert np.sqrt(np.mean(samples**2)) <= 10 ** (-20 / 20) + 1e-6  # no louder than -20 dB of full scale
    with pytest.raises(IndexError):
        clips[60]


def test_there_are_silence_noise_hum_clicks_and_rooms_at_many_levels(clips, monkeypatch):
    levels = np.array([np.sqrt(np.mean(record["wav"] ** 2)) for record in clips])
    assert 5 <= (levels == 0).sum() <= 20  # digital silence: one kind of five
    decibels = 20 * np.log10(levels[levels > 0])
    assert decibels.min() < -60 and decibels.max() > -30
    for sound in SOUNDS:
        heard = [sound(8000, np.random.default_rng(seed)) for seed in (0, 0, 1)]
        np.testing.assert_array_equal(heard[0], heard[1])
        assert sound is no_speech.silence or not np.array_equal(heard[0], heard[2])


def test_the_colours_of_noise_fall_with_the_frequency_as_they_are_named():
    slopes = set()
    for seed in range(12):
        power = np.abs(np.fft.rfft(no_speech.coloured_noise(SAMPLE_RATE, np.random.default_rng(seed)))) ** 2
        octaves = [power[low : 2 * low].mean() for low in (100, 200, 400, 800, 1600, 3200)]  # Hz
        slopes.add(round(-np.polyfit(range(6), np.log2(octaves), 1)[0]))
    assert slopes == {0, 1, 2}


def test_hum_has_the_frequency_of_the_mains_and_its_multiples():
    power = np.abs(np.fft.rfft(no_speech.hum(SAMPLE_RATE, np.random.default_rng(0)))) ** 2  # 1 Hz each
    base = next(base for base in (50, 60) if power[base] > 1)
    assert power[base::base][:10].sum() > 0.999 * power.sum()


def test_a_clip_is_the_same_in_any_process_and_another_for_another_seed(clips):
    again, other = pickle.loads(pickle.dumps(clips)), NoSpeech(60, np.array([1.0, 0.5]), seed=4)
    elsewhere = DataLoader(again, None, sampler=range(59, -1, -1), num_workers=2)  # two processes, the last clip first
    for index, record in zip(range(59, -1, -1), elsewhere, strict=True):
        np.testing.assert_array_equal(record["wav"], clips[index]["wav"])
    assert any(not np.array_equal(other[index]["wav"], clips[index]["wav"]) for index in range(60))
    assert other.fingerprint() != clips.fingerprint() == again.fingerprint()
    assert len({clip["wav"].tobytes() for clip in clips}) > 40  # all but the silent ones


def test_files_of_background_noise_lend_stretches(tmp_path):
    time = np.arange(SAMPLE_RATE // 2) / SAMPLE_RATE
    soundfile.write(tmp_path / "tone.wav", np.sin(2 * np.pi * 1000 * time), SAMPLE_RATE)  # half a second
    mixture = add(records(*[2.0] * 30), data(0.5, augment=["gain", f"noise:{tmp_path}:5:20"]), seed=0)
    pitches = [np.abs(np.fft.rfft(mixture[index]["wav"])).argmax() / 2 for index in range(30, 60)]
    assert 2 <= pitches.count(1000) <= 10  # of six kinds one
    with pytest.raises(InputError, match="wanted a folder with"):
        add(records(1), data(0.5, augment=["noise:nowhere"]), seed=0)


def test_only_the_end_token_of_such_a_clip_is_trained(model):
    dataset = model.make_dataset(add(records(1.0), data(0.75), seed=0), max_seconds=30)
    examples = [dataset[position] for position in (1, 2, 3)]
    end_id = model.tokenizer.eos_token_id
    assert [example["target_ids"] for example in examples] == [[end_id]] * 3
    labels = collate(examples)["labels"]
    assert labels[labels != IGNORE].tolist() == [end_id] * 3


def test_a_model_learns_to_say_nothing_where_nobody_speaks(chinese_llm, world, call, tmp_path):
    """All of it trained, on much silence: the clips that made it talk before have an empty transcript."""
    from model import SpeechLLM

    flags = FLAGS.replace("0.2", "0.5") + f" --output_dir {tmp_path} --learning_rate 1e-2 --num_train_epochs 5"
    screen = call(train.main, f"{flags} --freeze_params ^encoder")
    assert "no speech: 20 clips, " in screen.out and ", 50.0% of an epoch\n" in screen.out
    before = os.getcwd()
    os.chdir(world)
    try:
        trained_model = SpeechLLM.from_pretrained(tmp_path)
    finally:
        os.chdir(before)
    clips = [NoSpeech(8, np.array([1.5]), seed=99)[index]["wav"] for index in range(8)]
    texts = trained_model.transcribe(clips, num_beams=1, max_new_tokens=4)
    assert texts.count("") >= 7, texts


def test_a_run_says_how_many_and_goes_on_where_data_are_appended(chinese_llm, world, call, tmp_path):
    rows = (world / "corpus.jsonl").read_text().replace('"wav": "', f'"wav": "{world}/').splitlines(keepends=True)
    (tmp_path / "grows.jsonl").write_text("".join(rows[:12]))
    flags = FLAGS.replace("corpus.jsonl", f"{tmp_path}/grows.jsonl") + f" --output_dir {tmp_path}/run "
    flags += "--save_strategy epoch --dataloader_num_workers 2 --num_train_epochs"
    assert "no speech: 3 clips, " in call(train.main, f"{flags} 1").out
    (tmp_path / "grows.jsonl").write_text("".join(rows))
    out = call(train.main, f"{flags} 2").out
    assert "no speech: 5 clips, " in out and "num_records was 12, is 20\n" in out
    assert "no_speech_share was 0.2 and is 0.3" in error_of(call, f"{flags} 2 --no_speech_share 0.3")
