"""The recognition command: what it writes, in which order, after a kill, and what it says about bad clips."""

import json
import os
import re
import shlex
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
from conftest import MODEL_FLAGS, Job, make_llm, write_manifest

import recognize
import score
from errors import InputError
from model import SpeechLLM

SEARCH = "--num_beams 2 --max_new_tokens 12"
DECODE = f"--model_path trained --data_path corpus.jsonl {SEARCH} --num_workers 0"


def lines(path: Path) -> list[str]:
    text = path.read_bytes().decode("utf-8")
    assert text.endswith("\n")
    return text.split("\n")[:-1]


@pytest.fixture(scope="session")
def decoded(trained, call):
    """What the finished command printed; its result file is in `world`."""
    return call(recognize.main, f"{DECODE} --batch_size 5 --result_path decoded.txt")


@pytest.fixture(scope="session")
def recogniser(trained) -> SpeechLLM:
    return SpeechLLM.from_pretrained(trained)


def transcribe(model: SpeechLLM, audio) -> str:
    return model.transcribe(audio, num_beams=2, max_new_tokens=12)


def test_lines_are_in_the_order_of_the_manifest_though_decoded_by_length(decoded, world, recogniser):
    """Each line is what its clip gives when it is decoded alone, from Python."""
    alone = [transcribe(recogniser, str(world / f"clip{number}.wav")) for number in range(20)]
    assert len(set(alone)) > 10  # or the order could not be told
    assert lines(world / "decoded.txt") == alone


def test_chinese_is_written_as_utf8(decoded, world):
    assert any("\u4e00" <= letter <= "\u9fff" for letter in "".join(lines(world / "decoded.txt")))


def test_the_published_command_gives_the_result_of_model_path(decoded, world, call):
    weights = "--projector_model_path trained/checkpoint-10/model.safetensors"
    flags = f"--data_path corpus.jsonl --result_path published.txt {SEARCH} --batch_size 5 --llm_type qwen2"
    call(recognize.main, f"{MODEL_FLAGS} {weights} {flags}")
    assert lines(world / "published.txt") == lines(world / "decoded.txt")


def test_a_jsonl_result_holds_key_reference_and_prediction(decoded, world, call):
    """Batches of one, on the way: the same texts as batches of five."""
    rows = [json.loads(line) for line in (world / "corpus.jsonl").read_text().splitlines()]
    rows[4] |= {"key": "第五", "txt": "你好"}
    write_manifest(world / "keyed.jsonl", rows)
    flags = DECODE.replace("corpus", "keyed")
    call(recognize.main, f"{flags} --batch_size 1 --result_path keyed_result.jsonl")
    written = lines(world / "keyed_result.jsonl")
    assert "第五" in written[4] and "你好" in written[4]  # as letters, not as escapes
    for number, (text, row) in enumerate(zip(lines(world / "decoded.txt"), map(json.loads, written), strict=True)):
        assert row["key"] == ("第五" if number == 4 else f"clip{number}")
        assert (row["wav"], row["txt"], row["pred"]) == (rows[number]["wav"], rows[number]["txt"], text)


def test_two_processes_write_the_same_file(decoded, world, launch):
    job = launch("recognize.py", f"{DECODE} --result_path two.txt", processes=2).wait()
    assert job.status == 0, job.err
    assert lines(world / "two.txt") == lines(world / "decoded.txt")
    assert job.out.count("WER ") == 1
    assert not list(world.glob("two.txt.*"))


def test_the_score_is_printed_if_there_are_references(decoded, world, call, capsys):
    assert re.search(r"^WER \d+\.\d\d / ", decoded.out, re.MULTILINE)
    score.main(["--data_path", str(world / "corpus.jsonl"), "--result_path", str(world / "decoded.txt")])
    assert capsys.readouterr().out.splitlines()[0] in decoded.out
    rows = [json.loads(line) for line in (world / "corpus.jsonl").read_text().splitlines()]
    write_manifest(world / "untold.jsonl", [{"wav": row["wav"]} for row in rows[:6]])
    screen = call(recognize.main, f"{DECODE} --data_path untold.jsonl --result_path untold.txt")
    assert "WER" not in screen.out and "CER" not in screen.out
    assert lines(world / "untold.txt") == lines(world / "decoded.txt")[:6]


