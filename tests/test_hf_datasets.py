"""What hf_datasets.py promises: records of each form of a data set of Hugging Face, and one line for what is wrong."""

import io
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
from conftest import MODEL_FLAGS, SAMPLE_RATE, noise, write_manifest

import recognize
import train
from dataset import audio_seconds, load_audio, open_records
from errors import BadUtterance, InputError
from hf_datasets import TableRecords, keys_of_columns, open_dataset, record_of, renamed
from manifest import clips_of, key_of, transcript_of

TEXTS = ["hello", "wörld", "hello world", "hello hello"]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


def clip(number: int) -> np.ndarray:
    return noise(0.5 + number / 10, number)


def wav(number: int) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, clip(number), SAMPLE_RATE, format="WAV", subtype="FLOAT")
    return file.getvalue()


def table(columns: dict) -> datasets.Dataset:
    data = datasets.Dataset.from_dict(columns)
    return data.cast_column("audio", datasets.Audio()) if "audio" in columns else data


def whole(numbers: range = range(4)) -> datasets.Dataset:
    """Rows with the bytes of clips, as the Hub has them in parquet."""
    audio = [{"bytes": wav(i), "path": f"clip{i}.wav"} for i in numbers]
    return table({"audio": audio, "text": [TEXTS[i] for i in numbers], "speaker": ["a"] * len(numbers)})


def parquet(folder: Path) -> str:
    whole().to_parquet(folder / "train-00000-of-00001.parquet")
    whole(range(2)).to_parquet(folder / "test-00000-of-00001.parquet")
    return str(folder)


def parquet_file(folder: Path) -> str:
    whole().to_parquet(folder / "corpus.parquet")
    return f"{folder}/corpus.parquet"


def saved_split(folder: Path) -> str:
    whole().save_to_disk(folder / "saved")
    return f"{folder}/saved"


def saved_splits(folder: Path) -> str:
    datasets.DatasetDict(train=whole(), test=whole(range(2))).save_to_disk(folder / "saved")
    return f"{folder}/saved"


def audiofolder(folder: Path) -> str:
    (folder / "train").mkdir()
    for i in range(4):
        (folder / "train" / f"clip{i}.wav").write_bytes(wav(i))
    rows = [{"file_name": f"clip{i}.wav", "text": text} for i, text in enumerate(TEXTS)]
    write_manifest(folder / "train" / "metadata.jsonl", rows)
    return str(folder)


def json_lines(folder: Path) -> str:
    """Paths relative to the folder, as strings."""
    audiofolder(folder)
    write_manifest(folder / "c.jsonl", [{"audio": f"train/clip{i}.wav", "text": text} for i, text in enumerate(TEXTS)])
    return f"{folder}/c.jsonl"


