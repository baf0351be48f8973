"""What dataset.py promises: the manifest's checks, audio, features, prompts, batches and their order."""

import json
import pickle
import re
import struct
import tracemalloc
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import whisper
from accelerate.data_loader import BatchSamplerShard
from conftest import CHATML, make_tokenizer, write_manifest
from transformers import WhisperFeatureExtractor

from audio import load_audio
from dataset import IGNORE, WINDOW, SpeechDataset, collate
from encoders import extract
from manifest import SAMPLE_RATE, BadUtterance, InputError, Manifest, clips, record_key, reference, run
from prompt import AUDIO, SPEECH, render_prompt
from sampler import LengthSampler

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (  # no header before an answer, and no system prompt
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}</s>"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
USER = [{"role": "user", "content": f"{AUDIO}\nTranscribe the speech"}]
LINE = {"wav": "a.wav", "txt": "hello"}


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, round(seconds * SAMPLE_RATE)).astype(np.float32)


def write_noise(path: Path, seconds: float, seed: int = 0) -> str:
    soundfile.write(path, noise(seconds, seed), SAMPLE_RATE, subtype="FLOAT")
    return str(path)


EMBEDDINGS = (np.arange(WINDOW + 1) + 1) // 2 // 5  # of so many feature frames


def make_dataset(records, tokenizer=None, num_mels=80, pad_to_30s=False, **options) -> SpeechDataset:
    take = partial(extract, WhisperFeatureExtractor(num_mels), pad_to_30s=pad_to_30s)
    return SpeechDataset(records, tokenizer or make_tokenizer(), take, EMBEDDINGS, **options)


def log_mel(samples: np.ndarray, num_mels=80, pad_to_30s=False) -> list[torch.Tensor]:
    return make_dataset([], num_mels=num_mels, pad_to_30s=pad_to_30s).windows(samples)


@pytest.fixture
def four(tmp_path) -> Manifest:
    """Lines 1 and 4 are good; the file of line 2 does not exist, that of line 3 turns out bad when it is read."""
    soundfile.write(tmp_path / "good.wav", noise(1), SAMPLE_RATE)
    soundfile.write(tmp_path / "nan.wav", np.full(8000, np.nan), SAMPLE_RATE, subtype="FLOAT")
    names = ["good.wav", "missing.wav", "nan.wav", "good.wav"]
    return Manifest(write_manifest(tmp_path / "four.jsonl", [{"wav": name, "txt": "hello"} for name in names]))


# The manifest


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ('{"wav": "a.wav", "txt": ', "malformed JSON"),
        ("", "a blank line; wanted one JSON object"),
        ('{"wav": "a.wav", "txt": "\\ud800"}', "malformed JSON .*surrogates"),
        ('{"wav": "a.wav", "txt": "a", "key": ' + 9999 * "[" + 9999 * "]" + "}", "malformed JSON .*recursion"),
        ('["a.wav", "hello"]', "wanted a JSON object"),
        ("null", "wanted a JSON object"),
        ('{"wav": "a.wav"}', r"missing \['txt'\]"),
        ('{"txt": "hello"}', r"missing \['wav'\]"),
        ('{"wav": "a.wav", "txt": null}', r"missing \['txt'\]"),
        ('{"wav": 3, "txt": "hello"}', "'wav' is 3; wanted a str"),
        ('{"wav": "a.wav", "txt": ["hello"]}', r"'txt' is \[\"hello\"\]; wanted a str"),
        ('{"wav": "a.wav", "txt": "hello", "prompt": 1}', "'prompt' is 1; wanted a str"),
        ('{"wav": "a.wav", "txt": "hello", "key": {}}', "'key' is {}; wanted text"),
        ('{"wav": "a.wav", "txt": "hello", "end": "2"}', "'end' is \"2\"; wanted seconds"),
        ('{"wav": "a.wav", "txt": "hello", "end": NaN}', "'end' is NaN; wanted seconds"),
        ('{"wav": "a.wav", "txt": "hello", "end": ' + 400 * "9" + "}", "'end' is 9{40}; wanted seconds"),
        ('{"wav": "a.wav", "txt": "hello", "start": true}', "'start' is true; wanted seconds"),
        ('{"wav": "a.wav", "txt": "hello", "start": -1}', "'start' is -1; wanted seconds, 0 or more"),
        ('{"wav": "a.wav", "txt": "hello", "duration": "long"}', "'duration' is \"long\"; wanted seconds"),
        ('{"wav": "a.wav", "txt": "hello", "duration": -3}', "'duration' is -3; wanted seconds"),
        ('{"wav": "a.wav", "txt": "hello", "start": 2, "end": 1}', "start 2 and end 1; wanted start < end"),
        ('{"messages": "hello"}', "'messages' is \"hello\"; wanted a list"),
        ('{"messages": []}', "the last of 'messages' is not the assistant's"),
        ('{"messages": [{"role": "user", "content": "hello"}]}', "the last of 'messages' is not the assistant's"),
        ('{"messages": ["hello"]}', "hello in the conversation; wanted"),
        (
            '{"messages": [{"role": "user"}, {"role": "assistant", "content": "hello"}]}',
            "in the conversation; wanted .*'content'",
        ),
        ('{"messages": [{"role": "user", "content": 3}, {"role": "assistant", "content": "hello"}]}', "'content'"),
        ('{"messages": [{"role": "user", "content": null}, {"role": "assistant", "content": "hello"}]}', "'content'"),
        (
            '{"messages": [{"role": "user", "content": "<audio>", "audio": "a.wav"}, '
            '{"role": "assistant", "content": "hello"}]}',
            "wanted .*'audio'",
        ),
        (
            '{"messages": [{"role": "user", "content": "<audio> <audio>", "audio": ["a.wav"]}, '
            '{"role": "user", "content": "and", "audio": ["b.wav"]}, {"role": "assistant", "content": "hello"}]}',
            "2 <audio> in a turn with 1 audio clips",
        ),
    ],
)
def test_a_bad_line_is_reported_with_the_manifests_path_and_its_number(tmp_path, line, wanted):
    path = tmp_path / "train.jsonl"
    path.write_text(f"{json.dumps(LINE)}\n{line}\n{json.dumps(LINE)}\n")
    with pytest.raises(InputError, match=f"^{re.escape(str(path))}:2: .*{wanted}") as error:
        Manifest(path)
    assert "\n" not in str(error.value)


