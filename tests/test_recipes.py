"""recipes/: recordings as the corpora have them become manifests, up to the error rate; what is wrong is told."""

import io
import json
import random
import re
import shlex
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import ROOT
from lhotse import CutSet, Recording, RecordingSet, SupervisionSegment, SupervisionSet
from lhotse.audio import AudioSource

import recognize
import score
import train
from dataset import open_records
from demo.data import Synthesizer, sentence
from errors import InputError
from recipes import prepare as corpora
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


LIBRISPEECH = {"train-clean-100": 6, "dev-clean": 2, "test-clean": 2, "test-other": 2}  # part -> utterances
AISHELL = {"train": 6, "dev": 2, "test": 2}


def make_librispeech(folder: Path) -> Path:
    """LibriSpeech as its archives are unpacked into a folder, in miniature, spoken by espeak-ng."""
    synthesizer, rng = Synthesizer(), random.Random(0)
    for reader, (part, count) in enumerate(LIBRISPEECH.items(), 103):
        chapter, lines = folder / f"LibriSpeech/{part}/{reader}/1240", []
        chapter.mkdir(parents=True)
        for number in range(count):
            key, text = f"{reader}-1240-{number:04}", sentence(rng)
            samples = synthesizer.speak(text, "en-us", 250, 50, 50, 1.0)
            soundfile.write(chapter / f"{key}.flac", samples, 16000)
            lines.append(f"{key} {text.upper()}\n")
        (chapter / f"{reader}-1240.trans.txt").write_text("".join(lines))
    return folder


def make_aishell(folder: Path) -> Path:
    """AISHELL-1 as its archive is unpacked into a folder, in miniature: archives of speakers, transcripts."""
    synthesizer, rng, lines = Synthesizer(), random.Random(0), []
    words = "今天 明天 北京 市场 房价 上涨 下跌 三 百分之五 公司 学生 足球 比赛 的 在 Ａ ｂ".split()
    (folder / "data_aishell/transcript").mkdir(parents=True)
    for number, (part, count) in enumerate(AISHELL.items(), 2):
        speaker = folder / f"data_aishell/wav/{part}/S{number:04}"
        speaker.mkdir(parents=True)
        for index in range(count + 1):  # the last one has no transcript, as some files of the corpus
            key, text = f"BAC009S{number:04}W{index:04}", " ".join(rng.choices(words, k=5))
            soundfile.write(speaker / f"{key}.wav", synthesizer.speak(text, "cmn", 300, 50, 50, 1.0), 16000)
            lines += [f"{key} {text}\n"] * (index < count)
        with tarfile.open(folder / f"data_aishell/wav/S{number:04}.tar.gz", "w:gz") as tar:
            tar.add(speaker, f"{part}/S{number:04}")
        shutil.rmtree(speaker.parent)
    path = folder / "data_aishell/transcript/aishell_transcript_v0.8.txt"
    path.write_text("".join(lines), encoding="utf-8")
    return folder


def unpack_aishell(folder: Path) -> Path:
    """The same folder, after the command that recipes.prepare advises to unpack the speakers."""
    command = corpora.CORPORA["aishell"].cure.partition(": ")[2].replace("FOLDER", str(folder))
    subprocess.run(shlex.split(command), check=True)
    return folder


@pytest.fixture(scope="module")
def librispeech(tmp_path_factory) -> Path:
    return make_librispeech(tmp_path_factory.mktemp("corpora"))


@pytest.fixture(scope="module")
def aishell(tmp_path_factory) -> Path:
    return unpack_aishell(make_aishell(tmp_path_factory.mktemp("corpora")))


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


@pytest.mark.parametrize(
    ("name", "parts", "test", "normalizer", "metric"),
    [("librispeech", LIBRISPEECH, "test-other", "english", "WER"), ("aishell", AISHELL, "test", "chinese", "CER")],
)
def test_a_recipe_runs_from_the_archives_to_the_error_rate(
    name, parts, test, normalizer, metric, request, chinese_llm, call, tmp_path
):
    folder, (train_part, dev_part, *_) = request.getfixturevalue(name), parts
    screen = call(corpora.main, f"{name} {folder} {tmp_path}")
    for part, count in parts.items():
        assert f"{tmp_path}/{part}.jsonl: {count} utterances, " in screen.out
        assert len(open_records(tmp_path / f"{part}.jsonl")) == count
    data = f"--data_path {tmp_path}/{train_part}.jsonl --eval_data_path {tmp_path}/{dev_part}.jsonl"
    parts_flags = f"--encoder_name_or_path whisper.pt --llm_model_name_or_path {chinese_llm} --projector_hidden_size 64"
    short = "--max_steps 2 --save_steps 2 --eval_steps 2 --gradient_accumulation_steps 1 --dataloader_num_workers 0"
    run = tmp_path / "run"
    flags = f"{parts_flags} {data} {short} --output_dir {run} --use_cpu --bf16 False --report_to none"
    call(train.main, f"{ROOT}/recipes/{name}/train.yaml {flags}")
    result = f"--data_path {tmp_path}/{test}.jsonl --result_path {run}/{test}.jsonl"
    call(recognize.main, f"--model_path {run} {result} --max_new_tokens 8 --num_beams 1 --num_workers 0")
    assert call(score.main, f"{result} --normalizer {normalizer}").out.startswith(f"{metric} ")


