"""What dataset.py promises: audio, features, prompts, examples, batches and their order."""

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
from conftest import CHATML, make_tokenizer, noise, write_manifest
from families import LLMS
from torch.utils.data import BatchSampler, DataLoader
from transformers import AutoTokenizer, WhisperFeatureExtractor

from dataset import (
    IGNORE,
    PLAIN_TEMPLATE,
    WINDOW,
    SpeechDataset,
    audio_seconds,
    collate,
    length_mask,
    load_audio,
    render_prompt,
)
from errors import BadUtterance, InputError
from manifest import AUDIO, BOUNDARY, SAMPLE_RATE, SPEECH, Manifest
from model import log_mel
from sources import RecordList

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
EMBEDDINGS = (np.arange(WINDOW + 1) + 1) // 2 // 5  # of so many feature frames


def make_dataset(records: Manifest | list[dict], tokenizer=None, num_mels: int = 80, **options) -> SpeechDataset:
    records = RecordList(records) if isinstance(records, list) else records
    extract = partial(log_mel, WhisperFeatureExtractor(num_mels))
    return SpeechDataset(records, tokenizer or make_tokenizer(), extract, EMBEDDINGS, **options)


def windows_of(samples: np.ndarray, num_mels: int = 80, pad_to_30s: bool = False) -> list[torch.Tensor]:
    return make_dataset([], num_mels=num_mels, pad_to_30s=pad_to_30s).windows(samples)


def record_of(seconds: float, text: str = "hello", **keys) -> dict:
    return {"wav": noise(seconds), "txt": text, **keys}


def write_noise(path: Path, seconds: float, seed: int = 0) -> str:
    soundfile.write(path, noise(seconds, seed), SAMPLE_RATE, subtype="FLOAT")
    return str(path)


def manifest_of(folder: Path, *rows: dict) -> Manifest:
    return Manifest(write_manifest(folder / "train.jsonl", list(rows)))


def text_of(tokenizer, prompt_ids: list[int]) -> str:
    """The text around the speech."""
    return tokenizer.decode([token for token in prompt_ids if token >= 0])


@pytest.fixture
def four(tmp_path) -> Manifest:
    """Lines 1 and 4 are good; the file of line 2 does not exist, that of line 3 turns out bad when it is read."""
    write_noise(tmp_path / "good.wav", 1)
    soundfile.write(tmp_path / "nan.wav", np.full(8000, np.nan), SAMPLE_RATE, subtype="FLOAT")
    names = ["good.wav", "missing.wav", "nan.wav", "good.wav"]
    return manifest_of(tmp_path, *({"wav": name, "txt": "hello"} for name in names))


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
    write_noise(tmp_path / "a.wav", 2)
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


def test_samples_may_stand_for_a_file_if_they_are_mono_floats():
    samples = noise(0.5)
    np.testing.assert_array_equal(load_audio(samples), samples)
    with pytest.raises(BadUtterance, match=r"shape \(2, 100\) where \(S,\) is wanted"):
        load_audio(np.zeros((2, 100)))
    with pytest.raises(BadUtterance, match="samples of type int16; wanted floats between -1 and 1"):
        load_audio(np.zeros(100, np.int16))


@pytest.mark.parametrize("name", ["a.wav", "a.flac"])
def test_a_file_that_was_cut_off_is_not_taken_for_a_shorter_one(tmp_path, name):
    path = tmp_path / name
    soundfile.write(path, noise(2), SAMPLE_RATE)
    assert len(load_audio(path)) == 2 * SAMPLE_RATE
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(BadUtterance, match=r"cut off after \d\.\d+ s|unreadable"):
        load_audio(path)
    with pytest.raises(BadUtterance, match=f"train.jsonl:1: .*{name}: (cut off|unreadable)"):
        make_dataset(manifest_of(tmp_path, {**LINE, "wav": name}))[0]