def test_a_blank_line_at_the_end_is_an_error_for_every_line_has_a_hypothesis(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text(f"{json.dumps(LINE)}\n\n")
    with pytest.raises(InputError, match="jsonl:2: a blank line"):
        Manifest(path)


def test_the_end_of_the_last_line_may_be_missing(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text(f"{json.dumps(LINE)}\n{json.dumps({**LINE, 'txt': 'last'})}")
    assert [record["txt"] for record in Manifest(path)] == ["hello", "last"]


def test_lines_may_end_as_on_windows_and_the_file_may_start_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + f"{json.dumps(LINE)}\r\n{json.dumps(LINE)}\r\n".encode())
    assert [record["txt"] for record in Manifest(path)] == ["hello", "hello"]


def test_bytes_that_are_not_utf8_are_reported_with_their_line(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(f"{json.dumps(LINE)}\n".encode() + '{"wav": "a.wav", "txt": "schön"}\n'.encode("latin-1"))
    with pytest.raises(InputError, match="jsonl:2: "):
        Manifest(path)


def test_a_missing_and_an_empty_manifest_are_errors_that_name_it(tmp_path):
    with pytest.raises(InputError, match=r"no\.jsonl: no such manifest"):
        Manifest(tmp_path / "no.jsonl")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(InputError, match=r"empty\.jsonl: the manifest is empty"):
        Manifest(tmp_path / "empty.jsonl")


def test_a_transcript_is_needed_only_where_it_is_used(tmp_path):
    asked = {"messages": [{"role": "user", "content": AUDIO, "audio": ["a.wav"]}]}
    path = write_manifest(tmp_path / "test.jsonl", [{"wav": "a.wav"}, asked])
    assert [reference(record) for record in Manifest(path, needs_text=False)] == [None, None]


def test_text_keeps_every_character_of_every_script(tmp_path):
    texts = ["你好,世界", "naïve 😀", "شكرا", "line\u2028separator and \u0085 next line"]
    manifest = Manifest(write_manifest(tmp_path / "train.jsonl", [{"wav": "a.wav", "txt": text} for text in texts]))
    assert [record["txt"] for record in manifest] == texts


def test_relative_paths_are_relative_to_the_manifest_and_absolute_ones_are_kept(tmp_path):
    path = write_manifest(tmp_path / "train.jsonl", [{**LINE, "wav": "wavs/a.wav"}, {**LINE, "wav": "/data/a.wav"}])
    paths = [clips(record)[0][0] for record in Manifest(path)]
    assert paths == [tmp_path / "wavs/a.wav", Path("/data/a.wav")]


def test_a_line_may_have_keys_of_its_own_whatever_their_names(tmp_path):
    manifest = Manifest(write_manifest(tmp_path / "train.jsonl", [{**LINE, "folder": "train", "where": "Paris"}]))
    assert clips(manifest[0])[0][0] == tmp_path / "a.wav"
    assert manifest[0]["where"] == f"{tmp_path / 'train.jsonl'}:1"


def test_the_id_of_a_line_is_its_key_else_its_file_else_its_number(tmp_path):
    asked = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    rows = [{**LINE, "key": "one"}, {**LINE, "wav": "wavs/two.flac"}, asked]
    manifest = Manifest(write_manifest(tmp_path / "train.jsonl", rows))
    assert [record_key(record) for record in manifest] == ["one", "two", "line3"]


def test_durations_come_from_the_segment_then_from_the_key_and_are_else_unknown(tmp_path):
    extra = [{"duration": 2.5}, {"start": 1, "end": 1.5, "duration": 9}, {"end": 3}, {"start": 1}, {"duration": None}]
    manifest = Manifest(write_manifest(tmp_path / "train.jsonl", [{**LINE, **keys} for keys in extra]))
    np.testing.assert_array_equal(manifest.durations, [2.5, 0.5, 3, np.nan, np.nan])


def test_durations_that_no_line_states_are_read_from_the_audio(tmp_path):
    soundfile.write(tmp_path / "a.wav", noise(2), SAMPLE_RATE)
    extra = [{}, {"start": 0.5}, {"start": 0.5, "end": 0.75}, {"duration": 1.25}]
    path = write_manifest(tmp_path / "train.jsonl", [{**LINE, **keys} for keys in extra])
    np.testing.assert_allclose(make_dataset(Manifest(path)).durations, [2, 1.5, 0.25, 1.25])


def test_a_manifest_takes_a_few_bytes_of_memory_for_a_line_and_pickles_small(tmp_path):
    lines = 10_000
    path = write_manifest(tmp_path / "train.jsonl", [{**LINE, "txt": "hello " * 20, "duration": 1.5}] * lines)
    tracemalloc.start()
    manifest = Manifest(path)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 20 * lines + 2000
    assert peak < 50 * lines
    assert len(pickle.dumps(manifest)) < 16 * lines + 2000
    assert pickle.loads(pickle.dumps(manifest))[lines - 1]["where"] == f"{path}:{lines}"


def test_a_dataset_takes_a_few_bytes_of_memory_for_a_line_also_while_it_is_made(tmp_path):
    soundfile.write(tmp_path / "a.wav", noise(0.5), SAMPLE_RATE)
    lines = 5000
    manifest = Manifest(write_manifest(tmp_path / "train.jsonl", [{**LINE, "duration": 0.5}] * lines))
    tokenizer = make_tokenizer()
    tracemalloc.start()
    dataset = make_dataset(manifest, tokenizer)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(dataset) == lines
    assert held < 30 * lines + 100_000
    assert peak < 100 * lines + 200_000  # a future for each line would be over 1000 bytes


# Audio


@pytest.mark.parametrize(
    ("name", "tolerance"), [("a.wav", 1e-4), ("a.flac", 1e-4), ("a.ogg", 0.05), ("a.mp3", 0.05)]
)  # fmt: skip
def test_every_audio_format_gives_the_samples_that_were_written(tmp_path, name, tolerance):
    samples = 0.5 * np.sin(2 * np.pi * 440 * np.arange(SAMPLE_RATE) / SAMPLE_RATE)
    soundfile.write(tmp_path / name, samples, SAMPLE_RATE)
    loaded = load_audio(tmp_path / name)
    assert loaded.dtype == np.float32
    assert loaded.shape == samples.shape
    middle = slice(2000, 14000)  # lossy formats ring at their ends
    np.testing.assert_allclose(loaded[middle], samples[middle], atol=tolerance)


def test_channels_are_averaged(tmp_path):
    left, right = noise(0.5, 1), noise(0.5, 2)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], 1), SAMPLE_RATE, subtype="FLOAT")
    np.testing.assert_allclose(load_audio(tmp_path / "a.wav"), (left + right) / 2, atol=1e-6)


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_other_rates_are_resampled_and_a_tone_keeps_its_pitch_loudness_and_length(tmp_path, rate):
    tone = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(2 * rate) / rate)
    soundfile.write(tmp_path / "a.wav", tone, rate)
    samples = load_audio(tmp_path / "a.wav")
    assert len(samples) == 2 * SAMPLE_RATE
    spectrum = np.abs(np.fft.rfft(samples))
    assert np.fft.rfftfreq(len(samples), 1 / SAMPLE_RATE)[spectrum.argmax()] == 1000
    assert np.abs(samples[1000:-1000]).max() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(("start", "end"), [(0.5, 1.5), (0, 0.75), (1.25, None), (1.5, 2.05), (0, 2)])