def test_librispeech_is_told_in_lower_case_with_its_keys_readers_and_durations(librispeech, tmp_path, call):
    call(corpora.main, f"librispeech {librispeech} {tmp_path}")
    rows = rows_of(tmp_path / "train-clean-100.jsonl")
    assert [row["key"] for row in rows] == [f"103-1240-{number:04}" for number in range(6)]
    for row in rows:
        path = Path(row["wav"])
        assert path == (librispeech / f"LibriSpeech/train-clean-100/103/1240/{row['key']}.flac").absolute()
        assert row["duration"] == pytest.approx(soundfile.info(path).duration, abs=1e-4)
        assert re.fullmatch("[a-z ]+", row["txt"]) and (row["speaker"], row["language"]) == ("103", "English")
        assert f"{row['key']} {row['txt'].upper()}\n" in (path.parent / "103-1240.trans.txt").read_text()


def test_aishell_is_told_without_spaces_and_files_without_a_transcript_are_counted(aishell, tmp_path):
    with pytest.warns(UserWarning, match="the first of its 6 messages: No transcript: BAC009S0002W0006"):
        corpora.main(["aishell", str(aishell), str(tmp_path)])
    transcripts = (aishell / "data_aishell/transcript/aishell_transcript_v0.8.txt").read_text(encoding="utf-8")
    spoken = dict(line.split(" ", 1) for line in transcripts.splitlines())
    for part, count in AISHELL.items():
        rows = rows_of(tmp_path / f"{part}.jsonl")
        assert len(rows) == count
        for row in rows:
            text = spoken[row["key"]].replace(" ", "").replace("Ａ", "A").replace("ｂ", "B")
            assert row["txt"].replace("Ａ", "A") == text and row["key"][6:11] == row["speaker"]


def test_a_part_that_is_incomplete_or_not_there_is_told(librispeech, tmp_path, capsys):
    shutil.copytree(librispeech, tmp_path / "corpora")
    missing = tmp_path / "corpora/LibriSpeech/dev-clean/104/1240/104-1240-0001.flac"
    missing.unlink()
    with pytest.warns(UserWarning) as told:
        corpora.main(["librispeech", f"{tmp_path}/corpora", f"{tmp_path}/data"])
    left_out, incomplete = (str(warning.message) for warning in told)
    assert left_out.endswith(f"messages: No such file: {missing}")
    assert "incomplete: " in incomplete and "dev-clean has 1 of 2,703 utterances (5.4 hours)" in incomplete
    assert "unpack the archive of each part again" in incomplete
    assert "LibriSpeech: train-clean-360, train-other-500, dev-other\n" in capsys.readouterr().out
    assert len(rows_of(tmp_path / "data/dev-clean.jsonl")) == 1


def test_a_corpus_that_cannot_be_read_ends_with_a_line_that_names_it(librispeech, tmp_path, call):
    def error(*words: str) -> str:
        with pytest.raises(InputError) as info:
            call(corpora.main, " ".join([*words[:1], str(tmp_path), str(tmp_path / "out"), *words[1:]]))
        assert "\n" not in str(info.value) and not (tmp_path / "out").exists()
        return str(info.value)

    assert "LibriSpeech: no such folder; unpack the archive of each part" in error("librispeech")
    assert "lhotse has no recipe prepare_librispech; did you mean librispeech?" in error("librispech")
    shutil.copytree(librispeech, tmp_path, dirs_exist_ok=True)
    assert "num_job=4: wanted NAME=VALUE, and one of prepare_librispeech's" in error("librispeech", "num_job=4")
    broken = tmp_path / "LibriSpeech/dev-clean/104/1240/104-1240-0001.flac"
    broken.write_bytes(b"fLaC")
    assert f"Fetching info about audio from '{broken}' failed" in error("librispeech", "num_jobs=2")
    make_aishell(tmp_path)
    assert "wav -name '*.tar.gz' -execdir tar xzf {} ';'" in error("aishell")  # which unpacks the speakers
    shutil.rmtree(tmp_path / "data_aishell/transcript")
    assert "aishell_transcript_v0.8.txt" in error("aishell")


