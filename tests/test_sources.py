"""What sources.py promises: records in memory, of a folder, or of another project's manifest, as if of a manifest."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import SAMPLE_RATE, noise, write_manifest

from dataset import open_records
from errors import InputError
from manifest import clips_of, key_of, transcript_of


@pytest.fixture
def folder(tmp_path) -> Path:
    """a.flac with its transcript, below/b.wav without, and a file of another kind."""
    (tmp_path / "below").mkdir()
    soundfile.write(tmp_path / "a.flac", noise(1), SAMPLE_RATE)
    soundfile.write(tmp_path / "below" / "b.wav", noise(2), SAMPLE_RATE)
    (tmp_path / "a.txt").write_text("hello\n  wörld \n", encoding="utf-8")
    (tmp_path / "notes.md").touch()
    return tmp_path


def test_a_folder_has_a_record_for_each_audio_file_with_the_text_beside_it(folder):
    records = open_records(f"folder:{folder}", needs_text=False)
    assert [key_of(record) for record in records] == ["a", "b"]
    assert [transcript_of(record) for record in records] == ["hello wörld", None]
    assert [clips_of(record)[0].audio for record in records] == [folder / "a.flac", folder / "below" / "b.wav"]
    assert records[0]["where"] == str(folder / "a.flac")
    assert np.isnan(records.durations).all()


def test_a_folder_to_train_on_needs_the_text_of_every_file(folder):
    with pytest.raises(InputError, match=r"^\S*below/b\.wav: missing \['txt'\]"):
        open_records(f"folder:{folder}")


@pytest.mark.parametrize("place", ["empty", "nowhere"])
def test_a_folder_without_audio_is_an_error(tmp_path, place):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=rf"^{tmp_path / place}: wanted a folder with \.wav"):
        open_records(f"folder:{tmp_path / place}")


def test_the_lines_of_a_nemo_manifest_are_records_with_segments(tmp_path):
    rows = [
        {"audio_filepath": "wavs/a.wav", "text": "hello", "duration": 2.5},
        {"audio_filepath": "/data/b.wav", "text": "line\u2028separator", "duration": 2, "offset": 1.5},
    ]
    records = open_records(f"nemo:{write_manifest(tmp_path / 'nemo.json', rows)}")
    assert [transcript_of(record) for record in records] == ["hello", "line\u2028separator"]
    assert [tuple(clips_of(record)[0]) for record in records] == [
        (tmp_path / "wavs/a.wav", 0, None),
        (Path("/data/b.wav"), 1.5, 3.5),
    ]
    assert records.durations.tolist() == [2.5, 2]
    assert records[1]["where"] == f"{tmp_path / 'nemo.json'}:2"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "wanted a JSON object with 'audio_filepath'"),
        ('{"text": "hello"}', "'audio_filepath'.*wanted a JSON object with 'audio_filepath'"),
        ("5", "wanted a JSON object with 'audio_filepath'"),
        ('{"audio_filepath": "a.wav"}', r"missing \['txt'\]"),
        ('{"audio_filepath": "a.wav", "text": "hello", "duration": "long"}', "'duration' is \"long\"; wanted seconds"),
        ('{"audio_filepath": "a.wav", "text": "hello", "duration": "long", "offset": 1}', "'duration' is \"long\""),
    ],
)
def test_a_bad_line_of_a_nemo_manifest_is_reported_with_its_number(tmp_path, line, told):
    path = tmp_path / "nemo.json"
    path.write_text(json.dumps({"audio_filepath": "a.wav", "text": "hello"}) + f"\n{line}\n")
    with pytest.raises(InputError, match=f"^{path}:2: .*{told}"):
        open_records(f"nemo:{path}")


def test_a_nemo_manifest_that_is_missing_is_an_error(tmp_path):
    with pytest.raises(InputError, match=rf"^nemo:{tmp_path}/nowhere\.json: no such file"):
        open_records(f"nemo:{tmp_path}/nowhere.json")


def test_an_unknown_kind_is_told_the_known_ones():
    with pytest.raises(
        InputError, match=r"^sheet:data/train: no such file, and no source 'sheet'; wanted one of folder"
    ):
        open_records("sheet:data/train")


@pytest.fixture
def kaldi(tmp_path) -> Path:
    (tmp_path / "wav.scp").write_text("rec1 /data/a.wav\nrec2 b c.flac\n")
    (tmp_path / "text").write_text("rec1 hello world\nrec2 甚至 出现\n", encoding="utf-8")
    return tmp_path


def test_a_kaldi_folder_has_a_record_for_each_line_of_wav_scp(kaldi):
    records = open_records(f"kaldi:{kaldi}")
    assert [key_of(record) for record in records] == ["rec1", "rec2"]
    assert [transcript_of(record) for record in records] == ["hello world", "甚至 出现"]
    assert [clips_of(record)[0].audio for record in records] == [Path("/data/a.wav"), Path("b c.flac")]
    assert records[1]["where"] == f"{kaldi / 'wav.scp'}:2" and np.isnan(records.durations).all()


def test_columns_may_stand_apart_by_tabs_and_bad_lines_keep_their_number(kaldi):
    (kaldi / "text").write_text("rec1\thello  world\nrec2\n")
    assert [transcript_of(record) for record in open_records(f"kaldi:{kaldi}")] == ["hello  world", ""]
    (kaldi / "text").write_text("\nrec1 a\nrec1 b\n")
    with pytest.raises(InputError, match="text:3: 'rec1' stands in line 2 too"):
        open_records(f"kaldi:{kaldi}")


def test_or_for_each_line_of_segments(kaldi):
    (kaldi / "segments").write_text("u1 rec1 0.5 2.25\nu2 rec2 0 1\nu3 rec1 3 4\n")
    (kaldi / "text").write_text("u1 one\nu2 two\nu3 three\n")
    records = open_records(f"kaldi:{kaldi}")
    assert [tuple(clips_of(record)[0])[1:] for record in records] == [(0.5, 2.25), (0, 1), (3, 4)]
    assert records.durations.tolist() == [1.75, 1, 1] and transcript_of(records[2]) == "three"


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("wav.scp", "rec1 flac -dc a.flac |\n", r"wav\.scp:1: 'flac .*' is a shell command, which is not run"),
        ("wav.scp", "rec1 a.wav\nrec1 b.wav\n", r"wav\.scp:2: 'rec1' stands in line 1 too"),
        ("wav.scp", "rec1 a.wav\nrec3 b.wav\n", r"wav\.scp:2: missing \['txt'\]"),
        ("segments", "u1 rec1 0.5\n", r"segments:1: 'rec1 0\.5'; wanted a key of wav\.scp, start and end"),
        ("segments", "u1 rec9 0 1\n", r"segments:1: 'rec9 0 1'; wanted a key of wav\.scp, start and end"),
        ("segments", "rec1 rec1 2 1\n", r"segments:1: start 2\.0 and end 1\.0; wanted start < end"),
    ],
)
def test_a_kaldi_folder_that_is_wrong_is_told_with_file_and_line(kaldi, name, text, told):
    (kaldi / name).write_text(text)
    with pytest.raises(InputError, match=told):
        open_records(f"kaldi:{kaldi}")


def test_a_kaldi_folder_without_wav_scp_is_told(tmp_path):
    with pytest.raises(InputError, match=r"wav\.scp: no such file; wanted a Kaldi data folder"):
        open_records(f"kaldi:{tmp_path}")


@pytest.mark.parametrize(
    ("amount", "numbers"),
    [
        (":3", "012"),
        (":30%", "012"),
        ("80%:", "89"),
        ("2:4", "23"),
        ("-1:", "9"),
        ("50%:7", "56"),
        (":99", "0123456789"),
    ],
)
def test_a_part_of_any_source_can_be_taken(tmp_path, amount, numbers):
    rows = [{"wav": "a.wav", "txt": str(i), "end": i + 1} for i in range(10)]
    (tmp_path / "a.wav").touch()
    path = write_manifest(tmp_path / "m.jsonl", rows)
    records = open_records(path, data_amount=amount)
    assert "".join(transcript_of(record) for record in records) == numbers
    assert records.durations.tolist() == [int(number) + 1 for number in numbers]
    assert records[0]["where"] == f"{path}:{int(numbers[0]) + 1}"


def test_a_part_from_the_first_record_has_the_fingerprint_of_a_shorter_source(tmp_path):
    rows = [{"wav": f"{i}.wav", "txt": str(i)} for i in range(10)]
    path, short = write_manifest(tmp_path / "m.jsonl", rows), write_manifest(tmp_path / "s.jsonl", rows[:4])
    part = open_records(path, data_amount=":40%")
    assert part.fingerprint() == open_records(short).fingerprint() == open_records(path).fingerprint(4)
    assert open_records(path, data_amount="4:6").fingerprint() == open_records(path, data_amount="4:8").fingerprint(2)
    assert open_records(path, data_amount="4:6").fingerprint() != open_records(path, data_amount=":6").fingerprint()


@pytest.mark.parametrize("amount", ["3", ":3:1", "a:", ":1.5%", "10:", "5:5", ":0%"])
def test_a_part_that_is_none_is_told(tmp_path, amount):
    path = write_manifest(tmp_path / "m.jsonl", [{"wav": f"{i}.wav", "txt": str(i)} for i in range(10)])
    with pytest.raises(
        InputError, match=rf"^--data_amount {amount}: (wanted a stretch, such as :1000|leaves none of 10)"
    ):
        open_records(path, data_amount=amount)


def test_an_option_of_which_a_source_has_no_use_is_told(tmp_path, kaldi):
    path = write_manifest(tmp_path / "m.jsonl", [{"wav": "a.wav", "txt": "a"}])
    with pytest.raises(InputError, match=r"^--data_split: a manifest has no use for it; wanted a --data_path hf:PLACE"):
        open_records(path, data_split="dev")
    with pytest.raises(InputError, match=r"^--remap_keys: kaldi has no use for it"):
        open_records(f"kaldi:{kaldi}", remap_keys='{"a": "txt"}', data_amount=":1")
