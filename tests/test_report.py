"""What report.py promises: the report of a result file, and the command line `python score.py`."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
from conftest import ROOT, write_manifest

from errors import InputError
from score import METRICS, NORMALIZERS, main

REFUSAL = "I apologize, but it appears that there is no speech to transcribe."
LONG_CHINESE = "甚至出现交易几乎停滞的情况一二线城市虽然也处于调整中" * 2  # 52 characters


@pytest.fixture
def data_path(tmp_path):
    """Three utterances; the first has 4 words, the second 2, the third 2."""
    texts = [("a.wav", "the cat sat down"), ("b.wav", "good morning"), ("c.wav", "thank you")]
    return write_manifest(tmp_path / "test.jsonl", [{"wav": wav, "txt": txt, "duration": 2.0} for wav, txt in texts])


def write_txt(folder: Path, *hypotheses: str) -> Path:
    path = folder / "result.txt"
    path.write_text("".join(f"{hypothesis}\n" for hypothesis in hypotheses), encoding="utf-8", newline="")
    return path


@pytest.fixture
def report_of(capsys):
    """report_of(data_path, result_path, *flags): what score.py prints."""

    def run_main(data_path: Path, result_path: Path, *flags: str) -> str:
        main(["--data_path", str(data_path), "--result_path", str(result_path), *flags])
        return capsys.readouterr().out

    return run_main


# The report


def test_the_summary_comes_first_and_the_counts_follow(data_path, report_of, tmp_path):
    result_path = write_txt(tmp_path, "the hat sat", "good morning", REFUSAL)
    report = report_of(data_path, result_path)
    lines = report.splitlines()
    assert lines[0] == "WER 175.00 / 33.33, 1 of 3 lines left out"
    assert lines[1].startswith("95 % interval ") and lines[1].endswith(", over 3 utterances")
    assert lines[2] == "wer counts words between whitespace; normalizer: none"
    assert lines[3].endswith(": errors 14: substitutions 3, deletions 1, insertions 10, reference length 8")
    assert lines[4].endswith(": errors 2: substitutions 1, deletions 1, insertions 0, reference length 6")


def test_each_line_left_out_is_listed_with_its_number_key_reason_and_text(data_path, report_of, tmp_path):
    report = report_of(data_path, write_txt(tmp_path, "", "", f"{REFUSAL} " * 5))
    line, text = report.splitlines()[5:7]
    assert line.startswith(f'left out: {data_path}:3 c: chat: "i apologize')
    assert text.strip().startswith(REFUSAL) and text.endswith("…") and len(text) < 100


def test_empty_lines_are_hypotheses(data_path, report_of, tmp_path):
    report = report_of(data_path, write_txt(tmp_path, "", "good morning", ""))
    assert report.startswith("WER 75.00 / 75.00, 0 of 3 lines left out\n")


@pytest.mark.parametrize("separator", ["\x0b", "\x0c", "\x1c", "\x85", "\u2028"])
def test_a_text_file_is_cut_at_line_feeds_only(data_path, report_of, tmp_path, separator):
    hypotheses = [f"the cat{separator}sat down", "good morning\r", "thank you"]
    report = report_of(data_path, write_txt(tmp_path, *hypotheses))
    assert report.startswith("WER 0.00 / 0.00, 0 of 3 lines left out\n")


def test_the_last_line_may_lack_its_line_feed(data_path, report_of, tmp_path):
    path = tmp_path / "result.txt"
    path.write_text("the cat sat down\ngood morning\nthank you")
    assert report_of(data_path, path).startswith("WER 0.00 / 0.00")


def test_json_lines_are_matched_by_order_and_key(data_path, report_of, tmp_path):
    predictions = {"a": "the cat sat", "b": "good morning", "c": "thank you"}
    records = [{"key": k, "wav": f"{k}.wav", "txt": "unused", "pred": p} for k, p in predictions.items()]
    report = report_of(data_path, write_manifest(tmp_path / "result.jsonl", records))
    assert report.startswith("WER 12.50 / 12.50, 0 of 3 lines left out\n")


@pytest.mark.parametrize(
    ("record", "key"),
    [
        ({"wav": "audio/b.flac", "txt": "hello"}, "b"),
        ({"wav": "audio/b.flac", "txt": "hello", "key": "utterance 7"}, "utterance 7"),
        ({"wav": "audio/b.flac", "txt": "hello", "key": 7}, 7),
        ({"messages": [{"role": "assistant", "content": "hello"}]}, "line2"),
    ],
)
def test_a_key_is_the_manifests_or_the_files_stem_or_for_messages_the_line(report_of, tmp_path, record, key):
    data_path = write_manifest(tmp_path / "test.jsonl", [{"wav": "a.wav", "txt": "hello"}, record])
    predictions = [{"key": "a", "pred": "hello"}, {"key": key, "pred": "hello"}]
    report = report_of(data_path, write_manifest(tmp_path / "r.jsonl", predictions))
    assert report.startswith("WER 0.00 / 0.00, 0 of 2 lines left out\n")


def test_json_output_is_one_object_of_fractions(data_path, report_of, tmp_path):
    result_path = write_txt(tmp_path, "the hat sat", "good morning", REFUSAL)
    result = json.loads(report_of(data_path, result_path, "--json"))
    counts = {"substitutions": 1, "deletions": 1, "insertions": 0, "reference_length": 6, "rate": 2 / 6}
    low, high = result["filtered"].pop("interval_over_utterances")
    assert low <= 2 / 6 <= high
    assert result["filtered"] == counts
    assert result["all"]["rate"] == 14 / 8
    assert (result["metric"], result["normalizer"], result["num_lines"]) == ("wer", "none", 3)
    assert (result["num_not_scored"], result["num_unknown_durations"]) == (0, 0)
    assert [(line["place"], line["key"], line["pred"]) for line in result["hallucinated"]] == [
        (f"{data_path}:3", "c", REFUSAL)
    ]


def test_an_undefined_rate_is_null_in_json(report_of, tmp_path):
    data_path = write_manifest(tmp_path / "test.jsonl", [{"wav": "silence.wav", "txt": ""}])
    report = report_of(data_path, write_txt(tmp_path, "hello"), "--json")
    assert json.loads(report)["all"]["rate"] is None


def test_metric_and_normalizer_are_options(report_of, tmp_path):
    data_path = write_manifest(tmp_path / "test.jsonl", [{"wav": "a.wav", "txt": "ab cd"}])
    options = ("--metric", "cer", "--normalizer", "basic")
    report = report_of(data_path, write_txt(tmp_path, "AB, cx"), *options)
    assert report.startswith("CER 25.00 / 25.00, 0 of 1 lines left out\n")


def test_lines_without_a_reference_are_counted_and_not_scored(report_of, tmp_path):
    question = {"role": "user", "content": "<audio>", "audio": ["d.wav"]}
    answer = {"role": "assistant", "content": "good day"}
    records = [
        {"wav": "a.wav"},
        {"wav": "b.wav", "txt": "hello"},
        {"messages": [question, answer]},
        {"messages": [question]},
    ]
    data_path = write_manifest(tmp_path / "test.jsonl", records)
    result_path = write_txt(tmp_path, "x", "hello", "good night", "y")
    report = report_of(data_path, result_path)
    assert report.startswith("WER 33.33 / 33.33, 0 of 2 lines left out\n")
    assert "not scored: 2 lines without a reference" in report


@pytest.mark.parametrize(
    ("times", "left_out"),
    [
        ({"duration": 1.0}, 1),
        ({"duration": 60}, 0),
        ({"start": 30.0, "end": 31.0}, 1),
        ({"start": 30.0, "end": 90.0}, 0),
        ({}, 1),  # the file has one second
        ({"wav": "missing.wav"}, 0),
        ({"wav": "broken.wav"}, 0),
    ],
)
def test_durations_come_from_the_manifest_or_from_the_audio(report_of, tmp_path, times, left_out):
    (tmp_path / "audio").mkdir()
    soundfile.write(tmp_path / "audio" / "second.wav", [0.0] * 8000, 8000)
    (tmp_path / "broken.wav").write_bytes(b"no audio")
    data_path = write_manifest(tmp_path / "test.jsonl", [{"wav": "audio/second.wav", "txt": "是", **times}])
    report = report_of(data_path, write_txt(tmp_path, LONG_CHINESE))
    assert f", {left_out} of 1 lines left out" in report
    assert ("duration unknown: 1 lines" in report) == ("wav" in times)


# The command line


def sentences(text: str) -> list[str]:
    """whole lines"""
    return [text]


def no_digits():
    """no digits"""
    return lambda text: "".join(letter for letter in text if not letter.isdigit())


def test_a_metric_or_a_normalizer_is_a_function_and_a_row(monkeypatch, report_of, capsys, data_path, tmp_path):
    monkeypatch.setitem(METRICS, "ser", sentences)
    monkeypatch.setitem(NORMALIZERS, "letters", no_digits)
    result_path = write_txt(tmp_path, "the cat sat down1", "good moaning", "thank you")
    report = report_of(data_path, result_path, "--metric", "ser", "--normalizer", "letters")
    assert report.startswith("SER 33.33 / 33.33, 0 of 3 lines left out\n")
    assert "ser counts whole lines; normalizer: letters" in report
    with pytest.raises(SystemExit):
        main(["--help"])
    help_text = " ".join(capsys.readouterr().out.split())
    for text in (
        "{auto,wer,cer,ser}",
        "ser: whole lines",
        "{none,basic,english,chinese,letters}",
        "letters: no digits",
    ):
        assert text in help_text


def test_help_states_the_defaults(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    for option in ("--data_path", "--result_path", "--metric", "--normalizer", "--json", "(default: none)"):
        assert option in text


def test_help_and_error_rates_from_python_do_without_torch():
    code = """
