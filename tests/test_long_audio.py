"""Long audio: where it is cut, that nothing is lost, its times, and what recognize.py writes of it."""

import json
import re
import sys
import tracemalloc
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import noise, write_manifest

import long_audio
import recognize
from dataset import WINDOW, load_audio
from demo.data import Synthesizer
from errors import InputError
from long_audio import FRAME, EnergyDetector, Recording, SileroDetector, Window, windows_of
from manifest import SAMPLE_RATE, Clip, Hypothesis

SEARCH = "--num_beams 2 --max_new_tokens 12"


@pytest.fixture(autouse=True)
def without_silero(monkeypatch):
    """As where the package is not installed: it would find no speech in bursts of noise."""
    monkeypatch.setitem(sys.modules, "silero_vad", None)
    monkeypatch.setattr(long_audio, "BATCHES", 2)  # several groups of windows in these short recordings


def bursts(lengths: list[float], pauses: list[float], hiss: float = 1e-3) -> tuple[np.ndarray, list[tuple]]:
    """Samples (S,) of bursts of noise, a pause before each and one at the end, and begin and end of each in seconds."""
    random, pieces, times, position = np.random.default_rng(0), [], [], 0.0
    for number, pause in enumerate(pauses):
        pieces.append(np.zeros(round(pause * SAMPLE_RATE), np.float32))
        position += pause
        if number < len(lengths):
            burst = noise(lengths[number], number)  # as loud and soft as syllables
            pieces.append(burst * (0.2 + np.abs(np.sin(np.arange(len(burst)) * 9 / SAMPLE_RATE))).astype(np.float32))
            times.append((position, position + lengths[number]))
            position += lengths[number]
    samples = np.concatenate(pieces)
    return (samples + random.normal(0, hiss, len(samples))).astype(np.float32), times


def cut(audio, start: float = 0.0, end: float | None = None) -> list[Window]:
    return list(windows_of(Recording(Clip(audio, start, end)), EnergyDetector()))


SENTENCES = "the train arrives at nine", "good morning everyone"


def spoken(texts: Sequence[str]) -> tuple[np.ndarray, list[tuple]]:
    """Samples (S,) of sentences with pauses of 2 s around them, and begin and end of each in seconds."""
    speech = [Synthesizer().speak(text, "en-us+m3", 190, 50, 50, 1.0) for text in texts]
    silence, position, times = np.zeros(2 * SAMPLE_RATE, np.float32), 2.0, []
    for samples in speech:
        times.append((position, position + len(samples) / SAMPLE_RATE))
        position = times[-1][1] + 2
    return np.concatenate([silence, *(part for samples in speech for part in (samples, silence))]), times


# Where it is cut


def test_every_burst_is_in_exactly_one_window_and_all_cuts_lie_in_pauses():
    random = np.random.default_rng(1)
    lengths = [0.15, 29, *random.uniform(0.3, 12, 20).tolist()]
    samples, times = bursts(lengths, random.uniform(0.6, 5, 23).tolist())
    windows = cut(samples)
    assert len(windows) == len(times)
    for window, (begin, end) in zip(windows, times, strict=True):
        assert begin - 0.04 <= window.start <= begin + 0.1 and end - 0.1 <= window.end <= end + 0.04
        assert len(window.samples) <= WINDOW
        first = round((window.start - 0.192) * SAMPLE_RATE)  # with 6 frames of the pause on either side
        assert first <= begin * SAMPLE_RATE and first + len(window.samples) >= end * SAMPLE_RATE
        assert (window.samples == samples[max(first, 0) :][: len(window.samples)]).all()


def test_a_short_pause_ends_no_window():
    samples, times = bursts([3, 3, 3], [1, 0.3, 0.7, 1])
    first, second = cut(samples)
    assert first.end > times[1][1] - 0.1 and second.start > times[2][0] - 0.1