def test_a_segment_is_the_part_between_start_and_end(tmp_path, start, end):
    samples = noise(2)
    soundfile.write(tmp_path / "a.wav", samples, SAMPLE_RATE, subtype="FLOAT")
    first, last = round(start * SAMPLE_RATE), round((2 if end is None else end) * SAMPLE_RATE)
    np.testing.assert_array_equal(load_audio(tmp_path / "a.wav", start, end), samples[first:last])


def test_a_segment_of_a_file_at_another_rate_has_the_right_length(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(2 * 44100), 44100)
    assert len(load_audio(tmp_path / "a.wav", 0.5, 1.25)) == 0.75 * SAMPLE_RATE


@pytest.mark.parametrize(("start", "end"), [(1, 5), (3, 4), (-1, 1), (1.5, 0.5), (3, None)])
def test_a_segment_outside_the_file_is_refused_with_both_lengths(tmp_path, start, end):
    soundfile.write(tmp_path / "a.wav", noise(2), SAMPLE_RATE)
    with pytest.raises(BadUtterance, match=rf"a\.wav: segment {start} to {end} s of 2\.00 s"):
        load_audio(tmp_path / "a.wav", start, end)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "no such file"),
        (b"", "unreadable"),
        (b"RIFF....WAVEgarbage" * 9, "unreadable"),
        (np.zeros(0), "the audio is empty"),
        (np.array([0, np.nan, 0]), "holds NaN"),
        (np.array([0, np.inf, 0]), "holds NaN or infinite"),
    ],
)
def test_audio_that_cannot_be_used_is_refused_with_its_path_and_the_reason(tmp_path, content, reason):
    path = tmp_path / "a.wav"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        soundfile.write(path, content, SAMPLE_RATE, subtype="FLOAT")
    with pytest.raises(BadUtterance, match=f"^{re.escape(str(path))}: .*{reason}") as error:
        load_audio(path)
    assert "\n" not in str(error.value)


