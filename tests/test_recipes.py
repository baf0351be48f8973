"""recipes/: the digits are made of recordings as the Free Spoken Digit Dataset has them, and wrong ones are told."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import ROOT

import train
from dataset import open_records
from errors import InputError
from recipes.digits import prepare

SPEAKERS = ("anna", "bert", "carl")


def make_recordings(folder: Path, speakers: tuple[str, ...] = SPEAKERS, takes: int = 2) -> Path:
    """A folder of tones with the dataset's rate and file names: `takes` of every digit by every speaker."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for digit in range(10):
        for speaker in speakers:
            for take in range(takes):
                times = np.arange(round(rng.uniform(0.2, 0.5) * prepare.RATE)) / prepare.RATE
                tone = rng.uniform(0.01, 0.9) * np.sin(2 * np.pi * (200 + 100 * digit) * times)
                soundfile.write(folder / f"{digit}_{speaker}_{take}.wav", tone, prepare.RATE)
    return folder


@pytest.fixture(scope="module")
def recordings(tmp_path_factory) -> Path:
    return make_recordings(tmp_path_factory.mktemp("digits") / "recordings")


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_last_speaker_is_heard_in_the_test_set_alone(recordings, tmp_path, capsys):
    prepare.main([str(tmp_path), "--recordings", str(recordings), "--num_train", "20", "--num_test", "5"])
    assert "train.jsonl: 20 utterances" in capsys.readouterr().out
    rows = {name: rows_of(tmp_path / f"{name}.jsonl") for name in ("train", "test")}
    assert (len(rows["train"]), len(rows["test"])) == (20, 5)
    assert {row["speaker"] for row in rows["train"]} == {"anna", "bert"}
    assert {row["speaker"] for row in rows["test"]} == {"carl"}


def test_an_utterance_is_what_its_line_says(recordings, tmp_path):
    prepare.main([str(tmp_path), "--recordings", str(recordings), "--num_train", "20", "--num_test", "1"])
    for row in open_records(tmp_path / "train.jsonl"):
        assert not Path(row["wav"]).is_absolute()
        samples, rate = soundfile.read(tmp_path / row["wav"])
        words = row["txt"].split()
        assert rate == 8000 and len(samples) / rate == pytest.approx(row["duration"], abs=1e-3)
        assert 2 <= len(words) <= 6 and set(words) <= set(prepare.WORDS)
        assert len(words) * 0.25 < row["duration"] < len(words) * 0.7  # a digit and its pause
        assert np.abs(samples).max() == pytest.approx(0.5, abs=0.01)


def test_a_second_run_makes_the_same_utterances(recordings, tmp_path):
    flags = ["--recordings", str(recordings), "--num_train", "3", "--num_test", "3"]
    for name in ("first", "second"):
        prepare.main([str(tmp_path / name), *flags])
    files = sorted(path.relative_to(tmp_path / "first") for path in (tmp_path / "first").rglob("*.*"))
    assert len(files) == 8
    assert all((tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes() for file in files)


def test_the_archive_is_fetched_once(recordings, tmp_path, monkeypatch):
    archive = tmp_path / "archive.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(recordings, "free-spoken-digit-dataset-master/recordings")
        tar.addfile(tarfile.TarInfo("../../outside.wav"), io.BytesIO())
    monkeypatch.setattr(prepare, "ARCHIVE", archive.as_uri())
    flags = [str(tmp_path / "out"), "--num_train", "2", "--num_test", "2"]
    prepare.main(flags)
    assert len(list((tmp_path / "out/recordings").iterdir())) == 10 * len(SPEAKERS) * 2
    archive.unlink()
    prepare.main(flags)


def test_wrong_recordings_end_with_an_error_that_says_what_is_wanted(recordings, tmp_path, monkeypatch):
    def error(folder: Path | None) -> str:
        with pytest.raises(InputError) as info:
            prepare.main([str(tmp_path / "out"), *(["--recordings", str(folder)] if folder else [])])
        return str(info.value)

    assert "recordings of 0 speakers; wanted files like 7_george_32.wav" in error(tmp_path / "nowhere")
    assert "recordings of 1 speakers" in error(make_recordings(tmp_path / "one", ("anna",), 1))
    folder = make_recordings(tmp_path / "incomplete", takes=1)
    (folder / "7_bert_0.wav").unlink()
    assert "bert never says 7; wanted all ten digits" in error(folder)
    soundfile.write(folder / "7_bert_0.wav", np.zeros(1600), 16000)
    assert "7_bert_0.wav: 16000 Hz" in error(folder)
    (folder / "7_bert_0.wav").write_bytes(b"RIFF")
    assert "7_bert_0.wav: unreadable" in error(folder)
    monkeypatch.setattr(prepare, "ARCHIVE", (tmp_path / "nowhere.tar.gz").as_uri())
    assert "pass --recordings FOLDER" in error(None)


@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/*.yaml")), ids=lambda path: path.stem)
def test_a_yaml_recipe_is_valid_and_says_how_it_is_started(path):
    _, data, training = train.parse([str(path), "--bf16", "False", "--use_cpu"])
    assert data.data_path == ["train.jsonl"] and training.output_dir
    assert f"python train.py recipes/{path.name}" in path.read_text()
