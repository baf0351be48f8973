"""What result_file.py promises: the lines of a result beside those of its manifest. More of it is in test_report.py."""

import json

import pytest
from conftest import write_manifest

from errors import InputError
from result_file import Line, parse_line, read_rows


def row(**values) -> str:
    return json.dumps({"key": "a", "pred": "hello", **values})


def test_words_with_confidences_are_read_where_there_are_some():
    words = [{"word": "hello", "confidence": 0.5, "start": 1.0}]
    assert parse_line(row(words=words), "r:1") == Line("hello", words, "a")
    assert parse_line(row(words=None), "r:1") == parse_line(row(), "r:1") == Line("hello", None, "a")


@pytest.mark.parametrize(
    "words",
    [
        "hello",
        7,
        [{"word": "hello"}],
        [{"confidence": 0.5}],
        ["hello"],
        [{"word": "hello", "confidence": 1.01}],
        [{"word": "hello", "confidence": -0.1}],
        [{"word": "hello", "confidence": "high"}],
        [{"word": "hello", "confidence": float("nan")}],
        [{"word": 5, "confidence": 0.5}],
        {"word": "hello", "confidence": 0.5},
    ],
)
def test_words_without_a_confidence_between_0_and_1_are_wrong_input(words):
    with pytest.raises(InputError, match=r"^r\.jsonl:3: 'words' wants a list of "):
        parse_line(row(words=words), "r.jsonl:3")


def test_values_of_keys_and_indices_are_those_of_the_scored_records(tmp_path):
    records = [
        {"wav": "a.wav", "language": "de"},
        {"wav": "b.wav", "txt": "x", "language": "fr", "speaker": 1},
        {"wav": "c.wav", "txt": "y", "speaker": 2},
    ]
    (tmp_path / "r.txt").write_text("1\n2\n3\n")
    rows = read_rows(str(write_manifest(tmp_path / "m.jsonl", records)), str(tmp_path / "r.txt"), ["language"])
    assert (rows.indices, rows.values["language"], rows.speakers) == ([1, 2], ["fr", None], ["1", "2"])
    assert (rows.references, rows.hypotheses, rows.num_not_scored) == (["x", "y"], ["2", "3"], 1)


@pytest.mark.parametrize("speakers", [[None, "anna"], ["anna", "anna"], [None, None]])
def test_speakers_count_where_every_line_has_one_and_there_are_several(tmp_path, speakers):
    records = [{"wav": "a.wav", "txt": "x", "speaker": speaker} for speaker in speakers]
    (tmp_path / "r.txt").write_text("1\n2\n")
    assert read_rows(str(write_manifest(tmp_path / "m.jsonl", records)), str(tmp_path / "r.txt")).speakers is None
