"""What manifest.py promises: checks of a manifest's lines, records, sources of data, options of decoding."""

import json
import pickle
import re
import tracemalloc
from dataclasses import FrozenInstanceError
from pathlib import Path

import numpy as np
import pytest
from conftest import write_manifest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dataset import open_records
from errors import InputError
from manifest import (
    AUDIO,
    SAMPLE_RATE,
    Clip,
    DecodingOptions,
    Manifest,
    check_record,
    clips_of,
    key_of,
    parse_line,
    stated_seconds,
    transcript_of,
)
from sources import SOURCES, RecordList

LINE = {"wav": "a.wav", "txt": "hello"}
QUESTION = {"role": "user", "content": AUDIO, "audio": ["a.wav"]}
ANSWER = {"role": "assistant", "content": "hello"}


# The lines of a manifest


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ('{"wav": "a.wav", "txt": ', "malformed JSON"),
        ("", "a blank line; wanted one JSON object"),
        ('{"wav": "a.wav", "txt": "\\ud800"}', "malformed JSON .*surrogate"),
        ('{"wav": "a.wav", "txt": "a", "key": ' + 9999 * "[" + 9999 * "]" + "}", "malformed JSON .*depth limit"),
        ('["a.wav", "hello"]', "found .* wanted a JSON object"),
        ("null", "wanted a JSON object"),
        ('{"wav": "a.wav"}', r"missing \['txt'\]"),
        ('{"txt": "hello"}', r"missing \['wav'\]"),
        ('{"wav": "a.wav", "txt": null}', r"missing \['txt'\]"),
        ('{"wav": null, "txt": "hello"}', r"missing \['wav'\]"),
        ('{"wav": 3, "txt": "hello"}', "'wav' is 3; wanted a str"),
        ('{"wav": "a.wav", "txt": ["hello"]}', r"'txt' is \[\"hello\"\]; wanted a str"),
        ('{"wav": "a.wav", "txt": "hello", "prompt": 1}', "'prompt' is 1; wanted a str"),
        ('{"wav": "a.wav", "txt": "hello", "key": {}}', "'key' is {}; wanted text"),
        ('{"wav": "a.wav", "txt": "hello", "end": "2"}', "'end' is \"2\"; wanted seconds"),
        ('{"wav": "a.wav", "txt": "hello", "end": NaN}', "malformed JSON .unexpected character"),
        ('{"wav": "a.wav", "txt": "hello", "end": ' + 400 * "9" + "}", "malformed JSON .number is infinity"),
        ('{"wav": "a.wav", "txt": "hello", "start": true}', "'start' is true; wanted seconds"),
        ('{"wav": "a.wav", "txt": "hello", "start": -1}', "'start' is -1; wanted seconds, 0 or more"),
        ('{"wav": "a.wav", "txt": "hello", "duration": "long"}', "'duration' is \"long\"; wanted seconds"),
        ('{"wav": "a.wav", "txt": "hello", "duration": -3}', "'duration' is -3; wanted seconds"),
        ('{"wav": "a.wav", "txt": "hello", "start": 2, "end": 1}', "start 2 and end 1; wanted start < end"),
        ('{"messages": "hello"}', "'messages' is \"hello\"; wanted a list"),
        ('{"messages": []}', "the last of 'messages' is not the assistant's"),
        ('{"messages": [{"role": "user", "content": "hello"}]}', "the last of 'messages' is not the assistant's"),
        ('{"messages": ["hello"]}', "hello in the conversation; wanted"),
        ('{"messages": [{"audio": 5}]}', "{'audio': 5} in the conversation; wanted"),
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
            '{"messages": [{"role": "user", "content": "<audio>", "audio": [3]}, '
            '{"role": "assistant", "content": "hello"}]}',
            "wanted paths in 'audio' of 'messages'",
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


def test_a_bad_line_far_down_is_reported_with_its_number(tmp_path):
    path = write_manifest(tmp_path / "train.jsonl", [LINE] * 40_000 + [{"wav": "a.wav"}])
    with pytest.raises(InputError, match=r"jsonl:40001: missing \['txt'\]"):
        Manifest(path)


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
    path = write_manifest(tmp_path / "test.jsonl", [{"wav": "a.wav"}, {"messages": [QUESTION]}])
    assert [transcript_of(record) for record in Manifest(path, needs_text=False)] == [None, None]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(), values, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from(["wav", "txt", "key", "start", "end", "duration", "prompt", "messages", "other"])
TURNS = st.lists(st.dictionaries(st.sampled_from(["role", "content", "audio"]), JSON | st.just("<audio>")), max_size=3)
RECORDS = st.dictionaries(KEYS, JSON | TURNS, max_size=6) | st.fixed_dictionaries({"wav": st.text(), "txt": st.text()})
LINES = st.one_of(
    st.binary(max_size=60),
    JSON.map(json.dumps).map(str.encode),
    RECORDS.map(json.dumps).map(str.encode),
    RECORDS.map(json.dumps).flatmap(lambda text: st.integers(0, len(text)).map(lambda end: text[:end].encode())),
)