def test_speech_without_a_pause_is_cut_at_its_quietest_point_and_nothing_is_lost():
    samples, times = bursts([5.8] * 20, [1, *[0.25] * 19, 1], hiss=0.01)
    windows = cut(samples)
    assert 4 <= len(windows) <= 6
    edges = [end for _, end in times]
    for window in windows:
        assert len(window.samples) <= WINDOW
        assert min(abs(window.end - edge) for edge in edges) < 0.15
    for before, after in pairwise(windows):
        assert 0 <= after.start - before.end <= 0.3  # no burst lies between them, and none is in both
    total = sum(len(window.samples) for window in windows) / SAMPLE_RATE
    assert total <= times[-1][1] - times[0][0] + 0.5  # pauses alone are in two windows, or in none


def test_where_it_is_never_quiet_the_pieces_are_the_whole():
    samples, _ = bursts([70], [0, 0])
    windows = cut(samples)
    assert len(windows) == 3 and max(len(window.samples) for window in windows) <= WINDOW
    assert (np.concatenate([window.samples for window in windows]) == samples).all()


@pytest.mark.parametrize("level", [0, 1e-4, 0.05])
def test_silence_and_steady_noise_have_no_windows(level):
    assert not cut(np.random.default_rng(0).normal(0, level, 100 * SAMPLE_RATE).astype(np.float32))


@pytest.mark.parametrize("seconds", [0.1, 0.5, 2])
def test_a_short_clip_without_a_pause_is_one_window(seconds):
    samples = np.random.default_rng(0).normal(0, 0.1, round(seconds * SAMPLE_RATE)).astype(np.float32)
    (window,) = cut(samples)
    assert (window.start, window.end) == (0, seconds) and (window.samples == samples).all()


def test_a_noise_that_grows_louder_is_learnt():
    """What is noise in the last minute would be speech beside that of the first."""
    random = np.random.default_rng(0)
    samples = np.concatenate([random.normal(0, level, 150 * SAMPLE_RATE) for level in (1e-3, 3e-2)]).astype(np.float32)
    assert max(window.end for window in cut(samples)) < 220


# Reading


@pytest.mark.parametrize("kind", ["mp3", "flac", "wav"])
def test_blocks_of_a_file_are_the_samples_that_are_read_at_once(kind, tmp_path):
    path = tmp_path / f"stereo.{kind}"
    soundfile.write(path, np.stack([noise(100, 1), noise(100, 2)], 1)[: 44100 * 33], 44100)
    for start, end in ((0.0, None), (1.25, 30.5)):
        blocks = list(Recording(Clip(path, start, end)).blocks())
        wanted = load_audio(path, start, end)
        assert max(map(len, blocks)) <= 1000 * FRAME
        np.testing.assert_allclose(np.concatenate(blocks), wanted, atol=1e-5)


def test_memory_does_not_grow_with_the_length_of_a_file(tmp_path):
    peaks, minute = [], bursts([8, 20, 3], [1, 4, 2, 2])[0]
    for count in (3, 12):
        with soundfile.SoundFile(tmp_path / "long.wav", "w", 8000, 1) as file:
            for _ in range(count):
                file.write(minute)  # of 80 s, at half its rate
        detector = EnergyDetector()
        tracemalloc.start()
        num_windows = sum(1 for _ in windows_of(Recording(Clip(tmp_path / "long.wav")), detector))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert num_windows >= 3 * count
    assert peaks[1] < 1.05 * peaks[0] < 40e6  # bytes; the samples of the longer one are 61 MB