def test_the_length_penalty_reaches_the_search(trained, call):
    flags = "--model_path trained --num_beams 4 --max_new_tokens 30 clip1.wav clip2.wav clip3.wav clip4.wav"
    short, usual, long = (call(recognize.main, f"{flags} --length_penalty {x}").out for x in (-9, 1, 9))
    assert len(short) < len(usual) < len(long)


# Confidence, alternatives, samples

RICH = f"{DECODE} --nbest 2 --confidence"


@pytest.fixture(scope="session")
def rich(trained, world, call) -> list[dict]:
    """The rows of a result with all that can be asked for."""
    call(recognize.main, f"{RICH} --batch_size 5 --result_path rich.jsonl")
    return [json.loads(line) for line in lines(world / "rich.jsonl")]


def assert_same_rows(path: Path, wanted: list[dict]) -> None:
    """The same texts; numbers but for their rounding in batches of other sizes."""
    rows = [json.loads(line) for line in lines(path)]
    assert len(rows) == len(wanted)
    for row, other in zip(rows, wanted, strict=True):
        numbers, texts = zip(*(split_numbers(content) for content in (row, other)), strict=True)
        assert texts[0] == texts[1]
        np.testing.assert_allclose(*numbers, atol=3e-4)


def split_numbers(content) -> tuple[list[float], object]:
    """The floats somewhere in an object of JSON, and the object without them."""
    numbers = []
    rest = json.loads(json.dumps(content), parse_float=lambda text: numbers.append(float(text)))
    return numbers, rest


def test_a_row_holds_confidences_and_alternatives_if_asked(rich, decoded, world):
    assert [row["pred"] for row in rich] == lines(world / "decoded.txt")  # the first of the best
    for row in rich:
        assert list(row) == "key wav txt pred index problem log_probability confidence words alternatives".split()
        assert [word["word"] for word in row["words"]] and row["log_probability"] < 0
        assert all(0 <= rating <= 1 for rating in [row["confidence"], *(word["confidence"] for word in row["words"])])
        (other,) = row["alternatives"]
        assert list(other) == ["text", "log_probability"]
    assert {row["alternatives"][0]["text"] for row in rich} != {row["pred"] for row in rich}


def test_a_plain_row_is_as_it_was(trained, world, call):
    call(recognize.main, f"{DECODE} --batch_size 5 --result_path plain.jsonl")
    for line in lines(world / "plain.jsonl"):
        assert list(json.loads(line)) == "key wav txt pred index problem".split()


def test_two_processes_write_the_same_confidences_and_alternatives(rich, world, launch):
    job = launch("recognize.py", f"{RICH} --result_path two_rich.jsonl", processes=2).wait()
    assert job.status == 0, job.err
    assert_same_rows(world / "two_rich.jsonl", rich)


def test_confidences_and_alternatives_outlive_a_kill(rich, trained, call, launch, tmp_path):
    result = tmp_path / "result.jsonl"
    launch("recognize.py", f"{RICH} --batch_size 1 --result_path {result}", die_at=3).died()
    assert num_finished(result)
    assert "going on: " in call(recognize.main, f"{RICH} --batch_size 5 --result_path {result}").err
    assert_same_rows(result, rich)


def test_samples_are_the_same_with_any_number_of_processes(trained, world, call, launch):
    flags = f"{DECODE} --do_sample --temperature 1.3 --seed 5"
    call(recognize.main, f"{flags} --batch_size 5 --result_path sampled.txt")
    job = launch("recognize.py", f"{flags} --batch_size 3 --result_path two_sampled.txt", processes=2).wait()
    assert job.status == 0, job.err
    assert lines(world / "two_sampled.txt") == lines(world / "sampled.txt")
    call(recognize.main, f"{flags} --seed 6 --result_path sampled6.txt")
    assert lines(world / "sampled6.txt") != lines(world / "sampled.txt")


# Going on after a kill.