@given(
    lines=st.lists(LINES, min_size=1, max_size=4), end=st.sampled_from([b"\n", b"\r\n", b""]), needs_text=st.booleans()
)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_records_or_one_line_of_wrong_input_with_its_number(tmp_path, lines, end, needs_text):
    """What is accepted can be asked for its key, clips, transcript and duration."""
    path = tmp_path / "fuzz.jsonl"
    path.write_bytes(b"\n".join(lines) + end)
    try:
        manifest = Manifest(path, needs_text)
        for record in manifest:
            assert isinstance(key_of(record), str)
            assert all(isinstance(clip.audio, Path) for clip in clips_of(record))
            assert isinstance(transcript_of(record), str | None)
            json.dumps(record, default=str, ensure_ascii=False).encode()  # can be written into a result
        assert len(manifest) == len(path.read_bytes().rstrip(b"\n").split(b"\n"))
    except InputError as error:
        assert re.match(rf"{re.escape(str(path))}:(\d+): ", str(error)) or "the manifest is empty" in str(error)
        assert not re.search(r"[\r\n]", str(error))


def test_text_keeps_every_character_of_every_script(tmp_path):
    texts = ["你好,世界", "naïve 😀", "شكرا", "line\u2028separator and \u0085 next line"]
    manifest = Manifest(write_manifest(tmp_path / "train.jsonl", [{"wav": "a.wav", "txt": text} for text in texts]))
    assert [record["txt"] for record in manifest] == texts


def test_a_line_may_have_keys_of_its_own_whatever_their_names(tmp_path):
    manifest = Manifest(write_manifest(tmp_path / "train.jsonl", [{**LINE, "folder": "train", "where": "Paris"}]))
    assert clips_of(manifest[0])[0].audio == tmp_path / "a.wav"
    assert manifest[0]["where"] == f"{tmp_path / 'train.jsonl'}:1"


def test_a_key_without_a_value_is_as_none_at_all(tmp_path):
    assert parse_line(b'{"wav": "a.wav", "txt": "hello", "end": null}', "a:1", True) == LINE
    path = write_manifest(tmp_path / "train.jsonl", [{**LINE, "start": None, "end": None, "prompt": None}])
    assert Manifest(path)[0].keys() == RecordList([{**LINE, "folder": Path(), "end": None}])[0].keys()
    np.testing.assert_array_equal(RecordList([{**LINE, "duration": None, "end": None}]).durations, [np.nan])


def test_a_record_is_checked_without_a_manifest_too():
    check_record({"wav": "a.wav"}, "here", needs_text=False)
    with pytest.raises(InputError, match=r"^here: missing \['txt'\]; every line needs 'wav' and 'txt'$"):
        check_record({"wav": "a.wav"}, "here", needs_text=True)


def test_there_is_no_record_past_the_end(tmp_path):
    manifest = Manifest(write_manifest(tmp_path / "train.jsonl", [LINE] * 3))
    assert len(manifest) == len(list(manifest)) == 3
    with pytest.raises(IndexError):
        manifest[3]


# What a record tells


def test_the_transcript_is_the_text_or_the_last_answer_of_a_conversation():
    assert transcript_of(LINE) == "hello"
    assert transcript_of({"messages": [QUESTION, {**ANSWER, "content": "no"}, QUESTION, ANSWER]}) == "hello"
    for record in ({"wav": "a.wav"}, {"messages": [QUESTION]}, {"messages": []}):
        assert transcript_of(record) is None


def test_the_id_of_a_line_is_its_key_else_its_file_else_its_number(tmp_path):
    rows = [{**LINE, "key": "one"}, {**LINE, "wav": "wavs/two.flac"}, {"messages": [QUESTION, ANSWER]}]
    manifest = Manifest(write_manifest(tmp_path / "train 7.jsonl", [*rows, {**LINE, "key": 4}]))
    assert [key_of(record) for record in manifest] == ["one", "two", "line3", "4"]


def test_the_id_of_samples_is_their_number():
    samples = RecordList([{"wav": np.zeros(10)}, {"wav": np.zeros(10), "key": "b"}])
    assert [key_of(record) for record in samples] == ["line1", "b"]


def test_relative_paths_are_relative_to_the_manifest_and_absolute_ones_are_kept(tmp_path):
    path = write_manifest(tmp_path / "train.jsonl", [{**LINE, "wav": "wavs/a.wav"}, {**LINE, "wav": "/data/a.wav"}])
    clips = [clips_of(record) for record in Manifest(path)]
    assert clips == [[Clip(tmp_path / "wavs/a.wav", 0, None)], [Clip(Path("/data/a.wav"), 0, None)]]