def test_a_wav_that_was_cut_off_is_known_before_training_starts_and_segments_of_it_that_are_whole_can_be_read(tmp_path):
    path = tmp_path / "a.wav"
    soundfile.write(path, noise(2), SAMPLE_RATE)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(BadUtterance, match="cut off"):
        make_dataset(manifest_of(tmp_path, LINE))
    assert len(load_audio(path, 0.2, 0.5)) == 0.3 * SAMPLE_RATE


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF000, 32036])
def test_a_wav_whose_writer_did_not_know_its_length_is_whole(tmp_path, size):
    """Such come out of a pipe: sox and ffmpeg cannot go back to the header."""
    soundfile.write(tmp_path / "a.wav", noise(1), SAMPLE_RATE)
    content = bytearray((tmp_path / "a.wav").read_bytes())
    position = content.index(b"data") + 4
    content[position : position + 4] = struct.pack("<I", size)
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


def test_the_seconds_of_a_record_are_those_of_all_its_clips(tmp_path):
    path = write_noise(tmp_path / "a.wav", 2)
    assert audio_seconds({"wav": path}) == 2
    assert audio_seconds({"wav": path, "start": 0.5}) == 1.5
    assert audio_seconds({"wav": path, "start": 0.5, "end": 0.75}) == 0.25
    assert audio_seconds({"messages": [{"audio": [path, path]}, {"audio": [noise(0.5)]}]}) == 4.5


# Utterances that cannot be used


def test_durations_that_no_line_states_are_read_from_the_audio(tmp_path):
    write_noise(tmp_path / "a.wav", 2)
    extra = [{}, {"start": 0.5}, {"start": 0.5, "end": 0.75}, {"duration": 1.25}]
    manifest = manifest_of(tmp_path, *({**LINE, **keys} for keys in extra))
    np.testing.assert_allclose(make_dataset(manifest).durations, [2, 1.5, 0.25, 1.25])


def test_a_dataset_takes_a_few_bytes_of_memory_for_a_line_also_while_it_is_made(tmp_path):
    write_noise(tmp_path / "a.wav", 0.5)
    lines, tokenizer = 5000, make_tokenizer()
    manifest = manifest_of(tmp_path, *[{**LINE, "duration": 0.5}] * lines)
    tracemalloc.start()
    dataset = make_dataset(manifest, tokenizer)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(dataset) == lines
    assert held < 30 * lines + 100_000
    assert peak < 100 * lines + 200_000  # a future for each line would be over 1000 bytes


def test_by_default_the_first_bad_utterance_stops_the_run(four):
    with pytest.raises(BadUtterance, match=rf"^{four.path}:2: {four.path.parent}/missing\.wav: no such file"):
        make_dataset(four)


def test_the_error_tells_how_many_other_lines_are_bad(tmp_path):
    with pytest.raises(BadUtterance, match=r"jsonl:1: .*no such file.* \(and 2 lines more\)"):
        make_dataset(manifest_of(tmp_path, LINE, LINE, LINE))


def test_what_turns_out_bad_when_it_is_read_stops_the_run_too(tmp_path, four):
    dataset = make_dataset(manifest_of(tmp_path, {**LINE, "wav": "good.wav"}, {**LINE, "wav": "nan.wav"}))
    assert dataset[0]["bad"] is None
    with pytest.raises(BadUtterance, match=r"train\.jsonl:2: .*nan\.wav: .*NaN"):
        dataset[1]


def test_skipping_leaves_out_what_is_known_and_reports_what_it_meets(four):
    dataset = make_dataset(four, on_bad="skip")
    assert dataset.indices.tolist() == [0, 2, 3]
    assert list(dataset.bad) == [1]
    assert re.search(r"train\.jsonl:2: .*missing\.wav: no such file", dataset.bad[1])
    examples = list(dataset)
    assert [example["index"] for example in examples] == [0, 2, 3]
    assert [bool(example["target_ids"]) for example in examples] == [True, False, True]
    assert re.search(r"train\.jsonl:3: .*nan\.wav: .*NaN", examples[1]["bad"])
    assert collate(examples)["labels"][1].eq(IGNORE).all()