def arrays(folder: Path) -> str:
    """Decoded audio, at 8 kHz and in two channels that are alike."""
    audio = [{"array": [clip(i)[::2].tolist()] * 2, "sampling_rate": SAMPLE_RATE // 2} for i in range(4)]
    datasets.Dataset.from_dict({"wav": audio, "txt": TEXTS}).save_to_disk(folder / "saved")
    return f"{folder}/saved"


def plain_arrays(folder: Path) -> str:
    datasets.Dataset.from_dict({"wav": [clip(i).tolist() for i in range(4)], "txt": TEXTS}).save_to_disk(folder / "s")
    return f"{folder}/s"


def plain_bytes(folder: Path) -> str:
    datasets.Dataset.from_dict({"wav": [wav(i) for i in range(4)], "txt": TEXTS}).save_to_disk(folder / "s")
    return f"{folder}/s"


def write_tar(path: Path, numbers: range, text: Callable[[int], dict[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for i in numbers:
            for ending, content in {"wav": wav(i), **text(i)}.items():
                member = tarfile.TarInfo(f"clip{i}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def tars(folder: Path) -> str:
    for shard in range(2):
        numbers = range(2 * shard, 2 * shard + 2)
        write_tar(folder / f"train-{shard}.tar", numbers, lambda i: {"txt": TEXTS[i].encode()})
    write_tar(folder / "validation-0.tar", range(1), lambda i: {"txt": b"other"})
    return str(folder)


def glob_of_tars(folder: Path) -> str:
    """The transcript stands in a JSON file beside the audio."""
    for i in range(4):
        write_tar(folder / f"{i}.tar", range(i, i + 1), lambda i: {"json": json.dumps({"text": TEXTS[i]}).encode()})
    write_tar(folder / "left_out.tar", range(1), lambda i: {"json": b"{}"})
    return f"{folder}/[0-9].tar"


FORMS = [parquet, parquet_file, saved_split, saved_splits, audiofolder, json_lines, arrays, plain_arrays, plain_bytes]


@pytest.mark.parametrize("form", [*FORMS, tars, glob_of_tars])
def test_each_form_gives_the_same_texts_and_samples(form, tmp_path):
    records = open_records(f"hf:{form(tmp_path)}")
    assert [transcript_of(record) for record in records] == TEXTS
    for number, record in enumerate(records):
        samples = load_audio(*clips_of(record)[0])
        assert audio_seconds(record) == pytest.approx(len(samples) / SAMPLE_RATE, abs=1e-4)
        if form is arrays:
            assert len(samples) == len(clip(number))
        else:
            np.testing.assert_array_equal(samples, clip(number))
    if form not in (arrays, plain_arrays, plain_bytes):
        assert [key_of(record) for record in records] == [f"clip{i}" for i in range(4)]
    assert records[3]["where"].endswith(" row 3") and np.isnan(records.durations).all()
    assert pickle.loads(pickle.dumps(records))[2]["txt"] == TEXTS[2]  # a data-loading worker may be a new process


def test_a_stereo_mp3_at_44_1_khz_inside_parquet_is_loaded(tmp_path):
    tone = np.sin(np.arange(44100) / 44100 * 2 * np.pi * 440) / 2  # (S,) at 44.1 kHz
    file = io.BytesIO()
    soundfile.write(file, np.stack([tone, np.zeros(44100)], axis=1), 44100, format="MP3")
    audio = [{"bytes": file.getvalue(), "path": None}]
    table({"audio": audio, "text": ["hello"]}).to_parquet(tmp_path / "a.parquet")
    (record,) = open_records(f"hf:{tmp_path}")
    samples = load_audio(*clips_of(record)[0])
    assert len(samples) == pytest.approx(SAMPLE_RATE, rel=0.1) and audio_seconds(record) == pytest.approx(1, rel=0.1)
    assert np.abs(samples).max() == pytest.approx(0.25, rel=0.1)  # the mean of both channels
    assert np.abs(np.fft.rfft(samples[4000:12000])).argmax() == 440 / 2  # bins of 2 Hz
    assert (str(record["wav"]), key_of(record)) == ("audio", "line0")


def test_a_stated_duration_is_taken_and_no_audio_is_read(tmp_path, monkeypatch):
    rows = whole().add_column("duration", [1.0, 2.0, 3.0, 4.5])
    rows.to_parquet(tmp_path / "a.parquet")
    monkeypatch.setattr("hf_datasets.audio_of", lambda value: pytest.fail("reads audio"))
    records = open_records(f"hf:{tmp_path}")
    assert records.durations.tolist() == [1, 2, 3, 4.5]
    assert records.fingerprint()


def test_a_split_is_named_by_the_place_or_by_the_flag_and_else_is_train(tmp_path):
    place = parquet(tmp_path)
    lengths = {len(open_records(f"hf:{place}")), len(open_records(f"hf:{place}:train", data_split="test"))}
    assert lengths == {4}
    assert len(open_records(f"hf:{place}:test")) == len(open_records(f"hf:{place}", data_split="test")) == 2
    assert len(open_records(f"hf:{place}:train[:75%]")) == 3


@pytest.mark.parametrize(
    ("form", "options", "told"),
    [
        (parquet, {"data_split": "dev"}, r"Unknown split \"dev\". Should be one of \['train', 'test'\]"),
        (parquet, {"data_split": ""}, "no split named; it has train, test; give hf:.*:test"),
        (saved_splits, {"data_split": "dev"}, "no split 'dev'; it has train, test; give hf:.*:test"),
        (parquet, {"data_subset": "english"}, r"BuilderConfig 'english' not found. Available: \['default'\]"),
        (
            parquet,
            {"remap_keys": '{"sentence": "txt"}'},
            "names 'sentence', and there is no such column; it has audio, t",
        ),
        (parquet, {"remap_keys": '{"text": "text"}'}, "no column for 'txt'; it has audio, text, speaker; give --remap"),
        (parquet, {"remap_keys": '{"audio": "a"}'}, "no column for 'wav'; it has audio, text, speaker; give --remap"),
        (parquet, {"remap_keys": "text=txt"}, "--remap_keys text=txt: wanted JSON such as"),
        (parquet, {"remap_keys": '{"text": 1}'}, "--remap_keys .*: wanted JSON such as"),
        (lambda folder: f"{folder}/nowhere", {}, "nowhere: cannot be opened .*wanted a name on the Hub, or a folder"),
        (lambda folder: "nowhere", {}, "^hf:nowhere: no such folder; wanted one, or a name on the Hub: OWNER/NAME"),
        (lambda folder: "nobody/nothing", {}, "hf:nobody/nothing: cannot be opened .*on the Hub.*wanted a name on"),
    ],
)
def test_what_is_not_there_is_told_with_what_there_is(form, options, told, tmp_path):
    with pytest.raises(InputError, match=told) as error:
        open_records(f"hf:{form(tmp_path)}", **options)
    assert "\n" not in str(error.value)


def test_remap_keys_renames_columns_and_wins_over_a_column_of_our_name(tmp_path):
    rows = {"path": ["a.wav"], "txt": ["raw"], "text": ["usual"], "text_normalized": ["clean"], "who": ["ann"]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "s")
    names = {"text_normalized": "txt", "path": "wav", "who": "speaker"}
    (record,) = open_records(f"hf:{tmp_path}/s", remap_keys=json.dumps(names))
    assert clips_of(record)[0].audio == tmp_path / "s" / "a.wav"
    assert (record["txt"], record["speaker"], "who" in record) == ("clean", "ann", False)


def test_a_field_of_a_json_file_in_a_tar_can_be_renamed(tmp_path):
    write_tar(tmp_path / "a.tar", range(1), lambda i: {"json": b'{"words": "hello", "seconds": 0.5}'})
    names = {"json.words": "txt", "json.seconds": "duration"}
    records = open_records(f"hf:{tmp_path}", remap_keys=json.dumps(names))
    assert records[0]["txt"] == "hello" and records.durations.tolist() == [0.5]
    with pytest.raises(InputError, match=r"it has .*json\.words, json\.seconds; give"):
        open_records(f"hf:{tmp_path}")


def test_a_folder_may_have_the_name_of_a_format(tmp_path, monkeypatch):
    (tmp_path / "parquet").mkdir()
    parquet(tmp_path / "parquet")
    monkeypatch.chdir(tmp_path)
    assert [transcript_of(record) for record in open_records("hf:parquet")] == TEXTS


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_tar_that_is_cut_short_is_named(tmp_path, share):
    tars(tmp_path)
    path = tmp_path / "train-1.tar"
    content = path.read_bytes()
    path.write_bytes(content[: round(len(content) * share) // 512 * 512])  # tar blocks: some readers see no fault
    with pytest.raises(InputError, match=rf"^{path}: the tar is cut short"):
        open_records(f"hf:{tmp_path}")


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"wav": ["a", "b"], "txt": ["hello", None]}, r"row 1: missing \['txt'\]"),
        ({"wav": ["a", None], "txt": ["hello", "b"]}, r"row 1: missing \['wav'\]"),
        ({"wav": [{"path": "a"}, {"path": None}], "txt": ["a", "b"]}, r"row 1: missing \['wav'\]"),
        ({"wav": ["a"], "txt": [7]}, "row 0: 'txt' is 7; wanted a str"),
        ({"wav": ["a"], "txt": ["b"], "duration": [-1.0]}, "row 0: 'duration' is -1.0; wanted seconds"),
    ],
)
def test_a_bad_row_is_told_with_its_number(columns, told, tmp_path):
    table(columns).save_to_disk(tmp_path / "s")
    with pytest.raises(InputError, match=told):
        open_records(f"hf:{tmp_path}/s")


def test_a_data_set_without_rows_is_told(tmp_path):
    whole().select([]).save_to_disk(tmp_path / "s")
    with pytest.raises(InputError, match=r"hf:.*: (the data set is empty|cannot be opened)"):
        open_records(f"hf:{tmp_path}/s")


@pytest.mark.parametrize(
    ("audio", "told"),
    [
        (b"no audio", r"^clip\.mp3: unreadable \(Error opening clip\.mp3: Format not recognised"),
        (b"", r"^clip\.mp3: unreadable"),
        (wav(0)[:9000], r"^clip\.mp3: cut off after"),
        ({"array": [1, 2, 3], "sampling_rate": 16000}, "^audio: unreadable .samples of type int64; wanted floats"),
    ],
)
def test_audio_that_cannot_be_decoded_is_a_bad_utterance(audio, told):
    audio = {"bytes": audio, "path": "clip.mp3"} if isinstance(audio, bytes) else audio
    record = record_of({"wav": audio}, "here", Path())
    with pytest.raises(BadUtterance, match=told):
        load_audio(*clips_of(record)[0])


def test_conversations_pass_through(tmp_path):
    turns = [{"role": "user", "content": "<audio>", "audio": ["a.wav"]}, {"role": "assistant", "content": "hello"}]
    datasets.Dataset.from_dict({"messages": [turns]}).save_to_disk(tmp_path / "s")  # "audio": None in the second turn
    (record,) = open_records(f"hf:{tmp_path}/s")
    assert record["messages"] == turns and transcript_of(record) == "hello"
    assert clips_of(record)[0].audio == tmp_path / "s" / "a.wav"


def test_the_fingerprint_tells_other_texts_and_other_audio_and_knows_the_first_rows():
    def records(rows: datasets.Dataset) -> TableRecords:
        return TableRecords(rows, "rows", Path(), keys_of_columns(rows.features, "rows", True, {}))

    first = records(whole(range(2))).fingerprint()
    assert records(whole()).fingerprint(2) == first != records(whole()).fingerprint()
    assert records(whole(range(1, 3))).fingerprint() != first
    other = table({"audio": [{"bytes": wav(3 * i), "path": f"clip{i}.wav"} for i in (0, 1)], "text": TEXTS[:2]})
    assert records(other.rename_column("audio", "wav")).fingerprint() != first
    assert records(whole().select([1, 0]).select([1, 0])).fingerprint() == first  # rows that are picked, in order


def test_a_stream_of_rows_gives_the_same_records(tmp_path):
    """What a later --streaming needs: the same opening, columns and records."""
    place = tars(tmp_path)
    rows = open_dataset(place, split="train", streaming=True)
    keys = keys_of_columns(rows.features, place, True, {})
    streamed = [
        record_of(row, "here", Path())
        for piece in rows.with_format("arrow")  # a table of one row
        for row in renamed(piece, keys).to_pylist()
    ]
    assert [(record["key"], record["txt"]) for record in streamed] == [
        (record["key"], record["txt"]) for record in open_records(f"hf:{place}")
    ]
    np.testing.assert_array_equal(load_audio(*clips_of(streamed[3])[0]), clip(3))


@pytest.fixture
def corpus(world) -> str:
    """The corpus of `world` as a data set with other names, saved with its audio inside."""
    rows = [json.loads(line) for line in (world / "corpus.jsonl").read_text().splitlines()]
    audio = [{"bytes": (world / row["wav"]).read_bytes(), "path": row["wav"]} for row in rows]
    data = table({"audio": audio, "sentence": [row["txt"] for row in rows]})
    parts = datasets.DatasetDict(train=data, validation=data.select(range(0, 20, 3)))
    parts.save_to_disk(world / "saved")
    return "hf:saved"


def test_training_and_decoding_are_as_with_a_manifest(corpus, world, call, trained, tmp_path):
    names = '--remap_keys \'{"sentence": "txt"}\''
    flags = f"--use_cpu {MODEL_FLAGS} --max_steps 2 --projector_hidden_size 64 --report_to none --logging_steps 1"
    logs = {}
    for name, data in {
        "jsonl": "--data_path corpus.jsonl --eval_data_path eval.jsonl",
        "hf": f"--data_path {corpus} --eval_data_path {corpus}:validation {names} --dataloader_num_workers 2",
        "yaml": f"{world}/hf.yaml",
    }.items():
        (world / "hf.yaml").write_text(
            "data_path: hf:saved\neval_data_path: hf:saved:validation\nremap_keys: {sentence: txt}"
        )
        words = f"{data} {flags}" if name == "yaml" else f"{flags} {data}"
        call(train.main, f"{words} --output_dir {tmp_path}/{name}")
        history = json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        logs[name] = [entry[key] for entry in history for key in ("loss", "eval_loss", "eval_wer") if key in entry]
    assert len(logs["jsonl"]) == 4 and logs["jsonl"] == logs["hf"] == logs["yaml"]

    decode = f"--model_path trained --num_beams 1 --max_new_tokens 8 --num_workers 0 --result_path {tmp_path}"
    call(recognize.main, f"{decode}/a.jsonl --data_path corpus.jsonl --data_amount 5:10")
    call(recognize.main, f"{decode}/b.jsonl --data_path {corpus} --data_amount 25%:50% {names}")
    a, b = ([json.loads(line) for line in (tmp_path / f"{x}.jsonl").read_text().splitlines()] for x in "ab")
    assert len(a) == 5 and a[0]["wav"] == "clip5.wav"
    assert [row | {"problem": None} for row in a] == [row | {"problem": None} for row in b]  # problems name the source


def test_an_evaluation_names_its_split(corpus, call):
    flags = f"--use_cpu {MODEL_FLAGS} --output_dir nowhere --data_path {corpus} --eval_data_path {corpus}"
    with pytest.raises(InputError, match="hf:saved: no split named; it has train, validation; give hf:saved:valid"):
        call(train.main, f'{flags} --remap_keys \'{{"sentence": "txt"}}\'')