def test_a_clip_is_the_segment_of_its_line():
    assert clips_of({"wav": "a.wav", "start": 1.5, "end": 2}) == [Clip(Path("a.wav"), 1.5, 2)]
    assert clips_of({"wav": Path("a.wav"), "start": 1.5}) == [Clip(Path("a.wav"), 1.5, None)]


def test_the_clips_of_a_conversation_come_in_the_order_of_its_turns():
    samples = np.zeros(10, np.float32)
    turns = [{**QUESTION, "audio": ["a.wav", "b.wav"]}, ANSWER, {**QUESTION, "audio": [samples]}, ANSWER]
    a, b, c = clips_of({"messages": turns, "folder": Path("data")})
    assert (a.audio, b.audio) == (Path("data/a.wav"), Path("data/b.wav"))
    assert c.audio is samples and (c.start, c.end) == (0, None)


@pytest.mark.parametrize(
    ("keys", "seconds"),
    [
        ({"duration": 2.5}, 2.5),
        ({"start": 1, "end": 1.5, "duration": 9}, 0.5),
        ({"end": 3}, 3),
        ({"start": 1}, np.nan),
        ({"duration": None}, np.nan),
    ],
)
def test_durations_come_from_the_segment_then_from_the_key_and_are_else_unknown(tmp_path, keys, seconds):
    (tmp_path / "a.wav").touch()
    records = Manifest(write_manifest(tmp_path / "train.jsonl", [{**LINE, **keys}]))
    for duration in (records.durations[0], stated_seconds(records[0]), RecordList([{**LINE, **keys}]).durations[0]):
        np.testing.assert_equal(float(duration), seconds)


def test_the_duration_of_samples_is_their_number_by_the_rate_and_that_of_a_conversation_is_unknown():
    samples = np.zeros(2 * SAMPLE_RATE)
    turns = [{**QUESTION, "audio": [samples]}, ANSWER]
    records = RecordList(
        [{"wav": samples}, {"wav": samples, "start": 0.5}, {"wav": Path("a.wav")}, {"messages": turns}]
    )
    np.testing.assert_array_equal(records.durations, [2, 1.5, np.nan, np.nan])


def test_the_duration_of_a_line_whose_audio_is_missing_is_unknown_whatever_it_states(tmp_path):
    (tmp_path / "a.wav").touch()
    names = ["a.wav", "missing.wav", str(tmp_path / "a.wav"), str(tmp_path / "missing.wav"), "null\0byte.wav"]
    rows = [{**LINE, "wav": name, "duration": 2.5} for name in names]
    manifest = Manifest(write_manifest(tmp_path / "train.jsonl", rows))
    np.testing.assert_array_equal(manifest.durations, [2.5, np.nan, 2.5, np.nan, np.nan])
    assert stated_seconds(manifest[1]) == 2.5


def test_missing_audio_is_found_wherever_it_stands_in_a_long_manifest(tmp_path):
    (tmp_path / "a.wav").touch()
    missing = [0, 999, 1000, 15_999, 16_000, 16_001, 33_332]  # around the ends of blocks that are looked up together
    rows = [{**LINE, "wav": "no.wav" if i in missing else "a.wav", "duration": i} for i in range(33_333)]
    manifest = Manifest(write_manifest(tmp_path / "train.jsonl", rows))
    assert np.flatnonzero(np.isnan(manifest.durations)).tolist() == missing
    assert np.nansum(manifest.durations) == sum(range(33_333)) - sum(missing)
    assert manifest[33_332] == {**rows[-1], "where": f"{manifest.path}:33333", "folder": tmp_path}


# Whole sources


def test_a_manifest_takes_a_few_bytes_of_memory_for_a_line_and_pickles_small(tmp_path):
    peaks = []
    for lines in (33_000, 66_000):
        path = write_manifest(tmp_path / "train.jsonl", [{**LINE, "txt": "hello " * 20, "duration": 1.5}] * lines)
        tracemalloc.start()
        manifest = Manifest(path)
        size, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        peaks.append(peak)
        assert size < 20 * lines + 20_000
    # Blocks of 16,000 records are in memory, two at a time; any other line costs two numbers and their copies.
    assert peaks[0] < 2 * 16_000 * 1000
    assert (peaks[1] - peaks[0]) / 33_000 < 40
    assert len(pickle.dumps(manifest)) < 16 * lines + 2000
    assert pickle.loads(pickle.dumps(manifest))[lines - 1]["where"] == f"{path}:{lines}"


