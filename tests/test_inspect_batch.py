"""train.py --check: one batch as the model gets it, what would spoil the training, and the memory of a step."""

import json
import re
from dataclasses import replace

import pytest
import torch
from conftest import TRAIN_FLAGS, noise, write_manifest
from torch.profiler import ProfilerActivity, profile

import inspect_batch
import train
from dataset import IGNORE, collate
from errors import InputError
from inspect_batch import Row, cells_of, measure_step, problem_of, rows_of
from manifest import SPEECH, Manifest
from model import SpeechLLM

FLAGS = f"{TRAIN_FLAGS} --llm_model_name_or_path llm --data_path corpus.jsonl --per_device_train_batch_size 4 --check"
HEADER = re.compile(r"^(\S+:\d+)  [\d.]+ s, (\d+) embeddings, (\d+) positions, (\d+) trained", re.MULTILINE)
END = 9  # in the rows below; 5 ... 8 are other tokens
GOOD = Row(
    where="train.jsonl:1",
    bad=None,
    transcript="hello world",
    seconds=1.0,
    ids=[0, 5, SPEECH, SPEECH, 6, 7, 8, END],
    mask=[0, 1, 1, 1, 1, 1, 1, 1],
    labels=[IGNORE] * 5 + [7, 8, END],
)


@pytest.fixture(scope="module")
def dataset(model, world):
    return model.make_dataset(Manifest(world / "corpus.jsonl"))


def test_a_batch_is_shown_and_nothing_is_trained(call, tmp_path):
    out = call(train.main, f"{FLAGS} --output_dir {tmp_path}/run").out
    assert len(HEADER.findall(out)) == 4
    assert "[" in out and "<|im_end|>" in out and "nothing wrong found" in out
    assert "\x1b" not in out  # no colours: this is no terminal
    assert not list(tmp_path.rglob("*.safetensors"))


def test_it_is_the_first_batch_in_the_order_of_the_run(call, dataset, tmp_path):
    out = call(train.main, f"{FLAGS} 2 --output_dir {tmp_path} --seed 3").out
    order = [position for _, position in train.LengthSampler(dataset.durations, 4, seed=3)]
    assert [where for where, *_ in HEADER.findall(out)] == [f"corpus.jsonl:{position + 1}" for position in order[:8]]


def test_what_is_told_of_an_utterance_is_what_the_batch_holds(call, dataset, tmp_path):
    out = call(train.main, f"{FLAGS} --output_dir {tmp_path}").out
    for where, *counts in HEADER.findall(out):
        example = dataset[int(where.partition(":")[2]) - 1]
        prompt, target = example["prompt_ids"], example["target_ids"]
        assert list(map(int, counts)) == [prompt.count(SPEECH), len(prompt) + len(target), len(target)]


def test_the_colours_come_in_a_terminal(call, tmp_path, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes standard output for a terminal
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    out = call(train.main, f"{FLAGS} --output_dir {tmp_path}").out
    assert re.search(r"\x1b\[36m\[\d+ embeddings\]", out)  # cyan
    assert re.search(r"\x1b\[7;32m<\|im_end\|>", out)  # reversed: the end token under training


def test_every_token_has_its_label_or_a_dash_and_its_mask(model, dataset):
    short, long = rows_of(collate([dataset[0], dataset[1]]), dataset)
    cells = cells_of(short, model.tokenizer)
    num_padding, num_speech = short.mask.count(0), short.ids.count(SPEECH)
    assert num_padding == len(long.ids) - sum(short.mask) > 0
    assert (cells[0].token, cells[0].label, cells[0].mask) == (f"padding ×{num_padding}", "-", "0")
    assert [cell.label for cell in cells if cell.token == f"[{num_speech} embeddings]"] == ["-"]
    trained = [cell for cell in cells if cell.label != "-"]
    assert trained == cells[-len(trained) :]
    assert all(cell.label == cell.token and cell.mask == "1" for cell in trained)
    text = "".join(cell.label for cell in trained).replace("·", " ")
    assert text == short.transcript + "<|im_end|>"


def test_lines_break_where_the_terminal_ends(call, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    out = call(train.main, f"{FLAGS} --output_dir {tmp_path}").out
    lines = [line for line in out.splitlines() if line.startswith(("token ", "label ", "mask "))]
    assert len(lines) > 3 * 4 and max(map(len, lines)) <= 60


def test_a_good_row_has_no_problem():
    assert problem_of(GOOD, {END}) is None


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ({"labels": [IGNORE] * 8}, "no label"),
        ({"labels": [IGNORE, 5, 6, 6, 6, 7, 8, END]}, "all labels"),
        ({"labels": [IGNORE] * 3 + [SPEECH, 6, 7, 8, END]}, "a label on padding or on speech"),
        ({"labels": [IGNORE] * 4 + [7, 8, END, END]}, "not its own token"),
        ({"labels": [IGNORE] * 5 + [7, 8, IGNORE]}, "no end token under training"),
        ({"ids": [0, 5, SPEECH, SPEECH, 6, 7, 8, 8], "labels": [IGNORE] * 5 + [7, 8, 8]}, "no end token"),
        ({"ids": [0, 5, SPEECH, SPEECH, 6, 7, END, END], "labels": [IGNORE] * 5 + [7, END, END]}, "token 2 of 3"),
        ({"transcript": 51 * "a"}, "longer than its audio can carry"),
    ],
)
def test_what_would_spoil_the_training_is_named(wrong, problem):
    assert problem in problem_of(replace(GOOD, **wrong), {END})