def test_keeping_gives_every_line_its_example_and_the_bad_ones_their_reason(four):
    examples = list(make_dataset(four, on_bad="keep"))
    assert [example["index"] for example in examples] == [0, 1, 2, 3]
    assert [bool(example["bad"]) for example in examples] == [False, True, True, False]
    assert [len(example["features"]) for example in examples] == [1, 1, 1, 1]


def test_skipping_every_line_of_a_manifest_is_an_error(tmp_path):
    with pytest.raises(InputError, match=r"every utterance is bad; the first: .*jsonl:1: .*no such file"):
        make_dataset(manifest_of(tmp_path, LINE, LINE), on_bad="skip")


def test_records_from_elsewhere_are_named_by_their_number(tmp_path):
    with pytest.raises(BadUtterance, match=r"^record 2: .*missing\.wav: no such file"):
        make_dataset([record_of(1), {"wav": str(tmp_path / "missing.wav"), "txt": "hello"}])


def test_a_clip_longer_than_max_seconds_is_refused_and_one_as_long_is_not(tmp_path):
    write_noise(tmp_path / "a.wav", 2)
    manifest = manifest_of(tmp_path, LINE)
    assert make_dataset(manifest, max_seconds=2)[0]["bad"] is None
    with pytest.raises(BadUtterance, match=r"jsonl:1: 2\.00 s of audio, over --max_seconds 1\.5"):
        make_dataset(manifest, max_seconds=1.5)


def test_a_clip_that_is_longer_than_its_line_says_is_found_when_it_is_read(tmp_path):
    write_noise(tmp_path / "a.wav", 2)
    dataset = make_dataset(manifest_of(tmp_path, {**LINE, "duration": 1}), max_seconds=1.5)
    with pytest.raises(BadUtterance, match=r"jsonl:1: 2\.00 s of audio, over --max_seconds 1\.5"):
        dataset[0]


def test_a_clip_of_a_tenth_of_a_second_works():
    example = make_dataset([record_of(0.1)])[0]
    assert example["prompt_ids"].count(SPEECH) == 1
    assert example["features"][0].shape == (10, 80)


@pytest.mark.parametrize("num_samples", [1, 150, 399, 400, 1439])
def test_a_clip_too_short_for_an_embedding_is_refused_with_its_length(num_samples):
    dataset = make_dataset([{"wav": noise(1)[:num_samples], "txt": "hello"}])
    with pytest.raises(BadUtterance, match=rf"record 1: {num_samples / SAMPLE_RATE:.3f} s of audio are too short"):
        dataset[0]


def test_the_unreadable_clip_of_a_conversation_is_the_one_that_is_named(tmp_path):
    write_noise(tmp_path / "good.wav", 1)
    (tmp_path / "bad.wav").write_bytes(b"garbage" * 9)
    question = {"role": "user", "content": AUDIO * 2, "audio": ["good.wav", "bad.wav"]}
    manifest = manifest_of(tmp_path, {"messages": [question, {"role": "assistant", "content": "hello"}]})
    with pytest.raises(BadUtterance, match=r"train\.jsonl:1: \S*bad\.wav: unreadable"):
        make_dataset(manifest)


def test_an_utterance_that_does_not_fit_is_refused_and_one_that_just_fits_is_whole():
    record = record_of(1, "hello world")
    example = make_dataset([record])[0]
    length = len(example["prompt_ids"]) + len(example["target_ids"])
    assert make_dataset([record], max_length=length)[0]["target_ids"] == example["target_ids"]
    with pytest.raises(BadUtterance, match=rf"record 1: .* do not fit in {length - 1} \(--model_max_length"):
        make_dataset([record], max_length=length - 1)[0]