def broken(tmp_path: Path, kind: str) -> Path:
    """20 s of noise in a file that is cut short in the middle, or whose header says no length, as pipes have it."""
    path = tmp_path / f"{kind}.{kind.rpartition('_')[2]}"
    soundfile.write(path, noise(20), SAMPLE_RATE)
    content = bytearray(path.read_bytes())
    if kind == "pipe_wav":
        content[4:8] = content[40:44] = b"\xff" * 4
    path.write_bytes(content if kind == "pipe_wav" else content[: len(content) // 2])
    return path


@pytest.mark.parametrize("kind", ["cut_wav", "cut_flac", "cut_mp3"])
def test_of_a_file_that_is_cut_short_all_that_is_there_is_read_and_it_is_said(kind, tmp_path):
    recording = Recording(Clip(broken(tmp_path, kind)))
    assert sum(map(len, recording.blocks())) / SAMPLE_RATE == pytest.approx(10, abs=1.5)
    assert re.search(r"cut_\w+\.\w+: .*; read \d+\.\d\d s$", recording.problem)


def test_a_wav_header_without_a_length_is_no_problem(tmp_path):
    recording = Recording(Clip(broken(tmp_path, "pipe_wav")))
    assert sum(map(len, recording.blocks())) == 20 * SAMPLE_RATE and recording.problem is None


# Decoding


@pytest.fixture(scope="module")
def long_wav(tmp_path_factory) -> Path:
    """80 s with nine bursts, of which one is 33 s long with a short pause in it."""
    lengths = [2, 0.4, 5, 27, 6, 1, 3, 0.2, 4]
    path = tmp_path_factory.mktemp("long") / "long.wav"
    soundfile.write(path, bursts(lengths, [1, 2, 3, 1.5, 0.3, 4, 0.8, 5, 2, 1])[0], SAMPLE_RATE)
    return path


@pytest.fixture(scope="module")
def long_result(recogniser, long_wav, tmp_path_factory) -> list[dict]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "silero_vad", None)
        with pytest.warns(UserWarning):
            return recogniser.transcribe(str(long_wav), timestamps=True, num_beams=2, max_new_tokens=12)


@pytest.mark.filterwarnings("ignore")
def test_each_segment_is_what_its_window_gives_alone(recogniser, long_wav, long_result):
    windows = cut(long_wav)
    texts = recogniser.transcribe([window.samples for window in windows], batch_size=1, num_beams=2, max_new_tokens=12)
    wanted = [
        {"start": round(window.start, 3), "end": round(window.end, 3), "text": text}
        for window, text in zip(windows, texts, strict=True)
        if text
    ]
    assert len(wanted) > 5
    plain = [{k: v for k, v in segment.items() if k != "problem"} for segment in long_result if segment["text"]]
    assert plain == wanted


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("batch_size", [1, 3])
def test_batches_change_no_segment(recogniser, long_wav, long_result, batch_size):
    options = {"timestamps": True, "num_beams": 2, "max_new_tokens": 12}
    first, second = recogniser.transcribe([str(long_wav)] * 2, batch_size, **options)
    assert first == long_result and [segment["text"] for segment in second] == [s["text"] for s in long_result]


def test_without_silero_vad_it_says_so(recogniser, long_wav):
    with pytest.warns(UserWarning, match="silero-vad is not installed: pauses are found by energy"):
        recogniser.transcribe(str(long_wav), timestamps=True, num_beams=1, max_new_tokens=2)


@pytest.fixture(scope="module")
def manifest(world, trained, long_wav, tmp_path_factory) -> Path:
    """Short clips, the long one, a stretch of it, one with a prompt, a missing one, a conversation, and silence."""
    folder = tmp_path_factory.mktemp("manifest")
    soundfile.write(folder / "silence.wav", np.zeros(5 * SAMPLE_RATE), SAMPLE_RATE)
    turns = [{"role": "user", "content": "<audio>", "audio": [str(long_wav)]}]
    rows = [{"wav": str(world / f"clip{number}.wav"), "txt": "hello"} for number in range(4)]
    rows += [{"wav": str(long_wav)}, {"wav": str(long_wav), "start": 4.5, "end": 40}]
    rows += [{"wav": str(long_wav), "prompt": "<audio> What was said?"}, {"wav": "nowhere.wav"}, {"messages": turns}]
    return write_manifest(folder / "long.jsonl", [*rows, {"wav": "silence.wav"}])


@pytest.fixture(scope="module")
def rows(manifest, call) -> list[dict]:
    """The result of the manifest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "silero_vad", None)
        call(recognize.main, f"{decode_flags(manifest)} --result_path {manifest.parent}/result.jsonl")
    return read(manifest.parent / "result.jsonl")


def decode_flags(manifest: Path) -> str:
    return f"--model_path trained {SEARCH} --timestamps --num_workers 0 --data_path {manifest}"


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_manifest_with_long_audio_gives_segments_in_each_row(rows, long_result):
    assert [list(row)[:4] for row in rows] == [["key", "wav", "txt", "pred"]] * len(rows)
    times = [(segment["start"], segment["end"]) for segment in rows[4]["segments"]]
    assert len(times) >= 5 and times == sorted(times)
    for row in rows:
        assert row["pred"] == " ".join(segment["text"] for segment in row["segments"] if segment["text"])
    assert rows[4]["pred"] and rows[4]["pred"] != rows[6]["pred"]  # the prompt came through
    starts = [segment["start"] for segment in rows[5]["segments"]]
    assert min(starts) > 4.5 and max(starts) < 40  # seconds of the file
    assert (rows[9]["pred"], rows[9]["segments"], rows[9]["problem"]) == ("", [], None)


def test_what_cannot_be_decoded_has_an_empty_row_and_a_reason(rows):
    assert rows[7]["pred"] == rows[8]["pred"] == ""
    assert "long.jsonl:8: " in rows[7]["problem"] and "nowhere.wav: no such file" in rows[7]["problem"]
    assert "long.jsonl:9: a conversation" in rows[8]["problem"]


def test_a_result_in_pieces_outlives_a_kill_of_two_processes(monkeypatch, trained, call, launch, tmp_path):
    monkeypatch.undo()  # processes take silero-vad where it is installed
    rows = [{"wav": f"speech{number}.wav"} for number in range(4)]
    for row, texts in zip(rows, (SENTENCES, SENTENCES[:1], SENTENCES[::-1], SENTENCES[1:]), strict=True):
        soundfile.write(tmp_path / row["wav"], spoken(texts)[0], SAMPLE_RATE)
    flags = f"{decode_flags(write_manifest(tmp_path / 'speech.jsonl', rows))} --batch_size"
    call(recognize.main, f"{flags} 5 --result_path {tmp_path}/whole.jsonl")
    launch("recognize.py", f"{flags} 2 --result_path {tmp_path}/killed.jsonl", processes=2, die_at=1).died()
    assert "going on: " in call(recognize.main, f"{flags} 3 --result_path {tmp_path}/killed.jsonl").err
    assert [len(row["segments"]) for row in read(tmp_path / "whole.jsonl")] == [2, 1, 2, 1]
    assert read(tmp_path / "killed.jsonl") == read(tmp_path / "whole.jsonl")


# Texts


HYPOTHESIS = Hypothesis(
    0,
    "one two < three",
    segments=[
        {"start": 0.4, "end": 2.5, "text": "one"},
        {"start": 59.9996, "end": 61, "text": "", "problem": "clip 1: no end"},
        {"start": 3599.9996, "end": 36000.5, "text": "two < three"},
    ],
)


def test_srt_and_vtt_are_as_players_want_them():
    assert long_audio.srt("a.wav", HYPOTHESIS) == (
        "1\n00:00:00,400 --> 00:00:02,500\none\n\n2\n01:00:00,000 --> 10:00:00,500\ntwo < three\n\n"
    )
    assert long_audio.vtt("a.wav", HYPOTHESIS) == (
        "WEBVTT\n\n00:00:00.400 --> 00:00:02.500\none\n\n01:00:00.000 --> 10:00:00.500\ntwo &lt; three\n\n"
    )
    assert long_audio.txt("a.wav", HYPOTHESIS) == "one\ntwo < three\n"


@pytest.mark.filterwarnings("ignore")
def test_the_command_prints_one_file_and_writes_several(trained, long_wav, call, tmp_path):
    soundfile.write(tmp_path / "silence.wav", np.zeros(3 * SAMPLE_RATE), SAMPLE_RATE)
    flags = f"--model_path trained {SEARCH} --format"
    row = json.loads(call(recognize.main, f"{flags} json {long_wav}").out)
    assert row["wav"] == str(long_wav) and row["text"] and len(row["segments"]) >= 5
    screen = call(recognize.main, f"{flags} srt --output_dir {tmp_path}/out {long_wav} {tmp_path}/silence.wav")
    assert screen.out == "" and "RTF=" in screen.err and "s of audio" in screen.err
    assert (tmp_path / "out/long.srt").read_text() == long_audio.srt("", Hypothesis(0, "", segments=row["segments"]))
    assert (tmp_path / "out/silence.srt").read_text() == ""
    assert call(recognize.main, f"{flags} vtt {tmp_path}/silence.wav").out == "WEBVTT\n\n"
    (tmp_path / "short.wav").write_bytes(long_wav.read_bytes()[: 44 + 2 * SAMPLE_RATE // 10])
    with pytest.raises(InputError, match=r"short\.wav: cut off"):
        call(recognize.main, f"{flags} txt {tmp_path}/short.wav")


@pytest.mark.filterwarnings("ignore")
def test_a_missing_file_and_one_cut_short_are_said_at_the_end_and_all_else_is_written(
    trained, call, tmp_path, long_wav
):
    files = f"{tmp_path}/nowhere.wav {broken(tmp_path, 'cut_wav')} {long_wav}"
    with pytest.raises(InputError) as error:
        call(recognize.main, f"--model_path trained {SEARCH} --format txt --output_dir {tmp_path}/out {files}")
    assert re.search(r"audio 1: \S+nowhere.wav: no such file.*; audio 2: \S+cut_wav.wav: cut off", str(error.value))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"cut_wav.txt", "long.txt"}


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("a.wav b.wav --format srt", "--format srt: found 2 audio files; wanted one, or --output_dir"),
        ("a/x.wav b/x.wav --format srt --output_dir out", "out/x.srt would be written twice"),
        ("a.wav --format srt --output_dir corpus.jsonl", "--output_dir corpus.jsonl: "),
        ("a.wav --format srt --nbest 2", "--format json"),
    ],
)
def test_wrong_flags_are_told_in_a_line_before_the_model_is_loaded(flags, told, world, call):
    with pytest.raises(InputError, match=re.escape(told)):
        call(recognize.main, f"--model_path nowhere {flags}")


@pytest.mark.parametrize(
    "flags", ["a.wav --timestamps", "a.wav --output_dir b", "--data_path a --result_path b --format srt"]
)
def test_flags_that_do_not_go_together_end_with_status_2(flags, capsys):
    with pytest.raises(SystemExit):
        recognize.main(f"--model_path nowhere {flags}".split())
    assert "wanted --format" in capsys.readouterr().err


def test_samples_are_refused(recogniser):
    with pytest.raises(InputError, match="wanted no --do_sample"):
        recogniser.transcribe(noise(2), timestamps=True, do_sample=True)


# silero-vad


def test_silero_vad_finds_speech_in_noise_that_is_10_db_below_it(monkeypatch):
    monkeypatch.undo()
    pytest.importorskip("silero_vad")
    num_threads = torch.get_num_threads()
    samples, times = spoken(SENTENCES)
    level = np.sqrt(np.mean(samples[np.abs(samples) > 0] ** 2)) * 10 ** (-10 / 20)
    noisy = (samples + np.random.default_rng(0).normal(0, level, len(samples))).astype(np.float32)
    windows = list(windows_of(Recording(Clip(noisy)), SileroDetector()))
    assert torch.get_num_threads() == num_threads
    assert [window.start for window in windows] == pytest.approx([start for start, _ in times], abs=0.3)
    assert [window.end for window in windows] == pytest.approx([end for _, end in times], abs=0.4)