def test_samples_may_stand_for_a_file_if_they_are_mono():
    samples = noise(0.5)
    np.testing.assert_array_equal(load_audio(samples), samples)
    with pytest.raises(BadUtterance, match=r"shape \(2, 100\) where \(S,\) is wanted"):
        load_audio(np.zeros((2, 100)))


# Utterances that cannot be used


def test_by_default_the_first_bad_utterance_stops_the_run(four):
    with pytest.raises(BadUtterance, match=rf"^{four.path}:2: {four.path.parent}/missing\.wav: no such file$"):
        make_dataset(four)


def test_the_error_tells_how_many_other_lines_are_bad(tmp_path):
    path = write_manifest(tmp_path / "train.jsonl", [LINE, LINE, LINE])
    with pytest.raises(BadUtterance, match=r"jsonl:1: .*no such file \(and 2 lines more\)"):
        make_dataset(Manifest(path))


def test_what_turns_out_bad_when_it_is_read_stops_the_run_too(tmp_path, four):
    path = write_manifest(
        tmp_path / "train.jsonl", [{"wav": "good.wav", "txt": "hello"}, {"wav": "nan.wav", "txt": ""}]
    )
    dataset = make_dataset(Manifest(path))
    assert dataset[0]["bad"] is None
    with pytest.raises(BadUtterance, match=r"train\.jsonl:2: .*nan\.wav: .*NaN"):
        dataset[1]


def test_skipping_leaves_out_what_is_known_and_reports_what_it_meets(four):
    dataset = make_dataset(four, on_bad="skip")
    assert dataset.indices.tolist() == [0, 2, 3]
    assert list(dataset.bad) == [1]
    assert re.search(r"four\.jsonl:2: .*missing\.wav: no such file", dataset.bad[1])
    examples = [dataset[position] for position in range(3)]
    assert [example["index"] for example in examples] == [0, 2, 3]
    assert [bool(example["target_ids"]) for example in examples] == [True, False, True]
    assert re.search(r"four\.jsonl:3: .*nan\.wav: .*NaN", examples[1]["bad"])
    assert collate(examples)["labels"][1].tolist() == [IGNORE] * collate(examples)["labels"].shape[1]


def test_keeping_gives_every_line_its_example_and_the_bad_ones_their_reason(four):
    dataset = make_dataset(four, on_bad="keep")
    examples = [dataset[position] for position in range(len(dataset))]
    assert [example["index"] for example in examples] == [0, 1, 2, 3]
    assert [bool(example["bad"]) for example in examples] == [False, True, True, False]
    assert [len(example["features"]) for example in examples] == [1, 1, 1, 1]


def test_skipping_every_line_of_a_manifest_is_an_error(tmp_path):
    manifest = Manifest(write_manifest(tmp_path / "train.jsonl", [LINE, LINE]))
    with pytest.raises(InputError, match=r"every utterance is bad; the first: .*jsonl:1: .*no such file"):
        make_dataset(manifest, on_bad="skip")


def test_records_from_elsewhere_are_named_by_their_number(tmp_path):
    with pytest.raises(BadUtterance, match=r"1: .*missing\.wav: no such file"):
        make_dataset([{"wav": noise(1), "txt": "hello"}, {"wav": str(tmp_path / "missing.wav"), "txt": "hello"}])


def test_a_clip_longer_than_max_seconds_is_refused_and_one_as_long_is_not(tmp_path):
    soundfile.write(tmp_path / "a.wav", noise(2), SAMPLE_RATE)
    manifest = Manifest(write_manifest(tmp_path / "train.jsonl", [LINE]))
    assert make_dataset(manifest, max_seconds=2)[0]["bad"] is None
    with pytest.raises(BadUtterance, match=r"jsonl:1: 2\.00 s of audio, over --max_seconds 1\.5"):
        make_dataset(manifest, max_seconds=1.5)


def test_a_clip_that_is_longer_than_its_line_says_is_found_when_it_is_read(tmp_path):
    soundfile.write(tmp_path / "a.wav", noise(2), SAMPLE_RATE)
    manifest = Manifest(write_manifest(tmp_path / "train.jsonl", [{**LINE, "duration": 1}]))
    with pytest.raises(BadUtterance, match=r"jsonl:1: 2\.00 s of audio, over --max_seconds 1\.5"):
        make_dataset(manifest, max_seconds=1.5)[0]


def test_a_clip_of_a_tenth_of_a_second_works():
    example = make_dataset([{"where": "a:1", "wav": noise(0.1), "txt": "hello"}])[0]
    assert example["prompt_ids"].count(SPEECH) == 1
    assert example["features"][0].shape == (10, 80)