import contextlib, sys, score
with contextlib.suppress(SystemExit):
    score.main(["--help"])
assert score.score(["a"], ["b"]).all.errors == 1
print({"torch", "whisper", "soundfile"} & sys.modules.keys())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.startswith("usage: ") and done.stdout.endswith("\nset()\n"), done.stderr


def test_where_a_text_cannot_be_shown_the_numbers_still_can(data_path, tmp_path, monkeypatch):
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", screen)
    result_path = write_txt(tmp_path, "", "", "抱歉，没有可以转录的内容。")
    main(["--data_path", str(data_path), "--result_path", str(result_path)])
    screen.flush()
    shown = screen.buffer.getvalue().decode("ascii")
    assert shown.startswith("WER ") and "\\u62b1" in shown


GOOD = '{"wav": "a.wav", "txt": "hello"}\n'


@pytest.mark.parametrize(
    ("manifest", "name", "result", "message"),
    [
        (None, "result.txt", "hello\n", "test.jsonl: no such manifest"),
        (GOOD, "result.txt", None, "result.txt: no such result file"),
        ("", "result.txt", "", "test.jsonl: the manifest is empty"),
        ('{"wav": "a.wav"}\n', "result.txt", "hello\n", "none with a reference"),
        (GOOD + "{wav}\n", "result.txt", "hello\n", "test.jsonl:2: malformed JSON"),
        ('{"messages": ["hello"]}\n', "result.txt", "hello\n", "test.jsonl:1: hello in the conversation"),
        (GOOD, "result.txt", "hello\nhello\n", "result.txt: found 2 lines; wanted 1"),
        (GOOD, "result.txt", "", "result.txt: found 0 lines; wanted 1"),
        (GOOD, "result.trn", "hello\n", "result.trn: no such result file; wanted a .txt or .jsonl"),
        (GOOD, "result.jsonl", "hello\n", "result.jsonl:1: wanted a JSON object"),
        (GOOD, "result.jsonl", "[1]\n", "result.jsonl:1: wanted a JSON object"),
        (GOOD, "result.jsonl", '{"pred": "hello"}\n', "result.jsonl:1: wanted a JSON object with 'key'"),
        (GOOD, "result.jsonl", '{"key": "a"}\n', "result.jsonl:1: wanted a JSON object with 'key' and 'pred'"),
        (GOOD, "result.jsonl", '{"key": "a", "pred": 5}\n', "result.jsonl:1: wanted a JSON object with 'key' and"),
        (GOOD, "result.jsonl", '{"key": "b", "pred": "x"}\n', "result.jsonl:1: found key 'b'; wanted 'a'"),
        (GOOD, "result.jsonl", "", "result.jsonl: found 0 lines; wanted 1"),
        (GOOD, "result.jsonl", '{"key": "a", "pred": "x"}\n' * 2, "result.jsonl: found 2 lines; wanted 1"),
    ],
)
def test_wrong_input_is_one_line(report_of, tmp_path, manifest, name, result, message):
    for path, content in ((tmp_path / "test.jsonl", manifest), (tmp_path / name, result)):
        if content is not None:
            path.write_text(content)
    with pytest.raises(InputError, match=f"^{re.escape(str(tmp_path))}.*{re.escape(message)}") as error:
        report_of(tmp_path / "test.jsonl", tmp_path / name)
    assert "\n" not in str(error.value)


def test_wrong_input_is_one_line_on_standard_error_and_exit_status_2(data_path, tmp_path):
    command = [sys.executable, ROOT / "score.py", "--data_path", data_path, "--result_path", tmp_path / "none.txt"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(f"error: {tmp_path / 'none.txt'}: no such result file; wanted ")


def test_text_that_is_not_utf8_is_wrong_input(report_of, data_path, tmp_path):
    path = tmp_path / "result.txt"
    path.write_bytes("caf\xe9\n\n\n".encode("latin-1"))
    with pytest.raises(InputError, match=f"^{re.escape(str(path))}: cannot be read.*UTF-8$"):
        report_of(data_path, path)


@pytest.mark.parametrize(
    "flags", [("--metric", "ser"), ("--normalizer", "french"), ("--normaliser", "basic"), ("--norm", "basic")]
)
def test_a_wrong_option_is_named_with_exit_status_2(capsys, data_path, tmp_path, flags):
    with pytest.raises(SystemExit) as exit:
        main(["--data_path", str(data_path), "--result_path", str(write_txt(tmp_path, "", "", "")), *flags])
    screen = capsys.readouterr()
    assert (exit.value.code, screen.out) == (2, "")
    assert flags[0] in screen.err.splitlines()[-1]