def test_a_fingerprint_tells_records_apart(tmp_path):
    rows = [{**LINE, "duration": float(i)} for i in range(3)]
    others = [[*rows[:2], {**rows[2], "txt": "hullo"}], rows[:2], rows[::-1], [*rows, LINE]]
    for make in (lambda rows: Manifest(write_manifest(tmp_path / "a.jsonl", rows)), RecordList):
        assert make(rows).fingerprint() == make(rows).fingerprint() == make(rows).fingerprint(3)
        assert len({make(records).fingerprint() for records in (rows, *others)}) == 5


@pytest.mark.parametrize("end", ["\n", "", "\r\n"])
def test_the_fingerprint_of_the_first_lines_is_that_of_the_file_before_more_was_appended(tmp_path, end):
    lines = [json.dumps({**LINE, "txt": f"hello {i}"}) for i in range(4)]
    (tmp_path / "before.jsonl").write_text("\n".join(lines[:2]) + end)
    (tmp_path / "after.jsonl").write_text("\n".join(lines) + "\n")
    before, after = Manifest(tmp_path / "before.jsonl"), Manifest(tmp_path / "after.jsonl")
    assert after.fingerprint(2) == before.fingerprint() == before.fingerprint(2)
    assert len({after.fingerprint(count) for count in (1, 2, 3, 4)}) == 4
    assert after.fingerprint() == after.fingerprint(4)


def test_the_fingerprint_of_a_list_covers_its_first_records_paths_and_each_sample():
    samples = np.zeros(5000, np.float32)
    other = samples.copy()
    other[2500] = 1
    records = [{"wav": samples, "folder": Path("data")}, {"wav": samples}]
    assert RecordList(records).fingerprint(1) == RecordList(records[:1]).fingerprint()
    assert RecordList(records).fingerprint() != RecordList([records[0], {"wav": other}]).fingerprint()


def test_records_of_a_list_are_named_by_their_number_unless_they_say_where_they_come_from():
    records = [{"wav": "a.wav"}, {"wav": "b.wav", "where": "a.jsonl:7"}]
    assert [record["where"] for record in RecordList(records)] == ["record 1", "a.jsonl:7"]
    assert RecordList(records, "audio")[0]["where"] == "audio 1"
    assert "where" not in records[0]
    assert len(RecordList([])) == len(RecordList([]).durations) == 0


def test_records_come_from_a_manifest_or_from_a_kind_of_source_with_its_place(tmp_path, monkeypatch):
    path = write_manifest(tmp_path / "with:colon.jsonl", [{"wav": "a.wav"}])
    assert isinstance(open_records(path, needs_text=False), Manifest)
    with pytest.raises(InputError, match="missing"):
        open_records(str(path))
    echo = lambda place, needs_text: RecordList([{"wav": place, "txt": str(needs_text)}])  # noqa: E731
    monkeypatch.setitem(SOURCES, "echo", echo)  # a new kind is a function and a row
    assert open_records("echo:some:place")[0] == {"where": "record 1", "wav": "some:place", "txt": "True"}
    assert open_records("echo:", needs_text=False)[0]["txt"] == "False"


def test_a_kind_of_source_that_does_not_exist_is_wrong_input():
    with pytest.raises(InputError, match=r"^nosuch:place: no such file, and no source 'nosuch'; wanted one of "):
        open_records("nosuch:place")


# Options of decoding


@pytest.mark.parametrize(("option", "value"), [("num_beams", 0), ("max_new_tokens", 0), ("num_beams", -1)])
def test_a_decoding_option_out_of_range_is_wrong_input(option, value):
    with pytest.raises(InputError, match=f"^--{option} {value}: wanted 1 or more$"):
        DecodingOptions(**{option: value})


def test_decoding_options_do_not_change_and_penalties_may_be_negative():
    assert DecodingOptions(num_beams=1, max_new_tokens=1, length_penalty=-2.0).length_penalty == -2
    with pytest.raises(InputError, match="length_penalty nan"):
        DecodingOptions(length_penalty=float("nan"))
    with pytest.raises(FrozenInstanceError):
        DecodingOptions().num_beams = 2


def test_as_many_texts_as_beams_and_any_number_of_samples():
    assert DecodingOptions(num_beams=3, nbest=3).nbest == 3
    assert DecodingOptions(num_beams=1, nbest=9, do_sample=True).nbest == 9
    with pytest.raises(InputError, match=r"^--nbest 4: wanted as many --num_beams, or --do_sample$"):
        DecodingOptions(num_beams=3, nbest=4)


@pytest.mark.parametrize("option", [{"temperature": 0.5}, {"top_p": 0.9}, {"seed": 1}])
def test_an_option_of_samples_wants_them(option):
    with pytest.raises(InputError, match="change nothing without --do_sample"):
        DecodingOptions(**option)
    assert DecodingOptions(do_sample=True, **option).do_sample