def num_finished(result: Path) -> int:
    """Hypotheses in the unfinished files beside a result file."""
    return sum(path.read_bytes().count(b"\n") for path in result.parent.glob(f"{result.name}.*.partial-*"))


@pytest.fixture(scope="session")
def killed(world, trained, launch, tmp_path_factory) -> Path:
    """What kill -9 leaves of the command of `decoded`, with one clip a batch, after some clips."""
    folder = tmp_path_factory.mktemp("killed")
    launch("recognize.py", f"{DECODE} --batch_size 1 --result_path {folder}/result.txt", die_at=3).died()
    assert not (folder / "result.txt").exists()
    return folder


@pytest.fixture
def unfinished(killed, tmp_path) -> Path:
    """A copy of that, to go on from: the path of the result file that is not there yet."""
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    return tmp_path / "result.txt"


def test_the_same_command_goes_on_after_a_kill_and_decodes_only_the_rest(unfinished, world, decoded, launch):
    (path,) = unfinished.parent.glob("result.txt.*.partial-*")
    first, *rest = path.read_text().splitlines()
    row = json.loads(first)
    path.write_text("\n".join([json.dumps(row | {"text": "not decoded again"}), *rest]) + "\n")
    count = num_finished(unfinished)
    job = launch("recognize.py", f"{DECODE} --batch_size 5 --result_path {unfinished}").wait()
    assert job.status == 0, job.err
    assert f"going on: {count} of 20 utterances" in job.err
    wanted = lines(world / "decoded.txt")
    wanted[row["index"]] = "not decoded again"
    assert lines(unfinished) == wanted
    assert [path.name for path in unfinished.parent.iterdir()] == ["result.txt"]


def test_a_line_torn_by_the_kill_is_decoded_again(unfinished, world, decoded, call):
    """Torn in the middle of a Chinese character."""
    count = num_finished(unfinished)
    with open(next(unfinished.parent.glob("result.txt.*.partial-*")), "ab") as file:
        file.write('{"index": 0, "text": "好'.encode()[:-1])
    screen = call(recognize.main, f"{DECODE} --batch_size 5 --result_path {unfinished}")
    assert f"going on: {count} of 20 utterances" in screen.err
    assert lines(unfinished) == lines(world / "decoded.txt")


