"""The recognition command: what it writes, in which order, after a kill, and what it says about bad clips."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
from conftest import MODEL_FLAGS, ROOT, make_llm, write_manifest

from model import SpeechLLM

SEARCH = "--num_beams 2 --max_new_tokens 12"
DECODE = f"--model_path trained --data_path corpus.jsonl {SEARCH} --num_workers 0"


def lines(path: Path) -> list[str]:
    text = path.read_bytes().decode("utf-8")
    assert text.endswith("\n")
    return text.split("\n")[:-1]


@pytest.fixture(scope="session")
def decoded(world, trained, launch):
    """The finished command, with its result file in `world`."""
    job = launch("recognize.py", f"{DECODE} --batch_size 5 --result_path decoded.txt").wait()
    assert job.status == 0, job.err
    return job


@pytest.fixture(scope="session")
def recogniser(world, trained) -> SpeechLLM:
    given = {"llm_model_name_or_path": "chinese_llm", "encoder_name_or_path": "whisper.pt"}
    return SpeechLLM.from_pretrained(trained, **{name: str(world / path) for name, path in given.items()})


def transcribe(model: SpeechLLM, audio) -> str:
    return model.transcribe(audio, num_beams=2, max_new_tokens=12)


def test_lines_are_in_the_order_of_the_manifest_though_decoded_by_length(decoded, world, recogniser):
    """Each line is what its clip gives when it is decoded alone, from Python."""
    alone = [transcribe(recogniser, str(world / f"clip{number}.wav")) for number in range(20)]
    assert len(set(alone)) > 10  # or the order could not be told
    assert lines(world / "decoded.txt") == alone


def test_chinese_is_written_as_utf8(decoded, world):
    assert any("\u4e00" <= letter <= "\u9fff" for letter in "".join(lines(world / "decoded.txt")))


def test_the_published_command_gives_the_result_of_model_path(decoded, world, launch):
    weights = "--projector_model_path trained/checkpoint-10/model.safetensors"
    flags = f"--data_path corpus.jsonl --result_path published.txt {SEARCH} --batch_size 5 --llm_type qwen2"
    job = launch("recognize.py", f"{MODEL_FLAGS} {weights} {flags}").wait()
    assert job.status == 0, job.err
    assert lines(world / "published.txt") == lines(world / "decoded.txt")


def test_a_jsonl_result_holds_key_reference_and_prediction(decoded, world, launch):
    """Batches of one, on the way: the same texts as batches of five."""
    rows = [json.loads(line) for line in (world / "corpus.jsonl").read_text().splitlines()]
    rows[4] |= {"key": "第五", "txt": "你好"}
    write_manifest(world / "keyed.jsonl", rows)
    flags = DECODE.replace("corpus", "keyed")
    job = launch("recognize.py", f"{flags} --batch_size 1 --result_path keyed_result.jsonl").wait()
    assert job.status == 0, job.err
    written = lines(world / "keyed_result.jsonl")
    assert "第五" in written[4] and "你好" in written[4]  # as letters, not as escapes
    for number, (text, row) in enumerate(zip(lines(world / "decoded.txt"), map(json.loads, written), strict=True)):
        assert row["key"] == ("第五" if number == 4 else f"clip{number}")
        assert (row["wav"], row["txt"], row["pred"]) == (rows[number]["wav"], rows[number]["txt"], text)


def test_two_processes_under_torchrun_write_the_same_file(decoded, world):
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, str(ROOT / "recognize.py"), *DECODE.split(), "--result_path", "two.txt"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=world, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert lines(world / "two.txt") == lines(world / "decoded.txt")
    assert done.stdout.count("WER ") == 1
    assert not list(world.glob("two.txt.*"))


def test_the_score_is_printed_if_there_are_references(decoded, world, launch):
    assert re.search(r"^WER \d+\.\d\d / ", decoded.out, re.MULTILINE)
    again = launch("score.py", "--data_path corpus.jsonl --result_path decoded.txt").wait()
    assert again.out.splitlines()[0] in decoded.out
    rows = [json.loads(line) for line in (world / "corpus.jsonl").read_text().splitlines()]
    silent = [{"wav": row["wav"]} for row in rows[:6]]
    write_manifest(world / "untold.jsonl", silent)
    job = launch("recognize.py", f"{DECODE} --data_path untold.jsonl --result_path untold.txt").wait()
    assert job.status == 0, job.err
    assert "WER" not in job.out and "CER" not in job.out
    assert lines(world / "untold.txt") == lines(world / "decoded.txt")[:6]


# Going on after a kill.


def journal_rows(result: Path) -> int:
    """Whole rows in the journals beside a result file; the first line of each is its head."""
    return sum(max(path.read_bytes().count(b"\n") - 1, 0) for path in result.parent.glob(f"{result.name}.partial-*"))


@pytest.fixture(scope="session")
def killed(world, trained, launch, tmp_path_factory) -> Path:
    """What kill -9 leaves of the command of `decoded`, with one clip a batch, after some clips."""
    folder = tmp_path_factory.mktemp("killed")
    launch("recognize.py", f"{DECODE} --batch_size 1 --result_path {folder}/result.txt", die_at=3).died()
    assert not (folder / "result.txt").exists()
    return folder


@pytest.fixture
def left(killed, tmp_path) -> Path:
    """A copy of that, to go on from: the path of the result file that is not there yet."""
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    return tmp_path / "result.txt"


def test_the_same_command_goes_on_after_a_kill_and_decodes_only_the_rest(left, world, decoded, launch):
    journal = left.with_name("result.txt.partial-0")
    head, first, *rest = journal.read_text().splitlines()
    row = json.loads(first)
    first = json.dumps(row | {"pred": "not decoded again"})
    journal.write_text("\n".join([head, first, *rest]) + "\n")
    count = journal_rows(left)
    job = launch("recognize.py", f"{DECODE} --batch_size 5 --result_path {left}").wait()
    assert job.status == 0, job.err
    assert f"going on: {count} of 20 utterances" in job.err
    wanted = lines(world / "decoded.txt")
    wanted[row["index"]] = "not decoded again"
    assert lines(left) == wanted
    assert [path.name for path in left.parent.iterdir()] == ["result.txt"]


def test_a_line_torn_by_the_kill_is_decoded_again(left, world, decoded, launch):
    """Torn in the middle of a Chinese character."""
    journal = left.with_name("result.txt.partial-0")
    count = journal_rows(left)
    with open(journal, "ab") as file:
        file.write('{"index": 0, "pred": "好'.encode()[:-1])
    job = launch("recognize.py", f"{DECODE} --batch_size 5 --result_path {left}").wait()
    assert job.status == 0, job.err
    assert f"going on: {count} of 20 utterances" in job.err
    assert lines(left) == lines(world / "decoded.txt")


def test_two_processes_killed_are_gone_on_from_by_one(world, trained, decoded, launch, tmp_path):
    result = tmp_path / "result.txt"
    launch("recognize.py", f"{DECODE} --batch_size 1 --result_path {result}", processes=2, die_at=3).died()
    job = launch("recognize.py", f"{DECODE} --batch_size 5 --result_path {result}").wait()
    assert job.status == 0, job.err
    assert "going on: " in job.err
    assert lines(result) == lines(world / "decoded.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["result.txt"]


@pytest.mark.parametrize("changed", ["model", "manifest", "num_beams", "prompt"])
def test_what_another_run_has_left_is_not_mixed_in(changed, left, world, decoded, launch):
    (world / "fewer.jsonl").write_text("".join((world / "corpus.jsonl").read_text().splitlines(keepends=True)[:7]))
    flags = {
        "model": "--model_path trained/checkpoint-5",
        "manifest": "--data_path fewer.jsonl",
        "num_beams": "--num_beams 1",
        "prompt": "--prompt '<audio> What was said?'",
    }[changed]
    outputs = []
    for result in (left, left.with_name("fresh.txt")):
        job = launch("recognize.py", f"{DECODE} {flags} --batch_size 5 --result_path {result}").wait()
        assert job.status == 0, job.err
        assert "going on" not in job.err
        assert ("starting over" in job.err) == (result == left)
        outputs.append(lines(result))
    assert outputs[0] == outputs[1]
    if changed == "manifest":
        assert outputs[0] == lines(world / "decoded.txt")[:7]


# Bad clips, other formats, single files.


def test_a_bad_clip_keeps_its_empty_line_and_is_reported(world, decoded, launch, tmp_path):
    samples, rate = soundfile.read(world / "clip0.wav", dtype="float32")
    (tmp_path / "corrupt.wav").write_bytes(b"RIFF and no more")
    soundfile.write(tmp_path / "short.wav", samples[:160], rate)
    soundfile.write(tmp_path / "nan.wav", np.where(np.arange(len(samples)) == 9, np.nan, samples), rate, "FLOAT")
    reasons = {"missing": "no such file", "corrupt": "unreadable", "nan": "NaN", "short": "too short"}
    rows = []
    for number, name in enumerate(reasons):
        rows += [{"wav": str(world / f"clip{number}.wav"), "txt": "hello"}, {"wav": f"{name}.wav"}]
    write_manifest(tmp_path / "mixed.jsonl", rows)
    flags = f"--model_path trained {SEARCH} --num_workers 1"
    job = launch(
        "recognize.py", f"{flags} --data_path {tmp_path}/mixed.jsonl --result_path {tmp_path}/result.txt"
    ).wait()
    assert job.status == 0, job.err
    written = lines(tmp_path / "result.txt")
    assert written[::2] == lines(world / "decoded.txt")[:4]
    assert written[1::2] == [""] * 4
    for number, (name, reason) in enumerate(reasons.items()):
        (told,) = [line for line in job.err.splitlines() if f"{name}.wav" in line or f"line {2 * number + 2}:" in line]
        assert reason in told and f"line {2 * number + 2}:" in told
    assert re.search(r"^WER ", job.out, re.MULTILINE)  # of the four lines that have a reference
    assert re.search(r"4 lines", job.out), job.out


def test_audio_files_give_one_transcript_a_line_in_the_order_given(world, trained, recogniser, launch, tmp_path):
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
    job = launch("recognize.py", f"{SEARCH} --model_path trained {files}").wait()
    assert job.status == 0, job.err
    wanted = [
        transcribe(recogniser, audio) for audio in (str(world / "clip5.wav"), short, mono, str(world / "clip0.wav"))
    ]
    assert wanted[2]
    assert job.out.split("\n")[-6:-1] == [*wanted[:2], "", *wanted[2:]]
    assert re.search(r"^warning: audio 3: nowhere\.wav: no such file", job.err, re.MULTILINE)


# Wrong input.


def test_a_projector_of_another_width_is_told_with_both_widths(world, trained, launch, tmp_path):
    make_llm(tmp_path / "wide_llm", width=64)
    flags = f"--model_path trained --llm_model_name_or_path {tmp_path}/wide_llm"
    error = (
        launch("recognize.py", f"{flags} --data_path corpus.jsonl --result_path {tmp_path}/r.txt").wait().the_error()
    )
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
    ],
)
def test_a_command_line_that_lacks_something_fails_with_status_2(flags, told, trained, launch):
    job = launch("recognize.py", flags).wait()
    assert job.status == 2
    assert told in job.err.splitlines()[-1] and "Traceback" not in job.err


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--model_path nowhere", "nowhere: no such folder, nor a model on the Hub"),
        ("--projector_model_path nowhere/model.safetensors " + MODEL_FLAGS, "nowhere/model.safetensors"),
        ("--model_path trained --llm_model_name_or_path no_llm", "no_llm"),
        ("--model_path trained --result_path nowhere/result.txt", "nowhere"),
        ("--model_path trained --result_path result.trn", "wanted the ending .txt or .jsonl"),
    ],
)
def test_paths_that_do_not_exist_are_one_line(flags, told, trained, launch):
    result = "" if "--result_path" in flags else "--result_path never.txt"
    assert told in launch("recognize.py", f"--data_path corpus.jsonl {result} {flags}").wait().the_error()