def test_what_stands_for_a_bad_clip_fits_however_few_positions_there_are():
    records = [record_of(0.5), record_of(0.5, "hello " * 99)]
    max_length = len(make_dataset(records)[0]["prompt_ids"]) + 10
    dataset = make_dataset(records, on_bad="skip", max_length=max_length)
    assert [dataset[0]["bad"], dataset[1]["target_ids"]] == [None, []]
    assert re.search("record 2: .* do not fit", dataset[1]["bad"])


def test_decoding_does_not_look_at_the_transcript():
    records = [record_of(0.5), record_of(0.5, "hello " * 999)]
    examples = list(make_dataset(records, on_bad="keep", with_targets=False, max_length=100))
    assert [example["bad"] for example in examples] == [None, None]
    assert [example["target_ids"] for example in examples] == [[], []]
    assert examples[0]["prompt_ids"] == examples[1]["prompt_ids"]


# Features


@pytest.mark.parametrize("num_mels", [80, 128])
@pytest.mark.parametrize("seconds", [0.1, 1.2345, 30])
def test_features_are_whispers_own_and_keep_the_clips_length(num_mels, seconds):
    samples = noise(seconds)
    (features,) = windows_of(samples, num_mels)
    assert features.shape == (len(samples) // 160, num_mels)
    torch.testing.assert_close(features, whisper.log_mel_spectrogram(samples, num_mels).T, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("seconds", "count"), [(30, 1), (30.01, 2), (60, 2), (70, 3)])
def test_a_clip_over_30_s_is_cut_into_equal_windows_in_their_order(seconds, count):
    samples = noise(seconds)
    windows = windows_of(samples)
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
    (features,) = windows_of(samples, pad_to_30s=True)
    torch.testing.assert_close(features, whisper.log_mel_spectrogram(whisper.pad_or_trim(samples), 80).T)
    assert [len(window) for window in windows_of(noise(40), pad_to_30s=True)] == [3000, 3000]


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
    pieces, end_id = render_prompt(tokenizer, USER)
    assert [tokenizer.decode(piece) for piece in pieces] == [before, after]
    assert end_id == tokenizer.convert_tokens_to_ids(end)
    example = make_dataset([record_of(0.35, "hello world")], tokenizer)[0]
    assert example["prompt_ids"] == pieces[0] + [SPEECH] * 3 + pieces[1]
    assert example["target_ids"] == [*tokenizer("hello world", add_special_tokens=False).input_ids, end_id]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict:
    """The tokenizers of all families of LLMs, by name; GPT-2's comes without a chat template."""
    folder = tmp_path_factory.mktemp("llms")
    return {name: AutoTokenizer.from_pretrained(build(folder / name)) for name, build in LLMS.items()}


@pytest.mark.parametrize("llm", [name for name in LLMS if name != "gpt2"])
def test_the_end_token_is_what_the_template_puts_after_an_answer(tokenizers, llm):
    tokenizer = tokenizers[llm]
    _, end_id = render_prompt(tokenizer, USER)
    whole = tokenizer.apply_chat_template([*USER, {"role": "assistant", "content": "yes"}], tokenize=False)
    assert whole.rpartition("yes")[2].lstrip().startswith(tokenizer.decode([end_id]))


def test_the_plain_template_of_a_base_llm_ends_with_its_end_of_text(tokenizers):
    tokenizer = tokenizers["gpt2"]
    tokenizer.chat_template = PLAIN_TEMPLATE
    pieces, end_id = render_prompt(tokenizer, USER)
    assert [tokenizer.decode(piece) for piece in pieces] == ["user: ", "\nTranscribe the speech\nassistant: "]
    assert end_id == tokenizer.eos_token_id


def test_thinking_models_are_told_not_to_think(tokenizers):
    pieces, _ = render_prompt(tokenizers["qwen3"], USER)
    assert tokenizers["qwen3"].decode(pieces[1]).endswith("<think>\n\n</think>\n\n")


def test_a_template_that_tells_the_date_tells_the_same_one_every_day(tokenizers):
    pieces, _ = render_prompt(tokenizers["llama"], USER)
    assert "Today is 26 Jul 2024" in tokenizers["llama"].decode(pieces[0])


def test_a_template_that_a_tokenizer_gets_later_counts_from_then_on():
    tokenizer = make_tokenizer()
    before, _ = render_prompt(tokenizer, USER)
    tokenizer.chat_template = "Say: {{ messages[-1].content }}|"
    pieces, _ = render_prompt(tokenizer, USER)
    assert [tokenizer.decode(piece) for piece in pieces] == ["Say: ", "\nTranscribe the speech|"]
    assert pieces != before


def test_a_template_may_place_the_audio_itself():
    tokenizer = make_tokenizer(f"Speech: {AUDIO} Text:")
    pieces, end_id = render_prompt(tokenizer, "whatever")
    assert [tokenizer.decode(piece) for piece in pieces] == ["Speech: ", " Text:"]
    assert end_id == tokenizer.eos_token_id  # the template shows no answer, and so no end of one


def test_where_a_template_ends_an_answer_with_no_token_of_its_own_the_tokenizers_end_token_does():
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer = make_tokenizer(template, eos_token="</s>")
    assert render_prompt(tokenizer, USER)[1] == tokenizer.eos_token_id


def test_a_tokenizer_without_any_end_token_is_an_error():
    tokenizer = make_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}", bos_token="<|im_start|>")
    with pytest.raises(InputError, match="end token"):
        render_prompt(tokenizer, USER)


