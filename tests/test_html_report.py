"""What html_report.py promises: one page with everything in it."""

import base64
import io
import re

import pytest
import soundfile
from conftest import write_manifest

from errors import InputError
from html_report import MAX_LINES, write
from result_file import read_rows
from score import score

TEXTS = [  # reference, hypothesis
    ("the cat sat down", "the cat sat down"),
    ("good morning", "god morning"),
    ("the old man ran home", "the man ran home and"),
    ("<b>bold</b> & more", '<script>alert("x")</script> & more'),
    ("hello there", "I'm sorry, but I cannot transcribe this audio."),
]


@pytest.fixture
def page_of(tmp_path):
    """page_of(texts): the page of a corpus whose clips have half a second of audio; the last has none."""

    def write_page(texts: list[tuple[str, str]]) -> str:
        soundfile.write(tmp_path / "a.wav", [0.1, -0.1] * 4000, 16000)
        wavs = ["a.wav"] * (len(texts) - 1) + ["missing.wav"]
        records = [
            {"wav": wav, "key": f"line{number}", "txt": text}
            for number, (wav, (text, _)) in enumerate(zip(wavs, texts, strict=True))
        ]
        (tmp_path / "result.txt").write_text("".join(f"{hypothesis}\n" for _, hypothesis in texts))
        data_path = write_manifest(tmp_path / "test.jsonl", records)
        rows = read_rows(str(data_path), str(tmp_path / "result.txt"))
        result = score(rows.references, rows.hypotheses, rows.durations)
        write(str(tmp_path / "report.html"), [result.summary(), "more"], result, rows, "words")
        return (tmp_path / "report.html").read_text(encoding="utf-8")

    return write_page


def test_lines_with_errors_stand_on_the_page_the_worst_first(page_of):
    page = page_of(TEXTS)
    assert re.findall(r"<header><b>(\w+)</b>", page) == ["line4", "line2", "line1", "line3"]
    assert page.count("<h1>WER ") == 1 and "of the 4 lines with errors" in page


def test_errors_are_marked_by_their_kind(page_of):
    page = page_of(TEXTS)
    assert re.search(r'<span class="substitute"><b>good</b>\s*<i>god</i></span>', page)
    assert re.search(r'<span class="delete"><s>old</s>\s*<i></i></span>', page)
    assert re.search(r'<span class="insert"><b></b>\s*<i>and</i></span>', page)
    assert re.search(r'<p class="reason">left out: chat: ', page)


def test_the_page_needs_nothing_else_and_its_audio_can_be_read(page_of):
    page = page_of(TEXTS)
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == 3 and all(source.startswith("data:audio/mpeg;base64,") for source in sources)
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(sources[0].partition(",")[2])))
    assert rate == 16000 and len(samples) == pytest.approx(8000, abs=2400)
    assert "http" not in re.sub(r'src="[^"]*"', "", page)


def test_a_clip_that_cannot_be_read_is_told_on_its_line(page_of):
    assert page_of(TEXTS).count("no audio: ") == 1


def test_texts_are_escaped(page_of):
    page = page_of(TEXTS)
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page and "<b>bold" not in page


def test_a_page_has_a_bounded_number_of_lines(page_of):
    page = page_of([("a", "b")] * (MAX_LINES + 1))
    assert page.count("<article") == MAX_LINES and f"of the {MAX_LINES + 1} lines with errors" in page


def test_a_page_without_errors_is_a_page(page_of):
    assert "of the 0 lines with errors" in page_of([("a", "a")])


def test_a_file_that_cannot_be_written_is_wrong_input(page_of, tmp_path):
    page_of(TEXTS)
    rows = read_rows(str(tmp_path / "test.jsonl"), str(tmp_path / "result.txt"))
    with pytest.raises(InputError, match=r"no/report\.html: cannot be written"):
        write(str(tmp_path / "no" / "report.html"), ["x"], score(rows.references, rows.hypotheses), rows, "words")