@pytest.mark.parametrize("samples", [1, 150, 200, 201, 1439])
def test_a_clip_too_short_for_an_embedding_is_refused_with_its_length(samples):
    dataset = make_dataset([{"where": "a:1", "wav": noise(1)[:samples], "txt": "hello"}])
    with pytest.raises(BadUtterance, match=rf"a:1: {samples / SAMPLE_RATE:.3f} s of audio are too short"):
        dataset[0]


def test_the_unreadable_clip_of_a_conversation_is_the_one_that_is_named(tmp_path):
    soundfile.write(tmp_path / "good.wav", noise(1), SAMPLE_RATE)
    (tmp_path / "bad.wav").write_bytes(b"garbage" * 9)
    turns = [{"role": "user", "content": AUDIO * 2, "audio": ["good.wav", "bad.wav"]}]
    path = write_manifest(tmp_path / "a.jsonl", [{"messages": [*turns, {"role": "assistant", "content": "hello"}]}])
    with pytest.raises(BadUtterance, match=r"a\.jsonl:1: \S*bad\.wav: unreadable"):
        make_dataset(Manifest(path))


def test_a_command_ends_on_wrong_input_with_one_line_that_tells_the_cure(capsys):
    def main():
        raise BadUtterance("a.jsonl:2: a.wav: no such file")

    with pytest.raises(SystemExit) as exit:
        run(main)
    assert exit.value.code == 2
    wanted = "error: a.jsonl:2: a.wav: no such file; mend it, or pass --on_bad_audio skip\n"
    assert capsys.readouterr().err == wanted


# Features


@pytest.mark.parametrize("num_mels", [80, 128])
@pytest.mark.parametrize("seconds", [0.1, 1.2345, 30])
def test_features_are_whispers_own_and_keep_the_clips_length(num_mels, seconds):
    samples = noise(seconds)
    (features,) = log_mel(samples, num_mels)
    assert features.shape == (len(samples) // 160, num_mels)
    torch.testing.assert_close(features, whisper.log_mel_spectrogram(samples, num_mels).T, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("seconds", "count"), [(30, 1), (30.01, 2), (60, 2), (70, 3)])
def test_a_clip_over_30_s_is_cut_into_equal_windows_in_their_order(seconds, count):
    samples = noise(seconds)
    windows = log_mel(samples, 80)
    assert len(windows) == count
    lengths = [len(window) for window in windows]
    assert max(lengths) <= 3000
    assert max(lengths) - min(lengths) <= 1
    edges = np.linspace(0, len(samples), count + 1).round().astype(int)
    for window, first, last in zip(windows, edges, edges[1:], strict=False):
        whole = whisper.log_mel_spectrogram(samples[first:last], 80).T
        assert (window - whole[: len(window)]).abs().mean() < 1e-3  # a sample more or less at an edge


def test_a_clip_can_be_padded_to_30_s_as_whisper_was_trained():
    samples = noise(1.5)
    (features,) = log_mel(samples, 80, pad_to_30s=True)
    torch.testing.assert_close(features, whisper.log_mel_spectrogram(whisper.pad_or_trim(samples), 80).T)
    assert [len(window) for window in log_mel(noise(40), 80, pad_to_30s=True)] == [3000, 3000]


# Prompts


@pytest.mark.parametrize(
    ("template", "specials", "before", "after", "end"),
    [
        (
            CHATML,
            {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"},
            "<|im_start|>user\n",
            "\nTranscribe the speech<|im_end|>\n<|im_start|>assistant\n",
            "<|im_end|>",
        ),
        (
            LLAMA3,
            {"bos_token": "<|im_start|>", "eos_token": "</s>"},
            "<|im_start|><|start_header_id|>user<|end_header_id|>\n\n",
            "\nTranscribe the speech<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
            "<|eot_id|>",
        ),
        (
            MISTRAL,
            {"bos_token": "<|im_start|>", "eos_token": "</s>"},
            "<|im_start|>[INST] ",
            "\nTranscribe the speech [/INST]",
            "</s>",
        ),
    ],
    ids=["ChatML", "LLaMA 3", "Mistral"],
)
def test_the_chat_template_is_split_at_the_audio_and_tells_the_end_token(template, specials, before, after, end):
    tokenizer = make_tokenizer(template, **specials)
    pieces, end_id = render_prompt(tokenizer, json.dumps(USER))
    assert [tokenizer.decode(piece) for piece in pieces] == [before, after]
    assert end_id == tokenizer.convert_tokens_to_ids(end)
    example = make_dataset([{"where": "a:1", "wav": noise(0.35), "txt": "hello world"}], tokenizer)[0]
    assert example["prompt_ids"] == pieces[0] + [SPEECH] * 3 + pieces[1]
    assert example["target_ids"] == [*tokenizer("hello world", add_special_tokens=False).input_ids, end_id]


def test_where_a_template_ends_an_answer_with_no_token_of_its_own_the_tokenizers_end_token_does():
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer = make_tokenizer(template, eos_token="</s>")
    assert render_prompt(tokenizer, json.dumps(USER))[1] == tokenizer.eos_token_id


def test_a_tokenizer_without_any_end_token_is_an_error():
    tokenizer = make_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}", bos_token="<|im_start|>")
    with pytest.raises(InputError, match="end token"):
        render_prompt(tokenizer, json.dumps(USER))


def test_a_conversation_that_the_chat_template_refuses_is_an_error_of_its_line(tmp_path):
    turns = [{"role": "system", "content": "Be brief."}, *USER, {"role": "assistant", "content": "hello"}]
    turns[1] = {**turns[1], "audio": [write_noise(tmp_path / "a.wav", 1)]}
    tokenizer = make_tokenizer(MISTRAL, eos_token="</s>")
    dataset = make_dataset([{"where": "a.jsonl:1", "messages": turns}], tokenizer)
    with pytest.raises(BadUtterance, match=r"a\.jsonl:1: .*Only user and assistant roles are supported"):
        dataset[0]


def test_a_line_may_have_a_prompt_of_its_own():
    records = [{"where": "a", "wav": noise(1), "txt": "hello"}] * 2
    records[0] = {**records[0], "prompt": f"Hear {AUDIO}?"}
    tokenizer = make_tokenizer()
    dataset = make_dataset(records, tokenizer, prompt=f"{AUDIO} Transcribe.")
    texts = [tokenizer.decode([i for i in e["prompt_ids"] if i != SPEECH]) for e in (dataset[0], dataset[1])]
    frame = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    assert texts == [frame.format("Hear ?"), frame.format(" Transcribe.")]


def test_a_conversation_may_have_several_clips_and_its_last_answer_is_the_transcript(tmp_path):
    tokenizer = make_tokenizer()
    paths = [write_noise(tmp_path / f"{seed}.wav", seconds, seed) for seed, seconds in enumerate((0.3, 0.5, 0.7))]
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": f"First {AUDIO}, second {AUDIO}.", "audio": paths[:2]},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": f"Third {AUDIO}", "audio": paths[2:]},
        {"role": "assistant", "content": "world"},
    ]
    example = make_dataset([{"where": "a:1", "messages": turns}], tokenizer)[0]
    counts = [len(run) for run in re.findall("S+", "".join("S" if i == SPEECH else "." for i in example["prompt_ids"]))]
    assert counts == [3, 5, 7]
    for features, seconds, seed in zip(example["features"], (0.3, 0.5, 0.7), range(3), strict=True):
        torch.testing.assert_close(features, log_mel(noise(seconds, seed), 80)[0])
    text = tokenizer.decode([i for i in example["prompt_ids"] if i != SPEECH])
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nFirst , second .<|im_end|>\n"
        "<|im_start|>assistant\nhello<|im_end|>\n<|im_start|>user\nThird <|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(example["target_ids"]) == "world<|im_end|>"