def test_a_prompt_of_one_turn_may_be_a_text():
    tokenizer = make_tokenizer()
    text, system = f"{AUDIO}\nTranscribe the speech", {"role": "system", "content": "You hear well."}
    assert render_prompt(tokenizer, text) == render_prompt(tokenizer, USER)
    assert render_prompt(tokenizer, text, "You hear well.") == render_prompt(tokenizer, [system, *USER])


def test_a_system_prompt_comes_first():
    tokenizer = make_tokenizer()
    example = make_dataset([record_of(1)], tokenizer, system_prompt="You hear well.")[0]
    wanted = "<|im_start|>system\nYou hear well.<|im_end|>\n<|im_start|>user\n"
    assert text_of(tokenizer, example["prompt_ids"]).startswith(wanted)


def test_a_conversation_that_the_chat_template_refuses_is_an_error_of_its_line():
    turns = [{"role": "system", "content": "Be brief."}, {**USER[0], "audio": [noise(1)]}]
    record = {"where": "a.jsonl:1", "messages": [*turns, {"role": "assistant", "content": "hello"}]}
    with pytest.raises(BadUtterance, match=r"a\.jsonl:1: .*Only user and assistant roles are supported"):
        make_dataset([record], make_tokenizer(MISTRAL, eos_token="</s>"))[0]


