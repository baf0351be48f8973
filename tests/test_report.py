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

from errors import InputError, run
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
    run(lambda: main(["--data_path", str(data_path), "--result_path", str(result_path)]))
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


# Flags and sections, each of a file of its own


@pytest.fixture
def corpus(tmp_path):
    """A folder with a manifest of twelve lines of six speakers, and the results of two systems, b the better one."""
    texts = ["the cat sat down", "good morning everyone", "thank you very much", ""] * 3
    records = [
        {
            "wav": f"{n}.wav",
            "txt": text,
            "duration": 1.0 + 3 * (n % 2),
            "speaker": n // 2,
            "language": "ende"[n % 2 :: 2],
        }
        for n, text in enumerate(texts)
    ]
    write_manifest(tmp_path / "test.jsonl", records)
    first = [text.replace("the", "a").replace("morning", "moaning") or "you" for text in texts]
    (tmp_path / "a.txt").write_text("".join(f"{text}\n" for text in first))
    words = [[{"word": word, "confidence": 0.9} for word in text.split()] for text in texts]
    rows = [
        {"key": str(n), "pred": text, "words": line} for n, (text, line) in enumerate(zip(texts, words, strict=True))
    ]
    write_manifest(tmp_path / "b.jsonl", rows)
    return tmp_path


def test_intervals_stand_below_the_summary_over_utterances_and_over_speakers(corpus, report_of):
    lines = report_of(corpus / "test.jsonl", corpus / "a.txt").splitlines()
    pattern = r"95 % interval [\d.]+ to [\d.]+ / [\d.]+ to [\d.]+, over (12 utterances|6 speakers)"
    assert [re.fullmatch(pattern, line)[1] for line in lines[1:3]] == ["12 utterances", "6 speakers"]
    assert "interval" not in report_of(corpus / "test.jsonl", corpus / "a.txt", "--num_resamples", "0")


def test_text_from_nothing_is_told_where_references_are_empty(corpus, report_of):
    report = report_of(corpus / "test.jsonl", corpus / "a.txt")
    assert "text from nothing: 15.00 words a minute (3 words in 3 of 3 clips without speech, 12.0 s)" in report
    figures = json.loads(report_of(corpus / "test.jsonl", corpus / "a.txt", "--json"))
    assert figures["text_from_nothing"]["words_per_minute"] == 15


def test_text_from_nothing_of_unknown_length_is_null_in_json(report_of, tmp_path):
    data_path = write_manifest(tmp_path / "test.jsonl", [{"wav": "a.wav", "txt": ""}])
    figures = json.loads(report_of(data_path, write_txt(tmp_path, "you"), "--json"))["text_from_nothing"]
    assert (figures["num_words"], figures["seconds"], figures["words_per_minute"]) == (1, None, None)


def test_groups_and_confusions_are_tables(corpus, report_of):
    flags = ("--by", "language", "duration", "--confusions", "2")
    lines = [line.split() for line in report_of(corpus / "test.jsonl", corpus / "a.txt", *flags).splitlines()]
    assert ["by", "language", "lines", "words", "WER", "95", "%", "interval"] in lines
    assert ["0", "to", "2", "s", "6", "24", "12.50"] in [line[:7] for line in lines]
    assert ["3", "x", "the", "->", "a"] in lines
    figures = json.loads(report_of(corpus / "test.jsonl", corpus / "a.txt", *flags, "--json"))
    assert [group["num_lines"] for group in figures["by_duration"]] == [6, 6]
    assert figures["confusions"][0] == {"reference": "the", "hypothesis": "a", "count": 3}


def test_a_key_that_no_record_has_is_wrong_input(corpus, report_of):
    with pytest.raises(InputError, match=r"test\.jsonl: no record has the key 'accent', for --by accent"):
        report_of(corpus / "test.jsonl", corpus / "a.txt", "--by", "accent")


def test_confidences_make_a_table(corpus, report_of):
    report = report_of(corpus / "test.jsonl", corpus / "b.jsonl")
    assert "confidence of 33 words: expected calibration error 0.100" in report
    assert "confidence" not in report_of(corpus / "test.jsonl", corpus / "a.txt")
    figures = json.loads(report_of(corpus / "test.jsonl", corpus / "b.jsonl", "--json"))["reliability"]
    assert figures["num_words"] == 33 and figures["bins"][0]["accuracy"] == 1


def compare(capsys, corpus: Path, *flags: str) -> str:
    main(["--data_path", f"{corpus}/test.jsonl", "--compare", f"{corpus}/a.txt", f"{corpus}/b.jsonl", *flags])
    return capsys.readouterr().out


def test_two_systems_are_compared_with_the_lines_that_differ_most(corpus, capsys):
    lines = compare(capsys, corpus).splitlines()
    assert lines[0].startswith(f"{corpus}/a.txt: WER ") and lines[3].startswith(f"{corpus}/b.jsonl: WER 0.00 / 0.00")
    tests = [line for line in lines if line.startswith("all lines, over ")]
    assert len(tests) == 2 and all(re.search(r"difference -27.27, .* p = 0\.0\d+$", line) for line in tests)
    assert "the second is better in 9 lines, worse in 0; most in these:" in lines
    shown = lines.index(f"{corpus}/test.jsonl:1 0: errors 1 -> 0")
    assert lines[shown + 1 : shown + 4] == [
        "    first     a cat sat down",
        "    second    the cat sat down",
        "    reference the cat sat down",
    ]


def test_a_comparison_in_json_has_the_figures_of_both_systems(corpus, capsys):
    figures = json.loads(compare(capsys, corpus, "--json"))
    assert figures["first"]["all"]["rate"] == 9 / 33 and figures["second"]["all"]["rate"] == 0
    assert figures["test_over_utterances"]["p_value"] < 0.05 and figures["num_better"] == 9
    assert len(figures["different"]) == 9


def test_a_page_is_written_beside_the_report(corpus, report_of):
    report = report_of(corpus / "test.jsonl", corpus / "a.txt", "--html", str(corpus / "report.html"))
    page = (corpus / "report.html").read_text(encoding="utf-8")
    assert f"<h1>{report.splitlines()[0]}</h1>" in page and page.count("<article") == 9


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--result_path a.txt --compare a.txt b.jsonl", "not allowed with argument"),
        ("", "one of the arguments --result_path --compare is required"),
        ("--compare a.txt", "expected 2 arguments"),
        (
            "--compare a.txt b.jsonl --html page.html",
            "--compare: give --by, --confusions and --html with --result_path",
        ),
        ("--compare a.txt b.jsonl --num_resamples 0", "--num_resamples 0: --compare wants some"),
        ("--result_path a.txt --num_resamples -1", "wanted 0 or more"),
        ("--result_path a.txt --by", "expected at least one argument"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(capsys, flags, message):
    with pytest.raises(SystemExit) as exit:
        main(["--data_path", "test.jsonl", *flags.split()])
    assert exit.value.code == 2 and message in capsys.readouterr().err
