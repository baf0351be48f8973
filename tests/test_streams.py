"""What streams.py promises: data as they come, and the same batches for any number of processes, workers and kills."""

import json
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from conftest import TRAIN_FLAGS, write_manifest
from runs import assert_same, copy_until, error_of, history, weights

import train
from errors import InputError
from streams import BUFFER, Stream, StreamBatches, Streamed

FLAGS = f"{TRAIN_FLAGS} --streaming --per_device_train_batch_size 2 --max_steps 6 --learning_rate 1e-3"


def write_clips(folder: Path, name: str, count: int) -> str:
    rows = [{"wav": f"{name}{i}.wav", "txt": f"{name}{i}", "duration": 1.0 + 7 * i % 10} for i in range(count)]
    return str(write_manifest(folder / f"{name}.jsonl", rows))


@pytest.fixture(scope="module")
def table(world, tmp_path_factory) -> Path:
    """The corpus as a folder of two parquet files, in its order, with the audio inside."""
    from datasets import Audio, Dataset

    rows = [json.loads(line) for line in (world / "corpus.jsonl").read_text().splitlines()]
    folder = tmp_path_factory.mktemp("table")
    for part in range(2):
        half = rows[10 * part : 10 * part + 10]
        audio = [{"bytes": (world / row["wav"]).read_bytes(), "path": row["wav"]} for row in half]
        columns = {"audio": audio, "text": [row["txt"] for row in half]}
        Dataset.from_dict(columns).cast_column("audio", Audio()).to_parquet(folder / f"train-{part}.parquet")
    return folder


def batches_of(stream: Stream, num_processes: int = 1, rank: int = 0, accumulation: int = 1, seconds: float = 0.0):
    return StreamBatches(stream, 3, seconds, 0, num_processes, rank, accumulation)


# Records


def test_a_stream_comes_round_again_and_its_records_are_numbered(tmp_path):
    stream = Stream([write_clips(tmp_path, "a", 3)], seed=0)
    streamed = list(islice(stream, 7))
    assert [(each.epoch, each.number, each.record["txt"]) for each in streamed[2:5]] == [
        (0, 2, "a2"),
        (1, 3, "a0"),
        (1, 4, "a1"),
    ]
    assert streamed[4].record["where"] == f"{tmp_path}/a.jsonl:2" and streamed[4].seconds == 8.0


def test_several_streams_come_in_the_shares_of_their_weights(tmp_path):
    sources = [f"{write_clips(tmp_path, 'a', 3)}:0.8", f"{write_clips(tmp_path, 'b', 50)}:0.2"]
    counts = Counter(each.record["txt"][0] for each in islice(Stream(sources, seed=0), 2000))
    assert counts["a"] == pytest.approx(1600, abs=80)
    with pytest.raises(InputError, match="wanted a weight for every source, or for none"):
        Stream([sources[0], sources[1].removesuffix(":0.2")], seed=0)


def test_a_streamed_table_gives_all_its_records_with_their_audio_in_each_epoch(table, world):
    streamed = list(islice(Stream([f"hf:{table}"], seed=0), 40))
    rows = [json.loads(line) for line in (world / "corpus.jsonl").read_text().splitlines()]
    for epoch in range(2):
        part = streamed[20 * epoch : 20 * epoch + 20]
        assert Counter(str(each.record["wav"]) for each in part) == Counter(row["wav"] for row in rows)
        assert {each.epoch for each in part} == {epoch}
    seconds = {str(each.record["wav"]): each.seconds for each in streamed}
    assert seconds["clip3.wav"] == pytest.approx(0.3 + 0.19 * (21 % 20), abs=1e-4)  # of its header


# Batches


def test_each_clip_of_a_buffer_comes_once_beside_others_of_its_length(tmp_path):
    stream = Stream([write_clips(tmp_path, "a", 3 * BUFFER)], seed=0)
    batches = list(islice(batches_of(stream), BUFFER))
    assert Counter(each.record["txt"] for batch in batches for each in batch) == {f"a{i}": 1 for i in range(3 * BUFFER)}
    assert np.mean([np.ptp([each.seconds for each in batch]) for batch in batches]) < 0.5  # of 1 to 10 s
    assert [batch[0].seconds for batch in batches] != sorted(batch[0].seconds for batch in batches)