def test_nobody_says_more_than_50_letters_or_25_chinese_characters_a_second():
    for character, most in (("a", 50), ("好", 25)):
        assert problem_of(replace(GOOD, transcript=most * character), {END}) is None
        assert f"{most + 1} characters in 1.00 s" in problem_of(replace(GOOD, transcript=(most + 1) * character), {END})


def test_seconds_are_those_that_the_model_hears_whatever_the_manifest_states(model):
    record = {"wav": noise(2.0), "txt": 120 * "a", "where": "train.jsonl:7", "duration": 60.0}
    dataset = model.make_dataset([record])
    (row,) = rows_of(collate([dataset[0]]), dataset)
    assert row.seconds == pytest.approx(2.0, abs=0.11)


def test_a_wrong_utterance_ends_the_command_with_one_line_and_status_2(launch, world, tmp_path):
    rows = [json.loads(line) for line in (world / "corpus.jsonl").read_text().splitlines()]
    rows[6]["txt"] = 500 * "a"
    path = write_manifest(world / "too_long.jsonl", rows)
    flags = FLAGS.replace("corpus.jsonl", path.name).replace("--per_device_train_batch_size 4", "")
    flags += f" --output_dir {tmp_path} --per_device_train_batch_size 10 --model_max_length 1000"
    job = launch("train.py", flags, processes=2).wait()  # each checks its half of the twenty
    lines = [line for rank in (0, 1) for line in (job.logs / f"err{rank}").read_text().splitlines()]
    errors = [line for line in lines if line.startswith("error:")]
    assert job.status == 2 and len(set(errors)) == 1  # both processes say the same
    assert errors[0].startswith("error: too_long.jsonl:7: a transcript longer than its audio can carry: 500 characters")
    assert not any("Traceback" in line for line in lines)


def test_what_is_skipped_is_told_and_no_error(call, world, tmp_path):
    rows = [json.loads(line) for line in (world / "corpus.jsonl").read_text().splitlines()]
    rows[3]["txt"] = 2000 * "hello "  # does not fit into --model_max_length
    write_manifest(world / "skipped.jsonl", rows)
    flags = FLAGS.replace("corpus.jsonl", "skipped.jsonl").replace("size 4", "size 20")
    out = call(train.main, f"{flags} --on_bad_audio skip --output_dir {tmp_path}").out
    assert "left out: skipped.jsonl:4: " in out and "nothing wrong found" in out


def test_a_batch_without_a_label_is_an_error(call, world, tmp_path):
    write_manifest(world / "none.jsonl", [{"wav": f"clip{i}.wav", "txt": 2000 * "hello "} for i in range(2)])
    flags = FLAGS.replace("corpus.jsonl", "none.jsonl").replace("size 4", "size 2")
    with pytest.raises(InputError, match="batch 1 has not one label"):
        call(train.main, f"{flags} --on_bad_audio skip --output_dir {tmp_path}")


@pytest.fixture
def new_model(world):
    return SpeechLLM.from_parts(str(world / "whisper.pt"), str(world / "llm"), projector_hidden_size=64)


@pytest.fixture
def long_batch(new_model):
    """Eight clips of 10 s."""
    records = [{"wav": noise(10.0), "txt": 10 * "hello world ", "where": f"clip {i}"} for i in range(8)]
    return collate(list(new_model.make_dataset(records)))


def test_the_memory_of_a_step_is_estimated_within_a_tenth_of_what_pytorch_allocates(new_model, long_batch, tmp_path):
    model, batch = new_model, long_batch
    _, memory = measure_step(model, batch)
    assert not any(p.grad is not None for p in model.parameters())

    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    for _ in range(2):  # the second step has the optimiser's means from its begin
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            model(**{name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    memory_events = [event["args"] for event in events if event["name"] == "[memory]"]
    before = memory_events[0]["Total Allocated"] - memory_events[0]["Bytes"]
    peak = max(event["Total Allocated"] for event in memory_events) - before + memory.weights + memory.optimizer
    assert memory.total == pytest.approx(peak, rel=0.1)


def test_a_loss_that_is_no_number_is_an_error(new_model, long_batch, tmp_path, capsys):
    torch.nn.init.constant_(new_model.projector.linear2.bias, float("nan"))
    args = train.parse(f"{FLAGS} --output_dir {tmp_path}".split())[2]
    dataset = new_model.make_dataset([{"wav": noise(2.0), "txt": "hello world", "where": "clip 0"}])
    with pytest.raises(InputError, match="the loss is nan"):
        inspect_batch.show(train.SpeechTrainer(new_model, args, collate, dataset, settings={}), 1)
    assert "loss nan nats a token" in capsys.readouterr().out


def test_gradient_checkpointing_keeps_fewer_activations(new_model, long_batch):
    _, with_all = measure_step(new_model, long_batch)
    getattr(new_model, "activation_checkpointing_enable", new_model.gradient_checkpointing_enable)()
    _, memory = measure_step(new_model, long_batch)
    assert memory.activations < with_all.activations / 2
    assert replace(memory, activations=0) == replace(with_all, activations=0)