def test_the_clips_of_a_conversation_may_be_samples():
    turns = [{"role": "user", "content": AUDIO, "audio": [noise(0.5)]}, {"role": "assistant", "content": "hello"}]
    (features,) = make_dataset([{"where": "a:1", "messages": turns}])[0]["features"]
    torch.testing.assert_close(features, log_mel(noise(0.5), 80)[0])


@pytest.mark.parametrize(("content", "found"), [("No clip", 0), (AUDIO * 2, 2)])
def test_as_many_clips_as_audio_marks_are_wanted(tmp_path, content, found):
    asked = {"role": "user", "content": content, "audio": [write_noise(tmp_path / "a.wav", 1)]}
    turns = [asked, {"role": "assistant", "content": "hello"}]
    with pytest.raises(BadUtterance, match=rf"a:1: {found} <audio> in the prompt for 1 audio clips"):
        make_dataset([{"where": "a:1", "messages": turns}])[0]


def test_a_long_clip_has_the_embeddings_of_its_windows_in_one_place():
    example = make_dataset([{"where": "a:1", "wav": noise(40), "txt": "hello"}])[0]
    ids = example["prompt_ids"]
    assert [len(window) for window in example["features"]] == [2000, 2000]
    assert ids.count(SPEECH) == 400
    assert ids[ids.index(SPEECH) :][:400] == [SPEECH] * 400


@pytest.mark.parametrize("name", ["a.wav", "a.mp3", "a.flac"])
def test_a_file_that_was_cut_off_is_not_taken_for_a_shorter_one(tmp_path, name):
    path = tmp_path / name
    soundfile.write(path, noise(2), SAMPLE_RATE)
    assert len(load_audio(path)) == 2 * SAMPLE_RATE
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(BadUtterance, match=r"cut off after \d\.\d+ s|unreadable"):
        load_audio(path)
    rows = [{**LINE, "wav": name}]
    with pytest.raises(BadUtterance, match=f"train.jsonl:1: .*{name}: (cut off|unreadable)"):
        make_dataset(Manifest(write_manifest(tmp_path / "train.jsonl", rows)))[0]
    if name == "a.wav":  # known before training starts; and a segment that is whole
        with pytest.raises(BadUtterance, match="cut off"):
            make_dataset(Manifest(tmp_path / "train.jsonl"))
        assert len(load_audio(path, 0.2, 0.5)) == 0.3 * SAMPLE_RATE


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF000, 32036])
def test_a_wav_whose_writer_did_not_know_its_length_is_whole(tmp_path, size):
    """Such come out of a pipe: sox and ffmpeg cannot go back to the header."""
    soundfile.write(tmp_path / "a.wav", noise(1), SAMPLE_RATE)
    content = bytearray((tmp_path / "a.wav").read_bytes())
    place = content.index(b"data") + 4
    content[place : place + 4] = struct.pack("<I", size)
    (tmp_path / "a.wav").write_bytes(content)
    assert len(load_audio(tmp_path / "a.wav")) == SAMPLE_RATE