def test_two_processes_killed_are_gone_on_from_by_one(world, trained, decoded, call, launch, tmp_path):
    result = tmp_path / "result.txt"
    launch("recognize.py", f"{DECODE} --batch_size 1 --result_path {result}", processes=2, die_at=3).died()
    assert "going on: " in call(recognize.main, f"{DECODE} --batch_size 5 --result_path {result}").err
    assert lines(result) == lines(world / "decoded.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["result.txt"]


@pytest.fixture
def busy(world, trained, decoded, launch, tmp_path) -> Job:
    """A decode into result.txt that has begun, and for which there is enough to do."""
    rows = [{"wav": str(world / f"clip{number % 20}.wav")} for number in range(400)]
    write_manifest(tmp_path / "long.jsonl", rows)
    flags = f"{DECODE} --data_path {tmp_path}/long.jsonl --batch_size 1 --num_workers 2"
    job = launch("recognize.py", f"{flags} --result_path {tmp_path}/result.txt")
    while not num_finished(tmp_path / "result.txt") and job.processes[0].is_alive():
        time.sleep(0.01)
    yield job
    job.kill()


def test_a_second_decode_into_the_same_file_is_refused_and_the_first_goes_on(busy, call, launch, tmp_path):
    flags = f"{DECODE} --result_path {tmp_path}/result.txt"
    error = f"{tmp_path}/result.txt: another process is decoding into it; wait, or name another"
    assert error_of(call, flags) == error
    assert launch("recognize.py", flags).wait().the_error() == f"error: {error}"
    assert busy.processes[0].is_alive()


def test_after_a_kill_the_file_is_free_at_once_though_loading_processes_live_on(busy, call, world, tmp_path):
    os.kill(busy.processes[0].pid, signal.SIGKILL)
    busy.processes[0].join()
    screen = call(recognize.main, f"{DECODE} --batch_size 5 --result_path {tmp_path}/result.txt")
    assert "starting over" in screen.err  # it is the result of another manifest
    assert lines(tmp_path / "result.txt") == lines(world / "decoded.txt")
    assert num_finished(tmp_path / "result.txt")  # what was decoded of the other manifest is not lost


def test_a_decode_that_fails_leaves_nothing_beside_its_result(trained, call, tmp_path):
    error_of(call, f"{DECODE} --prompt Hi --result_path {tmp_path}/result.txt")
    assert not list(tmp_path.iterdir())


CHANGES = {
    "model": "--model_path trained/checkpoint-5",
    "manifest": "--data_path fewer.jsonl",
    "num_beams": "--num_beams 1",
    "length_penalty": "--length_penalty 2",
    "max_tokens_per_second": "--max_tokens_per_second 0",
    "prompt": "--prompt '<audio> What was said?'",
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_another_run_has_left_is_not_mixed_in(change, unfinished, world, decoded, call):
    (world / "fewer.jsonl").write_text("".join((world / "corpus.jsonl").read_text().splitlines(keepends=True)[:7]))
    outputs = []
    for result in (unfinished, unfinished.with_name("fresh.txt")):
        screen = call(recognize.main, f"{DECODE} {CHANGES[change]} --batch_size 5 --result_path {result}")
        assert "going on" not in screen.err
        assert ("starting over" in screen.err) == (result == unfinished)
        assert bool(num_finished(result)) == (result == unfinished)  # of the other run, which can still go on
        outputs.append(lines(result))
    assert outputs[0] == outputs[1]
    if change == "manifest":
        assert outputs[0] == lines(world / "decoded.txt")[:7]


# Bad clips, other formats, single files.


def test_a_bad_clip_keeps_its_empty_line_and_is_reported(world, decoded, call, tmp_path):
    samples, rate = soundfile.read(world / "clip0.wav", dtype="float32")
    (tmp_path / "corrupt.wav").write_bytes(b"RIFF and no more")
    soundfile.write(tmp_path / "short.wav", samples[:160], rate)
    soundfile.write(tmp_path / "nan.wav", np.where(np.arange(len(samples)) == 9, np.nan, samples), rate, "FLOAT")
    reasons = {"missing": "no such file", "corrupt": "unreadable", "nan": "NaN", "short": "too short"}
    rows = []
    for number, name in enumerate(reasons):
        rows += [{"wav": str(world / f"clip{number}.wav"), "txt": "hello"}, {"wav": f"{name}.wav"}]
    manifest = write_manifest(tmp_path / "mixed.jsonl", rows)
    flags = f"--model_path trained {SEARCH} --num_workers 1 --data_path {manifest}"
    screen = call(recognize.main, f"{flags} --result_path {tmp_path}/result.txt")
    written = lines(tmp_path / "result.txt")
    assert written[::2] == lines(world / "decoded.txt")[:4]
    assert written[1::2] == [""] * 4
    for number, reason in enumerate(reasons.values()):
        (told,) = [line for line in screen.err.splitlines() if line.startswith(f"{manifest}:{2 * number + 2}: ")]
        assert reason in told
    assert re.search(r"^WER .* of 4 lines left out", screen.out, re.MULTILINE)
    assert "not scored: 4 lines without a reference" in screen.out


def test_audio_files_give_one_transcript_a_line_in_their_order(world, trained, recogniser, call, tmp_path):
    """wav, flac, a file that is not there, and a stereo mp3 at 44.1 kHz."""
    short, _ = soundfile.read(world / "clip3.wav", dtype="float32")
    soundfile.write(tmp_path / "b.flac", short, 16000)
    seconds = np.arange(2 * 44100) / 44100
    left, right = np.sin(2 * np.pi * 300 * seconds), np.sin(2 * np.pi * 700 * seconds) * np.sin(9 * seconds)
    soundfile.write(tmp_path / "c.mp3", 0.3 * np.stack([left, right], axis=1), 44100, format="MP3")
    stereo, rate = soundfile.read(tmp_path / "c.mp3", dtype="float32")
    assert (rate, stereo.shape[1]) == (44100, 2)
    mono = soxr.resample(stereo.mean(axis=1), 44100, 16000)
    files = f"clip5.wav {tmp_path}/b.flac nowhere.wav {tmp_path}/c.mp3 clip0.wav"
    with pytest.warns(UserWarning, match=r"^audio 3: nowhere\.wav: no such file"):
        screen = call(recognize.main, f"{SEARCH} --model_path trained {files}")
    clips = [str(world / "clip5.wav"), short, mono, str(world / "clip0.wav")]
    wanted = [transcribe(recogniser, audio) for audio in clips]
    assert wanted[2]
    assert screen.out.split("\n")[:-1] == [*wanted[:2], "", *wanted[2:]]


# Wrong input


def error_of(call, flags: str) -> str:
    """The one line that recognize.py says of wrong input."""
    with pytest.raises(InputError) as error:
        call(recognize.main, flags)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_projector_of_another_width_is_told_with_both_widths(trained, call, tmp_path):
    make_llm(tmp_path / "wide_llm", width=64)
    flags = f"--model_path trained --llm_model_name_or_path {tmp_path}/wide_llm --data_path corpus.jsonl"
    error = error_of(call, f"{flags} --result_path {tmp_path}/r.txt")
    assert "trained/model.safetensors" in error
    assert re.search(r"\b48\b", error) and re.search(r"\b64\b", error)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--data_path corpus.jsonl --result_path never.txt", "--model_path"),
        ("--model_path trained", "--data_path"),
        ("--model_path trained --data_path corpus.jsonl", "--result_path"),
        ("--model_path trained --data_path corpus.jsonl --result_path never.txt --beam 3", "--beam"),
        ("--model_path trained --data_path corpus.jsonl --result_path never.txt --num_beams many", "--num_beams"),
        ("--model_path trained a.wav --batch_size 0", "--batch_size"),
    ],
)
def test_a_command_line_that_lacks_something_fails_with_status_2(flags, told, capsys):
    with pytest.raises(SystemExit) as exit:
        recognize.main(shlex.split(flags))
    assert exit.value.code == 2
    assert told in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--model_path nowhere", "nowhere: no such folder, nor a model on the Hub"),
        ("--projector_model_path nowhere/model.safetensors " + MODEL_FLAGS, "nowhere/model.safetensors"),
        ("--model_path trained --llm_model_name_or_path no_llm", "no_llm"),
        ("--model_path trained --result_path nowhere/result.txt", "nowhere"),
        ("--model_path trained --result_path result.trn", "wanted the ending .txt or .jsonl"),
        ("--model_path trained --num_beams 0", "--num_beams 0: wanted 1 or more"),
        ("--model_path trained --prompt 'What was said?'", "<audio>"),
        ("--model_path trained --nbest 5", "--nbest 5: wanted as many --num_beams, or --do_sample"),
        ("--model_path trained --do_sample --temperature 0", "--temperature 0.0: wanted 0.01 or more"),
        ("--model_path trained --confidence", "wanted --result_path NAME.jsonl"),
    ],
)
def test_wrong_paths_and_values_are_one_line(flags, told, trained, call):
    result = "" if "--result_path" in flags else "--result_path never.txt"
    assert told in error_of(call, f"--data_path corpus.jsonl {result} {flags}")


def test_wrong_input_ends_the_command_with_exit_status_2(launch):
    flags = "--model_path nowhere --data_path no.jsonl --result_path result.txt"
    assert launch("recognize.py", flags).wait().the_error().startswith("error: no.jsonl: no such manifest")


def test_help_names_the_flags(capsys):
    with pytest.raises(SystemExit) as exit:
        recognize.main(["--help"])
    assert exit.value.code == 0
    wanted = "model_path projector_model_path llm_model_name_or_path whisper_model_name_or_path data_path result_path "
    wanted += "num_beams length_penalty batch_size max_new_tokens dtype device nbest confidence do_sample seed"
    assert {f"--{flag}" for flag in wanted.split()} <= set(re.findall(r"--\w+", capsys.readouterr().out))
