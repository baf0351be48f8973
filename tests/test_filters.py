"""What filters.py promises: records that the user does not want are left out of the training data, and counted."""

import json
import time

import numpy as np
import pytest
import soundfile
from conftest import SAMPLE_RATE, TRAIN_FLAGS, make_tokenizer, noise, write_manifest
from runs import error_of, good

import train
from dataset import open_records
from errors import InputError
from filters import Limits, broken_rules, keep
from mixture import Mixture
from model import SpeechLLMConfig
from sources import RecordList, Subset


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> SpeechLLMConfig:
    """Of an LLM that is a tokenizer alone: in its tokens, "hello" and " hello" are one each."""
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(folder)
    return SpeechLLMConfig(llm_model_name_or_path=str(folder))


def record(seconds: float, text: str = "hello world") -> dict:
    return {"wav": "a.wav", "txt": text, "duration": seconds}


def limits(**values) -> list[float]:
    return list(vars(Limits(**values)).values())


def left(rows: list[dict], config, **values) -> list[int]:
    """Indices of the records that are left."""
    records = RecordList(rows)
    subset, _ = keep(records, limits(**values), config)
    return subset.indices.tolist()


def test_short_audio_is_left_out(config):
    assert left([record(0.4), record(0.5), record(3)], config, min_seconds=0.5) == [1, 2]


def test_short_and_long_transcripts_are_left_out_in_tokens_of_the_llm(config):
    texts = ["", "hello", "hello hello", "hello" + 9 * " hello"]
    lengths = [len(make_tokenizer()(text).input_ids) for text in texts]
    assert lengths == sorted(set(lengths))
    rows = [record(3, text) for text in texts]
    assert left(rows, config, min_tokens=lengths[1]) == [1, 2, 3]
    assert left(rows, config, max_tokens=lengths[2]) == [0, 1, 2]
    assert left(rows, config, min_tokens=lengths[1], max_tokens=lengths[2]) == [1, 2]


def test_more_characters_than_anyone_says_in_a_second_are_left_out_and_spaces_do_not_count(config):
    rows = [record(1, "a b c d e"), record(1, "a b c d e f"), record(2, "abcdef"), record(1, "甚至出现交易")]
    assert left(rows, config, max_characters_per_second=5) == [0, 2]


def test_the_last_answer_of_a_conversation_is_its_transcript(config):
    turns = [{"role": "user", "content": "<audio>", "audio": ["a.wav"]}, {"role": "assistant", "content": "hello"}]
    rows = [{"messages": turns, "duration": 1.0}, {"messages": [*turns, *turns], "duration": 0.1}]
    assert left(rows, config, max_characters_per_second=10) == [0]


def test_a_record_counts_for_the_first_rule_that_it_breaks(config, capsys):
    rows = [record(0.1, ""), record(1800, ""), record(1800, ""), record(1, 30 * "a"), record(3)]
    subset, told = keep(RecordList(rows), [0.5, 1, 0, 20], config)
    wanted = "--min_seconds 0.5: 1 records, 0.00 hours; --min_tokens 1: 2 records, 1.00 hours; "
    wanted += "--max_characters_per_second 20: 1 records, 0.00 hours"
    assert told == wanted and capsys.readouterr().out == f"left out: {wanted}\n"
    assert [record["txt"] for record in subset] == ["hello world"] and subset.durations.tolist() == [3]


def test_a_length_that_nobody_states_is_read_from_the_header_and_what_cannot_be_read_stays(config, tmp_path):
    for number, seconds in enumerate((0.3, 1.0)):
        soundfile.write(tmp_path / f"{number}.wav", noise(seconds), SAMPLE_RATE)
    (tmp_path / "bad.wav").write_text("no audio")
    rows = [{"wav": str(tmp_path / name), "txt": "a"} for name in ("0.wav", "bad.wav", "1.wav", "missing.wav")]
    subset, _ = keep(RecordList(rows), limits(min_seconds=0.5), config)
    assert subset.indices.tolist() == [1, 2, 3]
    np.testing.assert_array_equal(subset.durations, [np.nan, 1, np.nan])


def test_many_texts_are_tokenised_block_by_block_with_the_same_result(config, monkeypatch):
    rows = [record(1, " ".join(["hello"] * (number % 7))) for number in range(50)]
    whole = left(rows, config, min_tokens=3, max_tokens=8)
    monkeypatch.setattr("filters.BLOCK", 4)
    assert left(rows, config, min_tokens=3, max_tokens=8) == whole and 0 < len(whole) < 50


def test_texts_are_not_read_where_durations_tell_enough():
    class WithoutTexts(RecordList):
        def __getitem__(self, index):
            raise AssertionError("read")

    records = WithoutTexts(record(seconds) for seconds in (0.1, 2))
    assert broken_rules(records, records.durations, Limits(min_seconds=1), None).tolist() == [1, 0]