def test_an_mp3_whose_length_is_guessed_at_is_whole(tmp_path):
    """Of variable bit rate, without the frame that tells its length."""
    samples = np.concatenate([np.zeros(20 * SAMPLE_RATE), noise(3)])
    soundfile.write(tmp_path / "a.mp3", samples, SAMPLE_RATE, bitrate_mode="VARIABLE", compression_level=0.2)
    content = (tmp_path / "a.mp3").read_bytes()
    second = content.index(content[:2], 100)  # the sync of the second frame
    (tmp_path / "a.mp3").write_bytes(content[second:])
    assert soundfile.info(tmp_path / "a.mp3").duration > 25
    assert len(load_audio(tmp_path / "a.mp3")) == pytest.approx(23 * SAMPLE_RATE, rel=0.01)


def test_a_format_that_cannot_seek_is_read(tmp_path):
    soundfile.write(tmp_path / "a.wav", noise(1), 8000, subtype="GSM610")
    assert len(load_audio(tmp_path / "a.wav")) == pytest.approx(2 * SAMPLE_RATE, rel=0.05)


def test_what_stands_for_a_bad_clip_fits_however_few_positions_there_are(tmp_path):
    soundfile.write(tmp_path / "a.wav", noise(0.5), SAMPLE_RATE)
    rows = [LINE, {**LINE, "txt": "hello " * 99}]
    manifest = Manifest(write_manifest(tmp_path / "train.jsonl", rows))
    count = len(make_dataset(manifest)[0]["prompt_ids"])
    dataset = make_dataset(manifest, on_bad="skip", max_length=count + 10)
    assert [dataset[0]["bad"], dataset[1]["target_ids"]] == [None, []]
    assert re.search("jsonl:2: .* do not fit", dataset[1]["bad"])


def test_decoding_does_not_look_at_the_transcript(tmp_path):
    soundfile.write(tmp_path / "a.wav", noise(0.5), SAMPLE_RATE)
    manifest = Manifest(write_manifest(tmp_path / "test.jsonl", [LINE, {**LINE, "txt": "hello " * 999}]))
    dataset = make_dataset(manifest, on_bad="keep", with_targets=False, max_length=100)
    assert [(e["bad"], e["target_ids"], e["prompt_ids"]) for e in dataset] == 2 * [(None, [], dataset[0]["prompt_ids"])]


def test_the_tokenizers_own_limit_cuts_nothing():
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 8
    record = {"where": "a:1", "wav": noise(1), "txt": "hello world " * 20}
    example = make_dataset([record], tokenizer)[0]
    assert tokenizer.decode(example["target_ids"]) == "hello world " * 20 + "<|im_end|>"


def test_an_utterance_that_does_not_fit_is_refused_and_one_that_just_fits_is_whole():
    record = {"where": "a:1", "wav": noise(1), "txt": "hello world"}
    example = make_dataset([record])[0]
    length = len(example["prompt_ids"]) + len(example["target_ids"])
    assert make_dataset([record], max_length=length)[0]["target_ids"] == example["target_ids"]
    with pytest.raises(BadUtterance, match=rf"a:1: .* do not fit in {length - 1} \(--model_max_length"):
        make_dataset([record], max_length=length - 1)[0]


# Batches


def make_example(prompt_ids: list[int], target_ids: list[int], frames: list[int], index: int = 0) -> dict:
    features = [torch.ones(length, 3) * (index + 1) for length in frames]
    return {"index": index, "bad": None, "prompt_ids": prompt_ids, "target_ids": target_ids, "features": features}