def test_any_other_corpus_of_lhotse_is_prepared_the_same_way(tmp_path, call):
    (tmp_path / "wavs").mkdir()
    for number in (2, 1):
        soundfile.write(tmp_path / f"wavs/LJ00{number}.wav", np.zeros(8000), 16000)
    (tmp_path / "metadata.csv").write_text("LJ002|Dr. No|Doctor No\nLJ001|printing|printing\n")
    screen = call(corpora.main, f"ljspeech {tmp_path} {tmp_path}/data")
    assert screen.out.startswith(f"{tmp_path}/data/all.jsonl: 2 utterances, 0.0 hours, 1 speakers\n")
    rows = rows_of(tmp_path / "data/all.jsonl")
    assert [(row["key"], row["duration"]) for row in rows] == [("LJ001", 0.5), ("LJ002", 0.5)]


def lhotse_recording(channels: int = 1, **changes) -> Recording:
    source = AudioSource("file", list(range(channels)), "/corpus/meeting.wav")
    fields = {"id": "meeting", "sources": [source], "sampling_rate": 8000, "num_samples": 80000, "duration": 10.0}
    return Recording(**fields | changes)


def segment(**changes) -> SupervisionSegment:
    fields = {"id": "a", "recording_id": "meeting", "start": 2.0, "duration": 3.0, "channel": 0, "text": " good\tday "}
    return SupervisionSegment(**fields | changes)


def make_rows(recording: Recording, *segments: SupervisionSegment) -> list[dict]:
    return corpora.make_rows(RecordingSet.from_recordings([recording]), SupervisionSet.from_segments(segments))


def test_a_stretch_of_a_recording_has_its_times_and_one_without_words_is_left_out():
    segments = segment(), segment(id="b", text=None), segment(id="0", start=0.0, duration=10.0, speaker="anna")
    audio = {"wav": "/corpus/meeting.wav", "txt": "good day"}
    whole = {"key": "0", **audio, "duration": 10.0, "speaker": "anna"}
    assert make_rows(lhotse_recording(), *segments) == [whole, {"key": "a", **audio, "start": 2.0, "end": 5.0}]


def test_audio_that_a_line_of_a_manifest_cannot_name_is_refused():
    with pytest.raises(
        InputError, match=r"a: channels \[1\] of \[0, 1\] in /corpus/meeting.wav; a manifest's line has"
    ):
        make_rows(lhotse_recording(channels=2), segment(channel=1))
    assert len(make_rows(lhotse_recording(channels=2), segment(channel=[0, 1]))) == 1
    pipe = [AudioSource("command", [0], "sph2pipe meeting.sph")]
    for recording in (
        lhotse_recording(sources=pipe),
        lhotse_recording(transforms=[{"name": "Volume", "kwargs": {"factor": 2}}]),
    ):
        with pytest.raises(InputError, match="a: its audio is not one plain file"):
            make_rows(recording, segment())
    with pytest.raises(InputError, match="a: lhotse's recipe has no recording lecture"):
        make_rows(lhotse_recording(), segment(recording_id="lecture"))


def test_parts_may_be_nested_and_what_is_no_part_is_told():
    pair = {"recordings": RecordingSet(), "supervisions": SupervisionSet()}
    for manifests, names in (
        (pair, ["all"]),
        ((pair["recordings"], pair["supervisions"]), ["all"]),
        ({"train": pair, "dev": pair}, ["train", "dev"]),
        ({"sdm": {"train": pair}, "ihm": {"train": pair}}, ["sdm-train", "ihm-train"]),
    ):
        assert [name for name, *_ in corpora.find_parts(manifests)] == names
    for manifests, kind in ((None, "NoneType"), ({"train": {"cuts": CutSet()}}, "CutSet")):
        with pytest.raises(InputError, match=f"lhotse's recipe makes a {kind}; wanted a RecordingSet"):
            list(corpora.find_parts(manifests))


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("recipes/**/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_a_yaml_recipe_is_valid_and_says_how_it_is_started(path):
    _, data, training = train.parse([str(path), "--bf16", "False", "--use_cpu"])
    assert data.data_path[0].endswith("train.jsonl") and training.output_dir
    assert f"train.py {path.relative_to(ROOT)}" in path.read_text()