@pytest.mark.parametrize("seconds", [0.0, 22.0])
@pytest.mark.parametrize(("num_processes", "accumulation"), [(2, 1), (4, 1), (2, 2)])
def test_a_step_has_the_same_clips_for_any_number_of_processes(tmp_path, num_processes, accumulation, seconds):
    source, total = write_clips(tmp_path, "a", 100), num_processes * accumulation

    def steps(num_processes: int, accumulation: int) -> list[set[int]]:
        """The clips of the first 20 steps."""
        clips = [set() for _ in range(20)]
        for rank in range(num_processes):
            part = batches_of(Stream([source], 0), num_processes, rank, accumulation, seconds)
            for number, batch in enumerate(islice(part, 20 * accumulation)):
                clips[number // accumulation] |= {each.number for each in batch}
        return clips

    assert steps(num_processes, accumulation) == steps(1, total)


def test_a_batch_of_a_budget_is_no_larger_when_padded(tmp_path):
    stream = Stream([write_clips(tmp_path, "a", 100)], seed=0)
    for batch in islice(batches_of(stream, seconds=20.0), 100):
        assert max(each.seconds for each in batch) * len(batch) <= 20
    with pytest.raises(InputError, match="a clip alone has 10"):
        next(iter(batches_of(stream, seconds=9.0)))


def test_it_is_known_where_the_records_of_late_batches_stand_and_forgotten_later(tmp_path, monkeypatch):
    monkeypatch.setattr("streams.KEPT", 2)
    stream = Stream([write_clips(tmp_path, "a", 100)], seed=0)
    batches = list(islice(batches_of(stream), 5))
    assert len(stream.latest) == 6
    last: Streamed = batches[-1][0]
    assert stream[last.number]["where"] == last.record["where"]


# Training


@pytest.fixture(scope="module")
def streamed_run(chinese_llm, call, tmp_path_factory) -> Path:
    """A run over a stream, with a checkpoint after each second step."""
    folder = tmp_path_factory.mktemp("stream") / "run"
    call(train.main, f"{FLAGS} --data_path corpus.jsonl --augment speed --save_steps 2 --output_dir {folder}")
    return folder


def test_a_run_over_a_stream_learns_and_says_what_it_read(streamed_run):
    losses = [row["loss"] for row in history(streamed_run) if "loss" in row]
    assert len(losses) == 6 and all(np.isfinite(losses))
    assert "corpus.jsonl: a stream, fingerprint" in (streamed_run / "experiment.md").read_text()


def test_a_run_that_goes_on_ends_with_the_same_weights(streamed_run, call, tmp_path):
    copy_until(streamed_run, 2, tmp_path / "run")
    flags = f"{FLAGS} --data_path corpus.jsonl --augment speed --save_steps 2 --output_dir {tmp_path / 'run'}"
    assert "going on" in call(train.main, flags).out
    assert_same(weights(tmp_path / "run"), weights(streamed_run))


def test_loader_processes_change_nothing(streamed_run, call, tmp_path):
    flags = f"{FLAGS} --data_path corpus.jsonl --augment speed --save_steps 2 --output_dir {tmp_path}"
    call(train.main, f"{flags} --dataloader_num_workers 2")
    assert_same(weights(tmp_path), weights(streamed_run))


def test_a_table_trains_with_a_budget_meters_and_an_evaluation(table, chinese_llm, call, tmp_path):
    flags = f"{FLAGS.replace('--report_to none', '--report_to tensorboard')} --max_batch_seconds 8"
    call(train.main, f"{flags} --data_path hf:{table} --eval_data_path corpus.jsonl --output_dir {tmp_path}")
    rows = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert all(row["audio_seconds_a_second"] > 0 for row in rows if "loss" in row)
    assert "eval_loss" in rows[-1]  # after the last step


# Bad input


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ("--data_path corpus.jsonl --max_steps -1", "a stream has no end; give --max_steps"),
        ("--data_path corpus.jsonl --min_tokens 3", "--min_tokens looks at all records first"),
        ("--data_path corpus.jsonl --overfit 2", "--overfit looks at all records first"),
        ("--data_path nemo:train.json", "--streaming nemo:train.json: wanted hf:PLACE, or a manifest"),
        ("--data_path corpus.jsonl --data_split dev", "--streaming corpus.jsonl --data_split: wanted hf:PLACE"),
        ("--data_path hf:missing", "hf:missing: no such folder"),
    ],
)
def test_what_does_not_go_with_a_stream_is_told(flags, wanted, chinese_llm, call, tmp_path):
    assert wanted in error_of(call, f"{FLAGS} {flags} --output_dir {tmp_path}")


def test_an_empty_stream_is_told(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(InputError, match=r"empty\.jsonl: no records"):
        next(iter(Stream([str(tmp_path / "empty.jsonl")], seed=0)))


def test_a_clip_that_cannot_be_read_stops_the_run_with_its_line_or_is_counted(world, chinese_llm, call, tmp_path):
    rows = [json.loads(line) for line in (world / "corpus.jsonl").read_text().splitlines()]
    rows = [row | {"wav": str(world / row["wav"])} for row in rows]
    manifest = write_manifest(tmp_path / "bad.jsonl", [{"wav": "none.wav", "txt": "a"}, *rows])
    flags = f"{FLAGS} --data_path {manifest} --output_dir {tmp_path / 'run'}"
    flags = flags.replace("--max_steps 6", "--max_steps 60")  # more than a buffer has
    assert f"{manifest}:1: {tmp_path}/none.wav: no such file" in error_of(call, flags)
    screen = call(train.main, f"{flags} --on_bad_audio skip --output_dir {tmp_path / 'skip'}")
    assert "skipped 1 bad utterances" in screen.err and f"{manifest}:1" in screen.err