def test_ids_are_padded_on_the_left_and_labels_cover_the_last_positions():
    batch = collate([make_example([7, SPEECH, 4], [11, 12, 2], [5]), make_example([7, SPEECH, SPEECH], [2], [9], 1)])
    assert batch["input_ids"].tolist() == [[7, SPEECH, 4, 11, 12, 2], [0, 0, 7, SPEECH, SPEECH, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[11, 12, 2], [IGNORE, IGNORE, 2]]
    assert batch["index"] == [0, 1]


def test_features_are_padded_with_zeros_at_their_end():
    batch = collate([make_example([SPEECH], [2], [5]), make_example([SPEECH] * 2, [2], [9, 2], 1)])
    assert batch["input_features"].shape == (3, 9, 3)  # (A, F, M)
    assert batch["feature_lengths"].tolist() == [5, 9, 2]
    for features, length, value in zip(batch["input_features"], [5, 9, 2], [1, 2, 2], strict=True):
        assert features[:length].eq(value).all()
        assert features[length:].eq(0).all()


def test_without_targets_the_ids_end_with_the_prompt():
    batch = collate([make_example([7, SPEECH, 4], [11, 2], [5]), make_example([SPEECH], [2], [9])], with_targets=False)
    assert batch["input_ids"].tolist() == [[7, SPEECH, 4], [0, 0, SPEECH]]
    assert batch["labels"].shape == (2, 0)


def test_only_the_transcript_and_its_end_token_are_trained_on_even_where_the_end_token_pads():
    tokenizer = make_tokenizer()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    texts = ["hello <|im_end|> world", "", "hello"]
    records = [{"where": "a", "wav": noise(0.2 + n), "txt": text} for n, text in enumerate(texts)]
    dataset = make_dataset(records, tokenizer)
    batch = collate([dataset[n] for n in range(3)])
    trained = [row[row != IGNORE] for row in batch["labels"]]
    assert [tokenizer.decode(row) for row in trained] == [f"{text}<|im_end|>" for text in texts]
    assert batch["labels"].shape[1] == len(trained[0])  # K is the longest transcript with its end token
    for ids, row in zip(batch["input_ids"], trained, strict=True):
        assert ids[-len(row) :].tolist() == row.tolist()


def test_a_tokenizer_without_a_pad_token_will_do():
    tokenizer = make_tokenizer(MISTRAL, eos_token="</s>")
    assert tokenizer.pad_token is None
    dataset = make_dataset([{"where": "a", "wav": noise(n), "txt": "hello"} for n in (1, 2)], tokenizer)
    batch = collate([dataset[0], dataset[1]])
    assert batch["attention_mask"].sum(1).diff().item() == 10
    assert batch["labels"][:, -1].tolist() == [tokenizer.eos_token_id] * 2


def test_a_dataset_gives_the_same_examples_in_other_processes(four):
    dataset = make_dataset(four, on_bad="keep")
    loader = torch.utils.data.DataLoader(dataset, 2, collate_fn=collate, num_workers=2)
    batches = [collate([dataset[n], dataset[n + 1]]) for n in (0, 2)]
    for batch, wanted in zip(loader, batches, strict=True):
        assert batch["bad"] == wanted["bad"]
        torch.testing.assert_close(batch["input_features"], wanted["input_features"])
        assert batch["input_ids"].equal(wanted["input_ids"])


# The order of the utterances


def lengths_of(count: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(1, 30, count)


@pytest.mark.filterwarnings("ignore:3 utterances")
@pytest.mark.parametrize("count", [0, 3, 8, 1003])
def test_every_utterance_comes_once_an_epoch_and_some_again_to_fill_the_last_batch(count):
    sampler = LengthSampler(lengths_of(count), batch_size=8, seed=0)
    order = list(sampler)
    assert set(order) == set(range(count))
    assert len(order) == len(sampler) == -(-count // 8) * 8


def test_the_last_batch_can_be_dropped():
    sampler = LengthSampler(lengths_of(1003), batch_size=8, seed=0, drop_last=True)
    order = list(sampler)
    assert len(order) == len(set(order)) == len(sampler) == 1000
    with pytest.raises(InputError, match="--dataloader_drop_last: 7 utterances do not fill one batch of 8"):
        LengthSampler(lengths_of(7), batch_size=8, seed=0, drop_last=True)


def test_utterances_too_few_for_a_batch_are_told_how_often_they_come():
    with pytest.warns(UserWarning, match=r"20 utterances fill a batch of 128: each comes 6\.4 times an epoch"):
        LengthSampler(lengths_of(20), batch_size=128, seed=0)


def test_a_batch_holds_similar_lengths_and_batches_come_in_no_order_of_length():
    lengths = lengths_of(1600)
    batches = lengths[list(LengthSampler(lengths, batch_size=8, seed=0))].reshape(-1, 8)
    assert np.ptp(batches, axis=1).mean() < 1.5  # seconds; at random it is 22
    assert abs(np.corrcoef(batches[:-1].mean(1), batches[1:].mean(1))[0, 1]) < 0.3


def test_the_order_is_another_each_epoch_and_seed_and_else_the_same():
    lengths = lengths_of(200)
    orders = {
        (seed, epoch): list(LengthSampler(lengths, 8, seed, lambda epoch=epoch: epoch))
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len({tuple(order) for order in orders.values()}) == 4
    assert orders[1, 0] == list(LengthSampler(lengths, 8, seed=1))


def test_each_optimiser_step_sees_the_same_utterances_on_any_number_of_processes():
    def steps(processes: int, accumulation: int, size: int) -> list[set[int]]:
        sampler = LengthSampler(lengths_of(160), processes * accumulation * size, seed=3)
        batches = torch.utils.data.BatchSampler(sampler, size, drop_last=False)
        shards = [list(BatchSamplerShard(batches, processes, rank)) for rank in range(processes)]
        rows = [sum(parts, []) for parts in zip(*shards, strict=True)]  # what all processes see at once
        return [set(sum(rows[n : n + accumulation], [])) for n in range(0, len(rows), accumulation)]

    wanted = steps(1, 1, 16)
    assert len(wanted) == 10
    assert steps(2, 1, 8) == steps(4, 2, 2) == steps(1, 4, 4) == wanted