def test_each_source_of_a_mixture_keeps_its_weight(config):
    a, b = RecordList([record(0.1)] * 5 + [record(1)] * 5), RecordList([record(2)] * 3)
    mixture, _ = keep(Mixture([a, b], [1, 2], ["a", "b"]), limits(min_seconds=0.5), config)
    assert mixture.places.tolist() == [5, 10] and mixture.durations.tolist() == [1] * 5 + [2] * 10


@pytest.mark.parametrize("is_mixture", [False, True])
def test_nothing_left_of_a_source_is_wrong_input(config, is_mixture):
    records = RecordList([record(1)], "train.jsonl")
    records = Mixture([RecordList([record(9)]), records], None, ["a", "b"]) if is_mixture else records
    with pytest.raises(InputError, match=r"^train\.jsonl 1: no record of this source \(1\) passes --min_seconds 5"):
        keep(records, limits(min_seconds=5), config)


@pytest.mark.parametrize("value", [-1, float("nan")])
def test_a_limit_below_zero_is_wrong_input(value):
    with pytest.raises(InputError, match=r"--max_characters_per_second \S+: wanted more than 0, or 0 = off"):
        Limits(max_characters_per_second=value)


def test_an_llm_without_a_tokenizer_is_wrong_input(tmp_path):
    config = SpeechLLMConfig(llm_model_name_or_path=str(tmp_path))
    with pytest.raises(InputError, match="cannot load the tokenizer"):
        keep(RecordList([record(1)]), limits(max_tokens=5), config)


def test_the_fingerprint_covers_the_records_and_which_are_left_and_lets_more_come_behind():
    rows = [record(number) for number in range(6)]

    def subset(indices: list[int], count: int = 6) -> Subset:
        return Subset(RecordList(rows[:count]), np.array(indices), np.zeros(len(indices)))

    assert subset([0, 2, 4]).fingerprint() == subset([0, 2, 4], 5).fingerprint() == subset([0, 2, 4, 5]).fingerprint(3)
    assert subset([0, 2, 4]).fingerprint() != subset([0, 3, 4]).fingerprint()
    other = Subset(RecordList([record(9), *rows[1:]]), np.array([0, 2, 4]), np.zeros(3))
    assert subset([0, 2, 4]).fingerprint() != other.fingerprint()


def test_ten_thousand_lines_take_no_time(config, tmp_path):
    """A million take a hundred times as long: on one core some two minutes, on sixteen a tenth of that."""
    rows = [{"wav": "a.wav", "txt": f"hello world {number}", "duration": 1 + number % 9} for number in range(10_000)]
    (tmp_path / "a.wav").touch()
    records = open_records(write_manifest(tmp_path / "many.jsonl", rows))
    begin = time.process_time()
    subset, _ = keep(records, limits(min_seconds=2, max_tokens=9, max_characters_per_second=10), config)
    assert time.process_time() - begin < 5 and 5_000 < len(subset) < 9_000


# The command


def test_a_run_trains_on_what_is_left_and_goes_on_with_more(chinese_llm, world, call, tmp_path):
    rows = [good(world, number) for number in range(12)]
    rows[3]["txt"] = rows[7]["txt"] = 300 * "a"
    path = write_manifest(tmp_path / "train.jsonl", rows[:8])
    flags = f"{TRAIN_FLAGS} --data_path {path} --output_dir {tmp_path}/run --per_device_train_batch_size 2 "
    flags += "--save_strategy epoch --max_characters_per_second 50 --num_train_epochs"
    told = "--max_characters_per_second 50: 2 records, 0.00 hours"
    assert f"left out: {told}\n" in call(train.main, f"{flags} 1").out
    assert f"| left out | {told} |" in (tmp_path / "run/experiment.md").read_text()
    training = json.loads((tmp_path / "run/config.json").read_text())["training"]
    assert training["trained on"].startswith(f"{path}: 6 utterances")
    write_manifest(path, rows)
    assert "num_records was 6, is 10\n" in call(train.main, f"{flags} 2").out
    assert "max_characters_per_second was 50.0 and is 40.0" in error_of(
        call, f"{flags} 2 --max_characters_per_second 40"
    )


def test_on_bad_audio_plays_no_part(chinese_llm, world, call, tmp_path):
    rows = [good(world, number) for number in range(4)]
    soundfile.write(tmp_path / "short.wav", noise(0.01), SAMPLE_RATE)
    path = write_manifest(tmp_path / "train.jsonl", [*rows, {"wav": "short.wav", "txt": "a"}])
    flags = (
        f"{TRAIN_FLAGS} --data_path {path} --output_dir {tmp_path}/run --max_steps 1 --per_device_train_batch_size 5"
    )
    screen = call(train.main, f"{flags} --min_seconds 0.1")
    assert "left out: --min_seconds 0.1: 1 records" in screen.out and "skipped" not in screen.err
