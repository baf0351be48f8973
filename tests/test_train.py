"""The training command: what it saves, that it goes on after a kill, and what it says about wrong input.

Each run is a process of its own (see `launch` in conftest.py); the published command is started by torchrun itself.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import MODEL_FLAGS, ROOT, TRAIN_FLAGS, TRAINED_FLAGS, write_manifest
from safetensors.torch import load_file

from dataset import collate
from manifest import BadUtterance, InputError, Manifest
from model import SpeechLLM
from resume import find_checkpoint, keep_best

PROJECTOR = {f"projector.{layer}.{kind}" for layer in ("conv", "linear1", "linear2") for kind in ("weight", "bias")}
# From https://github.com/wenet-e2e/west, with tiny models on two CPU processes and without --bf16.
PUBLISHED = f"""--standalone --nnodes=1 --nproc_per_node=2 {ROOT}/train.py
    --use_cpu
    --llm_model_name_or_path llm
    --whisper_model_name_or_path whisper.pt
    --data_path corpus.jsonl
    --output_dir published
    --num_train_epochs 5
    --per_device_train_batch_size 8
    --per_device_eval_batch_size 1
    --gradient_accumulation_steps 8
    --evaluation_strategy "no"
    --save_strategy "steps"
    --save_steps 100
    --save_total_limit 10
    --learning_rate 3e-4
    --weight_decay 0.01
    --adam_beta2 0.95
    --warmup_ratio 0.01
    --lr_scheduler_type "cosine"
    --logging_steps 1
    --report_to "none"
    --model_max_length 512
    --gradient_checkpointing
    --dataloader_num_workers 4
    --dataloader_prefetch_factor 10
    --deepspeed {ROOT}/ds_config_zero3.json"""


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same(found: dict, wanted: dict, within: float = 0) -> None:
    """Two sets of weights are the same, bit for bit unless a difference is allowed."""
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=within, msg=lambda m, n=name: f"{n}: {m}")


def history(folder: Path) -> list[dict]:
    """The log of the last checkpoint."""
    last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    return json.loads((last / "trainer_state.json").read_text())["log_history"]


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in history(folder) if "loss" in row]


def evaluations(folder: Path) -> list[tuple[float, float]]:
    return [(row["eval_loss"], row["eval_wer"]) for row in history(folder) if "eval_loss" in row]


@pytest.fixture(scope="session")
def zero3(world, trained, launch) -> Path:
    """The run of `trained` under DeepSpeed ZeRO-3 on two processes: half the batch on each."""
    zero = f"--deepspeed {ROOT}/ds_config_zero3.json --per_device_train_batch_size 2 --per_device_eval_batch_size 2"
    job = launch("train.py", f"{TRAIN_FLAGS} {TRAINED_FLAGS} {zero} --output_dir zero3", processes=2).wait()
    assert job.status == 0, job.err
    return world / "zero3"


@pytest.fixture(scope="session")
def ddp(world, trained, launch) -> Path:
    """The run of `trained` under DistributedDataParallel on two processes."""
    batches = "--per_device_train_batch_size 2 --per_device_eval_batch_size 1"
    job = launch("train.py", f"{TRAIN_FLAGS} {TRAINED_FLAGS} {batches} --output_dir ddp", processes=2).wait()
    assert job.status == 0, job.err
    return world / "ddp"


def test_the_published_command_trains_under_torchrun_and_zero3(world):
    command = [str(Path(sys.executable).with_name("torchrun")), *shlex.split(PUBLISHED)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=world, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    saved = weights(world / "published")
    assert saved.keys() == PROJECTOR
    assert saved["projector.linear1.weight"].shape == (2048, 32)
    state = json.loads((world / "published/checkpoint-5/trainer_state.json").read_text())
    assert state["global_step"] == 5  # 20 clips are one step of 2 x 8 x 8 an epoch
    learning_rates = [row["learning_rate"] for row in state["log_history"] if "loss" in row]
    assert learning_rates[0] == 0  # one step of warm-up
    assert learning_rates[1] == pytest.approx(3e-4) and learning_rates[-1] < 1e-4


def test_dropped_flag_names_are_accepted_with_a_space_or_an_equals_sign():
    from arguments import parse

    needed = f"{TRAIN_FLAGS} --data_path train.jsonl --eval_data_path dev.jsonl --output_dir out".split()
    for old in ("--evaluation_strategy steps --warmup_ratio 0.1", "--evaluation_strategy=steps --warmup_ratio=0.1"):
        _, _, args = parse([*needed, *old.split()])
        assert (args.eval_strategy.value, args.warmup_steps, args.get_warmup_steps(200)) == ("steps", 0.1, 20)


@pytest.mark.parametrize(
    "flags", ["--num_train_epoch 5", "--no_such_flag", "stray", "--on_bad_audio ignore", "--learning_rate fast"]
)
def test_an_unknown_flag_or_value_fails_with_status_2(flags, launch):
    job = launch("train.py", f"{TRAIN_FLAGS} --data_path corpus.jsonl --output_dir never {flags}").wait()
    assert job.status == 2
    assert "Traceback" not in job.err
    assert flags.split()[0].lstrip("-") in job.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        (
            "train.py",
            "llm_model_name_or_path encoder_name_or_path data_path eval_data_path output_dir model_max_length "
            "max_seconds on_bad_audio projector_stride deepspeed learning_rate",
        ),
        (
            "recognize.py",
            "model_path projector_model_path llm_model_name_or_path whisper_model_name_or_path data_path result_path "
            "num_beams batch_size max_new_tokens device",
        ),
        ("score.py", "data_path result_path metric normalizer json"),
    ],
)
def test_help_names_the_flags(script, flags, launch):
    job = launch(script, "--help").wait()
    assert job.status == 0, job.err
    assert {f"--{flag}" for flag in flags.split()} <= set(re.findall(r"--\w+", job.out))


def test_only_the_projector_is_saved_and_the_folder_says_how_to_use_it(trained, world, monkeypatch):
    assert weights(trained).keys() == PROJECTOR
    assert weights(trained / "checkpoint-5").keys() == PROJECTOR
    assert_same(weights(trained), weights(trained / "checkpoint-10"))
    config = json.loads((trained / "config.json").read_text())
    wanted = {"projector_stride": 5, "projector_hidden_size": 64, "encoder_size": 32, "hidden_size": 48}
    wanted |= {"llm_model_name_or_path": str(world / "chinese_llm"), "encoder_name_or_path": str(world / "whisper.pt")}
    assert {name: config[name] for name in wanted} == wanted  # the run was given relative paths
    assert config["training"].items() >= {"data": "corpus.jsonl", "utterances": 20, "steps": 10}.items()
    monkeypatch.chdir("/")
    assert_same(SpeechLLM.from_pretrained(trained).saved(), weights(trained))


def test_the_weights_are_saved_at_the_end_even_without_checkpoints(world, chinese_llm, launch):
    flags = "--data_path corpus.jsonl --output_dir last_only --max_steps 2 --save_strategy no"
    job = launch("train.py", f"{TRAIN_FLAGS} {flags}").wait()
    assert job.status == 0, job.err
    assert weights(world / "last_only").keys() == PROJECTOR
    assert not list((world / "last_only").glob("checkpoint-*"))


def test_two_processes_train_what_one_trains_with_the_same_total_batch(trained, ddp):
    assert losses(ddp) == pytest.approx(losses(trained), abs=1e-3)
    assert_same(weights(ddp), weights(trained), within=1e-5)


def test_zero3_trains_what_one_process_trains(trained, zero3):
    assert losses(zero3) == pytest.approx(losses(trained), abs=1e-3)
    assert_same(weights(zero3), weights(trained), within=1e-5)
    assert_same(weights(zero3 / "checkpoint-5"), weights(trained / "checkpoint-5"), within=1e-5)


def test_a_zero3_checkpoint_holds_no_frozen_weights(zero3, world, chinese_llm):
    model = SpeechLLM.from_parts(str(world / "whisper.pt"), str(chinese_llm), projector_hidden_size=64)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    files = sorted((zero3 / "checkpoint-5").glob("*/*_states.pt"))
    assert len(files) == 4  # weights and optimiser of two processes
    for path in files:
        state = torch.load(path, weights_only=False)
        assert not frozen & set(state.get("module", {}))
        assert not frozen & {name for group in state.get("param_shapes", []) for name in group}
    optimizer = sum(path.stat().st_size for path in files if "optim" in path.name)
    trained_bytes = (zero3 / "checkpoint-5/model.safetensors").stat().st_size
    assert optimizer < 4 * trained_bytes  # fp32 weights and the two moments of Adam


def test_evaluation_reports_loss_and_wer_whatever_the_batch_and_the_number_of_processes(
    trained, ddp, zero3, world, monkeypatch
):
    """Seven clips in batches of 3, 1 and 2, on one process and on two; the loss is that of each clip on its own."""
    single = evaluations(trained)
    assert len(single) == 2
    for other in (ddp, zero3):
        assert np.array(evaluations(other)) == pytest.approx(np.array(single), rel=1e-4)  # a loss of about ten
    monkeypatch.chdir(world)
    model = SpeechLLM.from_pretrained(trained)
    total = tokens = 0
    for example in model.make_dataset(Manifest("eval.jsonl")):
        batch = collate([example])
        batch = {name: batch[name] for name in batch.keys() - {"index", "bad"}}
        total += model(**batch, num_items_in_batch=1)["loss"].item()
        tokens += len(example["target_ids"])
    assert single[-1][0] == pytest.approx(total / tokens, abs=1e-4)


def test_the_checkpoint_of_the_best_wer_is_kept_and_loaded(world, trained, launch):
    best = "--metric_for_best_model wer --load_best_model_at_end --save_total_limit 1"
    flags = f"{TRAIN_FLAGS} {TRAINED_FLAGS} --per_device_train_batch_size 4 {best} --output_dir best"
    job = launch("train.py", f"{flags} --eval_steps 2 --save_steps 2").wait()
    assert job.status == 0, job.err
    folders = sorted((world / "best").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    state = json.loads((folders[-1] / "trainer_state.json").read_text())
    rates = {row["step"]: row["eval_wer"] for row in state["log_history"] if "eval_wer" in row}
    first = min(rates, key=rates.get)
    assert state["best_metric"] == min(rates.values())
    assert Path(state["best_model_checkpoint"]).name == f"checkpoint-{first}"
    assert_same(weights(world / "best"), weights(world / f"best/checkpoint-{first}"))


# Going on after a kill. 20 clips in batches of 2, three to a step: four steps an epoch, the last of one batch only.
RESUMED = (
    f"{TRAIN_FLAGS} --data_path corpus.jsonl --num_train_epochs 4 --per_device_train_batch_size 2 --learning_rate 1e-3 "
    "--gradient_accumulation_steps 3 --save_steps 3"
)


@pytest.fixture(scope="session")
def never_stopped(world, chinese_llm, launch) -> Path:
    job = launch("train.py", f"{RESUMED} --output_dir never_stopped").wait()
    assert job.status == 0, job.err
    assert "going on" not in job.out
    assert len(losses(world / "never_stopped")) == 16
    return world / "never_stopped"


def test_a_run_killed_twice_ends_with_the_very_weights_of_one_never_stopped(world, never_stopped, launch):
    folder, flags = world / "killed", f"{RESUMED} --output_dir killed"
    launch("train.py", flags, die_at="killed/checkpoint-6").died()  # checkpoint-3: in the middle of the first epoch
    second = launch("train.py", flags, die_at="killed/checkpoint-12").died()
    assert "going on from killed/checkpoint-3\n" in second.out
    assert not (folder / "model.safetensors").exists()
    third = launch("train.py", flags).wait()
    assert third.status == 0, third.err
    assert "going on from killed/checkpoint-9\n" in third.out
    assert_same(weights(folder), weights(never_stopped))
    assert losses(folder) == losses(never_stopped)


@pytest.mark.parametrize("torn", ["missing", "empty", "half"])
def test_a_checkpoint_torn_by_the_kill_is_passed_over(torn, tmp_path, never_stopped, launch):
    """trainer_state.json is what is written last."""
    shutil.copytree(never_stopped, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-16"))
    state = tmp_path / "run/checkpoint-15/trainer_state.json"
    whole = state.read_text()
    state.unlink()
    if torn != "missing":
        state.write_text("" if torn == "empty" else whole[: len(whole) // 2])
    (tmp_path / "run/checkpoint-15/optimizer.pt").write_bytes(b"torn")
    job = launch("train.py", f"{RESUMED} --output_dir {tmp_path}/run").wait()
    assert job.status == 0, job.err
    assert f"going on from {tmp_path}/run/checkpoint-12\n" in job.out
    assert_same(weights(tmp_path / "run"), weights(never_stopped))


def test_the_same_command_after_the_end_changes_nothing(tmp_path, never_stopped, launch):
    shutil.copytree(never_stopped, tmp_path / "run")
    job = launch("train.py", f"{RESUMED} --output_dir {tmp_path}/run").wait()
    assert job.status == 0, job.err
    assert f"going on from {tmp_path}/run/checkpoint-16\n" in job.out
    assert_same(weights(tmp_path / "run"), weights(never_stopped))


def test_the_same_command_after_the_last_of_max_steps_changes_nothing(world, chinese_llm, launch):
    """In the middle of an epoch, where Trainer would take one step more."""
    flags = f"{TRAIN_FLAGS} --data_path corpus.jsonl --per_device_train_batch_size 2 --max_steps 4 --save_steps 2"
    flags += " --learning_rate 1e-3 --lr_scheduler_type constant --output_dir ended"
    assert launch("train.py", flags).wait().status == 0
    before = weights(world / "ended")
    job = launch("train.py", flags).wait()
    assert "going on from ended/checkpoint-4\n" in job.out, job.err
    assert_same(weights(world / "ended"), before)
    assert sorted(path.name for path in (world / "ended").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    (world / "ended/checkpoint-4/optimizer.pt").unlink()
    assert "no run can go on from weights alone" in launch("train.py", flags).wait().the_error()


def test_neftune_adds_its_noise(world, chinese_llm, launch):
    flags = f"{TRAIN_FLAGS} --data_path corpus.jsonl --max_steps 2 --save_strategy no --output_dir"
    found = []
    for name, more in (("quiet", ""), ("noisy", "--neftune_noise_alpha 5"), ("loud", "--neftune_noise_alpha 50")):
        job = launch("train.py", f"{flags} {name} {more}").wait()
        assert job.status == 0, job.err
        found.append(weights(world / name)["projector.conv.weight"])
    assert not found[0].equal(found[1]) and not found[1].equal(found[2])


def test_an_evaluation_set_alone_is_evaluated_at_the_end(world, trained, launch):
    flags = f"{TRAIN_FLAGS} --data_path corpus.jsonl --eval_data_path eval.jsonl --max_steps 2 --output_dir evaluated"
    for more, processes in (("", 1), (f"--deepspeed {ROOT}/ds_config_zero3.json", 2)):
        job = launch("train.py", f"{flags}{processes} {more}", processes=processes).wait()
        assert job.status == 0, job.err
        assert len(re.findall(r"evaluation: loss \d+\.\d+, WER \d+\.\d\d%", job.out)) == 1
        assert "| WER in evaluation |" in (world / f"evaluated{processes}/README.md").read_text()


def test_an_evaluation_that_fails_at_the_end_loses_nothing(world, chinese_llm, launch):
    soundfile.write(world / "nan_at_the_end.wav", np.full(8000, np.nan), 16000, subtype="FLOAT")
    write_manifest(world / "bad_eval.jsonl", [{"wav": "nan_at_the_end.wav", "txt": "hello"}])
    flags = "--data_path corpus.jsonl --eval_data_path bad_eval.jsonl --max_steps 2 --save_strategy no"
    job = launch("train.py", f"{TRAIN_FLAGS} {flags} --output_dir not_lost").wait()
    assert "bad_eval.jsonl:1" in job.the_error()
    assert weights(world / "not_lost").keys() == PROJECTOR


@pytest.mark.parametrize(
    ("flags", "setting", "values"),
    [
        ("--learning_rate 2e-3", "learning_rate", ("0.001", "0.002")),
        ("--prompt '<audio> What was said?'", "prompt", ("Transcribe the speech", "What was said?")),
        ("--data_path eval.jsonl", "manifest", ("corpus.jsonl", "eval.jsonl")),
        ("--projector_stride 4", "projector_stride", ("5", "4")),
        ("--gradient_accumulation_steps 2", "gradient_accumulation_steps", ("3", "2")),
    ],
)
def test_a_restart_with_another_setting_is_refused(flags, setting, values, world, trained, never_stopped, launch):
    if setting == "manifest":  # known by what is in it
        values = tuple(Manifest(str(world / name)).sha256 for name in values)
    job = launch("train.py", f"{RESUMED} --output_dir never_stopped {flags}").wait()
    error = job.the_error()
    assert "never_stopped/checkpoint-16" in error
    assert re.search(rf"\b{setting} was .*{re.escape(values[0])}.* and is .*{re.escape(values[1])}", error), error


def test_zero3_killed_with_its_whole_process_group_goes_on(world, zero3, launch):
    """Killed once after checkpoint-5 of ten steps: the weights are those of the run that was not."""
    zero = f"--deepspeed {ROOT}/ds_config_zero3.json --per_device_train_batch_size 2 --per_device_eval_batch_size 2"
    flags = f"{TRAIN_FLAGS} {TRAINED_FLAGS} {zero} --output_dir zero3_killed"
    launch("train.py", flags, processes=2, die_at="zero3_killed/checkpoint-10").died()
    job = launch("train.py", flags, processes=2).wait()
    assert job.status == 0, job.err
    assert "going on from zero3_killed/checkpoint-5\n" in job.out
    assert_same(weights(world / "zero3_killed"), weights(zero3))


# Wrong input. BAD makes the second line of a manifest wrong, in the folder that it is given.


def no_file(folder):
    return {"wav": "nowhere.wav", "txt": "hello"}


def no_audio(folder):
    (folder / "text.wav").write_text("this is no audio")
    return {"wav": "text.wav", "txt": "hello"}


def noise(folder, name: str, seconds: float) -> dict:
    samples = np.random.default_rng(0).normal(0, 0.1, round(16000 * seconds)).astype(np.float32)
    soundfile.write(folder / name, samples, 16000, subtype="FLOAT")
    return {"wav": name, "txt": "hello"}


def not_a_number(folder):
    record = noise(folder, "nan.wav", 1)
    samples, rate = soundfile.read(folder / "nan.wav")
    samples[8000] = np.nan
    soundfile.write(folder / "nan.wav", samples, rate, subtype="FLOAT")
    return record


BAD = {
    "a missing file": (no_file, "nowhere.wav: no such file"),
    "no audio file": (no_audio, "text.wav: unreadable"),
    "no samples": (lambda folder: noise(folder, "empty.wav", 0), "empty"),
    "NaN in the audio": (not_a_number, "nan.wav: the audio holds NaN"),
    "0.01 s": (lambda folder: noise(folder, "short.wav", 0.01), "too short"),
    "0.08 s": (lambda folder: noise(folder, "shorter.wav", 0.08), "too short"),
    "a long clip": (lambda folder: noise(folder, "long.wav", 4.5), "4.50 s of audio, over --max_seconds 4"),
    "a long transcript": (lambda folder: noise(folder, "ok.wav", 1) | {"txt": "hello " * 200}, "--model_max_length"),
}
BAD_FLAGS = f"{TRAIN_FLAGS} --max_steps 4 --save_strategy no --max_seconds 4 --model_max_length 256"


def good(world, number: int = 0) -> dict:
    return {"wav": str(world / f"clip{number}.wav"), "txt": "hello world"}


@pytest.mark.parametrize("kind", BAD)
def test_an_utterance_that_cannot_be_used_stops_training_with_its_line(kind, world, chinese_llm, launch, tmp_path):
    make, reason = BAD[kind]
    manifest = write_manifest(tmp_path / "bad.jsonl", [good(world), make(tmp_path), good(world, 1)])
    job = launch(
        "train.py", f"{BAD_FLAGS} --data_path {manifest} --output_dir {tmp_path}/run --dataloader_num_workers 1"
    ).wait()
    error = job.the_error()
    assert f"{manifest}:2: " in error and reason in error and "--on_bad_audio skip" in error
    assert not (tmp_path / "run/model.safetensors").exists()


def test_bad_utterances_are_skipped_counted_and_listed_when_asked(world, chinese_llm, launch, tmp_path):
    rows = [row for number, (make, _) in enumerate(BAD.values()) for row in (good(world, number), make(tmp_path))]
    manifest = write_manifest(tmp_path / "mixed.jsonl", rows)
    flags = f"--data_path {manifest} --output_dir {tmp_path}/run --on_bad_audio skip --dataloader_num_workers 1"
    job = launch("train.py", f"{BAD_FLAGS} {flags} --per_device_train_batch_size 4").wait()
    assert job.status == 0, job.err
    assert weights(tmp_path / "run").keys() == PROJECTOR
    _, listed = job.err.split(f"skipped {len(BAD)} bad utterances:\n")
    assert len(listed.splitlines()) == len(BAD)
    for number, (_, reason) in enumerate(BAD.values()):
        (line,) = [line for line in listed.splitlines() if f"{manifest}:{2 * number + 2}: " in line]
        assert reason in line


def test_a_skipped_utterance_leaves_no_trace_in_the_weights(world, chinese_llm, launch, tmp_path):
    """A clip that turns out bad when it is read stands in its batch without a label."""
    model = SpeechLLM.from_parts(str(world / "whisper.pt"), str(chinese_llm), projector_hidden_size=64)
    manifest = write_manifest(tmp_path / "mixed.jsonl", [good(world, 3), not_a_number(tmp_path)])
    dataset = model.make_dataset(Manifest(str(manifest)), on_bad="skip")
    for examples in ([dataset[0]], [dataset[0], dataset[1]]):
        batch = collate(examples)
        batch = {name: batch[name] for name in batch.keys() - {"index", "bad"}}
        model(**batch)["loss"].backward()
    once = model.projector.linear2.weight.grad  # summed over two times the same
    model.zero_grad()
    batch = collate([dataset[0]])
    model(**{name: batch[name] for name in batch.keys() - {"index", "bad"}})["loss"].backward()
    wanted = 2 * model.projector.linear2.weight.grad
    assert (once - wanted).norm() < 1e-4 * wanted.norm()
    with pytest.raises(BadUtterance, match=r"mixed\.jsonl:2: .*NaN"):
        model.make_dataset(Manifest(str(manifest)))[1]


@pytest.mark.parametrize("kind", ["a missing file", "NaN in the audio"])
def test_training_on_nothing_but_bad_utterances_is_an_error(kind, world, chinese_llm, launch, tmp_path):
    record = BAD[kind][0](tmp_path)
    manifest = write_manifest(tmp_path / "all_bad.jsonl", [record, record, record])
    flags = f"--data_path {manifest} --output_dir {tmp_path}/run --on_bad_audio skip"
    error = launch("train.py", f"{BAD_FLAGS} {flags}").wait().the_error()
    assert "all_bad.jsonl:" in error and Path(record["wav"]).name in error
    assert not (tmp_path / "run/model.safetensors").exists()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "broken.jsonl: no such manifest"),
        ("", "broken.jsonl: the manifest is empty"),
        ('{"wav": "a.wav", "txt": "a"}\n{"wav": "b.wav", "txt": \n', "broken.jsonl:2: malformed JSON"),
        ('{"wav": "a.wav", "txt": "a"}\n{"wav": "b.wav"}\n', "broken.jsonl:2: missing ['txt']"),
        ('{"wav": "a.wav", "txt": "a"}\n{"txt": "b"}\n', "broken.jsonl:2: missing ['wav']"),
        ('{"wav": "a.wav", "txt": "a"}\n["b.wav", "b"]\n', "broken.jsonl:2: found "),
    ],
)
@pytest.mark.parametrize("script", ["train.py", "recognize.py"])
def test_a_broken_manifest_is_told_with_file_and_line(script, text, told, tmp_path, trained, launch):
    manifest = tmp_path / "broken.jsonl"
    if text is not None:
        manifest.write_text(text)
    if script == "train.py":
        flags = f"{BAD_FLAGS} --data_path {manifest} --output_dir {tmp_path}/run --on_bad_audio skip"
    elif "'txt'" in told:
        pytest.skip("recognition needs no transcripts")
    else:
        flags = f"--model_path trained --data_path {manifest} --result_path {tmp_path}/result.txt"
    assert told in launch(script, flags).wait().the_error()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--llm_model_name_or_path no_llm", "no_llm: cannot load the LLM"),
        ("--whisper_model_name_or_path no_whisper", "no_whisper: cannot load a speech encoder"),
        ("--projector_model_path nowhere/model.safetensors", "nowhere/model.safetensors"),
        ("--projector_model_path trained/model.safetensors --projector_hidden_size 32", "linear1.weight"),
        ("--eval_data_path nowhere.jsonl --eval_strategy epoch", "nowhere.jsonl: no such manifest"),
        ("--eval_strategy epoch", "--eval_data_path"),
        ("--prompt 'Transcribe the speech'", "<audio>"),
    ],
)
def test_other_wrong_input_is_one_line_too(flags, told, trained, launch, tmp_path):
    job = launch("train.py", f"{BAD_FLAGS} --data_path corpus.jsonl --output_dir {tmp_path}/run {flags}").wait()
    assert told in job.the_error()


def test_overfitting_a_few_clips_brings_the_loss_down(world, chinese_llm, launch, tmp_path):
    """The best that a projector before a random LLM can do; four clips of the same text."""
    flags = f"--use_cpu {MODEL_FLAGS} --projector_hidden_size 64 --report_to none --save_strategy no --logging_steps 10"
    write_manifest(tmp_path / "few.jsonl", [good(world, number) for number in (3, 6, 9, 12)])
    job = launch(
        "train.py",
        f"{flags} --llm_model_name_or_path llm --data_path {tmp_path}/few.jsonl --output_dir {tmp_path}/run "
        "--max_steps 60 --per_device_train_batch_size 4 --learning_rate 3e-3",
    ).wait()
    assert job.status == 0, job.err
    means = [float(value) for value in re.findall(r"'loss': '([\d.]+)'", job.out)]
    assert len(means) == 6
    assert means[-1] < 0.6 * means[0]


def test_gradient_checkpointing_changes_no_weight(world, launch, chinese_llm):
    flags = f"{TRAIN_FLAGS} --data_path corpus.jsonl --max_steps 3 --save_steps 3 --per_device_train_batch_size 4"
    for more in ("stored", "recomputed --gradient_checkpointing"):
        job = launch("train.py", f"{flags} --output_dir {more}").wait()
        assert job.status == 0, job.err
    assert_same(weights(world / "recomputed"), weights(world / "stored"), within=1e-6)


def test_label_smoothing_and_random_sampling_are_heeded(world, launch, chinese_llm):
    """Smoothed targets change the first loss; random sampling is another order of the clips, the same a second time."""
    flags = f"{TRAIN_FLAGS} --data_path corpus.jsonl --max_steps 3 --save_steps 3 --per_device_train_batch_size 20"
    variants = {
        "exact": "",
        "smoothed": "--label_smoothing_factor 0.2",
        "shuffled": "--train_sampling_strategy random --per_device_train_batch_size 4",
        "again": "--train_sampling_strategy random --per_device_train_batch_size 4",
        "sorted": "--per_device_train_batch_size 4",
    }
    jobs = [launch("train.py", f"{flags} --output_dir {name} {more}") for name, more in variants.items()]
    for job in jobs:
        assert job.wait().status == 0, job.err
    first = {name: losses(world / name)[0] for name in variants}
    assert first["smoothed"] != pytest.approx(first["exact"], abs=1e-3)
    assert losses(world / "shuffled") == losses(world / "again")
    assert first["shuffled"] != pytest.approx(first["sorted"], abs=1e-3)


# The best checkpoints


def write_checkpoint(folder: Path, step: int, rate: float | None) -> None:
    (folder / f"checkpoint-{step}").mkdir(parents=True)
    logs = [{"step": step, "loss": 1.0}, {"step": step - 1, "eval_wer": 0.0}]
    logs += [] if rate is None else [{"step": step, "eval_wer": rate}]
    (folder / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"log_history": logs}))


@pytest.mark.parametrize(
    ("rates", "count", "kept"),
    [
        ({2: 0.5, 4: 0.2, 6: 0.3, 8: 0.4}, 2, [4, 6, 8]),  # the last is kept to go on from
        ({2: 0.5, 4: 0.2, 6: 0.3, 10: 0.1}, 2, [4, 10]),
        ({2: 0.5, 4: 0.5, 100: 0.5}, 1, [100]),  # of equals the later
        ({2: None, 4: 0.9, 6: 0.8}, 1, [6]),
        ({1: 0.5, 2: float("nan"), 3: 0.1, 4: float("nan"), 5: 0.9}, 1, [3, 5]),
    ],
)
def test_the_best_checkpoints_and_the_last_are_kept(tmp_path, rates, count, kept):
    for step, rate in rates.items():
        write_checkpoint(tmp_path, step, rate)
    keep_best(str(tmp_path), "wer", count)
    assert sorted(int(path.name[11:]) for path in tmp_path.iterdir()) == kept


def test_a_run_keeps_its_checkpoints_with_the_lowest_evaluation_loss(world, chinese_llm, trained, launch):
    flags = "--data_path corpus.jsonl --eval_data_path eval.jsonl --max_steps 5 --learning_rate 3e-2 --save_steps 1"
    flags += " --eval_strategy steps --eval_steps 1 --save_best_by loss --save_total_limit 2 --output_dir best_by_loss"
    job = launch("train.py", f"{TRAIN_FLAGS} {flags}").wait()
    assert job.status == 0, job.err
    state = json.loads((world / "best_by_loss/checkpoint-5/trainer_state.json").read_text())
    rates = {row["step"]: row["eval_loss"] for row in state["log_history"] if "eval_loss" in row}
    wanted = {*sorted(rates, key=rates.get)[:2], 5}
    assert {int(path.name[11:]) for path in (world / "best_by_loss").glob("checkpoint-*")} == wanted
    assert rates[min(rates, key=rates.get)] < rates[max(rates, key=rates.get)]


def test_a_run_goes_on_from_a_given_checkpoint_in_a_folder_of_its_own(tmp_path, never_stopped, launch):
    flags = f"{RESUMED} --resume_from_checkpoint never_stopped/checkpoint-6 --output_dir {tmp_path}/branch"
    job = launch("train.py", flags).wait()
    assert job.status == 0, job.err
    assert "going on from never_stopped/checkpoint-6\n" in job.out
    assert_same(weights(tmp_path / "branch"), weights(never_stopped))


def test_a_given_checkpoint_loses_nothing_of_what_came_later(tmp_path, never_stopped):
    settings = json.loads((never_stopped / "checkpoint-6/train_settings.json").read_text())
    run, given = tmp_path / "run", str(never_stopped / "checkpoint-6")
    assert find_checkpoint(str(run), settings, given) == given
    shutil.copytree(never_stopped / "checkpoint-9", run / "checkpoint-9")  # the same command after a kill
    assert find_checkpoint(str(run), settings, given) == f"{run}/checkpoint-9"
    with pytest.raises(InputError, match="checkpoint-9 is there too; choose another --output_dir"):
        find_checkpoint(str(run), settings, str(never_stopped / "checkpoint-12"))
    last = find_checkpoint(str(never_stopped), settings)
    assert find_checkpoint(str(never_stopped), settings, last) == last
    with pytest.raises(InputError, match="checkpoint-16 is there too; choose another --output_dir"):
        find_checkpoint(str(never_stopped), settings, given)
    with pytest.raises(InputError, match="--resume_from_checkpoint True: no complete checkpoint"):
        find_checkpoint(str(run), settings, "True")


def test_weights_alone_are_saved_when_asked_and_nothing_goes_on_from_them(world, chinese_llm, launch):
    flags = f"{TRAIN_FLAGS} --data_path corpus.jsonl --max_steps 2 --save_steps 1 --save_only_model"
    job = launch("train.py", f"{flags} --output_dir light").wait()
    assert job.status == 0, job.err
    last = world / "light/checkpoint-2"
    assert weights(last).keys() == PROJECTOR and not (last / "optimizer.pt").exists()
    error = launch("train.py", f"{flags} --output_dir light").wait().the_error()
    start = re.search("--projector_model_path [^ ]+", error)[0]
    assert launch("train.py", f"{flags} --output_dir from_light {start}").wait().status == 0


def test_two_processes_train_an_encoder_of_which_a_chosen_layer_leaves_some_unused(world, chinese_llm, launch):
    flags = "--data_path corpus.jsonl --max_steps 3 --freeze_params ^llm --encoder_layer 1 --output_dir unfrozen"
    job = launch("train.py", f"{TRAIN_FLAGS} {flags} --per_device_train_batch_size 2", processes=2).wait()
    assert job.status == 0, job.err
    assert any(name.startswith("encoder.") for name in weights(world / "unfrozen"))


def test_save_best_by_a_rate_that_is_not_counted_is_told(world, trained, launch):
    flags = "--data_path corpus.jsonl --eval_data_path eval.jsonl --max_steps 2 --save_steps 1 --save_best_by cer"
    job = launch("train.py", f"{TRAIN_FLAGS} {flags} --eval_strategy steps --eval_steps 1 --output_dir cer").wait()
    assert "--save_best_by cer: wanted one of ['loss', 'wer']" in job.the_error()


@pytest.mark.parametrize(("ending", "status"), [("pass", 0), ("raise InputError('wrong')", 2)])
def test_a_process_of_several_leaves_without_the_teardown_in_which_gloo_may_abort_it(tmp_path, ending, status):
    code = f"""
import atexit, torch.distributed as dist
from manifest import InputError, run

class Teardown:
    def __del__(self):
        print("torn down")

def main():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    atexit.register(print, "good-bye")
    {ending}

kept = Teardown()
run(main)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (status, "good-bye\n"), done.stderr
    assert ("error: wrong" in done.stderr) == (status == 2)