def test_a_line_may_have_a_prompt_of_its_own():
    tokenizer = make_tokenizer()
    records = [record_of(1, prompt=f"Hear {AUDIO}?"), record_of(1)]
    dataset = make_dataset(records, tokenizer, prompt=f"{AUDIO} Transcribe.")
    frame = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    texts = [text_of(tokenizer, example["prompt_ids"]) for example in dataset]
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
    example = make_dataset([{"messages": turns}], tokenizer)[0]
    places = "".join("S" if token == SPEECH else "." for token in example["prompt_ids"])
    assert [len(run) for run in re.findall("S+", places)] == [3, 5, 7]
    for features, seconds, seed in zip(example["features"], (0.3, 0.5, 0.7), range(3), strict=True):
        torch.testing.assert_close(features, windows_of(noise(seconds, seed))[0])
    assert text_of(tokenizer, example["prompt_ids"]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nFirst , second .<|im_end|>\n"
        "<|im_start|>assistant\nhello<|im_end|>\n<|im_start|>user\nThird <|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(example["target_ids"]) == "world<|im_end|>"


def test_the_clips_of_a_conversation_may_be_samples():
    turns = [{"role": "user", "content": AUDIO, "audio": [noise(0.5)]}, {"role": "assistant", "content": "hello"}]
    (features,) = make_dataset([{"messages": turns}])[0]["features"]
    torch.testing.assert_close(features, windows_of(noise(0.5))[0])


@pytest.mark.parametrize(("content", "count"), [("No clip", 0), (AUDIO * 2, 2)])
def test_as_many_clips_as_audio_marks_are_wanted(content, count):
    turns = [{"role": "user", "content": content, "audio": [noise(1)]}, {"role": "assistant", "content": "hello"}]
    with pytest.raises(BadUtterance, match=rf"record 1: {count} <audio> in the prompt for 1 audio clips"):
        make_dataset([{"messages": turns}])[0]


def test_a_long_clip_has_the_embeddings_of_its_windows_in_one_place():
    example = make_dataset([record_of(40)])[0]
    ids = example["prompt_ids"]
    assert [len(window) for window in example["features"]] == [2000, 2000]
    assert ids.count(SPEECH) == 400
    assert ids[ids.index(SPEECH) :][:400] == [SPEECH] * 400


def test_a_clip_stands_between_the_places_of_its_boundary_vectors():
    plain, bounded = (make_dataset([record_of(0.3)], audio_boundary_tokens=b)[0]["prompt_ids"] for b in (False, True))
    first = plain.index(SPEECH)
    assert bounded == [*plain[:first], BOUNDARY[0], *[SPEECH] * 3, BOUNDARY[1], *plain[first + 3 :]]


def test_the_tokenizers_own_limit_cuts_nothing():
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 8
    example = make_dataset([record_of(1, "hello world " * 20)], tokenizer)[0]
    assert tokenizer.decode(example["target_ids"]) == "hello world " * 20 + "<|im_end|>"


# Augmentation


def louder(samples: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """At the top of this file, so that it can be sent to a process."""
    return samples * np.float32(random.uniform(2, 9))


def same_features(example: dict, other: dict) -> bool:
    return all(one.equal(two) for one, two in zip(example["features"], other["features"], strict=True))


def test_an_example_is_loaded_then_augmented_then_rendered():
    """Augmented samples are what features are made of, and what the number of speech embeddings depends on."""
    longer = lambda samples, random: np.concatenate([samples, samples])  # noqa: E731
    record = record_of(0.5)
    (features,) = (example := make_dataset([record], augment=longer)[0])["features"]
    torch.testing.assert_close(features, windows_of(np.concatenate([record["wav"]] * 2))[0])
    assert example["prompt_ids"].count(SPEECH) == 10


def test_nothing_is_augmented_where_no_augmentation_is_given():
    dataset = make_dataset([record_of(0.5)])
    assert same_features(dataset[0], dataset[7, 0])
    torch.testing.assert_close(dataset[7, 0]["features"][0], windows_of(noise(0.5))[0])


def test_an_example_is_augmented_by_its_seed_its_epoch_and_its_index_alone():
    records = [record_of(0.5), record_of(0.5)]
    dataset, again = (make_dataset(records, augment=louder, seed=3) for _ in range(2))
    assert same_features(dataset[2, 1], again[2, 1])
    assert same_features(dataset[0], dataset[0, 0])
    assert not same_features(dataset[2, 1], dataset[3, 1])
    assert not same_features(dataset[2, 1], dataset[2, 0])
    assert not same_features(dataset[2, 1], make_dataset(records, augment=louder, seed=4)[2, 1])


def test_an_example_is_augmented_alike_in_any_process():
    dataset = make_dataset([record_of(0.3)] * 4, augment=louder)
    sampler = BatchSampler([(epoch, position) for epoch in (0, 1) for position in range(4)], 2, drop_last=False)
    one, two = (DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, num_workers=n) for n in (0, 2))
    for batch, wanted in zip(two, one, strict=True):
        assert batch["input_features"].equal(wanted["input_features"])


def test_an_utterance_may_become_bad_by_augmentation_and_is_told_as_any_other():
    shorter = lambda samples, random: samples[:300]  # noqa: E731
    example = make_dataset([record_of(1)], augment=shorter, on_bad="skip")[0]
    assert example["bad"] == "record 1: 0.019 s of audio are too short for a single speech embedding"


# Batches


def make_example(prompt_ids: list[int], target_ids: list[int], frames: list[int], index: int = 0) -> dict:
    features = [torch.ones(length, 3) * (index + 1) for length in frames]
    ids = {"prompt_ids": prompt_ids, "target_ids": target_ids, "labels": target_ids}
    return {"index": index, "bad": None, **ids, "features": features, "feature_lengths": frames}


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
    is_valid = length_mask(batch["feature_lengths"], 9)
    assert is_valid.sum(1).tolist() == [5, 9, 2]
    assert batch["input_features"][~is_valid].eq(0).all()
    assert [features[:2].unique().tolist() for features in batch["input_features"]] == [[1], [2], [2]]


def test_samples_are_padded_like_features():
    examples = [make_example([SPEECH], [2], [5]), make_example([SPEECH], [2], [9])]
    for example in examples:
        example["features"] = [features[:, 0] for features in example["features"]]
    batch = collate(examples)
    assert "input_features" not in batch
    assert batch["input_values"].tolist() == [[1] * 5 + [0] * 4, [1] * 9]  # (A, S)


def test_without_targets_the_ids_end_with_the_prompt():
    batch = collate([make_example([7, SPEECH, 4], [11, 2], [5]), make_example([SPEECH], [2], [9])], with_targets=False)
    assert batch["input_ids"].tolist() == [[7, SPEECH, 4], [0, 0, SPEECH]]
    assert batch["labels"].shape == (2, 0)


def test_only_the_transcript_and_its_end_token_are_trained_on_even_where_the_end_token_pads():
    tokenizer = make_tokenizer()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    texts = ["hello <|im_end|> world", "", "hello"]
    batch = collate(list(make_dataset([record_of(0.2 + n, text) for n, text in enumerate(texts)], tokenizer)))
    trained = [row[row != IGNORE] for row in batch["labels"]]
    assert [tokenizer.decode(row) for row in trained] == [f"{text}<|im_end|>" for text in texts]
    assert batch["labels"].shape[1] == len(trained[0])  # K is the longest transcript with its end token
    for ids, row in zip(batch["input_ids"], trained, strict=True):
        assert ids[-len(row) :].tolist() == row.tolist()


def test_a_tokenizer_without_a_pad_token_will_do():
    tokenizer = make_tokenizer(MISTRAL, eos_token="</s>")
    assert tokenizer.pad_token is None
    batch = collate(list(make_dataset([record_of(1), record_of(2)], tokenizer)))
    assert batch["attention_mask"].sum(1).diff().item() == 10
    assert batch["labels"][:, -1].tolist() == [tokenizer.eos_token_id] * 2


def test_a_dataset_gives_the_same_examples_in_other_processes(four):
    dataset = make_dataset(four, on_bad="keep")
    one, two = (DataLoader(dataset, 2, collate_fn=collate, num_workers=count) for count in (0, 2))
    for batch, wanted in zip(two, one, strict=True):
        assert batch["bad"] == wanted["bad"]
        torch.testing.assert_close(batch["input_features"], wanted["input_features"])
        assert batch["input_ids"].equal(wanted["input_ids"])


def test_a_dataset_can_be_sent_to_a_process_that_starts_afresh(four):
    """As on systems that do not fork."""
    dataset = make_dataset(four, on_bad="keep", augment=louder)
    again = pickle.loads(pickle.dumps(dataset))
    assert same_features(again[5, 0], dataset[5, 0])
    assert again[2]["bad"] == dataset[2]["bad"]
