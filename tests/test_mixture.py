"""What mixture.py promises: several sources at once, in shares that weights set, without a record lost."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import TRAIN_FLAGS, write_manifest
from runs import error_of, good, history

import recognize
import score
import train
from dataset import open_records
from errors import InputError
from manifest import Manifest, Records
from mixture import Mixture, split_weight
from resume import are_continued
from sources import RecordList


def records_of(name: str, count: int) -> RecordList:
    return RecordList({"wav": f"{name}{i}.wav", "txt": name, "duration": 1.0 + i} for i in range(count))


def texts(records: Records) -> Counter:
    return Counter(record["txt"] for record in records)


def manifest(folder: Path, name: str, count: int) -> str:
    rows = [{"wav": f"{name}{i}.wav", "txt": name, "duration": 1 + i} for i in range(count)]
    return str(write_manifest(folder / f"{name}.jsonl", rows))


def test_without_weights_each_record_comes_once_source_by_source():
    a, b = records_of("a", 3), records_of("b", 2)
    mixture = Mixture([a, b])
    assert list(mixture) == [*a, *b] and len(mixture) == 5
    assert mixture.durations.tolist() == [1, 2, 3, 1, 2]
    for index in (-1, 5):
        with pytest.raises(IndexError):
            mixture[index]


@pytest.mark.parametrize(
    ("sizes", "weights", "places"),
    [
        ((100, 10), (0.5, 0.5), (100, 100)),
        ((100, 10), (7, 3), (100, 43)),  # of any sum
        ((10, 100), (0.9, 0.1), (900, 100)),  # the second decides how long an epoch is
        ((6, 3), (2, 1), (6, 3)),
        ((7, 5, 3), (0.2, 0.3, 0.5), (7, 10, 18)),
    ],
)
def test_with_weights_an_epoch_is_as_long_as_it_takes_for_every_record_to_come_once(sizes, weights, places):
    parts = [records_of(name, size) for name, size in zip("abc", sizes, strict=False)]
    mixture = Mixture(parts, weights)
    shares = np.array(weights) / sum(weights)
    assert len(mixture) == sum(places) == pytest.approx(max(sizes / shares), abs=len(sizes) / 2)
    assert tuple(texts(mixture).values()) == places
    assert min(places[i] / sizes[i] for i in range(len(sizes))) == 1  # of some source each comes once
    turns = Counter(record["wav"] for record in mixture)
    for part in parts:
        times = {turns[record["wav"]] for record in part}
        assert min(times) >= 1 and max(times) - min(times) <= 1  # its records take turns


def test_the_durations_are_those_of_the_records_in_their_places():
    mixture = Mixture([records_of("a", 40), records_of("b", 7)], [0.3, 0.7])
    assert mixture.durations.tolist() == [record["duration"] for record in mixture]


def test_a_mixture_takes_no_more_memory_than_its_durations():
    mixture = Mixture([records_of("a", 50), records_of("b", 2)], [0.001, 0.999])
    arrays = {name: value for name, value in vars(mixture).items() if isinstance(value, np.ndarray)}
    assert len(mixture) == 50_000 and sum(value.nbytes for value in arrays.values()) < 50_100 * 8


# The command line


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("a.jsonl:0.7", ("a.jsonl", 0.7)),
        ("nemo:b.json:3", ("nemo:b.json", 3)),
        ("a.jsonl:.5", ("a.jsonl", 0.5)),
        ("a.jsonl", ("a.jsonl", None)),
        ("nemo:b.json", ("nemo:b.json", None)),
        ("folder:2024", ("folder:2024", None)),
        ("folder:2024:2", ("folder:2024", 2)),
        ("folder:inf", ("folder:inf", None)),
    ],
)
def test_a_number_behind_the_last_colon_is_a_weight(source, wanted):
    assert split_weight(source) == wanted


def test_a_file_of_that_name_is_no_weight(tmp_path):
    path = write_manifest(tmp_path / "a:0.7", [{"wav": "a.wav", "txt": "a"}])
    assert split_weight(str(path)) == (str(path), None)
    assert len(open_records([str(path), str(path)])) == 2


def test_a_list_of_sources_is_opened_with_its_weights_and_told_in_a_line(tmp_path, capsys):
    a, b = manifest(tmp_path, "a", 6), manifest(tmp_path, "b", 2)
    assert texts(open_records([f"{a}:3", f"{b}:3"], may_weigh=True)) == {"a": 6, "b": 6}
    told = f"sources: {a}: 6 records, 50.0% of an epoch, each 1.00 times; {b}: 2 records, 50.0% of an epoch, each 3.00"
    assert capsys.readouterr().out == f"{told} times\n"


def test_a_source_alone_is_itself(tmp_path):
    a = manifest(tmp_path, "a", 6)
    for source in (a, [a], Path(a)):
        assert isinstance(open_records(source), Manifest)
    assert isinstance(open_records([f"{a}:2"], may_weigh=True), Manifest)


@pytest.mark.parametrize(
    ("weights", "may_weigh", "told"),
    [
        ((":0.7", ""), True, r"b\.jsonl: no weight, where other sources have one; wanted \S+b\.jsonl:NUMBER"),
        ((":0", ":1"), True, r"a\.jsonl:0: the weight 0; wanted more than 0"),
        ((":-1", ":1"), True, r"a\.jsonl:-1: the weight -1; wanted more than 0"),
        (("", ":0.3"), False, r"b\.jsonl:0\.3: a weight, where each record comes once; wanted \S+b\.jsonl"),
        ((":0.7", ":0.3"), False, r"a\.jsonl:0\.7: a weight, where each record comes once; wanted \S+a\.jsonl"),
        (("x", ""), False, r"a\.jsonlx: no such manifest"),
    ],
)
def test_weights_that_make_no_sense_are_wrong_input(tmp_path, weights, may_weigh, told):
    sources = [manifest(tmp_path, name, 2) + weight for name, weight in zip("ab", weights, strict=True)]
    with pytest.raises(InputError, match=told):
        open_records(sources, may_weigh=may_weigh)


def test_a_flag_with_nothing_behind_it_is_wrong_input():
    with pytest.raises(InputError, match="wanted one source of data or several"):
        open_records([])


# Going on


def test_records_may_be_appended_to_any_source(tmp_path):
    for weights in (None, (0.4, 0.6)):
        earlier = Mixture([records_of("a", 4), records_of("b", 3)], weights)
        before = earlier.fingerprint(), len(earlier)
        for sizes, is_continued in (((4, 3), True), ((9, 3), True), ((4, 5), True), ((9, 5), True), ((3, 9), False)):
            now = Mixture([records_of("a", sizes[0]), records_of("b", sizes[1])], weights)
            assert are_continued(now, *before) == is_continued
        others = Mixture([records_of("a", 4), records_of("c", 3)], weights)
        assert not are_continued(others, *before) and others.fingerprint() != before[0]
        assert not are_continued(Mixture(earlier.parts[::-1], weights), *before)
    assert not are_continued(Mixture(earlier.parts, (0.5, 0.5)), *before)
    assert not are_continued(Mixture(earlier.parts), *before)
    assert not are_continued(earlier.parts[0], *before)


def test_without_weights_a_source_may_come_behind_the_others():
    a, b, c = records_of("a", 4), records_of("b", 3), records_of("c", 2)
    assert are_continued(Mixture([a, b]), a.fingerprint(), 4)
    assert are_continued(Mixture([a, b, c]), Mixture([a, b]).fingerprint(), 7)
    assert not are_continued(Mixture([a, b], [1, 1]), a.fingerprint(), 4)
    assert not are_continued(Mixture([b, a]), a.fingerprint(), 4)
    assert not are_continued(Mixture([a, b]), Mixture([a, b, c]).fingerprint(), 9)


def test_the_fingerprint_of_the_first_records_is_that_of_fewer_sources():
    a, b = records_of("a", 4), records_of("b", 3)
    assert Mixture([a, b]).fingerprint(4) == Mixture([a]).fingerprint()
    assert Mixture([a, b]).fingerprint(6) == Mixture([a, records_of("b", 2)]).fingerprint()


# The commands


@pytest.fixture
def sources(world, tmp_path) -> tuple[Path, Path]:
    """Two manifests of six clips and of two."""
    first = write_manifest(tmp_path / "first.jsonl", [good(world, number) for number in range(6)])
    return first, write_manifest(tmp_path / "second.jsonl", [good(world, number) for number in (6, 7)])


def test_a_run_trains_on_several_sources_and_goes_on_with_more_in_each(chinese_llm, world, sources, call, tmp_path):
    a, b = sources
    flags = f"{TRAIN_FLAGS} --data_path {a}:0.5 {b}:0.5 --output_dir {tmp_path}/run --per_device_train_batch_size 4 "
    flags += "--save_strategy epoch --num_train_epochs"
    assert f"{b}: 2 records, 50.0% of an epoch, each 3.00 times\n" in call(train.main, f"{flags} 1").out
    assert history(tmp_path / "run")[-1]["step"] == 3  # 6 + 3 * 2 clips
    assert "12 utterances" in json.loads((tmp_path / "run/config.json").read_text())["training"]["trained on"]
    write_manifest(b, [good(world, number) for number in range(6, 14)])
    out = call(train.main, f"{flags} 2").out
    assert "checkpoint-3\n  num_train_epochs was 1.0, is 2.0\n  num_records was 12, is 16\n" in out
    other = flags.replace(f"{a}:0.5", f"{a}:0.4")
    assert "this run contradicts it" in error_of(call, f"{other} 3")


def test_several_sources_are_decoded_and_scored_each_record_once(trained, world, sources, call, tmp_path, capsys):
    a, b = sources
    flags = f"--model_path trained --data_path {a} {b} --num_workers 0 --max_new_tokens 4 --num_beams 1"
    call(recognize.main, f"{flags} --result_path {tmp_path}/both.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "both.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == [f"clip{number}" for number in range(8)]
    score.main(["--data_path", str(a), str(b), "--result_path", f"{tmp_path}/both.jsonl", "--num_resamples", "0"])
    assert "of 8 lines left out" in capsys.readouterr().out
    weighed = str(a) + ":0.5"
    with pytest.raises(InputError, match="a weight, where each record comes once"):
        call(recognize.main, f"{flags.replace(str(a), weighed)} --result_path {tmp_path}/r.txt")
    with pytest.raises(InputError, match="a weight, where each record comes once"):
        score.main(["--data_path", weighed, str(b), "--result_path", f"{tmp_path}/both.jsonl"])


def test_several_sources_are_evaluated_each_record_once(trained, sources, call, tmp_path):
    a, b = sources
    flags = f"{TRAIN_FLAGS} --data_path corpus.jsonl --max_steps 1 --output_dir {tmp_path} --eval_data_path {a}"
    call(train.main, f"{flags} {b}")
    training = json.loads((tmp_path / "config.json").read_text())["training"]
    assert training["evaluated on"].startswith(f"{a} {b}: 8 utterances")
    assert "a weight, where each record comes once" in error_of(call, f"{flags} {b}:2")
