"""What lhotse_cuts.py promises: a record for each cut, of a manifest or of Shar, with the samples that Lhotse loads."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import MODEL_FLAGS, SAMPLE_RATE, noise
from lhotse import CutSet, MonoCut, Recording, SupervisionSegment

import train
from dataset import audio_seconds, load_audio, open_records
from errors import BadUtterance, InputError
from manifest import clips_of, key_of, transcript_of


def cut(folder: Path, number: int, channels: int = 1):
    """All of a recording of 2 s, with two supervisions, of which the later comes first."""
    path = folder / f"clip{number}.wav"
    soundfile.write(path, np.stack([noise(2, 10 * number + c) for c in range(channels)], axis=1), SAMPLE_RATE)
    recording = Recording.from_file(path)
    cut = recording.to_cut()
    cut.supervisions = [
        SupervisionSegment("b", recording.id, 1.2, 0.5, text=f"again {number}"),
        SupervisionSegment("a", recording.id, 0.5, 0.5, text="hello", language="English"),
        SupervisionSegment("c", recording.id, 1.8, 0.1),
    ]
    return cut


@pytest.fixture
def cuts(tmp_path) -> list:
    """Of each kind: all of a file, a part, two channels, one of two, padded, mixed, faster, resampled."""
    plain, part, stereo = cut(tmp_path, 0), cut(tmp_path, 1).truncate(offset=0.25, duration=1.5), cut(tmp_path, 2, 2)
    channel = MonoCut("one", 0.5, 1.5, channel=1, recording=stereo.recording)
    changed = [plain.pad(3), plain.mix(part, snr=10), plain.perturb_speed(1.1)]
    return [plain, part, stereo, channel, *changed]


def save(cuts: list, folder: Path, name: str = "cuts.jsonl.gz") -> str:
    CutSet.from_cuts(cuts).to_file(folder / name)
    return f"lhotse:{folder / name}"


def save_shar(cuts: list, folder: Path, audio: str = "flac") -> str:
    (folder / "shar").mkdir()
    CutSet.from_cuts(cuts).to_shar(folder / "shar", fields={"recording": audio}, shard_size=3)
    return f"shar:{folder / 'shar'}"


def samples_of(record: dict) -> np.ndarray:
    return load_audio(*clips_of(record)[0])


@pytest.mark.parametrize("name", ["cuts.jsonl", "cuts.jsonl.gz"])
def test_each_cut_is_a_record_with_the_samples_that_lhotse_loads(cuts, tmp_path, name):
    records = open_records(save(cuts, tmp_path, name), needs_text=False)
    assert [key_of(record) for record in records] == [cut.id for cut in cuts]
    assert [transcript_of(record) for record in records][:4] == [
        "hello again 0",
        "hello again 1",
        "hello again 2",
        None,
    ]
    assert records.durations == pytest.approx([cut.duration for cut in cuts], abs=1e-6)
    for record, cut in zip(records, cuts, strict=True):
        np.testing.assert_allclose(samples_of(record), cut.load_audio().mean(axis=0), atol=1e-6)
        assert audio_seconds(record) == pytest.approx(cut.duration, abs=1e-3)
    assert records[1]["where"] == f"{tmp_path / name}:2"
    assert clips_of(records[1])[0] == (tmp_path / "clip1.wav", 0.25, 1.75)  # read by dataset.py, as of a manifest


def test_resampling_is_left_to_dataset(tmp_path):
    """Lhotse would want scipy or torchaudio for it."""
    plain = cut(tmp_path, 0)
    (record,) = open_records(save([plain.resample(8000)], tmp_path))
    np.testing.assert_allclose(samples_of(record), plain.load_audio()[0], atol=1e-6)


@pytest.mark.parametrize("audio", ["flac", "wav", "mp3"])
def test_shar_is_read_from_its_tars_in_any_order(cuts, tmp_path, audio):
    place = save_shar(cuts[:4], tmp_path, audio)
    records, shar = open_records(place, needs_text=False), list(CutSet.from_shar(in_dir=place.removeprefix("shar:")))
    assert [key_of(record) for record in records] == [cut.id for cut in cuts[:4]]
    assert records.durations == pytest.approx([cut.duration for cut in cuts[:4]])
    for index in (3, 0, 2, 1):
        np.testing.assert_allclose(samples_of(records[index]), shar[index].load_audio().mean(axis=0), atol=1e-4)
    assert records[3]["where"].endswith("shar/cuts.000001.jsonl.gz:1")
    assert str(records[0]["wav"]) == f"{cuts[0].id}.{audio}"


def test_opening_shar_reads_no_audio(cuts, tmp_path, monkeypatch):
    place = save_shar(cuts[:3], tmp_path)
    monkeypatch.setattr("lhotse_cuts.read_bytes", lambda *_: pytest.fail("reads audio"))
    records = open_records(place)
    assert records.fingerprint() and records[2]["txt"] == "hello again 2"


@pytest.mark.parametrize("share", [0.3, 0.8])
def test_a_tar_that_is_cut_short_is_named(cuts, tmp_path, share):
    place = save_shar(cuts[:4], tmp_path)
    path = tmp_path / "shar/recording.000001.tar"
    path.write_bytes(path.read_bytes()[: round(path.stat().st_size * share)])
    with pytest.raises(InputError, match=rf"^{path}: the tar is cut short, at [\d,]+ bytes") as error:
        open_records(place, needs_text=False)
    assert "\n" not in str(error.value)


def test_a_shard_of_other_cuts_is_told(cuts, tmp_path):
    place = save_shar(cuts[:3], tmp_path)
    path = tmp_path / "shar/cuts.000000.jsonl.gz"
    lines = gzip.decompress(path.read_bytes()).splitlines(keepends=True)
    for kept, told in [
        (lines[:2], rf"^{path}: 2 cuts for 3 recordings"),
        (lines[1:], rf"recording\.000000\.tar: found {cuts[0].id}\.flac for the cut {cuts[1].id}"),
        ([*lines, lines[2]], rf"recording\.000000\.tar: found nothing for the cut {cuts[2].id}"),
    ]:
        path.write_bytes(gzip.compress(b"".join(kept)))
        with pytest.raises(InputError, match=told):
            open_records(place)


def test_a_folder_with_a_shard_missing_is_told(cuts, tmp_path):
    place = save_shar(cuts[:4], tmp_path)
    (tmp_path / "shar/recording.000000.tar").unlink()
    with pytest.raises(
        InputError, match=r"found cuts of the shards \['000000', '000001'\] and recordings of \['0+1'\]"
    ):
        open_records(place, needs_text=False)
    with pytest.raises(InputError, match=r"wanted cuts\.\*\.jsonl\.gz, and a recording\.\*\.tar for each"):
        open_records(f"shar:{tmp_path}/nowhere")


def test_a_file_that_holds_no_cuts_is_told_with_the_line(cuts, tmp_path):
    place = save(cuts[:2], tmp_path)
    path = tmp_path / "cuts.jsonl.gz"
    content = gzip.decompress(path.read_bytes())
    for bad, told in [
        (path.read_bytes()[:-20], "no cut .*EOFError.*wanted what CutSet.to_file writes, whole"),
        (gzip.compress(content + b"{\n"), "gz:3: no cut"),
        (gzip.compress(content + b'{"wav": "a.wav", "txt": "hello"}\n'), "gz:3: no cut"),
        (gzip.compress(json.dumps(cuts[0].recording.to_dict()).encode()), "gz:1: no cut .*a Recording"),
        (gzip.compress(b""), "there are no cuts|no cut"),
    ]:
        path.write_bytes(bad)
        with pytest.raises(InputError, match=told) as error:
            open_records(place)
        assert "\n" not in str(error.value)
    for place in (f"lhotse:{tmp_path}", f"lhotse:{tmp_path}/nowhere.jsonl", f"lhotse:{tmp_path}/clip0.wav"):
        with pytest.raises(InputError, match=r"no such file; wanted cuts of Lhotse in a \.jsonl or \.jsonl\.gz"):
            open_records(place)


def test_a_cut_without_audio_or_text_is_told(cuts, tmp_path):
    with pytest.raises(InputError, match=r"gz:4: missing \['txt'\]"):
        open_records(save(cuts, tmp_path))
    only_features = {key: value for key, value in cuts[0].to_dict().items() if key != "recording"}
    (tmp_path / "cuts.jsonl").write_text(json.dumps(only_features) + "\n")
    with pytest.raises(InputError, match=r"jsonl:1: the cut \S+ has no recording"):
        open_records(f"lhotse:{tmp_path}/cuts.jsonl")


def test_a_shell_command_in_the_place_of_a_file_is_never_run(cuts, tmp_path):
    for cut in (cuts[0], cuts[4]):
        text = json.dumps(cut.to_dict()).replace('"file"', '"command"')
        (tmp_path / "cuts.jsonl").write_text(text.replace(str(tmp_path / "clip0.wav"), f"touch {tmp_path}/run") + "\n")
        with pytest.raises(InputError, match=r"jsonl:1: the audio of .* is a 'command'; wanted files alone"):
            open_records(f"lhotse:{tmp_path}/cuts.jsonl")
    assert not (tmp_path / "run").exists()


def test_audio_that_lhotse_cannot_load_is_a_bad_utterance(cuts, tmp_path):
    records = open_records(save(cuts[4:5], tmp_path))
    (tmp_path / "clip0.wav").unlink()
    with pytest.raises(BadUtterance, match=r"unreadable \(Lhotse: ") as error:
        samples_of(records[0])
    assert "\n" not in str(error.value)


def test_the_fingerprint_knows_the_first_cuts(cuts, tmp_path):
    first, more = open_records(save(cuts[:2], tmp_path)).fingerprint(), open_records(save(cuts[:3], tmp_path))
    assert more.fingerprint(2) == first != more.fingerprint()


def test_training_is_as_with_a_manifest(world, chinese_llm, call, tmp_path):
    rows = [json.loads(line) for line in (world / "corpus.jsonl").read_text().splitlines()]
    cuts = [Recording.from_file(world / row["wav"]).to_cut() for row in rows]
    for cut, row in zip(cuts, rows, strict=True):
        cut.supervisions = [SupervisionSegment(cut.id, cut.id, 0, cut.duration, text=row["txt"])]
    flags = f"--use_cpu {MODEL_FLAGS} --max_steps 2 --projector_hidden_size 64 --report_to none --logging_steps 1"
    losses = []
    for number, source in enumerate(["corpus.jsonl", save(cuts, tmp_path), save_shar(cuts, tmp_path)]):
        call(train.main, f"{flags} --data_path {source} --output_dir {tmp_path}/{number}")
        history = json.loads((tmp_path / str(number) / "trainer_state.json").read_text())["log_history"]
        losses.append([entry["loss"] for entry in history if "loss" in entry])
    assert len(losses[0]) == 2 and losses[0] == losses[1] == losses[2]
